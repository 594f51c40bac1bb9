"""Endpoint strings of each kind that Twisted has, where charge points connect (contract, section 1)."""

import socket
import sys
from pathlib import Path

import pytest
from processes import START_LIMIT, Process, free_port, gateway, import_path, script

from end_to_end.wire import LIMIT, assert_calm, request

# Takes a socket over as systemd would hand it: as descriptor 3, told by the environment.
ACTIVATE = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="ocpp")
os.execv(sys.argv[2], sys.argv[2:])
"""


def connect(connection: socket.socket, first: bytes = b"") -> None:
    """See that a charge point is let in."""
    connection.settimeout(LIMIT)
    connection.sendall(first + request("/ocpp/CP1"))
    assert connection.recv(65536).startswith(b"HTTP/1.1 101 ")


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with gateway("--ws", f"unix:{path}", "--mqtt", f"embedded:{free_port()}") as running:
        running.wait_for(f"charge points connect to unix:{path}", START_LIMIT)
        running.wait_for("connected to broker")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connect(connection)
            running.wait_for("CP1 online with ocpp1.6 from unix")
    assert_calm(running)
    assert not path.exists()


def test_a_unix_socket_that_a_crash_has_left(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    options = ["--ws", f"unix:{path}", "--mqtt", f"embedded:{free_port()}"]
    with gateway(*options) as crashing:
        crashing.wait_for("connected to broker", START_LIMIT)
        crashing.kill()
    options[-1] = f"embedded:{free_port()}"
    with gateway(*options) as running:
        running.wait_for("connected to broker", START_LIMIT)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connect(connection)
    assert_calm(running)


@pytest.mark.parametrize("endpoint", ["tcp6:{port}:interface=\\:\\:1", "tcp:{port}:interface=\\:\\:1"])
def test_ipv6(endpoint: str) -> None:
    port = free_port()
    with gateway("--ws", endpoint.format(port=port), "--mqtt", f"embedded:{free_port()}") as running:
        running.wait_for(rf"charge points connect to ws://\[::1\]:{port}/ocpp/<identity>", START_LIMIT)
        with socket.create_connection(("::1", port)) as connection:
            connect(connection)
            running.wait_for(r"CP1 online with ocpp1.6 from \[::1\]:\d+")
    assert_calm(running)


def test_behind_a_proxy_the_address_is_the_charge_point_s() -> None:
    port = free_port()
    endpoint = f"haproxy:tcp:{port}:interface=127.0.0.1"
    with gateway("--ws", endpoint, "--mqtt", f"embedded:{free_port()}") as running:
        running.wait_for(rf"charge points connect to ws://127\.0\.0\.1:{port}/ocpp/<identity>", START_LIMIT)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connect(connection, b"PROXY TCP4 203.0.113.7 192.0.2.1 50112 80\r\n")
            running.wait_for(r"CP1 online with ocpp1.6 from 203\.0\.113\.7:50112")
        # Without the header, or with nonsense, nobody is let in.
        for first in (b"", b"PROXY nonsense\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
                connection.sendall(first + request("/ocpp/CP2"))
                assert not connection.recv(65536).startswith(b"HTTP/1.1 101 ")
    assert_calm(running)


def test_a_socket_from_systemd() -> None:
    port = free_port()
    options = ["--ws", "systemd:domain=INET:name=ocpp", "--mqtt", f"embedded:{free_port()}", "--node", "gw-1"]
    twistd = script("twistd", "-n", "--pidfile=", "ocppgw", *options)
    with Process([sys.executable, "-c", ACTIVATE, str(port), *twistd], env=import_path()) as running:
        running.wait_for(rf"charge points connect to ws://127\.0\.0\.1:{port}/ocpp/<identity>", START_LIMIT)
        running.wait_for("connected to broker")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connect(connection)
    assert_calm(running)


def test_a_socket_from_systemd_needs_a_node_s_name() -> None:
    port = free_port()
    twistd = script("twistd", "-n", "--pidfile=", "ocppgw", "--ws", "systemd:domain=INET:name=ocpp")
    with Process([sys.executable, "-c", ACTIVATE, str(port), *twistd], env=import_path()) as refused:
        assert refused.wait_exit() == 1
        assert len(refused.lines) == 1
        assert "systemd: listener needs a node name" in refused.lines[0]
