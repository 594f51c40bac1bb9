"""From a file and a command line to settings, and what is said when that cannot be."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from ocppgw.config import is_tls, load, with_version
from ocppgw.settings import Listener, Settings, SettingsError

README = Path(__file__).parents[1] / "README.rst"
HOST = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())


@pytest.fixture(autouse=True)
def no_credentials_around(monkeypatch):
    monkeypatch.delenv("OCPPGW_MQTT_USER", raising=False)
    monkeypatch.delenv("OCPPGW_MQTT_PASSWORD", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ocppgw.toml"


def load_text(file: Path, text: str, overrides: dict[str, Any] | None = None) -> Settings:
    file.write_text(text, encoding="utf-8")
    return load(str(file), overrides)


def error_of(file: Path, text: str) -> str:
    """What the operator reads, without the name of the file."""
    with pytest.raises(SettingsError) as caught:
        load_text(file, text)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_nothing_needs_to_be_set():
    settings = load()
    assert settings.listeners == (Listener(),)
    assert settings.node == f"{HOST}-33033"
    assert settings.topics.call.text == "ocpp/cp/${cid}/${action}"
    assert settings.topics.reserved == {"Reply", "Error", "Status"}
    assert settings.topics.invalid is not None
    assert settings.topics.invalid.render({}) == f"ocpp/gateway/{HOST}-33033/invalid"
    assert settings.notices == ()


def test_the_settings_in_the_readme_are_the_defaults(file):
    block = re.search(r"code-block:: toml\n\n(.*?)\n(?=\S)", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    written, default = load_text(file, re.sub("(?m)^    ", "", block[1])), load()
    names = (
        "node",
        "mountpoint",
        "payload_format",
        "drain_seconds",
        "listeners",
        "mqtt",
        "auth",
        "upstream",
        "dnstream",
    )
    for name in (*names, "limits"):
        assert getattr(written, name) == getattr(default, name)


def test_a_file_in_full(file):
    settings = load_text(
        file,
        """
        node = "gw-1"
        mountpoint = "site/"
        payload_format = "array"
        [[listener]]
        endpoint = "tcp:33033"
        path = "/ocpp/v1/"
        [[listener]]
        endpoint = "ssl:33034:privateKey=k:certKey=c"
        path = "/"
        [mqtt]
        url = "mqtts://broker:8884"
        version = "5"
        [auth]
        checkers = ["htpasswd:/etc/ocppgw/passwd"]
        [upstream]
        topic = "up/${clientid}/${action}"
        invalid_topic = ""
        [upstream.topic_override_mapping]
        BootNotification = "boot/${cid}"
        [dnstream]
        topic = "down/${cid}"
        call_timeout = "1m"
        strit_mode = false
        """,
    )
    assert settings.node == "gw-1"
    assert [(listener.path, listener.tls) for listener in settings.listeners] == [("/ocpp/v1", False), ("", True)]
    assert settings.topics.call.render({"cid": "A", "action": "B"}) == "site/up/A/B"
    assert settings.topics.overrides["BootNotification"].render({"cid": "A"}) == "site/boot/A"
    assert settings.topics.downstream.render({"cid": "A"}) == "site/down/A"
    assert settings.topics.invalid is None
    assert (settings.dnstream.call_timeout, settings.dnstream.strict_mode) == (60.0, False)
    assert settings.auth.checkers == ("htpasswd:/etc/ocppgw/passwd",)
    assert settings.mqtt.url == "mqtts://broker:8884"


def test_the_command_line_wins_over_the_file(file):
    settings = load_text(
        file,
        """
        node = "file"
        [[listener]]
        endpoint = "tcp:1"
        [[listener]]
        endpoint = "tcp:2"
        [mqtt]
        url = "mqtt://file"
        keepalive = 60
        [auth]
        checkers = ["anonymous"]
        """,
        {
            "node": "line",
            "listener": [{"endpoint": "tcp:3"}],
            "mqtt": {"url": "mqtt://line"},
            "auth": {"checkers": ["htpasswd:x"]},
        },
    )
    assert settings.node == "line"
    assert [listener.endpoint for listener in settings.listeners] == ["tcp:3"]
    assert (settings.mqtt.url, settings.mqtt.keepalive) == ("mqtt://line", 60)
    assert settings.auth.checkers == ("htpasswd:x",)


def test_a_fault_of_the_command_line_is_told_as_such():
    with pytest.raises(SettingsError, match=r"^command line: node = 'a b': must be a name"):
        load(None, {"node": "a b"})


# Where the broker's credentials come from


def test_credentials_of_the_broker(file, monkeypatch):
    url = '[mqtt]\nurl = "mqtt://user:hunter2@h"\n'
    settings = load_text(file, url)
    assert (settings.mqtt.username, settings.mqtt.password) == ("user", "hunter2")
    assert "OCPPGW_MQTT_PASSWORD" in settings.notices[0]
    assert "hunter2" not in settings.notices[0]
    settings = load_text(file, url + 'username = "file"\npassword = "from file"')
    assert (settings.mqtt.username, settings.mqtt.password) == ("file", "from file")
    monkeypatch.setenv("OCPPGW_MQTT_USER", "environment")
    monkeypatch.setenv("OCPPGW_MQTT_PASSWORD", "")
    settings = load_text(file, 'mqtt.username = "file"\nmqtt.password = "from file"')
    assert (settings.mqtt.username, settings.mqtt.password) == ("environment", "from file")
    assert settings.notices == ()


def test_the_version_of_mqtt_can_be_fixed():
    settings = with_version(load(), "3.1.1")
    assert settings.mqtt.version == "3.1.1"
    assert settings.dnstream == load().dnstream


# The node's name


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("tcp:9000", f"{HOST}-9000"),
        ("tcp:port=9001:interface=127.0.0.1", f"{HOST}-9001"),
        ("tcp6:9002:interface=\\:\\:1", f"{HOST}-9002"),
        ("ssl:9003:privateKey=k:certKey=c", f"{HOST}-9003"),
        ("haproxy:tcp:9004", f"{HOST}-9004"),
        ("unix:/run/ocppgw.sock:mode=660", HOST),
    ],
)
def test_a_node_without_a_name_has_that_of_its_host_and_first_port(endpoint, name):
    assert load(None, {"listener": [{"endpoint": endpoint}, {"endpoint": "tcp:1"}]}).node == name


def test_a_node_on_an_inherited_socket_has_to_be_named():
    listener = {"listener": [{"endpoint": "tcp:1"}, {"endpoint": "systemd:domain=INET:name=x"}]}
    with pytest.raises(SettingsError, match="a systemd: listener needs a node name, or two workers would share one"):
        load(None, listener)
    assert load(None, {**listener, "node": "gw-1"}).node == "gw-1"


def test_a_node_is_topic_safe():
    settings = load(None, {"node": "a%b"})
    assert settings.topics.invalid is not None
    assert settings.topics.invalid.render({}) == "ocpp/gateway/a%25b/invalid"


@pytest.mark.parametrize(
    ("endpoint", "tls"),
    [
        ("tcp:1", False),
        ("unix:/ssl", False),
        ("haproxy:tcp:1", False),
        ("ssl:1", True),
        ("tls:certs:port=1", True),
        ("haproxy:ssl:1", True),
        ("ocpps:1", True),
        ("ocpp:1", False),
    ],
)
def test_endpoints_with_tls(endpoint, tls):
    assert is_tls(endpoint) is tls


# What is said about a file that cannot be used: key, value, what is allowed

KNOWN_AT_THE_TOP = (
    "unknown key; known are auth, charge_point, dnstream, drain_seconds, json_schema_dir, limits, listener, "
    "message_format_checking, mountpoint, mqtt, node, on_violation, payload_format, upstream"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes = 1", f"nodes: {KNOWN_AT_THE_TOP}"),
        ("[mqqt]\nurl = 1", f"mqqt: {KNOWN_AT_THE_TOP}"),
        ("notices = []", f"notices: {KNOWN_AT_THE_TOP}"),
        ("topics = {}", f"topics: {KNOWN_AT_THE_TOP}"),
        ("mqtt = 1", "mqtt: must be a table"),
        ("upstream = []", "upstream: must be a table"),
        ("listener = {}", "listener: must be one or more [[listener]] tables"),
        ("listener = []", "listener: must be one or more [[listener]] tables"),
        ("listener = [1]", "listener 1: must be a table"),
        ("[[listener]]\n[[listener]]\nendpoint = 1", "listener 2.endpoint = 1: must be a text"),
        ('[[listener]]\npath = "ocpp"', "listener 1: path = 'ocpp': must begin with /"),
        (
            "[[listener]]\ntls = true",
            "listener 1.tls: unknown key; known are compression, endpoint, no_subprotocol, path, ",
        ),
        ('payload_format = "xml"', "payload_format = 'xml': must be one of object, array"),
        ("upstream.qos = 2", "upstream.qos = 2: must be a whole number from 0 to 1"),
        ('dnstream.call_timeout = "x"', "dnstream.call_timeout = 'x': must be seconds from 1 to 86400, or a duration"),
        ('dnstream.topic = "a/b"', "dnstream.topic = 'a/b': must have ${cid}"),
        ('dnstream.topic = ""', "dnstream.topic = '': is empty"),
        (
            'upstream.topic = "a/${x}"',
            "upstream.topic = 'a/${x}': knows no ${x}; it may use ${action}, ${cid}, ${id}, ",
        ),
        ('upstream.topic = "${action}/#"', "upstream.topic = '${action}/#': may not have a wildcard here"),
        ('upstream.reply_topic = "%"', "upstream.reply_topic = '%': has % or a character that MQTT does not allow"),
        ('upstream.error_topic = ""', "upstream.error_topic = '': is empty"),
        (
            'upstream.invalid_topic = "${action}"',
            "upstream.invalid_topic = '${action}': knows no ${action}; it may use ",
        ),
        (
            'upstream.topic_override_mapping.Boot = "${"',
            "upstream.topic_override_mapping.Boot = '${': has an unclosed ${",
        ),
        ('mountpoint = "s/"\nupstream.topic = ""', "upstream.topic = '': is empty"),
        ('mountpoint = "$SYS/"', "mountpoint = '$SYS/': may not begin with $"),
        ('mountpoint = "a/#/"', "mountpoint = 'a/#/': may not have a wildcard here"),
        ('mountpoint = "${action}/"', "mountpoint = '${action}/': knows no ${action}; it may use ${cid}, ${node}, "),
        (
            'dnstream.topic = "ocpp/cp/${cid}/+"',
            "upstream.topic = ocpp/cp/${cid}/${action}: dnstream.topic would bring it back to the gateway",
        ),
        ('mqtt.url = "broker:1883"', "mqtt.url = 'broker:1883': must be mqtt://HOST[:PORT], mqtts://, "),
        ("node = ", "is not TOML: "),
        ('node = "a"\nnode = "b"', "is not TOML: "),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(file, text, message):
    assert error_of(file, text).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        'mqtt.url = "mqtt://user:hunter2@h:x"',
        'mqtt.url = "user:hunter2@h"',
        'mqtt.url = ["mqtt://user:hunter2@h"]',
        'mqtt.password = ["hunter2"]',
        'mqtt.pasword = "hunter2"',
        'mqtt.username = ["hunter2"]',
        'mqtt.password = "${file:/nonexistent}"\nmqtt.username = "hunter2"',
        'auth.checkers = "memory:user:hunter2"',
        'auth.password = "hunter2"',
        'password = "hunter2"',
        'mqtt = "mqtt://user:hunter2@h"',
        'mqtt.password = "hunter2',
    ],
)
def test_no_message_shows_a_secret(file, text):
    assert "hunter2" not in error_of(file, text)


def test_a_file_stays_at_fault_where_the_command_line_adds_to_it(file):
    with pytest.raises(SettingsError, match=r"ocppgw\.toml: mqtt: must be a table"):
        load_text(file, "mqtt = 1", {"mqtt": {"url": "embedded:"}})


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml: cannot be read: No such file or directory$"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(SettingsError, match=r"cannot be read: Is a directory$"):
        load(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b"\xe9")
    with pytest.raises(SettingsError, match=r"latin\.toml: cannot be read: 'utf-8' codec can't decode"):
        load(str(tmp_path / "latin.toml"))


# Reserved identities follow the templates that are in force


@pytest.mark.parametrize(
    ("text", "identities"),
    [
        ("", {"Reply", "Error", "Status"}),
        ('mountpoint = "site/7/"', {"Reply", "Error", "Status"}),
        ('mountpoint = "${node}/"', {"Reply", "Error", "Status"}),
        ('mountpoint = "${cid}/"', set()),
        ('upstream.topic = "up/${cid}/${action}"', set()),
        ('upstream.reply_topic = "ocpp/cp/R/${cid}"', {"R", "Error", "Status"}),
        ('upstream.topic_override_mapping.Boot = "ocpp/cp/Boot/${cid}"', {"Boot", "Reply", "Error", "Status"}),
        ('dnstream.topic = "ocpp/${cid}/+/+"', {"cp", "gateway", "Reply", "Error", "Status"}),
        ('dnstream.topic = "ocpp/${cid}/+/+"\nupstream.invalid_topic = ""', {"cp", "Reply", "Error", "Status"}),
    ],
)
def test_reserved_identities(file, text, identities):
    assert load_text(file, text).topics.reserved == identities


class TestChargePoints:
    def test_later_sections_win(self, file):
        file.write_text(
            '[[charge_point]]\nmatch = "WB-*"\ncall_timeout = 60\nmin_gap = "500ms"\n'
            '[[charge_point]]\nmatch = "WB-1?"\ncall_timeout = "2m"\nmessage_format_checking = "all"\n',
            encoding="utf-8",
        )
        settings = load(str(file))
        assert settings.changes_for("WB-1") == {"call_timeout": 60.0, "min_gap": 0.5}
        assert settings.changes_for("WB-12") == {
            "call_timeout": 120.0,
            "min_gap": 0.5,
            "message_format_checking": "all",
        }
        assert settings.changes_for("wb-1") == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[charge_point]", "charge_point: must be [[charge_point]] tables"),
            ("[[charge_point]]\nmin_gap = 1", "charge_point 1.match = None: must be a pattern of identities"),
            ('[[charge_point]]\nmatch = ""', "charge_point 1.match = '': must be a pattern of identities"),
            ('[[charge_point]]\nmatch = "a"\nqos = 1', "charge_point 1.qos: unknown key; known are call_timeout, "),
            (
                '[[charge_point]]\nmatch = "a"\nmin_gap = 61',
                "charge_point 1.min_gap = 61: must be seconds from 0 to 60",
            ),
        ],
    )
    def test_what_cannot_be_used_is_told(self, file, text, message):
        assert error_of(file, text).startswith(message)


@pytest.mark.parametrize(
    "line", ['ca_file = "ca.pem"', 'cert_file = "c"', 'key_file = "k"', 'server_name = "b"', 'alpn = ["x"]']
)
def test_what_is_for_tls_needs_tls(file, line):
    message = f"mqtt.{line.split()[0]}: is for mqtts:// and wss:// only, and mqtt.url has no TLS"
    assert error_of(file, f'[mqtt]\nurl = "mqtt://broker"\n{line}') == message
