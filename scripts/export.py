"""Turn a checkpoint into a folder that runs without torch.

    python scripts/export.py CHECKPOINT [--format=onnx|onnx-bf16|onnx-int8|aoti] [--output=FOLDER]

CHECKPOINT is a checkpoint's folder, or the output folder of a training. The folder, by default
<run>/exports/<format>, takes uint8 images, raw state and a sentence, and gives robot units; its
manifest.json says how far it is from the checkpoint. `scripts/evaluate.py FOLDER` plays it in closed loop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main(source: str, format: str, output: str, dataset: str = "") -> dict[str, Any]:
    """Export, and print what came out; returns the manifest."""
    from vla.export.export import export
    from vla.system import require_writable
    from vla.training import checkpoint

    found = checkpoint.find(source)
    folder = Path(output) if output else found.parent.parent / "exports" / format
    require_writable(folder.parent)
    manifest = export(found, format, folder, dataset)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parity = manifest["parity"]
    print(f"export:  {folder} ({size / 1e6:.0f} MB)")
    print(
        f"parity:  at most {parity['max_of_range']:.1e} and on average {parity['mean_of_range']:.1e} of an action's "
        f"range from the checkpoint in float32, over {parity['observations']} observations"
    )
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--format", default="onnx", help="onnx, onnx-bf16, onnx-int8 or aoti")
    parser.add_argument("--output", default="", help="the folder to write")
    parser.add_argument("--dataset", default="", help="of a checkpoint trained on data.mix, whose policy")
    options = parser.parse_args()
    try:
        main(options.checkpoint, options.format, options.output, options.dataset)
    except (ValueError, OSError) as error:  # ConfigError, CheckpointError and ExportError among them
        sys.exit(f"export: {str(error).removeprefix('export: ')}")
    except KeyboardInterrupt:
        sys.exit("export: interrupted. Nothing was written; the same command begins again.")
