"""Serve a checkpoint's policy to controllers: python scripts/serve.py CHECKPOINT [--port=8765]; see --help."""

from __future__ import annotations

import sys

from vla.serve.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
