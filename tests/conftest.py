"""What holds for every test: no network, no user's caches, no display; the order in which tests run."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import faults
import parity
import pytest

_caches = tempfile.mkdtemp(prefix="vla-tests-")
os.environ |= {
    "HF_HOME": _caches,  # a test that needs something downloaded earlier must fail
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_BASE_URL": "http://127.0.0.1:9",  # should anything go online after all
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name in ("WANDB_API_KEY", "HF_LEROBOT_HOME", "PYTHONPATH"):
    os.environ.pop(_name, None)
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # before anything imports mujoco


def _local_only(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any, /) -> Any:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"got: a connection to {address}. expected: tests without network.")
        return connect(self, address)

    return guarded


setattr(socket.socket, "connect", _local_only(socket.socket.connect))  # noqa: B010
setattr(socket.socket, "connect_ex", _local_only(socket.socket.connect_ex))  # noqa: B010


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=Path, help="a JSON file for how far from their references systems were")
    parser.addoption(
        "--faults", type=Path, help="a JSON file for how long the controller took to respond to faults"
    )


def pytest_configure(config: pytest.Config) -> None:
    measures = [name for name in ("parity", "faults") if config.getoption(name) is not None]
    if measures and config.getoption("numprocesses", None):
        raise pytest.UsageError(
            f"--{measures[0]}: got -n, expected one process, which measures. remedy: -n 0."
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (path := config.getoption("--parity")) is not None:
        parity.write(path)
        terminalreporter.write_line("\n".join(parity.table()))
    if (path := config.getoption("--faults")) is not None:
        faults.write(path)
        terminalreporter.write_line("\n".join(faults.table()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first: a run of everything fails early.

    Several workers (-n, by pytest-xdist) take file after file. There what has slow tests comes first: files without
    fill up the end, so that no worker waits long for another.
    """
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    if hasattr(config, "workerinput"):
        files = Counter(item.path for item in slow)
        items.sort(key=lambda item: -files[item.path])
    else:
        items.sort(key=set(slow).__contains__)


def pytest_runtest_teardown() -> None:
    """Back to ordinary priority: libsvtav1, opened as root, gives SCHED_FIFO 99 to the thread that opens it.

    Everything else on the machine would wait for this process and for all that it starts from then on.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def pytest_unconfigure() -> None:
    shutil.rmtree(_caches, ignore_errors=True)
