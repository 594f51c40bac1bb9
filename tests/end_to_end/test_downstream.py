"""From MQTT to charge points (contract, section 4), with each kind of broker."""

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from end_to_end.wire import LIMIT, Stage, set_up, silent_charge_point


def notice(unique_id: str, action: str | None, reason: str, description: str) -> dict[str, Any]:
    """What a delivery failure looks like."""
    return {
        "MessageTypeId": 4,
        "UniqueId": unique_id,
        **({} if action is None else {"Action": action}),
        "ErrorCode": "GenericError",
        "ErrorDescription": description,
        "ErrorDetails": {"origin": "gateway", "reason": reason},
    }


@pytest.mark.parametrize(
    ("version", "message", "frame"),
    [
        (
            "ocpp1.6",
            {"MessageTypeId": 2, "UniqueId": "c-1", "Action": "Reset", "Payload": {"type": "Soft"}},
            [2, "c-1", "Reset", {"type": "Soft"}],
        ),
        ("ocpp1.6", [2, "c-1", "Reset", {"type": "Soft"}], [2, "c-1", "Reset", {"type": "Soft"}]),
        ("ocpp1.6", {"MessageTypeId": 3, "UniqueId": "1", "Payload": {"b": 1, "a": 2}}, [3, "1", {"b": 1, "a": 2}]),
        # EMQX puts an action here too.
        ("ocpp1.6", {"MessageTypeId": 3, "UniqueId": "1", "Action": "Heartbeat", "Payload": {}}, [3, "1", {}]),
        (
            "ocpp1.6",
            {"MessageTypeId": 4, "UniqueId": "1", "ErrorCode": "InternalError"},
            [4, "1", "InternalError", "", {}],
        ),
        ("ocpp2.0.1", [4, "1", "InternalError"], [4, "1", "InternalError", "", {}]),
        (
            "ocpp2.0.1",
            {"MessageTypeId": 4, "UniqueId": "1", "ErrorCode": "E", "ErrorDescription": "ü", "ErrorDetails": {"a": []}},
            [4, "1", "E", "ü", {"a": []}],
        ),
        ("ocpp2.1", {"MessageTypeId": 6, "UniqueId": "s", "Action": "Stream", "Payload": {}}, [6, "s", "Stream", {}]),
        ("ocpp2.1", {"MessageTypeId": 5, "UniqueId": "1", "ErrorCode": "E"}, [5, "1", "E", "", {}]),
    ],
)
def test_both_forms_reach_the_charge_point(stage: Stage, cid: str, version: str, message: Any, frame: Any) -> None:
    with stage.online(cid, version) as charge_point:
        stage.service.send(cid, message)
        assert charge_point.receive() == frame


def test_only_what_stands_before_the_wildcards_routes(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point, stage.online(f"{cid}-2") as other:
        stage.service.publish(f"ocpp/cs/{cid}/Reply/BootNotification", '[2, "c-1", "Reset", {}]')
        stage.service.publish(f"ocpp/cs/{cid}-2//$ /x", '[2, "c-0", "Reset", {}]')
        stage.service.publish(f"ocpp/cs/{cid}-2//$ ", '[2, "c-2", "Reset", {}]')
        assert charge_point.receive()[1] == "c-1"
        assert other.receive()[1] == "c-2"


def test_one_call_at_a_time_and_answers_in_between(stage: Stage, cid: str) -> None:
    """OCPP-J 1.6 and Part 4, 4.1.1: one CALL in each direction, and crossing CALLs are legal."""
    with stage.online(cid) as charge_point:
        for number in (1, 2, 3):
            stage.service.send(cid, [2, f"c-{number}", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"
        charge_point.send(2, "mine", "Heartbeat", {})
        assert stage.service.take(f"ocpp/cp/{cid}/Heartbeat").content["UniqueId"] == "mine"
        stage.service.send(cid, [3, "mine", {}])
        assert charge_point.receive() == [3, "mine", {}]
        charge_point.send(3, "c-1", {})
        assert charge_point.receive()[1] == "c-2"
        # An answer to something else leaves the turn where it is.
        charge_point.send(3, "c-1", {})
        stage.service.send(cid, [3, "mine", {}])
        assert charge_point.receive() == [3, "mine", {}]
        charge_point.send(4, "c-2", "NotSupported", "", {})
        assert charge_point.receive()[1] == "c-3"


def test_messages_are_delivered_in_order(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point:
        for number in range(200):
            stage.service.send(cid, [3, str(number), {}])
        assert [charge_point.receive()[1] for _ in range(200)] == [str(number) for number in range(200)]


def test_each_call_has_exactly_one_end(stage: Stage, cid: str) -> None:
    """More than may wait, some of them answered with errors, some not with their own id, one id used twice."""
    ids = [f"c-{number}" for number in range(150)] + ["c-0"]
    with stage.online(cid) as charge_point:
        for unique_id in ids:
            stage.service.send(cid, [2, unique_id, "Reset", {}])
        refused = [stage.service.take(f"ocpp/cp/Error/{cid}").content for _ in range(50)]
        assert {error["ErrorDetails"]["reason"] for error in refused} == {"queue_full"}
        ends = [error["UniqueId"] for error in refused]
        while len(ends) < len(ids):
            unique_id = charge_point.receive()[1]
            if len(ends) % 2:
                charge_point.send(3, unique_id, {})
                ends.append(stage.service.take(f"ocpp/cp/Reply/{cid}").content["UniqueId"])
            else:
                charge_point.send(4, unique_id, "NotSupported", "", {})
                ends.append(stage.service.take(f"ocpp/cp/Error/{cid}").content["UniqueId"])
        assert sorted(ends) == sorted(ids)
    assert not stage.service.left(cid)


def test_a_lost_connection_ends_every_call(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point:
        stage.service.send(cid, [2, "c-1", "Reset", {}])
        stage.service.send(cid, [2, "c-2", "ClearCache", {}])
        # The queue is reached when what came after it is.
        stage.service.send(cid, [3, "mark", {}])
        assert [charge_point.receive()[1] for _ in range(2)] == ["c-1", "mark"]
    written, waiting = (stage.service.take(f"ocpp/cp/Error/{cid}").content for _ in range(2))
    assert written == notice("c-1", "Reset", "disconnected", "the connection ended before the answer")
    assert waiting == notice("c-2", "ClearCache", "disconnected", "the connection ended before it was sent")
    assert not stage.service.left(cid)


def test_a_second_connection_takes_over(stage: Stage, cid: str) -> None:
    with stage.online(cid) as old:
        stage.service.send(cid, [2, "c-1", "Reset", {}])
        assert old.receive()[1] == "c-1"
        with stage.online(cid) as new:
            error = stage.service.take(f"ocpp/cp/Error/{cid}").content
            assert error == notice("c-1", "Reset", "replaced", "the connection ended before the answer")
            assert old.close_code() == (4001, "replaced")
            stage.service.send(cid, [2, "c-2", "Reset", {}])
            assert new.receive()[1] == "c-2"
            new.send(3, "c-2", {})
            assert stage.service.take(f"ocpp/cp/Reply/{cid}").content["UniqueId"] == "c-2"
    assert not stage.service.left(cid)


def test_the_late_close_of_the_old_connection_harms_nobody(stage: Stage, cid: str) -> None:
    seen = len(stage.gateway.lines)
    # It never answers, as one whose mobile cell has changed.
    with silent_charge_point(stage.port, cid) as old:
        with stage.online(cid) as new:
            old.close()
            with stage.online(f"{cid}-2"):  # gives the gateway time to find out
                pass
            stage.service.send(cid, [2, "c-1", "Reset", {}])
            assert new.receive()[1] == "c-1"
            new.send(3, "c-1", {})
            stage.service.take(f"ocpp/cp/Reply/{cid}")
        stage.gateway.wait_for(f"{cid} offline", after=seen)
    assert sum(f"{cid} offline" in line for line in stage.gateway.lines[seen:]) == 1


def test_a_storm_of_takeovers_leaves_one_that_works(stage: Stage, cid: str) -> None:
    def connect_and_vanish() -> None:
        for _ in range(10):
            with silent_charge_point(stage.port, cid) as charge_point:
                # Closed with unread bytes, or with a linger of 0, a socket sends a reset.
                charge_point.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    storm = [threading.Thread(target=connect_and_vanish) for _ in range(5)]
    for thread in storm:
        thread.start()
    for thread in storm:
        thread.join(LIMIT)
    with stage.online(cid) as charge_point:
        stage.service.send(cid, [2, "c-1", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"
        charge_point.send(3, "c-1", {})
        stage.service.take(f"ocpp/cp/Reply/{cid}")


@pytest.mark.parametrize(
    ("message", "unique_id", "action"),
    [
        ([2, "c-1", "Reset"], "c-1", "Reset"),
        ([2, "c-1", 7, {}], "c-1", None),
        ({"MessageTypeId": 2, "UniqueId": "c-1", "Action": "Reset"}, "c-1", "Reset"),
        ({"MessageTypeId": 3, "UniqueId": "c-1"}, "c-1", None),
        ({"UniqueId": "c-1", "Payload": {}}, "c-1", None),
        ({"MessageTypeId": "2", "UniqueId": "c-1", "Payload": {}}, "c-1", None),
        ([6, "c-1", "Stream", {}], "c-1", None),  # not in 1.6
        ([2, "x" * 37, "Reset", {}], "x" * 37, "Reset"),
    ],
)
def test_what_is_not_ocpp_is_told_to_its_sender(
    stage: Stage, cid: str, message: Any, unique_id: str, action: str | None
) -> None:
    with stage.online(cid):
        stage.service.send(cid, message)
        error = stage.service.take(f"ocpp/cp/Error/{cid}").content
        description = error["ErrorDescription"]
        assert description
        assert error == notice(unique_id, action, "invalid", description)


def test_what_nobody_can_be_told_about_harms_nobody(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point:
        payloads = [b"", b"{", b"\xff", b"null", b"7", b"[]", b"{}", b"[2]", b"[2, 7, 8, 9]", b"[[[", b"[" * 100000]
        for payload in payloads:
            stage.service.publish(f"ocpp/cs/{cid}/x/y", payload)
        stage.service.send("nobody", [2, "c-0", "Reset", {}])
        stage.service.publish("ocpp/cs", b"[]")
        stage.service.send(cid, [2, "c-1", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"
        charge_point.send(3, "c-1", {})
        stage.service.take(f"ocpp/cp/Reply/{cid}")
    assert not stage.service.left(cid)


def test_what_is_too_large_is_told_to_its_sender(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point:
        stage.service.send(cid, [2, "c-1", "DataTransfer", {"data": "x" * 1048576}])
        error = stage.service.take(f"ocpp/cp/Error/{cid}").content
        size = len('[2,"c-1","DataTransfer",{"data":""}]') + 1048576
        assert error == notice("c-1", "DataTransfer", "too_large", f"{size} bytes, 1048576 are allowed")
        stage.service.send(cid, [2, "c-2", "Reset", {}])
        assert charge_point.receive()[1] == "c-2"


def test_a_retained_message_is_not_repeated_at_every_connection(stage_5: Stage, cid: str) -> None:
    topic = f"ocpp/cs/{cid}/x/y"
    stage_5.service.publish(topic, '[2, "kept", "Reset", {}]', retain=True)
    seen = len(stage_5.gateway.lines)
    with stage_5.online(cid) as charge_point:
        stage_5.gateway.wait_for(f"retained message on {topic} is not forwarded", after=seen)
        stage_5.service.send(cid, [2, "c-1", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"
        # Who listens already gets it as any other message (MQTT 5, 3.3.1.3).
        charge_point.send(3, "c-1", {})
        stage_5.service.publish(topic, '[2, "c-2", "Reset", {}]', retain=True)
        assert charge_point.receive()[1] == "c-2"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage with limits that are soon reached."""
    settings = "[dnstream]\ncall_timeout = 1\nmax_mqueue_len = 2\n"
    with set_up(tmp_path_factory.mktemp("narrow"), "mosquitto 5", settings) as stage:
        yield stage


def test_an_answer_that_does_not_come_gives_way_to_the_next_call(narrow: Stage, cid: str) -> None:
    with narrow.online(cid) as charge_point:
        narrow.service.send(cid, [2, "c-1", "Reset", {}])
        narrow.service.send(cid, [2, "c-2", "ClearCache", {}])
        assert charge_point.receive()[1] == "c-1"
        assert charge_point.receive()[1] == "c-2"
        charge_point.send(3, "c-2", {})
        assert narrow.service.take(f"ocpp/cp/Error/{cid}").content == notice(
            "c-1", "Reset", "timeout", "no answer in 1 s"
        )
        assert narrow.service.take(f"ocpp/cp/Reply/{cid}").content["UniqueId"] == "c-2"
        # What comes late is published, too.
        charge_point.send(3, "c-1", {"status": "Accepted"})
        assert narrow.service.take(f"ocpp/cp/Reply/{cid}").content["Payload"] == {"status": "Accepted"}


def test_a_full_queue_is_told_to_the_sender(narrow: Stage, cid: str) -> None:
    with narrow.online(cid) as charge_point:
        for number in (1, 2, 3, 4):
            narrow.service.send(cid, [2, f"c-{number}", "Reset", {}])
        errors = {content["UniqueId"]: content for content in _errors(narrow, cid, 4)}
        assert errors.pop("c-4") == notice("c-4", "Reset", "queue_full", "2 CALLs are waiting")
        assert {error["ErrorDetails"]["reason"] for error in errors.values()} == {"timeout"}
        assert [charge_point.receive()[1] for _ in range(3)] == ["c-1", "c-2", "c-3"]


def _errors(stage: Stage, cid: str, count: int) -> list[dict[str, Any]]:
    return [stage.service.take(f"ocpp/cp/Error/{cid}").content for _ in range(count)]
