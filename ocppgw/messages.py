"""The messages of OCPP-J: what they are, how they look on the wire and on MQTT, and which faults they can have.

A frame is one JSON array (OCPP-J 1.6, 4.2; Part 4 of 2.0.1 and 2.1, 4.2); an envelope is the payload of an MQTT
message, either that array or EMQX's object form. Both are read by the same rules. Pure: no I/O, no state.

Between id and action, or id and payload, a message of 2.x may have an extension, an object; it is passed on as it is
(Part 4 of 2.0.1 and 2.1, 7.1). What carries a signature is an action that ends with ``-Signed``, and is like any other.

Kinds by version: 1.6 and 2.0.1 have CALL (2), CALLRESULT (3) and CALLERROR (4); 2.1 adds CALLRESULTERROR (5) and
SEND (6). A kind that a version lacks is an unknown message type there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from ocppgw import exactjson

OCPP16 = "ocpp1.6"
OCPP201 = "ocpp2.0.1"
OCPP21 = "ocpp2.1"
VERSIONS = (OCPP16, OCPP201, OCPP21)

MAX_UNIQUE_ID = 36
"""Characters of a unique id (OCPP-J 1.6, 4.1.4; Part 4, 4.1.4)."""
MAX_READABLE_ID = 1024
"""Characters of a unique id that is still repeated in an answer or a notice; a longer one counts as unreadable."""
MAX_ACTION = 255
"""Characters of an action: ours, so that a topic can hold it; no version names a limit."""

UNREADABLE_ID = "-1"
"""The id of an answer to a CALL whose own id cannot be read, 2.x only (Part 4, 4.2.3)."""

_CALL, _CALLRESULT, _CALLERROR, _CALLRESULTERROR, _SEND = 2, 3, 4, 5, 6
_KINDS = {
    OCPP16: frozenset({_CALL, _CALLRESULT, _CALLERROR}),
    OCPP201: frozenset({_CALL, _CALLRESULT, _CALLERROR}),
    OCPP21: frozenset({_CALL, _CALLRESULT, _CALLERROR, _CALLRESULTERROR, _SEND}),
}

# The error codes that the gateway answers with, by fault and version: None where no answer may be sent.
#   unreadable      not JSON, not an array, or no id: 1.6 has no id to answer with; 2.x Part 4, 4.2.3
#   malformed       a CALL with a readable id that is not built like one: 1.6, 4.2.3; 2.x Part 4, 4.3
#   unknown         a message type that the version lacks: 1.6, 4.1.3 and 2.1, 4.4 say ignore; 2.0.1, 4.4 says answer
#   unknown_action  1.6, 4.2.3 and 2.x Part 4, 4.3: the action is not known to the receiver
#   format ...      a payload against its schema: 1.6, 4.2.3; 2.x Part 4, 4.3. The spelling of 1.6 is that of its
#                   specification (errata 5.1 and 5.2: it will not be mended)
_FAULT_CODES: dict[str, dict[str, str | None]] = {
    fault: {OCPP16: code_16, OCPP201: code_201, OCPP21: code_21}
    for fault, code_16, code_201, code_21 in (
        ("unreadable", None, "RpcFrameworkError", "RpcFrameworkError"),
        ("malformed", "FormationViolation", "RpcFrameworkError", "RpcFrameworkError"),
        ("unknown", None, "MessageTypeNotSupported", None),
        ("unknown_action", "NotImplemented", "NotImplemented", "NotImplemented"),
        ("format", "FormationViolation", "FormatViolation", "FormatViolation"),
        (
            "occurrence",
            "OccurenceConstraintViolation",
            "OccurrenceConstraintViolation",
            "OccurrenceConstraintViolation",
        ),
        ("type", "TypeConstraintViolation", "TypeConstraintViolation", "TypeConstraintViolation"),
        ("property", "PropertyConstraintViolation", "PropertyConstraintViolation", "PropertyConstraintViolation"),
    )
}


@dataclass(frozen=True, slots=True)
class Call:
    """``[2, "19223201", "BootNotification", {"chargePointVendor": "v"}]``"""

    kind: ClassVar[int] = _CALL
    unique_id: str
    action: str
    payload: Any
    extension: Any = None


@dataclass(frozen=True, slots=True)
class CallResult:
    """``[3, "19223201", {"status": "Accepted"}]``"""

    kind: ClassVar[int] = _CALLRESULT
    unique_id: str
    payload: Any
    extension: Any = None


@dataclass(frozen=True, slots=True)
class CallError:
    """``[4, "19223201", "NotSupported", "", {}]``"""

    kind: ClassVar[int] = _CALLERROR
    unique_id: str
    code: str
    description: str = ""
    details: Any = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CallResultError:
    """``[5, "19223201", "FormatViolation", "", {}]``, the answer to a CALLRESULT that cannot be used (2.1, 4.2.5)"""

    kind: ClassVar[int] = _CALLRESULTERROR
    unique_id: str
    code: str
    description: str = ""
    details: Any = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Send:
    """``[6, "19223201", "NotifyPeriodicEventStream", {}]``, never answered (2.1, 4.2.4)"""

    kind: ClassVar[int] = _SEND
    unique_id: str
    action: str
    payload: Any
    extension: Any = None


Message: TypeAlias = Call | CallResult | CallError | CallResultError | Send


class ProtocolFault(Exception):
    """What a peer sent is not OCPP-J of this version.

    reason: what is wrong, in our words only. unique_id and action: as far as they can be read.
    answer: the CALLERROR that the sender has a right to, None where the specification forbids one.
    """

    def __init__(
        self, reason: str, unique_id: str | None = None, action: str | None = None, answer: CallError | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.unique_id = unique_id
        self.action = action
        self.answer = answer


def decode_frame(data: bytes, version: str) -> Message:
    """Read one frame. Raises ProtocolFault, with the answer that the version asks for."""
    try:
        frame = exactjson.loads(data)
    except ValueError:
        raise _fault("unreadable", version, "not JSON") from None
    return _message(frame, version)


def decode_envelope(data: bytes, version: str) -> Message:
    """Read the payload of an MQTT message, object or array form. Raises ProtocolFault."""
    try:
        envelope = exactjson.loads(data)
    except ValueError:
        raise _fault("unreadable", version, "not JSON") from None
    return _message(_array(envelope) if type(envelope) is dict else envelope, version)


def payload_fault(message: Message, violation: str, detail: str, version: str) -> ProtocolFault:
    """Make the fault of a message whose payload is against its schema. violation: a key of the table of codes."""
    action = message.action if isinstance(message, (Call, Send)) else None
    return _fault(violation if isinstance(message, Call) else None, version, detail, message.unique_id, action)


def encode_frame(message: Message) -> bytes:
    """Write the array form, as it goes to a charge point."""
    frame: list[Any] = [message.kind, message.unique_id]
    if isinstance(message, (CallError, CallResultError)):
        frame += (message.code, message.description, message.details)
        return exactjson.dumps(frame)
    if message.extension is not None:
        frame.append(message.extension)
    if not isinstance(message, CallResult):
        frame.append(message.action)
    frame.append(message.payload)
    return exactjson.dumps(frame)


def encode_envelope(message: Message, action: str | None = None, **more: Any) -> bytes:
    """Write the object form, as it goes to a service.

    action: that of the CALL which an answer answers, left out when it is not known. more: further members.
    """
    envelope: dict[str, Any] = {"MessageTypeId": message.kind, "UniqueId": message.unique_id}
    if isinstance(message, (Call, Send)):
        action = message.action
    if action is not None:
        envelope["Action"] = action
    if isinstance(message, (CallError, CallResultError)):
        envelope["ErrorCode"] = message.code
        envelope["ErrorDescription"] = message.description
        envelope["ErrorDetails"] = message.details
    else:
        envelope["Payload"] = message.payload
        if message.extension is not None:
            envelope["Extension"] = message.extension
    envelope.update(more)
    return exactjson.dumps(envelope)


def _message(frame: Any, version: str) -> Message:
    if type(frame) is not list or not frame:
        raise _fault("unreadable", version, "not an array")
    kind = frame[0]
    unique_id = _readable(frame[1]) if len(frame) > 1 else None
    if type(kind) is not int or kind not in _KINDS[version]:
        fault = "unknown" if unique_id is not None else None
        raise _fault(fault, version, "unknown message type", unique_id)
    extension = _taken_out_extension(frame, version)
    if kind in (_CALL, _SEND):
        # A bad SEND is never answered (2.1, 4.2.4).
        return _request(frame, version, unique_id, extension)
    if unique_id is None or len(unique_id) > MAX_UNIQUE_ID:
        raise ProtocolFault("no readable id" if unique_id is None else _LONG_ID, unique_id)
    if kind == _CALLRESULT:
        if len(frame) != 3:
            raise ProtocolFault("a CALLRESULT has 3 elements", unique_id)
        return CallResult(unique_id, frame[2], extension)
    return _error(frame, unique_id)


def _readable(unique_id: Any) -> str | None:
    return unique_id if type(unique_id) is str and len(unique_id) <= MAX_READABLE_ID else None


_LONG_ID = f"unique id over {MAX_UNIQUE_ID} characters"


def _taken_out_extension(frame: list[Any], version: str) -> Any:
    """Take the extension out of a frame of 2.x that has one element too many, and an object there."""
    usual = {_CALL: 4, _SEND: 4, _CALLRESULT: 3}.get(frame[0])
    if version == OCPP16 or usual is None or len(frame) != usual + 1 or type(frame[2]) is not dict:
        return None
    return frame.pop(2)


def _request(frame: list[Any], version: str, unique_id: str | None, extension: Any) -> Call | Send:
    kind = frame[0]
    action = frame[2] if len(frame) > 2 and type(frame[2]) is str else None
    if unique_id is None:
        raise _fault("unreadable" if kind == _CALL else None, version, "no readable id", None, action)
    if len(frame) != 4:
        reason = f"a {'CALL' if kind == _CALL else 'SEND'} has 4 elements"
    elif action is None:
        reason = "the action is not a string"
    elif len(action) > MAX_ACTION:
        reason = f"action over {MAX_ACTION} characters"
    elif len(unique_id) > MAX_UNIQUE_ID:
        reason = _LONG_ID
    else:
        request = Call if kind == _CALL else Send
        return request(unique_id, action, frame[3], extension)
    raise _fault("malformed" if kind == _CALL else None, version, reason, unique_id, action)


def _error(frame: list[Any], unique_id: str) -> CallError | CallResultError:
    # Charge points leave out the details or write null (reference: Q23); OCPP-J 1.6, 4.2.3 asks for "" and {}.
    if not 3 <= len(frame) <= 5 or type(frame[2]) is not str:
        raise ProtocolFault("an error has an id, a code, a description and details", unique_id)
    description = frame[3] if len(frame) > 3 and frame[3] is not None else ""
    details = frame[4] if len(frame) > 4 and frame[4] is not None else {}
    if type(description) is not str:
        raise ProtocolFault("the description is not a string", unique_id)
    kind = CallError if frame[0] == _CALLERROR else CallResultError
    return kind(unique_id, frame[2], description, details)


# The members of the object form after MessageTypeId, in the order of the array form.
_MEMBERS = {
    _CALL: ("UniqueId", "Action", "Payload"),
    _CALLRESULT: ("UniqueId", "Payload"),
    _CALLERROR: ("UniqueId", "ErrorCode", "ErrorDescription", "ErrorDetails"),
    _CALLRESULTERROR: ("UniqueId", "ErrorCode", "ErrorDescription", "ErrorDetails"),
    _SEND: ("UniqueId", "Action", "Payload"),
}
_OPTIONAL = ("ErrorDescription", "ErrorDetails")


def _array(envelope: dict[str, Any]) -> list[Any]:
    kind = envelope.get("MessageTypeId")
    if kind is None:
        raise ProtocolFault("MessageTypeId is missing", _readable(envelope.get("UniqueId")))
    if type(kind) is not int or kind not in _MEMBERS:
        return [kind, envelope.get("UniqueId")]
    members = _MEMBERS[kind]
    missing = [name for name in members if name not in envelope and name not in _OPTIONAL]
    if missing:
        action = envelope.get("Action")
        raise ProtocolFault(
            f"{missing[0]} is missing",
            _readable(envelope.get("UniqueId")),
            action[:MAX_ACTION] if type(action) is str else None,
        )
    array = [kind, *(envelope.get(name) for name in members)]
    if type(envelope.get("Extension")) is dict:
        array.insert(2, envelope["Extension"])
    return array


def _fault(
    fault: str | None, version: str, reason: str, unique_id: str | None = None, action: str | None = None
) -> ProtocolFault:
    code = _FAULT_CODES[fault][version] if fault is not None else None
    answer = None
    if code is not None:
        answer = CallError(UNREADABLE_ID if unique_id is None else unique_id, code, reason)
    return ProtocolFault(reason, unique_id, action, answer)
