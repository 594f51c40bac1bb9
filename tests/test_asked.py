"""CALLs of a charge point that no service has answered: known by id, counted when overdue, bounded."""

from __future__ import annotations

from twisted.internet.task import Clock

from ocppgw.asked import MAX_ASKED, Asked


class Stage:
    def __init__(self) -> None:
        self.clock = Clock()
        self.overdue: list[str] = []
        self.asked = Asked(self.clock, 30.0, self.overdue.append)


def test_the_action_is_known_until_the_answer() -> None:
    stage = Stage()
    stage.asked.add("1", "Heartbeat")
    assert stage.asked.action_of("1") == "Heartbeat"
    stage.asked.answered("1")
    assert stage.asked.action_of("1") is None
    assert len(stage.asked) == 0


def test_each_is_overdue_once_in_its_own_time() -> None:
    stage = Stage()
    stage.asked.add("1", "A")
    stage.clock.advance(10)
    stage.asked.add("2", "B")
    stage.asked.add("3", "C")
    stage.asked.answered("3")
    stage.clock.advance(20)
    assert stage.overdue == ["A"]
    stage.clock.advance(10)
    assert stage.overdue == ["A", "B"]
    stage.clock.advance(100)
    assert stage.overdue == ["A", "B"]
    assert stage.clock.getDelayedCalls() == []


def test_a_repeated_one_counts_from_its_repetition() -> None:
    # OCPP-J, point 39 of the reference: a retry may have the id of the first try.
    stage = Stage()
    stage.asked.add("1", "A")
    stage.clock.advance(20)
    stage.asked.add("1", "A")
    stage.clock.advance(20)
    assert stage.overdue == []
    stage.clock.advance(10)
    assert stage.overdue == ["A"]


def test_no_more_are_remembered_than_a_charge_point_should_ever_have() -> None:
    stage = Stage()
    for number in range(MAX_ASKED + 5):
        stage.asked.add(str(number), "A")
    assert len(stage.asked) == MAX_ASKED
    assert stage.asked.action_of("4") is None
    assert stage.asked.action_of("5") == "A"


def test_the_end_leaves_no_timer() -> None:
    stage = Stage()
    stage.asked.add("1", "A")
    stage.asked.end()
    assert stage.clock.getDelayedCalls() == []
    stage.clock.advance(60)
    assert stage.overdue == []
