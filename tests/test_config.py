"""Configuration: YAML and --a.b=c, and one clear line for everything that can be wrong with them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla.config import SIZES, ConfigError, ImageConfig, Job, ModelConfig, TrainConfig, dump, load

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load(Job, list(argv))
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    for part in ("config: ", "got ", "expected ", "remedy: "):
        assert part in caught.value.code
    return caught.value.code


def test_nothing_given_is_the_default() -> None:
    assert load(Job, []) == Job()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "output: a\ntrain: {lr: 1e-3, steps: 7, betas: [0.8, 0.9], compile: true}\n"
        "data: {cameras: [front, wrist]}\nenv: {kwargs: {pixels: 64}}\nevaluate: {splits: {L0: {}, L1: {far: true}}}\n",
    )
    job = load(Job, [path, "--train.steps=9", "--seed", "3", "--model.size=tiny"])
    assert job.output == "a"
    assert (job.train.lr, job.train.steps, job.train.betas, job.train.compile) == (1e-3, 9, (0.8, 0.9), True)
    assert (job.data.cameras, job.env.kwargs, job.seed) == (("front", "wrist"), {"pixels": 64}, 3)
    assert job.evaluate.splits == {"L0": {}, "L1": {"far": True}}
    assert job.model.d_model == SIZES["tiny"]["d_model"]
    options = [
        "--data.cameras=[top]",
        "--env.kwargs={pixels: 32}",
        "--train.lr=3e-4",
        "--train.compile=false",
    ]
    job = load(Job, [path, *options])
    assert (job.data.cameras, job.env.kwargs, job.train.lr, job.train.compile) == (
        ("top",),
        {"pixels": 32},
        3e-4,
        False,
    )


def test_a_dumped_configuration_loads_as_it_was(tmp_path: Path) -> None:
    job = replace(
        load(Job, []),
        model=ModelConfig(size="tiny", d_ff=100, image=ImageConfig(pixels=64, stem="patch")),
        train=TrainConfig(lr=1e-7, betas=(0.5, 0.75), precision="bf16"),
    )
    assert load(Job, [write(tmp_path, dump(job))]) == job
    assert dump(job).startswith("# vla ")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_published_configurations_load(path: Path) -> None:
    assert load(Job, [str(path)]).output.startswith("outputs/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("outputt: x", "outputt: got 'an unknown field', expected one of output"),
        ("train: {stepz: 3}", "train.stepz: got 'an unknown field', expected one of steps"),
        ("model: {image: {pixel: 3}}", "model.image.pixel: got 'an unknown field', expected one of pixels"),
        ("train: {steps: many}", "train.steps: got 'many', expected a whole number"),
        ("train: {steps: 2.5}", "train.steps: got 2.5, expected a whole number"),
        ("seed: true", "seed: got True, expected a whole number"),
        ("train: {lr: fast}", "train.lr: got 'fast', expected a number"),
        ("train: {compile: 3}", "train.compile: got 3, expected true or false"),
        ("train: {betas: [0.9]}", "train.betas: got [0.9], expected a list of 2 values"),
        ("train: {betas: [0.9, a]}", "train.betas: got 'a', expected a number"),
        ("output:", "output: got None, expected text"),
        ("data: {cameras: [{}]}", "data.cameras: got {}, expected text"),
        ("train: 3", "train: got 3, expected fields with values"),
        ("train:", "train: got None, expected fields with values"),
        ("data: {cameras: front}", "data.cameras: got 'front', expected a list"),
        ("env: {kwargs: 3}", "env.kwargs: got 3, expected a mapping"),
        ("output: [x", "expected valid YAML"),
        ("- a", "file: got ['a'], expected fields with values"),
        ("", "file: got None, expected fields with values"),
        ("model: {d_model: 100, n_heads: 3}", "model.n_heads: got 3, expected a divisor of d_model=100"),
        ("model: {image: {pixels: 50}}", "model.image.pixels: got 50, expected a multiple of patch=16"),
    ],
)
def test_wrong_files_end_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("nowhere.yaml", "file: got 'nowhere.yaml', expected a YAML file"),
        (".", "file: got '.', expected a YAML file"),
        ("--stepz=3", "stepz: got 'an unknown field'"),
        ("--train.stepz=3", "train.stepz: got 'an unknown field', expected one of steps"),
        ("--train.steps.x=3", "train.steps.x: got 'an unknown field', expected nothing below train.steps"),
        ("--train.steps=many", "train.steps: got 'many', expected a whole number"),
        ("--train.steps=", "train.steps: got None, expected a whole number"),
        ("--train.steps", "--train.steps: got 'no value', expected --train.steps=<value>"),
        ("--train=3", "train: got 3, expected fields with values"),
        ("--data.cameras=front", "data.cameras: got 'front', expected a list"),
        ("--env.kwargs={", "env.kwargs: got '{', expected a value in YAML's notation"),
        ("-x", "argument: got '-x', expected --a.b=c"),
        ("--model.size=huge", "model.size: got 'huge', expected one of tiny, small, base"),
        ("--model.n_heads=3", "model.n_heads: got 3, expected a divisor of d_model=256"),
        ("--model.image_heads=5", "model.image_heads: got 5, expected a divisor of image_width=192"),
        ("--model.max_prefix=16", "model.max_prefix: got 16, expected 0 ≤ max_prefix < chunk_size=16"),
        (
            "--model.image.conditioning=lift",
            "model.image.conditioning: got 'lift', expected one of film, none",
        ),
        (
            "--evaluate.n_action_steps=17",
            "evaluate.n_action_steps: got 17, expected at most model.chunk_size=16",
        ),
        ("--train.lr=-1", "train.lr: got -1.0, expected a positive number"),
        ("--train.betas=[0.9, 1.5]", "train.betas: got (0.9, 1.5), expected two decays"),
        ("--train.precision=fp8", "train.precision: got 'fp8', expected one of auto, fp32, bf16"),
        ("--data.start_share=2", "data.start_share: got 2.0, expected a share"),
    ],
)
def test_wrong_arguments_end_in_one_line(argument: str, expected: str) -> None:
    assert expected in refusal(argument)


def test_a_file_behind_the_options_is_refused(tmp_path: Path) -> None:
    assert "the YAML file comes first" in refusal("--seed=3", write(tmp_path, "seed: 1"))


def test_a_configuration_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="model.n_heads: got 3"):
        ModelConfig(n_heads=3)


def run(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, "-c", program, *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_reading_a_configuration_imports_nothing_heavy() -> None:
    program = """
import sys
from vla.config import Job, load
load(Job, ["configs/quickstart.yaml", "--train.steps=3"])
print({"torch", "lerobot", "timm", "transformers", "wandb", "mujoco", "gymnasium"} & set(sys.modules))
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_a_script_ends_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    script = "import runpy, sys; sys.argv[0] = 'scripts/train.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    wrong = run(script, "--train.stepz=3")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("config: train.stepz: got")
    assert wrong.stderr.count("\n") == 1
    missing = run(script, f"--output={tmp_path}/run", "--train.device=cpu")
    assert missing.returncode == 1
    assert missing.stderr.startswith("train: ")
    assert "remedy" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert run(script, "--help").returncode == 0


def table_of_systems() -> list[list[str]]:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.partition("## The systems of the network")[2].partition("\n## ")[0]
    return [
        line.split("|")[1:-1] for line in section.splitlines() if "`--model" in line or "`--train" in line
    ]


def test_the_readmes_options_are_options() -> None:
    rows = table_of_systems()
    assert len(rows) > 15
    for row in rows:
        load(Job, row[2].strip(" `").split())
