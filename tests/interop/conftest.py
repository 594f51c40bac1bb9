"""Makes the modules of `tests` importable here, whatever directory pytest is started for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
