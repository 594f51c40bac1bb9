"""Stand-ins for the other side of an interface: each provides one of ours and remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """What a broker's edge told its client. received: deliveries; told: the rest, in order."""

    def __init__(self) -> None:
        self.received: list[Delivery] = []
        self.told: list[str] = []

    def messages_received(self, deliveries: Sequence[Delivery]) -> None:
        self.received += deliveries

    def broker_connected(self) -> None:
        self.told.append("connected")

    def broker_lost(self, reason: str) -> None:
        self.told.append(f"lost: {reason}")

    def broker_congested(self) -> None:
        self.told.append("congested")

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


class ThreadedMemoryReactor(MemoryReactorClock):
    """A reactor of memory to which another thread may hand calls; they run in a turn of their own."""

    def callFromThread(self, f: Any, *args: Any, **keywords: Any) -> None:
        self.callLater(0, f, *args, **keywords)
