"""scripts/ablate.py: finished runs stay, interrupted ones go on, the table says mean and spread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from load_script import SCRIPTS, load_script

ablate = load_script("ablate")


def test_mean_and_spread_over_seeds() -> None:
    def made(seed: int, success: float) -> dict[str, Any]:
        rates = dict.fromkeys(ablate.RATES, 0.5) | {"success_rate": success}
        return {
            "seed": seed,
            "n_episodes": 4,
            "wilson_95": [0, 1],
            "samples_per_s": 100.0 * (seed + 1),
        } | rates

    runs = [made(0, 0.2), made(1, 0.4), made(2, 0.6)]
    summary = ablate.summary(runs)
    assert summary["mean"]["success_rate"] == pytest.approx(0.4)
    assert summary["std"]["success_rate"] == pytest.approx(0.2)
    row = ablate.table([{"variant": "x", "runs": runs} | summary]).splitlines()[-1]
    assert row == "| x | 3 | 40% ± 20 | 50% ± 0 | 50% ± 0 | 200 |"
    assert ablate.summary(runs[:1])["std"]["success_rate"] is None
    unknown = [run | {"blank_instruction_rate": None} for run in runs]
    row = ablate.table([{"variant": "x", "runs": runs} | ablate.summary(unknown)]).splitlines()[-1]
    assert row == "| x | 3 | 40% ± 20 | 50% ± 0 | – | 200 |"


def test_variants_have_folders_of_their_own() -> None:
    path = SCRIPTS.parent / "configs" / "ablations" / "quickstart.yaml"
    ablation = ablate.from_command_line([str(path)])
    jobs = [ablation.job(name, seed) for name in ablation.variants for seed in ablation.seeds]
    assert len({job.output for job in jobs}) == len(jobs) == 24
    assert len({repr(job.model) for job in jobs}) == len(ablation.variants)  # no variant equals another


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / "ablate.py", path], cwd=SCRIPTS.parent, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: []", "seeds"),
        ("variants: {}", "variants"),
        ("at_once: 0", "at_once"),
        ("variants: {a: --model.head=bins}", "variants"),
        ("variants: {'a, b': [], 'a b': []}", "variants"),
        ("variants: {a: [--model.head=crystal]}", "model.head"),
    ],
)
def test_wrong_ablations_end_with_one_line(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "ablation.yaml"
    lines = {"base": "base: configs/quickstart.yaml", "variants": "variants: {a: []}"}
    lines |= {"output": f"output: {tmp_path}/out", "results": f"results: {tmp_path}/r.json"}
    lines[change.partition(":")[0]] = change
    path.write_text("\n".join(lines.values()))
    done = run(path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_finished_runs_stay(tmp_path: Path) -> None:
    """A press task of a few demonstrations; the second call, with one more variant, makes that one only."""
    base = tmp_path / "base.yaml"
    base.write_text(
        f"output: {tmp_path}/base\n"
        "env: {id: 'envs:Tabletop-v0', kwargs: {skills: [press], cameras: [front], pixels: 32, row: 0.03}}\n"
        "record: {episodes: 4, workers: 1}\n"
        "model: {size: tiny, chunk_size: 4, max_prefix: 2, image: {pixels: 32}}\n"
        "train: {steps: 2, batch_size: 4, wandb: disabled, threads: 1}\n"
        "evaluate: {episodes: 2, n_action_steps: 4, videos: 0, workers: 1, slots: 2}\n"
    )
    path, results = tmp_path / "ablation.yaml", tmp_path / "results.json"

    def ablation(variants: str, seeds: list[int]) -> list[dict[str, Any]]:
        path.write_text(
            f"base: {base}\noutput: {tmp_path}/out\nresults: {results}\nseeds: {seeds}\nat_once: 2\n"
            f"variants: {{{variants}}}\n"
        )
        done = run(path)
        assert done.returncode == 0, done.stderr
        return json.loads(results.read_text())["rows"]

    (first,) = ablation("plain: []", [0, 1])
    assert [r["seed"] for r in first["runs"]] == [0, 1]
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("evaluation.json")}
    assert len(made) == 2
    rows = ablation("plain: [], bins: [--model.head=bins]", [0])
    assert {row["variant"] for row in rows} == {"plain", "bins"}
    assert all(p.stat().st_mtime_ns == before for p, before in made.items())
    changed = path.read_text().replace("bins: [--model.head=bins]", "bins: [--model.head=gmm]")
    path.write_text(changed)
    done = run(path)  # not what these folders were made by
    assert done.returncode != 0
    assert "model.head: got 'gmm', expected bins" in done.stderr
    assert "Traceback" not in done.stderr
    assert "train" in (tmp_path / "out" / "bins_0" / "log.txt").read_text()
