"""The ways to a broker: TCP, TLS, Unix socket, WebSocket; certificates, names and passwords."""

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from processes import START_LIMIT, Process, free_port, gateway, mosquitto

from end_to_end.wire import ChargePoint, Service, ask, assert_calm, eventually, request

# The URL of the broker; what mosquitto's configuration says of that listener; what [mqtt] says.
TLS = ("cafile {certificates}/ca.pem", "certfile {certificates}/server.pem", "keyfile {certificates}/server.key")
CA = 'ca_file = "{certificates}/ca.pem"'
CLIENT = 'cert_file = "{certificates}/client.pem"\nkey_file = "{certificates}/client.key"'
WAYS = {
    "tcp": ("mqtt://localhost:{port}", ("listener {port} 127.0.0.1",), ""),
    "tls": ("mqtts://127.0.0.1:{port}", ("listener {port} 127.0.0.1", *TLS), CA),
    "tls with a client certificate": (
        "mqtts://localhost:{port}",
        ("listener {port} 127.0.0.1", *TLS, "require_certificate true", "use_identity_as_username true"),
        f"{CA}\n{CLIENT}",
    ),
    "tls with another name": (
        "mqtts://127.1:{port}",
        ("listener {port} 127.0.0.1", *TLS),
        f'{CA}\nserver_name = "localhost"',
    ),
    "unix socket": ("mqtt+unix://{directory}/mqtt%3Asocket", ("listener 0 {directory}/mqtt:socket",), ""),
    "websocket": ("ws://127.0.0.1:{port}/mqtt", ("listener {port} 127.0.0.1", "protocol websockets"), ""),
    "websocket with tls": ("wss://127.0.0.1:{port}", ("listener {port} 127.0.0.1", "protocol websockets", *TLS), CA),
}


class Way:
    """A broker with a second listener, and a gateway that uses it."""

    def __init__(self, directory: Path, certificates: Path, lines: tuple[str, ...]) -> None:
        self.broker_port, self.port = free_port(), free_port()
        self._values = {"directory": directory, "certificates": certificates, "port": self.broker_port}
        self._file = directory / "ocppgw.toml"
        self.broker = mosquitto(directory, *(line.format(**self._values) for line in lines))

    def gateway(self, url: str, settings: str = "", env: Mapping[str, str] | None = None) -> Process:
        self._file.write_text("[mqtt]\n" + settings.format(**self._values), encoding="utf-8")
        endpoint = f"tcp:{self.port}:interface=127.0.0.1"
        mqtt = ["--mqtt", url.format(**self._values)] if url else []
        return gateway("--ws", endpoint, "--config", str(self._file), *mqtt, env=env)

    def works(self, size: int) -> None:
        """See that large messages and many get through. size: bytes of a large one downstream."""
        with Service(self.broker.port) as service, ChargePoint(self.port, "CP1") as charge_point:
            charge_point.send(2, "1", "DataTransfer", {"data": "x" * 900_000})
            assert service.take("ocpp/cp/CP1/DataTransfer").content["Payload"] == {"data": "x" * 900_000}
            service.send("CP1", [3, "1", {"data": "y" * size}])
            assert charge_point.receive()[2] == {"data": "y" * size}
            for number in range(200):
                charge_point.send(2, str(number), "MeterValues", {})
            ids = [service.take("ocpp/cp/CP1/MeterValues").content["UniqueId"] for _ in range(200)]
            assert ids == [str(number) for number in range(200)]


@pytest.mark.parametrize("kind", WAYS)
def test_each_way_leads_to_the_broker(tmp_path: Path, certificates: Path, kind: str) -> None:
    url, lines, settings = WAYS[kind]
    way = Way(tmp_path, certificates, lines)
    with way.broker, way.gateway(url, settings) as running:
        running.wait_for(r"connected to broker \S+://\S+ \(MQTT 5\)", START_LIMIT)
        # mosquitto itself sends 1 KiB every 24 ms over a WebSocket.
        way.works(size=30_000 if "websocket" in kind else 900_000)
    assert_calm(running)


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        (TLS, "", "certificate: .*(self.signed|unable to get)"),
        (TLS, f'{CA}\nserver_name = "example.org"', "certificate: .*[Hh]ostname mismatch"),
        (("require_certificate true", *TLS), CA, "closed by the broker"),
        ((), CA, r"\S"),  # a broker without TLS
    ],
)
def test_a_broker_that_cannot_be_trusted_is_one_line(
    tmp_path: Path, certificates: Path, lines: tuple[str, ...], settings: str, said: str
) -> None:
    way = Way(tmp_path, certificates, ("listener {port} 127.0.0.1", *lines))
    with way.broker, way.gateway("mqtts://127.0.0.1:{port}", settings) as running:
        running.wait_for(rf"cannot connect to broker mqtts://127\.0\.0\.1:{way.broker_port}: {said}", START_LIMIT)
    assert_calm(running)


# Names and passwords

PASSWORD = "p@ss:w/örd %"


@pytest.fixture
def guarded(tmp_path: Path, certificates: Path) -> Iterator[Way]:
    """A broker that knows one user."""
    file = tmp_path / "passwd"
    # As mosquitto_passwd writes it: PBKDF2 with SHA-512.
    salt = b"twelve bytes"
    digest = hashlib.pbkdf2_hmac("sha512", PASSWORD.encode(), salt, 101)
    file.write_text(f"gw:$7$101${b64encode(salt).decode()}${b64encode(digest).decode()}\n", encoding="utf-8")
    lines = ("listener {port} 127.0.0.1", "allow_anonymous false", f"password_file {file}")
    way = Way(tmp_path, certificates, lines)
    with way.broker:
        yield way


@pytest.mark.parametrize(
    ("url", "settings", "env"),
    [
        ("mqtt://gw:p%40ss%3Aw%2F%C3%B6rd%20%25@127.0.0.1:{port}", "", {}),
        ("mqtt://127.0.0.1:{port}", "", {"OCPPGW_MQTT_USER": "gw", "OCPPGW_MQTT_PASSWORD": PASSWORD}),
        ("mqtt://gw@127.0.0.1:{port}", "", {"OCPPGW_MQTT_PASSWORD": PASSWORD}),
        ("mqtt://127.0.0.1:{port}", f'username = "gw"\npassword = "{PASSWORD}"', {}),
        ("mqtt://127.0.0.1:{port}", 'username = "gw"\npassword = "${{env:SECRET}}"', {"SECRET": PASSWORD}),
        ("mqtt://127.0.0.1:{port}", 'username = "gw"\npassword = "${{file:{directory}/secret}}"', {}),
        ("", f'url = "mqtt://127.0.0.1:{{port}}"\nusername = "gw"\npassword = "{PASSWORD}"', {}),
    ],
)
def test_a_password_can_be_given_in_each_place(
    guarded: Way, tmp_path: Path, url: str, settings: str, env: dict[str, str]
) -> None:
    (tmp_path / "secret").write_text(f"{PASSWORD}\n", encoding="utf-8")
    with guarded.gateway(url, settings, env) as running:
        running.wait_for("connected to broker", START_LIMIT)
    assert_calm(running)
    in_url = "%40ss" in url
    assert any("can be read by whoever lists processes" in line for line in running.lines) == in_url
    assert not any(PASSWORD in line or "%40ss" in line for line in running.lines)


@pytest.mark.parametrize("version", ["auto", "5", "3.1.1"])
def test_a_wrong_password_is_one_line(guarded: Way, version: str) -> None:
    settings = f'version = "{version}"\nusername = "gw"\npassword = "wrong"\noutage_grace = 0'
    with guarded.gateway("mqtt://127.0.0.1:{port}", settings) as running:
        running.wait_for(r"cannot connect to broker mqtt://127\.0\.0\.1:\d+: refused: .*[Nn]ot authorized", START_LIMIT)
        eventually(lambda: sum("not authorised" in line for line in guarded.broker.lines) > 1, "a second attempt")
        # However often it tries.
        assert sum("cannot connect" in line for line in running.lines) == 1
        assert ask(guarded.port, request("/ocpp/CP1")).status == 503
    assert_calm(running)
