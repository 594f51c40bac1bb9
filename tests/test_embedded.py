"""The embedded broker: real children on loopback, and a reactor of memory where only time matters."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from unittest import mock

import pytest
from paho.mqtt.client import Client, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from twisted.application.service import Service
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from ocppgw import embedded, rumqttd
from ocppgw.embedded import EmbeddedBroker, EmbeddedBrokerError, check_port

ROOT = Path(embedded.__file__).resolve().parent.parent
LIMIT = 20.0  # seconds that any one wait of these tests may take
PARENT = """
import signal, sys
from twisted.application.service import Service
from twisted.internet import reactor
from ocppgw.embedded import EmbeddedBroker

reactor.callWhenRunning(signal.signal, signal.SIGINT, signal.SIG_IGN)
EmbeddedBroker(reactor, int(sys.argv[1]), 1 << 20, Service()).startService()
reactor.run()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def brokers_of(pid: int) -> list[int]:
    """Process ids of the brokers whose parent is pid."""
    children = [
        int(child)
        for tasks in Path(f"/proc/{pid}/task").glob("*/children")
        for child in tasks.read_text(encoding="ascii").split()
    ]
    return [child for child in children if "rumqttd.py" in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8")]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listening(pid: int) -> set[str]:
    """Local addresses of the listening and the UDP sockets of a process, as the kernel writes them, port in hex."""
    inodes = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            if f"socket:[{rest[5]}]" in inodes and (state == "0A" or table.startswith("udp")):
                found.add(local)
    return found


def wait_until(condition, limit: float = LIMIT) -> None:
    """Block until the condition holds; for tests without a reactor."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "not within the limit"
        time.sleep(0.02)


async def until(condition) -> None:
    """Let the reactor run until the condition holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "not within the limit"
        await deferLater(reactor, 0.02)


def round_trip(port: int, payload: bytes, client_id: str = "test") -> bytes:
    """Publish to oneself with QoS 1; what arrived."""
    client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv311)
    received: list[bytes] = []
    arrived = threading.Event()
    client.on_connect = lambda *_: client.subscribe("a/+", qos=1)
    client.on_subscribe = lambda *_: client.publish("a/b", payload, qos=1)
    client.on_message = lambda _client, _userdata, message: (received.append(message.payload), arrived.set())
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        assert arrived.wait(LIMIT)
    finally:
        client.disconnect()
        client.loop_stop()
    return received[0]


def connects(port: int, client_id: str) -> bool:
    """Whether a CONNECT is answered with success."""
    packet = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(client_id).to_bytes(2, "big") + client_id.encode()
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
        connection.sendall(bytes([0x10, len(packet)]) + packet)
        try:
            return connection.recv(4) == b"\x20\x02\x00\x00"
        except ConnectionResetError:
            return False


class Then(Service):
    """Stands for the MQTT client: notes what happened, and whether the port answered at that moment."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.started: Deferred[None] = Deferred()
        self.events: list[tuple[str, bool]] = []
        self.stopping: Deferred[None] | None = None

    def startService(self) -> None:
        super().startService()
        self.events.append(("started", accepts(self.port)))
        self.started.callback(None)

    def stopService(self) -> Deferred[None]:
        super().stopService()
        return deferLater(reactor, 0.1, lambda: self.events.append(("stopped", accepts(self.port))))


class EmbeddedBrokerTests(TestCase):
    timeout = 60

    def start(self, message_size: int = 1 << 20) -> EmbeddedBroker:
        port = free_port()
        check_port(port)
        service = EmbeddedBroker(reactor, port, message_size, Then(port))
        service.startService()
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service

    async def test_starts_the_client_when_the_broker_answers_and_stops_it_first(self):
        service = self.start()
        await service.then.started
        (child,) = brokers_of(os.getpid())
        await service.stopService()
        assert service.then.events == [("started", True), ("stopped", True)]
        assert not alive(child)
        assert not accepts(service.port)
        check_port(service.port)

    async def test_carries_a_message_of_the_largest_frame_with_every_byte_escaped(self):
        service = self.start()
        await service.then.started
        payload = b"\\n" * (1 << 20)
        assert await deferToThread(round_trip, service.port, payload) == payload

    async def test_listens_on_loopback_and_on_nothing_else(self):
        service = self.start()
        await service.then.started
        (child,) = brokers_of(os.getpid())
        assert listening(child) == {f"0100007F:{service.port:04X}"}

    async def test_a_killed_broker_is_started_again(self):
        service = self.start()
        await service.then.started
        (child,) = brokers_of(os.getpid())
        with capturedLogs() as events:
            os.kill(child, signal.SIGKILL)
            await until(lambda: not accepts(service.port))
            await until(lambda: accepts(service.port))
        assert brokers_of(os.getpid()) != [child]
        (event,) = [event for event in events if event["log_namespace"] == "ocppgw.embedded"]
        assert event["log_level"].name == "error"
        assert "signal 9" in event["reason"]
        assert await deferToThread(round_trip, service.port, b"again") == b"again"

    async def test_a_broker_whose_threads_panic_is_started_again(self):
        service = self.start()
        await service.then.started
        with capturedLogs() as events:
            for _ in range(2):
                assert not await deferToThread(connects, service.port, "a/b")
            await until(lambda: not accepts(service.port))
            await until(lambda: accepts(service.port))
        (event,) = [event for event in events if event["log_namespace"] == "ocppgw.embedded"]
        assert "panicked at" in event["said"]
        assert await deferToThread(connects, service.port, "ab")


class ProcessTests(SynchronousTestCase):
    """The broker as a grandchild of the tests."""

    def setUp(self) -> None:
        self.port = free_port()
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name in ("iotcore", "ocppgw", "signal"):
            (directory / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.parent = subprocess.Popen(
            [sys.executable, "-P", "-c", PARENT, str(self.port)],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            start_new_session=True,
        )
        self.addCleanup(self.parent.wait)
        self.addCleanup(self.parent.kill)
        wait_until(lambda: accepts(self.port))
        (self.broker,) = brokers_of(self.parent.pid)

    def test_ends_when_the_gateway_is_killed(self):
        self.parent.kill()
        self.parent.wait()
        wait_until(lambda: not alive(self.broker) and not accepts(self.port))

    def test_ends_on_sigterm_to_the_gateway(self):
        self.parent.terminate()
        self.parent.wait(LIMIT)
        wait_until(lambda: not alive(self.broker))

    def test_survives_what_is_meant_for_the_gateway(self):
        # Ctrl-C goes to the whole process group, systemd's SIGTERM to the whole control group.
        os.killpg(self.parent.pid, signal.SIGINT)
        os.kill(self.broker, signal.SIGTERM)
        assert round_trip(self.port, b"still here") == b"still here"
        assert alive(self.broker)

    def test_leaves_no_file(self):
        assert list(self.temporary.iterdir()) == []


class FakeProcess:
    def __init__(self, protocol) -> None:
        self.protocol = protocol
        self.signals: list[str] = []
        self.dismissed = False
        self.gone = False

    def closeStdin(self) -> None:
        self.dismissed = True

    def signalProcess(self, name: str) -> None:
        if self.gone:
            raise ProcessExitedAlready
        self.signals.append(name)

    def end(self) -> None:
        self.gone = True
        self.protocol.processEnded(Failure(ProcessTerminated(exitCode=1)))


class ProcessReactor(MemoryReactorClock):
    """Where processes run, until told to end, and nobody answers."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[FakeProcess] = []

    def spawnProcess(self, processProtocol, executable, args=(), env=None):
        process = FakeProcess(processProtocol)
        self.processes.append(process)
        processProtocol.makeConnection(process)
        return process

    def refuse(self) -> None:
        """Refuse each connection that is being tried."""
        while self.tcpClients:
            factory = self.tcpClients.pop()[2]
            factory.clientConnectionFailed(None, Failure(ConnectError()))


class TimeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = ProcessReactor()
        self.then = Service()
        self.service = EmbeddedBroker(self.reactor, 1883, 1 << 20, self.then)
        self.service.startService()

    def errors(self, events):
        return [event["log_format"].format(**event) for event in events if event["log_level"].name == "error"]

    def test_the_pause_between_restarts_doubles_up_to_a_limit(self):
        with capturedLogs() as events:
            for pause in (1, 2, 4, 8, 16, 30, 30):
                count = len(self.reactor.processes)
                self.reactor.processes[-1].end()
                self.reactor.advance(pause - 0.01)
                assert len(self.reactor.processes) == count
                self.reactor.advance(0.01)
                assert len(self.reactor.processes) == count + 1
        assert len(self.errors(events)) == 7

    def test_a_broker_that_ran_for_long_is_started_again_soon(self):
        for pause in (1, 2, 4):
            self.reactor.processes[-1].end()
            self.reactor.advance(pause)
        self.reactor.advance(31)
        self.reactor.processes[-1].end()
        self.reactor.advance(1)
        assert len(self.reactor.processes) == 5

    def test_the_last_words_are_in_the_log(self):
        with capturedLogs() as events:
            self.reactor.processes[0].protocol.errReceived(b"Traceback ...\nOSError: cannot listen\n\n")
            self.reactor.processes[0].end()
        assert self.errors(events) == [
            (
                "the embedded MQTT broker is gone, process ended with exit code 1; it starts again in 1 s; "
                "it said: OSError: cannot listen"
            )
        ]

    def test_the_client_starts_at_last_when_the_broker_never_answers(self):
        with capturedLogs() as events:
            for _ in range(199):
                self.reactor.refuse()
                self.reactor.advance(0.05)
            assert not self.then.running
            for _ in range(3):
                self.reactor.refuse()
                self.reactor.advance(0.05)
        assert self.then.running
        assert self.errors(events) == ["the embedded MQTT broker does not answer on 127.0.0.1:1883"]

    def test_a_client_that_cannot_start_is_logged_and_the_broker_stays(self):
        self.patch(self.then, "startService", lambda: 1 / 0)
        self.reactor.advance(10)
        self.reactor.refuse()
        self.reactor.advance(0.05)
        assert len(self.flushLoggedErrors(ZeroDivisionError)) == 1
        assert self.reactor.processes[0].signals == []

    def test_a_client_that_cannot_stop_does_not_keep_the_broker(self):
        self.patch(self.then, "running", True)
        self.patch(self.then, "stopService", lambda: 1 / 0)
        stopped = self.service.stopService()
        self.reactor.processes[0].end()
        self.failureResultOf(stopped, ZeroDivisionError)
        assert self.reactor.processes[0].dismissed

    def test_a_stop_before_the_broker_answers_starts_no_client(self):
        stopped = self.service.stopService()
        self.reactor.processes[0].end()
        self.successResultOf(stopped)
        self.reactor.advance(60)
        assert not self.then.running
        assert len(self.reactor.processes) == 1

    def test_a_stop_between_two_brokers_starts_none(self):
        self.reactor.processes[0].end()
        self.successResultOf(self.service.stopService())
        self.reactor.advance(60)
        assert len(self.reactor.processes) == 1
        assert self.reactor.getDelayedCalls() == []

    def test_a_broker_that_does_not_end_is_killed(self):
        stopped = self.service.stopService()
        assert self.reactor.processes[0].dismissed
        assert self.reactor.processes[0].signals == []
        self.reactor.advance(5)
        assert self.reactor.processes[0].signals == ["KILL"]
        self.assertNoResult(stopped)
        self.reactor.processes[0].end()
        self.successResultOf(stopped)


class CheckPortTests(SynchronousTestCase):
    def test_a_taken_port_names_both_ways_out(self):
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.socket() as other:
                other.bind((host, 0))
                other.listen()
                port = other.getsockname()[1]
                with pytest.raises(EmbeddedBrokerError) as caught:
                    check_port(port)
            assert str(caught.value) == (
                f"127.0.0.1:{port} is taken: to use the broker that is there pass --mqtt mqtt://127.0.0.1:{port}, "
                "for another port --mqtt embedded:PORT"
            )

    def test_a_forbidden_port_says_so(self):
        def bind(*_):
            raise PermissionError(13, "Permission denied")

        self.patch(embedded.socket.socket, "bind", bind)
        with pytest.raises(EmbeddedBrokerError, match=r"127\.0\.0\.1:80 cannot be listened on: Permission denied"):
            check_port(80)

    def test_a_missing_iotcore_says_how_to_install_it(self):
        with mock.patch.dict(sys.modules, {"iotcore": None}), pytest.raises(EmbeddedBrokerError) as caught:
            check_port(free_port())
        assert str(caught.value) == (
            "the embedded broker needs iotcore: pip install 'ocppgw[embedded]', "
            "or name a broker with --mqtt mqtt://HOST:PORT"
        )


class SettingsTests(SynchronousTestCase):
    def test_there_is_one_listener_and_no_console(self):
        settings = tomllib.loads(rumqttd.SETTINGS.format(host="127.0.0.1", port=1, max_payload_size=2))
        assert set(settings) == {"id", "router", "v4"}
        assert settings["v4"]["1"]["listen"] == "127.0.0.1:1"
        assert settings["v4"]["1"]["connections"]["max_payload_size"] == 2
