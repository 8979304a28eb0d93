"""Turns a recorded session of control into a LeRobotDataset v3.0 that scripts/train.py takes as data.root.

    python scripts/collect.py SESSION DATASET [--keep=run|all]

SESSION is a folder of journals, of an ended or a killed run. By default only frames in state RUN are
kept, and episodes are split where others lay in between. The dataset appears complete or not at
all: after an interruption, run the command again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from vla.data.collect import KEEP, collect
except ImportError as missing:
    sys.exit(
        f"collect: got no package {missing.name!r}, expected LeRobot's. remedy: pip install 'vla[policy,data]'."
    )
from vla.system import require_writable


def main(session: Path, dataset: Path, keep: str) -> None:
    """Collect, and say what was kept and what was not."""
    require_writable(dataset.resolve().parent)
    print(f"dataset {dataset}: {collect(session, dataset, keep)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("session", type=Path, help="folder of journals")
    parser.add_argument("dataset", type=Path, help="folder to make")
    parser.add_argument("--keep", choices=KEEP, default="run", help="frames in state RUN (default), or all")
    options = parser.parse_args()
    try:
        main(options.session, options.dataset, options.keep)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"collect: {error}")
    except KeyboardInterrupt:
        sys.exit("collect: interrupted; the same command starts anew")
