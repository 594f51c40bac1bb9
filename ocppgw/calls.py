"""The CALLs that services send to one charge point: which one is out, which wait, and how each of them ends. No I/O.

One at a time is written (OCPP-J 1.6 and Part 4, 4.1.1); the next waits until that one was answered or its time is up.
Each CALL has exactly one end: ``answered`` finds it, or the owner is told of a failure. What ended without an answer is
remembered for a while, so that a late answer is known as one. Without strict mode many are out, but no id twice.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from ocppgw.messages import Call
from ocppgw.settings import Downstream

MAX_ANSWERED = 100
"""Answered CALLs that are remembered, for a broker that delivers one again."""
MAX_LATE = 1000
"""CALLs that are remembered for late answers."""


@dataclass(slots=True)
class _Entry:
    call: Call
    timer: IDelayedCall | None = None
    written: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """What an answer belongs to. late: the CALL has had its end already."""

    action: str
    late: bool


class Calls:
    """The downstream CALLs of one connection.

    free: whether the charge point can take a CALL at all now; proceed() looks again.
    write: sends a CALL; gives back None, or reason and description when that cannot be done.
    fail: is told of each CALL that ends without an answer, with reason and description.
    """

    def __init__(
        self,
        clock: IReactorTime,
        settings: Downstream,
        free: Callable[[], bool],
        write: Callable[[Call], tuple[str, str] | None],
        fail: Callable[[Call, str, str], None],
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._free = free
        self._write = write
        self._fail = fail
        self._out: dict[str, _Entry] = {}
        self._waiting: deque[_Entry] = deque()
        self._late: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._answered: deque[str] = deque(maxlen=MAX_ANSWERED)

    def __len__(self) -> int:
        """How many have no end yet."""
        return len(self._out) + len(self._waiting)

    def knows(self, unique_id: str) -> bool:
        """Whether a CALL with this id is out, waits, or has ended not long ago."""
        if unique_id in self._out or unique_id in self._late or unique_id in self._answered:
            return True
        return any(entry.call.unique_id == unique_id for entry in self._waiting)

    def add(self, call: Call, expiry: float | None = None) -> None:
        """Write a CALL, or let it wait. expiry: seconds that it may wait at most (MQTT 5, 3.3.2.3.3)."""
        entry = _Entry(call)
        if not self._waiting and self._may_write(call):
            self._start(entry)
        elif len(self._waiting) >= self._settings.max_mqueue_len:
            self._fail(call, "queue_full", f"{len(self._waiting)} CALLs are waiting")
        else:
            if expiry is not None:
                entry.timer = self._clock.callLater(expiry, self._expired, entry)
            self._waiting.append(entry)

    def answered(self, unique_id: str) -> Answered | None:
        """Find the CALL that an answer belongs to. proceed() writes the next one."""
        entry = self._out.pop(unique_id, None)
        if entry is not None:
            _stop(entry)
            self._answered.append(unique_id)
            return Answered(entry.call.action, late=False)
        action, until = self._late.pop(unique_id, ("", 0.0))
        return Answered(action, late=True) if self._clock.seconds() < until else None

    def proceed(self) -> None:
        """Write what may be written now."""
        while self._waiting and self._may_write(self._waiting[0].call):
            entry = self._waiting.popleft()
            _stop(entry)
            self._start(entry)

    def end(self, reason: str) -> None:
        """End all of them: the connection is over."""
        out, waiting = list(self._out.values()), list(self._waiting)
        self._out.clear()
        self._waiting.clear()
        for entry in (*out, *waiting):
            _stop(entry)
        for entry in out:
            self._remember(entry.call)
            self._fail(entry.call, reason, "the connection ended before the answer")
        for entry in waiting:
            self._fail(entry.call, reason, "the connection ended before it was sent")

    def _may_write(self, call: Call) -> bool:
        if not self._free():
            return False
        if self._settings.strict_mode:
            return not self._out
        return call.unique_id not in self._out and len(self._out) < self._settings.max_mqueue_len

    def _start(self, entry: _Entry) -> None:
        failure = self._write(entry.call)
        if failure is not None:
            self._fail(entry.call, *failure)
            return
        self._out[entry.call.unique_id] = entry
        self._wait_for_answer(entry)

    def _wait_for_answer(self, entry: _Entry) -> None:
        entry.written += 1
        again = entry.written <= self._settings.retries
        seconds = self._settings.retry_interval if again else self._settings.call_timeout
        entry.timer = self._clock.callLater(seconds, self._retry if again else self._timed_out, entry)

    def _retry(self, entry: _Entry) -> None:
        """Write it again, with the same unique id; only where the operator asked for it."""
        failure = self._write(entry.call)
        if failure is None:
            self._wait_for_answer(entry)
            return
        del self._out[entry.call.unique_id]
        self._fail(entry.call, *failure)
        self.proceed()

    def _timed_out(self, entry: _Entry) -> None:
        call = entry.call
        del self._out[call.unique_id]
        self._remember(call)
        waited = self._settings.call_timeout + self._settings.retries * self._settings.retry_interval
        self._fail(call, "timeout", f"no answer in {waited:g} s")
        self.proceed()

    def _remember(self, call: Call) -> None:
        """Know a late answer when it comes."""
        self._late[call.unique_id] = (call.action, self._clock.seconds() + self._settings.late_window)
        if len(self._late) > MAX_LATE:
            self._late.popitem(last=False)

    def _expired(self, entry: _Entry) -> None:
        self._waiting.remove(entry)
        self._fail(entry.call, "expired", "its time was up before it could be sent")


def _stop(entry: _Entry) -> None:
    if entry.timer is not None and entry.timer.active():
        entry.timer.cancel()
    entry.timer = None
