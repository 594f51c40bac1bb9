"""How a paho client is made: what can be seen without connecting it."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from ocppgw.interfaces import Properties
from ocppgw.mqttclient import PublishProperties, make_client, set_no_delay, tls_context, words
from ocppgw.settings import BrokerAddress, Mqtt

TCP = BrokerAddress("tcp", "127.0.0.1", 1883)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)


@given(
    st.builds(
        Properties,
        content_type=st.none() | texts,
        correlation_data=st.none() | st.binary(max_size=300),
        response_topic=st.none() | texts,
        user=st.lists(st.tuples(texts, texts), max_size=40).map(tuple),
    )
)
def test_properties_are_packed_as_paho_does_it(properties: Properties) -> None:
    expected = PahoProperties(PacketTypes.PUBLISH)
    if properties.content_type is not None:
        expected.ContentType = properties.content_type
    if properties.correlation_data is not None:
        expected.CorrelationData = properties.correlation_data
    if properties.response_topic is not None:
        expected.ResponseTopic = properties.response_topic
    for pair in properties.user:
        expected.UserProperty = pair
    assert PublishProperties(properties).pack() == expected.pack()


@pytest.mark.parametrize(
    ("version", "protocol"), [("5", MQTTProtocolVersion.MQTTv5), ("3.1.1", MQTTProtocolVersion.MQTTv311)]
)
def test_a_client_speaks_the_version_that_it_was_made_for(version: str, protocol: MQTTProtocolVersion) -> None:
    client = make_client(Mqtt(), TCP, "gw-1", version)
    assert client.protocol == protocol
    assert client.socket() is None


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_small_packets_do_not_wait_for_each_other(family: socket.AddressFamily) -> None:
    with socket.socket(family) as sock:
        assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        set_no_delay(None, None, sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.fileno() >= 0


def test_a_unix_socket_has_no_such_option() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        set_no_delay(None, None, sock)
        assert sock.fileno() >= 0


class TestTlsContext:
    def test_it_verifies_by_default(self) -> None:
        context = tls_context(Mqtt())
        assert context.check_hostname
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2

    def test_an_authority_of_ours_replaces_the_systems(self, tmp_path: Path) -> None:
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        assert tls_context(Mqtt(ca_file=str(tmp_path / "ca.pem"))).cert_store_stats()["x509_ca"] == 1

    @pytest.mark.parametrize("key", ["ca_file", "cert_file"])
    @pytest.mark.parametrize("content", [None, b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nxx\n"])
    def test_a_file_that_cannot_be_used_is_an_error(self, tmp_path: Path, key: str, content: bytes | None) -> None:
        file = tmp_path / "file.pem"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            tls_context(Mqtt(**{key: str(file)}))
        assert words(caught.value)
        assert "\n" not in words(caught.value)

    def test_a_certificate_needs_its_own_key(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        for name in ("a", "b"):
            authority.issue_cert(f"{name}.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / name)
        with pytest.raises(ssl.SSLError):
            tls_context(Mqtt(cert_file=str(tmp_path / "a"), key_file=str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (ValueError("bad"), "bad"),
        (OSError(), "OSError"),
    ],
)
def test_an_error_in_words(error: OSError | ValueError, said: str) -> None:
    assert words(error) == said


def test_an_encrypted_key_asks_nobody_on_the_terminal(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("gateway.example")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    (tmp_path / "key.pem").write_bytes(pem)
    with pytest.raises(OSError, match="the key is encrypted"):
        tls_context(Mqtt(cert_file=str(tmp_path / "cert.pem"), key_file=str(tmp_path / "key.pem")))
