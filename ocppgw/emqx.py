"""EMQX 4.4's ``emqx_ocpp.conf``, read as it is."""

from __future__ import annotations

import re
from typing import Any

from ocppgw.settings import SettingsError

_KEYS = {
    "ocpp.upstream.topic": ("upstream", "topic"),
    "ocpp.upstream.reply_topic": ("upstream", "reply_topic"),
    "ocpp.upstream.error_topic": ("upstream", "error_topic"),
    "ocpp.dnstream.topic": ("dnstream", "topic"),
    "ocpp.dnstream.strit_mode": ("dnstream", "strict_mode"),
    "ocpp.upstream.awaiting_timeout": ("upstream", "awaiting_timeout"),
    "ocpp.dnstream.max_mqueue_len": ("dnstream", "max_mqueue_len"),
    "ocpp.dnstream.retry_interval": ("dnstream", "retry_interval"),
    "ocpp.message_format_checking": ("", "message_format_checking"),
}
# Keys of EMQX for which there is no need here, beside those of its listeners and of the gateway as a whole.
_UNUSED = ("ocpp.upstream.strit_mode", "ocpp.upstream.qos", "ocpp.dnstream.qos", "ocpp.dnstream.awaiting_timeout")
_OVERRIDE = "ocpp.upstream.topic."


def read(text: str, path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Give back the settings in the form of a TOML file, and a notice of the keys that have no meaning here.

    Raises SettingsError.
    """
    table: dict[str, Any] = {}
    unused = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[\w.-]+", key):
            raise SettingsError(f"{path}: line {number}: must be KEY = VALUE")
        if key in _KEYS:
            section, name = _KEYS[key]
            (table.setdefault(section, {}) if section else table)[name] = _value(value)
        elif key.startswith(_OVERRIDE):
            mapping = table.setdefault("upstream", {}).setdefault("topic_override_mapping", {})
            mapping[key.removeprefix(_OVERRIDE)] = value
        elif key.startswith(("ocpp.upstream.", "ocpp.dnstream.")) and key not in _UNUSED:
            raise SettingsError(f"{path}: line {number}: {key}: unknown key; known are {', '.join(sorted(_KEYS))}")
        else:
            unused.append(key)
    notices = (f"{path}: not used here: {', '.join(dict.fromkeys(unused))}",) if unused else ()
    return table, notices


def _value(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value
