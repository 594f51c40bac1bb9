"""Stand-ins for the other side of an interface: each provides one of ours and remembers what it was asked for."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Queue
from typing import Any, Self

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock, StringTransport
from zope.interface import implementer

from ocppgw import exactjson
from ocppgw.config import load
from ocppgw.interfaces import (
    Delivery,
    IAdmission,
    IBroker,
    IBrokerClient,
    ICentralSystem,
    IChargePoint,
    Publication,
    SubscriptionRefused,
)
from ocppgw.settings import Settings

LIMIT = 20.0
"""Seconds that a wait for another thread may take; nothing that works comes near it."""


def settings(**tables: Any) -> Settings:
    """Make the settings of a gateway named gw-1; tables: keys and sections as in the settings file."""
    return load(None, {"node": "gw-1", **tables})


def delivery(message: Any, topic: str = "ocpp/cs/CP1/Request/1", **more: Any) -> Delivery:
    """Make a message from MQTT; message: bytes, or what is written as JSON."""
    return Delivery(topic, message if isinstance(message, bytes) else exactjson.dumps(message), **more)


@implementer(IChargePoint)
class FakeChargePoint:
    """What was sent to a charge point. takes: whether its connection takes frames."""

    remote = "203.0.113.7:50112"
    ended = "connection lost"

    def __init__(self, version: str = "ocpp1.6") -> None:
        self.version = version
        self.frames: list[Any] = []
        self.closed: tuple[int, str] | None = None
        self.reading = True
        self.takes = True

    def send(self, frame: bytes) -> bool:
        if self.takes:
            self.frames.append(exactjson.loads(frame))
        return self.takes

    def close(self, code: int, reason: str) -> None:
        self.closed = code, reason

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@implementer(IBroker)
class FakeBroker:
    """A broker that takes everything. history: what it was asked for, in order, in words."""

    def __init__(self) -> None:
        self.away_since: float | None = None
        self.carries_properties = True
        self.publications: list[Publication] = []
        self.filters: dict[str, int] = {}
        self.acknowledged: list[Delivery] = []
        self.history: list[str] = []
        self._subscribing: dict[str, Deferred[int]] = {}

    def publish(self, publication: Publication) -> None:
        self.publications.append(publication)
        self.history.append(f"publish {publication.topic}")

    def subscribe(self, topic_filter: str, qos: int) -> Deferred[int]:
        self.history.append(f"subscribe {topic_filter}")
        self.filters[topic_filter] = qos
        subscribed = self._subscribing[topic_filter] = Deferred()
        return subscribed

    def unsubscribe(self, topic_filter: str) -> None:
        self.history.append(f"unsubscribe {topic_filter}")
        self.filters.pop(topic_filter, None)
        waiting = self._subscribing.pop(topic_filter, None)
        if waiting is not None:
            waiting.addErrback(lambda failure: None)
            waiting.cancel()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.acknowledged += deliveries
        self.history.append("acknowledge")

    def grant(self, topic_filter: str) -> None:
        self._subscribing.pop(topic_filter).callback(self.filters[topic_filter])

    def refuse(self, topic_filter: str) -> None:
        self._subscribing.pop(topic_filter).errback(SubscriptionRefused(topic_filter))


@implementer(IBrokerClient)
class FakeBrokerClient:
    """What a broker's edge told its client. received: deliveries; told: the rest, in order.

    when_congested: what happens while it is told so.
    """

    def __init__(self) -> None:
        self.when_congested: Callable[[], None] = lambda: None
        self.received: list[Delivery] = []
        self.told: list[str] = []

    def messages_received(self, deliveries: Sequence[Delivery]) -> None:
        self.received += deliveries

    def broker_connected(self) -> None:
        self.told.append("connected")

    def broker_lost(self, reason: str) -> None:
        self.told.append(f"lost: {reason}")

    def publication_refused(self) -> None:
        self.told.append("refused")

    def broker_congested(self) -> None:
        self.told.append("congested")
        self.when_congested()

    def broker_relieved(self) -> None:
        self.told.append("relieved")


@implementer(ICentralSystem)
class FakeCentralSystem:
    """What a charge point's session was told. fault: raised for every frame, where there is one."""

    def __init__(self, charge_point: IChargePoint) -> None:
        self.charge_point = charge_point
        self.opens = 0
        self.frames: list[bytes] = []
        self.fault: Exception | None = None

    def opened(self) -> None:
        self.opens += 1

    def frame_received(self, frame: bytes) -> None:
        if self.fault is not None:
            raise self.fault
        self.frames.append(frame)


@implementer(IRealm, IAdmission)
class FakeRealm:
    """Lets in whom it is asked about. refuses: what refusal() says; sessions, logouts: by identity."""

    def __init__(self) -> None:
        self.refuses: str | None = None
        self.sessions: dict[str, FakeCentralSystem] = {}
        self.logouts: list[str] = []

    def refusal(self, identity: str) -> str | None:
        return self.refuses

    def requestAvatar(self, avatarId: bytes, mind: object, *interfaces: object) -> tuple[Any, Any, Any]:
        identity = avatarId.decode()
        session = self.sessions[identity] = FakeCentralSystem(IChargePoint(mind))
        return ICentralSystem, session, lambda: self.logouts.append(identity)


@implementer(ICredentialsChecker)
class FakeChecker:
    """Answers when the test does. asked: credentials and the Deferred to fire, in order."""

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Deferred[bytes]]] = []

    def requestAvatarId(self, credentials: Any) -> Deferred[bytes]:
        answer: Deferred[bytes] = Deferred()
        self.asked.append((credentials, answer))
        return answer


class Wire(StringTransport):
    """One accepted TCP connection; bytes written to it can be read by the test."""

    def unregisterProducer(self) -> None:
        """Take back what may not have been registered: real transports do not mind."""
        self.producer = None

    def take(self) -> bytes:
        """Return what was written since the last call."""
        written = self.value()
        self.clear()
        return written


class HandCrankedReactor(MemoryReactorClock):
    """A reactor of memory that other threads may hand calls to; they run when the test turns the crank."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Queue[Callable[[], object]] = Queue()

    def callFromThread(self, callable: Callable[..., object], *args: object, **kwargs: object) -> None:  # noqa: A002
        self._calls.put(partial(callable, *args, **kwargs))

    def crank(self, until: Callable[[], bool]) -> None:
        """Run what other threads hand over until the condition holds; time does not pass."""
        self.advance(0)
        while not until():
            self.take_call()

    def take_call(self) -> None:
        """Run the next call of another thread."""
        self._calls.get(timeout=LIMIT)()
        self.advance(0)


CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 1, 2, 3, 4, 8, 9, 10, 11
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14


@dataclass(frozen=True, slots=True)
class Packet:
    """One MQTT packet of a client; what a kind does not have is empty.

    version: 4 for MQTT 3.1.1, or 5. properties: their bytes, without the length. filters: (topic filter, qos) pairs.
    """

    kind: int
    version: int
    mid: int = 0
    topic: str = ""
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    duplicate: bool = False
    reason: int = 0
    properties: bytes = b""
    filters: tuple[tuple[str, int], ...] = ()
    client_id: str = ""
    keepalive: int = 0
    clean: bool = False
    username: str | None = None
    password: bytes | None = None

    @classmethod
    def read(cls, first: int, body: bytes, version: int) -> Packet:
        kind, flags, rest = first >> 4, first & 0x0F, _Fields(body)
        if kind == CONNECT:
            rest.take(6)  # MQTT
            version, connect_flags, keepalive = rest.number(1), rest.number(1), rest.number(2)
            return cls(
                kind,
                version,
                properties=rest.properties(version),
                client_id=rest.text(),
                keepalive=keepalive,
                clean=bool(connect_flags & 2),
                username=rest.text() if connect_flags & 0x80 else None,
                password=rest.take(rest.number(2)) if connect_flags & 0x40 else None,
            )
        if kind == PUBLISH:
            qos = flags >> 1 & 3
            return cls(
                kind,
                version,
                topic=rest.text(),
                mid=rest.number(2) if qos else 0,
                properties=rest.properties(version),
                payload=rest.data,
                qos=qos,
                retain=bool(flags & 1),
                duplicate=bool(flags & 8),
            )
        if kind == DISCONNECT:
            reason = rest.number(1) if body else 0
            return cls(kind, version, reason=reason, properties=rest.properties(version) if len(body) > 1 else b"")
        if kind == PINGREQ:
            return cls(kind, version)
        mid = rest.number(2)
        if kind == PUBACK:
            return cls(kind, version, mid, reason=rest.number(1) if rest.data else 0)
        properties, filters = rest.properties(version), []
        while rest.data:
            filters.append((rest.text(), rest.number(1) if kind == SUBSCRIBE else 0))
        return cls(kind, version, mid, properties=properties, filters=tuple(filters))


class _Fields:
    """What is left of a packet."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self) -> str:
        return self.take(self.number(2)).decode()

    def properties(self, version: int) -> bytes:
        return self.take(self.length()) if version == 5 else b""

    def length(self) -> int:
        """A variable byte integer (MQTT 5, 1.5.5)"""
        byte = self.number(1)
        return byte if byte < 0x80 else byte - 0x80 + (self.length() << 7)


def mqtt_text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


class Conversation:
    """A broker's end of one connection. connect: the client's CONNECT. No wait takes longer than LIMIT."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._version = 4
        self.connect = self.expect(CONNECT)
        self._version = self.connect.version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> Packet | None:
        """Return the next packet that is no PINGREQ; None at the end of the connection."""
        while True:
            first = self._socket.recv(1)
            if not first:
                return None
            length = self._exactly(1)
            while length[-1] >= 0x80:
                length += self._exactly(1)
            body = self._exactly(_Fields(length).length())
            packet = Packet.read(first[0], body, self._version)
            if packet.kind != PINGREQ:
                return packet
            self._write(PINGRESP << 4, b"")

    def expect(self, kind: int) -> Packet:
        packet = self.read()
        assert packet is not None, "the client has closed"
        assert packet.kind == kind, packet
        return packet

    def is_closed(self) -> bool:
        """Whether the client says nothing more and closes."""
        try:
            return self.read() is None
        except ConnectionResetError:
            return True

    def connack(self, reason: int = 0, properties: bytes = b"", session_present: bool = False) -> None:
        self._write(CONNACK << 4, bytes([session_present, reason]) + self._properties(properties))

    def puback(self, packet: Packet, reason: int = 0) -> None:
        self._write(PUBACK << 4, packet.mid.to_bytes(2, "big") + (bytes([reason]) if reason else b""))

    def suback(self, packet: Packet, *reasons: int) -> None:
        codes = bytes(reasons or (qos for _, qos in packet.filters))
        self._write(SUBACK << 4, packet.mid.to_bytes(2, "big") + self._properties(b"") + codes)

    def deliver(
        self,
        topic: str | bytes,
        payload: bytes,
        mid: int = 0,
        *,
        retain: bool = False,
        duplicate: bool = False,
        properties: bytes = b"",
    ) -> None:
        """Send a PUBLISH. mid: 0 for QoS 0."""
        name = mqtt_text(topic) if isinstance(topic, str) else len(topic).to_bytes(2, "big") + topic
        body = name + (mid.to_bytes(2, "big") if mid else b"") + self._properties(properties) + payload
        self._write(PUBLISH << 4 | duplicate << 3 | bool(mid) << 1 | retain, body)

    def deliver_at_once(self, topic: str, payloads: Sequence[bytes]) -> None:
        """Send many with QoS 0 in one piece."""
        name, properties = mqtt_text(topic), self._properties(b"")
        self.send(b"".join(self._packet(PUBLISH << 4, name + properties + payload) for payload in payloads))

    def disconnect(self, reason: int) -> None:
        """Say why, as MQTT 5 allows, and close."""
        self._write(DISCONNECT << 4, bytes([reason, 0]))
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _properties(self, properties: bytes) -> bytes:
        return bytes([len(properties)]) + properties if self._version == 5 else b""

    def _write(self, first: int, body: bytes) -> None:
        self.send(self._packet(first, body))

    @staticmethod
    def _packet(first: int, body: bytes) -> bytes:
        size, length = len(body), bytearray()
        while True:
            size, byte = size >> 7, size & 0x7F
            length.append(byte | (0x80 if size else 0))
            if not size:
                return bytes([first]) + length + body

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            assert part, "the connection ended within a packet"
            data += part
        return data


class ScriptedBroker:
    """An MQTT broker on a real socket whose every word is the test's. context: of TLS, where a test sets one."""

    def __init__(self) -> None:
        self.context: ssl.SSLContext | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LIMIT)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def accept(self) -> Conversation:
        """Wait for a client and its CONNECT."""
        return Conversation(self.accept_socket())

    def accept_socket(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(LIMIT)
        if self.context is None:
            return connection
        try:
            return self.context.wrap_socket(connection, server_side=True)
        except OSError:
            connection.close()
            raise
