"""The CALLs of one charge point that no service has answered yet. No I/O, and never an answer of our own.

What they are good for: the payload of an answer is checked against the action that it answers; an answer that does
not come in time is counted; a charge point that cannot do two things at once is left alone meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

MAX_ASKED = 100
"""CALLs of one charge point that are remembered; it should never have more than one."""


class Asked:
    """Actions by unique id, oldest first.

    timeout: seconds that an answer may take. overdue: is told the action of each CALL that was not answered in time.
    """

    def __init__(self, clock: IReactorTime, timeout: float, overdue: Callable[[str], None]) -> None:
        self._clock = clock
        self._timeout = timeout
        self._overdue = overdue
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()
        # One timer, for the oldest; it is not stopped by an answer, only by the end. So it costs nothing a message.
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, unique_id: str, action: str) -> None:
        """Take note of a CALL. A repeated one counts from now on."""
        self._open.pop(unique_id, None)
        self._open[unique_id] = (action, self._clock.seconds() + self._timeout)
        if len(self._open) > MAX_ASKED:
            self._open.popitem(last=False)
        if self._timer is None:
            self._timer = self._clock.callLater(self._timeout, self._look)

    def action_of(self, unique_id: str) -> str | None:
        """Tell the action of a CALL without an answer."""
        entry = self._open.get(unique_id)
        return None if entry is None else entry[0]

    def answered(self, unique_id: str) -> None:
        """Forget a CALL that has its answer."""
        self._open.pop(unique_id, None)

    def end(self) -> None:
        """Forget all of them: the connection is over."""
        self._open.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        while self._open:
            unique_id, (action, due) = next(iter(self._open.items()))
            if due > now:
                self._timer = self._clock.callLater(due - now, self._look)
                return
            del self._open[unique_id]
            self._overdue(action)
