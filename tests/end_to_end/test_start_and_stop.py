"""The daemon's life: started in each way that Twisted has, ended in each way that there is."""

import os
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import START_LIMIT, Process, free_port, gateway, import_path, mosquitto, script

from end_to_end.wire import (
    LIMIT,
    ChargePoint,
    Service,
    answers,
    ask,
    assert_calm,
    eventually,
    request,
    set_up,
    silent_charge_point,
    start_gateway,
)


def works(port: int, mqtt_port: int) -> None:
    """See that a charge point and a service reach each other."""
    with Service(mqtt_port, "3.1.1") as service, ChargePoint(port, "CP1") as charge_point:
        charge_point.send(2, "1", "Heartbeat", {})
        assert service.take("ocpp/cp/CP1/Heartbeat").content["UniqueId"] == "1"
        service.send("CP1", [3, "1", {"currentTime": "now"}])
        assert charge_point.receive() == [3, "1", {"currentTime": "now"}]


def options(process: Process) -> list[str]:
    """What a gateway was started with, to start it again."""
    return process.argv[process.argv.index("ocppgw") + 1 :]


def at(port: int, mqtt_port: int) -> tuple[str, ...]:
    """The options of a gateway with the embedded broker."""
    return "--ws", f"tcp:{port}:interface=127.0.0.1", "--mqtt", f"embedded:{mqtt_port}"


# Start


def test_without_any_option_it_says_where_to_connect_and_what_to_subscribe_to() -> None:
    with gateway(program=["twistd", "-n"]) as process:
        url = process.wait_for(r"charge points connect to (\S+)|Address already in use|is taken", START_LIMIT)[1]
        if url is None:  # another program of this machine has one of the ports: then it has to say so
            assert process.wait_exit() == 1
            assert len(process.lines) == 1
            return
        assert url == "ws://127.0.0.1:33033/ocpp/<identity>"
        told = process.wait_for(r"services on mqtt://127\.0\.0\.1:1883 subscribe to (\S+) and publish to (\S+)")
        assert told.groups() == ("ocpp/cp/+/+", "ocpp/cs/<identity>/<any>/<any>")
        process.wait_for("no --auth")
        process.wait_for("connected to broker")
        works(33033, 1883)
    assert_calm(process)
    assert not answers(1883)


def test_several_listeners_and_templates_are_all_named(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    file = tmp_path / "ocppgw.toml"
    file.write_text(
        f"""
        node = "gw-1"
        mountpoint = "site/"
        [[listener]]
        endpoint = "tcp:{port}:interface=127.0.0.1"
        path = "/"
        [[listener]]
        endpoint = "tcp6:{other}:interface=\\\\:\\\\:1"
        [upstream.topic_override_mapping]
        BootNotification = "boot/${{cid}}"
        """,
        encoding="utf-8",
    )
    with gateway("--config", str(file), "--mqtt", f"embedded:{free_port()}") as process:
        process.wait_for("connected to broker", START_LIMIT)
        process.wait_for(r"node gw-1$")
        process.wait_for(rf"charge points connect to ws://127\.0\.0\.1:{port}/<identity>")
        process.wait_for(rf"charge points connect to ws://\[::1\]:{other}/ocpp/<identity>")
        told = process.wait_for(r"subscribe to (.*) and publish to (.*)")
        assert told.groups() == ("site/ocpp/cp/+/+, site/boot/+", "site/ocpp/cs/<identity>/<any>/<any>")
        assert ask(port, request("/CP1")).status == 101
    assert_calm(process)


@pytest.mark.parametrize("program", [("twist",), ("twist", "--log-format=json"), ("twistd", "-n", "--nodaemon")])
def test_the_plugin_runs_under_each_of_twisted_s_programs(program: tuple[str, ...]) -> None:
    port, mqtt_port = free_port(), free_port()
    with gateway(*at(port, mqtt_port), program=program) as process:
        process.wait_for("connected to broker", START_LIMIT)
        works(port, mqtt_port)
    assert_calm(process)
    assert not answers(mqtt_port)


def daemon(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start the gateway in the background; returns when it has forked, or has refused to."""
    return subprocess.run(
        [*script("twistd", "--pidfile", "gateway.pid", "--logfile", "gateway.log"), "ocppgw", *arguments],
        cwd=directory,
        env={**os.environ, **import_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
        check=False,
    )


def test_as_a_daemon_it_writes_a_pid_file_and_takes_it_away(tmp_path: Path) -> None:
    port, mqtt_port = free_port(), free_port()
    started = daemon(tmp_path, *at(port, mqtt_port))
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    log, pid_file = tmp_path / "gateway.log", tmp_path / "gateway.pid"
    pid = int(pid_file.read_text(encoding="ascii"))
    try:
        eventually(lambda: "connected to broker" in log.read_text(encoding="utf-8"), "the gateway's start")
        works(port, mqtt_port)
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not pid_file.exists(), "the pid file's end")
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the gateway's end")
    assert not answers(mqtt_port)
    assert not re.search("Traceback|Unhandled|CRITICAL", log.read_text(encoding="utf-8"))


def test_a_daemon_that_cannot_start_says_why_before_it_forks(tmp_path: Path) -> None:
    with mosquitto(tmp_path) as other:
        refused = daemon(tmp_path, "--ws", f"tcp:{other.port}:interface=127.0.0.1", "--mqtt", f"embedded:{free_port()}")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert re.fullmatch(r"ocppgw: .*Address already in use\n", refused.stderr)
    assert not (tmp_path / "gateway.pid").exists()


# Stop


def test_a_stop_closes_charge_points_and_hands_in_what_they_sent(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        broker = stack.enter_context(mosquitto(tmp_path))
        service = stack.enter_context(Service(broker.port))
        running = stack.enter_context(
            start_gateway("--ws", f"tcp:{port}:interface=127.0.0.1", "--mqtt", f"mqtt://127.0.0.1:{broker.port}")
        )
        first, second = (stack.enter_context(ChargePoint(port, f"CP{number}")) for number in (1, 2))
        second.send(2, "0", "Hello", {})
        service.take("ocpp/cp/CP2/Hello")
        service.send("CP2", [2, "c-1", "Reset", {}])
        service.send("CP2", [2, "c-2", "Reset", {}])
        assert second.receive()[1] == "c-1"
        for number in range(300):
            first.send(2, str(number), "MeterValues", {"data": "x" * 1000})
        os.kill(running.pid, signal.SIGTERM)
        assert [charge_point.close_code()[0] for charge_point in (first, second)] == [1001, 1001]
        assert running.wait_exit(LIMIT) == -signal.SIGTERM
        ids = [service.take("ocpp/cp/CP1/MeterValues").content["UniqueId"] for _ in range(300)]
        assert ids == [str(number) for number in range(300)]
        ends = [service.take("ocpp/cp/Error/CP2").content for _ in range(2)]
        assert [end["UniqueId"] for end in ends] == ["c-1", "c-2"]
        assert {end["ErrorDetails"]["reason"] for end in ends} == {"shutting_down"}
    assert_calm(running)


@pytest.mark.parametrize("broker", ["mosquitto 5", "mosquitto 3.1.1"])
def test_nothing_that_was_sent_while_it_was_stopped_comes_late(tmp_path: Path, broker: str) -> None:
    """An orderly stop unsubscribes and ends the session at the broker (contract, section 4)."""
    with set_up(tmp_path, broker) as stage:
        with stage.online("CP1"):
            stage.gateway.stop()
        stage.service.send("CP1", [2, "late", "Reset", {}])
        with start_gateway(*options(stage.gateway)) as again, stage.online("CP1") as charge_point:
            stage.service.send("CP1", [2, "new", "Reset", {}])
            assert charge_point.receive()[1] == "new"
        assert not any("CP1/x/y" in line for line in again.lines)
    assert_calm(again)


@pytest.mark.parametrize("broker", ["mosquitto 5", "mosquitto 3.1.1"])
def test_what_a_crash_left_at_the_broker_harms_nobody(tmp_path: Path, broker: str) -> None:
    with set_up(tmp_path, broker, ended=-signal.SIGKILL) as stage:
        with stage.online("CP1"), stage.online("CP2"):
            stage.gateway.kill()
        stage.service.send("CP1", [2, "late", "Reset", {}])
        with start_gateway(*options(stage.gateway)) as again:
            again.wait_for("message on ocpp/cs/CP1/x/y: no such charge point is connected here")
            with stage.online("CP2") as charge_point:
                stage.service.send("CP2", [2, "new", "Reset", {}])
                assert charge_point.receive()[1] == "new"
    assert_calm(again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_gateway_and_embedded_broker(number: signal.Signals) -> None:
    port, mqtt_port = free_port(), free_port()
    with start_gateway(*at(port, mqtt_port)) as process, ChargePoint(port, "CP1") as charge_point:
        os.kill(process.pid, number)
        assert charge_point.close_code()[0] == 1001
        assert process.wait_exit(LIMIT) == -number
        assert not answers(mqtt_port)
        assert not answers(port)


def test_a_crash_ends_the_embedded_broker_as_well() -> None:
    port, mqtt_port = free_port(), free_port()
    with start_gateway(*at(port, mqtt_port)) as process, Service(mqtt_port, "3.1.1"):
        process.kill()
        eventually(lambda: not answers(mqtt_port), "the embedded broker's end")


def test_charge_points_that_do_not_answer_do_not_hold_it_up() -> None:
    port, mqtt_port = free_port(), free_port()
    with start_gateway(*at(port, mqtt_port)) as process, silent_charge_point(port, "CP1"):
        process.wait_for("CP1 online")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait_exit(LIMIT) == -signal.SIGTERM
    assert_calm(process)


def test_a_stop_without_a_broker_says_what_is_lost(tmp_path: Path) -> None:
    port, gone, file = free_port(), free_port(), tmp_path / "ocppgw.toml"
    file.write_text("drain_seconds = 1\n", encoding="utf-8")
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    with gateway("--ws", endpoint, "--config", str(file), "--mqtt", f"mqtt://127.0.0.1:{gone}") as process:
        process.wait_for("cannot connect to broker", START_LIMIT)
        with ChargePoint(port, "CP1") as charge_point:
            for number in range(3):
                charge_point.send(2, str(number), "Heartbeat", {})
            charge_point.heard()
            os.kill(process.pid, signal.SIGTERM)
            assert charge_point.close_code()[0] == 1001
        assert process.wait_exit(LIMIT) == -signal.SIGTERM
        process.wait_for("3 messages did not reach broker")
    assert_calm(process)


def test_a_start_that_is_interrupted_ends_cleanly() -> None:
    process = gateway(*at(free_port(), free_port()))
    with process:
        process.wait_for("charge points connect", START_LIMIT)
        os.kill(process.pid, signal.SIGTERM)
        process.wait_exit(LIMIT)
    assert_calm(process)
