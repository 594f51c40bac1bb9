"""The WebSocket edge, byte by byte: handshakes, messages, liveness and closes, without a socket."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from doubles import FakeChecker, FakeRealm, Wire
from twisted.cred.checkers import AllowAnonymousAccess
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import Portal
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from txaio.testutil import replace_loop
from zope.interface.verify import verifyObject

from ocppgw.auth import BackendAway, Chain, UnknownIdentity
from ocppgw.interfaces import IChargePoint
from ocppgw.settings import Limits, Listener
from ocppgw.websocket import CLOSE_TIMEOUT, ChargePointFactory, ChargePointProtocol

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
UPGRADE = {
    "Host": "gateway:33033",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": "ocpp1.6",
}


def request(target: str = "/ocpp/CP1", line: str = "GET {target} HTTP/1.1", **headers: str | None) -> bytes:
    """Write a handshake; headers: "_" stands for "-", None leaves one out."""
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    known = {name.lower(): name for name in UPGRADE}
    wanted = {**UPGRADE, **{known.get(name.lower(), name): value for name, value in changed.items()}}
    lines = [line.format(target=target), *(f"{name}: {value}" for name, value in wanted.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def basic(credentials: bytes) -> str:
    return "Basic " + base64.b64encode(credentials).decode()


def frame(opcode: int, payload: bytes, *, fin: bool = True, reserved: int = 0, mask: bool = True) -> bytes:
    """Write a client's frame; the masking key is zero."""
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    masked = 0x80 if mask else 0
    if len(payload) < 126:
        head = struct.pack("!BB", first, masked | len(payload))
    elif len(payload) < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, len(payload))
    else:
        head = struct.pack("!BBQ", first, masked | 127, len(payload))
    return head + (bytes(4) if mask else b"") + payload


def read_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Read a server's frames as (opcode, payload); all of them are whole and unmasked."""
    frames = []
    while data:
        assert data[0] & 0xF0 == 0x80
        size, start = data[1], 2
        if size == 126:
            size, start = struct.unpack_from("!H", data, 2)[0], 4
        elif size == 127:
            size, start = struct.unpack_from("!Q", data, 2)[0], 10
        frames.append((data[0] & 0x0F, data[start : start + size]))
        data = data[start + size :]
    return frames


@dataclass
class Answer:
    """A server's answer to a handshake."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def read(cls, data: bytes) -> Answer:
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        assert len(headers) == len(lines)
        assert first.startswith("HTTP/1.1 ")
        return cls(int(first.split(" ")[1]), headers, body)


class Peer:
    """A charge point at its end of a connection."""

    def __init__(self, factory: ChargePointFactory, wire: Wire | None = None) -> None:
        self.protocol: ChargePointProtocol = factory.buildProtocol(None)
        self.wire = wire or Wire()
        self.protocol.makeConnection(self.wire)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def ask(self, *arguments: str, **headers: str | None) -> Answer:
        self.send(request(*arguments, **headers))
        return Answer.read(self.wire.take())

    def frames(self) -> list[tuple[int, bytes]]:
        """Frames since the last look."""
        return read_frames(self.wire.take())

    def hang_up(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionLost()))


class Stage:
    """A listener's factory and what is behind it. checkers: None lets everybody in."""

    def __init__(self, checker: FakeChecker | None = None, limits: Limits | None = None, **listener: Any) -> None:
        self.realm = FakeRealm()
        portal = Portal(self.realm, [Chain([checker or AllowAnonymousAccess()])])
        self.factory = ChargePointFactory(portal, self.realm, Listener(**listener), limits or Limits(), object())

    def dial(self) -> Peer:
        return Peer(self.factory)

    def connect(self, identity: str = "CP1") -> Peer:
        peer = self.dial()
        assert peer.ask(f"/ocpp/{identity}").status == 101
        return peer


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    """Autobahn's time."""
    with replace_loop(Clock()) as clock:
        clock.advance(1000)
        yield clock


@pytest.fixture(autouse=True)
def tracebacks() -> Iterator[list[type[Exception]]]:
    """What a test says it expects in the log: exceptions with their tracebacks. There are no others."""
    expected: list[type[Exception]] = []
    with capturedLogs() as events:
        yield expected
    assert [event["log_failure"].type for event in events if "log_failure" in event] == expected


@pytest.fixture
def checker() -> FakeChecker:
    return FakeChecker()


def test_a_protocol_is_a_charge_point() -> None:
    assert verifyObject(IChargePoint, Stage().dial().protocol)


class TestAcceptedHandshakes:
    def test_the_answer_is_that_of_rfc_6455(self) -> None:
        answer = Stage().dial().ask(Sec_WebSocket_Extensions="permessage-deflate")
        assert answer == Answer(
            101,
            {
                "upgrade": "websocket",
                "connection": "upgrade",
                "sec-websocket-protocol": "ocpp1.6",
                "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".lower(),  # RFC 6455, 1.3
            },
            b"",
        )

    def test_the_session_opens_when_the_handshake_is_complete(self) -> None:
        stage = Stage()
        peer = stage.connect()
        session = stage.realm.sessions["CP1"]
        assert session.opens == 1
        assert session.charge_point is peer.protocol
        assert peer.protocol.remote == "192.168.1.1:54321"

    @pytest.mark.parametrize(
        ("address", "remote"),
        [
            (IPv4Address("TCP", "203.0.113.7", 50112), "203.0.113.7:50112"),
            (IPv6Address("TCP", "2001:db8::7", 50112), "[2001:db8::7]:50112"),
            (UNIXAddress(""), "unix"),
        ],
        ids=str,
    )
    def test_where_a_peer_comes_from(self, address: object, remote: str) -> None:
        peer = Peer(Stage().factory, Wire(peerAddress=address))
        assert peer.ask().status == 101
        assert peer.protocol.remote == remote

    @pytest.mark.parametrize(
        ("target", "identity"),
        [
            ("/ocpp/CP1", "CP1"),
            ("/ocpp/CP1/", "CP1"),
            ("//ocpp///CP1", "CP1"),
            ("/ocpp/CP1?token=a/b", "CP1"),
            ("/ocpp/CP1/?token=a", "CP1"),
            ("/ocpp/CP1#fragment", "CP1"),
            ("/ocpp/region/CP1", "CP1"),
            ("ws://gateway:33033/ocpp/CP1", "CP1"),
            ("http://user@gateway/ocpp/CP1?x", "CP1"),
            ("/ocpp/RDAM%20123", "RDAM 123"),  # OCPP-J 1.6, 3.1.1
            ("/ocpp/RDAM%7C123", "RDAM|123"),  # 2.1 Part 4, 3.1.1
            ("/ocpp/RDAM 123", "RDAM 123"),
            ("/ocpp/a%2Fb", "a/b"),
            ("/ocpp/%2B%23%3a", "+#:"),
            ("/ocpp/%252F", "%2F"),  # decoded once
            ("/ocpp/%C3%A9", "é"),
            ("/ocpp/\xc3\xa9", "é"),  # the same, not encoded
            ("/ocpp/ocpp", "ocpp"),
            ("/ocpp/" + "x" * 255, "x" * 255),
        ],
    )
    def test_the_identity_is_the_last_segment_of_the_path(self, target: str, identity: str) -> None:
        stage = Stage()
        assert stage.dial().ask(target).status == 101
        assert list(stage.realm.sessions) == [identity]

    def test_the_path_is_a_setting(self) -> None:
        stage = Stage(path="/steve/websocket")
        assert stage.dial().ask("/steve/websocket/CP1").status == 101
        assert stage.dial().ask("/ocpp/CP1").status == 404

    def test_the_path_may_be_empty(self) -> None:
        stage = Stage(path="")
        assert stage.dial().ask("/CP1").status == 101
        assert stage.dial().ask("/").status == 404

    @pytest.mark.parametrize(
        "headers",
        [
            {"Connection": None},
            {"Connection": "keep-alive, upgrade"},
            {"Upgrade": "WebSocket"},
            {"Host": None},
            {"Origin": "null"},
        ],
        ids=str,
    )
    def test_odd_headers_are_tolerated(self, headers: dict[str, str | None]) -> None:
        assert Stage().dial().ask(**headers).status == 101

    @pytest.mark.parametrize(
        ("offered", "agreed"),
        [
            ("ocpp1.6", "ocpp1.6"),
            ("ocpp2.0.1", "ocpp2.0.1"),
            ("ocpp2.1", "ocpp2.1"),
            ("ocpp2.0.1, ocpp1.6", "ocpp2.0.1"),
            ("ocpp1.6,ocpp2.0.1", "ocpp1.6"),  # the client's order
            ("ocpp2.0, ocpp2.1", "ocpp2.1"),
            (",ocpp2.0.1", "ocpp2.0.1"),
            ("ocpp1.6, , ocpp1.6,", "ocpp1.6"),
            ("ocpp1.6\r\nSec-WebSocket-Protocol: ocpp2.1", "ocpp1.6"),
            ("not a token, ocpp1.6", "ocpp1.6"),
        ],
    )
    def test_the_first_subprotocol_that_is_served_is_agreed_on(self, offered: str, agreed: str) -> None:
        stage = Stage()
        peer = stage.dial()
        assert peer.ask(Sec_WebSocket_Protocol=offered).headers["sec-websocket-protocol"] == agreed
        assert peer.protocol.version == agreed

    def test_the_version_belongs_to_the_connection(self) -> None:
        stage = Stage()
        first, second = stage.connect(), stage.dial()
        second.ask(Sec_WebSocket_Protocol="ocpp2.0.1")
        assert (first.protocol.version, second.protocol.version) == ("ocpp1.6", "ocpp2.0.1")

    @pytest.mark.parametrize("offered", [None, "", " , "])
    def test_a_version_may_be_assumed_where_none_is_offered(self, offered: str | None) -> None:
        stage = Stage(no_subprotocol="ocpp1.6")
        peer = stage.dial()
        answer = peer.ask(Sec_WebSocket_Protocol=offered)
        assert answer.status == 101
        assert "sec-websocket-protocol" not in answer.headers
        assert peer.protocol.version == "ocpp1.6"
        assert stage.realm.sessions["CP1"].opens == 1

    def test_a_version_may_be_assumed_for_one_charge_point(self) -> None:
        stage = Stage()
        stage.factory.changes_for = lambda identity: {"no_subprotocol": "ocpp1.6"} if identity == "CP1" else {}
        assert stage.dial().ask(Sec_WebSocket_Protocol=None).status == 101
        assert stage.dial().ask("/ocpp/CP2", Sec_WebSocket_Protocol=None).status == 400

    @pytest.mark.parametrize(("offered", "version"), [("ocpp1.6j", "ocpp1.6"), ("x,ocpp2.0.1.1", "ocpp2.0.1")])
    def test_odd_names_are_understood_and_answered_as_they_are(self, offered: str, version: str) -> None:
        """Reference: Q2"""
        peer = Stage().dial()
        answer = peer.ask(Sec_WebSocket_Protocol=offered)
        assert answer.headers["sec-websocket-protocol"] == offered.split(",")[-1]
        assert peer.protocol.version == version

    def test_it_may_come_in_pieces_with_frames_behind_it(self) -> None:
        stage = Stage()
        peer = stage.dial()
        for byte in request() + frame(TEXT, b'[2,"1","Heartbeat",{}]'):
            peer.send(bytes([byte]))
        assert stage.realm.sessions["CP1"].frames == [b'[2,"1","Heartbeat",{}]']

    def test_a_frame_behind_the_request_waits_for_the_login(self, checker: FakeChecker) -> None:
        stage = Stage(checker)
        peer = stage.dial()
        peer.send(request(Authorization=basic(b"CP1:secret")) + frame(TEXT, b"[1]"))
        peer.send(frame(TEXT, b"[2]"))
        assert stage.realm.sessions == {}
        checker.asked[0][1].callback(b"CP1")
        assert stage.realm.sessions["CP1"].frames == [b"[1]", b"[2]"]


def fail_with(error: Exception) -> Any:
    return lambda stage, checker: checker.asked[0][1].errback(Failure(error))


def refuse(reason: str) -> Any:
    return lambda stage, checker: setattr(stage.realm, "refuses", reason)


class TestRefusedHandshakes:
    """Contract, section 2: the checks, their order, their answers"""

    CREDENTIALS = {"Authorization": basic(b"CP1:evil")}

    @pytest.mark.parametrize(
        ("status", "target", "headers"),
        [
            (426, "/ocpp/CP1", {"Upgrade": None}),
            (426, "/ocpp/CP1", {"Upgrade": "evil"}),
            (404, "/evil/CP1", {}),
            (404, "/", {}),
            (404, "*", {}),
            (404, "/ocpp", {}),
            (404, "/ocpp/", {}),
            (404, "/ocpp/?evil", {}),
            (404, "/ocpp/" + "x" * 256, {}),
            (404, "/ocpp/%FFevil", {}),
            (400, "/ocpp/evil", {"Sec-WebSocket-Version": "8"}),
            (400, "/ocpp/evil", {"Sec-WebSocket-Key": "evil"}),
            (400, "/ocpp/evil", {"Sec-WebSocket-Key": None}),
            (400, "/ocpp/evil", {"Sec-WebSocket-Protocol": None}),
            (400, "/ocpp/evil", {"Sec-WebSocket-Protocol": ","}),
        ],
    )
    def test_the_request_alone(self, status: int, target: str, headers: dict[str, str | None]) -> None:
        stage = Stage()
        peer = stage.dial()
        self.check(peer, peer.ask(target, **headers), status)
        assert all(session.opens == 0 for session in stage.realm.sessions.values())

    @pytest.mark.parametrize(
        ("status", "headers", "act"),
        [
            (404, {}, refuse("reserved")),
            (503, {}, refuse("broker away")),
            (401, {"Authorization": None}, None),
            (401, {"Authorization": "Bearer evil"}, None),
            (401, {"Authorization": "Basic evil!"}, None),
            (401, {"Authorization": "Basic \xe9vil"}, None),
            (401, {"Authorization": "Basic"}, None),
            (401, {"Authorization": basic(b"evil:evil")}, None),
            (401, {"Authorization": basic(b"CP1")}, None),
            (401, {"Authorization": basic(b"CP12:evil")}, None),
            (404, CREDENTIALS, fail_with(UnknownIdentity())),
            (401, CREDENTIALS, fail_with(UnauthorizedLogin("evil"))),
            (503, CREDENTIALS, fail_with(BackendAway("evil"))),
        ],
    )
    def test_who_asks(self, checker: FakeChecker, status: int, headers: dict[str, str | None], act: Any) -> None:
        stage = Stage(checker)
        peer = stage.dial()
        if headers:
            peer.send(request(**headers))
            if act is not None:
                act(stage, checker)
        else:
            act(stage, checker)
            peer.send(request())
        self.check(peer, Answer.read(peer.wire.take()), status)
        assert stage.realm.sessions == {}

    def check(self, peer: Peer, answer: Answer, status: int) -> None:
        assert answer.status == status
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["content-length"] == str(len(answer.body))
        assert answer.headers["connection"] == "close"
        assert answer.body.endswith(b"\n")
        assert answer.body.count(b"\n") == 1
        assert "evil" not in repr(answer).lower()
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert ("upgrade" in answer.headers) == (status == 426)
        assert peer.wire.disconnecting

    def test_a_challenge_asks_for_basic(self, checker: FakeChecker) -> None:
        answer = Stage(checker).dial().ask()
        assert answer.headers["www-authenticate"].startswith('basic realm="')

    def test_another_websocket_version_learns_ours(self) -> None:
        assert Stage().dial().ask(Sec_WebSocket_Version="8").headers["sec-websocket-version"] == "13"

    @pytest.mark.parametrize(
        ("line", "status"),
        [
            ("POST {target} HTTP/1.1", 426),
            ("GET {target} HTTP/1.0", 505),
            ("GET {target}", 505),
            ("", 426),
            ("\x16\x03\x01", 426),
        ],
    )
    def test_other_request_lines(self, line: str, status: int) -> None:
        assert Stage().dial().ask("/ocpp/CP1", line).status == status

    @pytest.mark.parametrize(
        ("target", "headers", "refusal", "status"),
        [
            ("/evil", {"Upgrade": None}, "broker away", 426),
            ("/evil", {"Authorization": None}, "broker away", 404),
            ("/ocpp/CP1", {"Authorization": None}, "broker away", 503),
            ("/ocpp/CP1", {"Authorization": None, "Sec-WebSocket-Protocol": None}, None, 401),
            ("/ocpp/CP1", {"Authorization": None, "Sec-WebSocket-Protocol": "evil"}, None, 401),
        ],
    )
    def test_the_first_check_that_fails_answers(
        self, checker: FakeChecker, target: str, headers: dict[str, str | None], refusal: str | None, status: int
    ) -> None:
        stage = Stage(checker)
        stage.realm.refuses = refusal
        assert stage.dial().ask(target, **headers).status == status
        assert checker.asked == []

    @pytest.mark.parametrize("offered", [None, "ocpp0.1"])
    def test_nobody_learns_what_is_served_before_he_is_known(self, checker: FakeChecker, offered: str | None) -> None:
        peer = Stage(checker).dial()
        peer.send(request(Authorization=basic(b"CP1:wrong"), Sec_WebSocket_Protocol=offered))
        checker.asked[0][1].errback(UnauthorizedLogin())
        assert Answer.read(peer.wire.take()).status == 401

    def test_whoever_offers_nothing_is_logged_out(self) -> None:
        stage = Stage()
        assert stage.dial().ask(Sec_WebSocket_Protocol=None).status == 400
        assert stage.realm.logouts == ["CP1"]

    def test_a_refusal_is_logged_with_its_reason(self) -> None:
        peer = Stage().dial()
        with capturedLogs() as events:
            peer.ask("/ocpp/CP1\n", Sec_WebSocket_Protocol=None)
        [line] = [event["log_format"].format(**event) for event in events if event["log_level"].name == "info"]
        assert line == "refused 'CP1\\n' from 192.168.1.1:54321: no subprotocol offered (400)"

    def test_no_password_reaches_the_log(self, checker: FakeChecker) -> None:
        peer = Stage(checker).dial()
        with capturedLogs() as events:
            peer.send(request(Authorization=basic(b"CP1:geheim")))
            checker.asked[0][1].errback(UnauthorizedLogin())
        assert "geheim" not in repr(events)
        assert base64.b64encode(b"CP1:geheim").decode() not in repr(events)

    def test_a_fault_of_ours_answers_500(self, checker: FakeChecker, tracebacks: list[type[Exception]]) -> None:
        peer = Stage(checker).dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        checker.asked[0][1].errback(ZeroDivisionError("evil"))
        self.check(peer, Answer.read(peer.wire.take()), 500)
        tracebacks.append(ZeroDivisionError)

    def test_a_head_that_is_too_large_is_refused(self) -> None:
        peer = Stage(limits=Limits(header_size=1024)).dial()
        peer.send(b"GET /ocpp/CP1 HTTP/1.1\r\n")
        for _ in range(20):
            peer.send(b"X-Evil: " + b"x" * 100 + b"\r\n")
        self.check(peer, Answer.read(peer.wire.take()), 431)
        assert len(peer.protocol.data) <= 1024 + 110

    def test_the_size_of_a_head_is_all_of_it(self) -> None:
        stage = Stage(limits=Limits(header_size=1024))
        padding = 1024 - len(request(X_Pad=""))
        assert stage.dial().ask(X_Pad="x" * padding).status == 101
        assert stage.dial().ask(X_Pad="x" * (padding + 1)).status == 431
        peer = stage.dial()
        peer.send(b"x" * 1024)
        assert Answer.read(peer.wire.take()).status == 431

    def test_nothing_is_read_after_a_refusal(self) -> None:
        stage = Stage()
        peer = stage.dial()
        peer.send(request("/evil") + request())
        peer.send(request())
        assert peer.wire.take().count(b"HTTP/1.1") == 1
        assert stage.realm.sessions == {}

    def test_nothing_is_kept_of_what_comes_after_a_refusal(self) -> None:
        """Over TLS a connection is closed when the peer has agreed to that."""
        peer = Stage().dial()
        peer.ask("/evil")
        for _ in range(100):
            peer.send(bytes(1000))
        assert len(peer.protocol.data) < 1000

    def test_who_does_not_let_go_after_a_refusal_is_cut_off(self, clock: Clock) -> None:
        peer = Stage().dial()
        peer.ask("/evil")
        assert not peer.wire.disconnected
        clock.advance(CLOSE_TIMEOUT)
        assert peer.wire.disconnected


class TestNoCommonSubprotocol:
    def test_the_connection_opens_and_closes(self, clock: Clock) -> None:
        """OCPP-J 1.6, 3.2; Part 4 of 2.0.1, 3.2: 101 without the header, then close"""
        stage = Stage()
        peer = stage.dial()
        peer.send(request(Sec_WebSocket_Protocol="ocpp0.1, ocppX"))
        head, _, rest = peer.wire.take().partition(b"\r\n\r\n")
        answer = Answer.read(head)
        assert (answer.status, answer.headers.get("sec-websocket-protocol")) == (101, None)
        assert read_frames(rest) == [(CLOSE, struct.pack("!H", 1002) + b"no common subprotocol")]
        peer.send(frame(TEXT, b'[2,"1","Heartbeat",{}]'))
        assert stage.realm.sessions["CP1"].opens == 0
        assert stage.realm.sessions["CP1"].frames == []
        assert stage.realm.logouts == ["CP1"]
        clock.advance(CLOSE_TIMEOUT + 1)
        assert peer.wire.disconnecting
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]

    def test_it_may_be_refused_instead(self) -> None:
        """OCA test TC_B_58_CSMS"""
        stage = Stage(subprotocol_mismatch="reject")
        assert stage.dial().ask(Sec_WebSocket_Protocol="ocpp0.1").status == 400
        assert stage.realm.logouts == ["CP1"]

    def test_an_assumed_version_is_for_those_who_offer_none(self) -> None:
        stage = Stage(no_subprotocol="ocpp1.6", subprotocol_mismatch="reject")
        assert stage.dial().ask(Sec_WebSocket_Protocol="ocpp0.1").status == 400


class TestLogin:
    def test_the_backend_gets_the_identity_and_the_bytes_of_the_password(self, checker: FakeChecker) -> None:
        """OCPP-J 1.6, 6.2.2: its example is a key of raw bytes"""
        stage = Stage(checker)
        stage.dial().send(request("/ocpp/AL1000", Authorization="Basic QUwxMDAwOgABAgMEBQYH////////////////"))
        [(credentials, _)] = checker.asked
        assert credentials.username == b"AL1000"
        assert credentials.password == bytes(range(8)) + b"\xff" * 12

    @pytest.mark.parametrize(
        ("identity", "target"), [("a:b", "/ocpp/a:b"), ("é", "/ocpp/%C3%A9"), ("a/b c", "/ocpp/a%2Fb%20c")]
    )
    def test_the_password_begins_behind_the_identity(self, checker: FakeChecker, identity: str, target: str) -> None:
        Stage(checker).dial().send(request(target, Authorization=basic(f"{identity}:a:b".encode())))
        [(credentials, _)] = checker.asked
        assert (credentials.username, credentials.password) == (identity.encode(), b"a:b")

    def test_the_password_is_not_kept(self, checker: FakeChecker) -> None:
        credentials = basic(b"CP1:secret")
        peer = Stage(checker).dial()
        peer.send(request(Authorization=credentials))
        checker.asked.pop()[1].callback(b"CP1")
        held = repr(vars(peer.protocol))
        assert "secret" not in held
        assert credentials not in held

    @pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
    def test_the_scheme_has_no_case(self, checker: FakeChecker, scheme: str) -> None:
        Stage(checker).dial().send(request(Authorization=basic(b"CP1:").replace("Basic", scheme)))
        assert [credentials.password for credentials, _ in checker.asked] == [b""]

    def test_nothing_is_answered_while_the_backend_thinks(self, checker: FakeChecker) -> None:
        stage = Stage(checker)
        peer = stage.dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        assert peer.wire.take() == b""
        checker.asked[0][1].callback(b"CP1")
        assert Answer.read(peer.wire.take()).status == 101
        assert stage.realm.sessions["CP1"].opens == 1

    def test_a_second_request_behind_the_first_is_no_second_login(self, checker: FakeChecker) -> None:
        stage = Stage(checker)
        peer = stage.dial()
        whole = request(Authorization=basic(b"CP1:secret"))
        peer.send(whole + whole)
        peer.send(whole)
        assert len(checker.asked) == 1
        checker.asked[0][1].callback(b"CP1")
        assert stage.realm.sessions["CP1"].opens == 1
        assert peer.wire.take().count(b"HTTP/1.1 101") == 1

    def test_what_is_sent_during_a_login_is_bounded(self, checker: FakeChecker) -> None:
        stage = Stage(checker, limits=Limits(message_size=2048))
        peer = stage.dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        for _ in range(30):
            peer.send(bytes(100))
        assert Answer.read(peer.wire.take()).status == 400
        assert peer.wire.disconnecting
        assert len(peer.protocol.data) < 2048 + 200
        checker.asked[0][1].callback(b"CP1")
        assert stage.realm.sessions["CP1"].opens == 0
        assert stage.realm.logouts == ["CP1"]

    def test_a_login_that_finishes_after_the_peer_has_gone_opens_nothing(self, checker: FakeChecker) -> None:
        stage = Stage(checker)
        peer = stage.dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        peer.hang_up()
        checker.asked[0][1].callback(b"CP1")
        assert stage.realm.sessions == {}
        assert peer.wire.take() == b""

    def test_a_login_that_outlives_the_handshake_opens_nothing(self, checker: FakeChecker, clock: Clock) -> None:
        stage = Stage(checker, limits=Limits(handshake_timeout=10))
        peer = stage.dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        clock.advance(9)
        assert not peer.wire.disconnecting
        clock.advance(2)
        assert peer.wire.disconnected
        checker.asked[0][1].callback(b"CP1")
        assert stage.realm.sessions["CP1"].opens == 0
        assert stage.realm.logouts == ["CP1"]
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]

    @pytest.mark.parametrize("error", [UnauthorizedLogin(), BackendAway()])
    def test_a_login_that_fails_after_the_peer_has_gone_is_forgotten(
        self, checker: FakeChecker, error: Exception
    ) -> None:
        peer = Stage(checker).dial()
        peer.send(request(Authorization=basic(b"CP1:secret")))
        peer.hang_up()
        checker.asked[0][1].errback(error)
        assert peer.wire.take() == b""

    def test_a_peer_that_sends_no_request_is_dropped(self, clock: Clock) -> None:
        peer = Stage(limits=Limits(handshake_timeout=10)).dial()
        peer.send(b"GET /ocpp/CP1 HTTP/1.1\r\n")
        clock.advance(11)
        assert peer.wire.disconnected


class TestMessages:
    @pytest.mark.parametrize("opcode", [TEXT, BINARY])
    def test_json_in_a_binary_frame_is_json(self, opcode: int) -> None:
        stage = Stage()
        stage.connect().send(frame(opcode, b'[2,"1","Heartbeat",{}]'))
        assert stage.realm.sessions["CP1"].frames == [b'[2,"1","Heartbeat",{}]']

    def test_fragments_are_one_message(self) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.send(frame(TEXT, b'[2,"1",', fin=False) + frame(PING, b"x") + frame(0, b'"Heartbeat",{}]'))
        assert stage.realm.sessions["CP1"].frames == [b'[2,"1","Heartbeat",{}]']
        assert peer.frames() == [(PONG, b"x")]

    def test_empty_fragments_take_no_room(self) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.send(frame(TEXT, b"[", fin=False))
        for _ in range(1000):
            peer.send(frame(0, b"", fin=False))
        assert len(peer.protocol.message_data) < 10
        peer.send(frame(0, b"]"))
        assert stage.realm.sessions["CP1"].frames == [b"[]"]

    @pytest.mark.parametrize("payload", [b"\xff\xfe", b"", b"x" * 70_000], ids=["not UTF-8", "empty", "long"])
    def test_what_is_in_a_message_is_the_sessions_business(self, payload: bytes) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.send(frame(TEXT, payload))
        assert stage.realm.sessions["CP1"].frames == [payload]
        assert peer.frames() == []

    def test_a_frame_goes_out_as_one_text_message(self) -> None:
        peer = Stage().connect()
        frames = [b"x" * size for size in (0, 125, 126, 65_535, 65_536)]
        assert all(peer.protocol.send(payload) for payload in frames)
        assert peer.frames() == [(TEXT, payload) for payload in frames]

    def test_a_message_of_the_largest_size_passes(self) -> None:
        stage = Stage(limits=Limits(message_size=1024))
        peer = stage.connect()
        peer.send(frame(TEXT, b"x" * 1024))
        assert stage.realm.sessions["CP1"].frames == [b"x" * 1024]
        assert peer.protocol.send(b"x" * 1024)

    @pytest.mark.parametrize(
        "data",
        [
            frame(TEXT, b"x" * 1025),
            frame(TEXT, b"x" * 1025)[:10],  # what its head says is enough
            frame(TEXT, b"x" * 1000, fin=False) + frame(0, b"x" * 25),
            b"\x81\xff\x7f" + b"\xff" * 7 + bytes(4),
        ],
        ids=["whole", "its head", "in fragments", "absurd"],
    )
    def test_an_oversized_message_closes_with_1009(self, data: bytes) -> None:
        stage = Stage(limits=Limits(message_size=1024))
        peer = stage.connect()
        peer.send(data)
        [(opcode, payload)] = peer.frames()
        assert (opcode, payload[:2]) == (CLOSE, struct.pack("!H", 1009))
        for _ in range(1000):
            peer.send(b"x" * 100)
        assert stage.realm.sessions["CP1"].frames == []
        assert len(peer.protocol.data) < 2000

    @pytest.mark.parametrize(
        "data",
        [
            frame(TEXT, b"[]", mask=False),
            frame(TEXT, b"[]", reserved=4),  # compressed, which was not agreed on
            frame(3, b"[]"),
            frame(0, b"[]"),
            frame(PING, b"x" * 126),
            frame(CLOSE, struct.pack("!H", 1005)),
        ],
        ids=["unmasked", "compressed", "unknown opcode", "nothing to continue", "long ping", "bad close code"],
    )
    def test_a_violation_of_the_websocket_protocol_closes_with_1002(self, data: bytes) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.send(data)
        opcode, payload = peer.frames()[0]
        assert (opcode, payload[:2]) == (CLOSE, struct.pack("!H", 1002))
        assert stage.realm.sessions["CP1"].frames == []

    def test_a_fault_of_ours_closes_this_connection_alone(self, tracebacks: list[type[Exception]]) -> None:
        stage = Stage()
        first, second = stage.connect("CP1"), stage.connect("CP2")
        stage.realm.sessions["CP1"].fault = ZeroDivisionError("secret")
        first.send(frame(TEXT, b"[]"))
        second.send(frame(TEXT, b"[]"))
        assert first.frames() == [(CLOSE, struct.pack("!H", 1011) + b"internal error")]
        assert second.frames() == []
        assert stage.realm.sessions["CP2"].frames == [b"[]"]
        tracebacks.append(ZeroDivisionError)


class TestLiveness:
    def quiet(self, clock: Clock, seconds: int) -> None:
        for _ in range(seconds * 2):
            clock.advance(0.5)

    def test_a_peer_that_answers_pings_stays(self, clock: Clock) -> None:
        peer = Stage(ping_interval=20, ping_timeout=20).connect()
        pings = 0
        for _ in range(100):
            self.quiet(clock, 10)
            for opcode, payload in peer.frames():
                assert opcode == PING
                pings += 1
                peer.send(frame(PONG, payload))
        assert not peer.wire.disconnecting
        assert pings >= 33

    def test_a_silent_peer_is_dropped(self, clock: Clock) -> None:
        stage = Stage(ping_interval=20, ping_timeout=20)
        peer = stage.connect()
        self.quiet(clock, 38)
        assert not peer.wire.disconnecting
        self.quiet(clock, 4)
        assert peer.wire.disconnected
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]
        assert "ping timeout" in peer.protocol.ended

    @pytest.mark.parametrize(
        "sign",
        [frame(TEXT, b"[]"), frame(PING, b""), frame(PONG, b""), frame(PONG, b"not ours"), b"\x81\xfe\x01"],
        ids=["message", "ping", "empty pong", "foreign pong", "part of a message"],
    )
    def test_any_byte_counts_as_life(self, clock: Clock, sign: bytes) -> None:
        peer = Stage(ping_interval=20, ping_timeout=20).connect()
        for part in (sign[:1], sign[1:2], sign[2:]) if sign[0] == TEXT else [sign] * 3:
            self.quiet(clock, 22)
            assert not peer.wire.disconnecting
            peer.send(part)
        self.quiet(clock, 15)
        assert not peer.wire.disconnecting
        self.quiet(clock, 60)
        assert peer.wire.disconnecting

    def test_without_an_interval_nobody_is_pinged(self, clock: Clock) -> None:
        peer = Stage(ping_interval=0).connect()
        self.quiet(clock, 300)
        assert peer.frames() == []
        assert not peer.wire.disconnecting

    def test_pings_may_be_off_for_one_charge_point(self, clock: Clock) -> None:
        """Reference: Q7"""
        stage = Stage(ping_interval=20)
        stage.factory.changes_for = lambda identity: {"ping_interval": 0.0}
        peer = stage.connect()
        self.quiet(clock, 300)
        assert peer.frames() == []
        assert not peer.wire.disconnecting

    def test_a_pong_that_we_do_not_read_is_not_missed(self, clock: Clock) -> None:
        peer = Stage(ping_interval=20, ping_timeout=20).connect()
        peer.protocol.pause_reading()
        self.quiet(clock, 600)
        assert not peer.wire.disconnecting
        peer.protocol.resume_reading()
        self.quiet(clock, 60)
        assert peer.wire.disconnecting


class TestBackpressure:
    def test_reading_pauses_and_resumes(self) -> None:
        peer = Stage().connect()
        peer.protocol.pause_reading()
        assert peer.wire.producerState == "paused"
        peer.protocol.resume_reading()
        assert peer.wire.producerState == "producing"

    def test_a_closing_connection_is_left_alone(self) -> None:
        peer = Stage().connect()
        peer.protocol.close(4001, "replaced")
        peer.protocol.pause_reading()
        assert peer.wire.producerState == "producing"

    def test_a_connection_that_we_close_reads_on_for_the_answer(self) -> None:
        peer = Stage().connect()
        peer.protocol.pause_reading()
        peer.protocol.close(4001, "replaced")
        assert peer.wire.producerState == "producing"

    def test_a_peer_that_does_not_read_is_cut_off(self) -> None:
        stage = Stage(limits=Limits(outgoing_buffer=65_536))
        peer = stage.connect()
        assert peer.protocol.send(bytes(100_000))  # the transport takes what it is given
        for _ in range(6):
            # Twisted's transport says so at each write while its buffer is full.
            peer.wire.producer.pauseProducing()
            assert peer.protocol.send(bytes(10_000))
        assert not peer.protocol.send(bytes(6_000))
        assert peer.wire.disconnected
        assert not peer.protocol.send(b"[]")
        peer.hang_up()
        assert peer.protocol.ended == "the charge point does not read"
        assert stage.realm.logouts == ["CP1"]

    def test_a_peer_that_only_pings_is_cut_off_too(self) -> None:
        peer = Stage(limits=Limits(outgoing_buffer=65_536)).connect()
        peer.wire.producer.pauseProducing()
        for _ in range(600):
            peer.send(frame(PING, b"x" * 125))
        assert peer.wire.disconnected
        assert len(peer.wire.take()) < 70_000

    def test_a_slow_reader_stays(self) -> None:
        peer = Stage(limits=Limits(outgoing_buffer=65_536)).connect()
        for _ in range(10):
            peer.wire.producer.pauseProducing()
            assert peer.protocol.send(bytes(60_000))
            peer.wire.producer.resumeProducing()
        assert all(peer.protocol.send(bytes(60_000)) for _ in range(10))
        assert not peer.wire.disconnecting


class TestClose:
    @pytest.mark.parametrize(("code", "reason"), [(4001, "replaced"), (1001, "the gateway is shutting down")])
    def test_it_says_code_and_reason_and_waits_for_the_answer(self, code: int, reason: str) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.protocol.close(code, reason)
        assert peer.frames() == [(CLOSE, struct.pack("!H", code) + reason.encode())]
        assert not peer.protocol.send(b"[]")
        assert not peer.wire.disconnecting
        peer.send(frame(CLOSE, struct.pack("!H", code)))
        assert peer.wire.disconnecting
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]
        assert peer.protocol.ended == f"closed by us with {code}"

    def test_a_second_close_says_nothing(self) -> None:
        peer = Stage().connect()
        peer.protocol.close(4001, "replaced")
        peer.frames()
        peer.protocol.close(1001, "bye")
        assert peer.frames() == []

    def test_a_peer_that_does_not_answer_is_dropped(self, clock: Clock) -> None:
        peer = Stage().connect()
        peer.protocol.close(4001, "replaced")
        clock.advance(CLOSE_TIMEOUT + 1)
        assert peer.wire.disconnected

    def test_nothing_is_closed_before_it_is_open(self, checker: FakeChecker) -> None:
        peer = Stage(checker).dial()
        peer.protocol.close(1001, "bye")
        assert not peer.protocol.send(b"[]")
        assert peer.wire.take() == b""

    def test_a_close_of_the_peer_is_answered(self) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.send(frame(CLOSE, struct.pack("!H", 1000) + b"bye"))
        assert peer.frames() == [(CLOSE, struct.pack("!H", 1000))]
        assert peer.wire.disconnecting
        assert peer.wire.producer is None
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]
        assert peer.protocol.ended == "closed by the charge point with 1000"

    def test_a_peer_that_closes_and_does_not_let_go_is_cut_off(self, clock: Clock) -> None:
        peer = Stage().connect()
        peer.send(frame(CLOSE, struct.pack("!H", 1000)))
        assert not peer.wire.disconnected
        clock.advance(CLOSE_TIMEOUT)
        assert peer.wire.disconnected

    def test_a_lost_connection_logs_out_once(self) -> None:
        stage = Stage()
        peer = stage.connect()
        peer.hang_up()
        assert stage.realm.logouts == ["CP1"]
        assert peer.protocol.ended

    @pytest.mark.parametrize(
        "act",
        [
            lambda peer: None,
            lambda peer: peer.protocol.close(4001, "replaced"),
            lambda peer: peer.send(frame(CLOSE, struct.pack("!H", 1000))),
        ],
        ids=["lost", "closed by us", "closed by the peer"],
    )
    def test_no_timer_outlives_a_connection(self, clock: Clock, act: Callable[[Peer], None]) -> None:
        peer = Stage().connect()
        act(peer)
        peer.hang_up()
        peer.wire.take()
        for _ in range(100):
            clock.advance(1)
        assert peer.wire.take() == b""
        assert not peer.wire.disconnected
        assert clock.getDelayedCalls() == []
