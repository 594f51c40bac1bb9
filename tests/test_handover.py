"""What the two threads share: queues in order, numbers, one wake-up for many things."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from ocppgw.handover import Acknowledge, Handover, Subscribe, Unsubscribe
from ocppgw.interfaces import Delivery, Publication


@pytest.fixture
def queue() -> Iterator[Handover]:
    handover = Handover()
    yield handover
    handover.close()


def readable(queue: Handover) -> bool:
    return bool(select.select([queue], [], [], 0)[0])


def publication(number: int, size: int = 1) -> Publication:
    return Publication(f"t/{number}", b"x" * size)


def test_publications_and_commands_keep_their_order(queue: Handover) -> None:
    publications = [publication(number) for number in range(3)]
    commands = [Subscribe("a", 1), Unsubscribe("a"), Subscribe("b", 0)]
    for one, other in zip(publications, commands, strict=True):
        queue.publish(one)
        queue.command(other)
    assert list(queue.publications) == publications
    assert list(queue.commands) == commands


def test_what_is_put_back_comes_first(queue: Handover) -> None:
    for number in range(4):
        queue.publish(publication(number))
    taken = [queue.publications.popleft() for _ in range(2)]
    queue.put_back(taken)
    assert [one.topic for one in queue.publications] == ["t/0", "t/1", "t/2", "t/3"]


def test_many_wake_ups_are_one(queue: Handover) -> None:
    assert not readable(queue)
    for _ in range(100_000):
        queue.wake()
    assert readable(queue)
    queue.woken()
    assert not readable(queue)
    queue.wake()
    assert readable(queue)


def test_pending_counts_until_a_publication_is_finished(queue: Handover) -> None:
    one, other = publication(1, 10), publication(2, 5)
    queue.publish(one)
    queue.publish(other)
    queue.publications.popleft()
    assert (queue.pending, queue.pending_bytes) == (2, 15)
    queue.finished(one)
    assert (queue.pending, queue.pending_bytes) == (1, 5)


@pytest.mark.parametrize(("low_water", "sizes"), [((1, 1000), [1, 1, 1]), ((100, 5), [10, 10, 5])])
def test_the_low_water_mark_is_told_once(queue: Handover, low_water: tuple[int, int], sizes: list[int]) -> None:
    publications = [publication(number, size) for number, size in enumerate(sizes)]
    for one in publications:
        queue.publish(one)
    queue.low_water = low_water
    assert [queue.finished(one) for one in publications] == [False, True, False]


def test_deliveries_count_until_they_are_acknowledged(queue: Handover) -> None:
    queue.delivered(3)
    queue.command(Acknowledge((Delivery("a", b""), Delivery("b", b""))))
    assert queue.unacknowledged == 1


def test_nothing_wakes_a_closed_one() -> None:
    queue = Handover()
    queue.close()
    queue.wake()
