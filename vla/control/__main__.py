"""The controller's process: python -m vla.control [--console=DESCRIPTOR] CONFIG [--a.b=c ...]

scripts/control.py starts it with a console; without one it follows `tasks` and ends after the last,
by a signal or after `seconds`. Imports neither torch nor lerobot; the robot's class may.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from vla.checks import read_yaml, require
from vla.config import decode, load
from vla.control.config import ControlConfig, RobotConfig
from vla.control.console import desk
from vla.control.controller import Controller
from vla.control.loop import Loop
from vla.control.process import RobotError, RobotProcess
from vla.control.recorder import Recorder
from vla.control.safety import Limits
from vla.serve.access import read_token
from vla.serve.client import Client
from vla.serve.local import LocalServer
from vla.system import require_writable


def main(config: ControlConfig, console: int | None = None) -> dict[str, Any]:
    """Control until told to end; returns what control.json says.

    Raises ValueError, OSError (ConnectionError among them) or RobotError for what cannot be started.
    """
    robot_config = read_robot(config)
    output = Path(config.output)
    require_writable(output)
    with contextlib.ExitStack() as stack:
        robot = stack.enter_context(RobotProcess(robot_config, log=output / "robot.log"))
        url = config.server
        if config.checkpoint:
            arguments = [config.checkpoint, f"--device={config.device}", f"--threads={config.threads}"]
            arguments.append(f"--launch={config.launch}")
            url = stack.enter_context(LocalServer(arguments)).url
        token = read_token(config.token_file) or None
        client = stack.enter_context(Client(url, token, config.ca or None, jpeg_quality=config.jpeg_quality))
        recorder = None
        if config.record:
            recorder = Recorder(output / "session", robot.robot.features, robot.robot.joints, robot_config.id)
            stack.callback(recorder.close)
        limits = Limits(robot_config.limits, robot.robot.position)
        controller = Controller(robot.robot, limits, config.loop, client)
        channel = None if console is None else desk(socket.socket(fileno=console))
        loop = Loop(controller, robot, config.loop, channel, recorder, config.tasks, config.task_seconds)

        def end(_number: int, _frame: FrameType | None) -> None:
            loop.ended = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        try:
            loop.run(config.seconds or float("inf"))
        finally:
            result = loop.write(output, {"robot": asdict(robot_config)})
        return result


def read_robot(config: ControlConfig) -> RobotConfig:
    """The robot's file, with `robot_kwargs` over its own. Raises ConfigError."""
    tree = read_yaml(Path(config.robot))
    require(
        isinstance(tree, dict) and "limits" in tree,
        config.robot,
        "no limits",
        "a robot's id, kwargs and limits",
    )
    robot = decode(RobotConfig, tree)
    return replace(robot, kwargs={**robot.kwargs, **config.robot_kwargs})


def run(argv: list[str]) -> int:
    """The command line; an error is one line and exit code 1."""
    console = None
    if argv and argv[0].startswith("--console="):
        console = int(argv.pop(0).partition("=")[2])
    try:
        result = main(load(ControlConfig, argv), console)
    except (ValueError, OSError, RobotError) as error:
        print(f"control: {error}", file=sys.stderr)
        return 1
    if result["state"] in ("INIT", "FAULT"):
        print(f"control: ended in {result['state']}: {result['reason']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
