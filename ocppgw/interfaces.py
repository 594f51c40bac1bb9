"""Where two worlds meet: the WebSocket edge, the gateway and the MQTT edge know each other by these alone.

The joint is Twisted cred. The realm (the gateway) hands a charge point's connection, the mind, an avatar: to a charge
point the gateway *is* the central system. Only immutable values cross; bytes are on wires, str is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface


@dataclass(frozen=True, slots=True)
class Properties:
    """What MQTT 5 carries beside a payload (MQTT 5, 3.3.2.3); dropped on a 3.1.1 connection.

    expiry: seconds that the message had left when it was received, None for no limit.
    """

    content_type: str | None = None
    correlation_data: bytes | None = None
    response_topic: str | None = None
    user: tuple[tuple[str, str], ...] = ()
    expiry: int | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """A message on its way to the broker. qos: 0 or 1."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    properties: Properties | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that the broker delivered and that waits for our acknowledgement.

    ticket: what the broker's edge needs to acknowledge it; opaque to everybody else.
    """

    topic: str
    payload: bytes
    retain: bool = False
    duplicate: bool = False
    properties: Properties | None = None
    ticket: object = None


class IChargePoint(Interface):
    """The connection of one charge point; in cred's words the mind."""

    remote: str = Attribute("Where it connects from, 'host:port'.")
    version: str = Attribute("The negotiated subprotocol, e.g. 'ocpp1.6'; empty when none was agreed on.")
    ended: str = Attribute("Why the connection is over, in words for a log; empty while it is not.")

    def send(frame: bytes) -> bool:
        """Write one OCPP-J frame, JSON in UTF-8. False when the connection cannot take it any more."""

    def close(code: int, reason: str) -> None:
        """Close with a WebSocket close code (RFC 6455, 7.4) and a reason of at most 123 bytes."""

    def pause_reading() -> None:
        """Take no further frames from the socket until resume_reading: the broker's queue is full."""

    def resume_reading() -> None:
        """Undo pause_reading."""


class ICentralSystem(Interface):
    """What a charge point speaks to; in cred's words the avatar."""

    def opened() -> None:
        """The handshake is complete: frames may flow from now on."""

    def frame_received(frame: bytes) -> None:
        """Take one frame. Never raises for anything that a peer can send."""


class IAdmission(Interface):
    """Who decides, before any credentials are looked at, whether an identity may connect now."""

    def refusal(identity: str) -> str | None:
        """Why not: "reserved" (its topics would be somebody else's), "broker away"; None when it may."""


class IBroker(Interface):
    """A connection to an MQTT broker which is kept up for as long as the service runs."""

    away_since: float | None = Attribute("Reactor seconds since which the broker is not connected; None while it is.")
    carries_properties: bool = Attribute("False where it is known that the broker speaks no MQTT 5.")

    def publish(publication: Publication) -> None:
        """Queue a message. With QoS 1 it is kept, over reconnections, until the broker has acknowledged it."""

    def subscribe(topic_filter: str, qos: int) -> Deferred[int]:
        """Subscribe now and after every reconnection. Messages published after this call reach the broker later.

        Fires with the granted QoS; fails with SubscriptionRefused; is cancelled by unsubscribe.
        """

    def unsubscribe(topic_filter: str) -> None:
        """Undo subscribe."""

    def acknowledge(deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that these were taken over, in the order in which they were received (MQTT 5, 4.6)."""


class IBrokerClient(Interface):
    """Whom a broker's edge tells what happened. All calls come in the reactor's thread."""

    def messages_received(deliveries: Sequence[Delivery]) -> None:
        """Take a batch; acknowledge each of them sooner or later."""

    def broker_connected() -> None:
        """Subscriptions are renewed and the queue is being sent."""

    def broker_lost(reason: str) -> None:
        """The connection is gone; the edge keeps trying."""

    def publication_refused() -> None:
        """A message was given up, since the broker will never take it."""

    def broker_congested() -> None:
        """The queue has reached its high-water mark: stop reading from charge points."""

    def broker_relieved() -> None:
        """The queue is below its low-water mark again."""


class SubscriptionRefused(Exception):
    """The broker refused a topic filter, in most cases because of its access rules."""
