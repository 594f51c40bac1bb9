"""What the reactor's thread and the MQTT client's thread share: two queues, a few numbers and a way to wake up.

The reactor puts publications and control commands in; they cost one wake-up a turn, however many they are. The other
thread takes them out. Only immutable values cross. Each number has one writer, so that no lock is needed: deque's
append and popleft are atomic.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ocppgw.interfaces import Delivery, Publication


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Control: add a filter."""

    topic_filter: str
    qos: int


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Control: take a filter away."""

    topic_filter: str


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Control: PUBACK for deliveries, in their order."""

    deliveries: tuple[Delivery, ...]


Command = Subscribe | Unsubscribe | Acknowledge


class Handover:
    """The two queues from the reactor to the MQTT client.

    commands, publications: to be taken out by the MQTT client's thread.
    low_water: publications and bytes; when no more are pending, ``finished`` says so once. None: it says nothing.
    """

    def __init__(self) -> None:
        self.commands: deque[Command] = deque()
        self.publications: deque[Publication] = deque()
        self.low_water: tuple[int, int] | None = None
        self._accepted = self._accepted_bytes = self._taken = 0
        self._finished = self._finished_bytes = self._delivered = 0
        self._woken = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @property
    def pending(self) -> int:
        """Publications that the broker has not acknowledged."""
        return self._accepted - self._finished

    @property
    def pending_bytes(self) -> int:
        """Bytes of their payloads."""
        return self._accepted_bytes - self._finished_bytes

    def is_low(self) -> bool:
        """Whether no more is pending than low_water says."""
        low = self.low_water
        return low is not None and self.pending <= low[0] and self.pending_bytes <= low[1]

    # The reactor's side

    def publish(self, publication: Publication) -> None:
        """Queue a publication; wake() sends it on its way."""
        self._accepted += 1
        self._accepted_bytes += len(publication.payload)
        self.publications.append(publication)

    def command(self, command: Command) -> None:
        """Queue a command; wake() sends it on its way."""
        if isinstance(command, Acknowledge):
            self._taken += len(command.deliveries)
        self.commands.append(command)

    def wake(self) -> None:
        """Have the other thread look at the queues."""
        if not self._woken:
            self._woken = True
            self._writer.send(b"\0")

    def close(self) -> None:
        """Give the sockets back; the other thread has ended, nothing wakes it any more."""
        self._woken = True
        self._reader.close()
        self._writer.close()

    # The MQTT client's side

    def fileno(self) -> int:
        """Tell what becomes readable with a wake-up."""
        return self._reader.fileno()

    def woken(self) -> None:
        """Take note of a wake-up, before the queues are looked at."""
        self._reader.recv(4096)
        self._woken = False

    def put_back(self, publications: Iterable[Publication]) -> None:
        """Queue publications again, in their order, before all others."""
        self.publications.extendleft(reversed(list(publications)))

    def finished(self, publication: Publication) -> bool:
        """Count a publication out; whether the low-water mark was reached with it."""
        self._finished += 1
        self._finished_bytes += len(publication.payload)
        if self.is_low():
            self.low_water = None
            return True
        return False

    def delivered(self, count: int) -> None:
        """Count deliveries that are on their way to the reactor."""
        self._delivered += count

    @property
    def unacknowledged(self) -> int:
        """Deliveries that the reactor has not acknowledged yet."""
        return self._delivered - self._taken
