"""The broker as the reactor sees it: its queue, its log lines, its stop. The thread is real where it has a part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from doubles import (
    DISCONNECT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Conversation,
    FakeBrokerClient,
    HandCrankedReactor,
    ScriptedBroker,
)
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import capturedLogs
from zope.interface.verify import verifyObject

from ocppgw.broker import LOG_INTERVAL, STOP_GRACE, Broker
from ocppgw.interfaces import IBroker, Publication, SubscriptionRefused
from ocppgw.settings import BrokerAddress, Mqtt, Upstream

DRAIN_SECONDS = 10.0
LIMITS = Upstream(max_queue=100, max_queue_bytes=65536)
UP = "ocpp/cp/CP1/Heartbeat"
FILTER = "ocpp/cs/CP1/+/+"


class Stage:
    """A broker with a reactor that the test cranks."""

    def __init__(self, port: int = 1, **settings: Any) -> None:
        self.reactor = HandCrankedReactor()
        self.client = FakeBrokerClient()
        address = BrokerAddress("tcp", "127.0.0.1", port)
        name = "mqtt://broker"
        mqtt = Mqtt(**settings)
        self.broker = Broker(mqtt, address, name, "ocppgw-gw-1", LIMITS, DRAIN_SECONDS, self.reactor)
        self.broker.client = self.client

    def publish(self, count: int, payload: bytes = b"{}") -> None:
        for _ in range(count):
            self.broker.publish(Publication(UP, payload))

    def start(self, scripted: ScriptedBroker) -> Conversation:
        """Start it and let it connect."""
        self.broker.startService()
        conversation = scripted.accept()
        conversation.connack()
        self.reactor.crank(lambda: self.broker.away_since is None)
        return conversation

    def stop(self) -> list[None]:
        """Stop it; what is given back has something in it when it has stopped."""
        stopped: list[None] = []
        self.broker.stopService().addCallback(stopped.append)
        return stopped

    def wait_for_end(self, stopped: list[None]) -> None:
        self.reactor.crank(lambda: bool(stopped))


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as scripted:
        yield scripted


@pytest.fixture
def running(scripted: ScriptedBroker) -> Iterator[Stage]:
    """A stage whose thread ends with the test."""
    stage = Stage(scripted.port)
    yield stage
    stage.wait_for_end(stage.stop())


@pytest.fixture
def still() -> Iterator[Stage]:
    """A stage whose thread never runs: the test says what it would have told."""
    stage = Stage()
    yield stage
    stage.broker.link_ended()


def result(deferred: Deferred[Any]) -> list[Any]:
    """What a Deferred has fired with, if it has; failures as their exceptions."""
    results: list[Any] = []
    deferred.addErrback(lambda failure: failure.value).addCallback(results.append)
    return results


def lines(events: list[Any], level: str = "error") -> list[str]:
    return [event["log_format"].format(**event) for event in events if event["log_level"].name == level]


def test_it_is_a_broker(still: Stage) -> None:
    assert verifyObject(IBroker, still.broker)


class TestQueue:
    @pytest.mark.parametrize(("count", "payload"), [(100, b""), (2, b"x" * 32768)], ids=["messages", "bytes"])
    def test_a_full_queue_is_told_once(self, still: Stage, count: int, payload: bytes) -> None:
        still.publish(count - 1, payload)
        assert still.client.told == []
        still.publish(5, payload)
        assert still.client.told == ["congested"]

    def test_room_again_is_told_when_half_of_it_is_sent(self, scripted: ScriptedBroker, running: Stage) -> None:
        running.publish(120)
        with running.start(scripted) as conversation:
            assert running.client.told == ["congested", "connected"]
            packets = [conversation.expect(PUBLISH) for _ in range(120)]
            for packet in packets[:69]:
                conversation.puback(packet)
            running.broker.subscribe("probe", 1)
            running.reactor.advance(0)
            conversation.suback(conversation.expect(SUBSCRIBE))
            running.reactor.crank(lambda: not running.reactor.getDelayedCalls())
            assert running.client.told == ["congested", "connected"]
            conversation.puback(packets[69])
            running.reactor.crank(lambda: running.client.told[-1] == "relieved")
            running.publish(60)
            assert running.client.told[2:] == ["relieved", "congested"]

    def test_a_queue_that_is_empty_before_anybody_looks_is_relieved(
        self, scripted: ScriptedBroker, running: Stage
    ) -> None:
        with running.start(scripted) as conversation:
            client = running.client

            def all_is_sent_at_once() -> None:
                running.reactor.advance(0)
                for _ in range(LIMITS.max_queue):
                    conversation.puback(conversation.expect(PUBLISH))
                conversation.deliver("a/b", b"")
                running.reactor.crank(lambda: bool(client.received))

            client.when_congested = all_is_sent_at_once
            running.publish(LIMITS.max_queue)
            running.reactor.crank(lambda: client.told[-1] == "relieved")
            running.publish(1)
            running.reactor.advance(0)
            conversation.puback(conversation.expect(PUBLISH))
            client.received.clear()
            conversation.deliver("a/b", b"")
            running.reactor.crank(lambda: bool(client.received))
            assert client.told == ["connected", "congested", "relieved"]

    def test_what_a_turn_of_the_reactor_has_goes_out_in_order(self, scripted: ScriptedBroker, running: Stage) -> None:
        with running.start(scripted) as conversation:
            running.publish(1, b"1")
            running.broker.subscribe(FILTER, 1)
            running.broker.unsubscribe(FILTER)
            running.publish(1, b"2")
            running.reactor.advance(0)
            packets = [conversation.read() for _ in range(4)]
            assert [packet.kind for packet in packets if packet is not None] == [
                SUBSCRIBE,
                UNSUBSCRIBE,
                PUBLISH,
                PUBLISH,
            ]

    def test_messages_reach_the_client_and_are_acknowledged(self, scripted: ScriptedBroker, running: Stage) -> None:
        with running.start(scripted) as conversation:
            conversation.deliver("ocpp/cs/CP1/a/b", b"1", 1)
            conversation.deliver("ocpp/cs/CP1/a/b", b"2", 2)
            running.reactor.crank(lambda: len(running.client.received) == 2)
            assert [delivery.payload for delivery in running.client.received] == [b"1", b"2"]
            running.broker.acknowledge(running.client.received)
            running.reactor.advance(0)
            assert [conversation.expect(PUBACK).mid for _ in range(2)] == [1, 2]


class TestSubscriptions:
    def test_a_granted_one(self, still: Stage) -> None:
        subscribed = result(still.broker.subscribe(FILTER, 1))
        assert subscribed == []
        still.broker.link_subscribed([("another", 0), (FILTER, 1)])
        assert subscribed == [1]

    def test_a_refused_one(self, still: Stage) -> None:
        subscribed = result(still.broker.subscribe(FILTER, 1))
        still.broker.link_subscribed([(FILTER, None)])
        assert [type(it) for it in subscribed] == [SubscriptionRefused]

    def test_a_renewed_one_is_told_to_nobody(self, still: Stage) -> None:
        subscribed = result(still.broker.subscribe(FILTER, 1))
        still.broker.link_subscribed([(FILTER, 1)])
        still.broker.link_subscribed([(FILTER, None)])
        assert subscribed == [1]

    def test_one_that_is_given_up_is_cancelled(self, still: Stage) -> None:
        subscribed = result(still.broker.subscribe(FILTER, 1))
        still.broker.unsubscribe(FILTER)
        still.broker.link_subscribed([(FILTER, 1)])
        assert [type(it) for it in subscribed] == [CancelledError]

    def test_nobody_needs_to_care_for_that(self, still: Stage) -> None:
        with capturedLogs() as events:
            still.broker.subscribe(FILTER, 1).addErrback(lambda failure: failure.trap(SubscriptionRefused))
            still.broker.unsubscribe(FILTER)
        assert events == []

    def test_the_second_of_two_has_the_answer(self, still: Stage) -> None:
        first, second = (result(still.broker.subscribe(FILTER, 1)) for _ in range(2))
        still.broker.link_subscribed([(FILTER, 1)])
        assert ([type(it) for it in first], second) == ([CancelledError], [1])


class TestConnection:
    def test_it_is_away_until_it_is_there(self, still: Stage) -> None:
        still.reactor.advance(5)
        assert still.broker.away_since == 0.0
        still.broker.link_connected("5")
        assert still.broker.away_since is None
        still.reactor.advance(5)
        still.broker.link_lost("gone")
        assert still.broker.away_since == 10.0
        assert still.client.told == ["connected", "lost: gone"]

    def test_being_away_counts_from_the_start(self, scripted: ScriptedBroker, running: Stage) -> None:
        running.reactor.advance(100)
        running.broker.startService()
        assert running.broker.away_since == 100.0

    @pytest.mark.parametrize(
        ("setting", "before", "version", "after"),
        [("auto", True, "3.1.1", False), ("auto", True, "5", True), ("3.1.1", False, "3.1.1", False)],
    )
    def test_properties_are_carried_as_far_as_is_known(
        self, setting: str, before: bool, version: str, after: bool
    ) -> None:
        stage = Stage(version=setting)
        assert stage.broker.carries_properties is before
        stage.broker.link_connected(version)
        assert stage.broker.carries_properties is after
        stage.broker.link_ended()

    def test_each_change_is_one_line(self, still: Stage) -> None:
        with capturedLogs() as events:
            still.broker.link_connected("3.1.1")
            still.broker.link_lost("connection lost")
        assert lines(events, "info") == ["connected to broker mqtt://broker (MQTT 3.1.1)"]
        assert lines(events) == ["connection to broker mqtt://broker lost: connection lost"]

    def test_a_wrong_password_is_one_line_a_minute(self, still: Stage) -> None:
        with capturedLogs() as events:
            for _ in range(30):
                still.broker.link_failed("refused: Bad user name or password")
                still.reactor.advance(2)
        expected = "cannot connect to broker mqtt://broker: refused: Bad user name or password; trying again"
        assert lines(events) == [expected]
        with capturedLogs() as events:
            still.broker.link_failed("refused: Bad user name or password")
            still.broker.link_failed("Connection refused")
        assert len(lines(events)) == 2
        assert lines(events)[0] == expected

    def test_after_a_connection_a_failure_is_news(self, still: Stage) -> None:
        with capturedLogs() as events:
            still.broker.link_failed("Connection refused")
            still.broker.link_connected("5")
            still.broker.link_failed("Connection refused")
        assert len(lines(events)) == 2

    def test_a_name_used_twice_says_what_to_do(self, still: Stage) -> None:
        with capturedLogs() as events:
            still.broker.link_taken_over(30.0)
            still.reactor.advance(LOG_INTERVAL / 2)
            still.broker.link_connected("5")
            still.broker.link_taken_over(30.0)
        assert lines(events) == [
            (
                "another client of broker mqtt://broker uses the client id ocppgw-gw-1: "
                "give each gateway its own --node; waiting 30 s"
            )
        ]

    def test_a_name_used_twice_is_an_outage_too(self, still: Stage) -> None:
        still.broker.link_connected("5")
        still.reactor.advance(7)
        still.broker.link_taken_over(30.0)
        assert still.broker.away_since == still.reactor.seconds()
        assert still.client.told[-1] == "lost: another client uses our client id"

    def test_a_subscription_that_is_not_renewed_is_said(self, still: Stage) -> None:
        with capturedLogs() as events:
            still.broker.link_subscribed([("ocpp/cs/CP1/+/+", None), ("ocpp/cs/CP2/+/+", 1)])
        assert lines(events) == ["broker mqtt://broker no longer grants subscriptions (e.g. ocpp/cs/CP1/+/+)"]

    def test_refused_messages_are_said_by_reason(self, still: Stage) -> None:
        with capturedLogs() as events:
            for number in range(100):
                still.broker.link_refused(f"ocpp/cp/CP{number}/Heartbeat", "Not authorized")
            still.broker.link_refused("ocpp/cp/CP1/Heartbeat", "Quota exceeded")
            for size in range(100):
                still.broker.link_refused("ocpp/cp/CP1/A", f"{size} bytes, 5 are allowed")
        assert still.client.told.count("refused") == 201
        assert lines(events) == [
            "broker mqtt://broker refuses messages: Not authorized (e.g. on ocpp/cp/CP0/Heartbeat)",
            "broker mqtt://broker refuses messages: Quota exceeded (e.g. on ocpp/cp/CP1/Heartbeat)",
            "broker mqtt://broker refuses messages: 0 bytes, 5 are allowed (e.g. on ocpp/cp/CP1/A)",
        ]


class TestStop:
    def test_before_a_start_there_is_nothing_to_do(self, still: Stage) -> None:
        assert still.stop() == [None]

    def test_what_is_queued_is_sent_first(self, scripted: ScriptedBroker) -> None:
        stage = Stage(scripted.port)
        with capturedLogs() as events, stage.start(scripted) as conversation:
            stage.publish(2)
            stopped = stage.stop()
            packets = [conversation.expect(PUBLISH) for _ in range(2)]
            assert stopped == []
            for packet in packets:
                conversation.puback(packet)
            conversation.expect(DISCONNECT)
            stage.wait_for_end(stopped)
        assert lines(events) == []
        assert stage.reactor.getDelayedCalls() == []

    def test_what_could_not_be_sent_is_said(self, scripted: ScriptedBroker) -> None:
        stage = Stage(scripted.port)
        stage.publish(3)
        stage.broker.startService()
        scripted.accept().close()
        with capturedLogs() as events:
            stage.wait_for_end(stage.stop())
        assert lines(events) == ["3 messages did not reach broker mqtt://broker"]

    def test_a_thread_that_does_not_come_back_is_not_waited_for(self, scripted: ScriptedBroker) -> None:
        stage = Stage(scripted.port)
        with stage.start(scripted) as conversation:
            stage.publish(1)
            stage.reactor.advance(0)
            conversation.expect(PUBLISH)
            stopped = stage.stop()
            stage.reactor.advance(DRAIN_SECONDS + STOP_GRACE - 0.1)
            assert stopped == []
            stage.reactor.advance(0.1)
            assert stopped == [None]
        stage.reactor.take_call()  # its end, too late

    def test_what_comes_after_the_end_is_harmless(self, scripted: ScriptedBroker) -> None:
        stage = Stage(scripted.port)
        with stage.start(scripted):
            stage.wait_for_end(stage.stop())
        stage.publish(1)
        stage.broker.unsubscribe(FILTER)
        stage.reactor.advance(1)
        assert stage.stop() == [None]
