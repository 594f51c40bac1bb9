"""Frames to a charge point that must not come too fast. No I/O.

Some charge points lose a frame that follows another one at once, or an answer that comes before they listen for it
(reference: Q12, Q13). For those there is a least gap between two frames, and a delay before an answer. Frames keep
their order, and wait in a bounded queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from ocppgw.messages import Message

MAX_WAITING = 100
"""Frames that wait for their time."""


class Pacer:
    """Sends frames not earlier than their time.

    send: writes a frame; False when the connection cannot take it. gap: seconds between two frames.
    """

    def __init__(self, clock: IReactorTime, send: Callable[[bytes], bool], gap: float) -> None:
        self._clock = clock
        self._send = send
        self._gap = gap
        self._free_at = 0.0
        self._waiting: deque[tuple[float, bytes, Message]] = deque()
        self._timer: IDelayedCall | None = None

    def send(self, frame: bytes, message: Message, delay: float = 0.0) -> bool | None:
        """Send a frame, now or later. False: the connection is over. None: too many are waiting."""
        now = self._clock.seconds()
        at = max(now + delay, self._free_at)
        if not self._waiting and at <= now:
            self._free_at = now + self._gap
            return self._send(frame)
        if len(self._waiting) >= MAX_WAITING:
            return None
        self._waiting.append((at, frame, message))
        if self._timer is None:
            self._timer = self._clock.callLater(at - now, self._next)
        return True

    def end(self) -> Iterator[Message]:
        """Stop, and give back the messages that were not sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            yield self._waiting.popleft()[2]

    def _next(self) -> None:
        self._timer = None
        _, frame, _ = self._waiting.popleft()
        self._free_at = self._clock.seconds() + self._gap
        # When the connection is over its session learns of it, and ends what waits here.
        self._send(frame)
        if self._waiting:
            at = max(self._waiting[0][0], self._free_at)
            self._timer = self._clock.callLater(at - self._clock.seconds(), self._next)
