"""Convert a checkpoint to LeRobot's layout, or back.

    python scripts/convert.py CHECKPOINT FOLDER             for lerobot-eval --policy.path=FOLDER
    python scripts/convert.py FOLDER CHECKPOINT --to=vla    what lerobot-train wrote, for the scripts here

Neither changes a weight or an output. CHECKPOINT is a checkpoint's folder, or the output folder of a
training, whose newest one is taken; of lerobot-train, its output folder or a folder pretrained_model.
The second argument is the folder to write, which must not exist. Training goes on only where it began.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(source: str, folder: str, to: str) -> Path:
    """Convert, and print where to; returns the folder."""
    from vla.lerobot_plugin.convert import from_lerobot, to_lerobot
    from vla.training import checkpoint

    found = checkpoint.find(source)
    written = (to_lerobot if to == "lerobot" else from_lerobot)(found, Path(folder))
    print(f"convert: {found} -> {written}")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source")
    parser.add_argument("folder")
    parser.add_argument("--to", default="lerobot", choices=("lerobot", "vla"), help="the layout to write")
    options = parser.parse_args()
    try:
        main(options.source, options.folder, options.to)
    except (ValueError, OSError) as error:  # ConfigError and CheckpointError among them
        sys.exit(f"convert: {error}")
    except KeyboardInterrupt:
        sys.exit("convert: interrupted. Nothing was written; the same command begins again.")
