"""OCPP-J messages: what is read from frames and envelopes, and who is told of which fault."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocppgw import exactjson
from ocppgw.messages import (
    MAX_ACTION,
    OCPP16,
    OCPP21,
    OCPP201,
    VERSIONS,
    Call,
    CallError,
    CallResult,
    CallResultError,
    Message,
    ProtocolFault,
    Send,
    decode_envelope,
    decode_frame,
    encode_envelope,
    encode_frame,
)

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy
ANY_TEXT = st.characters(exclude_categories=())  # lone surrogates, too
TEXT = st.text(ANY_TEXT, max_size=8)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(min_value=2**64, max_value=2**200),
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.just(1.0),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda items: st.lists(items, max_size=3) | st.dictionaries(TEXT, items, max_size=3),
    max_leaves=8,
)
IDS = st.text(ANY_TEXT, max_size=36)
REQUESTS = {"unique_id": IDS, "action": st.text(ANY_TEXT, max_size=MAX_ACTION), "payload": VALUES}
DETAILS = VALUES.filter(lambda value: value is not None)  # null is read as {}
ERRORS = {"unique_id": IDS, "code": TEXT, "description": TEXT, "details": DETAILS}
COMMON = st.one_of(
    st.builds(Call, **REQUESTS), st.builds(CallResult, unique_id=IDS, payload=VALUES), st.builds(CallError, **ERRORS)
)
ADDED_IN_21 = st.builds(CallResultError, **ERRORS) | st.builds(Send, **REQUESTS)
MESSAGES = st.tuples(COMMON, st.sampled_from(VERSIONS)) | st.tuples(ADDED_IN_21, st.just(OCPP21))


def exact(message: Message) -> tuple[type, Any]:
    """A message in a form to compare: each number is the decimal that its digits stand for."""
    return type(message), json.loads(encode_frame(message), parse_int=Decimal, parse_float=Decimal)


def fault_of(frame: bytes | list[Any], version: str = OCPP16) -> ProtocolFault:
    with pytest.raises(ProtocolFault) as caught:
        decode_frame(frame if isinstance(frame, bytes) else exactjson.dumps(frame), version)
    return caught.value


def answer_to(frame: bytes | list[Any], version: str) -> tuple[str, str] | None:
    """Id and code of the CALLERROR that the sender of a frame has a right to."""
    answer = fault_of(frame, version).answer
    if answer is None:
        return None
    assert answer.details == {}
    return answer.unique_id, answer.code


# What is written is what is read.


@PATIENT
@given(MESSAGES)
def test_a_frame_is_read_as_it_was_written(pair):
    message, version = pair
    assert exact(decode_frame(encode_frame(message), version)) == exact(message)


@PATIENT
@given(MESSAGES, TEXT)
def test_an_envelope_is_read_as_it_was_written(pair, action):
    message, version = pair
    assert exact(decode_envelope(encode_envelope(message, action), version)) == exact(message)
    assert exact(decode_envelope(encode_envelope(message), version)) == exact(message)
    assert exact(decode_envelope(encode_frame(message), version)) == exact(message)


@PATIENT
@given(st.binary(max_size=60) | VALUES.map(exactjson.dumps) | st.lists(VALUES).map(exactjson.dumps))
def test_nothing_but_a_protocol_fault_comes_of_any_input(data):
    for version in VERSIONS:
        for decode in (decode_frame, decode_envelope):
            try:
                decode(data, version)
            except ProtocolFault as fault:
                if fault.answer is not None:
                    encode_frame(fault.answer)


# The forms (OCPP-J 1.6, 4.2; Part 4 of 2.1, 4.2), and EMQX's object form of each.
FORMS = [
    (
        Call("1", "BootNotification", {"b": 1, "a": 2}),
        '[2,"1","BootNotification",{"b":1,"a":2}]',
        '{"MessageTypeId":2,"UniqueId":"1","Action":"BootNotification","Payload":{"b":1,"a":2}}',
    ),
    (
        CallResult("1", {"status": "Accepted"}),
        '[3,"1",{"status":"Accepted"}]',
        '{"MessageTypeId":3,"UniqueId":"1","Payload":{"status":"Accepted"}}',
    ),
    (
        CallError("1", "NotSupported", "no", {"d": 1.0}),
        '[4,"1","NotSupported","no",{"d":1.0}]',
        '{"MessageTypeId":4,"UniqueId":"1","ErrorCode":"NotSupported","ErrorDescription":"no","ErrorDetails":{"d":1.0}}',
    ),
    (
        CallResultError("1", "FormatViolation"),
        '[5,"1","FormatViolation","",{}]',
        '{"MessageTypeId":5,"UniqueId":"1","ErrorCode":"FormatViolation","ErrorDescription":"","ErrorDetails":{}}',
    ),
    (
        Send("1", "NotifyPeriodicEventStream", {}),
        '[6,"1","NotifyPeriodicEventStream",{}]',
        '{"MessageTypeId":6,"UniqueId":"1","Action":"NotifyPeriodicEventStream","Payload":{}}',
    ),
]


@pytest.mark.parametrize(("message", "array", "object_form"), FORMS)
def test_both_forms_of_a_message(message, array, object_form):
    assert encode_frame(message).decode() == array
    assert encode_envelope(message).decode() == object_form
    assert decode_frame(array.encode(), OCPP21) == message
    assert decode_envelope(array.encode(), OCPP21) == message
    assert decode_envelope(object_form.encode(), OCPP21) == message


def test_the_envelope_of_an_answer_names_the_action_that_it_answers():
    assert list(exactjson.loads(encode_envelope(CallResult("1", {}), "Reset"))) == [
        "MessageTypeId",
        "UniqueId",
        "Action",
        "Payload",
    ]
    assert exactjson.loads(encode_envelope(CallError("1", "GenericError"), "Reset"))["Action"] == "Reset"


def test_the_envelope_of_a_request_names_its_own_action_only():
    assert exactjson.loads(encode_envelope(Call("1", "Reset", {}), "Other"))["Action"] == "Reset"


def test_an_envelope_can_have_further_members():
    assert exactjson.loads(encode_envelope(CallResult("1", {}), "Reset", Late=True))["Late"] is True


def test_blanks_and_a_byte_order_mark_before_a_message_do_not_matter():
    assert decode_frame(b'\xef\xbb\xbf [ 3 , "1" , null ]', OCPP16) == CallResult("1", None)
    assert decode_envelope(b'\n{"MessageTypeId": 3, "UniqueId": "1", "Payload": {}}', OCPP16) == CallResult("1", {})


@pytest.mark.parametrize("more", [[], [None], [None, None], ["", None], ["", {}]])
def test_an_error_is_completed_with_an_empty_description_and_details(more):
    # OCPP-J 1.6, 4.2.3; charge points leave them out or write null.
    assert decode_frame(exactjson.dumps([4, "1", "GenericError", *more]), OCPP16) == CallError("1", "GenericError")


def test_description_and_details_may_be_left_out_of_an_envelope():
    envelope = {"MessageTypeId": 4, "UniqueId": "1", "ErrorCode": "GenericError"}
    assert decode_envelope(exactjson.dumps(envelope), OCPP16) == CallError("1", "GenericError", "", {})


def test_members_that_an_envelope_does_not_know_are_passed_over():
    envelope = {"MessageTypeId": 3, "UniqueId": "1", "Action": "Reset", "Payload": {}, "Trace": 1}
    assert decode_envelope(exactjson.dumps(envelope), OCPP16) == CallResult("1", {})


def test_what_the_specification_calls_an_action_is_any_string():
    # Signed messages of 2.x have the suffix "-Signed" (Part 4, 7); nobody's spelling is corrected.
    assert decode_frame(b'[2,"1","boot-Signed",null]', OCPP201) == Call("1", "boot-Signed", None)


# Faults of charge points: who is answered (the table of the contract's section on upstream messages).

UNREADABLE = [
    b"",
    b"no",
    b"\xff",
    b"[2",
    b"{}",
    b'{"MessageTypeId": 2, "UniqueId": "1", "Action": "Heartbeat", "Payload": {}}',
    b"3",
    b"null",
    b'"[2]"',
    [],
    [2],
    [2, None, "Heartbeat", {}],
    [2, 17, "Heartbeat", {}],
    [2, ["1"], "Heartbeat", {}],
]


@pytest.mark.parametrize("frame", UNREADABLE)
@pytest.mark.parametrize(
    ("version", "answer"),
    [(OCPP16, None), (OCPP201, ("-1", "RpcFrameworkError")), (OCPP21, ("-1", "RpcFrameworkError"))],
)
def test_a_frame_without_a_readable_id(frame, version, answer):
    # 1.6 has no id to answer with; Part 4 of 2.x, 4.2.3.
    assert answer_to(frame, version) == answer
    assert fault_of(frame, version).unique_id is None


LONG_ID = "i" * 37
MALFORMED = [
    [2, "1"],
    [2, "1", "Heartbeat"],
    [2, "1", "Heartbeat", {}, {}],
    [2, "1", 3, {}],
    [2, "1", None, {}],
    [2, "1", {}, "Heartbeat"],
    [2, "1", "A" * (MAX_ACTION + 1), {}],
    [2, LONG_ID, "Heartbeat", {}],
    [2, LONG_ID, 3],
    [2, "\ud800", 3],
]


@pytest.mark.parametrize("frame", MALFORMED)
@pytest.mark.parametrize(
    ("version", "code"), [(OCPP16, "FormationViolation"), (OCPP201, "RpcFrameworkError"), (OCPP21, "RpcFrameworkError")]
)
def test_a_malformed_call_with_a_readable_id_is_answered_with_it(frame, version, code):
    assert answer_to(frame, version) == (frame[1], code)


UNKNOWN = [[1, "1", {}], [7, "1", "A", {}], ["2", "1", "A", {}], [2.0, "1", "A", {}], [True, "1", {}], [None, "1"]]
UNKNOWN_BEFORE_21 = [[5, "1", "GenericError", "", {}], [6, "1", "A", {}]]
UNKNOWN_WITHOUT_ID = [[7], [7, 1, "A", {}], [None], [-2, None], [2**70, None]]


@pytest.mark.parametrize("frame", UNKNOWN + UNKNOWN_BEFORE_21)
def test_an_unknown_message_type_is_ignored_in_16_and_answered_in_201(frame):
    # OCPP-J 1.6, 4.1.3: ignore. Part 4 of 2.0.1, 4.4: answer.
    assert answer_to(frame, OCPP16) is None
    assert answer_to(frame, OCPP201) == ("1", "MessageTypeNotSupported")
    assert fault_of(frame).unique_id == "1"


@pytest.mark.parametrize("frame", UNKNOWN)
def test_an_unknown_message_type_is_ignored_in_21(frame):
    assert answer_to(frame, OCPP21) is None  # Part 4 of 2.1, 4.4


@pytest.mark.parametrize("frame", UNKNOWN_WITHOUT_ID)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_message_type_without_an_id_is_never_answered(frame, version):
    assert answer_to(frame, version) is None


BAD_ANSWERS = [
    [3],
    [3, "1"],
    [3, "1", "x", {}],
    [3, "1", {}, {}, {}],
    [3, 1, {}],
    [3, LONG_ID, {}],
    [4],
    [4, "1"],
    [4, "1", 5, "", {}],
    [4, "1", "GenericError", 5, {}],
    [4, "1", "GenericError", "", {}, {}],
    [4, None, "GenericError", "", {}],
    [4, LONG_ID, "GenericError", "", {}],
]
BAD_IN_21 = [
    [5, "1"],
    [5, "1", "GenericError", {}, {}],
    [6],
    [6, 1, "A", {}],
    [6, "1", "A"],
    [6, "1", 2, {}],
    [6, LONG_ID, "A", {}],
]


@pytest.mark.parametrize(
    ("frame", "version"),
    [(frame, version) for frame in BAD_ANSWERS for version in VERSIONS] + [(frame, OCPP21) for frame in BAD_IN_21],
)
def test_what_is_no_call_is_never_answered(frame, version):
    assert answer_to(frame, version) is None


def test_a_fault_tells_what_could_be_read():
    fault = fault_of([2, "1", "Heartbeat"])
    assert (fault.unique_id, fault.action, fault.reason) == ("1", "Heartbeat", "a CALL has 4 elements")
    assert str(fault) == fault.reason


@pytest.mark.parametrize("frame", [[2, "1", "s3cret"], [2, "1", ["s3cret"], {}], [9, "1", "s3cret"], b"s3cret"])
def test_an_answer_repeats_nothing_of_the_frame_but_its_id(frame):
    answer = fault_of(frame, OCPP201).answer
    assert answer is not None
    assert b"s3cret" not in encode_frame(answer)


# Faults of services: what a delivery failure has to name.


@pytest.mark.parametrize(
    ("envelope", "unique_id", "action", "reason"),
    [
        ({"UniqueId": "1"}, "1", None, "MessageTypeId is missing"),
        ({"MessageTypeId": 9, "UniqueId": "1"}, "1", None, "unknown message type"),
        ({"MessageTypeId": "2", "UniqueId": "1"}, "1", None, "unknown message type"),
        ({"MessageTypeId": [2], "UniqueId": "1"}, "1", None, "unknown message type"),
        ({"MessageTypeId": 6, "UniqueId": "1", "Action": "A", "Payload": {}}, "1", None, "unknown message type"),
        ({"MessageTypeId": 2, "UniqueId": "1", "Action": "Reset"}, "1", "Reset", "Payload is missing"),
        ({"MessageTypeId": 2, "UniqueId": "1", "Payload": {}}, "1", None, "Action is missing"),
        ({"MessageTypeId": 2, "Action": "Reset", "Payload": {}}, None, "Reset", "UniqueId is missing"),
        ({"MessageTypeId": 2, "UniqueId": 7, "Action": "Reset", "Payload": {}}, None, "Reset", "no readable id"),
        ({"MessageTypeId": 3, "UniqueId": "1"}, "1", None, "Payload is missing"),
        ({"MessageTypeId": 4, "UniqueId": "1"}, "1", None, "ErrorCode is missing"),
        ({"MessageTypeId": 4, "UniqueId": 7, "Action": 8}, None, None, "ErrorCode is missing"),
        ({"MessageTypeId": 2, "UniqueId": LONG_ID, "Action": "A", "Payload": {}}, LONG_ID, "A", "unique id over 36"),
    ],
)
def test_a_bad_envelope_is_described_as_far_as_it_can_be_read(envelope, unique_id, action, reason):
    with pytest.raises(ProtocolFault) as caught:
        decode_envelope(exactjson.dumps(envelope), OCPP16)
    fault = caught.value
    assert (fault.unique_id, fault.action) == (unique_id, action)
    assert fault.reason.startswith(reason)


@pytest.mark.parametrize("payload", [b"", b"no", b'{"MessageTypeId": 2', b"7", b"null"])
def test_an_envelope_that_is_neither_object_nor_array_has_no_id(payload):
    with pytest.raises(ProtocolFault) as caught:
        decode_envelope(payload, OCPP16)
    assert caught.value.unique_id is None


class TestExtensions:
    """Part 4 of 2.0.1 and 2.1, 7.1: an object between the id and what follows it."""

    JWS = {"payload": "e30", "protected": "e30", "signature": "c2ln"}

    @pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
    @pytest.mark.parametrize(
        "frame",
        [
            [2, "1", {"x": 1}, "BootNotification-Signed", JWS],
            [3, "1", {"x": 1}, JWS],
            [2, "1", {}, "Heartbeat", {}],
        ],
    )
    def test_they_pass_in_both_forms(self, version: str, frame: list[Any]) -> None:
        message = decode_frame(exactjson.dumps(frame), version)
        assert exactjson.loads(encode_frame(message)) == frame
        envelope = encode_envelope(message)
        assert exactjson.loads(envelope)["Extension"] == frame[2]
        assert decode_envelope(envelope, version) == message

    def test_a_send_may_have_one(self) -> None:
        frame = [6, "1", {"x": 1}, "NotifyPeriodicEventStream", {}]
        assert exactjson.loads(encode_frame(decode_frame(exactjson.dumps(frame), "ocpp2.1"))) == frame

    @pytest.mark.parametrize(
        ("version", "frame"),
        [
            ("ocpp1.6", [2, "1", {"x": 1}, "Heartbeat", {}]),
            ("ocpp1.6", [3, "1", {"x": 1}, {}]),
            ("ocpp2.1", [2, "1", [], "Heartbeat", {}]),
            ("ocpp2.1", [2, "1", "Heartbeat", {}, {}]),
            ("ocpp2.1", [3, "1", "x", {}]),
        ],
    )
    def test_other_elements_are_one_too_many(self, version: str, frame: list[Any]) -> None:
        with pytest.raises(ProtocolFault, match="elements"):
            decode_frame(exactjson.dumps(frame), version)


def test_an_id_without_end_counts_as_unreadable() -> None:
    # It would be repeated in an answer or a notice that nobody could carry.
    for data in (b'[2,"%s"]', b'{"MessageTypeId":2,"UniqueId":"%s"}', b'{"UniqueId":"%s"}'):
        with pytest.raises(ProtocolFault) as caught:
            decode_envelope(data % (b"x" * 1025), "ocpp1.6")
        assert caught.value.unique_id is None
        assert caught.value.answer is None
