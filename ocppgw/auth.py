"""Who may connect: the credentials of a charge point and the checkers that Twisted cred asks about them.

A checker says one of three things. It returns the identity (allowed), or it fails with UnknownIdentity (never heard of
it: the next checker is asked), UnauthorizedLogin (known, and the password is wrong) or BackendAway. A Portal keeps one
checker an interface, so ours are asked by one Chain. Passwords are raw bytes (OCPP-J 1.6, 6.2.2 sends arbitrary ones).
Slow hashes never run in the reactor's thread.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
import string
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IAnonymous, ICredentials, IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from zope.interface import Interface, implementer

MAX_VERIFYING = 500
"""Logins that wait for their password to be verified; some seconds of work. More are told to come again (503)."""
KEY_LENGTH = 20
KEY_ALPHABET = string.ascii_letters + string.digits
"""A key of ``ocppgw passwd``: at most 20 bytes in 1.6 (security whitepaper, A00.FR.205), 16 or more in 2.x."""

# argon2id with the least cost that OWASP recommends. A key of 20 random letters needs none at all; a password that a
# person chose does.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
_HASH = re.compile(r"\$argon2(?:id|i|d)\$v=\d+\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")


class UnknownIdentity(UnauthorizedLogin):
    """No such charge point here."""


class BackendAway(Exception):
    """Whoever knows the passwords cannot be asked now."""


@implementer(IUsernamePassword)
@dataclass(frozen=True, slots=True)
class ChargePointCredentials:
    """What a charge point presents. username: its identity, UTF-8. password: None when it sent no credentials."""

    username: bytes
    password: bytes | None = field(repr=False)

    def checkPassword(self, password: bytes) -> bool:
        """Compare with a password in the clear, in a time that does not depend on it."""
        return self.password is not None and hmac.compare_digest(self.password, password)


@implementer(ICredentialsChecker)
class Chain:
    """Checkers asked in order: the next on unknown, an end on allowed, denied or away.

    open: whether somebody without any credentials can get in.
    """

    credentialInterfaces: ClassVar[Sequence[type[Interface]]] = (IUsernamePassword,)

    def __init__(self, checkers: Sequence[ICredentialsChecker]) -> None:
        self._checkers = list(checkers)
        self.open = any(_asks_nothing(checker) for checker in checkers)

    def requestAvatarId(self, credentials: ICredentials) -> Deferred[bytes | tuple[()]]:
        """Fire with the identity in UTF-8, or fail as the module says."""
        return Deferred.fromCoroutine(self._ask(credentials))

    async def _ask(self, credentials: Any) -> bytes | tuple[()]:
        identity: bytes = credentials.username
        if credentials.password is None and not self.open:
            raise UnauthorizedLogin("no credentials")
        for checker in self._checkers:
            if _asks_nothing(checker):
                return identity
            # Asked also without a password: whom it knows does not get in as anonymous.
            try:
                await maybeDeferred(checker.requestAvatarId, credentials)
            except UnknownIdentity:
                continue
            return identity
        raise UnknownIdentity


def _asks_nothing(checker: ICredentialsChecker) -> bool:
    return IAnonymous in checker.credentialInterfaces


class PasswordFileError(Exception):
    """A password file that cannot be used; the text says which line and why."""


def read_password_file(path: Path) -> dict[bytes, str]:
    """Hashes by identity (UTF-8). Lines are IDENTITY:HASH; ``:`` and ``%`` in an identity are percent-encoded.

    Raises PasswordFileError.
    """
    return _hashes(path, _lines(path))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PasswordFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # Not splitlines(): an identity may have one of Unicode's other line separators in it.
    return text.removesuffix("\n").split("\n") if text else []


def _hashes(path: Path, lines: Sequence[str]) -> dict[bytes, str]:
    hashes = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        identity, _, digest = line.partition(":")
        digest = digest.strip()
        if _HASH.fullmatch(digest) is None:
            raise PasswordFileError(f"{path}: line {number}: must be IDENTITY:HASH as 'ocppgw passwd' writes it")
        hashes[unquote(identity).encode("utf-8")] = digest
    return hashes


@implementer(ICredentialsChecker)
class PasswordFile:
    """``htpasswd:/etc/ocppgw/passwd``: identities and salted hashes, read again when the file has changed.

    A changed file that cannot be read leaves the last good one in force and says so.
    """

    credentialInterfaces: ClassVar[Sequence[type[Interface]]] = (IUsernamePassword,)
    log = Logger()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verifying = 0
        self._state = self._stat()
        self._hashes = read_password_file(path)

    def requestAvatarId(self, credentials: ICredentials) -> Deferred[bytes | tuple[()]]:
        """Fire with the user name, or fail with UnknownIdentity or UnauthorizedLogin."""
        return Deferred.fromCoroutine(self._check(credentials))

    async def _check(self, credentials: Any) -> bytes | tuple[()]:
        self._reload_if_changed()
        username: bytes = credentials.username
        digest = self._hashes.get(username)
        if digest is None:
            raise UnknownIdentity
        if credentials.password is None or not await self._verified(digest, credentials.password):
            raise UnauthorizedLogin("wrong password")
        return username

    async def _verified(self, digest: str, password: bytes) -> bool:
        """Verify in a thread; who has gone before it is their turn costs nothing."""
        if self._verifying >= MAX_VERIFYING:
            raise BackendAway
        verification = _Verification(digest, password)
        self._verifying += 1
        try:
            return await deferToThread(verification.run)
        finally:
            verification.wanted = False
            self._verifying -= 1

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _reload_if_changed(self) -> None:
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        try:
            self._hashes = read_password_file(self._path)
            self.log.info("password file {path} read again", path=str(self._path))
        except PasswordFileError as error:
            self.log.error("{error}; what was read last stays in force", error=error)


class _Verification:
    """One password to be verified. wanted: whether anybody still waits for the result."""

    def __init__(self, digest: str, password: bytes) -> None:
        self.wanted = True
        self._digest = digest
        self._password = password

    def run(self) -> bool:
        return self.wanted and _verify(self._digest, self._password)


def _verify(digest: str, password: bytes) -> bool:
    try:
        return _HASHER.verify(digest, password)
    except (VerificationError, InvalidHashError):
        return False


def make_key() -> str:
    """A random key for one charge point."""
    return "".join(secrets.choice(KEY_ALPHABET) for _ in range(KEY_LENGTH))


def set_password(path: Path, identity: str, password: bytes) -> None:
    """Write an entry into a password file, made if it is not there; nobody ever sees half of it.

    Raises PasswordFileError.
    """
    name = identity.replace("%", "%25").replace(":", "%3A").replace("\n", "%0A").replace("\r", "%0D")
    name = name.replace("#", "%23", 1) if name.startswith("#") else name
    entry = f"{name}:{_HASHER.hash(password)}"
    try:
        path = path.resolve()
        with _alone_in(path.parent):
            lines = _lines(path) if path.exists() else []
            _hashes(path, lines)
            _replace(path, "\n".join([*(line for line in lines if line.partition(":")[0] != name), entry, ""]))
    except OSError as error:
        raise PasswordFileError(f"{path}: cannot be written: {error.strerror}") from None
    except UnicodeEncodeError:
        raise PasswordFileError(f"{identity!r} is not UTF-8") from None


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep others of our kind from changing a file meanwhile. The file itself cannot be locked: it is replaced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Put a new file in the place of an old one, with its owner and mode; with mode 0600 where there is none."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if path.exists():
                old = path.stat()
                os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, old.st_mode & 0o777)
            file.write(text)
        draft.replace(path)
    except BaseException:
        draft.unlink()
        raise
