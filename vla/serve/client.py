"""The controller's link to the policy server: hand over an observation, look later what came of it.

Everything the control loop calls returns at once. A daemon thread builds the messages, talks, and
reconnects for ever. An Ask lives no longer than its connection: after a break, only what was seen
since counts. Imports neither torch nor timm.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla.checks import require
from vla.serve.link import Link, LinkError, require_url
from vla.serve.memory import keep_memory
from vla.serve.wire import (
    VERSION,
    Ask,
    Beat,
    Chunk,
    Hello,
    Refusal,
    WireError,
    decode,
    encode,
    fit_chunk,
    make_ask,
    version_of,
)

BACKOFF_S = (0.05, 1.0)  # the first wait before a new attempt, and the longest
log = logging.getLogger("vla.serve")


@dataclass(frozen=True)
class Reply:
    """What became of Ask number seq. chunk: actions (H, A) float32 in robot units, of the model that hello
    describes; refused: by the server, or because the answer was wrong; lost: no answer will come.

    received: time.monotonic() in seconds; inference_ns: how long the policy took.
    """

    kind: Literal["chunk", "refused", "lost"]
    seq: int
    actions: np.ndarray | None
    reason: str
    hello: Hello | None
    received: float
    inference_ns: int = 0


class Client:
    """One request in flight, the newest observation waits; for one calling thread.

    hello: the server's, None while disconnected; changed: it is not what the first one was; heard:
    time.monotonic() when a valid message last came; error: why there is no connection;
    counts: sent, dropped (answers nobody waits for), superseded (observations by newer ones),
    refused, timeouts, reconnects.
    """

    def __init__(
        self, url: str, token: str | None = None, ca: str | None = None, reply_timeout_s: float = 2.0,
        connect_timeout_s: float = 1.0, jpeg_quality: int = 0,
    ) -> None:  # fmt: skip
        """ca: a file with the authority of a wss:// server's certificate, by default the system's.
        jpeg_quality: 1 … 95 compresses pictures, for slow links; 0 does not. Raises ConfigError.
        """
        require_url(url)
        require(
            jpeg_quality == 0 or importlib.util.find_spec("PIL") is not None, "jpeg_quality", jpeg_quality,
            "0 where pillow is not installed", "pip install pillow",
        )  # fmt: skip
        self.url, self.token, self.jpeg_quality = url, token, jpeg_quality
        self.context = ssl.create_default_context(cafile=ca) if url.startswith("wss:") else None
        self.reply_timeout_s, self.connect_timeout_s = reply_timeout_s, connect_timeout_s
        self.hello: Hello | None = None
        self.changed, self.error, self.heard = False, None, -1.0
        self.error: str | None
        self.counts = dict.fromkeys(("sent", "dropped", "superseded", "refused", "timeouts", "reconnects"), 0)
        self._first: Hello | None = None
        self._asks: deque[dict[str, Any]] = deque(maxlen=1)  # appending and popping are atomic
        self._replies: deque[Reply] = deque()
        self._flight: Ask | None = None
        self._sent = 0.0  # when the one in flight went out
        self._closing = threading.Event()
        self._bell, self._wire = socket.socketpair()  # a byte wakes the thread
        self._bell.setblocking(False)
        self._wire.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="policy client", daemon=True)

    def start(self) -> None:
        """Begin to connect; returns at once."""
        keep_memory()
        self._thread.start()

    def close(self) -> None:
        """Stop; waits for the thread, which is done within connect_timeout_s."""
        self._closing.set()
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(self.connect_timeout_s + 5)
        if not self._thread.is_alive():
            self._bell.close()
            self._wire.close()

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        return self.hello is not None

    def ask(
        self, *, episode: int, seq: int, captured_ns: int, start: int, task: str,
        images: dict[str, np.ndarray], state: np.ndarray, prefix: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Ask for a chunk; arrays as in `make_ask`, not to be written to afterwards. seq counts upwards.

        Without a connection the answer is "lost" at once. One that still waits is replaced without a
        reply, and waits while another is in flight.
        """
        request = dict(
            episode=episode, seq=seq, captured_ns=captured_ns, start=start, task=task, images=images,
            state=state, prefix=prefix,
        )  # fmt: skip
        if self.hello is None:
            return self._reply("lost", seq, "not connected")
        if self._asks:
            self.counts["superseded"] += 1
        self._asks.append(request)
        self._ring()

    def poll(self) -> list[Reply]:
        """Every reply since the last call."""
        replies = []
        while self._replies:
            replies.append(self._replies.popleft())
        return replies

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody is there
            self._bell.send(b"!")

    def _reply(
        self, kind: Any, seq: int, reason: str = "", actions: np.ndarray | None = None, took: int = 0
    ) -> None:
        self._replies.append(Reply(kind, seq, actions, reason, self.hello, time.monotonic(), took))

    # --- what follows runs in the thread ---

    def _run(self) -> None:
        wait = BACKOFF_S[0]
        while not self._closing.is_set():
            link = None
            try:
                link = Link(self.url, self.token, self.context, self.connect_timeout_s)
                self._converse(link)
            except (LinkError, WireError) as error:
                self.error = str(error)
            except Exception as error:  # whatever it is, the controller needs its link back
                log.exception("the link to the policy server failed")
                self.error = f"{type(error).__name__}: {error}"
            finally:
                if link is not None:
                    link.close()
            if self.hello is not None:
                wait = BACKOFF_S[0]  # it was a good connection
            self._lose(self.error or "closed")
            self._closing.wait(wait)
            wait = min(2 * wait, BACKOFF_S[1])

    def _lose(self, reason: str) -> None:
        """The connection is over, and with it whatever was asked through it."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._reply("lost", flight.seq, reason)
        self.hello = None
        while self._asks:
            self._reply("lost", self._asks.popleft()["seq"], reason)

    def _converse(self, link: Link) -> None:
        """Until the connection ends, which raises LinkError or WireError, or until close()."""
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire, selectors.EVENT_READ)
            selector.register(link, selectors.EVENT_READ)
            writing = False
            while not self._closing.is_set():
                for data in link.receive():
                    self._heard(data)
                if self.hello is not None and self._flight is None and self._asks:
                    self._send(link)
                if writing != bool(link.outgoing):
                    writing = not writing
                    selector.modify(link, selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0))
                since = max(began, self.heard)  # silent, or longer without the answer
                if self._flight is not None:
                    since = min(since, self._sent)
                rest = since + self.reply_timeout_s - time.monotonic()
                if rest <= 0:
                    self.counts["timeouts"] += 1
                    raise LinkError(
                        f"policy server: got nothing for {self.reply_timeout_s} s, expected an answer from "
                        f"{self.url}. remedy: see that it runs and is fast enough."
                    )
                for key, events in selector.select(rest):
                    if key.fileobj is self._wire:
                        self._wire.recv(4096)
                    elif events & selectors.EVENT_WRITE:
                        link.flush()

    def _send(self, link: Link) -> None:
        request = self._asks.popleft()
        try:
            ask = make_ask(**request, jpeg_quality=self.jpeg_quality)
            data = encode(ask)
        except Exception as error:  # the observation's fault, not the link's
            return self._refuse(request["seq"], f"{type(error).__name__}: {error}")
        self._flight, self._sent = ask, time.monotonic()
        self.counts["sent"] += 1
        link.send(data)

    def _refuse(self, seq: int, reason: str) -> None:
        self.counts["refused"] += 1
        self._reply("refused", seq, reason)

    def _heard(self, data: bytes) -> None:
        if self.hello is None:
            return self._meet(data)
        try:
            message = decode(data, Chunk, Refusal, Beat)
        except WireError as error:  # it may have been the answer: asking again is better than waiting
            return self._settle(str(error))
        self.heard = time.monotonic()
        flight = self._flight
        if isinstance(message, Beat):
            return
        if isinstance(message, Refusal):
            if flight is not None and message.obs_seq in (flight.seq, -1):
                return self._settle(message.reason)
        elif flight is not None and answers(message, flight):
            try:
                actions = fit_chunk(message, self.hello)
            except WireError as error:
                return self._settle(str(error))
            self._flight = None
            return self._reply("chunk", flight.seq, "", actions, message.inference_ns)
        self.counts["dropped"] += 1

    def _settle(self, reason: str) -> None:
        """The one in flight gets no chunk; when there is none, what came was for nobody."""
        flight, self._flight = self._flight, None
        if flight is None:
            self.counts["dropped"] += 1
        else:
            self._refuse(flight.seq, reason)

    def _meet(self, data: bytes) -> None:
        """The first message of a connection. Raises WireError unless it is a Hello of this version."""
        version = version_of(data)
        if version is not None and version != VERSION:
            raise WireError(
                f"version: got {version}, expected {VERSION}. remedy: run the same version of vla on both sides."
            )
        hello = decode(data, Hello)
        if self._first is None:
            self._first = hello
        else:
            self.counts["reconnects"] += 1
        while self._asks:  # from before the break
            self._reply("lost", self._asks.popleft()["seq"], "not connected")
        self.changed, self.error, self.heard, self.hello = hello != self._first, None, time.monotonic(), hello


def answers(chunk: Chunk, ask: Ask) -> bool:
    """Whether everything that came back is what was sent: seq alone could be another episode's."""
    sent = (ask.episode, ask.seq, ask.captured_ns, ask.start)
    return (chunk.episode, chunk.obs_seq, chunk.captured_ns, chunk.start) == sent
