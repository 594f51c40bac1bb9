"""mikuso's ocpp-rpc (Node.js) as charge point, in strict mode: it calls, is called, and comes back by itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import Process, free_port, require, unavailable
from stage import Onlooker, stage, start_gateway

SOURCE = Path(__file__).with_name("ocpp_rpc")

ANSWERS = [
    r'answer "BootNotification" \{"currentTime":"[^"]+Z","interval":300,"status":"Accepted"\}',
    r'answer "StatusNotification" \{\}',
    r'answer "Authorize" \{"idTagInfo":\{"status":"Accepted"\}\}',
    r'answer "StartTransaction" \{"transactionId":\d+,"idTagInfo":\{"status":"Accepted"\}\}',
    r'answer "DataTransfer" \{"status":"Accepted"\}',
    r'answer "Heartbeat" \{"currentTime":"[^"]+Z"\}',
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The charge point's script in a directory where its packages, as locked, are installed."""
    require("node")
    directory = tmp_path_factory.mktemp("ocpp-rpc")
    # Not a node_modules that somebody may have made in the tree.
    for name in (".npmrc", "charge_point.js", "package.json", "package-lock.json"):
        shutil.copy(SOURCE / name, directory)
    install = [require("npm"), "ci"]
    done = subprocess.run(install, cwd=directory, capture_output=True, text=True, timeout=300)
    if done.returncode:
        unavailable(f"ocpp-rpc cannot be installed: {done.stdout}{done.stderr}")
    return directory / "charge_point.js"


def command_and_check(onlooker: Onlooker, charger: Process) -> None:
    """Command the charge point and check its answers."""
    before = len(charger.lines)
    changed = onlooker.command("CP:1 ö", "ChangeConfiguration", {"key": "MeterValueSampleInterval", "value": "60"})
    assert changed.topic == "ocpp/cp/Reply/CP:1 ö"
    assert changed.content["Action"] == "ChangeConfiguration"
    assert changed.content["Payload"] == {"status": "Accepted"}
    charger.wait_for(r'^configured \{"key":"MeterValueSampleInterval","value":"60"\}$', after=before)
    told = onlooker.command("CP:1 ö", "GetConfiguration", {"key": ["NoSuchKey"]})
    assert told.content["Payload"] == {"configurationKey": [], "unknownKey": ["NoSuchKey"]}
    refused = onlooker.command("CP:1 ö", "ClearCache", {})
    assert refused.topic == "ocpp/cp/Error/CP:1 ö"
    assert refused.content["ErrorCode"] == "NotImplemented"


def wait_for_session(charger: Process, after: int) -> None:
    """Wait until the charge point has connected and has had an answer to each of its CALLs."""
    charger.wait_for(r'^open "ocpp1\.6"$', after=after)
    for answer in ANSWERS:
        charger.wait_for(f"^{answer}$", after=after)
    charger.wait_for("^done$", after=after)


@pytest.mark.parametrize(("end", "code"), [("stop", "1001"), ("kill", "1006")])
def test_it_calls_and_is_called_and_comes_back_to_a_gateway_that_was_restarted(
    tmp_path: Path, script: Path, end: str, code: str
) -> None:
    with stage(tmp_path) as set_up, Process([require("node"), script, set_up.endpoint, "CP:1 ö"]) as charger:
        wait_for_session(charger, after=0)
        command_and_check(set_up.onlooker, charger)
        charger.wait_for("^pong$")

        before = len(charger.lines)
        getattr(set_up.gateway, end)()
        assert charger.wait_for(r"^disconnected (\d+)", after=before)[1] == code
        with start_gateway(*set_up.gateway_arguments):
            wait_for_session(charger, after=before)
            command_and_check(set_up.onlooker, charger)
            assert charger.stop() == 0
        unpleasant = re.compile("^(invalid|bad message|failed|not connected)")
        assert [line for line in charger.lines if unpleasant.match(line)] == []


def test_a_refused_connection_is_told_to_it(tmp_path: Path, script: Path) -> None:
    with stage(tmp_path) as set_up:
        with Process([require("node"), script, f"ws://127.0.0.1:{set_up.port}/elsewhere", "CP1"]) as charger:
            assert charger.wait_exit(10) == 1
            assert 'not connected "Not Found"' in charger.lines
        with Process([require("node"), script, f"ws://127.0.0.1:{free_port()}/ocpp", "CP1"]) as charger:
            assert charger.wait_exit(10) == 1
