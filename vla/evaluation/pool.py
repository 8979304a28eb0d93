"""The evaluator's side of its workers: processes, their pipes, the memory shared with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vla.evaluation.slot import Setup
from vla.evaluation.worker import Failure, Layout
from vla.observation import ACTION, IMAGES, STATE
from vla.system import cores

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")


class EnvironmentCrash(RuntimeError):
    """An environment raised, or its process died; the message carries its traceback and the episode."""


class Workers:
    """`n` processes that host `slots` environments side by side. A context manager.

    features, n_tasks: what the environments are; the latter by split, see vla/environment.py;
    images: camera key -> (slots, T, h, w, 3) uint8; state: (slots, T, P) float32;
    actions: (slots, n_action_steps, A) float32: live views of what the workers see.
    Raises ValueError for an environment that cannot be used, EnvironmentCrash for one that fails.
    """

    def __init__(self, n: int, slots: int, setup: Setup) -> None:
        self.n = n = min(n or cores(), slots)
        self.owner = [slot % n for slot in range(slots)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        try:
            for worker in range(n):
                self._start()
                mine = tuple(slot for slot in range(slots) if self.owner[slot] == worker)
                self.pipes[worker].send(("open", replace(setup, slots=mine)))
            replies = [self._reply(worker) for worker in range(n)]
            self.features, self.n_tasks = (
                replies[0].features,
                replies[0].n_tasks,
            )  # which looked at all splits
            self._share(slots, setup)
        except BaseException:
            self.close()
            raise

    def ask(self, command: str, wanted: dict[int, Any]) -> dict[int, Any]:
        """Have every slot in `wanted` obey, all workers at once; slot -> its answer."""
        asked: dict[int, dict[int, Any]] = {}
        for slot, what in wanted.items():
            asked.setdefault(self.owner[slot], {})[slot] = what
        for worker, part in asked.items():
            self._send(worker, (command, part))
        return {slot: answer for worker in asked for slot, answer in self._reply(worker).items()}

    def close(self) -> None:
        """Hang up, which ends the workers; one that does not listen is terminated."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        """A fresh interpreter, not multiprocessing's spawn: that would run the caller's script again,
        and with it import torch. Its own session, so that Ctrl-C reaches the evaluator alone.
        """
        ours, theirs = Pipe()
        code = f"from vla.evaluation.worker import main; main({theirs.fileno()})"
        paths = [path or os.getcwd() for path in sys.path]
        environment = dict.fromkeys(ONE_THREAD, "1") | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )
        self.processes.append(process)
        theirs.close()
        self.pipes.append(ours)

    def _share(self, slots: int, setup: Setup) -> None:
        """Files in memory where the system has room for them there; gone as soon as all have them open."""
        history, features = setup.n_obs_steps, self.features
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            IMAGES + name: ((slots, history, *size, 3), "uint8") for name, size in features.cameras.items()
        }
        shapes[STATE] = ((slots, history, features.state_dim), "float32")
        shapes[ACTION] = ((slots, setup.n_action_steps, features.action_dim), "float32")
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * needed
        with tempfile.TemporaryDirectory(prefix="vla-", dir=memory if roomy else None) as folder:
            layout = Layout({name: (Path(folder) / name, *spec) for name, spec in shapes.items()})
            for path, shape, dtype in layout.arrays.values():
                np.memmap(path, dtype, "w+", shape=shape)
            arrays = layout.attach()
            for worker in range(len(self.pipes)):
                self._send(worker, ("attach", layout))
            for worker in range(len(self.pipes)):
                self._reply(worker)
        self.images = {name: array for name, array in arrays.items() if name.startswith(IMAGES)}
        self.state, self.actions = arrays[STATE], arrays[ACTION]

    def _send(self, worker: int, message: Any) -> None:
        try:
            self.pipes[worker].send(message)
        except (BrokenPipeError, ConnectionError):
            self._died(worker)

    def _reply(self, worker: int) -> Any:
        try:
            reply = self.pipes[worker].recv()
        except (EOFError, ConnectionError):
            self._died(worker)
        if not isinstance(reply, Failure):
            return reply
        if reply.refused:
            raise ValueError(reply.message)
        where = f"in episode {reply.episode}" if reply.episode else "while it was made"
        raise EnvironmentCrash(f"The environment failed {where}:\n\n{reply.message}")

    def _died(self, worker: int) -> Any:
        code = self.processes[worker].wait(timeout=10)
        slots = [slot for slot, owner in enumerate(self.owner) if owner == worker]
        raise EnvironmentCrash(
            f"The worker of slots {slots} died with exit code {code}; see its output above."
        )
