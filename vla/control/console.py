"""Orders to a controller and its reports: messages over a socket between two processes of one machine.

Views (a terminal, a test, a teleoperation device, a bridge to other systems) are clients of the
controller: it never waits for them, and lives on when they die.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import msgspec

LARGEST = 2**16  # bytes of a message


class Order(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What a console may send."""


class Alive(Order, frozen=True):
    """Nothing, but somebody is watching."""


class Stop(Order, frozen=True):
    """Hold until `Resume`."""


class Resume(Order, frozen=True):
    """Leave STOPPED."""


class Reset(Order, frozen=True):
    """Leave FAULT: somebody has looked."""


class Instruct(Order, frozen=True):
    """Follow another instruction; an empty one holds."""

    task: str


class Intervene(Order, frozen=True):
    """An operator's action instead of the policy's; repeat it to go on driving."""

    action: list[float]


class Begin(Order, frozen=True):
    """A new scene of a simulated robot, without an instruction."""

    seed: int


class Quit(Order, frozen=True):
    """Stop and end the controller."""


Orders = Alive | Stop | Resume | Reset | Instruct | Intervene | Begin | Quit


class Status(msgspec.Struct, frozen=True):
    """What a controller reports some ten times a second. Times in ms, counts since the start."""

    time: float  # monotonic seconds
    tick: int
    state: str
    reason: str
    task: str
    episode: int
    steps: int
    counts: dict[str, int]
    lateness: dict[str, float]  # of the last seconds
    latency: dict[str, float]
    robot: dict[str, Any]  # what the robot reports, such as success
    recorder: str
    priority: str
    events: list[tuple[float, int, str, str, str]]  # new ones: time, tick, before, after, reason
    scene: dict[str, Any]  # of the last Begin: its instruction
    note: str = ""  # why the last order was not followed


class Channel:
    """One end of the socket. Nothing here waits, except `receive` with a timeout."""

    def __init__(self, end: socket.socket, incoming: Any) -> None:
        self.socket = end
        self.socket.setblocking(False)
        self.encode = msgspec.msgpack.Encoder(enc_hook=plain).encode
        self.decode = msgspec.msgpack.Decoder(incoming).decode
        self.lost = False

    def send(self, message: msgspec.Struct) -> bool:
        """Whether it could be handed over; a full or closed socket drops it."""
        try:
            self.socket.send(self.encode(message))
        except BlockingIOError:
            return False
        except OSError:
            self.lost = True
            return False
        return True

    def receive(self, timeout_s: float = 0.0) -> Sequence[Any]:
        """Everything that has come. Messages that are none are dropped."""
        messages = []
        self.socket.settimeout(timeout_s)
        while True:
            try:
                data = self.socket.recv(LARGEST)
            except (BlockingIOError, TimeoutError):
                break
            except OSError:
                data = b""
            if not data:
                self.lost = True
                break
            try:
                messages.append(self.decode(data))
            except msgspec.DecodeError:
                continue
            self.socket.setblocking(False)
        self.socket.setblocking(False)
        return messages

    def close(self) -> None:
        self.socket.close()


def plain(value: Any) -> Any:
    """What a robot reports may be NumPy's, or anything."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def pair() -> tuple[Channel, socket.socket]:
    """The console's channel, and the socket to hand to the controller's process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours, Status), theirs


def desk(theirs: socket.socket) -> Channel:
    """The controller's channel."""
    return Channel(theirs, Orders)
