"""How a paho client is made: addresses, TLS, versions, properties. No connection, no thread; ``mqtt`` has those."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.properties import VariableByteIntegers

from ocppgw.interfaces import Properties
from ocppgw.settings import BrokerAddress, Mqtt

CONNECT_TIMEOUT = 10.0
"""Seconds for TCP, TLS and the WebSocket handshake, each."""


def make_client(settings: Mqtt, address: BrokerAddress, client_id: str, version: str) -> paho.Client:
    """Make a client that has not connected. version: "5" or "3.1.1". Raises OSError for unusable TLS files."""
    is_5 = version == "5"
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id,
        clean_session=None if is_5 else False,
        protocol=MQTTProtocolVersion.MQTTv5 if is_5 else MQTTProtocolVersion.MQTTv311,
        transport={"unix": "unix", "websockets": "websockets"}.get(address.transport, "tcp"),  # type: ignore[arg-type]
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.connect_timeout = CONNECT_TIMEOUT
    # The window is ours; with one of its own paho walks its messages at every PUBACK.
    client.max_inflight_messages_set(0)
    client.on_socket_open = set_no_delay
    # With this hook set, paho leaves every write to our loop_write instead of writing each packet by itself.
    client.on_socket_register_write = lambda client, userdata, sock: None
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if address.transport == "websockets":
        client.ws_set_options(path=address.path)
    if address.tls:
        client.tls_set_context(tls_context(settings))
    arguments: dict[str, Any] = {}
    if is_5:
        properties = PahoProperties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = settings.session_expiry
        arguments = {"clean_start": False, "properties": properties}
    # paho wants a port for a Unix socket, too.
    client.connect_async(address.host, address.port or 1883, settings.keepalive, **arguments)
    return client


def disconnect(client: paho.Client, end_session: bool) -> None:
    """Queue a DISCONNECT. end_session: have an MQTT 5 broker forget the session at once."""
    if end_session and client.protocol == MQTTProtocolVersion.MQTTv5:
        properties = PahoProperties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0
        client.disconnect(properties=properties)
    else:
        client.disconnect()


class NamedContext(ssl.SSLContext):
    """A TLS context that expects one name in the certificate, whatever host is connected to."""

    server_name: str

    def wrap_socket(self, sock: Any, *args: Any, **keywords: Any) -> ssl.SSLSocket:
        """Wrap with our name in the place of the host's."""
        keywords["server_hostname"] = self.server_name
        return super().wrap_socket(sock, *args, **keywords)


def tls_context(settings: Mqtt) -> ssl.SSLContext:
    """Make the TLS context of ``mqtts://`` and ``wss://``. Raises OSError (ssl.SSLError is one) for unusable files."""
    context = NamedContext(ssl.PROTOCOL_TLS_CLIENT) if settings.server_name else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if isinstance(context, NamedContext):
        context.server_name = settings.server_name or ""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.ca_file is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(settings.ca_file)
    if settings.cert_file is not None:
        context.load_cert_chain(settings.cert_file, settings.key_file, password=_refuse_passphrase)
    if settings.alpn:
        context.set_alpn_protocols(list(settings.alpn))
    return context


def set_no_delay(client: Any, userdata: Any, sock: Any) -> None:
    """Switch Nagle's algorithm off: a QoS 1 exchange would wait 44 ms for a delayed acknowledgement.

    paho's WebSocket wrapper has no setsockopt, so the descriptor is borrowed.
    """
    with socket.socket(fileno=os.dup(sock.fileno())) as borrowed:
        if borrowed.family in (socket.AF_INET, socket.AF_INET6):
            borrowed.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class PublishProperties:
    """The properties of a PUBLISH, in the form in which paho sends them (MQTT 5, 3.3.2.3).

    paho asks of them only ``pack()``; its own class takes ten times as long, for every message.
    """

    __slots__ = ("_packed",)

    def __init__(self, properties: Properties) -> None:
        parts = []
        if properties.content_type is not None:
            parts.append(b"\x03" + _binary(properties.content_type.encode()))
        if properties.response_topic is not None:
            parts.append(b"\x08" + _binary(properties.response_topic.encode()))
        if properties.correlation_data is not None:
            parts.append(b"\x09" + _binary(properties.correlation_data))
        parts += [b"\x26" + _binary(name.encode()) + _binary(value.encode()) for name, value in properties.user]
        packed = b"".join(parts)
        self._packed: bytes = VariableByteIntegers.encode(len(packed)) + packed  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        """Give back the length and the properties."""
        return self._packed


def _binary(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _refuse_passphrase() -> str:
    """Stand in for OpenSSL's question on the terminal, where nobody may be."""
    raise OSError(0, "the key is encrypted; a gateway that starts by itself needs one that is not")


def words(error: OSError | ValueError) -> str:
    """Say in short what went wrong."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
