"""The connection to the MQTT broker as the reactor sees it: a queue with two marks, and one log line for each change.

What runs in the other thread is in ``mqtt``; this module runs in the reactor's thread alone and knows nothing of paho.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from zope.interface import implementer

from ocppgw.handover import Acknowledge, Handover, Subscribe, Unsubscribe
from ocppgw.interfaces import Delivery, IBroker, IBrokerClient, Publication, SubscriptionRefused
from ocppgw.mqtt import Link
from ocppgw.settings import BrokerAddress, Mqtt, Upstream

LOG_INTERVAL = 60.0
"""Seconds between two log lines that say the same."""
STOP_GRACE = 2.0
"""Seconds beyond its limit that the thread gets to end."""

_TAKEN_OVER = (
    "another client of broker {broker} uses the client id {client_id}: give each gateway its own --node; "
    "waiting {seconds:g} s"
)


@implementer(IBroker)
class Broker(Service):
    """A broker that is always there or coming back.

    client: whom to tell; set before the service starts. drain_seconds: what a stop may take to send what is queued.
    """

    log = Logger()
    client: IBrokerClient

    def __init__(
        self,
        settings: Mqtt,
        address: BrokerAddress,
        name: str,
        client_id: str,
        limits: Upstream,
        drain_seconds: float,
        reactor: Any,
    ) -> None:
        self._reactor = reactor
        self._name = name
        self._client_id = client_id
        self._limits = limits
        self._drain_seconds = drain_seconds
        self._queue = Handover()
        self._link = Link(settings, address, client_id, self._queue, self, reactor.callFromThread)
        self._wake_scheduled = False
        self._congested = False
        self._subscribing: dict[str, Deferred[int]] = {}
        self._ended: Deferred[None] | None = None
        self._said: dict[str, float] = {}
        self.away_since: float | None = reactor.seconds()
        self.carries_properties = settings.version != "3.1.1"

    def startService(self) -> None:
        """Start the thread."""
        self.running = True
        self.away_since = self._reactor.seconds()
        self._link.start()

    def stopService(self) -> Deferred[None]:
        """Send what is queued, disconnect, and wait for the thread; all of it within a limit."""
        if not self.running:
            return succeed(None)
        self.running = False
        ended = self._ended = Deferred()
        self._link.stop(self._drain_seconds if self.away_since is None or self._queue.pending else 0.0)
        ended.addTimeout(self._drain_seconds + STOP_GRACE, self._reactor, lambda result, timeout: None)
        return ended.addCallback(lambda _: self._say_what_is_left())

    def _say_what_is_left(self) -> None:
        if self._queue.pending:
            self.log.error(
                "{count} messages did not reach broker {broker}", count=self._queue.pending, broker=self._name
            )

    # IBroker

    def publish(self, publication: Publication) -> None:
        """Queue a message."""
        self._queue.publish(publication)
        if not self._congested and (
            self._queue.pending >= self._limits.max_queue or self._queue.pending_bytes >= self._limits.max_queue_bytes
        ):
            self._congested = True
            self.client.broker_congested()
            self._queue.low_water = (self._limits.max_queue // 2, self._limits.max_queue_bytes // 2)
            if self._queue.is_low():
                # The thread was quicker than this line: it may have nothing left at which it would look.
                self._reactor.callLater(0, self.link_drained)
        self._wake()

    def subscribe(self, topic_filter: str, qos: int) -> Deferred[int]:
        """Subscribe from now on."""
        subscribed: Deferred[int] = Deferred(lambda _: None)
        self._forget(topic_filter)
        self._subscribing[topic_filter] = subscribed
        self._queue.command(Subscribe(topic_filter, qos))
        self._wake()
        return subscribed

    def unsubscribe(self, topic_filter: str) -> None:
        """Subscribe no longer."""
        self._forget(topic_filter)
        self._queue.command(Unsubscribe(topic_filter))
        self._wake()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Send PUBACKs."""
        self._queue.command(Acknowledge(tuple(deliveries)))
        self._wake()

    def _forget(self, topic_filter: str) -> None:
        waiting = self._subscribing.pop(topic_filter, None)
        if waiting is not None:
            waiting.addErrback(lambda failure: None)
            waiting.cancel()

    def _wake(self) -> None:
        """Wake the thread once for everything that this turn of the reactor has for it."""
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self._reactor.callLater(0, self._wake_now)

    def _wake_now(self) -> None:
        self._wake_scheduled = False
        self._queue.wake()

    # LinkEvents

    def link_connected(self, version: str) -> None:
        """Say so, and tell the client."""
        self.away_since = None
        self.carries_properties = version == "5"
        # What was said of another client with our id stands: being connected again is part of that.
        self._said = {said: at for said, at in self._said.items() if said.startswith(_TAKEN_OVER)}
        self.log.info("connected to broker {broker} (MQTT {version})", broker=self._name, version=version)
        self.client.broker_connected()

    def link_lost(self, reason: str) -> None:
        """Say so, and tell the client."""
        self.away_since = self._reactor.seconds()
        self.log.error("connection to broker {broker} lost: {reason}", broker=self._name, reason=reason)
        self.client.broker_lost(reason)

    def link_failed(self, reason: str) -> None:
        """Say so, not more often than needed."""
        self._say("cannot connect to broker {broker}: {reason}; trying again", reason)

    def link_taken_over(self, delay: float) -> None:
        """Say so: two gateways with one name would throw each other out for ever."""
        self.away_since = self._reactor.seconds()
        reason = "another client uses our client id"
        self._say(_TAKEN_OVER, reason, seconds=delay)
        self.client.broker_lost(reason)

    def link_received(self, deliveries: list[Delivery]) -> None:
        """Hand them on."""
        self.client.messages_received(deliveries)

    def link_subscribed(self, results: list[tuple[str, int | None]]) -> None:
        """Tell who subscribed; a renewal after a reconnection tells nobody."""
        for topic_filter, qos in results:
            waiting = self._subscribing.pop(topic_filter, None)
            if waiting is not None and qos is not None:
                waiting.callback(qos)
            elif waiting is not None:
                waiting.errback(SubscriptionRefused(topic_filter))
            elif qos is None:
                self._say("broker {broker} no longer grants subscriptions (e.g. {topic})", "", topic=topic_filter)

    def link_refused(self, topic: str, reason: str) -> None:
        """Say so: a message is lost."""
        self._say("broker {broker} refuses messages: {reason} (e.g. on {topic})", reason, topic=topic)
        self.client.publication_refused()

    def link_drained(self) -> None:
        """Tell the client that there is room again."""
        if not self._congested:
            return
        self._congested = False
        self.client.broker_relieved()

    def link_ended(self) -> None:
        """End the stop."""
        self._queue.close()
        ended, self._ended = self._ended, None
        if ended is not None and not ended.called:
            ended.callback(None)

    def _say(self, text: str, reason: str, **fields: object) -> None:
        now = self._reactor.seconds()
        # Sizes in a reason do not make it another one.
        said = text + re.sub(r"\d+", "#", reason)
        if now - self._said.get(said, -LOG_INTERVAL) >= LOG_INTERVAL:
            self._said[said] = now
            self.log.error(text, broker=self._name, client_id=self._client_id, reason=reason, **fields)
