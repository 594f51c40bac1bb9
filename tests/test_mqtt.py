"""The MQTT edge against a broker that says what the test wants, and against mosquitto; every wait has a limit."""

from __future__ import annotations

import ssl
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import paho.mqtt.client as paho
import pytest
import trustme
from doubles import (
    CONNECT,
    DISCONNECT,
    LIMIT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Conversation,
    Packet,
    ScriptedBroker,
)
from processes import free_port, mosquitto, require
from twisted.logger import capturedLogs

from ocppgw.handover import Acknowledge, Handover, Subscribe, Unsubscribe
from ocppgw.interfaces import Delivery, Properties, Publication
from ocppgw.mqtt import FILTERS_PER_SUBSCRIBE, GIVE_UP, LAST_DELAY, MAX_UNTAKEN, PACKET_HEADER, READS, Link
from ocppgw.mqttclient import PublishProperties
from ocppgw.settings import BrokerAddress, Mqtt

BAD_PASSWORD, NOT_AUTHORIZED, UNSUPPORTED_VERSION, TAKEN_OVER = 0x86, 0x87, 0x84, 0x8E
NO_MATCHING_SUBSCRIBERS = 0x10
RECEIVE_MAXIMUM, MAXIMUM_PACKET_SIZE, SESSION_EXPIRY, MESSAGE_EXPIRY = 0x21, 0x27, 0x11, 0x02
UP, FILTER = "ocpp/cp/CP1/Heartbeat", "ocpp/cs/CP1/+/+"


def property_of(identifier: int, value: int, size: int) -> bytes:
    return bytes([identifier]) + value.to_bytes(size, "big")


class Events:
    """What the link tells the reactor, as (event, arguments...) in order."""

    def __init__(self) -> None:
        self._told: Queue[tuple[Any, ...]] = Queue()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("link_"):
            raise AttributeError(name)
        return lambda *arguments: self._told.put((name.removeprefix("link_"), *arguments))

    def next(self) -> tuple[Any, ...]:
        return self._told.get(timeout=LIMIT)

    def wait_for(self, name: str) -> tuple[Any, ...]:
        """Pass over events until this one; its arguments."""
        while (event := self.next())[0] != name:
            pass
        return event[1:]

    def deliveries(self, count: int) -> list[Delivery]:
        received: list[Delivery] = []
        while len(received) < count:
            received += self.wait_for("received")[0]
        return received


class Stage:
    """A running link, and the reactor's side of it."""

    def __init__(self, address: BrokerAddress, **settings: Any) -> None:
        self.queue = Handover()
        self.events = Events()
        call_at_once = lambda function, *arguments: function(*arguments)  # noqa: E731
        self.link = Link(Mqtt(**settings), address, "ocppgw-gw-1", self.queue, self.events, call_at_once)
        self._over = False
        self.link.start()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._over:
            self.stop()

    def stop(self, limit: float = 0.0) -> None:
        self.link.stop(limit)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.events.wait_for("ended")
        self.queue.close()
        self._over = True

    def command(self, *commands: Any) -> None:
        for command in commands:
            self.queue.command(command)
        self.queue.wake()

    def publish(self, *publications: Publication | bytes) -> None:
        """Publish; bytes are the payload of an ordinary message."""
        for publication in publications:
            self.queue.publish(Publication(UP, publication) if isinstance(publication, bytes) else publication)
        self.queue.wake()


def tcp(port: int, *, tls: bool = False) -> BrokerAddress:
    return BrokerAddress("tcp", "127.0.0.1", port, tls)


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as broker:
        yield broker


@pytest.fixture
def stage(broker: ScriptedBroker) -> Iterator[Stage]:
    with Stage(tcp(broker.port)) as stage:
        yield stage


@pytest.fixture(params=["5", "3.1.1"])
def either(broker: ScriptedBroker, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A stage for what goes for both versions of MQTT."""
    with Stage(tcp(broker.port), version=request.param) as stage:
        yield stage


def connected(broker: ScriptedBroker, properties: bytes = b"") -> Conversation:
    """Accept the link."""
    conversation = broker.accept()
    conversation.connack(properties=properties)
    return conversation


class TestConnecting:
    def test_mqtt_5_asks_for_a_session_that_lasts(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            assert stage.events.next() == ("connected", "5")
            assert conversation.connect == Packet(
                CONNECT,
                5,
                client_id="ocppgw-gw-1",
                keepalive=30,
                clean=False,
                properties=property_of(SESSION_EXPIRY, 3600, 4),
            )

    def test_mqtt_3_1_1_keeps_its_session_too(self, broker: ScriptedBroker) -> None:
        settings = {"version": "3.1.1", "username": "gw", "password": "p\u00e4ss", "keepalive": 60}
        with Stage(tcp(broker.port), **settings) as stage, connected(broker) as conversation:
            assert stage.events.next() == ("connected", "3.1.1")
            assert conversation.connect == Packet(
                CONNECT,
                4,
                client_id="ocppgw-gw-1",
                keepalive=60,
                clean=False,
                username="gw",
                password="p\u00e4ss".encode(),
            )

    @pytest.mark.parametrize(
        "answer",
        [
            lambda conversation: conversation.connack(UNSUPPORTED_VERSION),
            lambda conversation: conversation.send(b"\x20\x02\x00\x01"),  # as MQTT 3.1.1 says it
            lambda conversation: None,
        ],
        ids=["refused", "refused in the older way", "closed without a word"],
    )
    def test_a_broker_without_mqtt_5_is_asked_again_with_3_1_1(
        self, broker: ScriptedBroker, stage: Stage, answer: Callable[[Conversation], None]
    ) -> None:
        with broker.accept() as conversation:
            assert conversation.connect.version == 5
            answer(conversation)
        with connected(broker) as conversation:
            assert conversation.connect.version == 4
            assert stage.events.next() == ("connected", "3.1.1")

    def test_when_no_version_works_both_are_tried_again(self, broker: ScriptedBroker, stage: Stage) -> None:
        versions = []
        for _ in range(3):
            with broker.accept() as conversation:
                versions.append(conversation.connect.version)
        assert versions == [5, 4, 5]
        assert stage.events.next() == ("failed", "closed by the broker before CONNACK")

    def test_a_version_that_has_connected_is_kept(self, broker: ScriptedBroker, stage: Stage) -> None:
        connected(broker).close()
        assert stage.events.wait_for("lost") == ("connection lost",)
        versions = []
        for _ in range(2):
            with broker.accept() as conversation:
                versions.append(conversation.connect.version)
        assert versions == [5, 5]
        assert stage.events.next() == ("failed", "closed by the broker before CONNACK")

    def test_a_version_that_was_asked_for_is_the_only_one(self, broker: ScriptedBroker) -> None:
        with Stage(tcp(broker.port), version="5") as stage:
            for _ in range(2):
                with broker.accept() as conversation:
                    assert conversation.connect.version == 5
                    conversation.connack(UNSUPPORTED_VERSION)
                assert stage.events.next() == ("failed", "refused: Unsupported protocol version")

    def test_a_wrong_password_is_no_matter_of_versions(self, broker: ScriptedBroker, stage: Stage) -> None:
        for _ in range(2):
            with broker.accept() as conversation:
                assert conversation.connect.version == 5
                conversation.connack(BAD_PASSWORD)
            assert stage.events.next() == ("failed", "refused: Bad user name or password")

    def test_nobody_there(self) -> None:
        with ScriptedBroker() as broker:
            port = broker.port
        with Stage(tcp(port)) as stage:
            assert stage.events.next() == ("failed", "Connection refused")

    def test_nonsense_is_no_broker(self, broker: ScriptedBroker, stage: Stage) -> None:
        for _ in range(2):
            with broker.accept() as conversation:
                conversation.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert stage.events.next()[0] == "failed"


class TestPublications:
    def test_they_go_out_in_order(self, broker: ScriptedBroker, either: Stage) -> None:
        either.publish(*(b"%d" % number for number in range(100)))
        with connected(broker) as conversation:
            either.publish(*(b"%d" % number for number in range(100, 200)))
            packets = [conversation.expect(PUBLISH) for _ in range(200)]
            assert [packet.payload for packet in packets] == [b"%d" % number for number in range(200)]
            assert {(packet.topic, packet.qos, packet.retain, packet.duplicate) for packet in packets} == {
                (UP, 1, False, False)
            }
            assert len({packet.mid for packet in packets}) == 200
            assert either.queue.pending == 200

    def test_one_is_pending_until_the_broker_has_it(self, broker: ScriptedBroker, either: Stage) -> None:
        with connected(broker) as conversation:
            either.queue.low_water = 1, 1000
            either.publish(b"12345", b"123")
            first, second = conversation.expect(PUBLISH), conversation.expect(PUBLISH)
            assert (either.queue.pending, either.queue.pending_bytes) == (2, 8)
            conversation.puback(first)
            either.events.wait_for("drained")
            assert (either.queue.pending, either.queue.pending_bytes) == (1, 3)
            either.queue.low_water = 0, 0
            conversation.puback(second)
            either.events.wait_for("drained")
            assert (either.queue.pending, either.queue.pending_bytes) == (0, 0)

    def test_qos_0_and_retain(self, broker: ScriptedBroker, either: Stage) -> None:
        with connected(broker) as conversation:
            either.queue.low_water = 0, 0
            either.publish(Publication(UP, b"x", qos=0, retain=True))
            packet = conversation.expect(PUBLISH)
            assert (packet.qos, packet.retain, packet.payload) == (0, True, b"x")
            either.events.wait_for("drained")
            assert either.queue.pending == 0

    def test_the_brokers_receive_maximum_is_honoured(self, broker: ScriptedBroker, stage: Stage) -> None:
        """MQTT 5, 3.2.2.3.3"""
        with connected(broker, property_of(RECEIVE_MAXIMUM, 3, 2)) as conversation:
            stage.publish(b"1", b"2", b"3", b"4", b"5")
            packets = [conversation.expect(PUBLISH) for _ in range(3)]
            stage.command(Subscribe("probe/1", 1))
            conversation.expect(SUBSCRIBE)
            conversation.puback(packets[0])
            packets.append(conversation.expect(PUBLISH))
            stage.command(Subscribe("probe/2", 1))
            conversation.expect(SUBSCRIBE)
            conversation.puback(packets[1])
            packets.append(conversation.expect(PUBLISH))
            assert [packet.payload for packet in packets] == [b"1", b"2", b"3", b"4", b"5"]

    def test_what_was_not_acknowledged_is_sent_again(self, broker: ScriptedBroker, either: Stage) -> None:
        """MQTT 5 and 3.1.1, 4.4"""
        with connected(broker) as conversation:
            either.publish(b"1", b"2", b"3")
            before = [conversation.expect(PUBLISH) for _ in range(3)]
            conversation.puback(before[1])
            either.publish(b"4")
            before.append(conversation.expect(PUBLISH))
        either.events.wait_for("lost")
        either.publish(b"5")
        with connected(broker) as conversation:
            after = [conversation.expect(PUBLISH) for _ in range(4)]
            assert [(packet.payload, packet.duplicate) for packet in after] == [
                (b"1", True),
                (b"3", True),
                (b"4", True),
                (b"5", False),
            ]
            assert [packet.mid for packet in after[:3]] == [before[0].mid, before[2].mid, before[3].mid]

    def test_a_packet_identifier_in_use_is_skipped(self, broker: ScriptedBroker, stage: Stage) -> None:
        """MQTT 5, 2.2.1"""
        with connected(broker) as conversation:
            stage.publish(b"first")
            first = conversation.expect(PUBLISH)
            for number in range(65_535):
                stage.queue.publish(Publication(UP, b"", qos=0 if number < 65_533 else 1))
            stage.queue.wake()
            for _ in range(65_533):
                conversation.expect(PUBLISH)
            others = [conversation.expect(PUBLISH) for _ in range(2)]
            assert len({packet.mid for packet in (first, *others)}) == 3

    def test_a_queue_of_a_broker_that_turns_out_to_speak_3_1_1_is_kept(
        self, broker: ScriptedBroker, stage: Stage
    ) -> None:
        stage.publish(Publication(UP, b"1", properties=Properties(content_type="x")), b"2")
        broker.accept().close()
        with connected(broker) as conversation:
            assert [conversation.expect(PUBLISH).payload for _ in range(2)] == [b"1", b"2"]

    def test_a_refused_publication_is_reported(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            stage.queue.low_water = 0, 0
            stage.publish(b"1", b"2")
            conversation.puback(conversation.expect(PUBLISH), NO_MATCHING_SUBSCRIBERS)
            conversation.puback(conversation.expect(PUBLISH), NOT_AUTHORIZED)
            assert stage.events.wait_for("connected") == ("5",)
            assert stage.events.next() == ("refused", UP, "Not authorized")
            assert stage.events.next() == ("drained",)

    def test_one_that_is_larger_than_the_broker_takes_is_not_sent(self, broker: ScriptedBroker, stage: Stage) -> None:
        """MQTT 5, 3.2.2.3.6"""
        properties = Properties(content_type="application/json", correlation_data=b"x" * 200)
        limit = 1000
        room = limit - PACKET_HEADER - len(UP) - len(PublishProperties(properties).pack())
        with connected(broker, property_of(MAXIMUM_PACKET_SIZE, limit, 4)) as conversation:
            stage.publish(
                Publication(UP, b"x" * (room + 1), properties=properties),
                Publication(UP, b"x" * room, properties=properties),
            )
            packet = conversation.expect(PUBLISH)
            assert len(packet.payload) == room
            assert stage.events.wait_for("refused") == (UP, f"{limit + 1} bytes, {limit} are allowed")
            assert stage.queue.pending == 1

    def test_properties_are_for_mqtt_5(self, broker: ScriptedBroker, either: Stage) -> None:
        properties = Properties("application/json", b"u-1", "ocpp/cs/CP1/Reply/Heartbeat", (("cid", "CP1"),))
        with connected(broker) as conversation:
            either.publish(Publication(UP, b"{}", properties=properties))
            packet = conversation.expect(PUBLISH)
            assert packet.payload == b"{}"
            expected = PublishProperties(properties).pack()[1:] if packet.version == 5 else b""
            assert packet.properties == expected

    def test_a_fault_of_ours_costs_the_connection_and_not_the_others(
        self, broker: ScriptedBroker, stage: Stage
    ) -> None:
        with capturedLogs() as events:
            with connected(broker) as conversation:
                stage.publish(b"1")
                conversation.expect(PUBLISH)
                stage.publish(Publication(5, b"2"), b"3")  # type: ignore[arg-type]
                assert conversation.is_closed()
            with connected(broker) as conversation:
                assert [conversation.expect(PUBLISH).payload for _ in range(2)] == [b"1", b"3"]
        assert [event["log_failure"].type for event in events if "log_failure" in event] == [AttributeError]


class TestSubscriptions:
    def test_the_granted_qos_is_told(self, broker: ScriptedBroker, either: Stage) -> None:
        with connected(broker) as conversation:
            either.command(Subscribe("a/+", 1), Subscribe("b/+", 0), Subscribe("c/+", 1))
            packet = conversation.expect(SUBSCRIBE)
            assert packet.filters == (("a/+", 1), ("b/+", 0), ("c/+", 1))
            conversation.suback(packet, 1, 0, 0x80)
            assert either.events.wait_for("subscribed") == ([("a/+", 1), ("b/+", 0), ("c/+", None)],)

    def test_no_more_than_a_few_go_into_one_packet(self, broker: ScriptedBroker, stage: Stage) -> None:
        wanted = [(f"f/{number}", 1) for number in range(2 * FILTERS_PER_SUBSCRIBE + 1)]
        with connected(broker) as conversation:
            stage.command(*(Subscribe(*pair) for pair in wanted))
            packets = [conversation.expect(SUBSCRIBE) for _ in range(3)]
            assert [pair for packet in packets for pair in packet.filters] == wanted
            assert max(len(packet.filters) for packet in packets) == FILTERS_PER_SUBSCRIBE

    def test_commands_keep_their_order_and_come_before_publications(self, broker: ScriptedBroker, stage: Stage) -> None:
        stage.command(Subscribe("a", 1), Unsubscribe("a"), Subscribe("b", 1), Subscribe("a", 1))
        stage.publish(b"1")
        with connected(broker) as conversation:
            packets = [conversation.read() for _ in range(4)]
            assert [(packet.kind, packet.filters) for packet in packets if packet is not None] == [
                (SUBSCRIBE, (("a", 1),)),
                (UNSUBSCRIBE, (("a", 0),)),
                (SUBSCRIBE, (("b", 1), ("a", 1))),
                (PUBLISH, ()),
            ]

    def test_they_are_renewed_before_anything_else_is_sent(self, broker: ScriptedBroker, either: Stage) -> None:
        wanted = [f"f/{number}" for number in range(FILTERS_PER_SUBSCRIBE + 2)]
        with connected(broker) as conversation:
            either.command(*(Subscribe(topic_filter, 1) for topic_filter in wanted), Unsubscribe("f/0"))
            for kind in (SUBSCRIBE, SUBSCRIBE, UNSUBSCRIBE):
                conversation.expect(kind)
            either.publish(b"1")
            conversation.expect(PUBLISH)
        either.events.wait_for("lost")
        either.publish(b"2")
        either.command(Subscribe("late", 0))
        with connected(broker) as conversation:
            packets = [conversation.expect(kind) for kind in (SUBSCRIBE, SUBSCRIBE)]
            assert [topic_filter for packet in packets for topic_filter, _ in packet.filters] == wanted[1:]
            rest = [conversation.read() for _ in range(3)]
            assert {(packet.kind, packet.payload, packet.filters) for packet in rest if packet is not None} == {
                (PUBLISH, b"1", ()),
                (SUBSCRIBE, b"", (("late", 0),)),
                (PUBLISH, b"2", ()),
            }
            conversation.suback(packets[0])
            [results] = either.events.wait_for("subscribed")
            assert results == [(topic_filter, 1) for topic_filter in wanted[1 : FILTERS_PER_SUBSCRIBE + 1]]


class TestDeliveries:
    def test_a_message_comes_as_it_was_sent(self, broker: ScriptedBroker, either: Stage) -> None:
        with connected(broker) as conversation:
            conversation.deliver("ocpp/cs/CP1/a/\u00e9", b"1", 7)
            conversation.deliver("ocpp/cs/CP1/a/b", b"", 0, retain=True)
            conversation.deliver("ocpp/cs/CP1/a/c", b"\xff\x00", 8, duplicate=True)
            received = either.events.deliveries(3)
            assert [(it.topic, it.payload, it.retain, it.duplicate) for it in received] == [
                ("ocpp/cs/CP1/a/\u00e9", b"1", False, False),
                ("ocpp/cs/CP1/a/b", b"", True, False),
                ("ocpp/cs/CP1/a/c", b"\xff\x00", False, True),
            ]
            assert [it.properties for it in received] == [None, None, None]

    def test_the_expiry_that_is_left_comes_along(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            conversation.deliver("a/b", b"1", 1, properties=property_of(MESSAGE_EXPIRY, 60, 4))
            assert stage.events.deliveries(1)[0].properties == Properties(expiry=60)

    def test_they_are_acknowledged_when_they_are_taken_over_and_in_order(
        self, broker: ScriptedBroker, either: Stage
    ) -> None:
        """MQTT 5 and 3.1.1, 4.6"""
        with connected(broker) as conversation:
            for mid in (5, 3, 9):
                conversation.deliver("a/b", b"x", mid)
            conversation.deliver("a/b", b"x")
            received = either.events.deliveries(4)
            either.command(Subscribe("probe", 1))
            conversation.expect(SUBSCRIBE)
            either.command(Acknowledge(tuple(received[:2])), Acknowledge(tuple(received[2:])))
            assert [conversation.expect(PUBACK).mid for _ in range(3)] == [5, 3, 9]
            either.command(Subscribe("probe", 1))
            conversation.expect(SUBSCRIBE)  # and none for QoS 0

    def test_an_acknowledgement_is_for_the_connection_on_which_the_message_came(
        self, broker: ScriptedBroker, either: Stage
    ) -> None:
        with connected(broker) as conversation:
            conversation.deliver("a/b", b"old", 1)
            conversation.deliver("a/b", b"old", 2)
            old = either.events.deliveries(2)
        either.events.wait_for("lost")
        with connected(broker) as conversation:
            conversation.deliver("a/b", b"new", 2)
            [new] = either.events.deliveries(1)
            either.command(Acknowledge((*old, new)), Subscribe("probe", 1))
            assert conversation.expect(PUBACK).mid == 2
            conversation.expect(SUBSCRIBE)

    def test_a_topic_that_is_not_utf_8_is_nobodys(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            conversation.deliver(b"a/\xff", b"1", 1)
            conversation.deliver("a/b", b"2", 2)
            assert [it.topic for it in stage.events.deliveries(2)] == ["", "a/b"]

    def test_no_more_is_read_than_the_reactor_takes(self, broker: ScriptedBroker, stage: Stage) -> None:
        count = 2 * MAX_UNTAKEN
        with connected(broker) as conversation:
            for number in range(count):
                conversation.deliver("a/b", b"%d" % number)
            received = stage.events.deliveries(MAX_UNTAKEN)
            for _ in range(READS):  # turns of the thread, enough of them to read the rest
                stage.command(Subscribe("probe", 1))
                conversation.expect(SUBSCRIBE)
            assert stage.queue.unacknowledged < count
            stage.command(Acknowledge(tuple(received)))
            received += stage.events.deliveries(count - len(received))
            assert [it.payload for it in received] == [b"%d" % number for number in range(count)]


class TestLosses:
    def test_the_brokers_reason_is_told(self, broker: ScriptedBroker, stage: Stage) -> None:
        connected(broker).disconnect(0x8B)
        assert stage.events.wait_for("lost") == ("closed by the broker: Server shutting down",)

    def test_another_client_with_our_id_is_left_alone_for_long(self, broker: ScriptedBroker, stage: Stage) -> None:
        connected(broker).disconnect(TAKEN_OVER)
        assert stage.events.wait_for("taken_over") == (LAST_DELAY,)

    def test_three_short_connections_are_the_same(self, broker: ScriptedBroker) -> None:
        """MQTT 3.1.1 has no word for it, and mosquitto 2.0 does not say it in MQTT 5 either."""
        with Stage(tcp(broker.port), version="3.1.1") as stage:
            for _ in range(3):
                connected(broker).close()
            told = [stage.events.next()[0] for _ in range(6)]
            assert told == ["connected", "lost"] * 2 + ["connected", "taken_over"]

    def test_each_time_it_is_left_alone_for_longer(self) -> None:
        link = Link(
            Mqtt(), tcp(1), "ocppgw-gw-1", Handover(), Events(), lambda function, *arguments: function(*arguments)
        )
        delays = [link._after_loss(1.0) for _ in range(9)]
        assert delays == [1, 1, 30, 60, 120, 240, 480, 600, 600]
        assert link._after_loss(11.0) == 1
        assert [link._after_loss(1.0) for _ in range(3)] == [1, 1, 30]
        link._queue.close()

    def test_an_idle_connection_is_kept_alive(self, broker: ScriptedBroker) -> None:
        with Stage(tcp(broker.port), keepalive=1) as stage, broker.accept_socket() as connection:
            connection.recv(1000)
            connection.sendall(b"\x20\x03\x00\x00\x00")
            assert connection.recv(2) == b"\xc0\x00"  # PINGREQ, which nobody answers
            assert stage.events.wait_for("lost") == ("connection lost",)


def test_what_no_packet_can_hold_is_refused_and_holds_nothing_up(broker: ScriptedBroker, stage: Stage) -> None:
    with connected(broker) as conversation:
        stage.events.wait_for("connected")
        too_long = Properties(correlation_data=b"x" * 65536)
        stage.queue.publish(Publication("ocpp/cp/CP1/A", b"1", properties=too_long))
        stage.publish(b"2")
        assert stage.events.wait_for("refused")[0] == "ocpp/cp/CP1/A"
        packet = conversation.read()
        assert packet is not None
        assert packet.kind == PUBLISH
        conversation.puback(packet)
        stage.stop(LIMIT)
    assert stage.queue.pending == 0


def test_what_the_broker_closes_for_is_given_up_at_last(broker: ScriptedBroker, stage: Stage) -> None:
    """MQTT 3.1.1 has no Maximum Packet Size: mosquitto and rumqttd close the connection for a larger packet."""
    stage.publish(b"good", b"poison", b"more")
    for _ in range(GIVE_UP):
        with connected(broker) as conversation:
            packet = conversation.expect(PUBLISH)
            while packet.payload != b"poison":
                conversation.puback(packet)
                packet = conversation.expect(PUBLISH)
    _, reason = stage.events.wait_for("refused")
    assert "closes the connection over one of 6 bytes" in reason
    with connected(broker) as conversation:
        packet = conversation.expect(PUBLISH)
        assert packet.payload == b"more"
        conversation.puback(packet)
        stage.stop(LIMIT)
    assert stage.queue.pending == 0


class TestStop:
    def test_what_is_queued_is_sent_and_the_session_ended(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            stage.events.wait_for("connected")
            stage.publish(b"1", b"2")
            stage.command(Unsubscribe(FILTER))
            stage.link.stop(LIMIT)
            kinds = []
            while (packet := conversation.read()) is not None and packet.kind != DISCONNECT:
                kinds.append(packet.kind)
                if packet.kind == PUBLISH:
                    conversation.puback(packet)
            assert sorted(kinds) == [PUBLISH, PUBLISH, UNSUBSCRIBE]
            # MQTT 5, 3.14.2.2.2: the broker forgets the session now, and not in an hour
            assert packet == Packet(DISCONNECT, 5, properties=property_of(SESSION_EXPIRY, 0, 4))
            assert conversation.is_closed()
        assert stage.queue.pending == 0

    def test_mqtt_3_1_1_says_goodbye(self, broker: ScriptedBroker) -> None:
        with Stage(tcp(broker.port), version="3.1.1") as stage, connected(broker) as conversation:
            stage.events.wait_for("connected")
            stage.stop(LIMIT)
            assert conversation.expect(DISCONNECT) == Packet(DISCONNECT, 4)

    def test_a_broker_that_does_not_acknowledge_gets_its_time_and_no_more(
        self, broker: ScriptedBroker, stage: Stage
    ) -> None:
        with connected(broker) as conversation:
            stage.publish(b"1")
            conversation.expect(PUBLISH)
            stage.stop(0.1)
            assert conversation.expect(DISCONNECT).properties == property_of(SESSION_EXPIRY, 0, 4)
        assert stage.queue.pending == 1

    def test_a_broker_that_says_nothing_is_not_waited_for_longer_than_the_limit(
        self, broker: ScriptedBroker, stage: Stage
    ) -> None:
        with broker.accept() as conversation:
            stage.publish(b"1")
            stage.stop(0.5)
            assert conversation.connect.client_id == "ocppgw-gw-1"

    def test_nobody_there(self) -> None:
        with ScriptedBroker() as broker:
            port = broker.port
        with Stage(tcp(port)) as stage:
            stage.events.wait_for("failed")
            stage.stop()

    def test_a_broker_that_goes_away_meanwhile(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            stage.publish(b"1")
            conversation.expect(PUBLISH)
            stage.link.stop(0.5)
        stage.wait_for_end()

    def test_a_broker_that_comes_back_in_time_gets_what_is_left(self, broker: ScriptedBroker, stage: Stage) -> None:
        with connected(broker) as conversation:
            stage.publish(b"1")
            conversation.expect(PUBLISH)
            stage.link.stop(LIMIT)
        with connected(broker) as conversation:
            packet = conversation.expect(PUBLISH)
            assert packet.payload == b"1"
            conversation.puback(packet)
        stage.wait_for_end()
        assert stage.queue.pending == 0


class Service:
    """Somebody else on mosquitto, who hears one topic filter in MQTT 5."""

    def __init__(self, port: int, topic_filter: str) -> None:
        self._heard: Queue[paho.MQTTMessage] = Queue()
        self._subscribed = threading.Event()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = lambda client, userdata, message: self._heard.put(message)
        self._client.on_connect = lambda client, *_: client.subscribe(topic_filter, qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.connect("127.0.0.1", port)

    def __enter__(self) -> Service:
        self._client.loop_start()
        assert self._subscribed.wait(LIMIT)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def hear(self) -> paho.MQTTMessage:
        return self._heard.get(timeout=LIMIT)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(LIMIT)


@dataclass
class Certificates:
    """Files of an authority of our own."""

    ca: Path
    server: Path
    named: Path
    client: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        authority = trustme.CA()
        paths = cls(*(folder / f"{name}.pem" for name in ("ca", "server", "named", "client")))
        authority.cert_pem.write_to_path(paths.ca)
        for path, name in ((paths.server, "127.0.0.1"), (paths.named, "broker.example"), (paths.client, "gw.example")):
            authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(path)
        return paths


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


def tls_lines(port: int, certificates: Certificates, certificate: Path) -> list[str]:
    return [
        f"listener {port} 127.0.0.1",
        f"cafile {certificates.ca}",
        f"certfile {certificate}",
        f"keyfile {certificate}",
    ]


class TestMosquitto:
    @pytest.mark.parametrize("version", ["5", "3.1.1"])
    @pytest.mark.parametrize("transport", ["tcp", "unix", "websockets", "mqtts", "wss"])
    def test_messages_go_both_ways(
        self, tmp_path: Path, certificates: Certificates, transport: str, version: str
    ) -> None:
        port, path = free_port(), tmp_path / "socket"
        lines, address = {
            "tcp": ([f"listener {port} 127.0.0.1"], tcp(port)),
            "unix": ([f"listener 0 {path}"], BrokerAddress("unix", str(path), 0)),
            "websockets": (
                [f"listener {port} 127.0.0.1", "protocol websockets"],
                BrokerAddress("websockets", "127.0.0.1", port, path="/mqtt"),
            ),
            "mqtts": (tls_lines(port, certificates, certificates.server), tcp(port, tls=True)),
            "wss": (
                [*tls_lines(port, certificates, certificates.server), "protocol websockets"],
                BrokerAddress("websockets", "127.0.0.1", port, tls=True, path="/mqtt"),
            ),
        }[transport]
        settings = {"version": version, "ca_file": str(certificates.ca)}
        count = 50
        with (
            mosquitto(tmp_path, *lines) as process,
            Service(process.port, "ocpp/cp/#") as service,
            Stage(address, **settings) as stage,
        ):
            stage.command(Subscribe(FILTER, 1))
            assert stage.events.wait_for("connected") == (version,)
            assert stage.events.wait_for("subscribed") == ([(FILTER, 1)],)
            for number in range(count):
                service.publish("ocpp/cs/CP1/Request/1", b"%d" % number)
                received = stage.events.deliveries(1)
                assert [it.payload for it in received] == [b"%d" % number]
                stage.command(Acknowledge(tuple(received)))
            stage.queue.low_water = 0, 0
            stage.publish(*(b"%d" % number + b"x" * 20_000 for number in range(count)))
            assert [service.hear().payload.rstrip(b"x") for _ in range(count)] == [b"%d" % n for n in range(count)]
            stage.events.wait_for("drained")

    def test_properties_arrive(self, tmp_path: Path) -> None:
        properties = Properties("application/json", b"u-1", "ocpp/cs/CP1/Reply/x", (("cid", "CP1"), ("node", "gw-1")))
        with (
            mosquitto(tmp_path) as process,
            Service(process.port, "ocpp/cp/#") as service,
            Stage(tcp(process.port)) as stage,
        ):
            stage.publish(Publication(UP, b"{}", properties=properties))
            heard = service.hear().properties
            assert heard.ContentType == "application/json"
            assert heard.CorrelationData == b"u-1"
            assert heard.ResponseTopic == "ocpp/cs/CP1/Reply/x"
            assert heard.UserProperty == [("cid", "CP1"), ("node", "gw-1")]

    @pytest.mark.parametrize("version", ["5", "3.1.1"])
    def test_retained_messages_are_marked(self, tmp_path: Path, version: str) -> None:
        with (
            mosquitto(tmp_path) as process,
            Service(process.port, "nothing") as service,
            Stage(tcp(process.port), version=version) as stage,
        ):
            service.publish("ocpp/cs/CP1/Request/1", b"old", retain=True)
            stage.command(Subscribe(FILTER, 1))
            assert [it.retain for it in stage.events.deliveries(1)] == [True]
            service.publish("ocpp/cs/CP1/Request/1", b"new", retain=True)
            assert [it.retain for it in stage.events.deliveries(1)] == [False]

    def test_credentials(self, tmp_path: Path) -> None:
        passwords = tmp_path / "passwords"
        subprocess.run([require("mosquitto_passwd"), "-b", "-c", passwords, "gw", "right"], check=True)
        with mosquitto(tmp_path, f"password_file {passwords}", "allow_anonymous false") as process:
            for settings in ({}, {"username": "gw", "password": "wrong"}):
                with Stage(tcp(process.port), **settings) as stage:
                    assert stage.events.next() == ("failed", "refused: Not authorized")
            with Stage(tcp(process.port), username="gw", password="right") as stage:
                assert stage.events.next() == ("connected", "5")

    def test_an_orderly_stop_leaves_no_session(self, tmp_path: Path) -> None:
        with mosquitto(tmp_path) as process, Service(process.port, "nothing") as service:
            with Stage(tcp(process.port)) as stage:
                stage.command(Subscribe(FILTER, 1))
                stage.events.wait_for("subscribed")
                stage.stop(LIMIT)
            service.publish("ocpp/cs/CP1/Request/1", b"meanwhile")
            with Stage(tcp(process.port)) as stage:
                stage.command(Subscribe("probe", 1))
                stage.events.wait_for("subscribed")
                service.publish("probe", b"probe")
                assert [it.payload for it in stage.events.deliveries(1)] == [b"probe"]


# paho leaves the socket of a TLS handshake that fails to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <ssl:ResourceWarning")
class TestTls:
    def test_only_an_authority_of_ours_is_trusted(self, broker: ScriptedBroker, certificates: Certificates) -> None:
        broker.context = server_context(certificates.server)
        with Stage(tcp(broker.port, tls=True)) as stage:
            with pytest.raises(ssl.SSLError):
                broker.accept()
            event, reason = stage.events.next()
            assert event == "failed"
            assert reason.startswith("certificate: ")
            assert "\n" not in reason

    def test_the_name_in_the_certificate_is_that_of_the_host(
        self, broker: ScriptedBroker, certificates: Certificates
    ) -> None:
        broker.context = server_context(certificates.named)
        with Stage(tcp(broker.port, tls=True), ca_file=str(certificates.ca)) as stage:
            with pytest.raises(ssl.SSLError):
                broker.accept()
            assert stage.events.next()[1].startswith("certificate: ")

    def test_or_the_one_that_was_set(self, broker: ScriptedBroker, certificates: Certificates) -> None:
        names = []
        broker.context = server_context(certificates.named)
        broker.context.sni_callback = lambda sock, name, context: names.append(name)
        settings = {"ca_file": str(certificates.ca), "server_name": "broker.example"}
        with Stage(tcp(broker.port, tls=True), **settings) as stage, connected(broker):
            assert stage.events.next() == ("connected", "5")
        assert names == ["broker.example"]

    def test_what_is_decrypted_already_is_read(self, broker: ScriptedBroker, certificates: Certificates) -> None:
        broker.context = server_context(certificates.server)
        settings = {"ca_file": str(certificates.ca)}
        payloads = [b"%d" % number for number in range(5 * READS)]
        with Stage(tcp(broker.port, tls=True), **settings) as stage, connected(broker) as conversation:
            conversation.deliver_at_once("a/b", payloads)  # one TLS record
            assert [it.payload for it in stage.events.deliveries(len(payloads))] == payloads

    def test_alpn(self, broker: ScriptedBroker, certificates: Certificates) -> None:
        broker.context = server_context(certificates.server)
        broker.context.set_alpn_protocols(["x-amzn-mqtt-ca"])
        settings = {"ca_file": str(certificates.ca), "alpn": ("mqtt", "x-amzn-mqtt-ca")}
        with Stage(tcp(broker.port, tls=True), **settings):
            connection = broker.accept_socket()
            with Conversation(connection):
                assert connection.selected_alpn_protocol() == "x-amzn-mqtt-ca"

    def test_old_tls_is_refused(self, broker: ScriptedBroker, certificates: Certificates) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            broker.context = server_context(certificates.server)
            broker.context.maximum_version = ssl.TLSVersion.TLSv1_1
        with Stage(tcp(broker.port, tls=True), ca_file=str(certificates.ca)) as stage:
            with pytest.raises(ssl.SSLError):
                broker.accept()
            assert stage.events.next()[0] == "failed"

    def test_a_client_certificate(self, tmp_path: Path, certificates: Certificates) -> None:
        port = free_port()
        lines = [*tls_lines(port, certificates, certificates.server), "require_certificate true"]
        settings = {"ca_file": str(certificates.ca)}
        with mosquitto(tmp_path, *lines):
            with Stage(tcp(port, tls=True), **settings) as stage:
                assert stage.events.next()[0] == "failed"
            client = {"cert_file": str(certificates.client), "key_file": str(certificates.client)}
            with Stage(tcp(port, tls=True), **settings, **client) as stage:
                assert stage.events.next() == ("connected", "5")


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
