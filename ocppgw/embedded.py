"""The embedded MQTT broker: rumqttd in a child process, for a first try without installing anything, and for tests.

It listens on 127.0.0.1 alone, asks nobody who he is and keeps everything in memory: not for production. It speaks MQTT
3.1.1 only, since rumqttd serves MQTT 5 on a port of its own. What else it cannot do: docs/embedded-broker.rst.

This is the gateway's side, which knows nothing of rumqttd but its port; the child is rumqttd.py. Rules:
- the client service starts when the broker answers and stops before it, so that the last messages reach it;
- a broker that ends by itself is started again, and the client reconnects as it would to any other broker;
- the child never outlives the gateway, however that ends: it ends with the pipe that is its standard input.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

from twisted.application.service import IService, Service
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ProcessDone,
    ProcessExitedAlready,
    ProcessTerminated,
)
from twisted.internet.interfaces import IProcessTransport, IReactorProcess, IReactorTCP, IReactorTime, ITransport
from twisted.internet.protocol import Factory, ProcessProtocol, Protocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

log = Logger()

HOST = "127.0.0.1"
CHILD = Path(__file__).with_name("rumqttd.py")
READY_POLL, READY_LIMIT = 0.05, 10.0  # seconds
KILL_AFTER = 5.0  # seconds between the end of its standard input and SIGKILL
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a restart


class EmbeddedBrokerError(Exception):
    """The embedded broker cannot be started; its text is one line for the operator."""


class IBrokerReactor(IReactorProcess, IReactorTCP, IReactorTime):
    """What the service needs of a reactor."""


def check_port(port: int) -> None:
    """Raise EmbeddedBrokerError when the broker could not start: its port is taken, or iotcore is missing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rumqttd does: TIME_WAIT does not matter
        try:
            probe.bind((HOST, port))
        except PermissionError as error:
            raise EmbeddedBrokerError(f"{HOST}:{port} cannot be listened on: {error.strerror}") from error
        except OSError as error:
            raise EmbeddedBrokerError(
                f"{HOST}:{port} is taken: to use the broker that is there pass --mqtt mqtt://{HOST}:{port}, "
                "for another port --mqtt embedded:PORT"
            ) from error
    if importlib.util.find_spec("iotcore") is None:
        raise EmbeddedBrokerError(
            "the embedded broker needs iotcore: pip install 'ocppgw[embedded]', "
            "or name a broker with --mqtt mqtt://HOST:PORT"
        )


class EmbeddedBroker(Service):
    """Keeps the broker's process up, and runs the client service `then` within its lifetime.

    port: on 127.0.0.1, see check_port. message_size: bytes of the largest OCPP-J frame; its message may be twice as
    large, by JSON escapes, and 64 KiB more, by envelope and topic.
    """

    def __init__(self, reactor: IBrokerReactor, port: int, message_size: int, then: IService) -> None:
        self.reactor = reactor
        self.port = port
        self.message_size = message_size
        self.then = then

    def startService(self) -> None:
        """Start the child now and the client when the child answers."""
        super().startService()  # type: ignore[no-untyped-call]
        self._pause: Deferred[None] = succeed(None)
        self._kept_up = Deferred.fromCoroutine(self._keep_up())
        self._kept_up.addErrback(lambda failure: log.failure("the embedded MQTT broker cannot be kept up", failure))
        self._client_started = Deferred.fromCoroutine(self._start_client())
        self._client_started.addErrback(self._client_not_started)

    def stopService(self) -> Deferred[None]:
        """Stop the client, then the child; fires when the child is gone."""
        return Deferred.fromCoroutine(self._stop())

    async def _keep_up(self) -> None:
        pause = FIRST_PAUSE
        while self.running:
            started = self.reactor.seconds()
            self._child = _Child()
            # By its path and with -P: neither the working directory nor ours can shadow a module that it imports.
            command = [sys.executable, "-P", str(CHILD), HOST, str(self.port), str(2 * self.message_size + 65536)]
            self.reactor.spawnProcess(self._child, command[0], command, {**os.environ, "RUST_BACKTRACE": "0"})
            reason = await self._child.ended
            if not self.running:
                return
            if self.reactor.seconds() - started > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            log.error(
                "the embedded MQTT broker is gone, {reason}; it starts again in {pause:.0f} s; it said: {said}",
                reason=reason,
                pause=pause,
                said=self._child.last_line() or "nothing",
            )
            self._pause = deferLater(self.reactor, pause)
            with suppress(CancelledError):
                await self._pause
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _start_client(self) -> None:
        if await self._answers():
            log.info("embedded MQTT broker on {host}:{port}", host=HOST, port=self.port)
        else:
            log.error("the embedded MQTT broker does not answer on {host}:{port}", host=HOST, port=self.port)
        self.then.startService()  # type: ignore[no-untyped-call]

    def _client_not_started(self, failure: Failure) -> None:
        if not isinstance(failure.value, (CancelledError, ConnectingCancelledError)):
            log.failure("the MQTT client was not started", failure)

    async def _answers(self) -> bool:
        endpoint = TCP4ClientEndpoint(self.reactor, HOST, self.port, timeout=1)
        deadline = self.reactor.seconds() + READY_LIMIT
        while self.reactor.seconds() < deadline:
            try:
                await endpoint.connect(_Knocks.forProtocol(_Knock))
            except ConnectError:
                await deferLater(self.reactor, READY_POLL)
            else:
                return True
        return False

    async def _stop(self) -> None:
        self._client_started.cancel()
        try:
            if self.then.running:
                await maybeDeferred(self.then.stopService)
        finally:
            await maybeDeferred(super().stopService)  # running is false: from here on the child is meant to end
            self._pause.cancel()
            self._child.dismiss()
            killing = self.reactor.callLater(KILL_AFTER, self._child.signal, "KILL")
            await self._kept_up
            if killing.active():
                killing.cancel()


class _Knocks(Factory):
    noisy = False


class _Knock(Protocol):
    """Goes away as soon as somebody has opened."""

    transport: ITransport

    def connectionMade(self) -> None:
        self.transport.loseConnection()


class _Child(ProcessProtocol):
    """The gateway's end of the child. ended: fires with "process ended by signal 9" or the like."""

    transport: IProcessTransport

    def __init__(self) -> None:
        self.ended: Deferred[str] = Deferred()
        self._stderr = b""

    def errReceived(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-4096:]
        if b" panicked at " in self._stderr:
            # A thread of rumqttd is gone while its port stays open, perhaps with nobody behind it. In 0.20 a client id
            # with one of + $ # / is enough: the second time it connects, server/broker.rs:544 poisons a mutex.
            self.signal("KILL")

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(str(cast(ProcessDone | ProcessTerminated, reason.value).args[0]))

    def dismiss(self) -> None:
        """Have it end, as the end of the gateway would."""
        self.transport.closeStdin()

    def signal(self, name: str) -> None:
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(name)

    def last_line(self) -> str:
        lines = [line for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        panics = [line for line in lines if " panicked at " in line]
        return (panics or lines or [""])[-1].strip()
