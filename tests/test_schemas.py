"""Payloads against their schemas: which fault, in which order, for each version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from ocppgw.schemas import MAX_DETAIL, MAX_ERRORS, SchemaError, Schemas, Violation

SCHEMAS = Schemas.load()
Draft = jsonschema_rs.validator_for({"required": ["x"]})
NOW = "2026-11-22T10:00:00Z"
BOOT = {"chargePointVendor": "v", "chargePointModel": "m"}


def kind(action: str, payload: Any, version: str = "ocpp1.6", response: bool = False) -> str | None:
    violation = SCHEMAS.check(version, action, response, payload)
    return None if violation is None else violation.kind


@pytest.mark.parametrize(
    ("action", "payload", "expected"),
    [
        ("BootNotification", BOOT, None),
        ("BootNotification", {**BOOT, "x": 1}, "format"),
        ("BootNotification", [], "format"),
        ("BootNotification", None, "format"),
        ("BootNotification", "{}", "format"),
        ("BootNotification", {}, "occurrence"),
        ("MeterValues", {"connectorId": 1, "meterValue": []}, "occurrence"),
        ("BootNotification", {**BOOT, "chargePointModel": 1}, "type"),
        ("BootNotification", {**BOOT, "chargePointModel": "m" * 21}, "property"),
        ("StatusNotification", {"connectorId": 1, "errorCode": "Nothing", "status": "Available"}, "property"),
        ("StopTransaction", {"meterStop": 1, "transactionId": 1, "timestamp": "yesterday"}, "property"),
        ("Heartbeat", {}, None),
        ("heartbeat", {}, "unknown_action"),
        ("Dance", {}, "unknown_action"),
        ("SecurityEventNotification", {"type": "x", "timestamp": "2026-11-22T10:00:00Z"}, None),
    ],
)
def test_each_keyword_has_its_kind(action: str, payload: Any, expected: str | None) -> None:
    assert kind(action, payload) == expected


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"chargePointVendor": 1, "x": "m" * 99}, "format"),
        ({"chargePointVendor": 1}, "occurrence"),
        ({"chargePointVendor": 1, "chargePointModel": "m" * 99}, "type"),
    ],
)
def test_of_several_the_first_in_order_decides(payload: dict[str, Any], expected: str) -> None:
    assert kind("BootNotification", payload) == expected


def test_answers_have_schemas_of_their_own() -> None:
    assert kind("Heartbeat", {"currentTime": "2026-11-22T10:00:00Z"}, response=True) is None
    assert kind("Heartbeat", {}, response=True) == "occurrence"
    assert kind("Dance", {"any": "thing"}, response=True) is None


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
def test_signed_messages_of_2x_are_not_looked_into(version: str) -> None:
    # Part 4, 7.1: the payload is a JSON Web Signature.
    assert kind("BootNotification-Signed", {"payload": "e30", "signature": "x"}, version) is None
    assert kind("BootNotification-Signed", {}, "ocpp1.6") == "unknown_action"


def test_custom_data_may_hold_anything_in_2x() -> None:
    custom = {"vendorId": "v", "anything": {"at": ["all"]}}
    assert kind("Heartbeat", {"customData": custom}, "ocpp2.0.1") is None
    assert kind("Heartbeat", {"customData": {}}, "ocpp2.0.1") == "occurrence"


def test_a_send_of_21_has_a_schema() -> None:
    assert kind("NotifyPeriodicEventStream", {}, "ocpp2.1") == "occurrence"


@pytest.mark.parametrize(
    ("action", "response", "payload"),
    [
        # Errata of OCPP-J 1.6: 2.2, 2.3, 2.4, 2.5 and 3.1
        ("SendLocalList", False, {"listVersion": 1, "updateType": "Full", "localAuthorizationList": [
            {"idTag": "a", "idTagInfo": {"status": "Accepted", "parentIdTag": "b"}}]}),
        ("BootNotification", True, {"status": "Accepted", "currentTime": "2026-11-22T10:00:00Z", "interval": 300}),
        ("UpdateFirmware", False, {"location": "ftp://x/y", "retrieveDate": "2026-11-22T10:00:00Z", "retries": 3}),
        ("StopTransaction", False, {"meterStop": 1, "transactionId": 1, "timestamp": "2026-11-22T10:00:00Z"}),
    ],
)  # fmt: skip
def test_the_errata_of_16_are_in_the_schemas(action: str, response: bool, payload: dict[str, Any]) -> None:
    assert SCHEMAS.check("ocpp1.6", action, response, payload) is None


@pytest.mark.parametrize(
    ("action", "response", "payload", "expected"),
    [
        ("BootNotification", True, {"status": "Accepted", "currentTime": NOW, "interval": 1.5}, "type"),
        ("UpdateFirmware", False, {"location": "ftp://x/y", "retrieveDate": NOW, "retries": 1.5}, "type"),
        ("SendLocalList", False, {"listVersion": 1, "updateType": "Full", "localAuthorizationList": [
            {"idTag": "a", "idTagInfo": {"status": "Accepted", "extra": 1}}]}, "format"),
    ],
)  # fmt: skip
def test_what_the_errata_forbid_is_refused(action: str, response: bool, payload: Any, expected: str) -> None:
    assert kind(action, payload, response=response) == expected


def test_a_detail_names_the_place_and_hides_the_value() -> None:
    violation = SCHEMAS.check(
        "ocpp1.6", "ChangeConfiguration", False, {"key": "AuthorizationKey", "value": "s3cret" * 99}
    )
    assert violation == Violation("property", "value: it is longer than 500 characters")


def test_a_detail_is_no_longer_than_a_description_may_be() -> None:
    violation = SCHEMAS.check("ocpp1.6", "Heartbeat", False, {"x" * 5000: 1})
    assert violation is not None
    assert len(violation.detail) == MAX_DETAIL


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_characters_like_others(text: str) -> None:
    assert kind("BootNotification", {**BOOT, "chargePointModel": text}) is None
    assert kind("BootNotification", {**BOOT, text: Decimal("1.5")}) == "format"


def test_numbers_that_no_double_holds_are_numbers() -> None:
    status = {"errorCode": "NoError", "status": "Available"}
    assert kind("StatusNotification", {**status, "connectorId": 10**30}) is None
    assert kind("StatusNotification", {**status, "connectorId": Decimal(10**30)}) is None


class TestDirectory:
    def schema(self, path: Path, **schema: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(schema), encoding="utf-8")

    def test_a_folder_for_each_version(self, tmp_path: Path) -> None:
        self.schema(tmp_path / "ocpp2.1" / "DanceRequest.json", type="object", required=["tune"])
        schemas = Schemas.load(tmp_path)
        assert schemas.check("ocpp2.1", "Dance", False, {}) is not None
        assert schemas.check("ocpp2.1", "Dance", False, {"tune": 1}) is None

    def test_files_without_a_folder_are_of_16(self, tmp_path: Path) -> None:
        self.schema(tmp_path / "Dance.json", type="object")
        schemas = Schemas.load(tmp_path)
        assert schemas.check("ocpp1.6", "Dance", False, {}) is None
        assert schemas.check("ocpp1.6", "Heartbeat", False, {}) == Violation("unknown_action", "unknown action")

    @pytest.mark.parametrize(("name", "text", "said"), [
        ("A.json", "{", "schema A of ocpp1.6 cannot be used"),
        ("A.json", '{"type": 5}', "schema A of ocpp1.6 cannot be used"),
        ("A.txt", "{}", "has no schemas"),
    ])  # fmt: skip
    def test_what_cannot_be_used_is_named(self, tmp_path: Path, name: str, text: str, said: str) -> None:
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(SchemaError, match=said):
            Schemas.load(tmp_path)

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SchemaError, match="nowhere: cannot be read"):
            Schemas.load(tmp_path / "nowhere")


def test_a_detail_has_no_control_characters_of_the_peer() -> None:
    violation = SCHEMAS.check("ocpp1.6", "Heartbeat", False, {"a\n\x1b[31mEVIL": 1})
    assert violation == Violation("format", "Additional properties are not allowed ('a??[31mEVIL' was unexpected)")


def test_a_payload_full_of_faults_costs_no_more_than_a_few() -> None:
    looked_at = []

    class Endless:
        def is_valid(self, instance: Any) -> bool:
            return False

        def iter_errors(self, instance: Any) -> Iterator[Any]:
            for error in Draft.iter_errors({"connectorId": 1}):
                while True:
                    looked_at.append(error)
                    yield error

    schemas = Schemas({("ocpp1.6", "A", False): Endless()})
    assert schemas.check("ocpp1.6", "A", False, {}) is not None
    assert len(looked_at) == MAX_ERRORS
