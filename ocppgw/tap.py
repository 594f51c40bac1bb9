"""The composition root: from the command line to running services. Everything else gets what it needs from here.

Everything that can be wrong is found before the first service starts, and said in one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from twisted.application import strports
from twisted.application.service import IService, MultiService, Service
from twisted.cred import strcred
from twisted.cred.checkers import AllowAnonymousAccess, ICredentialsChecker
from twisted.cred.credentials import IAnonymous, IUsernamePassword
from twisted.cred.portal import Portal
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python import usage

from ocppgw import __version__
from ocppgw.auth import Chain, PasswordFileError
from ocppgw.broker import Broker
from ocppgw.config import is_tls, load, with_version
from ocppgw.embedded import EmbeddedBroker, EmbeddedBrokerError, check_port
from ocppgw.endpoints import Address, EndpointError, address_of, check_free, check_together, with_backlog
from ocppgw.gateway import Gateway
from ocppgw.mqttclient import tls_context, words
from ocppgw.schemas import SchemaError, Schemas
from ocppgw.settings import BrokerAddress, Settings, SettingsError, parse_broker
from ocppgw.websocket import ChargePointFactory

log = Logger()


class Options(usage.Options, strcred.AuthOptionMixin):
    """What ``twistd ocppgw`` takes; what is not given here comes from the settings file."""

    synopsis = "[ocppgw options]"
    longdesc = "A gateway between EV charge points (OCPP-J over WebSocket) and services on an MQTT broker."
    supportedInterfaces = (IUsernamePassword, IAnonymous)
    optParameters = [
        ["config", "c", None, "settings file: TOML, or EMQX 4.4's emqx_ocpp.conf"],
        ["mqtt", None, None, "broker: mqtt://HOST[:PORT], mqtts://..., or embedded:[PORT] (default: embedded:)"],
        ["node", None, None, "name of this gateway process (default: host name and first port)"],
    ]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.listeners: list[dict[str, str]] = []
        self.checkers: list[str] = []

    def opt_ws(self, endpoint: str) -> None:
        """Listen for ws:// on this endpoint, e.g. tcp:33033; repeatable. (default: tcp:33033:interface=127.0.0.1)"""
        self.listeners.append({"endpoint": endpoint})

    def opt_wss(self, endpoint: str) -> None:
        """Listen for wss:// on this endpoint, e.g. ssl:33034:privateKey=server.key:certKey=server.pem; repeatable."""
        self.listeners.append({"endpoint": endpoint, "tls": "wss"})

    def opt_auth(self, description: str) -> None:
        """Ask this checker for credentials, see --help-auth; repeatable, asked in the order given."""
        # Not the mixin's own: its errors come with a page of help.
        self.checkers.append(description)

    def opt_version(self) -> None:
        """Print the version of ocppgw."""
        print(f"ocppgw {__version__}")  # noqa: T201
        raise SystemExit(0)

    def overrides(self) -> dict[str, Any]:
        """What the command line says, in the form of a settings file."""
        overrides: dict[str, Any] = {}
        if self["node"] is not None:
            overrides["node"] = self["node"]
        if self["mqtt"] is not None:
            overrides["mqtt"] = {"url": self["mqtt"]}
        if self.checkers:
            overrides["auth"] = {"checkers": self.checkers}
        if self.listeners:
            overrides["listener"] = [{"endpoint": listener["endpoint"]} for listener in self.listeners]
        return overrides

    def check_listeners(self) -> None:
        """See that --wss has TLS and --ws has none. Raises SettingsError."""
        for listener in self.listeners:
            wanted = "tls" in listener
            if is_tls(listener["endpoint"]) is not wanted:
                hint = "has no TLS: --ws, or ssl:PORT:privateKey=FILE:certKey=FILE" if wanted else "has TLS: --wss"
                raise SettingsError(f"{listener['endpoint']}: {hint}")


def makeService(options: Options) -> IService:
    """Check everything and put the services together. Ends the process with one line when something is wrong."""
    from twisted.internet import reactor

    try:
        options.check_listeners()
        settings = load(options["config"], options.overrides())
        return compose(settings, reactor)
    except (SettingsError, EndpointError, EmbeddedBrokerError, PasswordFileError, SchemaError) as error:
        raise SystemExit(f"ocppgw: {error}") from None


def compose(settings: Settings, reactor: Any) -> IService:
    """Join the parts. Raises SettingsError, EndpointError, EmbeddedBrokerError, PasswordFileError."""
    addresses = [_checked_address(listener.endpoint) for listener in settings.listeners]
    places = [(listener.endpoint, address) for listener, address in zip(settings.listeners, addresses, strict=True)]
    checkers = _checkers(settings, addresses)
    broker_address = parse_broker(settings.mqtt.url)
    if broker_address.transport == "embedded":
        places.append(("the embedded broker", Address(broker_address.host, broker_address.port)))
    check_together(places)
    if broker_address.transport == "embedded":
        check_port(broker_address.port)
        settings = with_version(settings, "3.1.1")
    if broker_address.tls:
        try:
            tls_context(settings.mqtt)
        except OSError as error:
            raise SettingsError(f"mqtt: ca_file, cert_file or key_file cannot be used: {words(error)}") from None

    name = _broker_name(broker_address)
    client_id = settings.mqtt.client_id or f"ocppgw-{settings.node}"
    broker = Broker(settings.mqtt, broker_address, name, client_id, settings.upstream, settings.drain_seconds, reactor)
    gateway = broker.client = Gateway(settings, broker, reactor, _schemas(settings))
    portal = Portal(gateway, [Chain(checkers)])
    if broker_address.transport == "embedded":
        first: IService = EmbeddedBroker(reactor, broker_address.port, settings.limits.message_size, broker)
    else:
        first = broker
    services = [Greeting(settings, addresses, name), first, gateway]
    for listener in settings.listeners:
        factory = ChargePointFactory(portal, gateway, listener, settings.limits, reactor, settings.changes_for)
        services.append(strports.service(with_backlog(listener.endpoint), factory, reactor))
    return OrderedServices(services, settings.drain_seconds + 10.0, reactor)


def _schemas(settings: Settings) -> Schemas | None:
    used = [settings.message_format_checking]
    used += [section.changes.get("message_format_checking", "disable") for section in settings.charge_points]
    if set(used) == {"disable"}:
        return None
    return Schemas.load(None if settings.json_schema_dir is None else Path(settings.json_schema_dir))


def _checked_address(endpoint: str) -> Address:
    address = address_of(endpoint)
    check_free(endpoint, address)
    return address


def _checkers(settings: Settings, addresses: Sequence[Address]) -> list[ICredentialsChecker]:
    if not settings.auth.checkers:
        for listener, address in zip(settings.listeners, addresses, strict=True):
            if not address.is_loopback:
                raise SettingsError(
                    f"{listener.endpoint}: others can reach it and nobody would be asked for credentials: pass "
                    "--auth htpasswd:FILE (ocppgw passwd makes it), or --auth anonymous if that is meant"
                )
        return [AllowAnonymousAccess()]
    return [_checker(description) for description in settings.auth.checkers]


def _checker(description: str) -> ICredentialsChecker:
    kind, _, argument = description.partition(":")
    try:
        if kind == "file":
            # FilePasswordDB would find out at the first login.
            with open(argument, "rb"):  # noqa: PTH123
                pass
        checker: ICredentialsChecker = strcred.makeChecker(description)  # type: ignore[no-untyped-call]
    except PasswordFileError:
        raise
    except strcred.InvalidAuthType:
        raise SettingsError(f"auth {description}: no such kind of checker; --help-auth lists them") from None
    except OSError as error:
        raise SettingsError(f"auth {description}: {error.strerror}: {error.filename}") from None
    except Exception as error:
        # Not the description: memory: has passwords in it.
        raise SettingsError(f"auth {kind}: {error}") from None
    if not {IUsernamePassword, IAnonymous} & set(checker.credentialInterfaces):
        raise SettingsError(f"auth {description}: cannot check a user name and a password")
    return checker


def _broker_name(address: BrokerAddress) -> str:
    """Name a broker for logs, without credentials."""
    if address.transport == "unix":
        return f"mqtt+unix://{address.host}"
    scheme = {"websockets": "ws"}.get(address.transport, "mqtt") + ("s" if address.tls else "")
    return f"{scheme}://{address.host}:{address.port}"


def _shortest(filters: Iterable[str]) -> list[str]:
    """Leave out the filters that another one covers."""
    kept: list[str] = []
    for topic_filter in filters:
        levels = topic_filter.split("/")
        if not any(
            len(levels) == len(other.split("/"))
            and all(wild in ("+", level) for wild, level in zip(other.split("/"), levels, strict=True))
            for other in kept
        ):
            kept.append(topic_filter)
    return kept


class Greeting(Service):
    """Tells the operator where to connect and what to subscribe to."""

    def __init__(self, settings: Settings, addresses: Sequence[Address], broker: str) -> None:
        self._settings = settings
        self._addresses = addresses
        self._broker = broker

    def startService(self) -> None:
        """Say it."""
        self.running = True
        settings = self._settings
        for notice in settings.notices:
            log.warn("{notice}", notice=notice)
        log.info("ocppgw {version}, node {node}", version=__version__, node=settings.node)
        for listener, address in zip(settings.listeners, self._addresses, strict=True):
            if address.port is None:
                log.info("charge points connect to {endpoint}", endpoint=listener.endpoint)
                continue
            log.info(
                "charge points connect to {scheme}://{authority}{path}/<identity>",
                scheme="wss" if listener.tls else "ws",
                authority=address.authority(),
                path=listener.path,
            )
        topics = settings.topics
        upstream = [topics.call, *topics.overrides.values(), topics.reply, topics.error]
        log.info(
            "services on {broker} subscribe to {filters} and publish to {downstream}",
            broker=self._broker,
            filters=", ".join(_shortest(template.as_filter() for template in upstream)),
            downstream=topics.downstream.render_concrete(
                dict.fromkeys(topics.downstream.names, "<identity>"), ["<any>"]
            ),
        )
        if not settings.auth.checkers:
            log.warn("no --auth: whoever can reach a listener, on this machine only, may connect with any identity")


class OrderedServices(MultiService):
    """Services that start in order and stop in reverse, one after another, each within a limit of seconds.

    Twisted's MultiService stops all of them at once.
    """

    def __init__(self, services: Iterable[Service | IService], limit: float, reactor: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self._reactor = reactor
        for service in services:
            self.addService(service)  # type: ignore[no-untyped-call]

    def stopService(self) -> Deferred[None]:
        """Fire when all of them have stopped, or have had their time."""
        self.running = False
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for service in reversed(list(self)):
            try:
                await maybeDeferred(service.stopService).addTimeout(self._limit, self._reactor)
            except Exception:
                log.failure("while {service} was stopping", service=service)
