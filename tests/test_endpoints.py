"""Where an endpoint string would listen, found out without listening."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trustme

from ocppgw.endpoints import Address, EndpointError, address_of, check_free, check_together, with_backlog

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with key.pem and cert.pem, and below it one with both in one file."""
    directory = tmp_path_factory.mktemp("certificate")
    issued = trustme.CA().issue_cert("gateway.example")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    (directory / "both").mkdir()
    issued.private_key_and_cert_chain_pem.write_to_path(directory / "both" / "gateway.pem")
    return directory


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which somebody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def problem_of(description: str) -> str:
    """What is said about an endpoint, without its repetition."""
    with pytest.raises(EndpointError) as caught:
        check_free(description, address_of(description))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{description}: ")
    return message.removeprefix(f"{description}: ")


@pytest.mark.parametrize(
    ("description", "address"),
    [
        ("tcp:9000", Address("", 9000)),
        ("tcp:9000:interface=127.0.0.1", Address("127.0.0.1", 9000)),
        ("tcp:port=9000:interface=127.0.0.1:backlog=7", Address("127.0.0.1", 9000)),
        ("tcp:9000:interface=\\:\\:1", Address("::1", 9000)),
        ("tcp6:9000", Address("::", 9000)),
        ("tcp6:9000:interface=\\:\\:1", Address("::1", 9000)),
        ("unix:/run/ocppgw.sock:mode=660", Address("/run/ocppgw.sock", None)),
        ("haproxy:tcp:9000", Address("", 9000)),
        ("haproxy:tcp:9000:interface=127.0.0.1", Address("127.0.0.1", 9000)),
        ("haproxy:unix:/run/ocppgw.sock", Address("/run/ocppgw.sock", None)),
    ],
)
def test_where_an_endpoint_listens(description, address):
    assert address_of(description) == address


def test_where_an_endpoint_with_tls_listens(certificate):
    files = f"privateKey={certificate / 'key.pem'}:certKey={certificate / 'cert.pem'}"
    assert address_of(f"ssl:9000:{files}") == Address("", 9000)
    assert address_of(f"ssl:9000:{files}:interface=127.0.0.1") == Address("127.0.0.1", 9000)
    assert address_of(f"haproxy:ssl:9000:{files}") == Address("", 9000)


# Twisted's tls: asks pyOpenSSL in a way that pyOpenSSL does not like any more.
@pytest.mark.filterwarnings("ignore:X509.get_issuer is deprecated:DeprecationWarning")
def test_where_an_endpoint_with_a_directory_of_certificates_listens(certificate):
    assert address_of(f"tls:{certificate / 'both'}:port=9000:interface=127.0.0.1") == Address("127.0.0.1", 9000)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        (Address("127.0.0.1", 1), True),
        (Address("127.8.8.8", 1), True),
        (Address("::1", 1), True),
        (Address("localhost", 1), True),
        (Address("/run/ocppgw.sock", None), True),
        (Address("", 1), False),
        (Address("0.0.0.0", 1), False),
        (Address("::", 1), False),
        (Address("192.0.2.1", 1), False),
        (Address("fe80::1%eth0", 1), False),
        (Address("gateway.example", 1), False),
        (Address("127.0.0.1.example", 1), False),
    ],
)
def test_who_can_reach_an_address(address, loopback):
    assert address.is_loopback is loopback


@pytest.mark.parametrize(
    ("address", "authority"),
    [
        (Address("127.0.0.1", 9000), "127.0.0.1:9000"),
        (Address("::1", 9000), "[::1]:9000"),
        (Address("", 9000), f"{socket.gethostname()}:9000"),
        (Address("0.0.0.0", 9000), f"{socket.gethostname()}:9000"),
        (Address("::", 9000), f"{socket.gethostname()}:9000"),
    ],
)
def test_the_authority_of_an_address_can_be_written_into_a_url(address, authority):
    assert address.authority() == authority


@pytest.mark.parametrize(
    ("description", "with_one"),
    [
        ("tcp:9000", "tcp:9000:backlog=4096"),
        ("tcp6:9000", "tcp6:9000:backlog=4096"),
        ("ssl:9000:privateKey=k", "ssl:9000:privateKey=k:backlog=4096"),
        ("tcp:9000:backlog=7", "tcp:9000:backlog=7"),
        ("unix:/run/ocppgw.sock", "unix:/run/ocppgw.sock"),
        ("systemd:domain=INET:name=x", "systemd:domain=INET:name=x"),
    ],
)
def test_a_backlog_is_added_where_there_is_none(description, with_one):
    assert with_backlog(description) == with_one


def test_an_endpoint_with_a_backlog_listens_at_the_same_place(certificate):
    files = f"privateKey={certificate / 'key.pem'}:certKey={certificate / 'cert.pem'}"
    for description in ("tcp:9000", "tcp6:9000", f"ssl:9000:{files}"):
        assert address_of(with_backlog(description)) == address_of(description)


# Sockets that systemd hands over (LISTEN_FDS, sd_listen_fds(3)); Twisted reads the environment when it is imported

INHERITED = """
import json, os, sys
passed = [int(number) for number in sys.argv[1].split(",")]
for place, number in enumerate([os.dup(number) for number in passed], 3):
    os.dup2(number, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(passed)), LISTEN_FDNAMES=sys.argv[2])

import socket
from ocppgw.endpoints import EndpointError, address_of, check_free

def tell(description):
    try:
        address = address_of(description)
        check_free(description, address)
    except EndpointError as error:
        return str(error)
    return [address.host, address.port, address.inherited, address.is_loopback]

found = [tell(description) for description in sys.argv[3:]]
# Noted, and neither closed nor used up: the gateway still has to listen there.
servers = [socket.socket(fileno=3 + place) for place in range(len(passed))]
print(json.dumps([found, [server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for server in servers]]))
"""


def test_sockets_that_systemd_has_made(tmp_path):
    path = str(tmp_path / "socket")
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as near,
        closing(socket.create_server(("0.0.0.0", 0))) as far,
        closing(socket.socket(socket.AF_UNIX)) as local,
    ):
        local.bind(path)
        local.listen()
        servers = [near, far, local]
        descriptions = [
            "systemd:domain=INET:name=near",
            "systemd:domain=INET:index=0",
            "haproxy:systemd:domain=INET:name=far",
            "systemd:domain=UNIX:name=local",
            "systemd:domain=INET:name=other",
        ]
        numbers = [server.fileno() for server in servers]
        argv = [sys.executable, "-c", INHERITED, ",".join(map(str, numbers)), "near:far:local", *descriptions]
        run = subprocess.run(
            argv,
            pass_fds=numbers,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        found, accepting = json.loads(run.stdout)
        near_port, far_port = near.getsockname()[1], far.getsockname()[1]
    assert found == [
        ["127.0.0.1", near_port, True, True],
        ["127.0.0.1", near_port, True, True],
        ["0.0.0.0", far_port, True, False],
        [path, None, True, True],
        "systemd:domain=INET:name=other: no such socket was handed over ('other')",
    ]
    assert accepting == [1, 1, 1]


# What cannot be listened on


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("", "Unknown endpoint type: ''"),
        ("9000", "Unknown endpoint type: '9000'"),
        ("foo:9000", "Unknown endpoint type: 'foo'"),
        ("haproxy:foo:9000", "Unknown endpoint type: 'foo'"),
        ("tcp:http", "invalid literal for int() with base 10: 'http'"),
        ("tcp:9000:bogus=1", "wrong arguments for this kind of endpoint"),
        ("tcp:9000:1:2:3:4", "wrong arguments for this kind of endpoint"),
        ("tcp:65536", "cannot be listened on: bind(): port must be 0-65535."),
        ("tcp:9000:interface=192.0.2.1", "cannot be listened on: Cannot assign requested address"),
        ("stdio:", "AssertionError"),
        ("systemd:domain=INET:name=x", "no such socket was handed over ('x')"),
        ("systemd:domain=INET:index=0", "no such socket was handed over (list index out of range)"),
        ("ssl:9000:privateKey=/none/key.pem:certKey=/none/cert.pem", "No such file or directory: /none/cert.pem"),
        ("unix:", "cannot be listened on: "),
        ("unix:/none/socket", "cannot be listened on: /none is not there or cannot be written"),
        ("unix:/" + "x" * 200, "cannot be listened on: AF_UNIX path too long"),
    ],
)
def test_an_endpoint_that_cannot_work_is_told_in_one_line(description, problem):
    assert problem_of(description).startswith(problem)


def test_a_certificate_that_is_none_is_told(certificate, tmp_path):
    (tmp_path / "cert.pem").write_text("nothing", encoding="utf-8")
    assert problem_of(f"ssl:9000:privateKey={certificate / 'key.pem'}:certKey={tmp_path / 'cert.pem'}")
    assert problem_of(f"ssl:9000:privateKey={certificate / 'cert.pem'}:certKey={certificate / 'cert.pem'}")


def test_a_taken_port_is_told(taken):
    assert problem_of(f"tcp:{taken}:interface=127.0.0.1") == "cannot be listened on: Address already in use"
    assert problem_of(f"tcp:{taken}") == "cannot be listened on: Address already in use"
    assert problem_of(f"haproxy:tcp:{taken}") == "cannot be listened on: Address already in use"


def test_a_free_port_stays_free():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    for _ in range(2):
        check_free("", Address("127.0.0.1", port))


def test_a_socket_that_is_handed_over_is_not_tried(taken):
    check_free("", Address("127.0.0.1", taken, inherited=True))


def test_a_taken_unix_socket_is_told(tmp_path):
    path = tmp_path / "socket"
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(path))
        server.listen()
        assert problem_of(f"unix:{path}") == "cannot be listened on: Address already in use"
        assert problem_of(f"haproxy:unix:{path}") == "cannot be listened on: Address already in use"
    path.unlink()
    check_free("", Address(str(path), None))


def test_a_unix_socket_of_a_dead_process_is_in_the_way_only_where_twisted_leaves_it(tmp_path):
    path = tmp_path / "socket"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    assert problem_of(f"unix:{path}") == "cannot be listened on: something else is there"
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    (tmp_path / "socket.lock").symlink_to(str(gone.pid))
    check_free("", Address(str(path), None))


def test_a_file_where_a_unix_socket_should_be_is_told(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert problem_of(f"unix:{file}") == "cannot be listened on: something else is there"
    assert problem_of(f"unix:{tmp_path}") == "cannot be listened on: something else is there"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tcp:9000", "tcp:9000"),
        ("tcp:9000:interface=127.0.0.1", "tcp:9000"),
        ("unix:/tmp/ocppgw-test.sock", "unix:/tmp/ocppgw-test.sock"),
    ],
)
def test_two_listeners_cannot_have_one_place(one, other):
    with pytest.raises(EndpointError, match=f"{other}: wants the same place as {one}"):
        check_together([(one, address_of(one)), (other, address_of(other))])


def test_two_listeners_may_have_two_places():
    places = ["tcp:9000:interface=127.0.0.1", "tcp:9000:interface=127.0.0.2", "tcp:9001", "tcp:0", "tcp:0"]
    check_together([(place, address_of(place)) for place in places])


def test_an_encrypted_key_asks_nobody_on_the_terminal(tmp_path):
    (tmp_path / "key.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", encoding="utf-8")
    with pytest.raises(EndpointError, match="the key is encrypted"):
        address_of(f"ssl:0:privateKey={tmp_path}/key.pem:certKey={tmp_path}/cert.pem")
