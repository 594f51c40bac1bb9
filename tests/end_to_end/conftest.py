"""Gateways that many tests share. A test uses an identity of its own, so that none is in the way of another."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from end_to_end.wire import Stage, set_up

MAKE_CERTS = Path(__file__).parents[2] / "certs" / "make_certs.py"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stage]]:
    """Stages with default settings, by broker and version of MQTT; each is set up when it is first asked for."""
    running: dict[str, Stage] = {}
    with ExitStack() as stack:

        def stage(broker: str) -> Stage:
            if broker not in running:
                running[broker] = stack.enter_context(set_up(tmp_path_factory.mktemp("stage"), broker))
            return running[broker]

        yield stage


@pytest.fixture(params=["mosquitto 5", "mosquitto 3.1.1", "embedded 3.1.1"])
def stage(request: pytest.FixtureRequest, stages: Callable[[str], Stage]) -> Iterator[Stage]:
    """A gateway on each kind of broker."""
    yield from _told(stages(request.param))


@pytest.fixture
def stage_5(stages: Callable[[str], Stage]) -> Iterator[Stage]:
    """A gateway on a broker that speaks MQTT 5."""
    yield from _told(stages("mosquitto 5"))


def _told(stage: Stage) -> Iterator[Stage]:
    """What the gateway prints during a test is shown when the test fails."""
    seen = len(stage.gateway.lines)
    yield stage
    print("the gateway printed:", *stage.gateway.lines[seen:], sep="\n")


@pytest.fixture
def cid() -> str:
    """An identity that no other test has."""
    return f"CP{next(_numbers)}"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with what certs/make_certs.py makes."""
    directory = tmp_path_factory.mktemp("certificates")
    subprocess.run([sys.executable, MAKE_CERTS, directory], check=True)
    return directory
