"""Does it last? python scripts/soak.py [--minutes=60] [--config=configs/control/tabletop.yaml] [--a.b=c ...]

Controls a robot for so long, scene after scene, each with its own instruction, and samples the memory of every process
every ten seconds and the lateness of the loop every minute. Prints a summary and writes <output>/soak.json;
exit code 1 when memory grows or the loop gets later.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla.config import load
from vla.control.config import ControlConfig
from vla.control.console import Alive, Channel, Quit, Status, pair
from vla.control.trials import Trials
from vla.provenance import machine, versions
from vla.rates import rate

SAMPLE_S, WINDOW_S = 10.0, 60.0
# The controller's growth after the first quarter beyond what it keeps, and p50 of the last window over the first.
MOST_MB, MOST_TIMES = 2.0, 3.0
KEPT_BYTES = {"tick": 8.4, "event": 205.0}  # the samples and transitions of control.json, as measured
FEW_MS = 0.5  # lateness that is never a complaint
STOPPING_S = 60.0


def processes(pid: int) -> dict[str, float]:
    """Resident memory in MB of a process and everything it started, by what they are."""
    found, rest = {}, [pid]
    while rest:
        number = rest.pop()
        try:
            folder = Path(f"/proc/{number}")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            status = (folder / "status").read_text()
            rest += [int(child) for task in (folder / "task").iterdir()
                     for child in (task / "children").read_text().split()]  # fmt: skip
        except (FileNotFoundError, ProcessLookupError):
            continue
        line = " ".join(words)
        name = next((name for name, word in NAMES.items() if word in line), f"process {number}")
        kilobytes = [int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")]
        found[name] = sum(kilobytes) / 1024
    return found


NAMES = {"recorder": "vla.control.journalist", "robot": "vla.control.host", "policy": "vla.serve",
         "controller": "vla.control"}  # fmt: skip


class Soak:
    """Feed it every status. memory: rows of seconds and MB by process; lateness: rows of seconds and percentiles."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.pid, self.began = pid, time.monotonic()
        self.sample_s, self.window_s = min(SAMPLE_S, seconds / 8), min(WINDOW_S, seconds / 4)
        self.events = 0
        self.memory: list[dict[str, float]] = []
        self.lateness: list[dict[str, float]] = []

    def see(self, status: Status) -> None:
        seconds = round(status.time - self.began, 1)
        self.events += len(status.events)
        if seconds >= self.sample_s * len(self.memory):
            kept = (KEPT_BYTES["tick"] * status.tick + KEPT_BYTES["event"] * self.events) / 1e6
            self.memory.append({"seconds": seconds} | processes(self.pid) | {"kept": kept})
        if seconds >= self.window_s * (len(self.lateness) + 1) and status.lateness:
            self.lateness.append({"seconds": seconds} | status.lateness | {"missed": status.counts["missed"]})

    def verdict(self) -> dict[str, Any]:
        """MB that every process grew after the first quarter, the lateness then and now, and what is wrong."""
        late = self.memory[len(self.memory) // 4 :]
        grown = (
            {name: late[-1].get(name, 0.0) - mb for name, mb in late[0].items() if name != "seconds"}
            if late
            else {}
        )
        first, last = (self.lateness[i]["p50"] if self.lateness else 0.0 for i in (0, -1))
        more, kept = grown.get("controller", 0.0), grown.get("kept", 0.0)
        text = f"the controller grew by {more:.1f} MB, of which it keeps {kept:.1f} on purpose"
        wrong = [text] if more - kept > MOST_MB else []
        wrong += (
            [f"lateness rose from {first} to {last} ms"] if last > max(MOST_TIMES * first, FEW_MS) else []
        )
        return {"grown_mb": {name: round(mb, 2) for name, mb in grown.items()}, "lateness_p50_ms": [first, last],
                "wrong": wrong}  # fmt: skip


def watch(channel: Channel, soak: Soak, seconds: float, seed: int) -> tuple[Trials, Status | None]:
    """Scene after scene, until the time is over."""
    trials, last = Trials(10**9, seed), None
    while time.monotonic() < soak.began + seconds and not channel.lost:
        for status in channel.receive(timeout_s=0.1):
            soak.see(status)
            last = status
            for order in trials.see(status):
                channel.send(order)
        channel.send(Alive())
    return trials, last


def main(config_file: str, minutes: float, overrides: list[str]) -> dict[str, Any]:
    """Raises RuntimeError when the controller ends too soon."""
    config = load(ControlConfig, [config_file, *overrides])
    channel, theirs = pair()
    command = [sys.executable, "-m", "vla.control", f"--console={theirs.fileno()}", config_file, *overrides]
    controller = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    try:
        while not channel.receive(timeout_s=1.0):  # robot and policy take a while
            if controller.poll() is not None:
                raise RuntimeError(f"the controller ended with exit code {controller.returncode}.")
        soak = Soak(controller.pid, 60 * minutes)
        trials, last = watch(channel, soak, 60 * minutes, config.seed)
    finally:
        channel.send(Quit())
        try:
            code = controller.wait(STOPPING_S)
        except subprocess.TimeoutExpired:
            controller.kill()
            raise
        finally:
            channel.close()
    if code != 0:
        raise RuntimeError(f"the controller ended with exit code {code}; see its message above.")
    result = {"minutes": minutes, "machine": machine(), "versions": versions(), **soak.verdict(),
              "success": rate(row.success for row in trials.rows), "holds": sum(row.holds for row in trials.rows),
              "counts": last.counts if last else {}, "priority": last.priority if last else "",
              "memory_mb": rounded(soak.memory), "lateness_ms": soak.lateness}  # fmt: skip
    path = Path(config.output) / "soak.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def rounded(rows: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: round(value, 2) for name, value in row.items()} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser("soak", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--config", default="configs/control/tabletop.yaml")
    arguments, rest = parser.parse_known_args()
    found = main(arguments.config, arguments.minutes, rest)
    for name in ("minutes", "grown_mb", "lateness_p50_ms", "holds", "counts", "priority"):
        print(f"{name:<16} {found[name]}")
    print(f"{'success':<16} {found['success']['success_rate']} of {found['success']['n_episodes']}")
    sys.exit("soak: " + "; ".join(found["wrong"]) if found["wrong"] else 0)
