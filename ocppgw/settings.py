"""Everything the operator can set: each key with its default, what it allows and what it means.

A section of the settings file is a dataclass, a field is a key, and its metadata says the rest, so that one definition
serves reading, checking and documentation. How a file becomes one of these is in ``config``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ocppgw.topics import TopicTemplate

Check = Callable[[Any], Any]


class SettingsError(Exception):
    """A setting that cannot be used; the text is the one line that the operator sees."""


def setting(default: Any, check: Check, text: str, hidden: bool = False) -> Any:
    """Declare a key. check: turns the written value into the used one or raises ValueError('must be ...').

    hidden: the value may be, or have in it, a secret and is never shown.
    """
    metadata = {"check": check, "text": text, "hidden": hidden}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, repr=not hidden, metadata=metadata)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("must be a text")
    return value


def _name(value: Any) -> str:
    if re.search(r"[\s/+#$\x00-\x1f\x7f-\x9f\ud800-\udfff]", _text(value)):
        raise ValueError("must be a name without white space, / + # $")
    return str(value)


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list or any(type(item) is not str for item in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _mapping(value: Any) -> Mapping[str, str]:
    if type(value) is not dict or any(type(item) is not str for item in value.values()):
        raise ValueError("must be a table of texts")
    return dict(value)


def _choice(*choices: str) -> Check:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("must be one of " + ", ".join(choices))
        return str(value)

    return check


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def _seconds(low: float, high: float) -> Check:
    """Seconds as a number, or EMQX's spelling "500ms", "30s", "5m", "2h", "1d"."""

    def check(value: Any) -> float:
        if type(value) is str and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", value)):
            value = float(match[1]) * _UNITS[match[2]]
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f'must be seconds from {low:g} to {high:g}, or a duration such as "30s"')
        return float(value)

    return check


def secret(value: Any) -> str:
    """A text, or where to find one: "${env:NAME}", "${file:PATH}"."""
    match = re.fullmatch(r"\$\{(env|file):(.+)\}", _text(value))
    if match is None:
        return str(value)
    if match[1] == "env":
        if match[2] not in os.environ:
            raise ValueError(f"must name an environment variable that is set; {match[2]} is not")
        return os.environ[match[2]]
    try:
        return Path(match[2]).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"must name a readable file ({error})") from None


@dataclass(frozen=True, slots=True)
class Listener:
    """One ``[[listener]]``: where charge points connect."""

    endpoint: str = setting("tcp:33033:interface=127.0.0.1", _text, "Twisted's endpoint string")
    path: str = setting("/ocpp", _text, "path before the identity")
    ping_interval: float = setting(20.0, _seconds(0, 86400), "seconds between pings, 0 for none")
    ping_timeout: float = setting(20.0, _seconds(1, 86400), "seconds without any byte after a ping until it is closed")
    no_subprotocol: str = setting(
        "reject", _choice("reject", "ocpp1.6", "ocpp2.0.1", "ocpp2.1"), "version assumed when none is offered"
    )
    subprotocol_mismatch: str = setting(
        "close", _choice("close", "reject"), "none served: accept and close with 1002 (OCPP-J 3.2), or answer 400"
    )
    compression: str = setting("2.x", _choice("2.x", "all", "none"), "versions that may compress (RFC 7692)")
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Mqtt:
    """``[mqtt]``: the broker."""

    url: str = setting("embedded:", _text, "mqtt://, mqtts://, mqtt+unix://, ws://, wss:// or embedded:[PORT]", True)
    version: str = setting("auto", _choice("auto", "5", "3.1.1"), "auto: 5, falling back to 3.1.1")
    username: str | None = setting(None, secret, "user name at the broker", True)
    password: str | None = setting(None, secret, "password at the broker", True)
    client_id: str = setting("", _text, "MQTT client id; ocppgw-<node> when empty")
    keepalive: int = setting(30, _integer(5, 65535), "seconds, MQTT's keep alive")
    session_expiry: int = setting(
        3600, lambda value: int(_seconds(0, 0xFFFFFFFF)(value)), "seconds that the broker keeps our session (MQTT 5)"
    )
    ca_file: str | None = setting(None, _text, "PEM file of trusted authorities; the system's when empty")
    cert_file: str | None = setting(None, _text, "PEM file of the client certificate")
    key_file: str | None = setting(None, _text, "PEM file of the client certificate's key")
    server_name: str | None = setting(None, _text, "name in the broker's certificate, when it is not the host's")
    alpn: tuple[str, ...] = setting((), _texts, 'protocols of ALPN, e.g. ["x-amzn-mqtt-ca"]')
    outage_grace: float = setting(10.0, _seconds(0, 3600), "seconds without broker until charge points get 503")


@dataclass(frozen=True, slots=True)
class Auth:
    """``[auth]``: who may connect."""

    checkers: tuple[str, ...] = setting((), _texts, "Twisted's --auth strings, asked in this order", True)


@dataclass(frozen=True, slots=True)
class Upstream:
    """``[upstream]``: from charge points to MQTT."""

    topic: str = setting("ocpp/cp/${cid}/${action}", _text, "CALL, SEND")
    topic_override_mapping: Mapping[str, str] = setting(dict, _mapping, "the same, by action")
    reply_topic: str = setting("ocpp/cp/Reply/${cid}", _text, "CALLRESULT")
    error_topic: str = setting("ocpp/cp/Error/${cid}", _text, "CALLERROR, CALLRESULTERROR, delivery failures")
    invalid_topic: str = setting("ocpp/gateway/${node}/invalid", _text, "frames that the gateway refused; empty: none")
    qos: int = setting(1, _integer(0, 1), "quality of service")
    awaiting_timeout: float = setting(
        30.0, _seconds(1, 86400), "seconds that a service's answer may take until it counts"
    )
    log_overdue: bool = setting(False, _truth, "log each answer of a service that is overdue")
    max_queue: int = setting(10000, _integer(100, 10_000_000), "messages that wait for the broker until reading pauses")
    max_queue_bytes: int = setting(67108864, _integer(65536, 1 << 40), "bytes of them")


@dataclass(frozen=True, slots=True)
class Downstream:
    """``[dnstream]``: from MQTT to charge points."""

    topic: str = setting("ocpp/cs/${cid}/+/+", _text, "topic filter of one charge point")
    qos: int = setting(1, _integer(0, 1), "quality of service")
    strict_mode: bool = setting(True, _truth, "one CALL at a time (OCPP-J 4.1.1)")
    call_timeout: float = setting(30.0, _seconds(1, 86400), "seconds that an answer may take")
    max_mqueue_len: int = setting(100, _integer(1, 100_000), "CALLs that wait for one charge point")
    half_duplex: bool = setting(False, _truth, "write no CALL while the charge point waits for an answer")
    hold_until_boot: float = setting(
        0.0, _seconds(0, 3600), "seconds to hold CALLs back at most until the first BootNotification is answered"
    )
    min_gap: float = setting(0.0, _seconds(0, 60), "least seconds between two frames")
    reply_delay: float = setting(0.0, _seconds(0, 60), "seconds that an answer is held back")
    max_outgoing_size: int = setting(0, _integer(0, 1 << 28), "bytes of a frame, 0 for limits.message_size")
    retries: int = setting(0, _integer(0, 10), "how often an unanswered CALL is written again, with the same id")
    retry_interval: float = setting(30.0, _seconds(1, 86400), "seconds until it is written again")
    late_window: float = setting(
        600.0, _seconds(0, 86400), "seconds after its timeout that an answer is marked as late"
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """``[limits]``: what a peer may take."""

    handshake_timeout: float = setting(10.0, _seconds(1, 3600), "seconds from the connection to its 101")
    header_size: int = setting(16384, _integer(1024, 1 << 20), "bytes of a request's head")
    message_size: int = setting(1048576, _integer(1024, 1 << 28), "bytes of a WebSocket message, both ways")
    outgoing_buffer: int = setting(1048576, _integer(65536, 1 << 30), "bytes that a peer may leave unread")


@dataclass(frozen=True, slots=True)
class ChargePoint:
    """One ``[[charge_point]]``: what differs for some. match: a pattern of identities, e.g. ``WB-*``."""

    match: str
    changes: Mapping[str, Any]


PER_CHARGE_POINT = (
    *("strict_mode", "call_timeout", "max_mqueue_len", "half_duplex", "hold_until_boot", "min_gap", "reply_delay"),
    *("max_outgoing_size", "retries", "retry_interval", "late_window", "message_format_checking", "on_violation"),
    *("no_subprotocol", "ping_interval", "ping_timeout"),
)
"""The keys that may differ for one charge point."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The templates of all topics, with mountpoint and node filled in. reserved: identities, topic-safe."""

    call: TopicTemplate
    overrides: Mapping[str, TopicTemplate]
    reply: TopicTemplate
    error: TopicTemplate
    invalid: TopicTemplate | None
    downstream: TopicTemplate
    reserved: frozenset[str]


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it."""

    topics: Topics
    node: str = setting("", _name, "name of this gateway process; host name and first port when empty")
    mountpoint: str = setting("", _text, "prefix of every topic")
    payload_format: str = setting("object", _choice("object", "array"), "EMQX's object form or OCPP-J's array")
    message_format_checking: str = setting(
        "disable", _choice("all", "upstream_only", "dnstream_only", "disable"), "payloads against their JSON schemas"
    )
    on_violation: str = setting(
        "reject", _choice("reject", "warn"), "refuse what is against its schema, or count, report and pass it on"
    )
    json_schema_dir: str | None = setting(None, _text, "folder of JSON schemas, in the place of those of OCPP")
    drain_seconds: float = setting(10.0, _seconds(0, 3600), "seconds that a stop may take at most")
    listeners: tuple[Listener, ...] = (Listener(),)
    mqtt: Mqtt = Mqtt()
    auth: Auth = Auth()
    upstream: Upstream = Upstream()
    dnstream: Downstream = Downstream()
    limits: Limits = Limits()
    charge_points: tuple[ChargePoint, ...] = ()
    notices: tuple[str, ...] = ()

    def changes_for(self, identity: str) -> dict[str, Any]:
        """Give back what differs for one charge point; later sections win."""
        changes: dict[str, Any] = {}
        for section in self.charge_points:
            if fnmatchcase(identity, section.match):
                changes.update(section.changes)
        return changes


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is. transport: tcp, unix, websockets or embedded; host: a path for unix."""

    transport: str
    host: str
    port: int
    tls: bool = False
    path: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)


_SCHEMES = {
    "mqtt": ("tcp", False, 1883),
    "mqtts": ("tcp", True, 8883),
    "ws": ("websockets", False, 80),
    "wss": ("websockets", True, 443),
}


def parse_broker(url: str, source: str = "command line") -> BrokerAddress:
    """Read ``mqtts://user:password@host:port``. Raises SettingsError, which never shows the password."""
    try:
        return _broker(url)
    except ValueError:
        # Also of a URL that is not one: what stands before its last @ may be a password, what comes after ? a token.
        shown = re.sub(r"(?s)^([\w+.-]*://)?.*@", r"\1...@", url)
        shown = re.sub(r"(?s)\?.*", "?...", shown)
        allowed = "must be mqtt://HOST[:PORT], mqtts://, ws://, wss://, mqtt+unix:///PATH or embedded:[PORT]"
        raise SettingsError(f"{source}: mqtt.url = {shown!r}: {allowed}") from None


def _broker(url: str) -> BrokerAddress:
    scheme, _, rest = url.partition(":")
    if scheme == "embedded":
        if rest and not (rest.isdecimal() and 0 < int(rest) < 65536):
            raise ValueError
        return BrokerAddress("embedded", "127.0.0.1", int(rest or 1883))
    parts = urlsplit(url)
    username = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    if scheme == "mqtt+unix" and not parts.hostname and parts.path.startswith("/"):
        return BrokerAddress("unix", unquote(parts.path), 0, username=username, password=password)
    if scheme not in _SCHEMES or not parts.hostname or parts.port == 0 or parts.fragment:
        raise ValueError
    transport, tls, default_port = _SCHEMES[scheme]
    path = ""
    if transport == "websockets":
        path = (parts.path or "/mqtt") + (f"?{parts.query}" if parts.query else "")
    elif parts.path.strip("/") or parts.query:
        raise ValueError
    return BrokerAddress(transport, parts.hostname, parts.port or default_port, tls, path, username, password)
