"""All that a charge point meets: a broker, the gateway, the example central system, and a third party who looks on."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import paho.mqtt.client as mqtt
from processes import START_LIMIT, Process, free_port, gateway, mosquitto

EXAMPLE = Path(__file__).parents[2] / "examples" / "central_system.py"


@dataclass(frozen=True, slots=True)
class Message:
    """One message that went over the broker; content: the JSON of its payload."""

    topic: str
    content: Any


class Onlooker:
    """A service of its own on the broker: hears all that is below ocpp/, in order, and can command."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.messages: list[Message] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
        self._client.on_connect = lambda client, *_: client.subscribe("ocpp/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._received
        self._client.connect("127.0.0.1", port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._subscribed.wait(10), "the broker did not acknowledge a subscription in 10 s"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        if error is not None:
            heard = [str(message)[:500] for message in self.messages]
            error.add_note("\n".join(["--- over the broker went:", *heard, "---"]))

    def wait_for(
        self, wanted: Callable[[Message], bool], what: str, timeout: float = 10.0, *, after: int = 0
    ) -> Message:
        """Wait for a message and return it; after: how many of those that came already to pass over."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for message in self.messages[after:]:
                    if wanted(message):
                        return message
                after = max(after, len(self.messages))
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise AssertionError(f"no {what} came over the broker in {timeout} s")

    def wait_for_call(self, cid: str, action: str, timeout: float = 10.0, *, after: int = 0) -> dict[str, Any]:
        """Wait for a CALL of a charge point and return its content."""
        topic = f"ocpp/cp/{cid}/{action}"
        return self.wait_for(lambda message: message.topic == topic, topic, timeout, after=after).content

    def command(self, cid: str, action: str, payload: dict[str, Any]) -> Message:
        """Send a CALL to a charge point and return what answers it, whichever topic that comes on."""
        unique_id = str(uuid.uuid4())
        call = {"MessageTypeId": 2, "UniqueId": unique_id, "Action": action, "Payload": payload}
        after = len(self.messages)
        self._client.publish(f"ocpp/cs/{cid}/Request/{action}", json.dumps(call), qos=1)
        topics = (f"ocpp/cp/Reply/{cid}", f"ocpp/cp/Error/{cid}")
        return self.wait_for(
            lambda message: message.topic in topics and message.content["UniqueId"] == unique_id,
            f"answer to {action} {unique_id}",
            after=after,
        )

    def calls(self, cid: str) -> Counter[str]:
        """How many CALLs of each action a charge point has sent."""
        contents = [message.content for message in self.messages if message.topic.startswith(f"ocpp/cp/{cid}/")]
        return Counter(content["Action"] for content in contents)

    def call_errors(self) -> list[Message]:
        """Every CALLERROR of either side, and the gateway's notices."""
        return [message for message in self.messages if (message.content or {}).get("MessageTypeId") == 4]

    def _received(self, _client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        with self._changed:
            self.messages.append(Message(message.topic, json.loads(message.payload or b"null")))
            self._changed.notify_all()


@dataclass(slots=True)
class Stage:
    """What the test meets. port: the gateway's; gateway_arguments: what it was started with, to start it again."""

    gateway: Process
    service: Process
    onlooker: Onlooker
    port: int
    gateway_arguments: tuple[str, ...]

    def url(self, identity: str) -> str:
        """Return where a charge point connects to."""
        return f"{self.endpoint}/{quote(identity, safe='')}"

    @property
    def endpoint(self) -> str:
        """The same for charge points that append their identity themselves."""
        return f"ws://127.0.0.1:{self.port}/ocpp"


def start_gateway(*arguments: str) -> Process:
    """Start the gateway and wait until its listeners are open and the broker is there."""
    process = gateway(*arguments)
    try:
        process.wait_for(r"charge points connect to ws://127\.0\.0\.1:\d+/ocpp/<identity>", START_LIMIT)
        process.wait_for("connected to broker", START_LIMIT)
    except BaseException:
        process.stop()
        raise
    return process


@contextmanager
def stage(tmp_path: Path, *, broker: str = "mosquitto", settings: str = "") -> Iterator[Stage]:
    """Set the stage for one test. broker: "mosquitto" or "embedded"; settings: a settings file for the gateway."""
    port, mqtt_port = free_port(), free_port()
    arguments = ["--ws", f"tcp:{port}:interface=127.0.0.1"]
    if settings:
        file = tmp_path / "ocppgw.toml"
        file.write_text(settings, encoding="utf-8")
        arguments += ["--config", str(file)]
    with ExitStack() as stack:
        if broker == "mosquitto":
            stack.enter_context(mosquitto(tmp_path, port=mqtt_port))
            arguments += ["--mqtt", f"mqtt://127.0.0.1:{mqtt_port}"]
        else:
            arguments += ["--mqtt", f"embedded:{mqtt_port}"]
        running = stack.enter_context(start_gateway(*arguments))
        service = stack.enter_context(Process([sys.executable, EXAMPLE, "--mqtt", f"127.0.0.1:{mqtt_port}"]))
        service.wait_for("serving charge points", START_LIMIT)
        onlooker = stack.enter_context(Onlooker(mqtt_port))
        yield Stage(running, service, onlooker, port, tuple(arguments))
    # Once all have ended, so that a failure on the way down counts as well.
    for process in (running, service):
        assert not re.search("Traceback|Unhandled|CRITICAL", process.report()), process.report()
