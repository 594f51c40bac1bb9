"""Where charge points and topics meet: the cred realm, which *is* the registry of sessions, and the topic mapping.

Upstream a message gets its topic and its envelope and goes to the broker. Downstream a batch of deliveries is given
to the sessions that they are for, and acknowledged in the order of receipt. Knows neither WebSocket nor paho.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from twisted.application.service import Service
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import Interface, implementer

from ocppgw import exactjson
from ocppgw.interfaces import (
    Delivery,
    IAdmission,
    IBroker,
    IBrokerClient,
    ICentralSystem,
    IChargePoint,
    Properties,
    Publication,
    SubscriptionRefused,
)
from ocppgw.messages import Call, CallResult, Message, ProtocolFault, Send, encode_envelope, encode_frame
from ocppgw.schemas import Schemas
from ocppgw.session import Rules, Session
from ocppgw.settings import Settings
from ocppgw.topics import TopicTemplate, encode_level, encode_text

GOING_AWAY = 1001
REPLACED = 4001
"""Close codes (RFC 6455, 7.4.1; 4000 and above are ours)."""

LOG_INTERVAL = 60.0
"""Seconds between two log lines about messages for charge points that are not here; all of them are counted."""
UNDER_WAY = 10.0
"""Seconds for which the end of a session is remembered."""
MAX_ENDED = 10_000
ENVELOPE = 65536
"""Bytes that an envelope may have beside its payload; a payload may be twice as long with JSON's escapes."""
UNKNOWN_ACTION = "-"
"""Stands for ${action} where an answer matches no CALL."""
MAX_VALUE = 255
"""Characters of an id or an action that go into a topic or a property: what a service sent may be endless."""

MAX_REPORTED = 8192
"""Bytes of a refused frame that are published: escaped, one byte can become six."""


@implementer(IRealm, IAdmission, IBrokerClient)
class Gateway(Service):
    """The registry of connected charge points, by topic-safe identity, and the bridge between them and the broker."""

    log = Logger()

    def __init__(
        self, settings: Settings, broker: IBroker, clock: IReactorTime, schemas: Schemas | None = None
    ) -> None:
        self.settings = settings
        self._schemas = schemas
        self._rules = self._make_rules({})
        self.sessions: dict[str, Session] = {}
        # Sessions that have ended a moment ago: what was under way to them has its end with them.
        self._ended: OrderedDict[str, tuple[Session, float]] = OrderedDict()
        self._strays = 0
        self._stray_logged = -LOG_INTERVAL
        self.counters: Counter[str] = Counter()
        self._broker = broker
        self._clock = clock
        self._congested = False
        self._stopping = False
        self._emptied: Deferred[None] | None = None

    # The realm

    def refusal(self, identity: str) -> str | None:
        """Why an identity may not connect now, or None."""
        if encode_level(identity) in self.settings.topics.reserved:
            return "reserved"
        away_since = self._broker.away_since
        if self._stopping or (
            away_since is not None and self._clock.seconds() - away_since >= self.settings.mqtt.outage_grace
        ):
            return "broker away"
        return None

    def requestAvatar(
        self, avatarId: bytes | tuple[()], mind: object, *interfaces: type[Interface]
    ) -> tuple[type[Interface], Session, Callable[[], None]]:
        """Make the session of a charge point that has logged in. It is registered when its handshake is complete."""
        if ICentralSystem not in interfaces:
            raise NotImplementedError("a charge point speaks to an ICentralSystem")
        cid = bytes(avatarId).decode("utf-8")
        charge_point = IChargePoint(mind)
        session = Session(cid, encode_level(cid), charge_point, self, self._clock, self._rules_for(cid))
        return ICentralSystem, session, partial(self._session_ended, session)

    def _rules_for(self, cid: str) -> Rules:
        changes = self.settings.changes_for(cid)
        return self._make_rules(changes) if changes else self._rules

    def _make_rules(self, changes: Mapping[str, Any]) -> Rules:
        """Put together what holds for a charge point. changes: what differs for it."""
        settings = self.settings
        of_downstream = {name: value for name, value in changes.items() if hasattr(settings.dnstream, name)}
        downstream = replace(settings.dnstream, **of_downstream)
        checking = changes.get("message_format_checking", settings.message_format_checking)
        size = settings.limits.message_size
        return Rules(
            settings.upstream,
            downstream,
            min(size, downstream.max_outgoing_size or size),
            self._schemas if checking in ("all", "upstream_only") else None,
            self._schemas if checking in ("all", "dnstream_only") else None,
            changes.get("on_violation", settings.on_violation) == "reject",
        )

    def session_opened(self, session: Session) -> None:
        """Register a session, in the place of an older one of the same identity."""
        if self._stopping:
            # It was logging in when the others were told.
            self._send_away(session)
            return
        old = self.sessions.get(session.level)
        self.sessions[session.level] = session
        if old is not None:
            self.log.info("charge point {cid} connects again, the older connection is closed", cid=session.level)
            self.count("replaced")
            old.closed("replaced")
            old.charge_point.close(REPLACED, "replaced")
        topic_filter = self._filter(session)
        if old is None or self._filter(old) != topic_filter:
            if old is not None:
                self._broker.unsubscribe(self._filter(old))
            subscribed = self._broker.subscribe(topic_filter, self.settings.dnstream.qos)
            subscribed.addErrback(self._subscription_failed, session)
        if self._congested:
            session.charge_point.pause_reading()
        self.log.info(
            "charge point {cid} online with {version} from {remote}",
            cid=session.level,
            version=session.version,
            remote=session.charge_point.remote,
        )

    def _session_ended(self, session: Session) -> None:
        """Log out: only what is the session's own is taken down, a successor is not touched."""
        session.closed("disconnected")
        if self.sessions.get(session.level) is not session:
            return
        del self.sessions[session.level]
        self._ended[session.level] = (session, self._clock.seconds() + UNDER_WAY)
        self._ended.move_to_end(session.level)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        self._broker.unsubscribe(self._filter(session))
        self.log.info("charge point {cid} offline: {reason}", cid=session.level, reason=session.charge_point.ended)
        if self._emptied is not None and not self.sessions:
            self._emptied.callback(None)
            self._emptied = None

    def _subscription_failed(self, failure: Any, session: Session) -> None:
        failure.trap(SubscriptionRefused)
        self.count("subscription_refused")
        self.log.error(
            "the broker refused the subscription {topic}: nothing can be sent to charge point {cid}",
            topic=self._filter(session),
            cid=session.level,
        )

    # Upstream

    def publish(
        self, session: Session, message: Message, action: str | None, frame: bytes | None, late: bool = False
    ) -> None:
        """Publish a message of a charge point, or a delivery failure in its place."""
        topics = self.settings.topics
        if isinstance(message, (Call, Send)):
            action = message.action
            template = topics.overrides.get(action, topics.call)
        else:
            template = topics.reply if isinstance(message, CallResult) else topics.error
        if self.settings.payload_format == "array":
            payload = frame if frame is not None else encode_frame(message)
        else:
            payload = encode_envelope(message, action, **({"Late": True} if late else {}))
        values = self._values(session)
        values["action"] = encode_level(action[:MAX_VALUE]) if action else UNKNOWN_ACTION
        values["type"] = str(message.kind)
        values["id"] = encode_level(message.unique_id[:MAX_VALUE])
        self._publish(template, values, payload, self._properties(session, message, values))

    def publish_refused(self, session: Session, frame: bytes, fault: ProtocolFault) -> None:
        """Publish a frame that was refused, for services that want to know."""
        template = self.settings.topics.invalid
        if template is None:
            return
        report = {
            "cid": session.cid,
            "frame": frame[:MAX_REPORTED].decode("utf-8", "replace"),
            "code": fault.answer.code if fault.answer is not None else None,
            "detail": fault.reason,
        }
        self._publish(template, self._values(session), exactjson.dumps(report), None)

    def count(self, event: str) -> None:
        """Add one to a counter."""
        self.counters[event] += 1

    def _publish(
        self, template: TopicTemplate, values: dict[str, str], payload: bytes, properties: Properties | None
    ) -> None:
        self._broker.publish(
            Publication(template.render(values), payload, self.settings.upstream.qos, properties=properties)
        )

    def _properties(self, session: Session, message: Message, values: dict[str, str]) -> Properties | None:
        if not self._broker.carries_properties:
            return None
        fillers = ("Reply", values["action"], values["id"])
        return Properties(
            content_type="application/json",
            correlation_data=message.unique_id[:MAX_VALUE].encode("utf-8", "surrogatepass"),
            response_topic=self.settings.topics.downstream.render_concrete(values, fillers),
            user=(("cid", encode_text(session.cid)), ("version", session.version), ("node", self.settings.node)),
        )

    def _values(self, session: Session) -> dict[str, str]:
        return {"cid": session.level, "version": session.version}

    def _filter(self, session: Session) -> str:
        return self.settings.topics.downstream.render(self._values(session))

    # Downstream

    def messages_received(self, deliveries: Sequence[Delivery]) -> None:
        """Give each message to the session that it is for; all of them are taken over with that."""
        for delivery in deliveries:
            with self.log.failuresHandled("while delivering a message on {topic}", topic=delivery.topic):
                self._deliver(delivery)
        self._broker.acknowledge(deliveries)

    def _deliver(self, delivery: Delivery) -> None:
        if delivery.retain:
            # It would be repeated at every reconnection of the charge point.
            self.count("retained")
            self.log.warn("retained message on {topic} is not forwarded", topic=delivery.topic)
            return
        if len(delivery.payload) > 2 * self.settings.limits.message_size + ENVELOPE:
            # Reading it would hold everybody up, and no charge point could be sent what is in it.
            self.count("too_large_to_read")
            self.log.warn(
                "message on {topic} is not read: it has {size} bytes", topic=delivery.topic, size=len(delivery.payload)
            )
            return
        downstream = self.settings.topics.downstream
        values = downstream.match(delivery.topic)
        session = self.sessions.get(values["cid"]) if values is not None else None
        if session is not None:
            session.message_received(delivery)
            return
        ended, until = self._ended.get(values["cid"], (None, 0.0)) if values is not None else (None, 0.0)
        if ended is not None and self._clock.seconds() < until:
            ended.message_received(delivery)
            return
        self._stray(delivery)
        if values is not None:
            # A subscription that an earlier process of this name has left in the broker's session.
            self._broker.unsubscribe(downstream.render(values))

    def _stray(self, delivery: Delivery) -> None:
        self.count("unknown_identity")
        self._strays += 1
        if self._clock.seconds() - self._stray_logged >= LOG_INTERVAL:
            self._stray_logged = self._clock.seconds()
            self.log.info(
                "message on {topic}: no such charge point is connected here ({count} so far)",
                topic=delivery.topic,
                count=self._strays,
            )

    def publication_refused(self) -> None:
        """Count a message that no service will get."""
        self.count("publication_refused")

    def broker_connected(self) -> None:
        """Nothing to do: the broker's edge has renewed the subscriptions."""

    def broker_lost(self, reason: str) -> None:
        """Nothing to do: refusal() looks at how long it has been away."""

    def broker_congested(self) -> None:
        """Stop reading from charge points: what has not been read is kept by its sender."""
        self._congested = True
        self.log.warn(
            "messages for the broker pile up: reading from {count} charge points pauses", count=len(self.sessions)
        )
        for session in self.sessions.values():
            session.charge_point.pause_reading()

    def broker_relieved(self) -> None:
        """Read again."""
        self._congested = False
        self.log.info("the queue to the broker is short again: reading resumes")
        for session in self.sessions.values():
            session.charge_point.resume_reading()

    # Stop

    def stopService(self) -> Deferred[None]:
        """Close every charge point with 1001, and wait for their sockets, at most drain_seconds."""
        self.running = False
        self._stopping = True
        if not self.sessions:
            return succeed(None)
        emptied = self._emptied = Deferred()
        for session in list(self.sessions.values()):
            self._send_away(session)
        return emptied.addTimeout(self.settings.drain_seconds, self._clock, lambda result, timeout: None)

    def _send_away(self, session: Session) -> None:
        session.closed("shutting_down")
        session.charge_point.close(GOING_AWAY, "the gateway is shutting down")
