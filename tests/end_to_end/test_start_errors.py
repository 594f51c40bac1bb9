"""What stops a start (contract, sections 1 and 8): one line says what is wrong and what to do, and nothing runs."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import free_port, import_path, script

from end_to_end.wire import LIMIT, answers

WS = "--ws tcp:{port}:interface=127.0.0.1 "
WSS = "--wss ssl:{port}:interface=127.0.0.1:privateKey={certificates}/"

# The command line, and what the line has to say.
COMMANDS = {
    "the port is taken": (
        "--ws tcp:{taken}:interface=127.0.0.1",
        r"tcp:{taken}:interface=127\.0\.0\.1: .*Address already in use",
    ),
    "a second listener's port is taken": (
        WS + "--ws tcp:{taken}:interface=127.0.0.1",
        r"tcp:{taken}:interface=127\.0\.0\.1: .*Address already in use",
    ),
    "two listeners want one port": (WS + WS, r"tcp:{port}:interface=127\.0\.0\.1: "),
    "a listener wants the embedded broker's port": ("--ws tcp:{mqtt}:interface=127.0.0.1", r"{mqtt}"),
    "the embedded broker's port is taken": (
        WS + "--mqtt embedded:{taken}",
        r"127\.0\.0\.1:{taken} is taken: .*--mqtt mqtt://127\.0\.0\.1:{taken}.*--mqtt embedded:PORT",
    ),
    "the address is not ours": (
        "--ws tcp:{port}:interface=192.0.2.1 --auth anonymous",
        r"tcp:{port}:interface=192\.0\.2\.1: .*[Cc]annot assign",
    ),
    "the socket's directory is missing": ("--ws unix:{directory}/no/socket", r"unix:.*/no/socket: "),
    "no such endpoint": ("--ws bogus:{port}", r"bogus:{port}: "),
    "no number": ("--ws tcp:http", r"tcp:http: "),
    "no certificate": (WSS + "server.key:certKey=/nowhere.pem", "/nowhere.pem"),
    "no key": (WSS + "nowhere.key:certKey={certificates}/server.pem", r"nowhere\.key"),
    "another's key": (WSS + "client.key:certKey={certificates}/server.pem", "do not match"),
    "a key that is none": (WSS + "ca.pem:certKey={certificates}/server.pem", "ssl:{port}.*a key or certificate file"),
    "a certificate that is none": (WSS + "server.key:certKey={settings}", "ssl:{port}.*a key or certificate file"),
    "an empty certificate": (WSS + "server.key:certKey=/dev/null", "ssl:{port}.*a key or certificate file"),
    "wss without TLS": ("--wss tcp:{port}:interface=127.0.0.1", "has no TLS"),
    "ws with TLS": (
        "--ws ssl:{port}:interface=127.0.0.1:privateKey={certificates}/server.key:certKey={certificates}/server.pem",
        "has TLS: --wss",
    ),
    "nobody is asked and others can reach it": (
        "--ws tcp:{port}",
        r"tcp:{port}: others can reach it.*--auth htpasswd:.*--auth anonymous",
    ),
    "the same through haproxy": ("--ws haproxy:tcp:{port}", r"haproxy:tcp:{port}: others can reach it.*--auth"),
    "the same with IPv6": ("--ws tcp6:{port}", r"tcp6:{port}: others can reach it.*--auth"),
    "no such checker": (WS + "--auth bogus:file", r"auth bogus:file: .*--help-auth"),
    "no password file": (WS + "--auth htpasswd:/nowhere", "/nowhere: .*No such file"),
    "no password file of Twisted": (WS + "--auth file:/nowhere", "/nowhere.*No such file|No such file.*/nowhere"),
    "a password file with a mistake": (WS + "--auth htpasswd:{settings}", "line 2: must be IDENTITY:HASH"),
    "no settings file": (WS + "--config /nowhere.toml", "/nowhere.toml: .*No such file"),
    "no such scheme": (WS + "--mqtt amqp://localhost", "amqp://localhost.* must be mqtt://"),
    "a broker without a name": (WS + "--mqtt mqtt://user:secret@:1883", "must be mqtt://"),
    "no name for a node": (WS + "--node a/b", "node = 'a/b': must be a name"),
    "no certificate authority": (WS + "--mqtt mqtts://localhost --config {settings}", "/nowhere.pem|ca_file"),
}

# A settings file, and what the line has to say: file, key, value and what is allowed.
FILES = {
    "unknown key": ('upstream.tpoic = "a"', r"upstream\.tpoic: unknown key; known are .*\btopic\b"),
    "unknown section": ("[upstraem]", r"upstraem: unknown key; known are .*\bupstream\b"),
    "wrong type": ('dnstream.max_mqueue_len = "many"', r"dnstream\.max_mqueue_len = 'many': must be a whole number"),
    "out of range": ("upstream.qos = 2", r"upstream\.qos = 2: must be a whole number from 0 to 1"),
    "no duration": ('dnstream.call_timeout = "soon"', r"dnstream\.call_timeout = 'soon': must be seconds"),
    "no choice": ('payload_format = "xml"', r"payload_format = 'xml': must be one of object, array"),
    "unknown placeholder": (
        'upstream.topic = "ocpp/${nobody}"',
        r"upstream\.topic = 'ocpp/\$\{nobody\}': knows no \$\{nobody\}; it may use .*\$\{action\}",
    ),
    "a wildcard upstream": ('upstream.topic = "ocpp/+/${cid}"', r"upstream\.topic = .*wildcard"),
    "no identity downstream": (
        'dnstream.topic = "ocpp/cs/+"',
        r"dnstream\.topic = 'ocpp/cs/\+': must have \$\{cid\}",
    ),
    "a circle": ('upstream.topic = "ocpp/cs/${cid}/a/${action}"', r"dnstream\.topic would bring it back"),
    "not TOML": ("upstream =\nqos = 1", r"is not TOML: .*line 1"),
    "no listener": ("listener = []", r"listener: must be one or more"),
    "a path that is none": ('[[listener]]\npath = "ocpp"', r"listener 1.*path = 'ocpp': must begin with /"),
    "a variable that is not set": (
        'mqtt.password = "${env:OCPPGW_NOT_SET}"',
        r"mqtt\.password = \(hidden\): must name an environment variable .*OCPPGW_NOT_SET",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[dict[str, object]]:
    """What stands in the braces above."""
    directory = tmp_path_factory.mktemp("errors")
    settings = directory / "settings.toml"
    settings.write_text('# for password files a comment, and a mistake\nmqtt.ca_file = "/nowhere.pem"\n', "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield {
            "taken": other.getsockname()[1],
            "certificates": certificates,
            "directory": directory,
            "settings": settings,
        }


def refused(*arguments: str) -> str:
    """Start a gateway that must refuse; what it says."""
    result = subprocess.run(
        [*script("twistd", "-n", "--pidfile="), "ocppgw", *arguments],
        env={**os.environ, **import_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, ""), result.stdout + result.stderr
    assert re.fullmatch(r"ocppgw: [^\n]+\n", result.stderr), result.stderr
    assert "secret" not in result.stderr
    assert "[(" not in result.stderr, "that is for programmers"
    return result.stderr


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_on_the_command_line_is_one_line(places: dict[str, object], mistake: str) -> None:
    ports = {"port": free_port(), "mqtt": free_port()}
    command, pattern = COMMANDS[mistake]
    arguments = command.format(**places, **ports).split()
    if "--mqtt" not in arguments:
        arguments += ["--mqtt", f"embedded:{ports['mqtt']}"]
    assert re.search(pattern.format(**places, **ports), refused(*arguments))
    assert not any(answers(port) for port in ports.values())


@pytest.mark.parametrize("mistake", FILES)
def test_a_mistake_in_a_settings_file_is_one_line(tmp_path: Path, mistake: str) -> None:
    text, pattern = FILES[mistake]
    file = tmp_path / "gw.toml"
    file.write_text(text, encoding="utf-8")
    said = refused("--config", str(file), "--mqtt", f"embedded:{free_port()}")
    assert str(file) in said
    assert re.search(pattern, said)
