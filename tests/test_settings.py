"""Every key by itself: its default, what it takes, what it says about what it does not take."""

from __future__ import annotations

from dataclasses import Field, fields
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocppgw.settings import (
    Auth,
    BrokerAddress,
    Downstream,
    Limits,
    Listener,
    Mqtt,
    Settings,
    SettingsError,
    Upstream,
    parse_broker,
)

SECTIONS = (Settings, Listener, Mqtt, Auth, Upstream, Downstream, Limits)


def keys(section: type) -> dict[str, Field[Any]]:
    return {key.name: key for key in fields(section) if "check" in key.metadata}


def check(section: type, name: str, value: Any) -> Any:
    return keys(section)[name].metadata["check"](value)


def default(key: Field[Any]) -> Any:
    return key.default_factory() if callable(key.default_factory) else key.default


EVERY_KEY = [(section, name) for section in SECTIONS for name in keys(section)]


@pytest.mark.parametrize(("section", "name"), EVERY_KEY)
def test_every_key_says_what_it_means_and_what_it_must_be(section, name):
    assert keys(section)[name].metadata["text"]
    with pytest.raises(ValueError, match=r"^must be "):
        check(section, name, date(2026, 11, 22))  # TOML has dates, and no key takes one


@pytest.mark.parametrize(("section", "name"), EVERY_KEY)
def test_every_key_takes_its_default(section, name):
    value = default(keys(section)[name])
    if value is not None:
        assert check(section, name, list(value) if isinstance(value, tuple) else value) == value


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (Upstream, "topic", "ocpp/cp/${cid}/${action}"),
        (Upstream, "reply_topic", "ocpp/cp/Reply/${cid}"),
        (Upstream, "error_topic", "ocpp/cp/Error/${cid}"),
        (Upstream, "invalid_topic", "ocpp/gateway/${node}/invalid"),
        (Upstream, "topic_override_mapping", {}),
        (Upstream, "qos", 1),
        (Downstream, "topic", "ocpp/cs/${cid}/+/+"),
        (Downstream, "qos", 1),
        (Downstream, "strict_mode", True),
        (Downstream, "call_timeout", 30.0),
        (Downstream, "max_mqueue_len", 100),
        (Settings, "mountpoint", ""),
        (Settings, "payload_format", "object"),
        (Settings, "drain_seconds", 10.0),
        (Mqtt, "url", "embedded:"),
        (Mqtt, "version", "auto"),
        (Mqtt, "outage_grace", 10.0),
        (Listener, "endpoint", "tcp:33033:interface=127.0.0.1"),
        (Listener, "path", "/ocpp"),
        (Listener, "ping_interval", 20.0),
        (Listener, "ping_timeout", 20.0),
        (Listener, "subprotocol_mismatch", "close"),
        (Limits, "handshake_timeout", 10.0),
        (Limits, "header_size", 16384),
        (Limits, "message_size", 1048576),
        (Limits, "outgoing_buffer", 1048576),
    ],
)
def test_the_defaults_that_users_were_promised(section, name, value):
    assert default(keys(section)[name]) == value


@pytest.mark.parametrize(
    ("section", "name", "written", "used"),
    [
        (Downstream, "call_timeout", 45, 45.0),
        (Downstream, "call_timeout", 1.5, 1.5),
        (Downstream, "call_timeout", "30s", 30.0),
        (Downstream, "call_timeout", "1500ms", 1.5),
        (Downstream, "call_timeout", "5m", 300.0),
        (Downstream, "call_timeout", "2 h", 7200.0),
        (Downstream, "call_timeout", "1d", 86400.0),
        (Downstream, "call_timeout", "30", 30.0),
        (Listener, "ping_interval", 0, 0.0),
        (Mqtt, "session_expiry", "1h", 3600),
        (Mqtt, "alpn", ["x-amzn-mqtt-ca"], ("x-amzn-mqtt-ca",)),
        (Upstream, "topic_override_mapping", {"Heartbeat": "h/${cid}"}, {"Heartbeat": "h/${cid}"}),
        (Settings, "node", "gw-1.example_2", "gw-1.example_2"),
        (Settings, "node", "", ""),
        (Mqtt, "username", "${not a place}", "${not a place}"),
    ],
)
def test_what_is_written_and_what_is_used(section, name, written, used):
    assert check(section, name, written) == used


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        (Downstream, "call_timeout", "0s", 'must be seconds from 1 to 86400, or a duration such as "30s"'),
        (Downstream, "call_timeout", "30 apples", "must be seconds"),
        (Downstream, "call_timeout", "-30s", "must be seconds"),
        (Downstream, "call_timeout", float("nan"), "must be seconds"),
        (Downstream, "call_timeout", float("inf"), "must be seconds"),
        (Downstream, "call_timeout", True, "must be seconds"),
        (Downstream, "max_mqueue_len", 0, "must be a whole number from 1 to 100000"),
        (Downstream, "max_mqueue_len", 7.0, "must be a whole number"),
        (Downstream, "strict_mode", 1, "must be true or false"),
        (Upstream, "qos", 2, "must be a whole number from 0 to 1"),
        (Upstream, "qos", True, "must be a whole number from 0 to 1"),
        (Upstream, "topic_override_mapping", {"Boot": 7}, "must be a table of texts"),
        (Settings, "payload_format", "xml", "must be one of object, array"),
        (Settings, "node", "a/b", "must be a name without white space, / + # $"),
        (Settings, "node", "$a", "must be a name without white space, / + # $"),
        (Settings, "node", "a b", "must be a name"),
        (Settings, "node", "a\0", "must be a name"),
        (Mqtt, "version", 5, "must be one of auto, 5, 3.1.1"),
        (Mqtt, "alpn", "mqtt", "must be a list of texts"),
        (Mqtt, "alpn", [7], "must be a list of texts"),
        (Listener, "no_subprotocol", "ocpp1.5", "must be one of reject, ocpp1.6, ocpp2.0.1, ocpp2.1"),
    ],
)
def test_what_is_not_taken_and_what_is_said_about_it(section, name, value, problem):
    with pytest.raises(ValueError, match=r"^must be ") as caught:
        check(section, name, value)
    assert str(caught.value).startswith(problem)


# Secrets


def test_a_secret_may_lie_in_the_environment(monkeypatch):
    monkeypatch.setenv("OCPPGW_TEST_SECRET", "hunter2")
    assert check(Mqtt, "password", "${env:OCPPGW_TEST_SECRET}") == "hunter2"
    monkeypatch.delenv("OCPPGW_TEST_SECRET")
    with pytest.raises(ValueError, match="must name an environment variable that is set; OCPPGW_TEST_SECRET is not"):
        check(Mqtt, "password", "${env:OCPPGW_TEST_SECRET}")


def test_a_secret_may_lie_in_a_file(tmp_path: Path):
    file = tmp_path / "password"
    file.write_text("hunter2 \n", encoding="utf-8")
    assert check(Mqtt, "password", f"${{file:{file}}}") == "hunter2 "
    with pytest.raises(ValueError, match="must name a readable file"):
        check(Mqtt, "password", f"${{file:{tmp_path / 'none'}}}")
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must name a readable file"):
        check(Mqtt, "password", f"${{file:{file}}}")


def test_no_secret_shows_where_settings_are_printed():
    shown = repr((Mqtt(url="mqtt://u:hunter2@h", username="hunter2", password="hunter2"), Auth(("memory:u:hunter2",))))
    assert "hunter2" not in shown + repr(BrokerAddress("tcp", "h", 1883, password="hunter2"))


# The broker's address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://h", BrokerAddress("tcp", "h", 1883)),
        ("mqtt://h/", BrokerAddress("tcp", "h", 1883)),
        ("mqtt://h:7", BrokerAddress("tcp", "h", 7)),
        ("mqtt://[::1]:7", BrokerAddress("tcp", "::1", 7)),
        ("mqtts://h", BrokerAddress("tcp", "h", 8883, tls=True)),
        ("ws://h", BrokerAddress("websockets", "h", 80, path="/mqtt")),
        ("wss://h/x/y", BrokerAddress("websockets", "h", 443, tls=True, path="/x/y")),
        ("wss://h/x?token=y", BrokerAddress("websockets", "h", 443, tls=True, path="/x?token=y")),
        ("mqtt+unix:///run/mqtt.sock", BrokerAddress("unix", "/run/mqtt.sock", 0)),
        ("mqtt+unix:///run/a%20b", BrokerAddress("unix", "/run/a b", 0)),
        ("mqtt+unix://u:p@/run/m", BrokerAddress("unix", "/run/m", 0, username="u", password="p")),
        ("mqtt://u:p%40%2F@h", BrokerAddress("tcp", "h", 1883, username="u", password="p@/")),
        ("mqtt://u@h", BrokerAddress("tcp", "h", 1883, username="u")),
        ("embedded:", BrokerAddress("embedded", "127.0.0.1", 1883)),
        ("embedded:1884", BrokerAddress("embedded", "127.0.0.1", 1884)),
    ],
)
def test_addresses_of_brokers(url, address):
    assert parse_broker(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "h:1883",
        "http://h",
        "mqtt:h",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://h:0",
        "mqtt://h:65536",
        "mqtt://h:x",
        "mqtt://[::1",
        "mqtt://h/path",
        "mqtt://h#x",
        "mqtt+unix://",
        "mqtt+unix://host/path",
        "mqtt+unix:path",
        "embedded:0",
        "embedded:65536",
        "embedded:x",
    ],
)
def test_what_is_no_address_of_a_broker(url):
    with pytest.raises(SettingsError) as caught:
        parse_broker(url, "gw.toml")
    assert str(caught.value).startswith(f"gw.toml: mqtt.url = {url!r}: must be mqtt://HOST[:PORT], ")


AWKWARD = st.text("/@:#?%[] \\\n'", max_size=4)


@settings(deadline=None)
@given(st.sampled_from(["mqtt://", "mqtt:", "mqtt:/", "", "http://"]), AWKWARD, AWKWARD)
def test_a_bad_address_is_told_without_its_password(scheme, before, after):
    url = f"{scheme}user:{before}hunter2{after}@host:port"
    with pytest.raises(SettingsError) as caught:
        parse_broker(url)
    assert "hunter2" not in str(caught.value)


def test_a_bad_address_is_told_without_its_token():
    with pytest.raises(SettingsError, match=r"'wss://h:x/mqtt[?][.]{3}'"):
        parse_broker("wss://h:x/mqtt?token=hunter2")
