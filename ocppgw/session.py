"""The rules by which one charge point and the services behind MQTT take turns. No I/O.

A Session lives as long as one connection. Upstream it checks a frame and hands it on. Downstream it keeps the CALLs:
one at a time is written to the charge point (OCPP-J 1.6 and Part 4, 4.1.1), the others wait in a bounded queue, and
each has exactly one end: the answer is published, or a delivery failure is. Everything else is written at once or
fails at once. Both directions are independent: crossing CALLs are legal. Answers are matched by unique id only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

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
)
from ocppgw.settings import Downstream

FAULT_LOG_INTERVAL = 60.0
"""Seconds between two log lines about bad frames of one charge point; all of them are counted."""


class Owner(Protocol):
    """Who carries what a session has to say; the gateway."""

    def session_opened(self, session: Session) -> None:
        """Frames may flow in both directions from now on."""

    def publish(self, session: Session, message: Message, action: str | None, frame: bytes | None) -> None:
        """Publish a message. action: of the CALL that it answers; frame: as it came, None for one of our own."""

    def publish_refused(self, session: Session, frame: bytes, fault: ProtocolFault) -> None:
        """Let services know of a frame that was refused."""

    def count(self, event: str) -> None:
        """Add one to a counter."""


@dataclass(frozen=True, slots=True)
class _Written:
    call: Call
    timeout: IDelayedCall


@implementer(ICentralSystem)
class Session:
    """One charge point's connection as the gateway sees it; cred's avatar.

    cid: the identity. level: the same, topic-safe. message_size: bytes of the largest frame that may be written.
    """

    log = Logger()

    def __init__(
        self,
        cid: str,
        level: str,
        charge_point: IChargePoint,
        owner: Owner,
        clock: IReactorTime,
        settings: Downstream,
        message_size: int,
    ) -> None:
        self.cid = cid
        self.level = level
        self.charge_point = charge_point
        self.version = charge_point.version
        self._owner = owner
        self._clock = clock
        self._settings = settings
        self._message_size = message_size
        self._written: dict[str, _Written] = {}
        self._waiting: deque[Call] = deque()
        self._end: str | None = None
        self._fault_logged = -FAULT_LOG_INTERVAL
        self._faults = 0

    def opened(self) -> None:
        """The handshake is complete."""
        self._owner.session_opened(self)

    def frame_received(self, frame: bytes) -> None:
        """Take one frame from the charge point."""
        try:
            message = decode_frame(frame, self.version)
        except ProtocolFault as fault:
            self._frame_refused(frame, fault)
            return
        if isinstance(message, (Call, Send)):
            self._owner.publish(self, message, None, frame)
            return
        answered = None
        if isinstance(message, (CallResult, CallError)):
            answered = self._written.pop(message.unique_id, None)
            if answered is None:
                self._owner.count("unmatched_answer")
            else:
                answered.timeout.cancel()
        self._owner.publish(self, message, answered.call.action if answered is not None else None, frame)
        self._write_next()

    def message_received(self, delivery: Delivery) -> None:
        """Take one message that a service published for this charge point."""
        try:
            message = decode_envelope(delivery.payload, self.version)
        except ProtocolFault as fault:
            if fault.unique_id is None:
                self._owner.count("invalid_envelope")
                self.log.warn(
                    "message for charge point {cid} on {topic} is not OCPP-J and has no id to answer: {reason}",
                    cid=self.level,
                    topic=delivery.topic,
                    reason=fault.reason,
                )
            else:
                self._fail(fault.unique_id, fault.action, "invalid", fault.reason)
            return
        if isinstance(message, Call):
            self._call(message)
        else:
            action = message.action if isinstance(message, Send) else None
            failure = self._write(message)
            if failure is not None:
                self._fail(message.unique_id, action, *failure)

    def closed(self, reason: str) -> None:
        """End every CALL that has no answer yet. reason: "disconnected", "replaced" or "shutting_down"."""
        if self._end is not None:
            return
        self._end = reason
        written, waiting = list(self._written.values()), list(self._waiting)
        self._written.clear()
        self._waiting.clear()
        for entry in written:
            entry.timeout.cancel()
            self._fail(entry.call.unique_id, entry.call.action, reason, "the connection ended before the answer")
        for call in waiting:
            self._fail(call.unique_id, call.action, reason, "the connection ended before it was sent")

    def _call(self, call: Call) -> None:
        if self._end is not None:
            self._fail(call.unique_id, call.action, self._end, "the connection has ended")
        elif not self._waiting and self._may_write(call):
            self._write_call(call)
        elif len(self._waiting) >= self._settings.max_mqueue_len:
            self._fail(call.unique_id, call.action, "queue_full", f"{len(self._waiting)} CALLs are waiting")
        else:
            self._waiting.append(call)

    def _may_write(self, call: Call) -> bool:
        """One CALL at a time; without strict mode as many as may wait, but no id twice."""
        if self._settings.strict_mode:
            return not self._written
        return call.unique_id not in self._written and len(self._written) < self._settings.max_mqueue_len

    def _write_next(self) -> None:
        while self._waiting and self._may_write(self._waiting[0]):
            self._write_call(self._waiting.popleft())

    def _write_call(self, call: Call) -> None:
        failure = self._write(call)
        if failure is not None:
            self._fail(call.unique_id, call.action, *failure)
            return
        timeout = self._clock.callLater(self._settings.call_timeout, self._timed_out, call.unique_id)
        self._written[call.unique_id] = _Written(call, timeout)

    def _timed_out(self, unique_id: str) -> None:
        call = self._written.pop(unique_id).call
        self._fail(call.unique_id, call.action, "timeout", f"no answer in {self._settings.call_timeout:g} s")
        self._write_next()

    def _write(self, message: Message) -> tuple[str, str] | None:
        """Write a frame; what is wrong when that cannot be done, as reason and description."""
        frame = encode_frame(message)
        if len(frame) > self._message_size:
            return "too_large", f"{len(frame)} bytes, {self._message_size} are allowed"
        if self._end is not None or not self.charge_point.send(frame):
            return self._end or "disconnected", "the connection has ended"
        return None

    def _fail(self, unique_id: str, action: str | None, reason: str, description: str) -> None:
        self._owner.count(f"delivery_failure_{reason}")
        notice = CallError(unique_id, "GenericError", description, {"origin": "gateway", "reason": reason})
        self._owner.publish(self, notice, action, None)

    def _frame_refused(self, frame: bytes, fault: ProtocolFault) -> None:
        self._owner.count("invalid_frame")
        self._faults += 1
        if self._clock.seconds() - self._fault_logged >= FAULT_LOG_INTERVAL:
            self._fault_logged = self._clock.seconds()
            self.log.warn(
                "charge point {cid} sent a bad frame ({faults} so far): {reason}",
                cid=self.level,
                faults=self._faults,
                reason=fault.reason,
            )
        if fault.answer is not None:
            # It repeats the id as it came: beyond the size of a frame there is no answer.
            self._write(fault.answer)
        self._owner.publish_refused(self, frame, fault)
