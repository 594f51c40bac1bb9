"""A broker that is away, comes back, is full, or does not like us."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import START_LIMIT, free_port, gateway, mosquitto

from end_to_end.relay import Relay
from end_to_end.wire import (
    LIMIT,
    ChargePoint,
    Service,
    Stage,
    ask,
    assert_calm,
    eventually,
    request,
    set_up,
    start_gateway,
)


@dataclass(slots=True)
class Outage(Stage):
    """A stage on which the gateway's way to the broker is a relay."""

    relay: Relay


@pytest.fixture(params=["5", "3.1.1"])
def outage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Outage]:
    """A gateway that began without a broker."""
    port = free_port()
    settings = f'upstream.max_queue = 100\n[mqtt]\nversion = "{request.param}"\noutage_grace = 2\nkeepalive = 5\n'
    file = tmp_path / "ocppgw.toml"
    file.write_text(settings, encoding="utf-8")
    with ExitStack() as stack:
        broker = stack.enter_context(mosquitto(tmp_path, "max_queued_messages 0"))
        service = stack.enter_context(Service(broker.port))
        relay = stack.enter_context(Relay(broker.port))
        broker_url = f"mqtt://127.0.0.1:{relay.port}"
        endpoint = f"tcp:{port}:interface=127.0.0.1"
        running = stack.enter_context(gateway("--ws", endpoint, "--config", str(file), "--mqtt", broker_url))
        running.wait_for("cannot connect to broker .*refused", START_LIMIT)
        yield Outage(running, service, port, request.param, relay)
    assert_calm(running)


def test_charge_points_wait_for_a_broker_and_then_are_sent_away(outage: Outage) -> None:
    with ChargePoint(outage.port, "CP1") as charge_point:
        for number in range(3):
            charge_point.send(2, str(number), "Heartbeat", {})
        eventually(lambda: ask(outage.port, request("/ocpp/CP2")).status == 503, "refusing")
        refusal = ask(outage.port, request("/ocpp/CP2"))
        assert int(refusal.headers["retry-after"]) > 0
        # Who asks for nonsense is told so all the same: the order of the checks.
        assert ask(outage.port, request("/ocpp/Reply")).status == 404
        outage.relay.open()
        outage.gateway.wait_for("connected to broker", LIMIT)
        ids = [outage.service.take("ocpp/cp/CP1/Heartbeat").content["UniqueId"] for _ in range(3)]
        assert ids == ["0", "1", "2"]
        outage.service.send("CP1", [3, "0", {}])
        assert charge_point.receive() == [3, "0", {}]
        assert ask(outage.port, request("/ocpp/CP2")).status == 101
    # It tried more often than it said.
    assert sum("cannot connect" in line for line in outage.gateway.lines) == 1


def test_nothing_is_lost_when_the_connection_breaks(outage: Outage) -> None:
    outage.relay.open()
    outage.gateway.wait_for("connected to broker", LIMIT)
    with ChargePoint(outage.port, "CP1") as charge_point, ChargePoint(outage.port, "CP2") as idle:
        count = 3000

        def send_all() -> None:
            for number in range(count):
                charge_point.send(2, str(number), "MeterValues", {"data": "x" * 500})

        sending = threading.Thread(target=send_all)
        sending.start()
        numbers: list[int] = []
        for half in (1, 2):
            while len(numbers) < half * 500:
                numbers.append(_number(outage))
            seen = len(outage.gateway.lines)
            outage.relay.cut()
            outage.gateway.wait_for("connection to broker .* lost", after=seen)
            outage.relay.open()
            outage.gateway.wait_for("connected to broker", LIMIT, after=seen)
        while not numbers or numbers[-1] != count - 1:
            numbers.append(_number(outage))
        sending.join(LIMIT)
        # With QoS 1 some come twice; none is missing, and none overtakes.
        assert sorted(set(numbers)) == list(range(count))
        assert _leaps(numbers) == 0
        # What was subscribed is subscribed again.
        outage.service.send("CP1", [2, "c-1", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"
        outage.service.send("CP2", [2, "c-2", "Reset", {}])
        assert idle.receive()[1] == "c-2"


def _number(outage: Outage) -> int:
    return int(outage.service.take("ocpp/cp/CP1/MeterValues").content["UniqueId"])


def _leaps(numbers: list[int]) -> int:
    """How often a number comes before the one that is due."""
    leaps, due = 0, 0
    for number in numbers:
        leaps += number > due
        due = max(due, number + 1)
    return leaps


@pytest.mark.parametrize("outage", ["5"], indirect=True)
def test_a_full_queue_stops_reading_instead_of_growing(outage: Outage) -> None:
    size, count = 100_000, 300  # more than max_queue and the sockets hold
    with ChargePoint(outage.port, "CP1") as charge_point:

        def send_all() -> None:
            for number in range(count):
                charge_point.send(2, str(number), "MeterValues", {"data": "x" * size})

        sending = threading.Thread(target=send_all)
        sending.start()
        outage.gateway.wait_for("pile up: reading from 1 charge points pauses")
        sending.join(1)
        assert sending.is_alive(), "all of it was read"
        outage.relay.open()
        assert [_number(outage) for _ in range(count)] == list(range(count))
        outage.gateway.wait_for("reading resumes")
        sending.join(LIMIT)


@pytest.mark.parametrize("outage", ["5"], indirect=True)
def test_a_connection_over_which_nothing_comes_is_given_up(outage: Outage) -> None:
    outage.relay.open()
    outage.gateway.wait_for("connected to broker", LIMIT)
    with outage.online("CP1") as charge_point:
        outage.relay.thawed.clear()
        charge_point.send(2, "1", "Heartbeat", {})
        outage.gateway.wait_for("connection to broker .* lost", LIMIT)
        outage.relay.cut()
        outage.relay.thawed.set()
        outage.relay.open()
        assert outage.service.take("ocpp/cp/CP1/Heartbeat").content["UniqueId"] == "1"


def test_a_stop_waits_for_the_broker_while_there_is_something_to_send(outage: Outage) -> None:
    with ChargePoint(outage.port, "CP1") as charge_point:
        for number in range(50):
            charge_point.send(2, str(number), "MeterValues", {})
        charge_point.heard()
        os.kill(outage.gateway.pid, signal.SIGTERM)
        assert charge_point.close_code()[0] == 1001
    outage.relay.open()
    assert [_number(outage) for _ in range(50)] == list(range(50))
    assert outage.gateway.wait_exit(LIMIT) == -signal.SIGTERM


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_broker_that_crashed_is_found_again(tmp_path: Path, version: str) -> None:
    port, mqtt_port = free_port(), free_port()
    file = tmp_path / "ocppgw.toml"
    file.write_text(f'[mqtt]\nversion = "{version}"\n', encoding="utf-8")
    arguments = ["--ws", f"tcp:{port}:interface=127.0.0.1", "--config", str(file)]
    with ExitStack() as stack:
        broker = stack.enter_context(mosquitto(tmp_path, port=mqtt_port))
        running = stack.enter_context(start_gateway(*arguments, "--mqtt", f"mqtt://127.0.0.1:{mqtt_port}"))
        with ChargePoint(port, "CP1") as charge_point:
            for _ in range(2):
                seen = len(running.lines)
                broker.kill()
                running.wait_for("connection to broker .* lost", after=seen)
                broker = stack.enter_context(mosquitto(tmp_path, port=mqtt_port))
                running.wait_for("connected to broker", LIMIT, after=seen)
                with Service(mqtt_port) as service:
                    charge_point.send(2, "1", "Heartbeat", {})
                    service.take("ocpp/cp/CP1/Heartbeat")
                    service.send("CP1", [3, "1", {}])
                    assert charge_point.receive() == [3, "1", {}]
    assert_calm(running)


def test_an_embedded_broker_that_crashed_is_started_again(tmp_path: Path) -> None:
    with set_up(tmp_path, "embedded 3.1.1") as stage, stage.online("CP1") as charge_point:
        seen = len(stage.gateway.lines)
        child = Path(f"/proc/{stage.gateway.pid}/task/{stage.gateway.pid}/children").read_text(encoding="ascii")
        os.kill(int(child), signal.SIGKILL)
        stage.gateway.wait_for("embedded MQTT broker is gone", after=seen)
        stage.gateway.wait_for("connected to broker", LIMIT, after=seen)
        stage.service.wait_subscribed()
        stage.service.send("CP1", [2, "c-1", "Reset", {}])
        assert charge_point.receive()[1] == "c-1"


@pytest.mark.parametrize("broker", ["mosquitto 5", "mosquitto 3.1.1"])
def test_two_gateways_with_one_name_do_not_fight(tmp_path: Path, broker: str) -> None:
    with set_up(tmp_path, broker, "", "--node", "gw-1") as stage:
        port = free_port()
        again = stage.gateway.argv[stage.gateway.argv.index("--config") :]
        again[again.index("--ws") + 1] = f"tcp:{port}:interface=127.0.0.1"
        with gateway("--node", "gw-1", *again) as second:
            warning = "another client of broker .* uses the client id ocppgw-gw-1: give each gateway its own --node"
            both = (stage.gateway, second)
            eventually(lambda: any(re.search(warning, line) for one in both for line in one.lines), "a warning")
            # Whoever warns steps back, and the other one works.
            warned = [one for one in both if any(re.search(warning, line) for line in one.lines)]
            assert len(warned) == 1
            works = port if warned[0] is stage.gateway else stage.port
            with ChargePoint(works, "CP1") as charge_point:
                charge_point.send(2, "1", "Heartbeat", {})
                stage.service.take("ocpp/cp/CP1/Heartbeat")
            assert sum("connected to broker" in line for one in both for line in one.lines) < 10
        assert_calm(second)


def test_what_the_broker_forbids_is_one_line(tmp_path: Path) -> None:
    """Only MQTT 5 tells (3.4.2.1)."""
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write ocpp/cp/+/Allowed\n", encoding="utf-8")
    with ExitStack() as stack:
        port = free_port()
        broker = stack.enter_context(mosquitto(tmp_path, f"acl_file {acl}"))
        service = stack.enter_context(Service(broker.port))
        endpoint = f"tcp:{port}:interface=127.0.0.1"
        running = stack.enter_context(start_gateway("--ws", endpoint, "--mqtt", f"mqtt://127.0.0.1:{broker.port}"))
        charge_point = stack.enter_context(ChargePoint(port, "CP1"))
        for number in range(100):
            charge_point.send(2, str(number), "Forbidden", {})
        charge_point.send(2, "1", "Allowed", {})
        service.take("ocpp/cp/CP1/Allowed")
        running.wait_for("refuses messages: .*authori[sz]ed.*ocpp/cp/CP1/Forbidden")
        assert sum("refuses messages" in line for line in running.lines) == 1
    assert_calm(running)
