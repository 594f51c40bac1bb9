"""A central system behind ocppgw: it answers OCPP 1.6 charge points over MQTT and never sees a WebSocket.

    python central_system.py --mqtt 127.0.0.1:1883
    python central_system.py --call CP1 Reset '{"type": "Soft"}'

The first answers every charge point. The second, in another terminal, sends one command and prints its answer.
Needs `pip install ocpp paho-mqtt`. What `ocpp` does with a WebSocket it does here with the class Connection below;
a central system that you have already needs no more than that. The topics, with the gateway's default settings:

    ocpp/cp/<id>/<action>      what the charge point <id> asks
    ocpp/cp/Reply/<id>         its answers to our commands; errors are on ocpp/cp/Error/<id>
    ocpp/cs/<id>/<any>/<any>   where the gateway listens for our answers and commands
"""

import argparse
import asyncio
import itertools
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import paho.mqtt.client as mqtt
from ocpp.charge_point import camel_to_snake_case
from ocpp.exceptions import OCPPError
from ocpp.routing import on
from ocpp.v16 import ChargePoint as ChargePoint16
from ocpp.v16 import call, call_result, datatypes
from ocpp.v16.enums import Action

# What the gateway calls the elements of a CALL, a CALLRESULT and a CALLERROR.
NAMES = {
    2: ("MessageTypeId", "UniqueId", "Action", "Payload"),
    3: ("MessageTypeId", "UniqueId", "Payload"),
    4: ("MessageTypeId", "UniqueId", "ErrorCode", "ErrorDescription", "ErrorDetails"),
}
# What wants an empty answer and no more. The last three, like SignCertificate, are from the security extension.
NOTIFICATIONS = (
    *("StatusNotification", "MeterValues", "DiagnosticsStatusNotification", "FirmwareStatusNotification"),
    *("LogStatusNotification", "SecurityEventNotification", "SignedFirmwareStatusNotification"),
)
ACCEPTED = datatypes.IdTagInfo(status="Accepted")


def topic_safe(text: str) -> str:
    """Write an id the way the gateway does in topics, where / + # have a meaning of their own."""
    return re.sub(r"[/+#%\x00-\x1f\x7f-\x9f]|^\$", lambda unsafe: quote(unsafe[0], safe=""), text)


def now() -> str:
    """Return the time as OCPP writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Connection:
    """What `ocpp` takes for a WebSocket: the frames of one charge point, carried by MQTT.

    cid: the charge point's id as it stands in topics; publish: called with a topic and a payload.
    """

    def __init__(self, cid: str, publish: Callable[[str, str], Any]) -> None:
        self.cid, self.publish = cid, publish
        self.frames: asyncio.Queue[str] = asyncio.Queue()
        self.asked: dict[str, str] = {}  # its CALLs that we have not answered: unique id, action
        self.commanded: dict[str, str] = {}  # our CALLs that it has not answered

    def message_received(self, message: Any) -> None:
        """Take what the gateway published: the object form, or the array form if the gateway is set to that."""
        frame = message if isinstance(message, list) else [message[name] for name in NAMES[message["MessageTypeId"]]]
        if frame[0] == 2:
            self.asked[frame[1]] = action = frame[2]
        elif frame[1] in self.commanded:
            action = self.commanded.pop(frame[1])
        else:
            return  # the answer to another service's command
        print(unquote(self.cid), "->", *in_words(frame, action), flush=True)
        self.frames.put_nowait(json.dumps(frame))

    async def recv(self) -> str:
        """Wait for the charge point's next frame."""
        return await self.frames.get()

    async def send(self, text: str) -> None:
        """Send a frame to the charge point. The gateway takes any last two levels; they are for those who look on."""
        frame = json.loads(text)
        if frame[0] == 2:
            kind, self.commanded[frame[1]] = "Request", (action := frame[2])
        else:
            kind, action = "Reply", self.asked.pop(frame[1], "again")  # a charge point may repeat a CALL
        print(unquote(self.cid), "<-", *in_words(frame, action), flush=True)
        message = dict(zip(NAMES[frame[0]], frame, strict=True))
        self.publish(f"ocpp/cs/{self.cid}/{kind}/{topic_safe(action)}", json.dumps(message))


def in_words(frame: list[Any], action: str) -> list[str]:
    """Return what is worth printing of a frame."""
    kind, _, *rest = frame
    happened = {2: [], 3: ["answered"], 4: ["failed"]}[kind]
    return [action, *happened, *(json.dumps(part, ensure_ascii=False) for part in rest[kind == 2 :])]


class ChargePoint(ChargePoint16):
    """One charge point as the central system sees it: what to answer when it asks. No MQTT from here on."""

    transaction_ids = itertools.count(1)

    def __init__(self, cid: str, connection: Connection) -> None:
        super().__init__(cid, connection)
        self.connection = connection
        for action in NOTIFICATIONS:
            answer = getattr(call_result, action)()
            self.route_map[action] = {"_on_action": lambda answer=answer, **request: answer}
        self.task = asyncio.create_task(self.start())

    @on(Action.boot_notification)
    def on_boot_notification(self, **request: Any) -> call_result.BootNotification:
        """Take in a charge point that has started, and have it send a Heartbeat every 300 seconds."""
        return call_result.BootNotification(current_time=now(), interval=300, status="Accepted")

    @on(Action.heartbeat)
    def on_heartbeat(self) -> call_result.Heartbeat:
        """Tell it the time."""
        return call_result.Heartbeat(current_time=now())

    @on(Action.authorize)
    def on_authorize(self, id_tag: str) -> call_result.Authorize:
        """Somebody shows a card: all are welcome."""
        return call_result.Authorize(id_tag_info=ACCEPTED)

    @on(Action.start_transaction)
    def on_start_transaction(self, **request: Any) -> call_result.StartTransaction:
        """Charging begins, under a number that we give."""
        return call_result.StartTransaction(transaction_id=next(self.transaction_ids), id_tag_info=ACCEPTED)

    @on(Action.stop_transaction)
    def on_stop_transaction(self, **request: Any) -> call_result.StopTransaction:
        """Charging has ended."""
        return call_result.StopTransaction(id_tag_info=ACCEPTED)

    @on(Action.data_transfer)
    def on_data_transfer(self, **request: Any) -> call_result.DataTransfer:
        """Receive a vendor's own message."""
        return call_result.DataTransfer(status="Accepted")

    @on(Action.sign_certificate)
    def on_sign_certificate(self, csr: str) -> call_result.SignCertificate:
        """It wants a certificate. "Accepted" would promise one, in a CertificateSigned of ours."""
        return call_result.SignCertificate(status="Rejected")


class CentralSystem:
    """All charge points, each known from its first message on."""

    def __init__(self, publish: Callable[[str, str], Any]) -> None:
        self.publish = publish
        self.charge_points: dict[str, ChargePoint] = {}

    def charge_point(self, cid: str) -> ChargePoint:
        """Return the object of one charge point; cid: as it stands in topics."""
        if cid not in self.charge_points:
            self.charge_points[cid] = ChargePoint(cid, Connection(cid, self.publish))
        return self.charge_points[cid]

    def message_received(self, topic: str, payload: bytes) -> None:
        """Bring a message below ocpp/cp to its charge point."""
        try:
            level, *rest = topic.split("/")[2:]
            cid = rest[0] if level in ("Reply", "Error", "Status") else level
            message = json.loads(payload)
            if level == "Status":
                print(unquote(cid), "is", message["status"], flush=True)
            else:
                self.charge_point(cid).connection.message_received(message)
        except (ValueError, LookupError, TypeError) as error:
            print(topic, "carries something else than the gateway's messages:", repr(error), flush=True)


async def main(broker: str, command: list[str] | None) -> None:
    """Serve until interrupted, or give one command: the charge point's id, the action and its payload in JSON."""
    loop, subscribed = asyncio.get_running_loop(), asyncio.Event()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    central_system = CentralSystem(lambda topic, payload: client.publish(topic, payload, qos=1))
    filters = [("ocpp/cp/#", 1)]
    if command is not None:  # only the answers to it: what charge points ask is for the other process
        filters = [(f"ocpp/cp/{level}/{topic_safe(command[0])}", 1) for level in ("Reply", "Error")]

    # paho calls from its own thread; whatever it leads to has to happen in asyncio's.
    client.on_connect = lambda *_: client.subscribe(filters)  # at every connection: the broker may have been away
    client.on_subscribe = lambda *_: loop.call_soon_threadsafe(subscribed.set)
    client.on_message = lambda _client, _userdata, message: loop.call_soon_threadsafe(
        central_system.message_received, message.topic, message.payload
    )
    address = urlsplit(f"//{broker}")
    client.connect(address.hostname or "127.0.0.1", address.port or 1883)
    client.loop_start()
    try:
        await asyncio.wait_for(subscribed.wait(), 10)
        if command is None:
            print(f"serving charge points over MQTT at {broker}", flush=True)
            await asyncio.Event().wait()
        else:
            cid, action, payload = command
            request = getattr(call, action)(**camel_to_snake_case(json.loads(payload)))
            await central_system.charge_point(topic_safe(cid)).call(request, suppress=False)
    finally:
        client.disconnect()
        client.loop_stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An OCPP 1.6 central system over MQTT.")
    parser.add_argument("--mqtt", metavar="HOST:PORT", default="127.0.0.1:1883", help="broker (default: %(default)s)")
    parser.add_argument("--call", nargs=3, metavar=("CID", "ACTION", "JSON"), help="give one command and leave")
    options = parser.parse_args()
    try:
        asyncio.run(main(options.mqtt, options.call))
    except OCPPError:
        sys.exit(1)  # the charge point's refusal, printed as any answer is
    except OSError as error:
        sys.exit(f"{options.mqtt}: {error}")
    except KeyboardInterrupt:
        pass
