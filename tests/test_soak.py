"""Does it last: memory and lateness of a controller over time, and the script that watches them for an hour."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
from controlled import TESTS, configured, controlled, walking_server

ROOT = TESTS.parent
MOST_BYTES = 2e6


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts/soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_minute_of_soak(tmp_path: Path) -> None:
    with walking_server("--port=0") as server, controlled(tmp_path, server.url) as control:
        control.run()
        began, process = time.monotonic(), psutil.Process(control.process.pid)
        memory: list[tuple[float, int]] = []
        while (seconds := time.monotonic() - began) < 60:
            control.look(0.5)
            memory.append((seconds, process.memory_info().rss))
        control.legal()
        result = control.end()
        begin, *between, end = (event["after"] for event in result["events"])
        assert (begin, end) == ("READY", "STOPPED")
        assert {"RUN"} <= set(between) <= {"RUN", "HOLD"}  # which is what late answers of a busy machine do
        warm = [size for seconds, size in memory if seconds > 15]
        assert max(warm) - warm[0] < MOST_BYTES
        late = np.load(tmp_path / "control.npz")["lateness"]
        assert len(late) > 5000
        first, last = np.median(late[:1500]), np.median(late[-1500:])
        assert last < max(3 * first, 0.5)


@pytest.mark.slow
def test_the_script_soaks_and_says_how_it_was(tmp_path: Path) -> None:
    with walking_server("--port=0") as server:
        config = configured(tmp_path, server.url, "", {})
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            str(ROOT / "scripts/soak.py"),
            "--minutes=0.1",
            f"--config={config}",
            "--seed=3",
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["success"]["n_episodes"] in (2, 3)  # of 1.5 s and what lies between
    assert result["counts"]["illegal"] == 0
    assert result["wrong"] == []
    assert {"controller", "robot"} <= set(result["grown_mb"])
    assert all(row["controller"] > 20 for row in result["memory_mb"])
    assert len(result["memory_mb"]) in (8, 9)
    assert len(result["lateness_ms"]) in (3, 4)
    assert "illegal" in done.stdout


def test_the_verdict() -> None:
    soak = script().Soak(os.getpid(), 60.0)
    assert soak.verdict() == {"grown_mb": {}, "lateness_p50_ms": [0.0, 0.0], "wrong": []}
    soak.memory = [{"seconds": i, "controller": 50.0 + 10 * (i == 0), "policy": 100.0 + i} for i in range(8)]
    soak.lateness = [{"p50": 0.1}, {"p50": 9.0}, {"p50": 0.49}]
    assert soak.verdict() == {
        "grown_mb": {"controller": 0.0, "policy": 5.0},
        "lateness_p50_ms": [0.1, 0.49],
        "wrong": [],
    }
    soak.memory[-1] = {"seconds": 8, "controller": 53.0}
    soak.lateness.append({"p50": 0.51})
    grew, later = soak.verdict()["wrong"]
    assert grew.startswith("the controller grew by 3.0 MB, of which it keeps 0.0")
    assert later == "lateness rose from 0.1 to 0.51 ms"
    soak.memory = [row | {"kept": 1.5 * (row["seconds"] == 8)} for row in soak.memory]
    assert soak.verdict()["wrong"] == [later]  # 1.5 MB of samples are no leak


def test_memory_of_a_process_and_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "vla.control.journalist"])
    try:
        time.sleep(0.3)
        found = script().processes(os.getpid())
        assert found["recorder"] > 3
        assert max(found.values()) > 20
        assert script().processes(2**22 + 1) == {}
    finally:
        child.kill()
        child.wait()
