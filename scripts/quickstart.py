"""The whole path once: record -> train -> evaluate -> report. python scripts/quickstart.py [CONFIG] [--a.b=c]"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import evaluate
import record
import train

from vla.config import Job, load

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main(job: Job) -> None:
    """Run every part that is not done yet, and print one summary."""
    clock = [time.monotonic()]
    record.main(job)
    clock.append(time.monotonic())
    checkpoint = train.main(job, resume=True)
    clock.append(time.monotonic())
    result = evaluate.main(job, checkpoint)
    clock.append(time.monotonic())
    minutes = [(b - a) / 60 for a, b in itertools.pairwise(clock)]
    summary, (low, high) = result.summary, result.wilson_95
    film = next((row.video for row in result.rows if row.video and row.success), "none")
    print(
        f"success        {result.success_rate:.0%} of {result.n_episodes} unseen scenes [{low:.0%}, {high:.0%}]\n"
        f"both of a pair {share(summary['counterfactual_pair_rate'])} (the same scene, two instructions)\n"
        f"told nothing   {share(summary['blank_instruction_rate'])}\n"
        f"minutes        record {minutes[0]:.1f}, train {minutes[1]:.1f}, evaluate {minutes[2]:.1f}\n"
        f"report         {Path(job.output) / 'report.html'}\n"
        f"video          {Path(job.output) / film}"
    )


def share(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate:.0%}"


if __name__ == "__main__":
    has_config = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    try:
        main(load(Job, path=None if has_config else CONFIG))
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; the same command continues")
