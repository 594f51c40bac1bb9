"""The opening handshake of a charge point: what its request says, and what it is told when it may not come in.

Real charge points' requests are odd (reference: Q1 to Q5): no Connection header, a doubled or trailing slash, the
absolute form, a repeated subprotocol. So the request is read here, leniently, and what is left of it for the WebSocket
library is written anew. Pure: bytes in, a value or a Refusal out. What a peer sent never appears in an answer.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

MAX_EXTENSIONS = 1024
"""Characters of Sec-WebSocket-Extensions that are looked at."""
MAX_IDENTITY = 255
"""Bytes of an identity, decoded. 2.x allows 48 characters, 1.6 names no limit."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is not 101. reason: for our log."""

    reason: str
    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()


_RETRY = (("Retry-After", "10"),)
_CHALLENGE = (("WWW-Authenticate", 'Basic realm="ocppgw", charset="UTF-8"'),)

NOT_WEBSOCKET = Refusal(
    "not a WebSocket upgrade", 426, "this is a WebSocket endpoint for OCPP-J", (("Upgrade", "websocket"),)
)
HEAD_TOO_LARGE = Refusal("head too large", 431, "the request's head is too large")
BAD_REQUEST = Refusal("bad request", 400, "the WebSocket handshake is not well-formed (RFC 6455, 4.2.1)")
BAD_VERSION = Refusal(
    "bad WebSocket version", 400, "WebSocket version 13 is served", (("Sec-WebSocket-Version", "13"),)
)
HTTP_VERSION = Refusal("bad HTTP version", 505, "HTTP/1.1 is served")
WRONG_PATH = Refusal("wrong path", 404, "no charge point has this path")
BAD_IDENTITY = Refusal("bad identity", 404, "the identity is empty, too long or not UTF-8")
RESERVED = Refusal("reserved identity", 404, "this identity is reserved")
NO_CREDENTIALS = Refusal("no credentials", 401, "credentials are needed", _CHALLENGE)
NOT_ITS_NAME = Refusal("user name is not the identity", 401, "the user name must be the identity", _CHALLENGE)
UNKNOWN = Refusal("unknown identity", 404, "no such charge point")
DENIED = Refusal("wrong password", 401, "wrong credentials", _CHALLENGE)
NO_SUBPROTOCOL = Refusal("no subprotocol offered", 400, "a subprotocol is needed, e.g. ocpp1.6 (OCPP-J, 3.1.2)")
NO_COMMON_SUBPROTOCOL = Refusal("no common subprotocol", 400, "none of the offered subprotocols is served")
BROKER_AWAY = Refusal("broker away", 503, "try again later", _RETRY)
BACKEND_AWAY = Refusal("authentication backend away", 503, "try again later", _RETRY)
INTERNAL_ERROR = Refusal("internal error", 500, "internal error")

_PHRASES = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Refused(Exception):
    """This request is answered with a refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A request for a WebSocket.

    offered: subprotocols in the client's order, without empty and repeated ones. authorization: the header's value.
    extensions: the offers of compression that can be accepted.
    """

    identity: str
    offered: tuple[str, ...]
    authorization: str | None = field(repr=False)
    key: str
    websocket_version: str
    extensions: str = ""

    def head(self) -> bytes:
        """The request as the WebSocket library wants it; the path no longer matters."""
        lines = [
            "GET / HTTP/1.1",
            "Host: ocppgw",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {self.key}",
            f"Sec-WebSocket-Version: {self.websocket_version}",
        ]
        if self.offered:
            lines.append(f"Sec-WebSocket-Protocol: {', '.join(self.offered)}")
        if self.extensions:
            lines.append(f"Sec-WebSocket-Extensions: {self.extensions}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def password(self) -> bytes | None:
        """What stands behind ``identity:`` in the Basic credentials; None without any. Raises Refused."""
        scheme, _, encoded = (self.authorization or "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            decoded = base64.b64decode(encoded.strip(), validate=True)
        except ValueError:
            # Also what is not ASCII; binascii.Error is one.
            raise Refused(NOT_ITS_NAME) from None
        name = self.identity.encode("utf-8") + b":"
        if not decoded.startswith(name):
            raise Refused(NOT_ITS_NAME)
        return decoded[len(name) :]


def parse_upgrade(head: bytes, path: str) -> Upgrade:
    """Read a request's head. path: what comes before the identity, without a slash at its end. Raises Refused."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, http_version = rest.rpartition(" ")
    headers = _headers(lines)
    tokens = {token.strip().lower() for token in headers.get("upgrade", "").split(",")}
    if method != "GET" or "websocket" not in tokens:
        raise Refused(NOT_WEBSOCKET)
    if http_version != "HTTP/1.1":
        raise Refused(HTTP_VERSION)
    identity = _identity(target, path)
    websocket_version = headers.get("sec-websocket-version", "")
    if websocket_version != "13":
        raise Refused(BAD_VERSION)
    key = headers.get("sec-websocket-key", "")
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
        raise Refused(BAD_REQUEST)
    tokens_offered = (token.strip() for token in headers.get("sec-websocket-protocol", "").split(","))
    offered = tuple(dict.fromkeys(token for token in tokens_offered if re.fullmatch(r"[!-+\--~]+", token)))
    extensions = _extensions(headers.get("sec-websocket-extensions", ""))
    return Upgrade(identity, offered, headers.get("authorization"), key, websocket_version, extensions)


_DEFLATE = re.compile(
    r"(permessage-deflate|(server|client)_no_context_takeover|client_max_window_bits"
    r'|(server|client)_max_window_bits="?(9|1[0-5])"?)'
)


def _extensions(header: str) -> str:
    """Keep the offers of compression that can be accepted; what is not understood is declined (RFC 7692, 5.1).

    Windows of 8 bits are such: zlib does not have them, and Autobahn fails the handshake.
    """
    offers = []
    for offer in header[:MAX_EXTENSIONS].split(","):
        parts = [re.sub(r"\s", "", part) for part in offer.split(";")]
        names = [part.partition("=")[0] for part in parts]
        understood = all(_DEFLATE.fullmatch(part) for part in parts) and len(set(names)) == len(names)
        if understood and names[0] == "permessage-deflate":
            offers.append("; ".join(parts).replace('"', ""))
    return ", ".join(offers)


def _headers(lines: list[str]) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            name, value = name.strip().lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _identity(target: str, path: str) -> str:
    target = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", "", target)
    segments = [segment for segment in re.split(r"[?#]", target, maxsplit=1)[0].split("/") if segment]
    prefix = [segment for segment in path.split("/") if segment]
    if segments[: len(prefix)] != prefix:
        raise Refused(WRONG_PATH)
    if len(segments) == len(prefix):
        raise Refused(BAD_IDENTITY)
    raw = unquote_to_bytes(segments[-1].encode("latin-1"))
    try:
        identity = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(BAD_IDENTITY) from None
    if len(raw) > MAX_IDENTITY:
        raise Refused(BAD_IDENTITY)
    return identity


def response(refusal: Refusal) -> bytes:
    """Write the answer; the connection is closed after it."""
    body = f"{refusal.text}\n".encode()
    lines = [
        f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}",
        *(f"{name}: {value}" for name, value in refusal.headers),
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
