"""A charge point made of mobilityhouse's `ocpp` and of `websockets`, against the example central system."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from ocpp.routing import on
from ocpp.v16 import ChargePoint, call, call_result
from ocpp.v16.enums import Action
from processes import Process
from stage import EXAMPLE, Stage, stage

LIMIT = 30.0
"""Seconds that the charge point's part of a test may take."""

TIME = "2026-11-22T10:00:00Z"

variants = pytest.mark.parametrize(
    ("broker", "settings"),
    [
        pytest.param("mosquitto", "", id="mosquitto"),
        pytest.param("embedded", "", id="embedded"),
        pytest.param("mosquitto", 'payload_format = "array"\n', id="mosquitto, array form"),
    ],
)


class Charger(ChargePoint):
    """Accepts commands and remembers them."""

    def __init__(self, cid: str, connection: Any) -> None:
        super().__init__(cid, connection, response_timeout=10)
        self.commands: list[tuple[str, dict[str, Any]]] = []

    @on(Action.remote_start_transaction)
    def on_remote_start(self, **request: Any) -> call_result.RemoteStartTransaction:
        self.commands.append(("RemoteStartTransaction", request))
        return call_result.RemoteStartTransaction(status="Accepted")

    @on(Action.reset)
    def on_reset(self, **request: Any) -> call_result.Reset:
        self.commands.append(("Reset", request))
        return call_result.Reset(status="Rejected")

    @on(Action.change_configuration)
    def on_change_configuration(self, **request: Any) -> call_result.ChangeConfiguration:
        self.commands.append(("ChangeConfiguration", request))
        return call_result.ChangeConfiguration(status="RebootRequired")

    @on(Action.get_configuration)
    def on_get_configuration(self, **request: Any) -> call_result.GetConfiguration:
        self.commands.append(("GetConfiguration", request))
        known = {"key": "HeartbeatInterval", "readonly": False, "value": "300"}
        return call_result.GetConfiguration(configuration_key=[known], unknown_key=["Größe"])


@asynccontextmanager
async def connected(set_up: Stage, cid: str) -> AsyncIterator[Charger]:
    """Connect a charge point that serves commands meanwhile."""
    async with (
        asyncio.timeout(LIMIT),
        websockets.connect(set_up.url(cid), subprotocols=[websockets.Subprotocol("ocpp1.6")]) as socket,
    ):
        assert socket.subprotocol == "ocpp1.6"
        charger = Charger(cid, socket)
        serving = asyncio.create_task(charger.start())
        try:
            yield charger
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def charge(set_up: Stage) -> None:
    """Go through a charging session and check each answer."""
    async with connected(set_up, "CP1") as charger:
        booted = await charger.call(call.BootNotification(charge_point_model="Säule 1", charge_point_vendor="ACME"))
        assert (booted.status, booted.interval) == ("Accepted", 300)
        assert booted.current_time.endswith("Z")
        status = call.StatusNotification(connector_id=1, error_code="NoError", status="Available")
        assert await charger.call(status) == call_result.StatusNotification()
        authorized = await charger.call(call.Authorize(id_tag="04A2B3"))
        assert authorized.id_tag_info == {"status": "Accepted"}
        for number in (1, 2):
            start = call.StartTransaction(connector_id=1, id_tag="04A2B3", meter_start=10, timestamp=TIME)
            started = await charger.call(start)
            assert started == call_result.StartTransaction(number, {"status": "Accepted"})
            sample = {"timestamp": TIME, "sampled_value": [{"value": "20.5", "unit": "Wh"}]}
            meter = call.MeterValues(connector_id=1, transaction_id=number, meter_value=[sample])
            assert await charger.call(meter) == call_result.MeterValues()
            stopped = await charger.call(call.StopTransaction(meter_stop=30, timestamp=TIME, transaction_id=number))
            assert stopped.id_tag_info == {"status": "Accepted"}
        assert (await charger.call(call.Heartbeat())).current_time >= booted.current_time
        transferred = await charger.call(call.DataTransfer(vendor_id="com.acme", data='{"a": [1, "²"]}'))
        assert transferred.status == "Accepted"
        for notification in (
            call.DiagnosticsStatusNotification(status="Idle"),
            call.FirmwareStatusNotification(status="Downloading"),
            call.LogStatusNotification(status="Uploading", request_id=7),
            call.SecurityEventNotification(type="FirmwareUpdated", timestamp=TIME, tech_info=None),
            call.SignedFirmwareStatusNotification(status="Installed", request_id=8),
        ):
            answer = await charger.call(notification, suppress=False)
            assert answer == getattr(call_result, type(notification).__name__)()
        assert (await charger.call(call.SignCertificate(csr="-----BEGIN"))).status == "Rejected"


@variants
def test_each_call_is_answered_by_the_central_system(tmp_path: Path, broker: str, settings: str) -> None:
    with stage(tmp_path, broker=broker, settings=settings) as set_up:
        asyncio.run(charge(set_up))
        set_up.service.wait_for(r'CP1 -> BootNotification \{.*"chargePointVendor": "ACME"')
        set_up.service.wait_for(r'CP1 <- StartTransaction answered \{"transactionId": 2,')


async def obey(set_up: Stage) -> None:
    """Take commands from MQTT and check what is published as their answers."""
    async with connected(set_up, "CP1") as charger:
        # When this is answered the gateway has subscribed to what is meant for us.
        await charger.call(call.BootNotification(charge_point_model="M", charge_point_vendor="V"))
        # Command, what the charge point understands, what it answers.
        cases: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
            (
                "RemoteStartTransaction",
                {"idTag": "04A2B3", "connectorId": 1},
                {"id_tag": "04A2B3", "connector_id": 1},
                {"status": "Accepted"},
            ),
            ("Reset", {"type": "Soft"}, {"type": "Soft"}, {"status": "Rejected"}),
            (
                "ChangeConfiguration",
                {"key": "Größe", "value": "µ"},
                {"key": "Größe", "value": "µ"},
                {"status": "RebootRequired"},
            ),
            (
                "GetConfiguration",
                {},
                {},
                {
                    "configurationKey": [{"key": "HeartbeatInterval", "readonly": False, "value": "300"}],
                    "unknownKey": ["Größe"],
                },
            ),
        ]
        for action, payload, understood, answer in cases:
            message = await asyncio.to_thread(set_up.onlooker.command, "CP1", action, payload)
            assert message.topic == "ocpp/cp/Reply/CP1"
            assert message.content["MessageTypeId"] == 3
            assert message.content["Action"] == action
            assert message.content["Payload"] == answer
            assert charger.commands.pop() == (action, understood)
        refused = await asyncio.to_thread(set_up.onlooker.command, "CP1", "ClearCache", {})
        assert refused.topic == "ocpp/cp/Error/CP1"
        assert refused.content["Action"] == "ClearCache"
        assert refused.content["ErrorCode"] == "NotImplemented"


@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
def test_commands_from_mqtt_are_answered_by_the_charge_point(tmp_path: Path, broker: str) -> None:
    with stage(tmp_path, broker=broker) as set_up:
        asyncio.run(obey(set_up))


async def be_commanded(set_up: Stage, *command: str) -> Process:
    """Be online while the example gives its one command; returns the example, ended."""
    async with connected(set_up, "CP 1/ä") as charger:
        await charger.call(call.BootNotification(charge_point_model="M", charge_point_vendor="V"))
        broker = f"127.0.0.1:{set_up.onlooker.port}"
        with Process([sys.executable, EXAMPLE, "--mqtt", broker, "--call", "CP 1/ä", *command]) as commander:
            await asyncio.to_thread(commander.wait_exit, 15)
            return commander


@variants
def test_the_example_gives_one_command_and_leaves(tmp_path: Path, broker: str, settings: str) -> None:
    with stage(tmp_path, broker=broker, settings=settings) as set_up:
        commander = asyncio.run(be_commanded(set_up, "Reset", '{"type": "Hard"}'))
        assert commander.lines == [
            'CP 1/ä <- Reset {"type": "Hard"}',
            'CP 1/ä -> Reset answered {"status": "Rejected"}',
        ]
        assert commander.returncode == 0


def test_the_example_tells_a_refused_command_by_its_exit_status(tmp_path: Path) -> None:
    with stage(tmp_path) as set_up:
        commander = asyncio.run(be_commanded(set_up, "ClearCache", "{}"))
        assert any(line.startswith('CP 1/ä -> ClearCache failed "NotImplemented"') for line in commander.lines)
        assert commander.returncode == 1
