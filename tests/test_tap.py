"""The command line, and how the parts are joined, started and stopped."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trustme
from doubles import (
    DISCONNECT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    HandCrankedReactor,
    ScriptedBroker,
    Wire,
    settings,
)
from processes import free_port
from test_websocket import CLOSE, TEXT, basic, frame, read_frames, request
from twisted.application.service import IService, Service
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from txaio.testutil import replace_loop
from zope.interface.verify import verifyObject

from ocppgw import __version__
from ocppgw.broker import Broker
from ocppgw.config import load
from ocppgw.embedded import EmbeddedBroker
from ocppgw.tap import Options, OrderedServices, compose, makeService

LOOPBACK = "127.0.0.1"

# Modules of the standard library that plugins of Twisted import.
pytestmark = pytest.mark.filterwarnings("ignore:'(spwd|crypt)' is deprecated:DeprecationWarning")


def parsed(*arguments: str) -> Options:
    options = Options()
    options.parseOptions(arguments)
    return options


def lines(events: list[Any], level: str) -> list[str]:
    return [event["log_format"].format(**event) for event in events if event["log_level"].name == level]


class TestOptions:
    def test_without_any_the_settings_are_the_defaults(self) -> None:
        assert parsed().overrides() == {}
        assert parsed()["config"] is None

    def test_all_of_them(self) -> None:
        options = parsed(
            *("--config", "ocppgw.toml", "--node", "gw-1", "--mqtt", "mqtt://broker"),
            *("--ws", "tcp:33033", "--wss", "ssl:33034", "--ws", "unix:/run/ocppgw"),
            *("--auth", "htpasswd:/etc/ocppgw/passwd", "--auth", "anonymous"),
        )
        assert options["config"] == "ocppgw.toml"
        assert options.overrides() == {
            "node": "gw-1",
            "mqtt": {"url": "mqtt://broker"},
            "auth": {"checkers": ["htpasswd:/etc/ocppgw/passwd", "anonymous"]},
            "listener": [{"endpoint": "tcp:33033"}, {"endpoint": "ssl:33034"}, {"endpoint": "unix:/run/ocppgw"}],
        }

    def test_a_repeatable_option_replaces_the_list_of_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "ocppgw.toml"
        file.write_text('auth.checkers = ["nosuch"]\nlistener = [{endpoint = "nonsense:1"}]\nmqtt.url = "nonsense"\n')
        services = service_of("-c", str(file), "--auth", "anonymous", "--ws", f"tcp:{free_port()}")
        assert verifyObject(IService, services)
        end(services)

    def test_more_than_options_is_a_mistake(self) -> None:
        with pytest.raises(UsageError):
            parsed("tcp:33033")

    def test_the_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parsed("--version")
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"ocppgw {__version__}\n"

    @pytest.mark.parametrize("option", ["--help-auth", "--help-auth-type=htpasswd"])
    def test_help_on_checkers_names_ours(self, option: str) -> None:
        options = Options()
        options.authOutput = StringIO()
        with pytest.raises(SystemExit):
            options.parseOptions([option])
        assert "htpasswd" in options.authOutput.getvalue()


def service_of(*arguments: str) -> Any:
    """Make the service; without a word about a broker, of one that is never asked."""
    broker = () if "--mqtt" in arguments else ("--mqtt", "mqtt://127.0.0.1:1")
    return makeService(parsed(*broker, *arguments))


def end(services: Any) -> None:
    """Give back what a service holds that was never started."""
    for service in services:
        getattr(service, "link_ended", lambda: None)()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server((LOOPBACK, 0)) as taken:
        yield taken.getsockname()[1]


class TestErrors:
    """Each of them is one line and ends the process with status 1, which is what SystemExit with a text does."""

    def error(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            service_of(*arguments)
        line = caught.value.code
        assert isinstance(line, str)
        assert line.startswith("ocppgw: ")
        assert "\n" not in line
        return line

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--ws", "tcp:0:interface=0.0.0.0"], ["tcp:0:interface=0.0.0.0", "--auth htpasswd:FILE", "--auth anon"]),
            (["--ws", "tcp:0"], ["tcp:0", "--auth"]),
            (["--ws", "tcp:0:interface=127.0.0.1", "--ws", "tcp6:0"], ["tcp6:0", "--auth"]),
            (["--ws", "ssl:0"], ["ssl:0: has TLS: --wss"]),
            (["--wss", "tcp:0"], ["tcp:0: has no TLS: --ws"]),
            (["--wss", "haproxy:tcp:0"], ["has no TLS"]),
            (["--wss", "ssl:0:privateKey=/none:certKey=/none"], ["No such file or directory: /none"]),
            (["--ws", "nonsense:1"], ["nonsense:1", "nonsense"]),
            (["--ws", "tcp:0:colour=red"], ["tcp:0:colour=red"]),
            (["--auth", "htpasswd:/none"], ["/none", "No such file or directory"]),
            (["--auth", "file:/none"], ["/none", "No such file or directory"]),
            (["--auth", "nosuch:x"], ["nosuch", "--help-auth"]),
            (["--auth", "sshkey"], ["sshkey"]),
            (["--mqtt", "http://broker"], ["http://broker", "mqtts://"]),
            (["--mqtt", "broker:1883"], ["broker:1883", "mqtt://HOST[:PORT]"]),
            (["--mqtt", "mqtt://"], ["mqtt://HOST[:PORT]"]),
            (["--node", "gw/1"], ["gw/1"]),
            (["--config", "/none.toml"], ["/none.toml", "No such file or directory"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_on_the_command_line(self, arguments: list[str], said: list[str]) -> None:
        line = self.error(*arguments)
        assert all(words in line for words in said)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ("colour = 1", ["colour", "unknown key"]),
            ("[mqtt]\nurl = 1", ["mqtt.url", "must be a text"]),
            ("[upstream]\ntopic = 'a/#/${cid}'", ["upstream.topic", "a/#/${cid}"]),
            ("[upstream]\ntopic = 'a/${colour}'", ["upstream.topic", "${colour}", "${cid}"]),
            ("[dnstream]\ntopic = 'a/+'", ["dnstream.topic", "${cid}"]),
            ("this is not TOML", ["TOML"]),
            ("[mqtt]\nurl = 'mqtts://broker'\nca_file = '/none'", ["ca_file", "No such file or directory"]),
            ("[mqtt]\nurl = 'wss://broker'\ncert_file = '/none'", ["cert_file", "No such file or directory"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_in_a_settings_file(self, tmp_path: Path, settings: str, said: list[str]) -> None:
        file = tmp_path / "ocppgw.toml"
        file.write_text(settings)
        with pytest.raises(SystemExit) as caught:
            makeService(parsed("--config", str(file)))
        line = str(caught.value.code)
        assert line.startswith("ocppgw: ")
        assert "\n" not in line
        assert all(words in line for words in said)

    def test_a_ca_file_that_is_none(self, tmp_path: Path) -> None:
        file, ca = tmp_path / "ocppgw.toml", tmp_path / "ca.pem"
        ca.write_text("not PEM")
        file.write_text(f"[mqtt]\nurl = 'mqtts://broker'\nca_file = '{ca}'\n")
        with pytest.raises(SystemExit, match=r"^ocppgw: mqtt: ca_file, cert_file or key_file cannot be used: [^\n]+$"):
            makeService(parsed("--config", str(file)))

    @pytest.mark.parametrize("kind", ["tcp:{port}:interface=127.0.0.1", "haproxy:tcp:{port}:interface=127.0.0.1"])
    def test_a_taken_port(self, kind: str, taken_port: int) -> None:
        endpoint = kind.format(port=taken_port)
        assert f"{endpoint}: cannot be listened on: Address already in use" in self.error("--ws", endpoint)

    def test_a_taken_port_of_the_embedded_broker(self, taken_port: int) -> None:
        line = self.error("--mqtt", f"embedded:{taken_port}", "--ws", f"tcp:{free_port()}:interface=127.0.0.1")
        assert f"{LOOPBACK}:{taken_port} is taken" in line

    def test_no_embedded_broker_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "iotcore", None)
        line = self.error("--mqtt", f"embedded:{free_port()}", "--ws", f"tcp:{free_port()}:interface=127.0.0.1")
        assert "pip install 'ocppgw[embedded]'" in line

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--mqtt", "mqtt://gw:geheim@broker:port"],
            ["--mqtt", "mqtt://gw:ge/heim@broker"],
            ["--auth", "memory:CP1:geheim:CP2"],
        ],
    )
    def test_no_password_is_shown(self, arguments: list[str]) -> None:
        assert "heim" not in self.error(*arguments)


class Stage:
    """All parts on a reactor of memory, with a broker of the test's."""

    def __init__(self, broker: ScriptedBroker, credentials: str = "", **tables: Any) -> None:
        self.reactor = HandCrankedReactor()
        tables["mqtt"] = {"url": f"mqtt://{credentials}{LOOPBACK}:{broker.port}"}
        self.services: Any = compose(settings(**tables), self.reactor)

    def dial(self) -> tuple[Any, Wire]:
        """Connect to the first listener; its protocol and the wire to it."""
        protocol, wire = self.reactor.tcpServers[0][1].buildProtocol(None), Wire()
        protocol.makeConnection(wire)
        return protocol, wire

    def stop(self) -> list[Any]:
        """Begin to stop; what is given back has something in it at the end."""
        stopped: list[Any] = []
        self.services.stopService().addCallback(stopped.append)
        return stopped


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as broker:
        yield broker


def loopback(**more: Any) -> dict[str, Any]:
    return {"endpoint": f"tcp:{free_port()}:interface={LOOPBACK}", **more}


class TestComposition:
    def test_messages_find_their_way_through_all_parts(self, broker: ScriptedBroker) -> None:
        stage = Stage(broker, listener=[loopback()])
        with replace_loop(stage.reactor):
            stage.services.startService()
            protocol, wire = stage.dial()
            protocol.dataReceived(request("/ocpp/CP1") + frame(TEXT, b'[2,"u-1","Heartbeat",{}]'))
            assert wire.take().startswith(b"HTTP/1.1 101 ")
            with broker.accept() as conversation:
                assert conversation.connect.client_id == "ocppgw-gw-1"
                conversation.connack()
                conversation.expect(SUBSCRIBE)
                call = conversation.expect(PUBLISH)
                assert call.topic == "ocpp/cp/CP1/Heartbeat"
                conversation.puback(call)
                conversation.deliver("ocpp/cs/CP1/Reply/Heartbeat", b'[3,"u-1",{}]', 1)
                stage.reactor.crank(lambda: bool(wire.value()))
                assert read_frames(wire.take()) == [(TEXT, b'[3,"u-1",{}]')]
                conversation.expect(PUBACK)

                stopped = stage.stop()
                stage.reactor.advance(0)
                assert read_frames(wire.take()) == [(CLOSE, b"\x03\xe9the gateway is shutting down")]
                protocol.connectionLost(Failure(ConnectionLost()))
                stage.reactor.advance(0)
                conversation.expect(UNSUBSCRIBE)
                conversation.expect(DISCONNECT)
                stage.reactor.crank(lambda: bool(stopped))

    def test_every_listener_has_settings_of_its_own(self, broker: ScriptedBroker) -> None:
        stage = Stage(broker, listener=[loopback(), loopback(path="/steve", no_subprotocol="ocpp1.6")])
        factories = [service.factory for service in stage.services if hasattr(service, "factory")]
        assert [factory.listener.path for factory in factories] == ["/ocpp", "/steve"]
        assert factories[0].portal is factories[1].portal
        end(stage.services)

    def test_the_checkers_are_asked(self, broker: ScriptedBroker, tmp_path: Path) -> None:
        file = tmp_path / "passwords"
        file.write_text("CP1:secret\n")
        stage = Stage(broker, listener=[loopback()], auth={"checkers": [f"file:{file}"]})
        with replace_loop(stage.reactor):
            stage.services.startService()
            protocol, wire = stage.dial()
            protocol.dataReceived(request("/ocpp/CP1", Authorization=basic(b"CP1:wrong")))
            assert wire.take().startswith(b"HTTP/1.1 401 ")
            protocol, wire = stage.dial()
            protocol.dataReceived(request("/ocpp/CP1", Authorization=basic(b"CP1:secret")))
            assert wire.take().startswith(b"HTTP/1.1 101 ")
            protocol.connectionLost(Failure(ConnectionLost()))
            broker.accept().close()
            stopped = stage.stop()
            stage.reactor.crank(lambda: bool(stopped))

    def test_the_embedded_broker_speaks_mqtt_3_1_1(self) -> None:
        tables = {"mqtt": {"url": f"embedded:{free_port()}"}, "listener": [loopback()]}
        services: Any = compose(settings(**tables), HandCrankedReactor())
        [embedded] = [service for service in services if isinstance(service, EmbeddedBroker)]
        assert isinstance(embedded.then, Broker)
        assert not embedded.then.carries_properties
        embedded.then.link_ended()

    @pytest.mark.parametrize("tls_files", [{}, {"ca_file": "ca.pem"}, {"cert_file": "client.pem"}], ids=str)
    def test_usable_tls_files_are_no_obstacle(self, tmp_path: Path, tls_files: dict[str, str]) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        authority.issue_cert("gw.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
        files = {key: str(tmp_path / name) for key, name in tls_files.items()}
        tables = {"mqtt": {"url": "mqtts://broker", **files}, "listener": [loopback()]}
        services = compose(settings(**tables), HandCrankedReactor())
        assert verifyObject(IService, services)
        end(services)


class TestGreeting:
    def greeting(self, **tables: Any) -> tuple[list[str], list[str]]:
        """What is said at a start, as information and as warnings; nothing else starts."""
        tables["mqtt"] = {"url": "mqtt://broker", "username": "gw", "password": "geheim"}
        services: Any = compose(settings(**tables), HandCrankedReactor())
        with capturedLogs() as events:
            next(iter(services)).startService()
        end(services)
        assert "geheim" not in repr(events)
        return lines(events, "info"), lines(events, "warn")

    def test_it_says_where_to_connect_and_what_to_subscribe(self) -> None:
        port = free_port()
        said, warned = self.greeting(listener=[{"endpoint": f"tcp:{port}:interface=127.0.0.1"}])
        assert said == [
            f"ocppgw {__version__}, node gw-1",
            f"charge points connect to ws://127.0.0.1:{port}/ocpp/<identity>",
            ("services on mqtt://broker:1883 subscribe to ocpp/cp/+/+ and publish to ocpp/cs/<identity>/<any>/<any>"),
        ]
        assert len(warned) == 1
        assert "--auth" in warned[0]

    def test_every_topic_is_among_the_filters(self) -> None:
        said, _ = self.greeting(
            listener=[loopback()],
            mountpoint="m/",
            upstream={
                "topic_override_mapping": {"BootNotification": "ocpp/cp/${cid}/Notify/${action}"},
                "error_topic": "errors/${cid}",
            },
        )
        assert "subscribe to m/ocpp/cp/+/+, m/ocpp/cp/+/Notify/+, m/errors/+ and publish" in said[-1]

    def test_listeners_of_every_kind(self, tmp_path: Path) -> None:
        trustme.CA().issue_cert("gw.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
        port, path = free_port(), tmp_path / "socket"
        tls = f"ssl:{port}:interface=127.0.0.1:privateKey={tmp_path}/pem:certKey={tmp_path}/pem"
        said, warned = self.greeting(
            listener=[{"endpoint": tls}, {"endpoint": f"unix:{path}"}], auth={"checkers": ["anonymous"]}
        )
        assert said[1:3] == [
            f"charge points connect to wss://127.0.0.1:{port}/ocpp/<identity>",
            f"charge points connect to unix:{path}",
        ]
        assert warned == []

    def test_what_a_file_says_in_vain_is_said(self, tmp_path: Path) -> None:
        file = tmp_path / "emqx_ocpp.conf"
        file.write_text("ocpp.listener.0.tcp.acceptors = 16\n")
        services: Any = compose(load(str(file), {"listener": [loopback()]}), HandCrankedReactor())
        with capturedLogs() as events:
            next(iter(services)).startService()
        assert "ocpp.listener.0.tcp.acceptors" in lines(events, "warn")[0]
        embedded = next(service for service in services if isinstance(service, EmbeddedBroker))
        embedded.then.link_ended()


class Part(Service):
    """A service whose stop ends when the test says so."""

    def __init__(self, name: str, history: list[str]) -> None:
        self.setName(name)
        self.history = history
        self.stopped: Deferred[None] = Deferred()

    def startService(self) -> None:
        super().startService()
        self.history.append(f"start {self.name}")

    def stopService(self) -> Deferred[None]:
        super().stopService()
        self.history.append(f"stop {self.name}")
        return self.stopped


class OrderedServicesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.history: list[str] = []
        self.parts = [Part(name, self.history) for name in ("broker", "gateway", "listener")]
        self.services = OrderedServices(self.parts, 20.0, self.clock)
        self.services.startService()
        self.history.clear()

    def test_they_start_in_order(self) -> None:
        self.services = OrderedServices([Part(name, self.history) for name in "abc"], 20.0, self.clock)
        self.services.startService()
        assert self.history == ["start a", "start b", "start c"]

    def test_they_stop_in_reverse_one_after_another(self) -> None:
        broker, gateway, listener = self.parts
        stopped = self.services.stopService()
        assert self.history == ["stop listener"]
        listener.stopped.callback(None)
        assert self.history == ["stop listener", "stop gateway"]
        gateway.stopped.callback(None)
        assert self.history == ["stop listener", "stop gateway", "stop broker"]
        self.assertNoResult(stopped)
        broker.stopped.callback(None)
        self.successResultOf(stopped)
        assert self.clock.getDelayedCalls() == []

    def test_each_has_its_time(self) -> None:
        stopped = self.services.stopService()
        self.clock.advance(19.9)
        assert self.history == ["stop listener"]
        self.clock.advance(0.1)
        assert self.history == ["stop listener", "stop gateway"]
        self.clock.advance(20)
        self.assertNoResult(stopped)
        self.clock.advance(20)
        self.successResultOf(stopped)
        assert len(self.flushLoggedErrors(defer.TimeoutError)) == 3

    def test_one_that_fails_does_not_keep_the_others(self) -> None:
        broker, gateway, listener = self.parts
        listener.stopped.errback(ZeroDivisionError())
        gateway.stopped.callback(None)
        broker.stopped.callback(None)
        self.successResultOf(self.services.stopService())
        assert self.history == ["stop listener", "stop gateway", "stop broker"]
        assert len(self.flushLoggedErrors(ZeroDivisionError)) == 1
