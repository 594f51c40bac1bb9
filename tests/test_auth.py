"""Who may connect: credentials, the chain of checkers, the password file."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from argon2 import PasswordHasher
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.cred.checkers import AllowAnonymousAccess, FilePasswordDB, ICredentialsChecker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from ocppgw.auth import (
    MAX_VERIFYING,
    BackendAway,
    Chain,
    ChargePointCredentials,
    PasswordFile,
    PasswordFileError,
    UnknownIdentity,
    make_key,
    read_password_file,
    set_password,
)

# Of the least cost that argon2 knows, for "secret".
HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("secret")
RAW_PASSWORD = bytes(range(8)) + b"\xff" * 12
"""That of the example in OCPP-J 1.6, 6.2.2: with NUL, and not UTF-8."""


def credentials(identity: str = "CP1", password: bytes | None = b"secret") -> ChargePointCredentials:
    return ChargePointCredentials(identity.encode(), password)


@implementer(ICredentialsChecker)
class FakeChecker:
    """Knows passwords by identity. failure: what it fails with, whoever comes. asked: by whom."""

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self, passwords: dict[str, bytes], failure: Exception | None = None) -> None:
        self._passwords = {identity.encode(): password for identity, password in passwords.items()}
        self._failure = failure
        self.asked: list[bytes] = []

    def requestAvatarId(self, credentials: Any) -> Deferred[bytes]:
        self.asked.append(credentials.username)
        if self._failure is not None:
            return fail(self._failure)
        if credentials.username not in self._passwords:
            raise UnknownIdentity
        if not credentials.checkPassword(self._passwords[credentials.username]):
            return fail(UnauthorizedLogin())
        return succeed(b"what a checker calls it")


class CredentialsTests(SynchronousTestCase):
    def test_passwords_are_compared_as_bytes(self):
        presented = credentials(password=RAW_PASSWORD)
        assert verifyObject(IUsernamePassword, presented)
        assert presented.checkPassword(RAW_PASSWORD)
        assert not presented.checkPassword(RAW_PASSWORD[:-1])
        assert not credentials(password=None).checkPassword(b"")

    def test_a_password_is_not_shown(self):
        assert "hunter2" not in repr(credentials(password=b"hunter2"))


class ChainTests(SynchronousTestCase):
    def setUp(self):
        self.first, self.second = FakeChecker({"CP1": b"secret"}), FakeChecker({"CP1": b"other", "CP2": b"secret"})
        self.chain = Chain([self.first, self.second])

    def test_the_interfaces(self):
        assert verifyObject(ICredentialsChecker, self.chain)
        assert verifyObject(ICredentialsChecker, self.first)

    def assert_allowed(self, presented, chain=None):
        avatar_id = self.successResultOf((chain or self.chain).requestAvatarId(presented))
        assert avatar_id == presented.username

    def assert_fails(self, presented, error, chain=None):
        failure = self.failureResultOf((chain or self.chain).requestAvatarId(presented))
        assert failure.type is error

    def test_whom_a_checker_allows_comes_in_under_his_identity(self):
        self.assert_allowed(credentials("CP1"))
        assert self.second.asked == []

    def test_whom_a_checker_does_not_know_is_asked_of_the_next(self):
        self.assert_allowed(credentials("CP2"))

    def test_whom_nobody_knows_is_unknown(self):
        self.assert_fails(credentials("CP3"), UnknownIdentity)
        assert (self.first.asked, self.second.asked) == ([b"CP3"], [b"CP3"])

    def test_a_wrong_password_is_the_end_also_where_another_checker_would_take_it(self):
        self.assert_fails(credentials("CP1", b"other"), UnauthorizedLogin)
        assert self.second.asked == []

    def test_a_checker_that_cannot_be_asked_is_the_end(self):
        chain = Chain([FakeChecker({}, BackendAway()), self.first])
        self.assert_fails(credentials("CP1"), BackendAway, chain)

    def test_without_credentials_nobody_is_asked(self):
        assert not self.chain.open
        self.assert_fails(credentials("CP1", None), UnauthorizedLogin)
        self.assert_fails(credentials("CP3", None), UnauthorizedLogin)
        assert self.first.asked == []

    def test_anonymous_takes_any_password_or_none(self):
        chain = Chain([AllowAnonymousAccess()])
        assert chain.open
        self.assert_allowed(credentials("CP3", None), chain)
        self.assert_allowed(credentials("CP3", b"any"), chain)

    def test_behind_a_checker_anonymous_is_for_those_whom_it_does_not_know(self):
        chain = Chain([self.first, AllowAnonymousAccess()])
        self.assert_allowed(credentials("CP1"), chain)
        self.assert_allowed(credentials("CP3", None), chain)
        self.assert_fails(credentials("CP1", b"wrong"), UnauthorizedLogin, chain)
        self.assert_fails(credentials("CP1", None), UnauthorizedLogin, chain)

    def test_before_a_checker_anonymous_is_for_all(self):
        chain = Chain([AllowAnonymousAccess(), self.first])
        self.assert_allowed(credentials("CP1", b"wrong"), chain)

    def test_nobody_comes_in_where_nobody_is_asked(self):
        self.assert_fails(credentials(), UnknownIdentity, Chain([]))

    def test_twisteds_password_file_cannot_tell_unknown_from_wrong(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"CP1:secret\nCP3:\xfe\xff\n")
            file.flush()
            chain = Chain([FilePasswordDB(file.name), self.second])
            self.assert_allowed(credentials("CP1"), chain)
            self.assert_allowed(credentials("CP3", b"\xfe\xff"), chain)
            self.assert_fails(credentials("CP1", b"wrong"), UnauthorizedLogin, chain)
            self.assert_fails(credentials("CP2"), UnauthorizedLogin, chain)


# The password file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "passwd"


@pytest.mark.parametrize(
    ("line", "identity"),
    [
        (f"CP1:{HASH}", b"CP1"),
        (f"CP1:{HASH} \r", b"CP1"),
        (f"a%3Ab%25c:{HASH}", b"a:b%c"),
        (f"%23CP:{HASH}", b"#CP"),
        (f"RDAM 1/+:{HASH}", b"RDAM 1/+"),
        (f"é:{HASH}", "é".encode()),
        (f"%C3%A9:{HASH}", "é".encode()),
        (f" :{HASH}", b" "),
        (f"a\u2028b\x85:{HASH}", "a\u2028b\x85".encode()),
    ],
)
def test_entries_of_a_password_file(path, line, identity):
    path.write_text(f"# keys\n\n{line}\n", encoding="utf-8")
    assert read_password_file(path) == {identity: HASH}


def test_the_last_entry_of_an_identity_counts(path):
    other = HASH.replace("argon2id", "argon2i")
    path.write_text(f"CP1:{other}\nCP2:{HASH}\nCP%31:{HASH}", encoding="utf-8")
    assert read_password_file(path) == {b"CP1": HASH, b"CP2": HASH}


def test_a_password_file_may_be_empty(path):
    path.touch()
    assert read_password_file(path) == {}


@pytest.mark.parametrize("line", ["CP1", "CP1:", "CP1:secret", "CP1:$2b$12$abc", f"CP1:{HASH[:40]}", f"a:b:{HASH}"])
def test_a_line_that_is_no_entry_is_told_and_not_shown(path, line):
    path.write_text(f"CP0:{HASH}\n{line}\n", encoding="utf-8")
    with pytest.raises(PasswordFileError) as caught:
        read_password_file(path)
    assert str(caught.value) == f"{path}: line 2: must be IDENTITY:HASH as 'ocppgw passwd' writes it"


def test_a_password_file_that_cannot_be_read_is_told(path):
    with pytest.raises(PasswordFileError, match="passwd: cannot be read: No such file or directory"):
        read_password_file(path)
    path.write_bytes(b"\xff")
    with pytest.raises(PasswordFileError, match="passwd: cannot be read: 'utf-8' codec can't decode"):
        read_password_file(path)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(min_size=1, max_size=6) | st.text("\r\n\x85\u2028%:# \0", min_size=1), unique=True, max_size=3))
def test_whatever_the_identity_its_entry_is_found_again(identities):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "passwd")
        path.touch()
        for identity in identities:
            set_password(path, identity, identity.encode())
        hashes = read_password_file(path)
    assert list(hashes) == [identity.encode() for identity in identities]
    assert all(PasswordHasher().verify(digest, identity) for identity, digest in hashes.items())


def test_a_new_password_takes_the_place_of_the_old_one_and_of_nothing_else(path):
    path.write_text(f"# keys\nCP1:{HASH}\n\nCP10:{HASH}\n", encoding="utf-8")
    set_password(path, "CP1", RAW_PASSWORD)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:-1] == ["# keys", "", f"CP10:{HASH}"]
    assert PasswordHasher().verify(lines[-1].removeprefix("CP1:"), RAW_PASSWORD)
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_is_for_its_owner_alone(path):
    mask = os.umask(0)
    try:
        set_password(path, "CP1", b"secret")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_changed_file_keeps_its_mode_and_its_owner(path):
    # The gateway, which reads it, is seldom the one who runs ocppgw passwd.
    path.touch()
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
    before = path.stat()
    mask = os.umask(0o077)
    try:
        set_password(path, "CP1", b"secret")
    finally:
        os.umask(mask)
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_link_stays_one(path):
    path.symlink_to("target")
    set_password(path, "CP1", b"secret")
    assert path.is_symlink()
    assert list(read_password_file(path.parent / "target")) == [b"CP1"]


def test_a_broken_file_is_left_alone(path):
    path.write_text("CP1:secret\n", encoding="utf-8")
    with pytest.raises(PasswordFileError, match="line 1"):
        set_password(path, "CP2", b"secret")
    assert path.read_text(encoding="utf-8") == "CP1:secret\n"
    assert list(path.parent.iterdir()) == [path]


def test_an_identity_that_is_not_utf_8_is_refused(path):
    path.touch()
    with pytest.raises(PasswordFileError, match="is not UTF-8"):
        set_password(path, "\udcff", b"secret")
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_told(path):
    with pytest.raises(PasswordFileError, match="passwd: cannot be written: No such file or directory"):
        set_password(path / "passwd", "CP1", b"secret")
    path.mkdir()
    with pytest.raises(PasswordFileError, match="passwd: cannot be read: Is a directory"):
        set_password(path, "CP1", b"secret")


def test_of_many_who_write_at_once_none_is_lost_and_no_reader_sees_half(path):
    path.touch()
    identities = {f"CP{number}" for number in range(24)}
    seen: list[set[bytes]] = [set()]
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(set_password, path, identity, b"secret") for identity in identities]
        while not all(written.done() for written in writing):
            seen.append(set(read_password_file(path)))
    assert all(earlier <= later for earlier, later in pairwise(seen))
    assert all(written.result() is None for written in writing)
    assert set(read_password_file(path)) == {identity.encode() for identity in identities}


def test_keys_are_random_and_valid_in_every_version():
    # 1.6: at most 20 bytes (security whitepaper, A00.FR.205); 2.x: 16 to 40 characters of passwordString.
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"[A-Za-z0-9]{20}", key) for key in keys)


class PasswordFileTests(TestCase):
    timeout = 60

    def setUp(self):
        directory = tempfile.mkdtemp()
        self.addCleanup(rmtree, directory)
        self.path = Path(directory, "passwd")
        set_password(self.path, "CP1", b"secret")
        self.checker = PasswordFile(self.path)

    async def outcome(self, identity: str = "CP1", password: bytes | None = b"secret") -> Any:
        """The avatar id, or the type of the failure."""
        try:
            return await self.checker.requestAvatarId(credentials(identity, password))
        except (UnauthorizedLogin, BackendAway) as error:
            return type(error)

    def test_the_interface(self):
        assert verifyObject(ICredentialsChecker, self.checker)

    async def test_right_wrong_unknown_and_none(self):
        assert await self.outcome() == b"CP1"
        assert await self.outcome(password=b"Secret") is UnauthorizedLogin
        assert await self.outcome(password=b"") is UnauthorizedLogin
        assert await self.outcome(password=None) is UnauthorizedLogin
        assert await self.outcome("cp1") is UnknownIdentity
        assert await self.outcome("CP2", None) is UnknownIdentity

    async def test_a_password_is_raw_bytes(self):
        set_password(self.path, "AL1000", RAW_PASSWORD)
        assert await self.outcome("AL1000", RAW_PASSWORD) == b"AL1000"
        assert await self.outcome("AL1000", RAW_PASSWORD[:1]) is UnauthorizedLogin
        assert await self.outcome("AL1000", b"") is UnauthorizedLogin

    async def test_a_percent_encoded_identity(self):
        set_password(self.path, "a:b%c", b"secret")
        assert "\na%3Ab%25c:$argon2id$" in self.path.read_text(encoding="utf-8")
        assert await self.outcome("a:b%c") == b"a:b%c"
        assert await self.outcome("a%3Ab%25c") is UnknownIdentity

    async def test_a_changed_password_takes_effect_on_the_next_connection(self):
        set_password(self.path, "CP1", b"new")
        assert await self.outcome() is UnauthorizedLogin  # security whitepaper, A01.FR.03
        assert await self.outcome(password=b"new") == b"CP1"
        self.path.write_text("# empty\n", encoding="utf-8")
        assert await self.outcome(password=b"new") is UnknownIdentity

    async def test_a_broken_file_leaves_the_last_good_one_in_force_and_is_told_once(self):
        with capturedLogs() as events:
            self.path.write_text("CP1:secret\n", encoding="utf-8")
            assert await self.outcome() == b"CP1"
            assert await self.outcome() == b"CP1"
        errors = [str(event["error"]) for event in events if event["log_level"] == LogLevel.error]
        assert len(errors) == 1
        assert "line 1: must be IDENTITY:HASH" in errors[0]

    async def test_a_file_that_has_gone_leaves_the_last_one_in_force_until_it_is_back(self):
        with capturedLogs() as events:
            self.path.unlink()
            assert await self.outcome() == b"CP1"
            assert await self.outcome() == b"CP1"
        assert len([event for event in events if event["log_level"] == LogLevel.error]) == 1
        set_password(self.path, "CP2", b"secret")
        assert await self.outcome("CP2") == b"CP2"
        assert await self.outcome() is UnknownIdentity

    async def test_a_hash_that_argon2_cannot_use_lets_nobody_in(self):
        self.path.write_text(f"CP1:{re.sub('m=[0-9]+', 'm=1', HASH)}\n", encoding="utf-8")
        assert await self.outcome() is UnauthorizedLogin

    def test_a_gateway_does_not_start_without_its_password_file(self):
        with pytest.raises(PasswordFileError):
            PasswordFile(self.path.with_name("none"))


def test_no_more_logins_wait_than_can_be_served(path, monkeypatch):
    """More than that are told to come again, and who has gone is not worked for."""
    path.write_text(f"CP1:{HASH}\n", encoding="utf-8")
    checker = PasswordFile(path)
    wrong = credentials(password=b"wrong")
    monkeypatch.setattr("ocppgw.auth.deferToThread", lambda function: Deferred())
    waiting = [checker.requestAvatarId(wrong) for _ in range(MAX_VERIFYING)]
    failures = []
    checker.requestAvatarId(wrong).addErrback(failures.append)
    assert [failure.type for failure in failures] == [BackendAway]
    waiting[0].addErrback(lambda failure: failure.trap(CancelledError))
    waiting[0].cancel()
    checker.requestAvatarId(wrong).addErrback(failures.append)
    assert len(failures) == 1
