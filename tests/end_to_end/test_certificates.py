"""Development certificates, and charge points that connect with wss:// to a gateway which uses them."""

import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from processes import free_port

from end_to_end.conftest import MAKE_CERTS
from end_to_end.wire import LIMIT, Stage, ask, masked, request, set_up

NAMES = ("ca", "server", "server-ecdsa", "client")


def make_certs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, MAKE_CERTS, *arguments], capture_output=True, text=True, check=False)


def certificate(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes())


def test_what_is_there_is_kept_unless_force_is_used(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "certificates"
    assert make_certs(directory).returncode == 0
    made = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert sorted(made) == sorted(f"{name}.{ending}" for name in NAMES for ending in ("key", "pem"))
    # One file that is there is enough: an old certificate is of no use to a new authority.
    (directory / "ca.key").unlink()
    again = make_certs(directory)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.endswith("ca.pem is there already; --force replaces it and the others\n")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: content for name, content in made.items() if name != "ca.key"
    }
    assert make_certs("--force", directory).returncode == 0
    assert all((directory / name).read_bytes() != content for name, content in made.items())


def test_nobody_else_can_read_a_key(certificates: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in certificates.glob("*.key")}
    assert modes == {f"{name}.key": 0o600 for name in NAMES}


def test_keys_and_names_are_what_charge_points_expect(certificates: Path) -> None:
    for name in ("ca", "server", "client"):
        key = certificate(certificates, name).public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 2048
    key = certificate(certificates, "server-ecdsa").public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    for name in ("server", "server-ecdsa"):
        names = certificate(certificates, name).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost"]
        assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert certificate(certificates, "client").subject.rfc4514_string() == "CN=CP1,O=ocppgw development"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[tuple[Stage, dict[str, int]]]:
    """A gateway with a port for each server certificate."""
    ports = {"server": free_port(), "server-ecdsa": free_port()}
    arguments = []
    for name, port in ports.items():
        files = f"privateKey={certificates / name}.key:certKey={certificates / name}.pem"
        arguments += ["--wss", f"ssl:{port}:{files}:interface=127.0.0.1"]
    with set_up(tmp_path_factory.mktemp("secured"), "mosquitto 5", "", *arguments) as stage:
        yield stage, ports


def trusting(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates / "ca.pem")


@contextmanager
def connected(port: int, cid: str, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """A charge point that is let in.

    By hand: the client of websockets reads and writes in two threads, which in Python 3.11 one TLS connection in some
    hundred does not survive.
    """
    with (
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(request(f"/ocpp/{cid}"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 101 ")
        yield connection


@pytest.mark.parametrize("name", ["server", "server-ecdsa"])
def test_a_charge_point_that_trusts_the_authority_connects(
    secured: tuple[Stage, dict[str, int]], certificates: Path, cid: str, name: str
) -> None:
    stage, ports = secured
    with connected(ports[name], cid, trusting(certificates)) as charge_point:
        shown = ssl.DER_cert_to_PEM_cert(charge_point.getpeercert(binary_form=True) or b"")
        assert shown == (certificates / f"{name}.pem").read_text(encoding="ascii")
        charge_point.sendall(masked(b'[2,"1","Heartbeat",{}]'))
        assert stage.service.take(f"ocpp/cp/{cid}/Heartbeat").content["UniqueId"] == "1"
        stage.service.send(cid, [3, "1", {"data": "x" * 100_000}])
        received = b""
        while not received.endswith(b'"}]'):
            received += charge_point.recv(65536)
        assert received.endswith(b'[3,"1",{"data":"' + b"x" * 100_000 + b'"}]')
    stage.gateway.wait_for(rf"charge points connect to wss://127\.0\.0\.1:{ports[name]}/ocpp/<identity>")


def test_a_charge_point_that_does_not_trust_the_authority_stays_away(
    secured: tuple[Stage, dict[str, int]], cid: str
) -> None:
    with (
        pytest.raises(ssl.SSLCertVerificationError),
        connected(secured[1]["server"], cid, ssl.create_default_context()),
    ):
        pass


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_later_are_spoken(
    secured: tuple[Stage, dict[str, int]], certificates: Path, cid: str, version: ssl.TLSVersion
) -> None:
    context = trusting(certificates)
    context.minimum_version = context.maximum_version = version
    with connected(secured[1]["server"], cid, context):
        pass


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_tls_is_refused(secured: tuple[Stage, dict[str, int]], certificates: Path, cid: str) -> None:
    """Security whitepaper, A00.FR.314."""
    context = trusting(certificates)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="alert protocol version"), connected(secured[1]["server"], cid, context):
        pass


def test_what_is_not_tls_harms_nobody(secured: tuple[Stage, dict[str, int]], certificates: Path, cid: str) -> None:
    stage, ports = secured
    for sent in (request("/ocpp/CP1"), b"\x16\x03\x01\xff\xff" + b"x" * 70000, b""):
        with socket.create_connection(("127.0.0.1", ports["server"]), timeout=LIMIT) as connection:
            connection.sendall(sent)
    # And the other way round: TLS where there is none.
    assert ask(stage.port, b"\x16\x03\x01\x00\x05hello\r\n\r\n").status == 426
    with connected(ports["server"], cid, trusting(certificates)) as charge_point:
        charge_point.sendall(masked(b'[2,"1","Heartbeat",{}]'))
        stage.service.take(f"ocpp/cp/{cid}/Heartbeat")
