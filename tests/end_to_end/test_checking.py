"""Payloads against their schemas, through a running gateway: contract, section 3, for each version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from end_to_end.wire import ChargePoint, Stage, set_up

BOOT_16 = {"chargePointVendor": "v", "chargePointModel": "m"}
BOOT_2 = {"reason": "PowerUp", "chargingStation": {"vendorName": "v", "model": "m"}}
BAD_16: dict[str, dict[str, Any]] = {
    "FormationViolation": {**BOOT_16, "x": 1},
    "OccurenceConstraintViolation": {"chargePointVendor": "v"},
    "TypeConstraintViolation": {**BOOT_16, "chargePointModel": 1},
    "PropertyConstraintViolation": {**BOOT_16, "chargePointModel": "m" * 21},
}
BAD_2: dict[str, dict[str, Any]] = {
    "FormatViolation": {**BOOT_2, "x": 1},
    "OccurrenceConstraintViolation": {"reason": "PowerUp"},
    "TypeConstraintViolation": {**BOOT_2, "reason": 1},
    "PropertyConstraintViolation": {**BOOT_2, "reason": "Boredom"},
}


@pytest.fixture(scope="module")
def checking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    settings = 'node = "checking"\nmessage_format_checking = "all"\n'
    with set_up(tmp_path_factory.mktemp("all"), "mosquitto 5", settings) as stage:
        yield stage


@pytest.mark.parametrize(
    ("version", "code", "payload"),
    [
        *(("ocpp1.6", code, payload) for code, payload in BAD_16.items()),
        *((version, code, payload) for version in ("ocpp2.0.1", "ocpp2.1") for code, payload in BAD_2.items()),
    ],
)
def test_a_bad_payload_has_the_code_of_its_version(
    checking: Stage, cid: str, version: str, code: str, payload: dict[str, Any]
) -> None:
    with ChargePoint(checking.port, cid, version) as charge_point:
        charge_point.send(2, "1", "BootNotification", payload)
        kind, unique_id, answered, description, details = charge_point.receive()
        assert (kind, unique_id, answered, details) == (4, "1", code, {})
        charge_point.send(2, "2", "Dance", {})
        assert charge_point.receive()[2] == "NotImplemented"
        charge_point.send(2, "3", "BootNotification", BOOT_16 if version == "ocpp1.6" else BOOT_2)
        assert checking.service.take(f"ocpp/cp/{cid}/BootNotification").content["UniqueId"] == "3"
    reports = [checking.service.take("ocpp/gateway/checking/invalid").content for _ in range(2)]
    assert [(report["cid"], report["code"]) for report in reports] == [(cid, code), (cid, "NotImplemented")]
    assert reports[0]["detail"] == description


def test_a_bad_command_fails_and_never_reaches_the_charge_point(checking: Stage, cid: str) -> None:
    with ChargePoint(checking.port, cid) as charge_point:
        charge_point.send(2, "1", "Heartbeat", {})
        checking.service.take(f"ocpp/cp/{cid}/Heartbeat")
        checking.service.send(cid, [2, "c-1", "Reset", {"type": "Perhaps"}])
        failure = checking.service.take(f"ocpp/cp/Error/{cid}").content
        assert failure["ErrorDetails"] == {"origin": "gateway", "reason": "invalid"}
        assert failure["Action"] == "Reset"
        checking.service.send(cid, [2, "c-2", "Reset", {"type": "Soft"}])
        assert charge_point.receive()[1] == "c-2"


def test_a_bad_answer_ends_its_call_as_invalid(checking: Stage, cid: str) -> None:
    with ChargePoint(checking.port, cid) as charge_point:
        charge_point.send(2, "1", "Heartbeat", {})
        checking.service.take(f"ocpp/cp/{cid}/Heartbeat")
        checking.service.send(cid, [2, "c-1", "Reset", {"type": "Soft"}])
        charge_point.receive()
        charge_point.send(3, "c-1", {"status": "Perhaps"})
        failure = checking.service.take(f"ocpp/cp/Error/{cid}").content
        assert (failure["UniqueId"], failure["ErrorDetails"]["reason"]) == ("c-1", "invalid")
        checking.service.take("ocpp/gateway/checking/invalid")
