"""The rules by which one charge point and the services behind MQTT take turns. No I/O.

A Session lives as long as one connection. Upstream it checks a frame and hands it on. Downstream a CALL takes its turn
(``calls``); everything else is written at once or fails at once. Both directions are independent: crossing CALLs are
legal (OCPP-J 1.6, 4.1.1; Part 4 of 2.x, 4.1.1). Answers are matched by unique id only. For charge points that cannot
take all of this there are switches: half duplex, holding back until the first boot, gaps and delays (``pacing``).

Payloads are checked against the schemas where the operator wants it: what comes up is refused with the error code of
the version, what comes down with a delivery failure; or, with ``on_violation = "warn"``, reported and passed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from ocppgw.asked import Asked
from ocppgw.calls import Calls
from ocppgw.interfaces import Delivery, ICentralSystem, IChargePoint
from ocppgw.messages import (
    Call,
    CallError,
    CallResult,
    Message,
    ProtocolFault,
    Send,
    decode_envelope,
    decode_frame,
    encode_frame,
    payload_fault,
)
from ocppgw.pacing import Pacer
from ocppgw.schemas import Schemas
from ocppgw.settings import Downstream, Upstream

FAULT_LOG_INTERVAL = 60.0
"""Seconds between two log lines about bad frames of one charge point; all of them are counted."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one charge point.

    message_size: bytes of the largest frame that may be written. schemas_up, schemas_down: for the payloads of each
    direction, None where they are not looked at. reject: refuse what is against its schema, do not just report it.
    """

    upstream: Upstream
    downstream: Downstream
    message_size: int
    schemas_up: Schemas | None = None
    schemas_down: Schemas | None = None
    reject: bool = True


class Owner(Protocol):
    """Who carries what a session has to say; the gateway."""

    def session_opened(self, session: Session) -> None:
        """Frames may flow in both directions from now on."""

    def publish(
        self, session: Session, message: Message, action: str | None, frame: bytes | None, late: bool = False
    ) -> None:
        """Publish a message. action: of the CALL that it answers; frame: as it came, None for one of our own.

        late: the CALL that it answers has had its end already.
        """

    def publish_refused(self, session: Session, frame: bytes, fault: ProtocolFault) -> None:
        """Let services know of a frame that was refused."""

    def count(self, event: str) -> None:
        """Add one to a counter."""


@implementer(ICentralSystem)
class Session:
    """One charge point's connection as the gateway sees it; cred's avatar.

    cid: the identity. level: the same, topic-safe.
    """

    log = Logger()

    def __init__(
        self, cid: str, level: str, charge_point: IChargePoint, owner: Owner, clock: IReactorTime, rules: Rules
    ) -> None:
        self.cid = cid
        self.level = level
        self.charge_point = charge_point
        self.version = charge_point.version
        self._owner = owner
        self._clock = clock
        self._rules = rules
        self._calls = Calls(clock, rules.downstream, self._may_call, self._write, self._call_failed)
        self._pacer = Pacer(clock, lambda frame: self.charge_point.send(frame), rules.downstream.min_gap)
        self._booting: IDelayedCall | None = None
        self._asked = Asked(clock, rules.upstream.awaiting_timeout, self._answer_overdue)
        self._end: str | None = None
        self._fault_logged = -FAULT_LOG_INTERVAL
        self._faults = 0

    def opened(self) -> None:
        """The handshake is complete."""
        if self._rules.downstream.hold_until_boot:
            self._booting = self._clock.callLater(self._rules.downstream.hold_until_boot, self._booted)
        self._owner.session_opened(self)

    def frame_received(self, frame: bytes) -> None:
        """Take one frame from the charge point."""
        try:
            message = decode_frame(frame, self.version)
        except ProtocolFault as fault:
            self._frame_refused(frame, fault, "invalid_frame")
            return
        if isinstance(message, Call) and self._end == "replaced":
            # Its answer would reach the successor, which has not asked; a CALL without an answer is sent again.
            self._owner.count("call_after_end")
        elif isinstance(message, (Call, Send)):
            self._request_received(message, frame)
        else:
            self._answer_received(message, frame)

    def _request_received(self, message: Call | Send, frame: bytes) -> None:
        fault = self._violation(self._rules.schemas_up, message, message.action)
        if fault is not None:
            self._frame_refused(frame, fault, "invalid_payload")
            if self._rules.reject:
                return
        if isinstance(message, Call) and self._end is None:
            self._asked.add(message.unique_id, message.action)
        self._owner.publish(self, message, None, frame)

    def _answer_received(self, message: Message, frame: bytes) -> None:
        answered = None
        if isinstance(message, (CallResult, CallError)):
            answered = self._calls.answered(message.unique_id)
            if answered is None:
                self._owner.count("unmatched_answer")
            elif answered.late:
                self._owner.count("late_answer")
        action = None if answered is None else answered.action
        fault = self._violation(self._rules.schemas_up, message, action)
        if fault is not None:
            self._frame_refused(frame, fault, "invalid_payload")
        if fault is None or not self._rules.reject:
            self._owner.publish(self, message, action, frame, late=answered is not None and answered.late)
        elif answered is not None and not answered.late:
            self._fail(message.unique_id, action, "invalid", f"the answer is against its schema: {fault.reason}")
        self._calls.proceed()

    def message_received(self, delivery: Delivery) -> None:
        """Take one message that a service published for this charge point."""
        message = self._decoded(delivery)
        if message is None:
            return
        if delivery.duplicate and isinstance(message, Call) and self._calls.knows(message.unique_id):
            self._owner.count("delivered_again")
            return
        asked = self._asked.action_of(message.unique_id)
        action = message.action if isinstance(message, (Call, Send)) else asked
        violation = self._violation(self._rules.schemas_down, message, action)
        if violation is not None:
            self._owner.count("invalid_payload_downstream")
            if self._rules.reject:
                self._fail(message.unique_id, action, "invalid", violation.reason)
                return
        if isinstance(message, Call):
            if self._end is not None:
                self._fail(message.unique_id, action, self._end, "the connection has ended")
                return
            self._calls.add(message, delivery.properties.expiry if delivery.properties is not None else None)
            return
        delay = self._rules.downstream.reply_delay if asked is not None else 0.0
        failure = self._write(message, delay)
        if failure is not None:
            self._fail(message.unique_id, action, *failure)
        elif asked is not None:
            self._asked.answered(message.unique_id)
            if asked == "BootNotification" and self._booting is not None:
                self._booting.cancel()
                self._booted()
            self._calls.proceed()

    def _decoded(self, delivery: Delivery) -> Message | None:
        """Read a message; one that is not OCPP-J has its notice, where it has an id."""
        try:
            return decode_envelope(delivery.payload, self.version)
        except ProtocolFault as fault:
            if fault.unique_id is not None:
                self._fail(fault.unique_id, fault.action, "invalid", fault.reason)
                return None
            self._owner.count("invalid_envelope")
            self.log.warn(
                "message for charge point {cid} on {topic} is not OCPP-J and has no id to answer: {reason}",
                cid=self.level,
                topic=delivery.topic,
                reason=fault.reason,
            )
            return None

    def closed(self, reason: str) -> None:
        """End every CALL that has no answer yet. reason: "disconnected", "replaced" or "shutting_down"."""
        if self._end is None:
            self._end = reason
            self._asked.end()
            if self._booting is not None:
                self._booting.cancel()
                self._booting = None
            unsent = list(self._pacer.end())
            self._calls.end(reason)
            for message in unsent:
                if not isinstance(message, Call):
                    self._fail(message.unique_id, None, reason, "the connection ended before it was sent")

    def _may_call(self) -> bool:
        """Whether this charge point can take a CALL at all now."""
        return self._booting is None and not (self._rules.downstream.half_duplex and len(self._asked))

    def _booted(self) -> None:
        self._booting = None
        self._calls.proceed()

    def _violation(self, schemas: Schemas | None, message: Message, action: str | None) -> ProtocolFault | None:
        """Check a payload. action: also of the CALL that a CALLRESULT answers; without it there is nothing to check."""
        if schemas is None or action is None or not isinstance(message, (Call, Send, CallResult)):
            return None
        violation = schemas.check(self.version, action, isinstance(message, CallResult), message.payload)
        return None if violation is None else payload_fault(message, violation.kind, violation.detail, self.version)

    def _call_failed(self, call: Call, reason: str, description: str) -> None:
        self._fail(call.unique_id, call.action, reason, description)

    def _answer_overdue(self, action: str) -> None:
        self._owner.count("overdue_answer")
        if self._rules.upstream.log_overdue:
            self.log.warn(
                "no service has answered the {action} of charge point {cid} within {seconds:g} s",
                action=action,
                cid=self.level,
                seconds=self._rules.upstream.awaiting_timeout,
            )
        self._calls.proceed()

    def _write(self, message: Message, delay: float = 0.0) -> tuple[str, str] | None:
        """Write a frame; what is wrong when that cannot be done, as reason and description."""
        frame = encode_frame(message)
        if len(frame) > self._rules.message_size:
            return "too_large", f"{len(frame)} bytes, {self._rules.message_size} are allowed"
        if self._end is not None:
            return self._end, "the connection has ended"
        sent = self._pacer.send(frame, message, delay)
        if sent is None:
            return "queue_full", "too many frames are waiting for their time"
        return None if sent else ("disconnected", "the connection has ended")

    def _fail(self, unique_id: str, action: str | None, reason: str, description: str) -> None:
        self._owner.count(f"delivery_failure_{reason}")
        notice = CallError(unique_id, "GenericError", description, {"origin": "gateway", "reason": reason})
        self._owner.publish(self, notice, action, None)

    def _frame_refused(self, frame: bytes, fault: ProtocolFault, event: str) -> None:
        """Count, log, report and, where the specification and the operator let us, answer a bad frame."""
        self._owner.count(event)
        self._faults += 1
        if self._clock.seconds() - self._fault_logged >= FAULT_LOG_INTERVAL:
            self._fault_logged = self._clock.seconds()
            self.log.warn(
                "charge point {cid} sent a bad frame ({faults} so far): {reason}",
                cid=self.level,
                faults=self._faults,
                reason=fault.reason,
            )
        if fault.answer is not None and (self._rules.reject or event == "invalid_frame"):
            # It repeats the id as it came: beyond the size of a frame there is no answer.
            self._write(fault.answer)
        self._owner.publish_refused(self, frame, fault)
