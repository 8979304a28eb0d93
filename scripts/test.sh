#!/usr/bin/env bash
# Set up, then format, lint, types and every test; --fast leaves the slow tests out.
# Other arguments go to pytest, which runs in two processes (-n 0: in one, as --pdb needs). The last line is its own.
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE # hundreds of starts read what the first wrote
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tests=(-m "slow or not slow") # tests/conftest.py sorts them
if [ "${1:-}" = --fast ]; then
    tests=()
    shift
fi

"$root/scripts/setup.sh"
cd "$root"
PATH=$root/.venv/bin:$PATH

check() { # remedy, command...
    local remedy=$1
    shift
    echo "test: $*"
    if "$@"; then return; fi
    echo "test: $* failed; remedy: $remedy" >&2
    exit 1
}

check "run .venv/bin/ruff format" ruff format --check --quiet --output-format concise .
check "run .venv/bin/ruff check --fix, then mend the rest" ruff check --quiet --output-format concise .
check "mend the types named above" pyright
# One thread each: two would wait for each other. A file's tests stay in one process.
export OMP_NUM_THREADS=1
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "${tests[@]}" "$@"
