"""Control a robot with a policy: python scripts/control.py configs/control/tabletop.yaml [--a.b=c ...]

Starts the controller in a process of its own (which starts the robot's, and the policy's unless `server` names
one), shows what it does, and sends it what you type: instructions, Enter alone to stop, /resume, /reset, /quit.
--trials=100 plays scenes of a simulated robot and scores them. Ends with a summary, and writes
<output>/control.json with every transition and <output>/control.npz with every sample.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla.checks import ConfigError
from vla.config import load
from vla.control.config import ControlConfig
from vla.control.console import Alive, Channel, Quit, Stop, pair
from vla.control.process import RobotError
from vla.control.trials import Trials
from vla.control.view import View, keyboard, pressed, times
from vla.provenance import machine, versions
from vla.rates import rate


def main(config: ControlConfig, argv: list[str]) -> dict[str, Any]:
    """Watch one controller from its start to its end. Raises RuntimeError when it fails."""
    channel, theirs = pair()
    command = [sys.executable, "-m", "vla.control", f"--console={theirs.fileno()}", *argv]
    controller = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal stops the arm, too
        signal.signal(number, signal.default_int_handler)
    trials = Trials(config.trials, config.seed) if config.trials else None
    view = View(plain=not sys.stdout.isatty())
    with keyboard(), view:
        try:
            while not channel.lost and not (trials and trials.done):
                watch(channel, view, trials)
        except KeyboardInterrupt:
            print("control: stopping the arm", file=sys.stderr)
        finally:
            channel.send(Stop())
            channel.send(Quit())
            code = controller.wait(60)
    if code != 0:
        raise RuntimeError(
            f"the controller was killed by signal {-code}." if code < 0 else "see the message above."
        )
    result = json.loads((Path(config.output) / "control.json").read_text())
    result |= {"machine": machine(), "versions": versions()}
    if trials is not None:
        result |= {
            "success": rate(row.success for row in trials.rows),
            "trials": [asdict(row) for row in trials.rows],
        }
    (Path(config.output) / "control.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def watch(channel: Channel, view: View, trials: Trials | None) -> None:
    """A tenth of a second: reports in, orders out."""
    for status in channel.receive(timeout_s=0.1):
        view.see(status)
        for order in trials.see(status) if trials is not None else ():
            channel.send(order)
    for order in view.type(pressed()):
        channel.send(order)
    channel.send(Alive())


def report(result: dict[str, Any]) -> str:
    """The summary in lines."""
    lines = [f"priority       {result['priority']}"]
    for name, title in (
        ("lateness_ms", "tick lateness"),
        ("duration_ms", "tick work"),
        ("latency_ms", "camera→command"),
    ):
        lines.append(f"{title:<14} {times(result[name])}  n {result[name].get('n', 0)}")
    lines.append(f"{'counts':<14} {'  '.join(f'{k} {v}' for k, v in result['counts'].items())}")
    if result.get("success", {}).get("n_episodes"):
        s = result["success"]
        low, high = s["wilson_95"]
        lines.append(f"{'success':<14} {s['success_rate']:.0%} [{low:.0%}, {high:.0%}] of {s['n_episodes']}")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    configuration = load(ControlConfig, arguments)
    try:
        print(report(main(configuration, arguments)))
    except (ConfigError, RobotError, RuntimeError, TimeoutError, OSError) as error:
        sys.exit(f"control: {error}")
