"""The rules that keep the folders readable: who imports whom, what the core needs, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Imports point left to right; modules in one row may know each other.
LAYERS = [
    {"__init__", "architecture", "captured", "checks", "compiling", "config", "observation", "environment", "device",
     "inputs", "manifest", "provenance", "rates", "system"},
    {"data"},
    {"model"},
    {"training"},
    {"policy", "fast_policy"},
    {"export"},
    {"serve"},
    {"control"},
    {"evaluation", "report", "explain"},
    {"lerobot_plugin"},
]  # fmt: skip
# What each kind of machine imports, and what must not be there for it: the extras of others.
EXTRAS = (
    "lerobot",
    "wandb",
    "mujoco",
    "gymnasium",
    "metaworld",
    "av",
    "pyarrow",
    "onnx",
    "onnxscript",
    "peft",
    "accelerate",
)
TORCH = ("torch", "timm", "transformers", "safetensors", "tqdm")
CONTROL = ("msgspec", "websockets", "ruckig", "rich")
CORES = {
    "policy": (("vla.model", "vla.training", "vla.policy"), (*EXTRAS, *CONTROL, "onnxruntime")),
    "control": (("vla.control", "vla.serve"), (*EXTRAS, *TORCH, "onnxruntime")),
    "exported": (("vla.export.load", "vla.export.onnx_policy", "vla.serve"), (*EXTRAS, *TORCH)),
}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "joblib", "marshal"}


def files(*folders: str) -> list[Path]:
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files under {folders}"
    return found


def imports(file: Path, root: Path = ROOT) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions and TYPE_CHECKING blocks too."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int:
    """The row of a module of vla, given as a dotted name; `vla.__version__` is row 0."""
    part = name.split(".")[1] if "." in name else "__init__"
    if not (ROOT / "vla" / part).exists() and not (ROOT / "vla" / f"{part}.py").exists():
        part = "__init__"  # a name defined in vla/__init__.py
    rows = [row for row, names in enumerate(LAYERS) if part in names]
    assert rows, f"vla.{part} has no place in LAYERS"
    return rows[0]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def wrong_imports(module: str, names: list[str]) -> list[str]:
    """The imports that point from right to left."""
    ours = [name for name in names if name.split(".")[0] == "vla"]
    return [name for name in ours if layer(name) > layer(module)]


@pytest.mark.parametrize("file", files("vla"), ids=module_of)
def test_imports_of_vla_point_left_to_right(file: Path) -> None:
    assert wrong_imports(module_of(file), list(imports(file))) == []


def test_a_wrong_import_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "vla" / "model" / "wrong.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "def f():\n    from vla.training import step\n    from ..config import load\n    import envs.a\n"
    )
    found = list(imports(file, tmp_path))
    assert found == ["vla.training.step", "vla.config.load", "envs.a"]
    assert wrong_imports("vla.model.wrong", found) == ["vla.training.step"]


@pytest.mark.parametrize("file", files("vla"), ids=module_of)
def test_vla_never_imports_envs_or_scripts(file: Path) -> None:
    assert not {name.split(".")[0] for name in imports(file)} & {"envs", "scripts", "tests"}


def test_envs_know_only_observations_of_vla_and_what_a_robot_is() -> None:
    for file in files("envs"):
        of_vla = {name for name in imports(file) if name.split(".")[0] == "vla"}
        allowed = {name for name in of_vla if name.startswith(("vla.observation", "vla.control.robot."))}
        assert of_vla == allowed, file


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning:vla", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("core", CORES)
def test_a_core_imports_without_the_extras_of_others(core: str) -> None:
    modules, absent = CORES[core]
    program = f"""
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*absent, "envs")}:
            raise ModuleNotFoundError(f"{{name}} is not in the core", name=name)
sys.meta_path.insert(0, Absent())
for name in {modules}:
    module = importlib.import_module(name)
    for _, child, _ in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(child)
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["control", "serve"])
def test_the_scripts_of_a_robot_need_no_more_than_its_core(script: str) -> None:
    """Up to where the robot's class is loaded, or the policy: a file that is not there is the error."""
    program = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*CORES["control"][1], "envs")}:
            raise ModuleNotFoundError(f"{{name}} is not in the core", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["scripts/{script}.py", "nowhere"]
runpy.run_path("scripts/{script}.py", run_name="__main__")
"""
    done = run("-c", program)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = {"control": "expected a YAML file", "serve": "expected what this policy runs on"}[script]
    assert expected in done.stderr, done.stderr


def test_importing_vla_is_cheap_and_its_words_need_no_torch() -> None:
    done = run("-c", "import sys, vla, vla.observation, vla.config; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


@pytest.mark.parametrize("name", ["train"])
def test_help_of_a_job(name: str) -> None:
    done = run(f"scripts/{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda file: file.stem)
def test_help_of_every_job(file: Path) -> None:
    done = run(str(file), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("file", files("vla", "envs", "scripts"), ids=module_of)
def test_a_file_has_one_job(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize("file", files("vla", "envs", "scripts"), ids=module_of)
def test_nothing_unpickles(file: Path) -> None:
    """A checkpoint or a message from elsewhere must not be able to run code."""
    assert not {name.split(".")[0] for name in imports(file)} & PICKLES
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.load"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"
