"""Records demonstrations by the environment's own expert into a LeRobotDataset v3.0.

    python scripts/record.py configs/quickstart.yaml [--record.episodes=10]

With --record.format=frames into the arrays that training reads, for which lerobot need not be installed.

A killed run continues with the same command; a finished one says so and changes nothing.
"""

from __future__ import annotations

import sys

from vla.config import Job, load
from vla.data.record import record_demonstrations
from vla.system import require_writable


def main(job: Job) -> None:
    """Record what `job` asks for, unless it is there already."""
    require_writable(job.dataset_root.parent)
    recording = record_demonstrations(job.dataset_root, job.env, job.record)
    print(f"dataset {job.dataset_root}: {recording}")


if __name__ == "__main__":
    try:
        main(load(Job))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"record: {error}")
    except KeyboardInterrupt:
        sys.exit("record: interrupted; the same command continues")
