"""The lock file and the shell scripts; setup.sh is sourced, so that nothing is installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
STAMP = ROOT / ".venv" / ".complete"


def locked() -> list[Requirement]:
    """The requirements of the lock that apply to this platform."""
    lines = [line.removesuffix("\\").strip() for line in LOCK.splitlines() if "==" in line]
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def bash(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program after the functions of setup.sh, with `log` where a set-up would have it."""
    program = f'source "{ROOT}/scripts/setup.sh"; log=$(mktemp); trap "rm -f $log" EXIT; {program}'
    bash_path = shutil.which("bash") or "bash"
    return subprocess.run(
        [bash_path, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_executable_and_pass_shellcheck(script: Path) -> None:
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lock_pins_by_hash_and_names_no_host() -> None:
    assert not re.search(r"://|^-|file:|@ ", LOCK, flags=re.MULTILINE)
    blocks = [block for block in re.split(r"\n(?=\w)", LOCK) if not block.startswith("#")]
    assert len(blocks) > 50
    assert all("==" in block and "--hash=sha256:" in block for block in blocks)


def test_the_lock_satisfies_every_range_of_the_project() -> None:
    pins = {one.name.lower(): one for one in locked()}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(text)
        if wanted.name == PROJECT["name"]:
            continue
        (pin,) = pins[wanted.name.lower()].specifier
        assert wanted.specifier.contains(pin.version), text
    assert str(pins["mujoco"].specifier) == "==3.3.0"


def test_the_core_does_not_ask_for_the_extras() -> None:
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not core & {"lerobot", "wandb", "mujoco", "gymnasium", "av", "pyarrow"}


@pytest.mark.skipif(not STAMP.is_file(), reason="this environment was not made by scripts/setup.sh")
def test_the_environment_is_the_lock() -> None:
    wrong = {str(one): version(one.name) for one in locked() if version(one.name) not in one.specifier}
    assert wrong == {}


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """A PATH with broken shims instead of Python, and one Python inside pyenv's folder."""
    tools, pyenv = tmp_path / "tools", tmp_path / "pyenv" / "versions" / "3.12.9" / "bin"
    for folder in (tools, pyenv):
        folder.mkdir(parents=True)
    for name in ("bash", "cat", "dirname", "ls", "mktemp", "rm", "tail"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for name in ("python3", "python3.12", "python3.13"):
        (tools / name).write_text("#!/bin/sh\necho 'no version is selected' >&2\nexit 127\n")
        (tools / name).chmod(0o755)
    (pyenv / "python3").symlink_to(Path(sys.executable).resolve())
    return {
        "PATH": str(tools),
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv"),
        "HOME": str(tmp_path),
    }


def test_python_is_found_behind_broken_shims(elsewhere: dict[str, str]) -> None:
    done = bash("find_python", **elsewhere)
    assert done.stdout.strip() == f"{elsewhere['PYENV_ROOT']}/versions/3.12.9/bin/python3", done.stderr


def test_python_of_uv_is_found(elsewhere: dict[str, str], tmp_path: Path) -> None:
    uv = tmp_path / "uv" / "cpython-3.12.9-linux-x86_64-gnu" / "bin"
    uv.mkdir(parents=True)
    (uv / "python3").symlink_to(Path(sys.executable).resolve())
    done = bash("find_python", **elsewhere | {"PYENV_ROOT": str(tmp_path / "none")})
    assert done.stdout.strip() == str(uv / "python3"), done.stderr


def test_a_python_on_path_comes_first(elsewhere: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tools" / "python3").unlink()
    (tmp_path / "tools" / "python3").symlink_to(Path(sys.executable).resolve())
    assert bash("find_python", **elsewhere).stdout.strip() == str(tmp_path / "tools" / "python3")


def message(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    for word in ("got:", "expected:", "remedy:"):
        assert word in done.stderr
    return done.stderr


def test_without_python_the_message_says_what_to_install() -> None:
    done = bash("suits() { false; }; may_install() { false; }; minors='98 99'; require_python")
    text = message(done)
    assert "no Python 3.98 or 3.99" in text
    assert "apt-get install python3.12 python3.12-venv" in text


def test_a_python_without_ensurepip_is_named(elsewhere: dict[str, str], tmp_path: Path) -> None:
    bare = tmp_path / "tools" / "python3.12"
    bare.write_text("#!/bin/sh\ncase $3 in *ensurepip*) exit 1;; esac\n")
    elsewhere["PYENV_ROOT"] = str(tmp_path / "none")
    done = bash("suits() { false; }; may_install() { false; }; require_python", **elsewhere)
    assert "apt-get install python3.12-venv" in message(done)


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_without_egl_the_message_names_the_packages() -> None:
    program = """
    check() { echo 'libEGL.so.1: no such file'; false; }
    may_install() { false; }
    require_rendering check"""
    done = bash(program)
    text = message(done)
    assert "libEGL.so.1: no such file" in text
    assert "libegl1 libopengl0 libgl1-mesa-dri" in text


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_as_root_the_libraries_are_installed() -> None:
    program = """
    installed=no; check() { [ $installed = yes ]; }
    may_install() { true; }; apt_install() { echo "$*"; installed=yes; }
    require_rendering check"""
    done = bash(program)
    assert (done.returncode, done.stdout.strip()) == (0, "libegl1 libopengl0 libgl1-mesa-dri")


def test_a_changed_lock_or_place_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    program = f'venv="{tmp_path}"; stamp=$venv/.complete; '
    torn = bash(program + "is_complete")
    whole = bash(program + 'recipe >"$stamp"; is_complete')
    changed = bash(program + 'echo more >>"$stamp"; is_complete')
    assert (torn.returncode, whole.returncode, changed.returncode) == (1, 0, 1)


@pytest.mark.slow
@pytest.mark.skipif(not STAMP.is_file(), reason="this environment was not made by scripts/setup.sh")
def test_a_second_set_up_does_nothing(tmp_path: Path) -> None:
    if bash("is_complete").returncode != 0:
        pytest.skip(
            "the lock has changed since the set-up; running it here would change the packages under test"
        )
    before = STAMP.stat().st_mtime_ns
    done = subprocess.run([ROOT / "scripts" / "setup.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "setup: ready\n", "")
    assert STAMP.stat().st_mtime_ns == before


def test_what_is_measured_is_measured_in_one_process(tmp_path: Path) -> None:
    """Of several, what each has measured would be lost: scripts/test.sh takes two."""
    command = [sys.executable, "-m", "pytest", "-n2", "--faults", tmp_path / "faults.json", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--faults: got -n, expected one process" in done.stderr
    assert not (tmp_path / "faults.json").exists()
