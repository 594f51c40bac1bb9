"""What charge points should not send (contract, section 3): it is answered as their version says, and harms nobody."""

from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed

from end_to_end.wire import ChargePoint, Stage

ALL = ("ocpp1.6", "ocpp2.0.1", "ocpp2.1")
RPC = "RpcFrameworkError"

# What is sent; the id and the error code of the answer in 1.6, 2.0.1 and 2.1, None where there must be none.
# Without an id: OCPP-J 1.6 has no answer, Part 4, 4.2.3 says id "-1". An unknown message type: 1.6, 4.1.3 and 2.1, 4.4
# say to ignore it, 2.0.1, 4.4 to answer.
FRAMES: list[tuple[str | bytes, tuple[tuple[str, str] | None, ...]]] = [
    ("hello", (None, ("-1", RPC), ("-1", RPC))),
    ("", (None, ("-1", RPC), ("-1", RPC))),
    ('[2,"1","Heartbeat",{}', (None, ("-1", RPC), ("-1", RPC))),
    ('{"MessageTypeId":2,"UniqueId":"1","Action":"A","Payload":{}}', (None, ("-1", RPC), ("-1", RPC))),
    ("[]", (None, ("-1", RPC), ("-1", RPC))),
    ("[2]", (None, ("-1", RPC), ("-1", RPC))),
    ('[2,7,"Heartbeat",{}]', (None, ("-1", RPC), ("-1", RPC))),
    ("[" * 100000, (None, ("-1", RPC), ("-1", RPC))),
    ('[2,"1","A",NaN]', (None, ("-1", RPC), ("-1", RPC))),
    (b'[2,"1","\xff\xfe",{}]', (None, ("-1", RPC), ("-1", RPC))),
    ('[2,"1","Heartbeat"]', (("1", "FormationViolation"), ("1", RPC), ("1", RPC))),
    ('[2,"1","Heartbeat",{},{}]', (("1", "FormationViolation"), ("1", RPC), ("1", RPC))),
    ('[2,"1",null,{}]', (("1", "FormationViolation"), ("1", RPC), ("1", RPC))),
    (f'[2,"{"x" * 37}","A",{{}}]', (("x" * 37, "FormationViolation"), ("x" * 37, RPC), ("x" * 37, RPC))),
    ('[9,"1","Heartbeat",{}]', (None, ("1", "MessageTypeNotSupported"), None)),
    ('["2","1","Heartbeat",{}]', (None, ("1", "MessageTypeNotSupported"), None)),
    ('[3,"1"]', (None, None, None)),
    ("[3,1,{}]", (None, None, None)),
    ('[4,"1",{}]', (None, None, None)),
]


@pytest.mark.parametrize(("frame", "answers"), FRAMES, ids=[str(frame)[:50] for frame, _ in FRAMES])
@pytest.mark.parametrize("version", ALL)
def test_a_bad_frame_is_answered_and_the_connection_stays(
    stage_5: Stage, cid: str, frame: str | bytes, answers: tuple[tuple[str, str] | None, ...], version: str
) -> None:
    answer = answers[ALL.index(version)]
    with ChargePoint(stage_5.port, cid, version) as charge_point:
        charge_point.socket.send(frame, text=True)
        charge_point.send(2, "next", "Heartbeat", {})
        stage_5.service.take(f"ocpp/cp/{cid}/Heartbeat")
        stage_5.service.send(cid, [3, "next", {}])
        if answer is not None:
            kind, unique_id, code, _, details = charge_point.receive()
            assert (kind, (unique_id, code), details) == (4, answer, {})
        assert charge_point.receive() == [3, "next", {}]
    assert not stage_5.service.left(cid)


@pytest.mark.parametrize("version", ALL[1:])
def test_a_bad_send_is_never_answered(stage_5: Stage, cid: str, version: str) -> None:
    """OCPP 2.1, Part 4, 4.2.4; in 2.0.1 it is an unknown message type."""
    with ChargePoint(stage_5.port, cid, version) as charge_point:
        charge_point.send(6, "1", "Stream")
        charge_point.send(2, "next", "Heartbeat", {})
        stage_5.service.take(f"ocpp/cp/{cid}/Heartbeat")
        stage_5.service.send(cid, [3, "next", {}])
        if version == "ocpp2.0.1":
            assert charge_point.receive()[:3] == [4, "1", "MessageTypeNotSupported"]
        assert charge_point.receive() == [3, "next", {}]


def test_services_are_told_of_a_refused_frame(stage_5: Stage, cid: str) -> None:
    node = stage_5.gateway.wait_for(r"ocppgw \S+, node (\S+)")[1]
    identity = f"{cid}/ü"
    with ChargePoint(stage_5.port, identity) as charge_point:
        for frame, code in (('[2,"1","ü"]', "FormationViolation"), (b"\xff", None)):
            charge_point.socket.send(frame, text=True)
            while (told := stage_5.service.take(f"ocpp/gateway/{node}/invalid").content)["cid"] != identity:
                pass  # what other tests have left
            assert told.pop("detail")
            text = frame if isinstance(frame, str) else "\ufffd"
            assert told == {"cid": identity, "frame": text, "code": code}


def test_json_in_a_binary_frame_is_json(stage_5: Stage, cid: str) -> None:
    with stage_5.online(cid) as charge_point:
        charge_point.socket.send('[2,"1","Größe",{}]'.encode())
        assert stage_5.service.take(f"ocpp/cp/{cid}/Größe").content["UniqueId"] == "1"
        stage_5.service.send(cid, [3, "1", {}])
        answer = charge_point.socket.recv(10)
        assert answer == '[3,"1",{}]'  # str: a text frame


def test_a_message_may_come_in_fragments_and_with_a_byte_order_mark(stage_5: Stage, cid: str) -> None:
    with ChargePoint(stage_5.port, cid) as charge_point:
        charge_point.socket.send(['\ufeff [2,"1"', ',"Größe", ', "{}] \r\n"])
        assert stage_5.service.take(f"ocpp/cp/{cid}/Größe").content["UniqueId"] == "1"


@pytest.mark.parametrize("fragments", [1, 4])
def test_an_oversized_message_closes_its_connection_alone(stage_5: Stage, cid: str, fragments: int) -> None:
    with stage_5.online(f"{cid}-other") as other:
        with ChargePoint(stage_5.port, cid) as charge_point:
            piece = "x" * (2_000_000 // fragments)
            with suppress(ConnectionClosed):  # it may come to know while it is sending
                charge_point.socket.send(['[2,"1","DataTransfer","', *[piece] * fragments, '"]'])
            code, _ = charge_point.close_code()
            assert code == 1009
        other.send(2, "2", "Heartbeat", {})
        stage_5.service.take(f"ocpp/cp/{cid}-other/Heartbeat")
    assert not stage_5.service.left(cid)


def test_the_largest_message_passes(stage: Stage, cid: str) -> None:
    frame = '[2,"1","DataTransfer",{"data":""}]'
    data = "x" * (1048576 - len(frame))
    with ChargePoint(stage.port, cid) as charge_point:
        charge_point.socket.send(frame.replace('""', f'"{data}"'))
        assert stage.service.take(f"ocpp/cp/{cid}/DataTransfer").content["Payload"]["data"] == data


def test_a_flood_of_bad_frames_does_not_flood_the_log(stage_5: Stage, cid: str) -> None:
    seen = len(stage_5.gateway.lines)
    with ChargePoint(stage_5.port, cid) as charge_point:
        for _ in range(200):
            charge_point.socket.send("[")
        charge_point.send(2, "next", "Heartbeat", {})
        stage_5.service.take(f"ocpp/cp/{cid}/Heartbeat")
    assert sum(f"{cid} sent a bad frame" in line for line in stage_5.gateway.lines[seen:]) == 1
