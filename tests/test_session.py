"""One charge point's session: who may speak when, and that every CALL has exactly one end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from doubles import FakeChargePoint, delivery
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface.verify import verifyObject

from ocppgw import exactjson
from ocppgw.interfaces import ICentralSystem, Properties
from ocppgw.messages import Call, CallError, CallResult, Message, ProtocolFault
from ocppgw.schemas import Schemas
from ocppgw.session import Rules, Session
from ocppgw.settings import Downstream, Upstream

TIMEOUT = 30.0
MESSAGE_SIZE = 4096


class Owner:
    """What a session told its owner. published: (message, action) pairs; reasons: of delivery failures, by id."""

    def __init__(self) -> None:
        self.opened: list[Session] = []
        self.published: list[tuple[Message, str | None]] = []
        self.frames: list[bytes | None] = []
        self.late: list[str] = []
        self.refused: list[tuple[bytes, ProtocolFault]] = []
        self.counters: Counter[str] = Counter()

    def session_opened(self, session: Session) -> None:
        self.opened.append(session)

    def publish(
        self, session: Session, message: Message, action: str | None, frame: bytes | None, late: bool = False
    ) -> None:
        self.published.append((message, action))
        self.frames.append(frame)
        if late:
            self.late.append(message.unique_id)

    def publish_refused(self, session: Session, frame: bytes, fault: ProtocolFault) -> None:
        self.refused.append((frame, fault))

    def count(self, event: str) -> None:
        self.counters[event] += 1

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Delivery failures as (unique id, reason)."""
        return [
            (message.unique_id, message.details["reason"])
            for message, _ in self.published
            if isinstance(message, CallError) and message.details.get("origin") == "gateway"
        ]


class Stage:
    """A session with everything around it in the test's hands."""

    def __init__(
        self, version: str = "ocpp1.6", rules: dict[str, Any] | None = None, upstream: Any = None, **downstream: Any
    ) -> None:
        self.clock = Clock()
        self.charge_point = FakeChargePoint(version)
        self.owner = Owner()
        settings = Downstream(**{"call_timeout": TIMEOUT, **downstream})
        every = Rules(Upstream(**(upstream or {})), settings, MESSAGE_SIZE, **(rules or {}))
        self.session = Session("CP1", "CP1", self.charge_point, self.owner, self.clock, every)

    def command(self, unique_id: str, action: str = "Reset", payload: Any = None) -> None:
        self.session.message_received(delivery([2, unique_id, action, payload or {}]))

    def send(self, *elements: Any) -> None:
        self.session.frame_received(exactjson.dumps(list(elements)))

    @property
    def written(self) -> list[str]:
        """Ids of the CALLs that the charge point got."""
        return [frame[1] for frame in self.charge_point.frames if frame[0] == 2]


def test_a_session_is_a_central_system() -> None:
    assert verifyObject(ICentralSystem, Stage().session)


def test_opening_tells_the_owner() -> None:
    stage = Stage()
    stage.session.opened()
    assert stage.owner.opened == [stage.session]


class TestOneCallAtATime:
    """OCPP-J 1.6 and Part 4, 4.1.1"""

    def test_the_next_call_is_written_when_the_last_was_answered(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        assert stage.charge_point.frames == [[2, "c-1", "Reset", {}]]
        stage.send(3, "c-1", {"status": "Accepted"})
        assert stage.written == ["c-1", "c-2"]

    def test_a_callerror_is_an_answer_too(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.send(4, "c-1", "NotSupported", "", {})
        assert stage.written == ["c-1", "c-2"]

    def test_waiting_calls_keep_their_order(self) -> None:
        stage = Stage()
        ids = [f"c-{number}" for number in range(5)]
        for unique_id in ids:
            stage.command(unique_id)
        for unique_id in ids:
            stage.send(3, unique_id, {})
        assert stage.written == ids

    def test_an_answer_is_published_before_the_next_call_is_written(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.charge_point.takes = False
        stage.send(3, "c-1", {})
        assert [message.unique_id for message, _ in stage.owner.published] == ["c-1", "c-2"]

    def test_an_answer_carries_the_action_of_its_call(self) -> None:
        stage = Stage()
        stage.command("c-1", "GetConfiguration")
        stage.send(3, "c-1", {"configurationKey": []})
        [(answer, action)] = stage.owner.published
        assert (answer.unique_id, action) == ("c-1", "GetConfiguration")
        assert stage.owner.frames == [b'[3,"c-1",{"configurationKey":[]}]']

    def test_without_an_answer_the_next_call_follows_the_timeout(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.clock.advance(TIMEOUT - 0.1)
        assert stage.written == ["c-1"]
        stage.clock.advance(0.1)
        assert stage.written == ["c-1", "c-2"]
        assert stage.owner.failures == [("c-1", "timeout")]

    def test_the_time_of_a_waiting_call_begins_when_it_is_written(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.clock.advance(TIMEOUT)
        stage.clock.advance(TIMEOUT - 0.1)
        assert stage.owner.failures == [("c-1", "timeout")]
        stage.clock.advance(0.1)
        assert stage.owner.failures == [("c-1", "timeout"), ("c-2", "timeout")]

    def test_an_answered_call_does_not_time_out(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.send(3, "c-1", {})
        stage.clock.advance(2 * TIMEOUT)
        assert stage.owner.failures == []
        assert stage.clock.getDelayedCalls() == []

    def test_answers_are_matched_by_id_only(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.send(3, "c-2", {})  # not written yet: whatever this answers, it is not the CALL that waits
        assert stage.written == ["c-1"]
        assert stage.owner.published[0][1] is None
        assert stage.owner.counters["unmatched_answer"] == 1

    def test_an_answer_to_no_call_is_published_all_the_same(self) -> None:
        stage = Stage()
        stage.send(3, "never-sent", {"status": "Accepted"})
        [(answer, action)] = stage.owner.published
        assert (answer.unique_id, action) == ("never-sent", None)
        assert stage.owner.counters["unmatched_answer"] == 1

    def test_a_late_answer_is_published_and_marked_as_late(self) -> None:
        stage = Stage(late_window=600)
        stage.command("c-1")
        stage.clock.advance(TIMEOUT)
        stage.send(3, "c-1", {})
        assert stage.owner.failures == [("c-1", "timeout")]
        assert stage.owner.published[-1] == (CallResult("c-1", {}), "Reset")
        assert stage.owner.late == ["c-1"]
        assert stage.owner.counters["late_answer"] == 1

    def test_a_second_late_answer_matches_no_call(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.clock.advance(TIMEOUT)
        stage.send(3, "c-1", {})
        stage.send(3, "c-1", {})
        assert stage.owner.late == ["c-1"]
        assert stage.owner.counters["unmatched_answer"] == 1

    def test_after_the_late_window_nobody_remembers_the_call(self) -> None:
        stage = Stage(late_window=600)
        stage.command("c-1")
        stage.clock.advance(TIMEOUT)
        stage.clock.advance(600)
        stage.send(3, "c-1", {})
        assert stage.owner.published[-1] == (CallResult("c-1", {}), None)
        assert stage.owner.late == []

    def test_the_same_id_twice_is_two_calls(self) -> None:
        stage = Stage()
        stage.command("c-1", "Reset")
        stage.command("c-1", "ClearCache")
        stage.send(3, "c-1", {})
        stage.send(3, "c-1", {})
        assert [frame[2] for frame in stage.charge_point.frames] == ["Reset", "ClearCache"]
        assert [action for _, action in stage.owner.published] == ["Reset", "ClearCache"]

    def test_both_directions_are_independent(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.send(2, "c-1", "Heartbeat", {})
        assert stage.owner.published[0][0].action == "Heartbeat"
        assert stage.owner.counters == {}
        stage.session.message_received(delivery([3, "c-1", {"currentTime": "2026-11-22T10:00:00Z"}]))
        assert stage.charge_point.frames[-1] == [3, "c-1", {"currentTime": "2026-11-22T10:00:00Z"}]
        stage.send(3, "c-1", {"status": "Accepted"})
        assert stage.owner.published[1][1] == "Reset"

    def test_answers_and_sends_do_not_wait_for_a_turn(self) -> None:
        stage = Stage("ocpp2.1")
        stage.command("c-1")
        stage.session.message_received(delivery([3, "u-1", {}]))
        stage.session.message_received(delivery([4, "u-2", "NotSupported", "", {}]))
        stage.session.message_received(delivery([6, "s-1", "NotifyPeriodicEventStream", {}]))
        assert [frame[1] for frame in stage.charge_point.frames] == ["c-1", "u-1", "u-2", "s-1"]

    def test_a_callresulterror_does_not_end_a_call(self) -> None:
        """2.1, 4.2.5: its id is that of a CALL of the other side."""
        stage = Stage("ocpp2.1")
        stage.command("c-1")
        stage.command("c-2")
        stage.send(5, "c-1", "FormatViolation", "", {})
        assert stage.written == ["c-1"]
        assert stage.owner.counters["unmatched_answer"] == 0
        assert stage.owner.published[0][1] is None


class TestWithoutStrictMode:
    def test_calls_do_not_wait_for_answers(self) -> None:
        stage = Stage(strict_mode=False)
        for unique_id in ("c-1", "c-2", "c-3"):
            stage.command(unique_id)
        assert stage.written == ["c-1", "c-2", "c-3"]
        stage.send(3, "c-2", {})
        stage.clock.advance(TIMEOUT)
        assert stage.owner.failures == [("c-1", "timeout"), ("c-3", "timeout")]

    def test_no_id_is_outstanding_twice(self) -> None:
        stage = Stage(strict_mode=False)
        stage.command("c-1", "Reset")
        stage.command("c-1", "ClearCache")
        assert stage.written == ["c-1"]
        stage.send(3, "c-1", {})
        assert stage.written == ["c-1", "c-1"]

    def test_a_call_does_not_overtake_one_that_waits(self) -> None:
        stage = Stage(strict_mode=False)
        stage.command("c-1")
        stage.command("c-1")
        stage.command("c-2")
        stage.send(3, "c-1", {})
        assert stage.written == ["c-1", "c-1", "c-2"]

    def test_the_number_of_unanswered_calls_is_bounded(self) -> None:
        stage = Stage(strict_mode=False, max_mqueue_len=2)
        for number in range(5):
            stage.command(f"c-{number}")
        assert stage.written == ["c-0", "c-1"]
        assert stage.owner.failures == [("c-4", "queue_full")]


class TestDeliveryFailures:
    def test_a_notice_says_what_became_of_the_call(self) -> None:
        stage = Stage()
        stage.command("c-1", "Reset")
        stage.clock.advance(TIMEOUT)
        assert stage.owner.published == [
            (
                CallError("c-1", "GenericError", "no answer in 30 s", {"origin": "gateway", "reason": "timeout"}),
                "Reset",
            )
        ]
        assert stage.owner.frames == [None]
        assert stage.owner.counters == {"delivery_failure_timeout": 1}

    def test_a_full_queue_refuses_the_newest(self) -> None:
        stage = Stage(max_mqueue_len=2)
        for number in range(4):
            stage.command(f"c-{number}")
        assert stage.owner.failures == [("c-3", "queue_full")]
        stage.send(3, "c-0", {})
        stage.command("c-4")
        assert stage.owner.failures == [("c-3", "queue_full")]

    @pytest.mark.parametrize("reason", ["disconnected", "replaced", "shutting_down"])
    def test_the_end_of_the_connection_ends_written_and_waiting_calls(self, reason: str) -> None:
        stage = Stage()
        for unique_id in ("c-1", "c-2", "c-3"):
            stage.command(unique_id)
        stage.session.closed(reason)
        assert stage.owner.failures == [("c-1", reason), ("c-2", reason), ("c-3", reason)]
        assert stage.written == ["c-1"]
        assert stage.clock.getDelayedCalls() == []

    def test_the_first_reason_for_the_end_stands(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.session.closed("replaced")
        stage.session.closed("disconnected")
        stage.command("c-2")
        assert stage.owner.failures == [("c-1", "replaced"), ("c-2", "replaced")]

    @pytest.mark.parametrize(
        "message",
        [
            [2, "c-1", "Reset", {}],
            [3, "c-1", {}],
            [4, "c-1", "NotSupported", "", {}],
            [5, "c-1", "FormatViolation", "", {}],
            [6, "c-1", "NotifyPeriodicEventStream", {}],
        ],
        ids=["CALL", "CALLRESULT", "CALLERROR", "CALLRESULTERROR", "SEND"],
    )
    @pytest.mark.parametrize("ended", [True, False])
    def test_what_cannot_be_written_any_more_fails(self, message: list[Any], ended: bool) -> None:
        stage = Stage("ocpp2.1")
        if ended:
            stage.session.closed("shutting_down")
        else:
            stage.charge_point.takes = False
        stage.session.message_received(delivery(message))
        assert stage.owner.failures == [("c-1", "shutting_down" if ended else "disconnected")]
        assert stage.charge_point.frames == []
        assert stage.clock.getDelayedCalls() == []

    def test_a_send_that_fails_is_named_by_its_action(self) -> None:
        stage = Stage("ocpp2.1")
        stage.charge_point.takes = False
        stage.session.message_received(delivery([6, "s-1", "NotifyPeriodicEventStream", {}]))
        assert stage.owner.published[0][1] == "NotifyPeriodicEventStream"

    @pytest.mark.parametrize("kind", [2, 3])
    def test_a_frame_over_the_limit_is_not_written(self, kind: int) -> None:
        stage = Stage()
        payload = {"data": "x" * MESSAGE_SIZE}
        stage.session.message_received(
            delivery([2, "c-1", "DataTransfer", payload] if kind == 2 else [3, "c-1", payload])
        )
        assert stage.owner.failures == [("c-1", "too_large")]
        assert stage.charge_point.frames == []

    def test_a_frame_at_the_limit_is_written(self) -> None:
        stage = Stage()
        overhead = len('[3,"u-1",{"data":""}]')
        stage.session.message_received(delivery([3, "u-1", {"data": "x" * (MESSAGE_SIZE - overhead)}]))
        assert stage.owner.failures == []
        assert len(stage.charge_point.frames) == 1

    def test_a_waiting_call_that_is_too_large_lets_the_next_one_pass(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2", "DataTransfer", {"data": "x" * MESSAGE_SIZE})
        stage.command("c-3")
        stage.send(3, "c-1", {})
        assert stage.written == ["c-1", "c-3"]
        assert stage.owner.failures == [("c-2", "too_large")]

    @pytest.mark.parametrize(
        ("message", "action"),
        [
            ([2, "c-1", "Reset"], "Reset"),
            ([2, "c-1", 7, {}], None),
            ([2, "c" * 37, "Reset", {}], "Reset"),
            ([6, "c-1", "NotifyPeriodicEventStream", {}], None),  # SEND is 2.1's
            ([9, "c-1", "Reset", {}], None),
            ({"MessageTypeId": 2, "UniqueId": "c-1", "Action": "Reset"}, "Reset"),
            ({"MessageTypeId": 9, "UniqueId": "c-1"}, None),
            ([3, "c-1"], None),
            ([4, "c-1", 5], None),
        ],
    )
    def test_what_is_not_ocpp_j_fails_with_the_parsers_words(self, message: Any, action: str | None) -> None:
        stage = Stage()
        stage.session.message_received(delivery(message))
        [(notice, named)] = stage.owner.published
        assert notice.details == {"origin": "gateway", "reason": "invalid"}
        assert notice.description
        assert named == action
        assert stage.charge_point.frames == []

    @pytest.mark.parametrize("payload", [b"", b"not JSON", b"7", b"[]", b"{}", b"[2]", b'[2,7,"Reset",{}]', b"\xff"])
    def test_a_message_without_an_id_is_counted_and_logged(self, payload: bytes) -> None:
        stage = Stage()
        with capturedLogs() as events:
            stage.session.message_received(delivery(payload, topic="ocpp/cs/CP1/Request/1"))
        assert stage.owner.published == []
        assert stage.owner.counters == {"invalid_envelope": 1}
        [event] = [event for event in events if event["log_level"].name == "warn"]
        assert event["topic"] == "ocpp/cs/CP1/Request/1"


class TestBadFrames:
    # OCPP-J 1.6, 4.1.3 and 4.2.3; Part 4 of 2.0.1, 4.2.3, 4.3 and 4.4; of 2.1, 4.4
    @pytest.mark.parametrize(
        ("frame", "v16", "v201", "v21"),
        [
            (b"not JSON", None, ("-1", "RpcFrameworkError"), ("-1", "RpcFrameworkError")),
            (b"{}", None, ("-1", "RpcFrameworkError"), ("-1", "RpcFrameworkError")),
            (b"[]", None, ("-1", "RpcFrameworkError"), ("-1", "RpcFrameworkError")),
            (b'[2,7,"Heartbeat",{}]', None, ("-1", "RpcFrameworkError"), ("-1", "RpcFrameworkError")),
            (b'[2,"u-1","Heartbeat"]', ("u-1", "FormationViolation"), ("u-1", "RpcFrameworkError"), None),
            (b'[2,"u-1",7,{}]', ("u-1", "FormationViolation"), ("u-1", "RpcFrameworkError"), None),
            (b'[9,"u-1","Heartbeat",{}]', None, ("u-1", "MessageTypeNotSupported"), None),
            (b'[3,"u-1"]', None, None, None),
            (b"[3,7,{}]", None, None, None),
            (b'[4,"u-1"]', None, None, None),
        ],
    )
    @pytest.mark.parametrize("version", ["ocpp1.6", "ocpp2.0.1", "ocpp2.1"])
    def test_each_version_has_its_answer(self, version: str, frame: bytes, v16: Any, v201: Any, v21: Any) -> None:
        if frame.startswith(b'[2,"'):
            v21 = v201
        expected = {"ocpp1.6": v16, "ocpp2.0.1": v201, "ocpp2.1": v21}[version]
        stage = Stage(version)
        stage.session.frame_received(frame)
        answers = [(answer[1], answer[2]) for answer in stage.charge_point.frames]
        assert answers == ([] if expected is None else [expected])
        assert all(answer[0] == 4 and answer[4] == {} for answer in stage.charge_point.frames)

    @pytest.mark.parametrize("frame", [b"\xff", b"[2]", b'[6,"s-1","Bad"]', b'[5,"u-1"]'])
    def test_a_bad_frame_is_reported_and_not_published(self, frame: bytes) -> None:
        stage = Stage("ocpp2.1")
        stage.session.frame_received(frame)
        assert stage.owner.published == []
        assert [refused for refused, _ in stage.owner.refused] == [frame]
        assert stage.owner.counters == {"invalid_frame": 1}

    def test_a_bad_send_is_never_answered(self) -> None:
        """Part 4 of 2.1, 4.2.4"""
        stage = Stage("ocpp2.1")
        for frame in (b'[6,"s-1","NotifyPeriodicEventStream"]', b'[6,7,"NotifyPeriodicEventStream",{}]'):
            stage.session.frame_received(frame)
        assert stage.charge_point.frames == []

    def test_an_id_over_36_characters_is_answered_as_it_came(self) -> None:
        """OCPP-J 1.6, 4.1.4"""
        stage = Stage()
        stage.send(2, "u" * 37, "Heartbeat", {})
        assert stage.charge_point.frames[0][:3] == [4, "u" * 37, "FormationViolation"]

    def test_no_answer_is_larger_than_a_frame_may_be(self) -> None:
        stage = Stage()
        frame = exactjson.dumps([2, "u" * (MESSAGE_SIZE - 30), "Heartbeat", {}])
        assert len(frame) <= MESSAGE_SIZE
        stage.session.frame_received(frame)
        assert all(len(exactjson.dumps(answer)) <= MESSAGE_SIZE for answer in stage.charge_point.frames)
        assert stage.owner.counters["invalid_frame"] == 1

    def test_a_bad_frame_does_not_take_an_answers_place(self) -> None:
        stage = Stage()
        stage.command("c-1")
        stage.command("c-2")
        stage.session.frame_received(b'[3,"c-1"]')
        assert stage.written == ["c-1"]
        stage.send(3, "c-1", {})
        assert stage.written == ["c-1", "c-2"]

    def test_a_flood_is_counted_and_logged_once_a_minute(self) -> None:
        stage = Stage()

        def flood() -> list[str]:
            with capturedLogs() as events:
                for _ in range(1000):
                    stage.session.frame_received(b"nonsense")
            return [event["log_format"].format(**event) for event in events if event["log_level"].name == "warn"]

        assert flood() == ["charge point CP1 sent a bad frame (1 so far): not JSON"]
        stage.clock.advance(59)
        assert flood() == []
        stage.clock.advance(1)
        assert flood() == ["charge point CP1 sent a bad frame (2001 so far): not JSON"]
        assert stage.owner.counters["invalid_frame"] == 3000


class Conversation(RuleBasedStateMachine):
    """Any interleaving of what can happen to a session.

    The books are kept from what can be seen alone: given, written and ended CALLs by id. Ids repeat on purpose.
    """

    strict = True
    ids = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(strict_mode=self.strict, max_mqueue_len=3)
        self.given: Counter[str] = Counter()
        self.end: str | None = None

    @rule(unique_id=ids)
    def a_service_calls(self, unique_id: str) -> None:
        self.given[unique_id] += 1
        self.stage.command(unique_id)

    @rule(unique_id=ids)
    def a_service_sends_a_call_that_is_too_large(self, unique_id: str) -> None:
        self.given[unique_id] += 1
        self.stage.command(unique_id, "DataTransfer", {"data": "x" * MESSAGE_SIZE})

    @precondition(lambda self: self.outstanding())
    @rule(data=st.data())
    def it_answers(self, data: st.DataObject) -> None:
        unique_id = data.draw(st.sampled_from(sorted(self.outstanding())))
        before = len(self.stage.owner.published)
        self.stage.send(3, unique_id, {})
        answer, action = self.stage.owner.published[before]
        assert (answer, action is not None) == (CallResult(unique_id, {}), True)

    @rule(unique_id=st.one_of(ids, st.just("never sent")))
    def it_answers_whatever(self, unique_id: str) -> None:
        self.stage.send(4, unique_id, "GenericError", "", {})

    @rule(unique_id=ids)
    def it_calls(self, unique_id: str) -> None:
        self.stage.send(2, unique_id, "Heartbeat", {})

    @rule()
    def it_sends_rubbish(self) -> None:
        self.stage.session.frame_received(b"[3,")

    @rule(seconds=st.sampled_from([1.0, TIMEOUT / 2, TIMEOUT]))
    def time_passes(self, seconds: float) -> None:
        self.stage.clock.advance(seconds)

    @rule(takes=st.booleans())
    def the_socket_takes_frames_or_not(self, takes: bool) -> None:
        self.stage.charge_point.takes = takes

    @rule(reason=st.sampled_from(["disconnected", "replaced", "shutting_down"]))
    def the_connection_ends(self, reason: str) -> None:
        self.end = self.end or reason
        self.stage.session.closed(reason)

    def ended(self) -> Counter[str]:
        """Published answers that name their CALL, and delivery failures; a late answer is no end, but extra."""
        named = Counter(
            message.unique_id
            for message, action in self.stage.owner.published
            if action is not None and message.kind in (3, 4)
        )
        return named - Counter(self.stage.owner.late)

    def outstanding(self) -> Counter[str]:
        """Written CALLs without an end; a failure before the write says so by its reason."""
        unwritten = Counter(
            message.unique_id
            for message, _ in self.stage.owner.published
            if isinstance(message, CallError)
            and (
                message.details.get("reason") in ("queue_full", "too_large")
                or message.description in ("the connection ended before it was sent", "the connection has ended")
            )
        )
        return Counter(self.stage.written) - (self.ended() - unwritten)

    @invariant()
    def no_more_are_outstanding_than_may_be(self) -> None:
        outstanding = self.outstanding()
        if self.strict:
            assert outstanding.total() <= 1
        else:
            assert outstanding.total() <= 3
            assert max(outstanding.values(), default=0) <= 1

    @invariant()
    def no_call_has_two_ends(self) -> None:
        assert self.ended() <= self.given

    @invariant()
    def no_call_is_lost(self) -> None:
        unended = (self.given - self.ended()).total()
        if self.end is not None:
            assert unended == 0
        else:
            assert unended <= self.outstanding().total() + 3
            # Nobody waits while nobody is served.
            assert unended == 0 or self.outstanding()

    def teardown(self) -> None:
        self.the_connection_ends("disconnected")
        assert self.ended() == self.given
        assert self.stage.clock.getDelayedCalls() == []


class UnstrictConversation(Conversation):
    strict = False


LIMITS = hypothesis_settings(max_examples=100, stateful_step_count=30, deadline=None)
TestConversation = Conversation.TestCase
TestConversation.settings = LIMITS
TestUnstrictConversation = UnstrictConversation.TestCase
TestUnstrictConversation.settings = LIMITS


class TestExpiry:
    """MQTT 5, 3.3.2.3.3: a message that has waited longer than its publisher wanted is worth nothing."""

    def command(self, stage: Stage, unique_id: str, expiry: int) -> None:
        message = delivery([2, unique_id, "Reset", {}], properties=Properties(expiry=expiry))
        stage.session.message_received(message)

    def test_a_call_that_waits_too_long_fails(self) -> None:
        stage = Stage()
        stage.command("c-1")
        self.command(stage, "c-2", 5)
        stage.clock.advance(5)
        assert stage.owner.failures == [("c-2", "expired")]
        stage.send(3, "c-1", {})
        assert stage.written == ["c-1"]

    def test_once_written_only_the_call_timeout_counts(self) -> None:
        stage = Stage()
        self.command(stage, "c-1", 5)
        stage.clock.advance(TIMEOUT - 1)
        assert stage.owner.failures == []
        stage.clock.advance(1)
        assert stage.owner.failures == [("c-1", "timeout")]

    def test_what_was_written_in_time_does_not_expire(self) -> None:
        stage = Stage()
        stage.command("c-1")
        self.command(stage, "c-2", 5)
        stage.send(3, "c-1", {})
        stage.clock.advance(6)
        assert stage.written == ["c-1", "c-2"]
        assert stage.owner.failures == []


class TestRetries:
    def test_an_unanswered_call_is_written_again_with_the_same_id(self) -> None:
        stage = Stage(retries=2, retry_interval=10)
        stage.command("c-1")
        stage.command("c-2")
        stage.clock.advance(10)
        stage.clock.advance(10)
        assert stage.written == ["c-1", "c-1", "c-1"]
        stage.clock.advance(TIMEOUT)
        assert stage.owner.failures == [("c-1", "timeout")]
        assert stage.written == ["c-1", "c-1", "c-1", "c-2"]

    def test_an_answer_ends_the_retries(self) -> None:
        stage = Stage(retries=2, retry_interval=10)
        stage.command("c-1")
        stage.clock.advance(10)
        stage.send(3, "c-1", {})
        stage.clock.advance(100)
        assert stage.written == ["c-1", "c-1"]
        assert stage.owner.failures == []

    def test_a_retry_that_cannot_be_written_ends_the_call(self) -> None:
        stage = Stage(retries=1, retry_interval=10)
        stage.command("c-1")
        stage.charge_point.takes = False
        stage.clock.advance(10)
        assert stage.owner.failures == [("c-1", "disconnected")]


class TestServicesThatAreLate:
    def test_an_overdue_answer_is_counted_and_never_invented(self) -> None:
        stage = Stage(upstream={"awaiting_timeout": 20.0, "log_overdue": True})
        stage.send(2, "1", "Heartbeat", {})
        stage.clock.advance(10)
        stage.send(2, "2", "Authorize", {"idTag": "a"})
        with capturedLogs() as events:
            stage.clock.advance(10)
            assert stage.owner.counters["overdue_answer"] == 1
            stage.clock.advance(10)
        assert stage.owner.counters["overdue_answer"] == 2
        assert [event["action"] for event in events] == ["Heartbeat", "Authorize"]
        assert stage.charge_point.frames == []

    def test_an_answer_in_time_counts_nothing(self) -> None:
        stage = Stage(upstream={"awaiting_timeout": 20.0})
        stage.send(2, "1", "Heartbeat", {})
        stage.session.message_received(delivery([3, "1", {}]))
        stage.clock.advance(100)
        assert stage.owner.counters["overdue_answer"] == 0

    def test_the_end_of_the_connection_forgets_what_was_asked(self) -> None:
        stage = Stage()
        stage.send(2, "1", "Heartbeat", {})
        stage.session.closed("disconnected")
        assert stage.clock.getDelayedCalls() == []


SCHEMAS = Schemas.load()
BOOT = {"chargePointVendor": "v", "chargePointModel": "m"}


class TestChecking:
    def stage(self, version: str = "ocpp1.6", reject: bool = True) -> Stage:
        return Stage(version, rules={"schemas_up": SCHEMAS, "schemas_down": SCHEMAS, "reject": reject})

    def test_a_good_payload_passes(self) -> None:
        stage = self.stage()
        stage.send(2, "1", "BootNotification", BOOT)
        assert stage.owner.published == [(Call("1", "BootNotification", BOOT), None)]
        assert stage.charge_point.frames == []

    def test_a_bad_one_is_answered_reported_and_not_passed_on(self) -> None:
        stage = self.stage()
        stage.send(2, "1", "BootNotification", {"chargePointVendor": "v"})
        reason = '"chargePointModel" is a required property'
        assert stage.charge_point.frames == [[4, "1", "OccurenceConstraintViolation", reason, {}]]
        assert [fault.reason for _, fault in stage.owner.refused] == [reason]
        assert stage.owner.published == []
        assert stage.owner.counters["invalid_payload"] == 1

    def test_with_warn_it_is_reported_and_passed_on(self) -> None:
        stage = self.stage(reject=False)
        stage.send(2, "1", "BootNotification", {"chargePointVendor": "v"})
        assert stage.charge_point.frames == []
        assert len(stage.owner.refused) == 1
        assert len(stage.owner.published) == 1

    def test_a_bad_answer_of_the_charge_point_ends_the_call_as_invalid(self) -> None:
        # A CALLRESULT is never answered, but its CALL must have an end.
        stage = self.stage()
        stage.command("c-1", "Reset", {"type": "Soft"})
        stage.send(3, "c-1", {"status": "Perhaps"})
        assert stage.owner.failures == [("c-1", "invalid")]
        assert [frame[0] for frame in stage.charge_point.frames] == [2]

    def test_an_answer_that_matches_no_call_cannot_be_checked(self) -> None:
        stage = self.stage()
        stage.send(3, "c-9", {"status": "Perhaps"})
        assert stage.owner.published == [(CallResult("c-9", {"status": "Perhaps"}), None)]

    def test_a_bad_command_fails_as_invalid(self) -> None:
        stage = self.stage()
        stage.command("c-1", "Reset", {"type": "Maybe"})
        assert stage.owner.failures == [("c-1", "invalid")]
        assert stage.charge_point.frames == []

    def test_a_services_answer_is_checked_against_what_was_asked(self) -> None:
        stage = self.stage()
        stage.send(2, "1", "Heartbeat", {})
        stage.session.message_received(delivery([3, "1", {"currentTime": 5}]))
        assert stage.owner.failures == [("1", "invalid")]
        stage.session.message_received(delivery([3, "1", {"currentTime": "2026-11-22T10:00:00Z"}]))
        assert stage.charge_point.frames == [[3, "1", {"currentTime": "2026-11-22T10:00:00Z"}]]

    def test_a_bad_send_is_never_answered(self) -> None:
        # OCPP-J 2.1, 4.2.4
        stage = self.stage("ocpp2.1")
        stage.send(6, "1", "NotifyPeriodicEventStream", {})
        assert stage.charge_point.frames == []
        assert stage.owner.published == []
        assert len(stage.owner.refused) == 1


class TestQuirks:
    def test_half_duplex_writes_no_call_while_the_charge_point_waits(self) -> None:
        # Reference: Q14
        stage = Stage(half_duplex=True)
        stage.send(2, "1", "Heartbeat", {})
        stage.command("c-1")
        assert stage.written == []
        stage.session.message_received(delivery([3, "1", {}]))
        assert [frame[:2] for frame in stage.charge_point.frames] == [[3, "1"], [2, "c-1"]]

    def test_half_duplex_does_not_wait_for_ever(self) -> None:
        stage = Stage(half_duplex=True, upstream={"awaiting_timeout": 20.0})
        stage.send(2, "1", "Heartbeat", {})
        stage.command("c-1")
        stage.clock.advance(20)
        assert stage.written == ["c-1"]

    def test_calls_are_held_until_the_boot_is_answered(self) -> None:
        # Reference: Q10
        stage = Stage(hold_until_boot=60)
        stage.session.opened()
        stage.command("c-1")
        stage.send(2, "1", "Heartbeat", {})
        stage.session.message_received(delivery([3, "1", {}]))
        assert stage.written == []
        stage.send(2, "2", "BootNotification", {})
        stage.session.message_received(delivery([3, "2", {"status": "Accepted"}]))
        assert stage.written == ["c-1"]

    def test_a_charge_point_that_never_boots_gets_them_all_the_same(self) -> None:
        # Reference: Q11
        stage = Stage(hold_until_boot=60)
        stage.session.opened()
        stage.command("c-1")
        stage.clock.advance(60)
        assert stage.written == ["c-1"]

    def test_a_hold_ends_with_the_connection(self) -> None:
        stage = Stage(hold_until_boot=60)
        stage.session.opened()
        stage.command("c-1")
        stage.session.closed("disconnected")
        assert stage.owner.failures == [("c-1", "disconnected")]
        assert stage.clock.getDelayedCalls() == []

    def test_answers_are_held_back_for_a_moment(self) -> None:
        # Reference: Q13
        stage = Stage(reply_delay=1)
        stage.send(2, "1", "StartTransaction", {})
        stage.session.message_received(delivery([3, "1", {}]))
        assert stage.charge_point.frames == []
        stage.clock.advance(1)
        assert stage.charge_point.frames == [[3, "1", {}]]

    def test_an_answer_that_was_never_sent_fails_with_a_notice(self) -> None:
        stage = Stage(reply_delay=1)
        stage.send(2, "1", "StartTransaction", {})
        stage.session.message_received(delivery([3, "1", {}]))
        stage.session.closed("disconnected")
        assert stage.owner.failures == [("1", "disconnected")]

    def test_frames_that_come_faster_than_they_may_go_are_refused_at_last(self) -> None:
        # Reference: Q12
        stage = Stage(min_gap=1)
        for number in range(102):
            stage.session.message_received(delivery([3, f"{number}", {}]))
        assert stage.owner.failures == [("101", "queue_full")]


def test_a_smaller_frame_may_be_asked_for() -> None:
    # Reference: Q22
    stage = Stage()
    stage.command("c-1", "DataTransfer", {"data": "x" * MESSAGE_SIZE})
    assert stage.owner.failures == [("c-1", "too_large")]
