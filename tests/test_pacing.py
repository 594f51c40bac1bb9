"""Frames that keep their distance: least gap, delayed answers, order, bound."""

from __future__ import annotations

from twisted.internet.task import Clock

from ocppgw.messages import CallResult
from ocppgw.pacing import MAX_WAITING, Pacer


class Stage:
    def __init__(self, gap: float) -> None:
        self.clock = Clock()
        self.sent: list[tuple[float, bytes]] = []
        self.pacer = Pacer(self.clock, self.take, gap)

    def take(self, frame: bytes) -> bool:
        self.sent.append((self.clock.seconds(), frame))
        return True

    def send(self, frame: bytes, delay: float = 0.0) -> bool | None:
        return self.pacer.send(frame, CallResult(frame.decode(), {}), delay)


def test_without_a_gap_everything_goes_out_at_once() -> None:
    stage = Stage(0)
    for frame in (b"1", b"2"):
        assert stage.send(frame) is True
    assert stage.sent == [(0, b"1"), (0, b"2")]
    assert stage.clock.getDelayedCalls() == []


def test_frames_keep_the_gap_and_their_order() -> None:
    stage = Stage(2)
    for frame in (b"1", b"2", b"3"):
        stage.send(frame)
    for _ in range(6):
        stage.clock.advance(1)
    assert stage.sent == [(0, b"1"), (2, b"2"), (4, b"3")]
    stage.send(b"4")
    assert stage.sent[-1] == (6, b"4")


def test_a_delayed_answer_is_not_overtaken() -> None:
    stage = Stage(0)
    stage.send(b"answer", delay=1.5)
    stage.send(b"call")
    assert stage.sent == []
    stage.clock.advance(1.5)
    stage.clock.advance(0)
    assert stage.sent == [(1.5, b"answer"), (1.5, b"call")]


def test_what_waits_is_bounded() -> None:
    stage = Stage(1)
    told = [stage.send(b"x") for _ in range(MAX_WAITING + 2)]
    assert told == [True] * (MAX_WAITING + 1) + [None]


def test_the_end_gives_back_what_was_not_sent() -> None:
    stage = Stage(1)
    for frame in (b"1", b"2", b"3"):
        stage.send(frame)
    assert [message.unique_id for message in stage.pacer.end()] == ["2", "3"]
    assert stage.clock.getDelayedCalls() == []
