"""The policy server: one thread runs the network, an event loop talks, so that it always answers.

A client's newest Ask waits for its turn; one that comes while another waits supersedes it. Clients
take turns. Nothing of a client is remembered between its messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from websockets.asyncio.server import ServerConnection, serve, unix_serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from vla.observation import Features
from vla.serve.access import Access, unix_socket
from vla.serve.memory import keep_memory
from vla.serve.wire import (
    MAX_BYTES,
    VERSION,
    AnyMessage,
    Ask,
    Beat,
    Chunk,
    Hello,
    Refusal,
    WireError,
    decode,
    encode,
    first_line,
    fit_ask,
    pack_floats,
)

BEAT_S = 0.05
WARM_UPS = 5  # a GPU runs three for real, captures the fourth and replays it (vla/captured.py)
log = logging.getLogger("vla.serve")
# A stranger's broken handshake is not worth a traceback: what matters is logged here.
quiet = logging.getLogger("vla.serve.websockets")
quiet.setLevel(logging.CRITICAL)


class ServedPolicy(Protocol):
    """What a server needs of a policy; see vla.policy.Policy.predict_chunk for the shapes."""

    @property
    def features(self) -> Features: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def max_prefix(self) -> int: ...
    @property
    def model_sha256(self) -> str: ...

    def predict_chunk(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None = None,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray: ...


class Visit:
    """One client's connection: its newest Ask waits here for the policy's turn."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.waiting: Ask | None = None
        self.arrived = asyncio.Event()

    async def send(self, message: AnyMessage) -> None:
        await self.connection.send(encode(message))


class PolicyServer:
    """A policy behind a websocket. hello: what every client is told first."""

    def __init__(self, policy: ServedPolicy, access: Access) -> None:
        features = policy.features
        self.policy, self.access = policy, access
        self.hello = Hello(
            VERSION, policy.model_sha256, dict(features.cameras), features.state_dim, features.action_dim,
            features.fps, policy.chunk_size, policy.n_obs_steps, policy.max_prefix,
        )  # fmt: skip
        decode(encode(self.hello), Hello)  # a policy that the wire cannot carry fails here, not at a client's
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self.turn = asyncio.Lock()  # wakes waiters in the order they came: clients take turns
        self.busy = False
        self.requests = self.refused = 0
        self.durations: deque[int] = deque(maxlen=1000)  # ns of the newest inferences

    def warm_up(self) -> float:
        """A few predictions on black pictures, so that no client waits for a compiler; milliseconds taken."""
        began, hello = time.monotonic(), self.hello
        images = {
            name: np.zeros((hello.n_obs_steps, *size, 3), np.uint8) for name, size in hello.cameras.items()
        }
        state = np.zeros((hello.n_obs_steps, hello.state_dim), np.float32)
        for d in {0, hello.max_prefix}:
            prefix = np.zeros((d, hello.action_dim), np.float32)
            for _ in range(WARM_UPS):
                self.thread.submit(self.predict, images, state, "warm up", prefix).result()
        return 1000 * (time.monotonic() - began)

    def predict(
        self, images: dict[str, np.ndarray], state: np.ndarray, task: str, prefix: np.ndarray
    ) -> np.ndarray:
        """Images camera -> (T, h, w, 3), state (T, P), prefix (d, A) -> (H, A), as the policy gives it."""
        committed = length = None
        if len(prefix):
            committed = np.zeros((1, self.hello.chunk_size, self.hello.action_dim), np.float32)
            committed[0, : len(prefix)] = prefix
            length = np.array([len(prefix)])
        # Copies, because torch takes no read-only memory.
        batch = {name: image[None].copy() for name, image in images.items()}
        chunk = np.asarray(self.policy.predict_chunk(batch, state[None].copy(), [task], committed, length))
        if (got := chunk.shape) != (expected := (1, self.hello.chunk_size, self.hello.action_dim)):
            raise ValueError(f"the policy's actions: got {got}, expected {expected}")
        if not np.isfinite(chunk).all():
            raise ValueError("the policy's actions: got numbers that are not finite, expected finite ones")
        return chunk[0]

    def answer(self, ask: Ask) -> Chunk | Refusal:
        """Run the policy, in its thread. Whatever it raises becomes a Refusal."""
        self.busy = True
        try:
            images, state, prefix = fit_ask(ask, self.hello)
            began = time.monotonic_ns()
            actions = pack_floats(self.predict(images, state, ask.task, prefix))
            took = time.monotonic_ns() - began
            self.durations.append(took)
            return Chunk(
                ask.episode, ask.seq, ask.captured_ns, ask.start, self.hello.model, actions, took
            )  # which checks the actions again: float32 may not hold them
        except WireError as error:
            return Refusal(ask.seq, first_line(error))
        except Exception as error:
            log.exception("the policy failed on ask %d", ask.seq)
            return Refusal(ask.seq, first_line(f"{type(error).__name__}: {error}"))
        finally:
            self.busy = False

    async def talk(self, connection: ServerConnection) -> None:
        """One client, from Hello to its end."""
        visit = Visit(connection)
        try:
            await visit.send(self.hello)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.beat(visit))
                tasks.create_task(self.answer_asks(visit))
                tasks.create_task(self.read_asks(visit))
        except* ConnectionClosed:
            pass
        except* Exception:
            log.exception("a client's conversation failed")

    async def beat(self, visit: Visit) -> None:
        count = 0
        while True:
            await visit.send(Beat(count, self.busy))
            count += 1
            await asyncio.sleep(BEAT_S)

    async def read_asks(self, visit: Visit) -> None:
        while True:
            data = await visit.connection.recv()
            self.requests += 1
            try:
                ask = decode(data, Ask)
            except WireError as error:
                await self.refuse(visit, Refusal(-1, first_line(error)))
                continue
            older, visit.waiting = visit.waiting, ask
            visit.arrived.set()
            if older is not None:
                await self.refuse(visit, Refusal(older.seq, "superseded"))

    async def answer_asks(self, visit: Visit) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await visit.arrived.wait()
            async with self.turn:
                ask, visit.waiting = visit.waiting, None
                visit.arrived.clear()
                assert ask is not None
                answer = await loop.run_in_executor(self.thread, self.answer, ask)
            if isinstance(answer, Refusal):
                await self.refuse(visit, answer)
            else:
                await visit.send(answer)

    async def refuse(self, visit: Visit, refusal: Refusal) -> None:
        self.refused += 1
        await visit.send(refusal)

    def admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets a websocket in. With a token, nothing is told without it, not even /health."""
        if not self.access.admits(request.headers.get_all("Authorization")):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "send the token: Authorization: Bearer …\n")
        if request.path != "/health":
            return None
        response = connection.respond(HTTPStatus.OK, json.dumps(self.health()) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    def health(self) -> dict[str, object]:
        took = np.array(self.durations or [np.nan]) / 1e6
        median, p99 = (None if np.isnan(x) else round(float(x), 3) for x in np.quantile(took, [0.5, 0.99]))
        return {
            "ready": True,  # it listens only then
            "model": self.hello.model,
            "requests": self.requests,
            "refused": self.refused,
            "inference_ms": {"median": median, "p99": p99},
        }

    async def run(self, ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Listen until `stop`; ready(url) is called when clients can come."""
        options: dict[str, Any] = dict(
            process_request=self.admit, compression=None, max_size=MAX_BYTES, max_queue=4, logger=quiet,
            origins=[None],  # a browser's page always names its origin: none has any business here
            ping_interval=10, ping_timeout=10, close_timeout=1, server_header=None,
        )  # fmt: skip
        access, tls = self.access, self.access.tls()
        if access.unix:
            listening = unix_serve(self.talk, sock=unix_socket(access.unix), **options)
        else:
            listening = serve(self.talk, access.host, access.port, ssl=tls, **options)
        async with listening as server:
            try:
                port = access.port or next(iter(server.sockets)).getsockname()[1]
                host = f"[{access.host}]" if ":" in access.host else access.host
                url = f"{'wss' if tls else 'ws'}://{host}:{port}"
                ready(f"unix://{access.unix}" if access.unix else url)
                await stop.wait()
            finally:
                if access.unix:  # while it still listens: nobody else can have bound the path
                    Path(access.unix).unlink(missing_ok=True)
        self.thread.shutdown(wait=False, cancel_futures=True)


def serve_policy(
    policy: ServedPolicy, access: Access, ready: Callable[[str, float], None] = lambda url, warm_up_ms: None
) -> None:
    """Warm up, say ready(url, warm_up_ms), serve until SIGTERM or Ctrl-C. Call it from the main thread.

    Raises ConfigError or OSError when it cannot listen there.
    """
    keep_memory()
    server = PolicyServer(policy, access)
    warm_up_ms = server.warm_up()

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await server.run(lambda url: ready(url, warm_up_ms), stop)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
