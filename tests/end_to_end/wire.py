"""What the tests hold in their hands: services on MQTT, charge points, and requests that no library would send."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from processes import START_LIMIT, Process, free_port, gateway, mosquitto
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

LIMIT = 20.0
"""Seconds that any one wait of these tests may take."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message that went over the broker. properties: what MQTT 5 had to add."""

    topic: str
    payload: bytes
    properties: Properties | None

    @property
    def content(self) -> Any:
        return json.loads(self.payload)


class Service:
    """A service on the broker, which hears all but commands. user: name and password."""

    def __init__(self, port: int, version: str = "5", user: tuple[str, str] | None = None) -> None:
        protocol = MQTTProtocolVersion.MQTTv5 if version == "5" else MQTTProtocolVersion.MQTTv311
        self._messages: list[Message] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        if user is not None:
            self._client.username_pw_set(*user)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._received
        self._client.reconnect_delay_set(1, 1)
        # Or each publication waits 40 ms for a delayed acknowledgement.
        self._client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.connect("127.0.0.1", port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        self.wait_subscribed()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait_subscribed(self) -> None:
        """Wait until the broker has acknowledged a subscription; it is renewed when the broker comes back."""
        assert self._subscribed.wait(LIMIT), "the broker did not acknowledge a subscription"
        self._subscribed.clear()

    def publish(self, topic: str, payload: bytes | str, retain: bool = False) -> None:
        """Publish, and wait until the broker has it."""
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(LIMIT)

    def send(self, cid: str, message: list[Any] | dict[str, Any]) -> None:
        """Send a message down to a charge point. cid: topic-safe."""
        self.publish(f"ocpp/cs/{cid}/x/y", json.dumps(message))

    def take(self, topic: str) -> Message:
        """Wait for the next message on this topic and take it out."""
        deadline = time.monotonic() + LIMIT
        with self._changed:
            while True:
                for index, message in enumerate(self._messages):
                    if message.topic == topic:
                        return self._messages.pop(index)
                assert self._changed.wait(deadline - time.monotonic()), f"nothing on {topic}; there is {self._topics()}"

    def left(self, word: str) -> list[str]:
        """Give back the topics, with this word in them, of messages that came and that nobody has taken."""
        with self._changed:
            return [topic for topic in self._topics() if word in topic]

    def _topics(self) -> list[str]:
        return [message.topic for message in self._messages]

    def _received(self, _client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        if message.topic.startswith("ocpp/cs/"):
            return  # that was ourselves
        with self._changed:
            self._messages.append(Message(message.topic, message.payload, message.properties))
            self._changed.notify_all()


class ChargePoint:
    """A charge point on the gateway's port. cid: its identity, as it is."""

    def __init__(
        self,
        port: int,
        cid: str,
        version: str = "ocpp1.6",
        *,
        password: bytes | None = None,
        path: str = "/ocpp",
    ) -> None:
        # A context manager also where it gives the connection at once: websockets 17 insists on it.
        self._connecting = connect(
            f"ws://127.0.0.1:{port}{path}/{quote(cid, safe='')}",
            subprotocols=[version],  # type: ignore[list-item]
            additional_headers=None if password is None else {"Authorization": basic(cid, password)},
            compression=None,
            max_size=None,
            open_timeout=LIMIT,
            ping_interval=None,
            proxy=None,
        )
        self.socket: ClientConnection = self._connecting.__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connecting.__exit__(None, None, None)

    def send(self, *frame: Any) -> None:
        """Send one frame, given by its elements."""
        self.socket.send(json.dumps(frame))

    def receive(self) -> Any:
        """Wait for a frame."""
        return json.loads(self.socket.recv(LIMIT))

    def heard(self) -> None:
        """Wait until the gateway has read all that was sent: a ping is answered in its turn."""
        assert self.socket.ping().wait(LIMIT), "no pong"

    def close_code(self) -> tuple[int | None, str | None]:
        """Wait until the gateway closes; its code and reason."""
        try:
            unexpected = self.socket.recv(LIMIT)
        except ConnectionClosed as closed:
            received = closed.rcvd
            return (None, None) if received is None else (received.code, received.reason)
        raise AssertionError(f"not closed; there came {unexpected!r}")


@dataclass(slots=True)
class Stage:
    """What a test meets. port: the gateway's; version: of MQTT, as the gateway speaks it."""

    gateway: Process
    service: Service
    port: int
    version: str

    @contextmanager
    def online(self, cid: str, version: str = "ocpp1.6", level: str = "") -> Iterator[ChargePoint]:
        """A charge point to which services can talk: what it said first has come through. level: cid as in topics."""
        with ChargePoint(self.port, cid, version) as charge_point:
            charge_point.send(2, "first", "Hello", {})
            self.service.take(f"ocpp/cp/{level or cid}/Hello")
            yield charge_point


def start_gateway(*arguments: str) -> Process:
    """Start the gateway and wait until its listeners are open and the broker is there."""
    process = gateway(*arguments)
    try:
        process.wait_for("connected to broker", START_LIMIT)
    except BaseException:
        process.stop()
        raise
    return process


@contextmanager
def set_up(
    directory: Path, broker: str = "mosquitto 5", settings: str = "", *arguments: str, ended: int = -15
) -> Iterator[Stage]:
    """Set the stage. broker: "mosquitto" or "embedded", and the version of MQTT.

    settings: a file's content; where it has listeners of its own, {endpoint} stands for that of the first.
    ended: the exit status that the gateway has at the end.
    """
    port, mqtt_port = free_port(), free_port()
    kind, version = broker.split(" ")
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    file = directory / "ocppgw.toml"
    if "[mqtt]" not in settings:
        settings += f'\n[mqtt]\nversion = "{version}"\n'
    file.write_text(settings.replace("{endpoint}", endpoint), encoding="utf-8")
    arguments += ("--config", str(file))
    if "{endpoint}" not in settings:
        arguments += ("--ws", endpoint)
    with ExitStack() as stack:
        if kind == "mosquitto":
            stack.enter_context(mosquitto(directory, "max_queued_messages 0", port=mqtt_port))
            arguments += ("--mqtt", f"mqtt://127.0.0.1:{mqtt_port}")
        else:
            arguments += ("--mqtt", f"embedded:{mqtt_port}")
        running = stack.enter_context(start_gateway(*arguments))
        service = stack.enter_context(Service(mqtt_port, version))
        yield Stage(running, service, port, version)
    # Once it has ended, so that a failure on the way down counts as well.
    assert_calm(running, ended)


def assert_calm(process: Process, status: int = -15) -> None:
    """See that a gateway met nothing that it did not expect, and ended when it was asked to."""
    assert not re.search("Traceback|Unhandled|CRITICAL", process.report()), process.report()
    assert process.returncode == status, process.report()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds that nothing tells of."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not in {LIMIT} s: {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether somebody listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def exactly(text: str | bytes) -> Any:
    """Parse JSON and keep what a double or a dict would lose: each digit, and the order of keys."""
    return json.loads(text, parse_int=Decimal, parse_float=Decimal, object_pairs_hook=lambda pairs: ("object", pairs))


def basic(name: str, password: bytes) -> str:
    """An Authorization header's value; a password is bytes (OCPP-J 1.6, 6.2.2)."""
    return "Basic " + base64.b64encode(name.encode() + b":" + password).decode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered with. headers: by their names in lower case."""

    status: int
    line: str
    headers: dict[str, str]
    body: str


def request(target: str | bytes, *headers: str, offered: Sequence[str] = ("ocpp1.6",)) -> bytes:
    """Write an upgrade request; the headers given come after the usual ones."""
    target = target.encode() if isinstance(target, str) else target
    lines = ["Host: localhost", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    lines += [f"Sec-WebSocket-Protocol: {token}" for token in offered]
    return b"GET " + target + b" HTTP/1.1\r\n" + "\r\n".join([*lines, *headers, "", ""]).encode()


def silent_charge_point(port: int, cid: str, path: str = "/ocpp") -> socket.socket:
    """Connect one that neither reads nor answers."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
    connection.sendall(request(f"{path}/{cid}"))
    assert connection.recv(65536).startswith(b"HTTP/1.1 101 ")
    return connection


def masked(payload: bytes) -> bytes:
    """Write a text frame of less than 126 bytes as a client does (RFC 6455, 5.2)."""
    return bytes([0x81, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


def ask(port: int, data: bytes) -> Answer:
    """Send bytes to the gateway and read what it answers, to its end unless it is a 101."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
            if received.startswith(b"HTTP/1.1 101 ") and b"\r\n\r\n" in received:
                break
    head, _, body = received.decode("utf-8", "replace").partition("\r\n\r\n")
    line, *fields = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return Answer(int(line.split(" ")[1]), line, headers, body)
