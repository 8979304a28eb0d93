"""A bad network between client and server: delays, drops, duplicates, reorders and flips bits in messages.

    with Proxy(server.url, delay_s=0.1) as proxy:
        client = Client(proxy.url)
        proxy.drop = 0.5  # everything can be changed while it runs

Runs in a thread of its own. What it does follows from `seed` and the messages' order. It leaves a
connection's first answer, the Hello, alone, so that a client can arrive.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import connect, unix_connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake

OPTIONS: dict[str, Any] = dict(compression=None, max_size=2**24, close_timeout=0.2)


class Proxy:
    """drop, duplicate, reorder, flip: the share of messages it happens to; delay_s: of every message.

    asks: whether it happens to the client's messages as well as to the server's; counts: what it did.
    """

    def __init__(
        self, target: str, delay_s: float = 0.0, drop: float = 0.0, duplicate: float = 0.0,
        reorder: float = 0.0, flip: float = 0.0, asks: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.target, self.delay_s, self.asks = target, delay_s, asks
        self.drop, self.duplicate, self.reorder, self.flip = drop, duplicate, reorder, flip
        self.random, self.counts = random.Random(seed), Counter[str]()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with serve(self._carry, "127.0.0.1", 0, **OPTIONS) as server:
            self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            self._ready.set()
            await self._stop.wait()

    async def _carry(self, client: ServerConnection) -> None:
        """One connection, until either end closes."""
        parts = urlsplit(self.target)
        connecting = (
            unix_connect(parts.path, **OPTIONS)
            if parts.scheme == "unix"
            else connect(self.target, proxy=None, **OPTIONS)
        )
        try:
            async with connecting as server, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(client, server, tasks, is_ask=True))
                tasks.create_task(self._pump(server, client, tasks, is_ask=False))
        except* (ConnectionClosed, OSError, InvalidHandshake, TimeoutError):
            pass

    async def _pump(self, source: Any, sink: Any, tasks: asyncio.TaskGroup, is_ask: bool) -> None:
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        tasks.create_task(self._deliver(due, sink))
        if not is_ask:
            await sink.send(await source.recv())
        held: bytes | None = None
        while True:
            data = await source.recv()
            when = time.monotonic() + self.delay_s
            if is_ask and not self.asks:
                due.put_nowait((when, data))
                continue
            if self._happens("drop", self.drop):
                continue
            if self._happens("flip", self.flip):
                data = flipped(data, self.random)
            if held is None and self._happens("reorder", self.reorder):
                held = data  # goes after the next one
                continue
            copies = 2 if self._happens("duplicate", self.duplicate) else 1
            for item in [data] * copies + ([held] if held is not None else []):
                due.put_nowait((when, item))
            held = None

    async def _deliver(self, due: asyncio.Queue[tuple[float, bytes]], sink: Any) -> None:
        while True:
            when, data = await due.get()
            await asyncio.sleep(when - time.monotonic())
            await sink.send(data)
            self.counts["passed"] += 1

    def _happens(self, what: str, share: float) -> bool:
        happens = self.random.random() < share
        self.counts[what] += happens
        return happens


def flipped(data: bytes, source: random.Random) -> bytes:
    """The same with one bit turned."""
    copy = bytearray(data)
    copy[source.randrange(len(copy))] ^= 1 << source.randrange(8)
    return bytes(copy)
