#!/usr/bin/env bash
# Everything the project needs, in .venv beside pyproject.toml; a second run only compares a stamp.
#
# Finds Python, installs requirements.lock by hash, checks that MuJoCo can render without a
# display. Works from any directory, as root (who may install system packages) and as anybody else.
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" # seconds: torch is large, lines are slow

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.complete
minors="12 13"        # of Python 3: mujoco 3.3.0 has wheels for these
gl_packages="libegl1 libopengl0 libgl1-mesa-dri"

say() { echo "setup: $*"; }

fail() { # got, expected, remedy
    printf 'setup: cannot go on\n  got:      %s\n  expected: %s\n  remedy:   %s\n' "$1" "$2" "$3" >&2
    exit 1
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing $* with apt-get"
    apt-get update -qq >"$log" 2>&1 || true # one broken source must not hide the package in another
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1
}

# What LeRobot finds the project by: a distribution of its own; see its pyproject.toml.
plugin=$root/plugin

# What a complete .venv was made from. The folder is part of it: a venv does not survive a move.
recipe() { echo "$root" && cat "$root/pyproject.toml" "$plugin/pyproject.toml" "$root/requirements.lock"; }

is_complete() {
    [ -f "$stamp" ] && recipe | cmp -s - "$stamp" && "$venv/bin/python" -I -c "" 2>/dev/null
}

# A file on PATH is not yet a Python: shims without a selected version fail when run, and
# Debian's lacks ensurepip until its venv package is there.
suits() {
    "$1" -I -c "
import ensurepip, sys, venv
sys.exit(sys.version_info[0] != 3 or str(sys.version_info[1]) not in '$minors'.split())" >/dev/null 2>&1
}

find_python() {
    local minor candidate
    {
        for minor in $minors; do type -aP "python3.$minor" || true; done
        type -aP python3 || true
        for minor in $minors; do
            ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3."$minor".*/bin/python3 || true
            ls -d "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"/cpython-3."$minor"*/bin/python3 || true
            if command -v uv; then uv python find --system --no-python-downloads "3.$minor" || true; fi | tail -1
            ls -d /usr/local/bin/python3."$minor" /usr/bin/python3."$minor" || true
        done
    } 2>/dev/null | while read -r candidate; do
        if suits "$candidate"; then echo "$candidate" && break; fi
    done
}

require_python() {
    local minor bare=""
    python=$(find_python)
    if [ -z "$python" ] && may_install; then
        for minor in $minors; do
            if apt_install "python3.$minor" "python3.$minor-venv"; then break; fi
        done
        python=$(find_python)
    fi
    [ -z "$python" ] || return 0
    for minor in $minors; do # there, but without ensurepip?
        if "python3.$minor" -I -c "" 2>/dev/null; then bare="python3.$minor" && break; fi
    done
    if [ -n "$bare" ]; then
        fail "$bare without the modules venv and ensurepip" "a complete Python" \
            "sudo apt-get install $bare-venv, then run this again"
    fi
    fail "no Python 3.${minors// / or 3.} that runs, on PATH, in pyenv, in uv or in /usr" \
        "one of them, with the modules venv and ensurepip" \
        "one of: sudo apt-get install python3.12 python3.12-venv | pyenv install 3.12 | uv python install 3.12; then run this again"
}

opens_egl() { "$python" -I -c "
import ctypes
for library in 'libEGL.so.1', 'libOpenGL.so.0':
    ctypes.CDLL(library)"; }

renders() { MUJOCO_GL=${MUJOCO_GL:-egl} "$venv/bin/python" -I -c "
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light/><geom size=\".3\"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), 'the picture is black'"; }

# Run a check of the system's OpenGL; when it fails, install the libraries or say which ones.
require_rendering() { # check
    local reason
    [ "$(uname)" = Linux ] || return 0
    if "$1" >"$log" 2>&1; then return; fi
    # shellcheck disable=SC2086 # several packages
    if may_install && apt_install $gl_packages && "$1" >"$log" 2>&1; then return; fi
    reason=$(grep -m1 -E "^([A-Za-z_.]*Error|E):" "$log" || grep . "$log" | tail -1)
    fail "MuJoCo cannot render without a display: $reason" \
        "the OpenGL libraries of the system (MUJOCO_GL=${MUJOCO_GL:-egl})" \
        "sudo apt-get update && sudo apt-get install --no-install-recommends $gl_packages; then run this again"
}

attempt() { # what, command...: quiet when it works
    local what=$1
    shift
    if "$@" >"$log" 2>&1; then return; fi
    fail "$what failed: $(grep . "$log" | tail -8 | sed '2,$s/^/            /')" "it to work" \
        "see the message above (network, proxy, disk: the packages take about 8 GB), then run this again"
}

make_venv() {
    if [ -e "$venv" ]; then say "the old .venv is incomplete: making it anew" && rm -rf "$venv"; fi
    say "making .venv with $("$python" -I -c "import platform; print('Python', platform.python_version())")"
    attempt "python -m venv" "$python" -m venv "$venv"
    awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' "$root/requirements.lock" >"$scratch/uv.lock"
    attempt "installing uv" "$venv/bin/python" -m pip install -q --no-deps --require-hashes -r "$scratch/uv.lock"
}

install_packages() {
    local uv=("$venv/bin/uv" pip) mirror
    # uv reads neither pip's settings nor, by itself, the authorities that a company adds to the system's
    mirror=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$mirror}"; fi
    if [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ]; then
        export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
    fi
    say "installing the packages of requirements.lock (minutes and gigabytes the first time)"
    attempt "uv pip sync" "${uv[@]}" sync -q --python "$venv/bin/python" --require-hashes "$root/requirements.lock"
    # setuptools is among the locked packages, so that nothing unpinned is fetched here either
    attempt "installing vla" "${uv[@]}" install -q --python "$venv/bin/python" --no-deps --no-build-isolation \
        -e "$root" -e "$plugin"
}

# Also leaves their bytecode behind, which saves every later start seconds.
imports() { env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -I -c "
import gymnasium, lerobot.datasets, timm, torch, wandb
import torch._dynamo, transformers.models.bert.modeling_bert"; }

if [ "${BASH_SOURCE[0]}" != "$0" ]; then return; fi # sourced: the functions only, for tests

if is_complete; then say "ready" && exit; fi

if [ ! -w "$root" ] || { [ -e "$venv" ] && [ ! -w "$venv" ]; }; then
    fail "$root or its .venv is not writable for $(id -un)" "a folder of your own" \
        "remove .venv as its owner, or work in a copy of the repository"
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log
if command -v flock >/dev/null; then
    exec 9<"$root"
    flock -n 9 || { say "another set-up is at work: waiting" && flock 9; }
    if is_complete; then say "ready" && exit; fi
fi

require_python
[ "${MUJOCO_GL:-egl}" != egl ] || require_rendering opens_egl
# Without its stamp .venv is torn: a package may be half there, which no installer notices.
if [ ! -f "$stamp" ] || [ "$(head -1 "$stamp")" != "$root" ] || ! suits "$venv/bin/python"; then make_venv; fi
rm -f "$stamp"
install_packages
attempt "importing the packages" imports
require_rendering renders
recipe >"$stamp.new" && mv "$stamp.new" "$stamp"
say "ready"
