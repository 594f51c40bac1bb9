"""The charge point simulator of lorenzodonini's ocpp-go goes through its scripted charging session."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from processes import Process, require, unavailable
from stage import stage

MODULE = "github.com/lorenzodonini/ocpp-go@v0.19.0"
PACKAGE = "./example/1.6/cp"

SCRIPT = Counter(
    {
        "BootNotification": 1,
        "StatusNotification": 5,  # Available, Preparing, Charging, Finishing, Available
        "SecurityEventNotification": 1,
        "LogStatusNotification": 1,
        "SignCertificate": 1,
        "Authorize": 1,
        "StartTransaction": 1,
        "MeterValues": 5,
        "StopTransaction": 1,
    }
)
"""Every CALL of the session, 17. Pauses of 5 s, one before Authorize and one before each MeterValues, make it 31 s."""


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulator, built from the pinned version with the versions of its own go.sum.

    Not by `go install module@version`, which also asks for the list of all versions: not every module proxy has it.
    """
    go = require("go")
    environment = {**os.environ, "GOWORK": "off", "GOTOOLCHAIN": "local"}
    program = tmp_path_factory.mktemp("ocpp-go") / "cp"
    download = [go, "mod", "download", "-json", MODULE]
    found = subprocess.run(download, env=environment, cwd=program.parent, capture_output=True, text=True, timeout=300)
    if found.returncode:
        unavailable(f"{MODULE} cannot be downloaded: {found.stdout}{found.stderr}")
    source = json.loads(found.stdout)["Dir"]
    build = [go, "build", "-o", program, PACKAGE]
    built = subprocess.run(build, env=environment, cwd=source, capture_output=True, text=True, timeout=600)
    if built.returncode:
        unavailable(f"{MODULE} cannot be built: {built.stdout}{built.stderr}")
    return program


def test_a_whole_charging_session(tmp_path: Path, simulator: Path) -> None:
    with stage(tmp_path) as set_up:
        onlooker = set_up.onlooker
        environment = {"CLIENT_ID": "chargePointSim", "CENTRAL_SYSTEM_URL": set_up.endpoint}
        with Process([simulator], env=environment) as charger:
            # Only a simulator whose last CALL was answered sends another, so this waits for the end of the session.
            onlooker.wait_for_call("chargePointSim", "StopTransaction", 60)
            stopped = len(onlooker.messages)
            onlooker.wait_for_call("chargePointSim", "StatusNotification", after=stopped)
            assert onlooker.calls("chargePointSim") == SCRIPT

            # It now sleeps for five minutes before it would leave. It still takes commands, and a Heartbeat that it
            # sends after its last StatusNotification says that this one was answered, too.
            heartbeat = {"requestedMessage": "Heartbeat"}
            triggered = onlooker.command("chargePointSim", "TriggerMessage", heartbeat)
            assert triggered.content["Payload"] == {"status": "Accepted"}
            onlooker.wait_for_call("chargePointSim", "Heartbeat")

            assert onlooker.call_errors() == []
            # Whatever it does not like it logs; an error answer or a lost connection would have ended it with status 1.
            assert charger.lines == []
            assert charger.returncode is None
            assert charger.stop() == -15
