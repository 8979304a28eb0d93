"""Stub servers and clients for tests: processes that can be killed and stopped, ended whatever happens."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.server import ServerConnection, serve

from vla.serve.client import Client, Reply

STUB = (sys.executable, str(Path(__file__).with_name("stub_server.py")))
PATIENCE_S = 30  # for a busy machine; what is waited for takes milliseconds


def wait_until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What the condition returned when it was first true."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"nothing happened within {timeout_s} s"
        time.sleep(0.005)
    return result


class StubServer:
    """A server process; url once it is ready; output: its ready line."""

    program = STUB

    def __init__(self, *options: str, name: str = "stub", env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*self.program, name, *options], stdout=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.readline()
        assert self.output.startswith("ready: "), f"no server: {self.output!r}"
        self.url = self.output.split()[1]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGKILL) -> int:
        """End it if it is alive; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(PATIENCE_S)


@contextmanager
def stub_server(*options: str, name: str = "stub", env: dict[str, str] | None = None) -> Iterator[StubServer]:
    server = StubServer(*options, name=name, env=env)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def connected(url: str, **options: Any) -> Iterator[Client]:
    with Client(url, **options) as client:
        wait_until(lambda: client.connected)
        yield client


def observation(seq: int, task: str = "pick", value: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Arguments of Client.ask that fit the stub."""
    images = {name: np.full((1, 32, 32, 3), seq % 256, np.uint8) for name in ("front", "wrist")}
    state = np.full((1, 7), value, np.float32)
    return (
        dict(
            episode=1,
            seq=seq,
            captured_ns=time.monotonic_ns(),
            start=seq,
            task=task,
            images=images,
            state=state,
        )
        | changes
    )


def replies(client: Client, n: int = 1) -> list[Reply]:
    """The next n of them."""
    got: list[Reply] = []
    wait_until(lambda: len(got.extend(client.poll()) or got) >= n)
    return got


def answer(client: Client, seq: int, **changes: Any) -> Reply:
    """Ask, and wait for the one reply."""
    client.ask(**observation(seq, **changes))
    (reply,) = replies(client)
    assert reply.seq == seq
    return reply


@contextmanager
def fake_server(talk: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A server whose every connection runs `talk`, whatever that says; its url."""
    logger = logging.getLogger("tests.fake")
    logger.setLevel(logging.CRITICAL)  # tests close connections in the middle
    with serve(talk, "127.0.0.1", 0, compression=None, logger=logger, close_timeout=0.2) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)
