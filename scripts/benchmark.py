"""Measure this machine: python scripts/benchmark.py WHAT [--quick] [--device=auto] [--output=results]

  {contents}

Ours and its peers are measured in the same process and take turns in every round, so that what else the machine
does falls on all alike; a peer whose package is missing is left out, which is said. Prints a Markdown table and
writes <output>/benchmark_<what>_<machine>.json with every sample taken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Options, Row

BENCHMARKS = {  # a module below benchmarks/ each
    "attention": "one layer of every kind of attention at growing lengths; ten minutes on two cores, 12 GB",
    "training": "training steps against the usual loops",
    "inference": "an observation to a chunk of actions, every path",
    "data": "random batches from the frame store and from LeRobot's reader; six minutes on two cores",
    "simulation": "recording and evaluation: physics, rendering, policy; six minutes on two cores",
    "scaling": "how cost grows with parameters, tokens, chunk, batch, workers, frames",
}
CONTENTS = "\n  ".join(f"{what:11} {about}" for what, about in BENCHMARKS.items())


def main(what: str, options: Options) -> Path:
    """Run one benchmark, print its table and write its rows. Raises ValueError before anything is measured."""
    if what not in BENCHMARKS:
        raise ValueError(f"what: got {what!r}, expected one of {', '.join(BENCHMARKS)}. remedy: correct it.")

    from vla.device import resolve_device
    from vla.system import require_writable

    require_writable(options.output)
    options = replace(options, device=str(resolve_device(options.device)))
    benchmark = importlib.import_module(f"benchmarks.{what}")
    rows: list[Row] = benchmark.run(options)
    return save(what, options, rows, benchmark.table(rows))


def save(what: str, options: Options, rows: list[Row], table: str) -> Path:
    """Print the table, write the rows and what they were measured on."""
    import torch

    from vla.provenance import machine, versions

    where = machine() | {"threads": torch.get_num_threads()}
    label = f"{where['cores']}x {where['cpu']}" if options.device == "cpu" else where["gpu"]
    path = options.output / f"benchmark_{what}_{re.sub('[^a-z0-9]+', '_', label.lower()).strip('_')}.json"
    asked = {"quick": options.quick, "device": options.device, "peers": options.peers}
    measured = {"benchmark": what, "machine": where, "versions": versions(), "command": command(what, options),
                "options": asked, "rows": rows}  # fmt: skip
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{table}\n\nbenchmark: {path}")
    return path


def command(what: str, options: Options) -> str:
    """What measures this again."""
    words = ["python scripts/benchmark.py", what, f"--device={options.device}"]
    return " ".join(words + ["--quick"] * options.quick + ["--no-peers"] * (not options.peers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=str(__doc__).replace("{contents}", CONTENTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="WHAT", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small and once: a check, not a measurement")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the JSON")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours alone")
    a = parser.parse_args()
    try:
        main(a.what, Options(a.quick, a.device, a.output, a.peers))
    except ModuleNotFoundError as error:
        sys.exit(
            f"benchmark: got no module {error.name!r}, expected what {a.what!r} needs to be installed. "
            "remedy: install it; README.md says which extra has what."
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted. Nothing was saved; the same command begins again.")
