"""Real processes for end-to-end tests: brokers, the gateway, charge points that are not ours.

A test waits for what a process prints, always with a limit. Whatever goes wrong while a process runs in a `with`
statement, a wait that fails or an assertion of the test, is reported together with all that the process printed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import pytest

START_LIMIT = 30.0
"""Seconds that a process may take to start; ten times what a loaded machine was seen to need."""


class Process:
    """A running program and what it has printed so far, standard output and error together.

    port: where it listens, for those who start it to know; 0 for a program that does not listen.
    cwd: a directory of its own when None, gone when the process is.
    env: added to our own environment.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        port: int = 0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.argv = [str(part) for part in argv]
        self.port = port
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._stopped = False
        self._scratch = None if cwd else tempfile.TemporaryDirectory(prefix="ocppgw-test-")
        self._popen = subprocess.Popen(
            self.argv,
            cwd=cwd or self._scratch.name,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name=f"reader of {self.argv[0]}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()
        if error is not None and " ".join(self.argv) not in str(error):
            error.add_note(self.report())

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -15 for SIGTERM and so on; None while it runs."""
        return self._popen.poll()

    def wait_for(self, pattern: str, timeout: float = 10.0, *, after: int = 0) -> re.Match[str]:
        """Wait until a line matches (`re.search`) and return the match.

        after: how many lines to pass over, for what is printed more than once: take `len(process.lines)` before.
        Fails after `timeout` seconds, and at once when the process ends without such a line.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout
        seen = after
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if match := wanted.search(line):
                        return match
                seen = max(after, len(self.lines))
                if self._ended:
                    reason = "has ended"
                    break
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    reason = f"has not in {timeout} s"
                    break
        if self._ended:
            self._popen.wait(5)  # for the status in the report
        raise AssertionError(f"waiting for {pattern!r} to be printed, the process {reason}:\n{self.report()}")

    def wait_exit(self, timeout: float = 10.0) -> int:
        """Wait until the process ends by itself and return its exit status."""
        try:
            status = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.report()}") from None
        self._close()
        return status

    def stop(self, limit: float = 15.0) -> int:
        """End it by SIGTERM, `limit` seconds later by SIGKILL, and return the exit status: -9 if it came to that."""
        self._stopped = self._stopped or self.returncode is None
        self._popen.terminate()
        try:
            self._popen.wait(limit)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(5)
        self._close()
        return self._popen.returncode

    def kill(self) -> None:
        """End it without a chance to clean up, as a crash does."""
        self._stopped = self._stopped or self.returncode is None
        self._popen.kill()
        self._popen.wait(5)
        self._close()

    def report(self) -> str:
        """The command, its state, and all that it printed, very long lines cut short."""
        state = "running" if self.returncode is None else f"exit status {self.returncode}"
        if self._stopped:
            state = f"ended by the test, {state}"
        with self._changed:
            printed = [line[:1000] for line in self.lines]
        return "\n".join([f"--- {' '.join(self.argv)} ({state}) printed:", *printed, "---"])

    def _read(self) -> None:
        for line in self._popen.stdout or ():
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _close(self) -> None:
        # A grandchild may hold the pipe open for longer: then the reader, a daemon thread, is left to it.
        self._reader.join(2)
        if not self._reader.is_alive() and self._popen.stdout is not None:
            self._popen.stdout.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def unavailable(reason: str) -> NoReturn:
    """Skip the test for want of something on this machine; in continuous integration that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to provide for it: {reason}")
    pytest.skip(reason)


def require(program: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails where CI=true."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
    path = shutil.which(program, path=places)
    return path if path is not None else unavailable(f"{program} is not installed")


def mosquitto(tmp_path: Path, *extra_config_lines: str, port: int | None = None) -> Process:
    """Start a mosquitto on 127.0.0.1 that lets anybody in and forgets everything, but for what the extra lines say."""
    program = require("mosquitto")
    port = port or free_port()
    config = [f"listener {port} 127.0.0.1", "persistence false", *extra_config_lines]
    if os.geteuid() == 0:
        config.append("user root")  # or it changes to an account that cannot read files below tmp_path
    if not any(line.startswith("allow_anonymous") for line in extra_config_lines):
        config.append("allow_anonymous true")
    file = tmp_path / f"mosquitto-{port}.conf"
    file.write_text("\n".join([*config, ""]), encoding="utf-8")
    return _started(Process([program, "-c", file], port=port), r"mosquitto version \S+ running")


def gateway(
    *arguments: str, env: Mapping[str, str] | None = None, program: Sequence[str] = ("twistd", "-n", "--pidfile=")
) -> Process:
    """Start the gateway that the tests import, with the arguments of `twistd ocppgw`; it may not be ready yet.

    It prints `charge points connect to ws://...` for each listener, and `connected to broker ...` when it is there.
    program: what runs the plugin.
    """
    return Process([*script(*program), "ocppgw", *arguments], env={**import_path(), **(env or {})})


def script(name: str, *arguments: str) -> list[str]:
    """Return the command line of a console script that was installed for this Python."""
    path = Path(sysconfig.get_path("scripts"), name)
    return [str(path if path.exists() else Path(sys.executable).with_name(name)), *arguments]


def import_path() -> dict[str, str]:
    """Return what a process needs in its environment to import the package that the tests import."""
    spec = importlib.util.find_spec("ocppgw")
    assert spec is not None, "the package ocppgw is not importable: install it, or run `python -m pytest` at its root"
    assert spec.origin is not None
    path = os.pathsep.join([str(Path(spec.origin).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path}


def _started(process: Process, pattern: str) -> Process:
    try:
        process.wait_for(pattern, START_LIMIT)
    except BaseException:
        process.stop()
        raise
    return process
