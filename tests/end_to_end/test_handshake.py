"""The opening handshake (contract, section 2): each of its answers, asked for with requests as odd as real ones."""

import base64
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from end_to_end.wire import LIMIT, Answer, ChargePoint, Stage, ask, basic, masked, request, set_up, silent_charge_point
from ocppgw.auth import set_password

# Anybody may connect here: identity, path and WebSocket


@pytest.mark.parametrize(
    ("target", "level"),
    [
        ("/ocpp/CP1", "CP1"),
        ("/ocpp/RDAM%20123", "RDAM 123"),
        ("/ocpp/RDAM 123", "RDAM 123"),
        ("/ocpp/RDAM%7C123", "RDAM|123"),
        ("/ocpp/a%2Fb", "a%2Fb"),
        ("/ocpp/a%253Ab", "a%253Ab"),  # decoded once
        ("/ocpp/a%3Ab", "a:b"),
        ("/ocpp/a+b", "a%2Bb"),
        ("/ocpp/gr%C3%B6%C3%9Fe", "größe"),
        ("/ocpp/größe", "größe"),
        ("/ocpp/%F0%9F%94%8C", "🔌"),
        ("/ocpp/CP1/", "CP1"),
        ("//ocpp/CP1", "CP1"),
        ("/ocpp//CP1", "CP1"),
        ("/ocpp/CP1//", "CP1"),
        ("/ocpp/CP1?version=1.6&x=/a", "CP1"),
        ("ws://example.org/ocpp/CP1", "CP1"),
        ("http://example.org:33033//ocpp/CP1?a", "CP1"),
        ("/ocpp/" + "x" * 255, "x" * 255),
    ],
)
def test_an_identity_is_the_last_segment_decoded_once(stage_5: Stage, target: str, level: str) -> None:
    seen = len(stage_5.gateway.lines)
    answer = ask(stage_5.port, request(target))
    assert answer.status == 101
    assert answer.headers["sec-websocket-protocol"] == "ocpp1.6"
    stage_5.gateway.wait_for(f"charge point {level} online".replace("|", r"\|"), after=seen)


@pytest.mark.parametrize(
    "target",
    [
        *("/", "/ocpp", "/ocpp/", "//", "/other/CP1", "/OCPP/CP1", "/ocppx/CP1", "/ocpp?CP1", "ws://h/CP1", "*"),
        *("/ocpp/%FF", "/ocpp/%C3", "/ocpp/%ED%A0%80", "/ocpp/" + "x" * 256, "/ocpp/" + "%C3%B6" * 128),
        *("/ocpp/Reply", "/ocpp/Error", "/ocpp/Status", "/ocpp/%52eply", "//ocpp//Reply/"),
    ],
)
def test_an_unusable_path_or_identity_is_not_found(stage_5: Stage, target: str) -> None:
    assert_refused(ask(stage_5.port, request(target)), 404)


@pytest.mark.parametrize("identity", ["reply", "Reply2", "Reply%2Fx", "gateway", "cs"])
def test_what_only_resembles_a_reserved_identity_may_connect(stage_5: Stage, identity: str) -> None:
    assert ask(stage_5.port, request(f"/ocpp/{identity}")).status == 101


def test_a_reserved_identity_is_explained_in_the_log(stage_5: Stage) -> None:
    seen = len(stage_5.gateway.lines)
    ask(stage_5.port, request("/ocpp/Reply"))
    stage_5.gateway.wait_for(r"'Reply'.*reserved.*404", after=seen)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /ocpp/CP1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /ocpp/CP1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
        b"HEAD /ocpp/CP1 HTTP/1.0\r\n\r\n",
        b"GET /ocpp/CP1 HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"hello\r\n\r\n",
    ],
)
def test_what_is_no_upgrade_is_told_what_this_is(stage_5: Stage, data: bytes) -> None:
    answer = ask(stage_5.port, data)
    assert_refused(answer, 426)
    assert answer.headers["upgrade"] == "websocket"


@pytest.mark.parametrize(
    ("leave_out", "add"),
    [
        ("Connection: Upgrade\r\n", ""),  # some charge points do (reference: Q3)
        ("Connection: Upgrade\r\n", "Connection: keep-alive, upgrade\r\n"),
        ("Upgrade: websocket\r\n", "upgrade:WebSocket\r\n"),
        ("Host: localhost\r\n", ""),
        ("Sec-WebSocket-Protocol: ocpp1.6\r\n", "Sec-WebSocket-Protocol: ,ocpp1.6,,ocpp1.6 ,\r\n"),
        ("Sec-WebSocket-Protocol: ocpp1.6\r\n", "Sec-WebSocket-Protocol:\r\nSec-WebSocket-Protocol: ocpp1.6\r\n"),
        ("", "Origin: null\r\n"),
        ("", "Origin: http://elsewhere.example\r\n"),
        ("", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"),
    ],
)
def test_odd_requests_are_tolerated(stage_5: Stage, cid: str, leave_out: str, add: str) -> None:
    data = request(f"/ocpp/{cid}").decode().replace(leave_out, "").replace("\r\n\r\n", f"\r\n{add}\r\n").encode()
    answer = ask(stage_5.port, data)
    assert answer.status == 101
    assert answer.headers["sec-websocket-protocol"] == "ocpp1.6"
    assert "sec-websocket-extensions" not in answer.headers


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["ocpp2.1", "ocpp2.0.1", "ocpp1.6"], "ocpp2.1"),
        (["ocpp1.6, ocpp2.1"], "ocpp1.6"),
        (["ocpp9, ocpp2.0.1, ocpp1.6"], "ocpp2.0.1"),
    ],
)
def test_the_charge_points_order_decides_on_the_version(
    stage_5: Stage, cid: str, offered: list[str], chosen: str
) -> None:
    assert ask(stage_5.port, request(f"/ocpp/{cid}", offered=offered)).headers["sec-websocket-protocol"] == chosen


def test_without_a_subprotocol_there_is_no_connection(stage_5: Stage, cid: str) -> None:
    assert_refused(ask(stage_5.port, request(f"/ocpp/{cid}", offered=[])), 400)
    assert_refused(ask(stage_5.port, request(f"/ocpp/{cid}", offered=[" , "])), 400)


def test_without_a_common_subprotocol_the_connection_is_closed_at_once(stage_5: Stage, cid: str) -> None:
    """OCPP-J 1.6, 3.2: complete the handshake without the header, then close."""
    with socket.create_connection(("127.0.0.1", stage_5.port), timeout=LIMIT) as connection:
        connection.sendall(request(f"/ocpp/{cid}", offered=["ocpp1.5", "soap"]) + masked(b'[2,"1","A",{}]'))
        received = b""
        while b"\r\n\r\n\x88" not in received:
            piece = connection.recv(65536)
            assert piece, received
            received += piece
    head, _, close = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-protocol" not in head.lower()
    assert close[2:4] == (1002).to_bytes(2, "big")
    assert not stage_5.service.left(cid)


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("Version: 13", "Version: 8", 400),
        ("Key: dGhlIHNhbXBsZSBub25jZQ==", "Key: short", 400),
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", "", 400),
        ("HTTP/1.1", "HTTP/1.0", 505),
    ],
)
def test_what_no_websocket_can_come_of_is_refused(stage_5: Stage, cid: str, old: str, new: str, status: int) -> None:
    answer = ask(stage_5.port, request(f"/ocpp/{cid}").decode().replace(old, new).encode())
    assert_refused(answer, status)


@pytest.mark.parametrize("flood", [b"X: " + b"x" * 16384, b"X: y\r\n" * 3000, b""])
def test_a_head_without_end_is_refused(stage_5: Stage, cid: str, flood: bytes) -> None:
    head = request(f"/ocpp/{cid}")[:-2] if flood else request("/ocpp/" + "x" * 16384)[:-4]
    assert_refused(ask(stage_5.port, head + flood), 431)


def test_what_a_peer_says_is_not_repeated_to_it_nor_does_it_break_the_log(stage_5: Stage) -> None:
    seen = len(stage_5.gateway.lines)
    for target in ("/evil/evil", "/ocpp/%FFevil", "/ocpp/Reply?evil", "/ocpp/evil%0A2026-01-01 evil"):
        answer = ask(stage_5.port, request(target, "Evil: evil", offered=["evil\x01"]))
        assert "evil" not in f"{answer.line} {answer.headers} {answer.body}"
    stage_5.gateway.wait_for(r"evil\\n2026", after=seen)


def test_a_frame_right_behind_the_request_is_not_lost(stage_5: Stage, cid: str) -> None:
    with socket.create_connection(("127.0.0.1", stage_5.port), timeout=LIMIT) as connection:
        connection.sendall(request(f"/ocpp/{cid}") + masked(b'[2,"1","Early",{}]'))
        assert stage_5.service.take(f"ocpp/cp/{cid}/Early").content["UniqueId"] == "1"


def test_a_version_belongs_to_its_connection(stage_5: Stage, cid: str) -> None:
    """Some charge points probe with 1.6 first (reference: Q18)."""
    for version in ("ocpp1.6", "ocpp2.0.1", "ocpp1.6"):
        with ChargePoint(stage_5.port, cid, version) as charge_point:
            charge_point.send(2, "1", "Hello", {})
            properties = stage_5.service.take(f"ocpp/cp/{cid}/Hello").properties
            assert properties is not None
            assert ("version", version) in properties.UserProperty


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A gateway whose listener is set otherwise than by default."""
    settings = """
    [[listener]]
    endpoint = "{endpoint}"
    path = "/a/b"
    no_subprotocol = "ocpp1.6"
    subprotocol_mismatch = "reject"
    ping_interval = 1
    ping_timeout = 1
    [limits]
    handshake_timeout = 1
    outgoing_buffer = 65536
    """
    with set_up(tmp_path_factory.mktemp("peculiar"), "mosquitto 5", settings) as stage:
        yield stage


def test_a_subprotocol_may_be_assumed(peculiar: Stage, cid: str) -> None:
    answer = ask(peculiar.port, request(f"/a/b/{cid}", offered=[]))
    assert answer.status == 101
    assert "sec-websocket-protocol" not in answer.headers
    peculiar.gateway.wait_for(f"{cid} online with ocpp1.6")


def test_a_mismatch_of_subprotocols_may_be_refused(peculiar: Stage, cid: str) -> None:
    """What the test TC_B_58_CSMS of OCPP 2.0.1 asks for."""
    assert_refused(ask(peculiar.port, request(f"/a/b/{cid}", offered=["ocpp0.1"])), 400)
    answer = ask(peculiar.port, request(f"/a/b/{cid}", offered=["ocpp0.1,ocpp2.0.1"]))
    assert answer.headers["sec-websocket-protocol"] == "ocpp2.0.1"


@pytest.mark.parametrize(("target", "status"), [("/a/b/CP1", 101), ("/a/b/c/CP1", 101), ("/a/CP1", 404), ("/a/b", 404)])
def test_the_path_is_a_setting(peculiar: Stage, target: str, status: int) -> None:
    assert ask(peculiar.port, request(target)).status == status


@pytest.mark.parametrize("said", [b"", b"G", request("/a/b/CP1")[:-1]])
def test_who_does_not_finish_its_request_is_sent_away(peculiar: Stage, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", peculiar.port), timeout=LIMIT) as connection:
        connection.sendall(said)
        answer = b""
        with suppress(ConnectionResetError):
            answer = connection.recv(65536)
        assert answer == b""


def test_who_answers_pings_stays_and_who_does_not_is_gone(peculiar: Stage, cid: str) -> None:
    with ChargePoint(peculiar.port, cid, path="/a/b") as alive:
        with silent_charge_point(peculiar.port, f"{cid}-2", path="/a/b"):
            peculiar.gateway.wait_for(f"{cid}-2 offline", LIMIT)
        alive.send(2, "1", "Here", {})
        assert peculiar.service.take(f"ocpp/cp/{cid}/Here").content["UniqueId"] == "1"


def test_who_does_not_read_is_gone(peculiar: Stage, cid: str) -> None:
    with silent_charge_point(peculiar.port, cid, path="/a/b"):
        peculiar.gateway.wait_for(f"{cid} online")
        with ChargePoint(peculiar.port, f"{cid}-2", path="/a/b") as other:
            while not any(f"{cid} offline" in line for line in peculiar.gateway.lines):
                peculiar.service.send(cid, [3, "1", {"data": "x" * 500_000}])
                # In the meantime nobody else has to wait.
                peculiar.service.send(f"{cid}-2", [3, "1", {}])
                assert other.receive() == [3, "1", {}]
    peculiar.gateway.wait_for(f"{cid} offline: the charge point does not read")
    error = peculiar.service.take(f"ocpp/cp/Error/{cid}").content
    assert (error["UniqueId"], error["ErrorDetails"]["reason"]) == ("1", "disconnected")


# Credentials


@pytest.mark.parametrize(("name", "status"), [("", 101), ("other", 401)])
def test_where_anybody_may_connect_a_name_has_to_be_right_all_the_same(
    stage_5: Stage, cid: str, name: str, status: int
) -> None:
    assert ask(stage_5.port, request(f"/ocpp/{cid}", f"Authorization: {basic(name or cid, b'any')}")).status == status


PASSWORDS = {
    "CP1": b"correct horse:battery",
    "a:b %": b"0123456789abcdef",
    "größe": "größe".encode(),
    # The example of OCPP-J 1.6, 6.2.2: a key of raw bytes, zero and not UTF-8 among them.
    "AL1000": bytes.fromhex("0001020304050607FFFFFFFFFFFFFFFFFFFFFFFF"),
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A gateway with a password file."""
    directory = tmp_path_factory.mktemp("guarded")
    file = directory / "passwd"
    for identity, password in PASSWORDS.items():
        set_password(file, identity, password)
    with set_up(directory, "mosquitto 5", "", "--auth", f"htpasswd:{file}") as stage:
        yield stage


@pytest.mark.parametrize("identity", PASSWORDS)
def test_the_right_password_lets_in(guarded: Stage, identity: str) -> None:
    with ChargePoint(guarded.port, identity, password=PASSWORDS[identity]) as charge_point:
        assert charge_point.socket.subprotocol == "ocpp1.6"


@pytest.mark.parametrize(
    ("target", "authorization", "status"),
    [
        ("/ocpp/CP1", None, 401),
        ("/ocpp/CP1", basic("CP1", b"wrong"), 401),
        ("/ocpp/CP1", basic("CP1", b""), 401),
        ("/ocpp/CP1", basic("CP1", b"correct horse"), 401),
        ("/ocpp/CP1", basic("CP2", PASSWORDS["CP1"]), 401),
        ("/ocpp/CP1", basic("cp1", PASSWORDS["CP1"]), 401),
        ("/ocpp/CP1", basic("CP1:correct horse", b"battery"), 101),
        ("/ocpp/CP1", "Basic " + base64.b64encode(b"CP1").decode(), 401),
        ("/ocpp/CP1", "Basic not-base64!", 401),
        ("/ocpp/CP1", "Basic", 401),
        ("/ocpp/CP1", "Bearer abc", 401),
        ("/ocpp/CP1", "basic  " + basic("CP1", PASSWORDS["CP1"])[6:] + " ", 101),
        ("/ocpp/a%3Ab%20%25", basic("a:b %", b"0123456789abcdef"), 101),
        ("/ocpp/a", basic("a", b"b %:0123456789abcdef"), 404),
        ("/ocpp/AL1000", "Basic QUwxMDAwOgABAgMEBQYH////////////////", 101),
        ("/ocpp/CP2", basic("CP2", PASSWORDS["CP1"]), 404),
        ("/ocpp/CP2", None, 401),
        ("/ocpp/Reply", None, 404),
        ("/other/CP1", basic("CP1", PASSWORDS["CP1"]), 404),
    ],
)
def test_credentials_are_checked(guarded: Stage, target: str, authorization: str | None, status: int) -> None:
    headers = [] if authorization is None else [f"Authorization: {authorization}"]
    answer = ask(guarded.port, request(target, *headers))
    assert answer.status == status
    if status != 101:
        assert_refused(answer, status)


def test_a_subprotocol_is_not_discussed_with_strangers(guarded: Stage) -> None:
    assert_refused(ask(guarded.port, request("/ocpp/CP1", offered=[])), 401)
    assert_refused(ask(guarded.port, request("/ocpp/CP1", offered=["ocpp1.5"])), 401)


def test_no_password_gets_into_the_log(guarded: Stage) -> None:
    ask(guarded.port, request("/ocpp/CP1", f"Authorization: {basic('CP1', b'correct cow')}"))
    with ChargePoint(guarded.port, "CP1", password=PASSWORDS["CP1"]) as charge_point:
        charge_point.socket.send("[]")
    printed = guarded.gateway.report()
    assert "wrong password" in printed
    for secret in ("correct", basic("CP1", b"correct cow")[6:], basic("CP1", PASSWORDS["CP1"])[6:]):
        assert secret not in printed


def test_a_failed_login_leaves_the_connected_one_alone(guarded: Stage) -> None:
    with ChargePoint(guarded.port, "CP1", password=PASSWORDS["CP1"]) as charge_point:
        assert ask(guarded.port, request("/ocpp/CP1", f"Authorization: {basic('CP1', b'wrong')}")).status == 401
        charge_point.send(2, "1", "Here", {})
        assert guarded.service.take("ocpp/cp/CP1/Here").content["UniqueId"] == "1"


def test_a_changed_password_file_takes_effect_at_the_next_connection(tmp_path: Path) -> None:
    file = tmp_path / "passwd"
    set_password(file, "CP1", b"old")
    with set_up(tmp_path, "mosquitto 5", f'[auth]\ncheckers = ["htpasswd:{file}"]\n') as stage:
        made = subprocess.run(
            [sys.executable, "-m", "ocppgw.cli", "passwd", file, "CP1"], check=True, capture_output=True, text=True
        )
        key = made.stdout.removesuffix("\n").encode()
        assert_refused(ask(stage.port, request("/ocpp/CP1", f"Authorization: {basic('CP1', b'old')}")), 401)
        with ChargePoint(stage.port, "CP1", password=key) as charge_point:
            # A file with a mistake leaves the last good one in force.
            file.write_text("CP1\n", encoding="utf-8")
            with ChargePoint(stage.port, "CP1", password=key):
                assert charge_point.close_code() == (4001, "replaced")


def test_twisted_s_password_file_cannot_tell_unknown_from_wrong(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("CP1:secret\n", encoding="utf-8")
    with set_up(tmp_path, "mosquitto 5", "", "--auth", f"file:{file}") as stage:
        for identity, password, status in (("CP1", b"secret", 101), ("CP1", b"wrong", 401), ("CP2", b"secret", 401)):
            answer = ask(stage.port, request(f"/ocpp/{identity}", f"Authorization: {basic(identity, password)}"))
            assert answer.status == status
        assert_refused(ask(stage.port, request("/ocpp/CP1")), 401)


def test_checkers_are_asked_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "passwd"
    set_password(file, "CP1", b"secret")
    with set_up(tmp_path, "mosquitto 5", "", "--auth", f"htpasswd:{file}", "--auth", "anonymous") as stage:
        for identity, password, status in (("CP1", b"secret", 101), ("CP1", b"wrong", 401), ("CP2", b"any", 101)):
            answer = ask(stage.port, request(f"/ocpp/{identity}", f"Authorization: {basic(identity, password)}"))
            assert answer.status == status


def assert_refused(answer: Answer, status: int) -> None:
    """See that an answer is one of ours: one line of plain text."""
    assert answer.status == status
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["connection"] == "close"
    assert answer.body.count("\n") == 1
    assert answer.body.endswith("\n")
    assert int(answer.headers["content-length"]) == len(answer.body)
    if status == 401:
        assert answer.headers["www-authenticate"].startswith('Basic realm="')
