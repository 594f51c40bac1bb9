"""The operator's commands: ``ocppgw check FILE`` and ``ocppgw passwd FILE CID``.

What a script needs is on standard output, everything else on standard error. Exit status: 0 done, 1 refused, 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ocppgw import __version__
from ocppgw.auth import PasswordFileError, make_key, set_password
from ocppgw.config import load
from ocppgw.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives back the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (SettingsError, PasswordFileError) as error:
        print(f"ocppgw: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ocppgw", description="Commands for operators of an ocppgw gateway.")
    parser.add_argument("--version", action="version", version=f"ocppgw {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    check = commands.add_parser("check", help="check a settings file without starting")
    check.add_argument("file", metavar="FILE", help="TOML, or EMQX 4.4's emqx_ocpp.conf")
    check.set_defaults(run=_check)

    passwd = commands.add_parser("passwd", help="give a charge point a new random key")
    passwd.add_argument("file", metavar="FILE", type=Path, help="the file of --auth htpasswd:FILE; made if missing")
    passwd.add_argument("cid", metavar="CID", help="the charge point's identity, as it is, not percent-encoded")
    passwd.set_defaults(run=_passwd)
    return parser


def _check(options: argparse.Namespace) -> int:
    settings = load(options.file)
    for notice in settings.notices:
        print(notice, file=sys.stderr)  # noqa: T201
    print(f"{options.file}: the settings are good", file=sys.stderr)  # noqa: T201
    return 0


def _passwd(options: argparse.Namespace) -> int:
    if not options.cid:
        print("ocppgw: an identity has at least one character", file=sys.stderr)  # noqa: T201
        return 1
    key = make_key()
    set_password(options.file, options.cid, key.encode("ascii"))
    print(f"{options.file}: {options.cid!r} has a new key; it is shown once, here", file=sys.stderr)  # noqa: T201
    print(key)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
