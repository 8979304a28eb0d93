"""A policy server of one's own: a process that lives exactly as long as its owner."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


class LocalServer:
    """Starts a server behind a Unix socket that only this user can reach, and ends it on exit.

    command: a program that takes `--unix=PATH --with-parent`, by default `python -m vla.serve`;
    arguments: its others, the checkpoint first. url: for a Client. The server's standard input is a
    pipe from here: it closes when this process dies, of whatever, and the server goes too.
    """

    def __init__(
        self, arguments: Sequence[str], command: Sequence[str] = (sys.executable, "-m", "vla.serve"),
        timeout_s: float = 120.0,
    ) -> None:  # fmt: skip
        """timeout_s: until it is ready, with its network loaded and warm."""
        self.command, self.timeout_s = [*command, *arguments], timeout_s
        self.url, self.process = "", None
        self.process: subprocess.Popen[bytes] | None

    def __enter__(self) -> LocalServer:
        """Raises ConnectionError when the server ends, or is not ready in time; it says itself why."""
        self.folder = tempfile.TemporaryDirectory(prefix="vla-")  # mode 0700
        path = Path(self.folder.name) / "policy"
        try:
            self.process = subprocess.Popen(
                [*self.command, f"--unix={path}", "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=2,  # what it says is for whoever watches, not part of what its owner prints
                start_new_session=True,
            )  # a session of its own: Ctrl-C is for the owner, who then ends the server in order
            self._wait(path)
        except BaseException:
            self.__exit__()
            raise
        self.url = f"unix://{path}"
        return self

    def _wait(self, path: Path) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.timeout_s
        while (code := self.process.poll()) is None and time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    return
            time.sleep(0.02)
        got = f"nothing within {self.timeout_s:g} s" if code is None else f"exit code {code}"
        raise ConnectionError(
            f"policy server: got {got}, expected one that is ready. remedy: see its own message above."
        )

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:  # stopped, or stuck in an inference
                self.process.kill()
                self.process.wait()
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.folder.cleanup()
