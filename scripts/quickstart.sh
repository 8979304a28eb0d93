#!/usr/bin/env bash
# One command: set up, record demonstrations, train, evaluate, report. Arguments go to quickstart.py.
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

"$root/scripts/setup.sh"
cd "$root" # outputs/quickstart is written here
if [ "$(uname)" = Linux ]; then export MUJOCO_GL="${MUJOCO_GL:-egl}"; fi
exec .venv/bin/python scripts/quickstart.py "$@"
