"""A controller in the terminal: what it does, how late it is, and a line to type instructions into."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vla.control import console as orders
from vla.control.console import Status
from vla.serve.wire import MAX_TASK

COLOURS = {
    "INIT": "white",
    "READY": "cyan",
    "RUN": "green",
    "HOLD": "yellow",
    "STOPPED": "magenta",
    "FAULT": "red",
}
HELP = "type an instruction · Escape, or Enter alone, stops · /resume · /reset · /drive a b c … · /quit"
SIMPLE = {"": orders.Stop(), "/stop": orders.Stop(), "/resume": orders.Resume(), "/reset": orders.Reset(),
          "/quit": orders.Quit()}  # fmt: skip


def parse(line: str) -> orders.Order | str:
    """What a typed line orders; a text when it orders nothing."""
    line = line.strip()
    if line in SIMPLE:
        return SIMPLE[line]
    if line.startswith("/drive"):
        try:
            return orders.Intervene([float(word) for word in line.split()[1:]])
        except ValueError:
            return f"got {line!r}, expected /drive and one number for each action dimension"
    if line.startswith("/"):
        return f"got {line!r}, expected one of {', '.join(filter(None, SIMPLE))} or /drive; or an instruction"
    if len(line) > MAX_TASK:
        return f"got {len(line)} letters, expected an instruction of at most {MAX_TASK}"
    return orders.Instruct(line)


class View:
    """The picture of a controller: feed it statuses and keys. A context manager.

    plain: one line for every transition instead of a panel, for pipes and logs.
    """

    def __init__(self, plain: bool = False) -> None:
        self.status: Status | None = None
        self.plain = plain
        self.events: deque[str] = deque(maxlen=6)
        self.line = self.note = ""
        self.start = 0.0
        self.live = Live(self.draw(), refresh_per_second=5, transient=True)

    def __enter__(self) -> View:
        print("starting the robot and the policy …", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def see(self, status: Status) -> None:
        self.start = self.start or status.time
        if (
            self.plain
            and status.state == "INIT"
            and (self.status is None or self.status.reason != status.reason)
        ):
            print(f"{status.time - self.start:8.2f} s  INIT  {status.reason}", flush=True)
        self.status = status
        for time, _, before, after, reason in status.events:
            self.events.append(f"{time - self.start:8.2f} s  {before} → {after}  {reason}")
            if self.plain:
                print(self.events[-1], flush=True)
        if not self.plain:
            self.live.start()  # now, when the processes have said what they had to say
            self.live.update(self.draw())

    def type(self, keys: str) -> Iterator[orders.Order]:
        """Keys as they are pressed; orders when a line is complete."""
        for key in keys:
            if key == "\x1b":
                yield orders.Stop()
            elif key in "\r\n":
                said, self.line = parse(self.line), ""
                self.note = said if isinstance(said, str) else ""
                if not isinstance(said, str):
                    yield said
            elif key in "\x7f\b":
                self.line = self.line[:-1]
            elif key.isprintable():
                self.line += key

    def draw(self) -> Panel:
        """The panel as it stands."""
        status = self.status
        if status is None:
            return Panel("", title="vla control")
        grid = Table.grid(padding=(0, 2))
        state = Text(f"{status.state}  ", f"bold {COLOURS.get(status.state, 'white')}") + Text(status.reason)
        rows = {
            "state": state, "instruction": Text(status.task or "none"),
            "tick": Text(f"late {times(status.lateness)}   {status.priority}"),
            "camera → command": Text(times(status.latency)),
            "commands": Text("   ".join(f"{name} {count}" for name, count in status.counts.items())),
            "robot": Text("   ".join(f"{name} {shown(value)}" for name, value in list(status.robot.items())[:8])),
            "recorder": Text(status.recorder),
        }  # fmt: skip
        for name, value in rows.items():
            grid.add_row(Text(name, "dim"), value)
        said = self.note or status.note
        typed = Text(f"> {self.line}▏", "bold")
        parts = [
            grid,
            Text("\n".join(self.events), "dim"),
            typed,
            Text(said or HELP, "red" if said else "dim"),
        ]
        return Panel(Group(*parts), title="vla control", border_style=COLOURS.get(status.state, "white"))


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def times(ms: dict[str, float]) -> str:
    if not ms:
        return "nothing yet"
    return f"p50 {ms['p50']:.2f}  p99 {ms['p99']:.2f}  max {ms['max']:.2f} ms"


@contextlib.contextmanager
def keyboard() -> Iterator[None]:
    """Keys one by one and unechoed, while standard input is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def pressed() -> str:
    """What was typed since the last call."""
    if sys.stdin.closed or not select.select([sys.stdin], [], [], 0)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 4096).decode(errors="ignore")
