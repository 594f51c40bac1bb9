"""From files and command line to one frozen Settings.

A settings file is TOML, or EMQX 4.4's ``emqx_ocpp.conf``. What cannot be used raises SettingsError with file, key,
value and what is allowed; the keys themselves are in ``settings``.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ocppgw import emqx
from ocppgw.settings import (
    PER_CHARGE_POINT,
    Auth,
    ChargePoint,
    Downstream,
    Limits,
    Listener,
    Mqtt,
    Settings,
    SettingsError,
    Topics,
    Upstream,
    parse_broker,
)
from ocppgw.topics import TemplateError, TopicTemplate, encode_level, reserved_identities

T = TypeVar("T")

_SECTIONS: dict[str, type[Any]] = {
    "mqtt": Mqtt,
    "auth": Auth,
    "upstream": Upstream,
    "dnstream": Downstream,
    "limits": Limits,
}
# EMQX's planned name of strict mode was never spelled right.
_SPELLINGS = {"strit_mode": "strict_mode"}


def load(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings. path: a file, None for defaults. overrides: what the command line says, in the file's form.

    Raises SettingsError.
    """
    table: dict[str, Any] = {}
    notices: tuple[str, ...] = ()
    if path is not None:
        table, notices = _read(path)
    for name, value in (overrides or {}).items():
        if isinstance(value, dict):
            section = table.setdefault(name, {})
            if isinstance(section, dict):
                section.update(value)
        else:
            table[name] = value
    return _settings(table, path or "command line", notices)


def with_version(settings: Settings, version: str) -> Settings:
    """The same settings for a broker whose version of MQTT is known."""
    return replace(settings, mqtt=replace(settings.mqtt, version=version))


def is_tls(endpoint: str) -> bool:
    """Whether an endpoint string, or the one that haproxy: wraps, has TLS."""
    return endpoint.removeprefix("haproxy:").split(":", 1)[0] in ("ssl", "tls", "ocpps")


def _read(path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.endswith(".conf"):
        return emqx.read(text, path)
    try:
        return tomllib.loads(text), ()
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from None


def _settings(table: dict[str, Any], source: str, notices: tuple[str, ...]) -> Settings:
    values: dict[str, Any] = {}
    for name, section in _SECTIONS.items():
        values[name] = _section(section, table.pop(name, {}), f"{source}: {name}")
    values["listeners"] = _listeners(table.pop("listener", None), source)
    values["charge_points"] = _charge_points(table.pop("charge_point", []), source)
    top = _values(Settings, table, f"{source}: ", (*_SECTIONS, "listener", "charge_point"))
    values.update(top)
    if not top["node"] and any("systemd:" in listener.endpoint for listener in values["listeners"]):
        raise SettingsError(f"{source}: a systemd: listener needs a node name, or two workers would share one")
    node = top["node"] or _default_node(values["listeners"])
    values["mqtt"], notice = _with_credentials(values["mqtt"], source)
    values["notices"] = (*notices, *notice)
    return Settings(topics=_topics(values, node, source), **{**values, "node": node})


def _with_credentials(mqtt: Mqtt, source: str) -> tuple[Mqtt, tuple[str, ...]]:
    """Find user name and password: the environment wins over the file, and both over the URL."""
    address = parse_broker(mqtt.url, source)
    for_tls = ("ca_file", "cert_file", "key_file", "server_name", "alpn")
    unused = [name for name in for_tls if getattr(mqtt, name)]
    if unused and not address.tls:
        raise SettingsError(f"{source}: mqtt.{unused[0]}: is for mqtts:// and wss:// only, and mqtt.url has no TLS")
    username = os.environ.get("OCPPGW_MQTT_USER") or mqtt.username or address.username
    password = os.environ.get("OCPPGW_MQTT_PASSWORD") or mqtt.password or address.password
    notice = "the password in the broker's URL can be read by whoever lists processes: OCPPGW_MQTT_PASSWORD cannot"
    return replace(mqtt, username=username, password=password), (notice,) if address.password else ()


def _listeners(tables: Any, source: str) -> tuple[Listener, ...]:
    if tables is None:
        return (Listener(),)
    if type(tables) is not list or not tables:
        raise SettingsError(f"{source}: listener: must be one or more [[listener]] tables")
    listeners = []
    for number, table in enumerate(tables, 1):
        listener = _section(Listener, table, f"{source}: listener {number}")
        if not listener.path.startswith("/"):
            raise SettingsError(f"{source}: listener {number}: path = {listener.path!r}: must begin with /")
        listeners.append(replace(listener, path=listener.path.rstrip("/"), tls=is_tls(listener.endpoint)))
    return tuple(listeners)


def _charge_points(tables: Any, source: str) -> tuple[ChargePoint, ...]:
    if type(tables) is not list or any(type(table) is not dict for table in tables):
        raise SettingsError(f"{source}: charge_point: must be [[charge_point]] tables")
    known = {key.name: key for section in (Settings, Downstream, Listener) for key in fields(section)}
    known = {name: known[name] for name in PER_CHARGE_POINT}
    sections = []
    for number, table in enumerate(tables, 1):
        where = f"{source}: charge_point {number}."
        changes = dict(table)
        match = changes.pop("match", None)
        if type(match) is not str or not match:
            raise SettingsError(f'{where}match = {match!r}: must be a pattern of identities, e.g. "WB-*"')
        sections.append(ChargePoint(match, _checked(known, changes, where, ("match",))))
    return tuple(sections)


def _section(section: type[T], table: Any, where: str) -> T:
    if type(table) is not dict:
        raise SettingsError(f"{where}: must be a table")
    return section(**_values(section, table, f"{where}."))


def _values(section: Any, table: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    known: dict[str, Field[Any]] = {key.name: key for key in fields(section) if "check" in key.metadata}
    return {name: _default(key) for name, key in known.items()} | _checked(known, table, where, also)


def _checked(
    known: Mapping[str, Field[Any]], table: Mapping[str, Any], where: str, also: tuple[str, ...]
) -> dict[str, Any]:
    values = {}
    for written, value in table.items():
        name = _SPELLINGS.get(written, written)
        if name not in known:
            raise SettingsError(f"{where}{written}: unknown key; known are {', '.join(sorted((*known, *also)))}")
        try:
            values[name] = known[name].metadata["check"](value)
        except ValueError as error:
            shown = "(hidden)" if known[name].metadata["hidden"] else repr(value)
            raise SettingsError(f"{where}{written} = {shown}: {error}") from None
    return values


def _default(key: Field[Any]) -> Any:
    return key.default_factory() if key.default_factory is not MISSING else key.default


def _default_node(listeners: tuple[Listener, ...]) -> str:
    """Stable over restarts, and different for two gateways on one machine."""
    port = re.search(r"(?:^|:)(?:port=)?(\d+)(?::|$)", listeners[0].endpoint)
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())
    return f"{host}-{port[1]}" if port else host


_CONNECTION = ("cid", "node", "version", "username")


def _topics(values: Mapping[str, Any], node: str, source: str) -> Topics:
    upstream: Upstream = values["upstream"]
    mountpoint: str = values["mountpoint"]

    def parse(
        key: str, text: str, names: tuple[str, ...], wildcards: bool = False, prefix: str = mountpoint
    ) -> TopicTemplate:
        try:
            template = TopicTemplate.parse(prefix + text if text else "", names, wildcards)
        except TemplateError as error:
            raise SettingsError(f"{source}: {key} = {text!r}: {error}") from None
        return template.bind(node=encode_level(node))

    if mountpoint:
        parse("mountpoint", mountpoint, _CONNECTION, prefix="")
    every = (*_CONNECTION, "action", "type", "id")
    up = {"upstream.topic": parse("upstream.topic", upstream.topic, every)}
    for action, text in upstream.topic_override_mapping.items():
        key = f"upstream.topic_override_mapping.{action}"
        up[key] = parse(key, text, every)
    for key, text in (("upstream.reply_topic", upstream.reply_topic), ("upstream.error_topic", upstream.error_topic)):
        up[key] = parse(key, text, every)
    if upstream.invalid_topic:
        up["upstream.invalid_topic"] = parse("upstream.invalid_topic", upstream.invalid_topic, _CONNECTION)
    downstream = parse("dnstream.topic", values["dnstream"].topic, _CONNECTION, wildcards=True)
    if "cid" not in downstream.names:
        raise SettingsError(f"{source}: dnstream.topic = {values['dnstream'].topic!r}: must have ${{cid}}")
    # Presence is published there for every charge point (contract of topics), so no identity may stand in its way.
    presence = parse("presence.topic", "ocpp/cp/Status/${cid}", _CONNECTION)
    try:
        reserved = reserved_identities({**up, "presence.topic": presence}, downstream)
    except TemplateError as error:
        raise SettingsError(f"{source}: {error}") from None
    return Topics(
        call=up["upstream.topic"],
        overrides={
            action: up[f"upstream.topic_override_mapping.{action}"] for action in upstream.topic_override_mapping
        },
        reply=up["upstream.reply_topic"],
        error=up["upstream.error_topic"],
        invalid=up.get("upstream.invalid_topic"),
        downstream=downstream,
        reserved=reserved,
    )
