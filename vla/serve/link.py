"""One websocket to the server, driven by one thread that also has other things to wait for.

websockets.sync would take a second thread, and hold a lock in a send that a stopped server never
finishes. Here the protocol is theirs and the socket is ours: nothing waits after the handshake.
"""

from __future__ import annotations

import socket
import ssl
import time
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from vla.checks import require
from vla.serve.access import is_loopback
from vla.serve.wire import MAX_BYTES

READ, READS = 2**16, 64  # bytes a read, reads in a row


class LinkError(ConnectionError):
    """The connection could not be made, or is over: one line for the operator."""


def require_url(url: str) -> None:
    """Raise ConfigError for what is no server's address, or would send a token in the clear."""
    parts = urlsplit(url)
    try:
        fits = bool(parts.path if parts.scheme == "unix" else parts.hostname and parts.port != 0)
    except ValueError:  # a port that is no number
        fits = False
    require(
        parts.scheme in ("ws", "wss", "unix") and fits, "url", url,
        "ws://127.0.0.1:8765, wss://host:port or unix:///path",
    )  # fmt: skip
    require(
        parts.scheme != "ws" or is_loopback(parts.hostname or ""), "url", url,
        "wss:// for another machine: pictures and token would travel in the clear",
        "serve with TLS, or come through ssh -L to 127.0.0.1",
    )  # fmt: skip


class Link:
    """Connects on construction, within timeout_s. Raises LinkError then, and from send and receive
    when the connection is over; any message must be one binary frame.
    """

    def __init__(self, url: str, token: str | None, context: ssl.SSLContext | None, timeout_s: float) -> None:
        self.url, self.deadline = url, time.monotonic() + timeout_s
        self.outgoing = bytearray()  # what the socket did not take yet
        self.early: list[Frame] = []  # what came in one piece with the answer to the handshake
        self.over = ""  # why nothing will come any more
        self.socket: socket.socket | None = None
        try:
            self.socket = self._connect(context, timeout_s)
            self._shake_hands(token)
            self.socket.setblocking(False)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError) and not isinstance(error, LinkError):
                raise LinkError(refusal(url, error)) from None
            raise

    def _connect(self, context: ssl.SSLContext | None, timeout_s: float) -> socket.socket:
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            plain.settimeout(timeout_s)
            self.socket = plain  # so that it is closed when the next line raises
            # Room for two pictures at once: the usual 200 kB costs a message of 300 kB two more wake-ups.
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_BYTES)
            plain.connect(parts.path)
            return plain
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        plain = socket.create_connection((parts.hostname or "", port), timeout_s)
        self.socket = plain
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if parts.scheme == "ws":
            return plain
        assert context is not None
        return context.wrap_socket(plain, server_hostname=parts.hostname)

    def _shake_hands(self, token: str | None) -> None:
        assert self.socket is not None
        url = "ws://localhost/" if self.url.startswith("unix:") else self.url
        self.protocol = ClientProtocol(parse_uri(url), max_size=MAX_BYTES)
        request = self.protocol.connect()
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        self.protocol.send_request(request)
        self.socket.sendall(b"".join(self.protocol.data_to_send()))
        while self.protocol.state is State.CONNECTING:
            self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
            if time.monotonic() > self.deadline:  # one byte at a time would reset the socket's own timeout
                raise TimeoutError("the handshake took too long")
            data = self.socket.recv(READ)
            self.protocol.receive_data(data) if data else self.protocol.receive_eof()
            self.early += [event for event in self.protocol.events_received() if isinstance(event, Frame)]
            if (error := self.protocol.handshake_exc) is not None:
                raise LinkError(refusal(self.url, error))
            if not data:
                raise EOFError("it closed the connection")

    def fileno(self) -> int:
        assert self.socket is not None
        return self.socket.fileno()

    def send(self, data: bytes) -> None:
        """Queue a message and send what the socket takes now; the rest goes with `flush`."""
        self.protocol.send_binary(data)
        self.flush()

    def flush(self) -> None:
        """Send what is waiting, as far as the socket takes it."""
        assert self.socket is not None
        for data in self.protocol.data_to_send():
            self.outgoing += data
        sent = 0
        try:
            with memoryview(self.outgoing) as view:
                while sent < len(view):
                    sent += self.socket.send(view[sent:])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            raise LinkError(refusal(self.url, error)) from None
        finally:
            del self.outgoing[:sent]

    def receive(self) -> list[bytes]:
        """The messages that arrived, possibly none; pings are answered."""
        assert self.socket is not None
        frames, self.early = self.early, []
        for _ in range(READS):  # a flood must not keep the caller from its other work
            if self.over or self.protocol.state is not State.OPEN:
                break
            try:
                data = self.socket.recv(READ)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                self.over = str(error)
                break
            self.protocol.receive_data(data) if data else self.protocol.receive_eof()
            frames += [event for event in self.protocol.events_received() if isinstance(event, Frame)]
        messages = [bytes(frame.data) for frame in frames if frame.opcode is Opcode.BINARY and frame.fin]
        if any(frame.opcode in (Opcode.TEXT, Opcode.CONT) or not frame.fin for frame in frames):
            self.over = "a message that is not one binary frame"
        elif self.protocol.state is not State.OPEN:
            self.over = self.over or str(self.protocol.parser_exc or "it closed the connection")
        if self.over and not messages:  # those that came before the end still count
            raise LinkError(refusal(self.url, self.over))
        if not self.over:
            self.flush()
        return messages

    def close(self) -> None:
        """At once, without a farewell: a server that does not read would not hear it."""
        if self.socket is not None:
            self.socket.close()


def refusal(url: str, error: BaseException | str) -> str:
    """One line: what was got, what was expected, what to do."""
    got, remedy = str(error) or type(error).__name__, "start it (scripts/serve.py), or correct the address"
    if isinstance(error, InvalidStatus):
        got = f"HTTP status {error.response.status_code}"
        if error.response.status_code == 401:
            remedy = "give the client the server's token"
    elif isinstance(error, ssl.SSLCertVerificationError):
        remedy = "name the authority that signed the server's certificate (ca), or correct the host's name"
    return f"policy server: got {got}, expected an answer from {url}. remedy: {remedy}."
