#!/usr/bin/env bash
# Set up, then format, lint, types and every test; --fast leaves the slow tests out.
# Other arguments go to pytest. The last line is pytest's own.
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME VIRTUAL_ENV
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tests=(-m "slow or not slow") # slow ones last: tests/conftest.py sorts them
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
exec python -m pytest -q "${tests[@]}" "$@"
