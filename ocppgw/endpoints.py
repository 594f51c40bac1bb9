"""Where an endpoint string would listen, known before anything does.

Start-up needs that twice: to refuse a gateway without authentication on an address that others can reach, and to say
in one line, before the daemon forks, that a port is taken. Twisted's endpoints do not tell; so each is asked to listen
on a reactor that takes note of the address and goes no further.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from OpenSSL import SSL, crypto
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory

BACKLOG = 4096
"""Connections that wait to be accepted; the kernel caps it (net.core.somaxconn)."""


class EndpointError(Exception):
    """An endpoint that cannot be listened on; the text is the one line that the operator sees."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint listens. host: empty for every interface. port: None for a Unix socket, whose path is host.

    inherited: the socket exists already, systemd has made it.
    """

    host: str
    port: int | None
    inherited: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        if self.port is None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def authority(self) -> str:
        """``host:port`` for a URL."""
        host = socket.gethostname() if self.host in ("", "0.0.0.0", "::") else self.host  # noqa: S104
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def with_backlog(description: str) -> str:
    """Raise Twisted's backlog of 50, with which a storm of reconnecting charge points waits for TCP to try again."""
    kind = description.split(":", 1)[0]
    return (
        description
        if kind not in ("tcp", "tcp6", "ssl") or "backlog=" in description
        else f"{description}:backlog={BACKLOG}"
    )


class _Noted(Exception):
    def __init__(self, address: Address) -> None:
        super().__init__()
        self.address = address


class _NotingReactor:
    """The listening half of a reactor, for one address. Raising keeps an inherited socket from being closed."""

    def listenTCP(self, port: int, factory: object, backlog: int = 50, interface: str = "") -> NoReturn:
        raise _Noted(Address(interface, port))

    def listenSSL(
        self, port: int, factory: object, contextFactory: object, backlog: int = 50, interface: str = ""
    ) -> NoReturn:
        raise _Noted(Address(interface, port))

    def listenUNIX(self, address: str, factory: object, *args: object, **keywords: object) -> NoReturn:
        raise _Noted(Address(address, None))

    def adoptStreamPort(self, fileno: int, addressFamily: int, factory: object) -> NoReturn:
        with socket.socket(fileno=os.dup(fileno)) as inherited:
            name = inherited.getsockname()
        if isinstance(name, tuple):
            raise _Noted(Address(name[0], name[1], inherited=True))
        raise _Noted(Address(str(name), None, inherited=True))


def check_together(listening: Sequence[tuple[str, Address]]) -> None:
    """See that no two want the same place. Raises EndpointError."""
    for index, (description, address) in enumerate(listening):
        for other_description, other in listening[:index]:
            if address.inherited or other.inherited or address.port != other.port:
                continue
            everywhere = "" in (address.host, other.host) and address.port is not None
            if address.port != 0 and (everywhere or address.host == other.host):
                raise EndpointError(f"{description}: wants the same place as {other_description}")


def address_of(description: str) -> Address:
    """Find out where an endpoint string listens. Raises EndpointError."""
    _check_key(description)
    reactor: Any = _NotingReactor()
    try:
        listening = serverFromString(reactor, description).listen(Factory())  # type: ignore[no-untyped-call]
    except Exception as error:
        # Whatever its parser found: an unknown kind, a missing argument, a key file that cannot be read.
        raise EndpointError(f"{description}: {_words(error)}") from None
    failures: list[Any] = []
    listening.addErrback(failures.append)
    if not failures or not isinstance(failures[0].value, _Noted):
        raise EndpointError(f"{description}: {failures[0].getErrorMessage() if failures else 'has no address'}")
    address: Address = failures[0].value.address
    return address


def _check_key(description: str) -> None:
    """See that the key of ssl: is not encrypted: OpenSSL would ask for its pass phrase on the terminal, and wait."""
    key = re.search(r":privateKey=((?:[^:\\]|\\.)*)", description)
    if key is None or not description.startswith("ssl:"):
        return
    path = Path(re.sub(r"\\(.)", r"\1", key[1]))
    if path.is_file() and b"ENCRYPTED" in path.read_bytes()[:65536]:
        raise EndpointError(
            f"{description}: the key is encrypted; a gateway that starts by itself needs one that is not"
        )


def check_free(description: str, address: Address) -> None:
    """Try whether the address can be listened on. Raises EndpointError."""
    if address.inherited:
        return
    if address.port is None:
        _check_path(description, address.host)
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            raise EndpointError(f"{description}: cannot be listened on: {_words(error)}") from None


def _check_path(description: str, path: str) -> None:
    """The same for a Unix socket. Twisted clears away one that a dead process left only by the lock beside it."""
    problem = None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
            problem = "Address already in use"
        except FileNotFoundError:
            directory = Path(path).parent
            if not os.access(directory, os.W_OK):
                problem = f"{directory} is not there or cannot be written"
        except ConnectionRefusedError:
            if not (Path(path).is_socket() and Path(f"{path}.lock").is_symlink()):
                problem = "something else is there"
        except OSError as error:
            problem = _words(error)
    if problem is not None:
        raise EndpointError(f"{description}: cannot be listened on: {problem}")


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
    if isinstance(error, (SSL.Error, crypto.Error)):
        reasons = ", ".join(reason for *_, reason in error.args[0]) if error.args else ""
        return f"a key or certificate file holds something else ({reasons or 'no reason given'})"
    if isinstance(error, TypeError):
        return "wrong arguments for this kind of endpoint"
    if isinstance(error, LookupError):
        return f"no such socket was handed over ({error})"
    return str(error) or type(error).__name__
