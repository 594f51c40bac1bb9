"""The MQTT edge: with ``mqttclient`` all that knows paho, and the only module that runs in a thread of its own.

The thread drives paho by its public ``loop_read``, ``loop_write``, ``loop_misc``. What the reactor has for the broker
comes through a ``Handover``; what the broker has for the reactor is collected while the socket has bytes and handed
over in one call. So neither side waits for the other, and the GIL changes hands rarely.

Rules: publications go out in order, at most a window of them unacknowledged (paho walks its backlog at every PUBACK,
so the backlog stays here); subscriptions are renewed at every CONNACK before anything else is sent; deliveries are
acknowledged when the reactor says so, and only on the connection on which they came.
"""

from __future__ import annotations

import random
import select
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode
from twisted.logger import Logger

from ocppgw.handover import Acknowledge, Handover, Subscribe
from ocppgw.interfaces import Delivery, Properties, Publication
from ocppgw.mqttclient import PublishProperties, disconnect, make_client, words
from ocppgw.settings import BrokerAddress, Mqtt

WINDOW = 1000
"""Publications that wait for their PUBACK at one time, fewer where the broker's Receive Maximum says so."""
MAX_UNTAKEN = 5000
"""Deliveries that the reactor has not taken yet; above that the socket is not read."""
FILTERS_PER_SUBSCRIBE = 8
"""AWS IoT closes the connection for more than 8 in one SUBSCRIBE; the others do not care."""
FIRST_DELAY, LAST_DELAY = 1.0, 30.0
"""Seconds between attempts to connect, doubled each time, plus or minus a fifth."""
LONGEST_ASIDE = 600.0
"""Seconds that we stand aside at most for another client with our client id."""
SHORT_LIVED = 10.0
"""Seconds: three connections in a row that end sooner mean that somebody else uses our client id."""
GIVE_UP = 5
"""Short connections in a row over which the same publication stays the oldest one until it is given up."""
RETRY_AT_STOP = 0.5
"""Seconds between attempts to connect while a stop still has something to send."""
TURN = 1.0
"""Seconds between looks at MQTT's keep alive."""
READS = 100
"""Reads of the socket until what has come is handed over at the latest."""
PACKET_HEADER = 9
"""Bytes of a PUBLISH beside topic, properties and payload (MQTT 5, 3.3.1 and 3.3.2)."""

_SESSION_TAKEN_OVER = 0x8E
_UNSUPPORTED_VERSION = 0x84


class LinkEvents(Protocol):
    """What the reactor is told, in its own thread."""

    def link_connected(self, version: str) -> None:
        """CONNACK has come; subscriptions are being renewed."""

    def link_lost(self, reason: str) -> None:
        """The connection is gone."""

    def link_failed(self, reason: str) -> None:
        """An attempt to connect has failed; the next one is under way."""

    def link_taken_over(self, delay: float) -> None:
        """The connection is gone: another client uses our client id. The next attempt is made in delay seconds."""

    def link_received(self, deliveries: list[Delivery]) -> None:
        """Messages have come."""

    def link_subscribed(self, results: list[tuple[str, int | None]]) -> None:
        """Granted QoS by filter, None where it was refused."""

    def link_refused(self, topic: str, reason: str) -> None:
        """The broker has not taken a publication and never will."""

    def link_drained(self) -> None:
        """As many publications are left as was asked for."""

    def link_ended(self) -> None:
        """The thread is at its end."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    generation: int
    mid: int
    qos: int


class Link:
    """The thread, and the one paho client that it drives. start and stop are called by the reactor."""

    log = Logger()

    def __init__(
        self,
        settings: Mqtt,
        address: BrokerAddress,
        client_id: str,
        queue: Handover,
        events: LinkEvents,
        call_in_reactor: Callable[..., Any],
    ) -> None:
        self._settings = settings
        self._address = address
        self._client_id = client_id
        self._queue = queue
        self._events = events
        self._call = call_in_reactor
        self._deadline: float | None = None
        # The first one is tried; a version that has once connected stays the only one.
        self._versions = ["5", "3.1.1"] if settings.version == "auto" else [settings.version]
        self._client: paho.Client | None = None
        self._generation = 0
        self._reached = False
        self._connected_at: float | None = None
        self._reason = ""
        self._refusal: ReasonCode | None = None
        self._short_lived = 0
        self._aside = 0.0
        self._stuck: Publication | None = None
        self._stuck_times = 0
        self._window = WINDOW
        self._max_packet: int | None = None
        self._filters: dict[str, int] = {}
        self._subscribing: dict[int, list[str]] = {}
        self._unacknowledged: dict[int, Publication] = {}
        self._batch: list[Delivery] = []

    def start(self) -> None:
        """Start the thread; not before the daemon has forked."""
        threading.Thread(target=self._run, name="ocppgw-mqtt", daemon=True).start()

    def stop(self, limit: float) -> None:
        """Send what is queued for at most limit seconds, then disconnect and end."""
        self._deadline = time.monotonic() + limit
        self._queue.wake()

    # The thread's side

    def _run(self) -> None:
        delay = FIRST_DELAY
        while not self._over():
            self._reason, self._refusal, self._reached = "", None, False
            try:
                if self._client is None:
                    self._client = self._make_client()
                self._client.reconnect()
                self._reached = True
                self._generation += 1
                self._serve(self._client)
            except (OSError, ValueError) as error:
                self._reason = words(error)
            except Exception:
                self.log.failure("in the thread of the MQTT client")
                self._reason = "internal error"
                self._replace_client()
            if self._over():
                break
            if self._deadline is not None:
                # A stop waits for the broker as long as there is something to be sent.
                self._connected_at = None
                self._wait(RETRY_AT_STOP)
                continue
            connected_at, self._connected_at = self._connected_at, None
            if connected_at is not None:
                delay = self._after_loss(time.monotonic() - connected_at)
            elif self._try_other_version():
                continue
            else:
                self._call(self._events.link_failed, self._reason)
            self._wait(delay * random.uniform(0.8, 1.2))  # noqa: S311
            delay = min(delay * 2, LAST_DELAY)
        self._call(self._events.link_ended)

    def _after_loss(self, lived: float) -> float:
        """Tell that a connection has ended; give back the seconds until the next attempt."""
        self._short_lived = self._short_lived + 1 if lived < SHORT_LIVED else 0
        if self._is_stuck():
            self._call(self._events.link_lost, self._reason)
            return FIRST_DELAY
        taken_over = self._refusal is not None and self._refusal.value == _SESSION_TAKEN_OVER
        if taken_over or self._short_lived >= 3:
            # Twice as long each time, until we are left alone: else the two would throw each other out for ever.
            self._aside = min(2 * self._aside, LONGEST_ASIDE) if self._aside else LAST_DELAY
            self._call(self._events.link_taken_over, self._aside)
            return self._aside
        if lived >= SHORT_LIVED:
            self._aside = 0.0
        self._call(self._events.link_lost, self._reason)
        return FIRST_DELAY

    def _try_other_version(self) -> bool:
        """Change to the other version where the broker may not speak this one; whether to try it at once.

        A broker that speaks only 3.1.1 refuses a CONNECT 5, or closes without a word.
        """
        about_version = self._refusal is None or self._refusal.value == _UNSUPPORTED_VERSION
        if not self._reached or not about_version or len(self._versions) < 2:
            return False
        self._versions.reverse()
        self._replace_client()
        return self._versions[0] == "3.1.1"

    def _replace_client(self) -> None:
        """Take a new client, and take back what the old one has not delivered."""
        if self._client is not None and (sock := self._client.socket()) is not None:
            sock.close()
        self._client = None
        self._queue.put_back(self._unacknowledged.values())
        self._unacknowledged.clear()

    def _is_stuck(self) -> bool:
        """Whether one publication may be why the broker closes the connection, again and again.

        It is the oldest unacknowledged one, and stays so from one short connection to the next. After a few of them it
        is given up, or nothing else would ever get through.
        """
        mid, oldest = next(iter(self._unacknowledged.items()), (0, None))
        if oldest is None or not self._short_lived:
            self._stuck, self._stuck_times = None, 0
            return False
        self._stuck_times = self._stuck_times + 1 if oldest is self._stuck else 1
        self._stuck = oldest
        if self._stuck_times >= GIVE_UP:
            self._stuck, self._stuck_times = None, 0
            del self._unacknowledged[mid]
            self._replace_client()
            reason = f"it closes the connection over one of {len(oldest.payload)} bytes"
            self._call(self._events.link_refused, oldest.topic, reason)
            self._publication_finished(oldest)
            return True
        return self._stuck_times > 1

    def _over(self) -> bool:
        """Whether to end: a stop was asked for, and nothing is left to be sent, or no time to send it."""
        deadline = self._deadline
        return deadline is not None and (not self._queue.pending or time.monotonic() >= deadline)

    def _wait(self, seconds: float) -> None:
        """Wait, but not beyond a stop."""
        until = time.monotonic() + seconds
        while not self._over() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _make_client(self) -> paho.Client:
        client = make_client(self._settings, self._address, self._client_id, self._versions[0])
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def _serve(self, client: paho.Client) -> None:
        """Carry everything both ways until the connection is gone."""
        sock: Any = client.socket()
        decrypted: Callable[[], int] = getattr(sock, "pending", lambda: 0)
        fd, poller = sock.fileno(), select.poll()
        poller.register(self._queue, select.POLLIN)
        poller.register(fd, select.POLLIN)
        looked = time.monotonic()
        while client.socket() is not None:
            readable = self._queue.unacknowledged < MAX_UNTAKEN
            poller.modify(fd, (readable and select.POLLIN) | (client.want_write() and select.POLLOUT))
            # What TLS or the WebSocket wrapper has decrypted already, poll does not see.
            at_once = readable and decrypted() > 0
            ready = dict(poller.poll(0 if at_once else TURN * 1000))
            if self._queue.fileno() in ready:
                self._queue.woken()
            if at_once or ready.get(fd, 0) & ~select.POLLOUT:
                self._read(client, fd, decrypted)
            if self._connected_at is not None:
                self._send_queued(client)
            if client.want_write():
                client.loop_write()
            if time.monotonic() - looked >= TURN:
                looked = time.monotonic()
                client.loop_misc()
            if self._deadline is not None and self._finish(client):
                return

    def _read(self, client: paho.Client, fd: int, decrypted: Callable[[], int]) -> None:
        """Read while there is something, so that the reactor gets one batch."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        for _ in range(READS):
            if client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS or client.socket() is None:
                break
            if not (decrypted() or poller.poll(0)):
                break
        if self._batch:
            batch, self._batch = self._batch, []
            self._queue.delivered(len(batch))
            self._call(self._events.link_received, batch)

    def _send_queued(self, client: paho.Client) -> None:
        """Send commands, then publications as far as the window allows."""
        subscribing: list[tuple[str, int]] = []
        while self._queue.commands:
            command = self._queue.commands.popleft()
            if isinstance(command, Subscribe):
                self._filters[command.topic_filter] = command.qos
                subscribing.append((command.topic_filter, command.qos))
            elif isinstance(command, Acknowledge):
                self._acknowledge(client, command)
            else:
                self._subscribe(client, subscribing)
                subscribing = []
                self._filters.pop(command.topic_filter, None)
                client.unsubscribe(command.topic_filter)
        self._subscribe(client, subscribing)
        while self._queue.publications and len(self._unacknowledged) < self._window:
            self._publish(client, self._queue.publications.popleft())

    def _subscribe(self, client: paho.Client, filters: list[tuple[str, int]]) -> None:
        for start in range(0, len(filters), FILTERS_PER_SUBSCRIBE):
            part = filters[start : start + FILTERS_PER_SUBSCRIBE]
            _, mid = client.subscribe(part)
            if mid is not None:
                self._subscribing[mid] = [topic_filter for topic_filter, _ in part]

    def _acknowledge(self, client: paho.Client, command: Acknowledge) -> None:
        for delivery in command.deliveries:
            ticket = delivery.ticket
            if isinstance(ticket, _Ticket) and ticket.qos and ticket.generation == self._generation:
                client.ack(ticket.mid, ticket.qos)

    def _publish(self, client: paho.Client, publication: Publication) -> None:
        try:
            mid = self._hand_over(client, publication)
        except (ValueError, OverflowError, struct.error) as error:
            # Too large for the broker, or for any packet: sent again and again it would cost the connection each time.
            self._call(self._events.link_refused, publication.topic, str(error))
            mid = None
        if mid is not None and publication.qos:
            self._unacknowledged[mid] = publication
        else:
            self._publication_finished(publication)

    def _hand_over(self, client: paho.Client, publication: Publication) -> int:
        """Have paho send a publication; gives back its packet identifier."""
        topic, payload, properties = publication.topic, publication.payload, None
        size = len(payload) + len(topic.encode()) + PACKET_HEADER
        if publication.properties is not None and self._versions[0] == "5":
            properties = PublishProperties(publication.properties)
            size += len(properties.pack())
        if self._max_packet is not None and size > self._max_packet:
            raise ValueError(f"{size} bytes, {self._max_packet} are allowed")
        # The packet identifiers wrap around; one that is still in use is skipped.
        taken = MQTTErrorCode.MQTT_ERR_QUEUE_SIZE
        while (info := client.publish(topic, payload, publication.qos, publication.retain, properties)).rc == taken:  # type: ignore[arg-type]
            pass
        return info.mid

    def _publication_finished(self, publication: Publication) -> None:
        if self._queue.finished(publication):
            self._call(self._events.link_drained)

    def _finish(self, client: paho.Client) -> bool:
        """Disconnect when everything is sent or the time is up; whether the connection is at its end."""
        connected = self._connected_at is not None
        busy = self._queue.pending or (connected and (self._queue.commands or client.want_write()))
        if busy and time.monotonic() < (self._deadline or 0.0):
            return False
        disconnect(client, end_session=connected)
        until = time.monotonic() + 1.0
        while client.want_write() and client.socket() is not None and time.monotonic() < until:
            client.loop_write()
            time.sleep(0.01)
        return True

    # paho's callbacks, in the thread

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            self._refusal, self._reason = reason, f"refused: {reason}"
            return
        self._connected_at = time.monotonic()
        self._window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self._max_packet = getattr(properties, "MaximumPacketSize", None)
        version = self._versions[0]
        self._versions = [version]
        self._subscribing.clear()
        self._subscribe(client, list(self._filters.items()))
        self._call(self._events.link_connected, version)

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if self._connected_at is None:
            self._reason = self._reason or "closed by the broker before CONNACK"
        elif not self._reason:
            from_broker = flags.is_disconnect_packet_from_server
            self._refusal = reason if from_broker else None
            self._reason = f"closed by the broker: {reason}" if from_broker else "connection lost"

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        ticket = _Ticket(self._generation, message.mid, message.qos)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        expiry = getattr(message.properties, "MessageExpiryInterval", None)
        properties = Properties(expiry=expiry) if expiry is not None else None
        payload = bytes(message.payload)
        self._batch.append(Delivery(topic, payload, message.retain, message.dup, properties, ticket))

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        publication = self._unacknowledged.pop(mid, None)
        if publication is None:
            return
        if reason.is_failure:
            self._call(self._events.link_refused, publication.topic, str(reason))
        self._publication_finished(publication)

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any) -> None:
        filters = self._subscribing.pop(mid, [])
        results = [
            (topic_filter, None if reason.is_failure else reason.value)
            for topic_filter, reason in zip(filters, reasons, strict=False)
        ]
        self._call(self._events.link_subscribed, results)
