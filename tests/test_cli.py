"""The operator's commands: what a script reads from standard output, and how they end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from ocppgw import __version__
from ocppgw.auth import read_password_file
from ocppgw.cli import main


def test_passwd_prints_the_key_and_nothing_else_on_standard_output(tmp_path, capsys):
    path = tmp_path / "passwd"
    assert main(["passwd", str(path), "CP1"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"[A-Za-z0-9]{20}\n", printed.out)
    key = printed.out.strip()
    assert printed.err == f"{path}: 'CP1' has a new key; it is shown once, here\n"
    assert key not in path.read_text(encoding="utf-8")
    assert PasswordHasher().verify(read_password_file(path)[b"CP1"], key)
    assert path.stat().st_mode & 0o777 == 0o600


def test_passwd_takes_the_identity_as_it_is(tmp_path, capsys):
    path = tmp_path / "passwd"
    for identity in ("a:b%3A", "-x", "é #"):
        assert main(["passwd", str(path), "--", identity]) == 0
    assert list(read_password_file(path)) == [b"a:b%3A", b"-x", "é #".encode()]
    assert len(capsys.readouterr().out.split()) == 3


def test_a_second_key_takes_the_place_of_the_first(tmp_path, capsys):
    path = tmp_path / "passwd"
    for _ in range(2):
        assert main(["passwd", str(path), "CP1"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first != second
    assert PasswordHasher().verify(read_password_file(path)[b"CP1"], second)


@pytest.mark.parametrize(
    ("identity", "problem"),
    [("", "an identity has at least one character"), ("\udcff", "'\\udcff' is not UTF-8")],
)
def test_an_identity_that_cannot_be_is_refused(tmp_path, capsys, identity, problem):
    assert main(["passwd", str(tmp_path / "passwd"), identity]) == 1
    assert capsys.readouterr() == ("", f"ocppgw: {problem}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_be_kept_is_not_shown(tmp_path, capsys):
    path = tmp_path / "none" / "passwd"
    assert main(["passwd", str(path), "CP1"]) == 1
    assert capsys.readouterr() == ("", f"ocppgw: {path}: cannot be written: No such file or directory\n")
    path = tmp_path / "passwd"
    path.write_text("CP1:secret\n", encoding="utf-8")
    assert main(["passwd", str(path), "CP1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"ocppgw: {path}: line 1: must be IDENTITY:HASH")


def test_check_says_that_settings_are_good(tmp_path, capsys):
    file = tmp_path / "ocppgw.toml"
    file.write_text('node = "gw-1"\n', encoding="utf-8")
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr() == ("", f"{file}: the settings are good\n")


def test_check_names_keys_of_emqx_that_are_not_used(tmp_path, capsys):
    file = tmp_path / "emqx_ocpp.conf"
    file.write_text("ocpp.json_schema_id_prefix = urn:OCPP\n", encoding="utf-8")
    assert main(["check", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"{file}: not used here: ocpp.json_schema_id_prefix",
        f"{file}: the settings are good",
    ]


def test_check_says_in_one_line_what_is_wrong(tmp_path, capsys):
    file = tmp_path / "ocppgw.toml"
    file.write_text("[upstream]\nqos = 2\n", encoding="utf-8")
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr() == ("", f"ocppgw: {file}: upstream.qos = 2: must be a whole number from 0 to 1\n")


@pytest.mark.parametrize("arguments", [[], ["check"], ["passwd", "file"], ["nothing"], ["check", "a", "b"]])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ocppgw {__version__}\n"


def test_the_exit_status_reaches_the_shell(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "ocppgw.cli", "check", tmp_path / "none.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"ocppgw: {tmp_path / 'none.toml'}: cannot be read: No such file or directory\n"
