"""How long an observation takes to the policy server and back: python scripts/roundtrip.py [--n=3000]

Two pictures of 224 × 224 pixels go, a chunk of 16 × 7 comes, the policy in between answers at once: what
remains is messages, processes and the network. Once through the controller's client and once through
a bare websocket, over loopback and over a Unix socket, in turns, so that what else the machine does
falls on all alike. Prints a table; --results=FILE writes every sample.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import connect, unix_connect

import vla.serve.__main__ as program
from vla.observation import Features
from vla.provenance import machine, versions
from vla.serve.client import Client
from vla.serve.local import LocalServer
from vla.serve.wire import Beat, decode, encode, make_ask

H, A, SIDE, TURN = 16, 7, 224, 100  # TURN: round trips of one kind before the next kind's
SERVER = (sys.executable, __file__, "--serve", "instant")
TARGET_MS = 1.0


class InstantPolicy:
    """Zeros, at once."""

    features = Features({"front": (SIDE, SIDE), "wrist": (SIDE, SIDE)}, A, A, 10)
    chunk_size, n_obs_steps, max_prefix, model_sha256 = H, 1, 0, "0" * 64

    def predict_chunk(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None = None,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:
        return np.zeros((1, H, A), np.float32)


def request(seq: int) -> dict[str, Any]:
    images = {name: np.full((1, SIDE, SIDE, 3), seq % 256, np.uint8) for name in ("front", "wrist")}
    return dict(
        episode=0, seq=seq, captured_ns=time.monotonic_ns(), start=0, task="pick up the block",
        images=images, state=np.zeros((1, A), np.float32),
    )  # fmt: skip


def through_client(client: Client) -> Callable[[int], float]:
    def trip(seq: int) -> float:
        asked = request(seq)
        began = time.monotonic()
        client.ask(**asked)
        while not (replies := client.poll()):
            time.sleep(2e-4)  # the control loop is not waiting for the reply either
        assert replies[0].kind == "chunk", replies[0].reason
        return replies[0].received - began

    return trip


def through_websocket(connection: Any) -> Callable[[int], float]:
    def trip(seq: int) -> float:
        asked = request(seq)
        began = time.monotonic()
        connection.send(encode(make_ask(**asked)))
        while isinstance(decode(connection.recv()), Beat):
            pass
        return time.monotonic() - began

    return trip


@contextmanager
def loopback_server() -> Iterator[str]:
    """The address of a server on a free port of 127.0.0.1."""
    with subprocess.Popen([*SERVER, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


def round_trips(n: int) -> list[dict[str, Any]]:
    """Rows with name, n, p50_ms, p99_ms, p999_ms, max_ms and samples_ms of n round trips of every kind."""
    with ExitStack() as stack:
        urls = {
            "loopback": stack.enter_context(loopback_server()),
            "Unix socket": stack.enter_context(LocalServer([], SERVER)).url,
        }
        trips: dict[str, Callable[[int], float]] = {}
        for place, url in urls.items():
            client = stack.enter_context(Client(url))
            while not client.connected:
                time.sleep(0.01)
            trips[f"client, {place}"] = through_client(client)
            path = url.removeprefix("unix://")
            bare = unix_connect(path, compression=None) if path != url else connect(url, compression=None)
            stack.enter_context(bare).recv()  # Hello
            trips[f"bare websocket, {place}"] = through_websocket(bare)
        samples: dict[str, list[float]] = {name: [] for name in trips}
        for trip in trips.values():
            for seq in range(TURN):  # warm-up
                trip(seq)
        while any(len(found) < n for found in samples.values()):
            for name, trip in trips.items():
                found = samples[name]
                found += [1000 * trip(len(found) + i + TURN) for i in range(min(TURN, n - len(found)))]
    return [row(name, found) for name, found in samples.items()]


def row(name: str, samples_ms: list[float]) -> dict[str, Any]:
    p50, p99, p999, largest = np.quantile(samples_ms, [0.5, 0.99, 0.999, 1.0])
    return {
        "name": name, "n": len(samples_ms), "p50_ms": float(p50), "p99_ms": float(p99), "p999_ms": float(p999),
        "max_ms": float(largest), "samples_ms": [round(sample, 4) for sample in samples_ms],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| round trip | n | p50 ms | p99 ms | p99.9 ms | max ms |", "|---|---|---|---|---|---|"]
    for r in rows:
        numbers = " | ".join(f"{r[key]:.2f}" for key in ("p50_ms", "p99_ms", "p999_ms", "max_ms"))
        lines.append(f"| {r['name']} | {r['n']} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--serve"]:  # the other end of the measurement
        program.load = lambda *_: InstantPolicy()
        return program.main(argv[1:])
    parser = argparse.ArgumentParser("roundtrip", description="Time round trips to the policy server.")
    parser.add_argument("--n", type=int, default=3000, help="round trips of every kind (%(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where to write every sample, as JSON")
    arguments = parser.parse_args(argv)
    rows = round_trips(arguments.n)
    print(table(rows))
    if arguments.results is not None:
        result = {"machine": machine(), "versions": versions(), "target_p99_ms": TARGET_MS, "rows": rows}
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
