"""The WebSocket edge: one protocol instance a charge point, from its first byte to its close.

Incoming: the request's head is read by ``handshake``; then, in the order of the contract, identity, credentials (by
cred's portal) and subprotocol are checked; then every message is handed to the session that the portal gave. Outgoing:
frames and close codes. Knows nothing of MQTT, of topics or of what is in a frame.

Where Autobahn's behaviour is overridden, the comment says which one (read in 26.10.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.compress import PerMessageDeflateOffer, PerMessageDeflateOfferAccept
from autobahn.websocket.types import ConnectionDeny, ConnectionRequest
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import Portal
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ocppgw import handshake
from ocppgw.auth import BackendAway, ChargePointCredentials, UnknownIdentity
from ocppgw.interfaces import IAdmission, ICentralSystem, IChargePoint
from ocppgw.settings import Limits, Listener

SERVED = {
    **{version: version for version in ("ocpp1.6", "ocpp2.0.1", "ocpp2.1")},
    # What charge points write when they mean one of these (reference: Q2); they are answered in their own words.
    "ocpp1.6j": "ocpp1.6",
    "ocpp2.0.1.1": "ocpp2.0.1",
}
"""Versions by subprotocol."""
COMPRESSED = {"2.x": ("ocpp2.0.1", "ocpp2.1"), "all": ("ocpp1.6", "ocpp2.0.1", "ocpp2.1"), "none": ()}
"""Versions with compression, by the setting: 2.x has to have it (Part 4, 3.4), 1.6 may."""
WINDOW_BITS, MEMORY_LEVEL = 11, 4
"""Of zlib: 30 KB a connection; with its defaults it is 300 KB."""
PROTOCOL_ERROR = 1002
INTERNAL_ERROR = 1011
FRAME_HEADER = 4
"""Bytes of a frame beside its payload, about."""
CLOSE_TIMEOUT = 3
"""Seconds that a charge point has to answer our close frame, and then to let go of the socket."""

_log = Logger()
_REFUSALS = {"reserved": handshake.RESERVED, "broker away": handshake.BROKER_AWAY}


@implementer(IChargePoint, IPushProducer)
class ChargePointProtocol(WebSocketServerProtocol):
    """The connection of one charge point; cred's mind.

    As a push producer it only learns when the peer does not read: from then on what is written is counted, and a peer
    that leaves more than ``limits.outgoing_buffer`` unread is cut off.
    """

    # Autobahn tells of every fault of a peer, in the peer's words; we tell it ourselves.
    log = txaio.make_logger(level="critical")  # type: ignore[attr-defined]

    factory: ChargePointFactory
    transport: Any
    localCloseCode: Any
    autoPingTimeoutCall: Any
    version = ""
    remote = ""
    ended = ""
    _upgrade: Any = None
    _refusal: handshake.Refusal | None = None
    _session: Any = None
    _logout: Callable[[], None] | None = None
    _logging_in: Deferred[str | None] | None = None
    _unread: int | None = None
    _paused = False
    _last_call: Any = None

    # The handshake

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the socket; each of them is a sign of life.

        For Autobahn only whole messages and the right pong are, and what comes after the end it would hoard.
        """
        if self.state == self.STATE_CLOSED:
            return
        if self.autoPingTimeoutCall is not None:
            self._cancelAutoPingTimeoutCall()  # type: ignore[no-untyped-call]
        self._dataReceived(data)

    def processHandshake(self) -> None:
        """Read the request's head before Autobahn does, and give it one that it accepts.

        Autobahn calls this with every piece of data until the handshake is over, also while a login is under way:
        a second request behind the first one would be a second onConnect.
        """
        limits = self.factory.limits
        # Not in connectionMade: the header of haproxy: comes with the first data.
        self.remote = _written(self.transport.getPeer())
        if self._upgrade is not None:
            if len(self.data) > limits.message_size:
                self.failHandshake("")
            return
        end = self.data.find(b"\r\n\r\n", 0, limits.header_size)
        if end < 0:
            if len(self.data) >= limits.header_size:
                self._refuse(handshake.HEAD_TOO_LARGE)
            return
        try:
            self._upgrade = handshake.parse_upgrade(self.data[:end], self.factory.listener.path)
        except handshake.Refused as refused:
            self._refuse(refused.refusal)
            return
        self.data = self._upgrade.head() + self.data[end + 4 :]
        super().processHandshake()

    def onConnect(self, request: ConnectionRequest) -> Deferred[str | None]:  # type: ignore[override]
        """Decide on the handshake: fires with the subprotocol, or fails with ConnectionDeny."""
        self._logging_in = Deferred.fromCoroutine(self._admit(self._upgrade))
        return self._logging_in

    async def _admit(self, upgrade: handshake.Upgrade) -> str | None:
        try:
            return await self._log_in(upgrade)
        except handshake.Refused as refused:
            self._refusal = refused.refusal
        except CancelledError:
            self._refusal = handshake.BAD_REQUEST
        except Exception:
            _log.failure("while charge point {identity!r} was logging in", identity=upgrade.identity)
            self._refusal = handshake.INTERNAL_ERROR
        raise ConnectionDeny(self._refusal.status, "")  # type: ignore[no-untyped-call]

    async def _log_in(self, upgrade: handshake.Upgrade) -> str | None:
        refusal = self.factory.admission.refusal(upgrade.identity)
        if refusal is not None:
            raise handshake.Refused(_REFUSALS[refusal])
        password = upgrade.password()
        # Chosen before the login, told after it: nobody learns what is served before it is known who asks.
        served = next((version for version in upgrade.offered if version in SERVED), None)
        self.version = SERVED[served] if served else (self._assumed_version() if not upgrade.offered else "")
        credentials = ChargePointCredentials(upgrade.identity.encode("utf-8"), password)
        try:
            _, session, logout = await self.factory.portal.login(credentials, self, ICentralSystem)
        except UnknownIdentity:
            raise handshake.Refused(handshake.UNKNOWN) from None
        except UnauthorizedLogin:
            raise handshake.Refused(handshake.NO_CREDENTIALS if password is None else handshake.DENIED) from None
        except BackendAway:
            raise handshake.Refused(handshake.BACKEND_AWAY) from None
        if self.state != self.STATE_CONNECTING:
            # The peer has gone, or the time for the handshake was up, while the login was under way. Autobahn would
            # open the connection all the same.
            logout()
            raise handshake.Refused(handshake.BAD_REQUEST)
        if not self.version:
            logout()
            if not upgrade.offered:
                raise handshake.Refused(handshake.NO_SUBPROTOCOL)
            if self.factory.listener.subprotocol_mismatch == "reject":
                raise handshake.Refused(handshake.NO_COMMON_SUBPROTOCOL)
            return None
        self.autoPingInterval = self._setting("ping_interval")
        self.autoPingTimeout = self._setting("ping_timeout")
        self._session, self._logout = session, logout
        return served

    def _setting(self, name: str) -> Any:
        """Look a setting up for this charge point: its own, or the listener's."""
        changes = self.factory.changes_for(self._upgrade.identity)
        return changes.get(name, getattr(self.factory.listener, name))

    def _assumed_version(self) -> str:
        assumed = self._setting("no_subprotocol")
        return "" if assumed == "reject" else assumed

    def perMessageCompressionAccept(self, offers: Sequence[object]) -> PerMessageDeflateOfferAccept | None:
        """Accept compression (RFC 7692) where this version has it; Autobahn calls this when the login is over."""
        if self.version not in COMPRESSED[self.factory.listener.compression]:
            return None
        # Autobahn forgets the number that a client names; more must not be asked of it (RFC 7692, 7.1.2.2).
        named = [int(bits) for bits in re.findall(r"client_max_window_bits=(\d+)", self._upgrade.extensions)]
        bits = min([WINDOW_BITS, *named])
        for offer in offers:
            if isinstance(offer, PerMessageDeflateOffer):
                return PerMessageDeflateOfferAccept(  # type: ignore[no-untyped-call]
                    offer,
                    request_max_window_bits=bits if offer.accept_max_window_bits else 0,
                    window_bits=min(WINDOW_BITS, offer.request_max_window_bits or WINDOW_BITS),
                    mem_level=MEMORY_LEVEL,
                    max_message_size=self.factory.limits.message_size,
                )
        return None

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: object = None) -> None:
        """Answer with a refusal. Autobahn would put its reason, with the peer's words, into the status line."""
        self._refuse(self._refusal or handshake.BAD_REQUEST)

    def _refuse(self, refusal: handshake.Refusal) -> None:
        if self.state != self.STATE_CONNECTING:
            return
        identity = self._upgrade.identity if self._upgrade is not None else None
        _log.info(
            "refused {identity!r} from {remote}: {reason} ({status})",
            identity=identity,
            remote=self.remote,
            reason=refusal.reason,
            status=refusal.status,
        )
        self.sendData(handshake.response(refusal))
        self.dropConnection(abort=False)

    # The connection

    def onOpen(self) -> None:
        """Let frames flow, or close at once where no subprotocol is common (OCPP-J 1.6, 3.2; Part 4, 3.2)."""
        if self._session is None:
            _log.info(
                "closed {identity!r} from {remote}: no common subprotocol",
                identity=self._upgrade.identity,
                remote=self.remote,
            )
            self.sendCloseFrame(code=PROTOCOL_ERROR, reasonUtf8=b"no common subprotocol")
            return
        # It holds the password.
        self._upgrade = None
        self.transport.registerProducer(self, True)
        self._session.opened()

    def onMessageFrame(self, payload: Iterable[Any]) -> None:
        """Collect what is in a frame. Autobahn would also collect empty ones, which no limit ends."""
        if not self.failedByMe:
            self.message_data += filter(None, payload)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """Hand a message on; JSON in a binary frame is JSON (reference: Q24)."""
        if self._session is None:
            return
        try:
            self._session.frame_received(payload)
        except Exception:
            # Ours, not the peer's. Autobahn would drop the connection without a word.
            _log.failure("while taking a frame from {remote}", remote=self.remote)
            self.close(INTERNAL_ERROR, "internal error")

    def onPing(self, payload: bytes) -> None:
        """Answer; pongs fill a buffer as frames do."""
        if self._has_room(len(payload)):
            super().onPing(payload)

    def _has_room(self, size: int) -> bool:
        """Count what a peer that does not read is sent; cut it off when that is too much."""
        if self._unread is not None:
            self._unread += size + FRAME_HEADER
            if self._unread > self.factory.limits.outgoing_buffer:
                self.wasNotCleanReason = "the charge point does not read"
                self.dropConnection(abort=True)
                return False
        return True

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """Log out. Autobahn calls this also for connections that never opened."""
        if self.localCloseCode is not None and self.closedByMe:
            self.ended = f"closed by us with {self.localCloseCode}"
        elif wasClean:
            self.ended = f"closed by the charge point with {code}"
        else:
            self.ended = self.wasNotCleanReason or "connection lost"
        if self._logging_in is not None:
            # Nobody waits for it any more; a password that is still to be hashed need not be.
            self._logging_in.cancel()
        session, self._session = self._session, None
        if session is not None and self._logout is not None:
            self._logout()

    def onAutoPingTimeout(self) -> None:
        """Drop a silent peer, unless it is us who do not listen: its pong may lie in the socket."""
        if self._paused:
            self._sendAutoPing()
        else:
            super().onAutoPingTimeout()

    def dropConnection(self, abort: bool = False) -> None:
        """Close the socket; over TLS, or with unsent bytes, that takes a peer who plays along, so not for ever."""
        super().dropConnection(abort)
        if not abort and self._last_call is None:
            self._last_call = txaio.call_later(CLOSE_TIMEOUT, self.transport.abortConnection)  # type: ignore[attr-defined]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Nothing is left to be closed."""
        if self._last_call is not None and self._last_call.active():
            self._last_call.cancel()
        super().connectionLost(reason)

    # IChargePoint

    def send(self, frame: bytes) -> bool:
        """Write a frame as one text message."""
        if self.state != self.STATE_OPEN:
            return False
        if not self._has_room(len(frame)):
            return False
        self.sendMessage(frame)  # type: ignore[no-untyped-call]
        return True

    def close(self, code: int, reason: str) -> None:
        """Close; sendClose would refuse 1001 and 1011. The answer has to be read."""
        if self.state == self.STATE_OPEN:
            self.resume_reading()
            self.sendCloseFrame(code=code, reasonUtf8=reason.encode("utf-8"))

    def pause_reading(self) -> None:
        """Leave further frames in the socket."""
        if self.state == self.STATE_OPEN and not self._paused:
            self._paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Read on."""
        if self.state == self.STATE_OPEN and self._paused:
            self._paused = False
            self.transport.resumeProducing()

    # IPushProducer

    def pauseProducing(self) -> None:
        """Count from now on: the transport's buffer is full. Twisted says so at each write until it is empty."""
        if self._unread is None:
            self._unread = 0

    def resumeProducing(self) -> None:
        """Stop counting: the transport's buffer is empty."""
        self._unread = None

    def stopProducing(self) -> None:
        """Nothing to stop: the connection is lost, and onClose comes."""


def _written(peer: Any) -> str:
    """Write a peer's address: host:port."""
    host = getattr(peer, "host", None)
    if host is None:
        return "unix"
    return f"[{host}]:{peer.port}" if ":" in host else f"{host}:{peer.port}"


class ChargePointFactory(WebSocketServerFactory):
    """Makes the protocols of one listener; what they share lies here.

    changes_for: the settings that differ for a charge point, by its identity.
    """

    protocol = ChargePointProtocol  # type: ignore[assignment]
    noisy = False

    def __init__(
        self,
        portal: Portal,
        admission: IAdmission,
        listener: Listener,
        limits: Limits,
        reactor: object,
        changes_for: Callable[[str], Mapping[str, Any]] = lambda identity: {},
    ) -> None:
        super().__init__(reactor=reactor)  # type: ignore[no-untyped-call]
        self.portal = portal
        self.admission = admission
        self.listener = listener
        self.limits = limits
        self.changes_for = changes_for
        self.setProtocolOptions(  # type: ignore[no-untyped-call]
            versions=[13],
            webStatus=False,
            # What is not UTF-8 is not JSON: the parser finds it, at a fraction of the cost.
            utf8validateIncoming=False,
            maxMessagePayloadSize=limits.message_size,
            failByDrop=False,
            openHandshakeTimeout=limits.handshake_timeout,
            closeHandshakeTimeout=CLOSE_TIMEOUT,
            tcpNoDelay=True,
            autoPingInterval=listener.ping_interval,
            autoPingTimeout=listener.ping_timeout,
            autoPingRestartOnAnyTraffic=True,
        )
        self.server = ""
