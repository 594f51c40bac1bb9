"""The opening handshake: odd requests are read, bad ones refused, and no answer repeats what a peer sent."""

from __future__ import annotations

import base64
import io
import re
from http.client import HTTPResponse
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocppgw import handshake
from ocppgw.handshake import Refusal, Refused, Upgrade, parse_upgrade, response

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
REFUSALS = [value for value in vars(handshake).values() if isinstance(value, Refusal)]

HEADERS = {
    "Host": "gateway:33033",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": "ocpp1.6",
}


def head(target: str = "/ocpp/CP1", line: str = "GET {} HTTP/1.1", more: str = "", **changes: str | None) -> bytes:
    """A request's head, in Latin-1. changes: headers with _ for -, None to leave one out. more: further lines."""
    headers = {**HEADERS, **{name.replace("_", "-"): value for name, value in changes.items()}}
    lines = [line.format(target), *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, *more.splitlines()]).encode("latin-1")


def refusal_of(data: bytes, path: str = "/ocpp") -> Refusal:
    with pytest.raises(Refused) as caught:
        parse_upgrade(data, path)
    return caught.value.refusal


def upgrade(identity: str, authorization: str | None = None) -> Upgrade:
    return Upgrade(identity, ("ocpp1.6",), authorization, KEY, "13")


def basic(credentials: bytes) -> str:
    return "Basic " + base64.b64encode(credentials).decode()


# Whatever comes in

ANY_HEADER = st.text(st.characters(max_codepoint=255), max_size=30)
ODD_HEADS = st.builds(
    head,
    target=st.text(st.characters(max_codepoint=255), max_size=30).map(lambda text: "/ocpp/" + text) | ANY_HEADER,
    line=st.sampled_from(["GET {} HTTP/1.1", "GET  {} HTTP/1.1", "POST {} HTTP/1.1", "GET {}", "{}"]),
    more=ANY_HEADER,
    Upgrade=st.none() | st.just("WebSocket") | ANY_HEADER,
    Sec_WebSocket_Key=st.just(KEY) | ANY_HEADER,
    Sec_WebSocket_Version=st.just("13") | ANY_HEADER,
    Sec_WebSocket_Protocol=st.none() | ANY_HEADER,
    Authorization=st.none() | ANY_HEADER | ANY_HEADER.map("Basic {}".format) | st.binary(max_size=30).map(basic),
)
FEW_ODDITIES = st.builds(
    head,
    target=st.binary(max_size=20).map(lambda raw: "/ocpp/" + quote_from_bytes(raw, safe="?#/")),
    Sec_WebSocket_Protocol=ANY_HEADER,
    Authorization=st.binary(max_size=30).map(basic) | ANY_HEADER,
)


@PATIENT
@given(st.binary(max_size=80) | ODD_HEADS | FEW_ODDITIES, st.sampled_from(["/ocpp", "", "/a/b"]))
def test_any_request_is_either_read_or_refused_in_our_own_words(data, path):
    try:
        found = parse_upgrade(data, path)
        password = found.password()
    except Refused as refused:
        answer = refused.refusal
        assert answer in REFUSALS
        return
    assert password is None or isinstance(password, bytes)
    assert 0 < len(found.identity.encode()) <= 255
    assert re.fullmatch(
        rb"GET / HTTP/1\.1\r\nHost: ocppgw\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        rb"Sec-WebSocket-Key: [\w+/]+==\r\nSec-WebSocket-Version: 13\r\n"
        rb"(Sec-WebSocket-Protocol: [!-~]+(, [!-~]+)*\r\n)?\r\n",
        found.head(),
    )


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.reason)
def test_every_answer_is_one_line_of_plain_text(refusal):
    class Socket:
        def makefile(self, mode: str) -> Any:
            return io.BytesIO(response(refusal))

    answer = HTTPResponse(Socket())  # type: ignore[arg-type]
    answer.begin()
    body = answer.read()
    assert answer.status == refusal.status
    assert body == refusal.text.encode() + b"\n"
    assert b"\n" not in body[:-1]
    assert answer.getheader("Content-Length") == str(len(body))
    assert answer.getheader("Content-Type") == "text/plain; charset=utf-8"
    assert answer.getheader("Connection") == "close"
    # RFC 9110: 11.6.1, 10.2.3, 15.5.22
    assert (answer.getheader("WWW-Authenticate") or "").startswith("Basic realm=") is (refusal.status == 401)
    assert (answer.getheader("Retry-After") or "").isdigit() is (refusal.status == 503)
    assert answer.getheader("Upgrade") == ("websocket" if refusal.status == 426 else None)


# The identity (OCPP-J 1.6, 3.1.1)


@PATIENT
@given(st.text(min_size=1, max_size=60))
def test_an_identity_is_percent_decoded_once(identity):
    target = "/ocpp/" + quote_from_bytes(identity.encode(), safe="")
    assert parse_upgrade(head(target), "/ocpp").identity == identity


@pytest.mark.parametrize(
    ("target", "identity"),
    [
        ("/ocpp/CP1", "CP1"),
        ("/ocpp/RDAM%20123", "RDAM 123"),
        ("/ocpp/RDAM%7C123", "RDAM|123"),
        ("/ocpp/a%2Fb%2B%23%3A", "a/b+#:"),
        ("/ocpp/a+b:c|d", "a+b:c|d"),
        ("/ocpp/%252F", "%2F"),
        ("/ocpp/100%", "100%"),
        ("/ocpp/CP1/", "CP1"),
        ("//ocpp//CP1//", "CP1"),
        ("/ocpp/CP1?cid=CP2", "CP1"),
        ("/ocpp/CP1/?a=/b", "CP1"),
        ("/ocpp/CP1#x", "CP1"),
        ("ws://gateway:33033/ocpp/CP1", "CP1"),
        ("http://gateway/ocpp/CP1?x", "CP1"),
        ("/ocpp/site/CP1", "CP1"),
        ("/ocpp/ocpp", "ocpp"),
        ("/ocpp/\xc3\xa9", "é"),  # not encoded, as some charge points send it
        ("/ocpp/" + "x" * 255, "x" * 255),
        ("/ocpp/%00%0D%0A", "\0\r\n"),
        ("/ocpp/a b", "a b"),
    ],
)
def test_the_identity_is_the_last_segment_of_the_path(target, identity):
    assert parse_upgrade(head(target), "/ocpp").identity == identity


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("/", handshake.WRONG_PATH),
        ("", handshake.WRONG_PATH),
        ("*", handshake.WRONG_PATH),
        ("/CP1", handshake.WRONG_PATH),
        ("/other/CP1", handshake.WRONG_PATH),
        ("/ocppx/CP1", handshake.WRONG_PATH),
        ("ws://gateway", handshake.WRONG_PATH),
        ("ws://ocpp/CP1", handshake.WRONG_PATH),
        ("/ocpp", handshake.BAD_IDENTITY),
        ("/ocpp/", handshake.BAD_IDENTITY),
        ("/ocpp?cid=CP1", handshake.BAD_IDENTITY),
        ("/ocpp/" + "x" * 256, handshake.BAD_IDENTITY),
        ("/ocpp/" + "%C3%A9" * 128, handshake.BAD_IDENTITY),
        ("/ocpp/%FF", handshake.BAD_IDENTITY),
        ("/ocpp/\xff", handshake.BAD_IDENTITY),
        ("/ocpp/%C0%AF", handshake.BAD_IDENTITY),
        ("/ocpp/%ED%A0%80", handshake.BAD_IDENTITY),
    ],
)
def test_a_path_without_a_usable_identity_is_not_found(target, refusal):
    assert refusal_of(head(target)) == refusal
    assert refusal.status == 404


def test_the_path_before_the_identity_is_the_listeners():
    assert parse_upgrade(head("/a/b/CP1"), "/a/b").identity == "CP1"
    assert parse_upgrade(head("/CP1"), "").identity == "CP1"
    assert refusal_of(head("/a/CP1"), "/a/b") == handshake.WRONG_PATH


# What is a WebSocket upgrade (RFC 6455, 4.2.1), and what is tolerated


@pytest.mark.parametrize(
    "data",
    [
        head(Connection=None),  # reference: Q3
        head(Connection="keep-alive"),
        head(Upgrade="WebSocket"),
        head(Upgrade="h2c, websocket"),
        head(Host=None),
        head(more="upgrade: h2c"),
        head(more="no header\n: \nX:"),
        head().replace(b"Sec-WebSocket-Key", b"SEC-WEBSOCKET-KEY "),
    ],
)
def test_an_odd_request_is_read(data):
    assert parse_upgrade(data, "/ocpp").key == KEY


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"", handshake.NOT_WEBSOCKET),
        (b"\x16\x03\x01\x02\x00", handshake.NOT_WEBSOCKET),  # TLS on a plain port
        (b"GET / HTTP/1.1\r\nHost: h", handshake.NOT_WEBSOCKET),
        (head(Upgrade=None), handshake.NOT_WEBSOCKET),
        (head(Upgrade="websockets"), handshake.NOT_WEBSOCKET),
        (head(line="POST {} HTTP/1.1"), handshake.NOT_WEBSOCKET),
        (head(target="/elsewhere", Upgrade=None), handshake.NOT_WEBSOCKET),
        (head(line="GET {} HTTP/1.0"), handshake.HTTP_VERSION),
        (head(line="GET {}"), handshake.HTTP_VERSION),
        (head(Sec_WebSocket_Version=None), handshake.BAD_VERSION),
        (head(Sec_WebSocket_Version="8"), handshake.BAD_VERSION),
        (head(Sec_WebSocket_Key=None), handshake.BAD_REQUEST),
        (head(Sec_WebSocket_Key="short"), handshake.BAD_REQUEST),
        (head(more=f"Sec-WebSocket-Key: {KEY}"), handshake.BAD_REQUEST),
    ],
)
def test_what_is_no_upgrade_is_refused(data, refusal):
    assert refusal_of(data) == refusal


@pytest.mark.parametrize(
    ("header", "offered"),
    [
        (None, ()),
        ("", ()),
        ("ocpp1.6", ("ocpp1.6",)),
        ("ocpp2.0.1, ocpp1.6", ("ocpp2.0.1", "ocpp1.6")),
        (",ocpp2.0.1", ("ocpp2.0.1",)),  # reference: Q2
        ("ocpp1.6,, ocpp1.6 ,ocpp2.1", ("ocpp1.6", "ocpp2.1")),
        ("ocpp1.6j, a b, \xe9", ("ocpp1.6j",)),
    ],
)
def test_offered_subprotocols_keep_their_order(header, offered):
    assert parse_upgrade(head(Sec_WebSocket_Protocol=header), "/ocpp").offered == offered


def test_subprotocols_may_come_in_several_headers():
    data = head(more="Sec-WebSocket-Protocol: ocpp2.1")
    assert parse_upgrade(data, "/ocpp").offered == ("ocpp1.6", "ocpp2.1")


def test_the_request_is_written_anew_for_the_library():
    assert upgrade("CP1").head() == (
        b"GET / HTTP/1.1\r\nHost: ocppgw\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: ocpp1.6\r\n\r\n"
    )


# Basic credentials (OCPP-J 1.6, 6.2.2; RFC 7617)


def test_the_password_of_the_specifications_example_is_raw_bytes():
    authorization = "Basic QUwxMDAwOgABAgMEBQYH////////////////"
    assert upgrade("AL1000", authorization).password() == bytes(range(8)) + b"\xff" * 12


@PATIENT
@given(st.text(min_size=1, max_size=20), st.binary(max_size=40))
def test_whatever_stands_behind_identity_and_colon_is_the_password(identity, password):
    assert upgrade(identity, basic(identity.encode() + b":" + password)).password() == password


@pytest.mark.parametrize("authorization", [None, "", "Bearer x", "Digest username=CP1", "Basically Q1AxOng="])
def test_without_basic_credentials_there_is_no_password(authorization):
    assert upgrade("CP1", authorization).password() is None


def test_scheme_and_blanks_are_read_leniently():
    assert upgrade("CP1", "basic   Q1AxOng= ").password() == b"x"


@pytest.mark.parametrize(
    "authorization",
    [
        basic(b"CP2:x"),
        basic(b"CP1"),
        basic(b"cp1:x"),
        basic(b"CP10:x"),
        basic(b":x"),
        basic(b""),
        "Basic",
        "Basic Q1AxOng",
        "Basic Q1AxOn*=",
        "Basic \xe9",
        "Basic Q1AxOng=, Basic Q1AxOng=",
    ],
)
def test_credentials_of_somebody_else_are_refused(authorization):
    with pytest.raises(Refused) as caught:
        upgrade("CP1", authorization).password()
    assert caught.value.refusal == handshake.NOT_ITS_NAME
    assert caught.value.refusal.status == 401


def test_a_request_that_is_printed_does_not_show_its_credentials():
    authorization = basic(b"CP1:hunter2")
    assert authorization not in repr(parse_upgrade(head(Authorization=authorization), "/ocpp"))


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; client_max_window_bits", "permessage-deflate; client_max_window_bits"),
        ('permessage-deflate ; server_max_window_bits = "10"', "permessage-deflate; server_max_window_bits=10"),
        # zlib has no window of 8 bits, and what is not understood is declined: RFC 7692, 5.1 and 7.1.2
        ("permessage-deflate; client_max_window_bits=8", ""),
        ("permessage-deflate; client_max_window_bits=8, permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; colour=blue", ""),
        ("permessage-deflate; client_max_window_bits=10; client_max_window_bits=9", ""),
        ("permessage-deflate; client_max_window_bits=" + "9" * 5000, ""),
        ("x-webkit-deflate-frame, permessage-bzip2", ""),
        ("client_no_context_takeover", ""),
        ("\xff", ""),
    ],
)
def test_only_offers_that_can_be_accepted_are_passed_on(header: str, kept: str) -> None:
    head = "\r\n".join(
        [
            "GET /ocpp/CP1 HTTP/1.1",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            f"Sec-WebSocket-Extensions: {header}",
        ]
    )
    assert parse_upgrade(head.encode("latin-1"), "/ocpp").extensions == kept
