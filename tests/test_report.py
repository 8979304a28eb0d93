import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_env import ToyPolicy

from vla.config import EnvConfig, EvaluateConfig, Job, ModelConfig, dump
from vla.evaluation import Evaluation, evaluate
from vla.evaluation.charts import curve, even_ticks, log_ticks, short, thin
from vla.evaluation.report import EMBED_BYTES, write_report

REPO = Path(__file__).parent.parent
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """A page that is well formed, as the attributes of its tags."""

    VOID = ("meta", "rect", "line", "circle", "polyline")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A policy that fails where it begins left of the middle; two pairs, and single films besides."""

    class Clumsy(ToyPolicy):
        def predict_chunk(self, images: Any, state: Any, tasks: Any) -> np.ndarray:
            return super().predict_chunk(images, state, tasks) * (state[:, -1, 0] > -0.02)[:, None, None]

    config = EvaluateConfig(
        episodes=10, slots=5, workers=1, n_action_steps=4, videos=4,
        splits={"seen": {}, EVIL: {"phrasing": 1}},
    )  # fmt: skip
    output = str(tmp_path_factory.mktemp("evaluation"))
    return evaluate(
        Clumsy(), Job(output=output, env=EnvConfig("toy_env:Toy-v0"), evaluate=config), progress=False
    )


def metrics_file(folder: Path) -> Path:
    rows = [
        {"step": step, "loss": 2 / step, "lr": 1e-3, "samples_per_s": 700.0} for step in range(10, 500, 10)
    ]
    rows += [{"step": step, "success": 0.5} for step in (200, 400)]
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_report_is_one_file_with_films_and_curves(evaluation):
    folder = Path(evaluation.job.output)
    page = Page(write_report(evaluation.as_dict(folder), folder, metrics_file(folder)))
    films = page.of("video")
    assert len(films) == sum(row.video is not None for row in evaluation.rows) > 8
    for film in films:
        kind, _, content = (film["src"] or "").partition("base64,")
        assert kind == "data:video/mp4;"
        assert base64.b64decode(content)[4:8] == b"ftyp"
        assert {"autoplay", "muted", "loop", "playsinline"} <= set(film)
    figures = [figure["class"] for figure in page.of("figure")]
    assert figures.count("curve") == 4
    assert figures.count("film failure") > 0 < figures.count("film success")
    assert sum(part["class"] == "pair" for part in page.of("div") if "class" in part) == 2
    assert not page.of("script") + page.of("link") + page.of("img")  # nothing is fetched
    assert (folder / "report.html").stat().st_size < 16e6


def test_report_escapes_every_text(evaluation):
    folder = Path(evaluation.job.output)
    data = evaluation.as_dict(folder)
    data |= {
        "environment": f"m:{EVIL}",
        "checkpoint": {"path": EVIL, "sha256": EVIL},
        "versions": {EVIL: EVIL},
    }
    data["machine"] |= {"cpu": EVIL, "gpu": EVIL}
    data["config"] = {EVIL: EVIL}
    data["splits"]["seen"]["skills"] = {EVIL: data["splits"]["seen"], "other": data["splits"]["seen"]}
    for row in data["episodes"]:
        row["text"] = EVIL
    text = write_report(data, folder).read_text(encoding="utf-8")
    assert EVIL not in text
    assert text.count("&lt;script&gt;") > 15
    assert not Page(folder / "report.html").of("script")


def test_of_many_skills_the_one_that_fails_most_comes_first(evaluation):
    folder = Path(evaluation.job.output)
    data = evaluation.as_dict(folder)
    skills = {
        f"skill-{number:02}": data["splits"]["seen"] | {"success_rate": number * 7 % 50 / 50}
        for number in range(50)
    }
    data["splits"]["seen"]["skills"] = data["skills"] = skills
    data["time"]["parts"] = 3
    text = write_report(data, folder).read_text(encoding="utf-8")
    named = re.findall(r"<tr class='under'><td>(skill-\d+)", text)
    assert named == sorted(skills, key=lambda skill: skills[skill]["success_rate"])
    assert "in 3 parts" in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert all(" · reach" in caption for caption in captions if "outcome" in caption)
    Page(folder / "report.html")


def test_films_without_room_are_linked(evaluation, monkeypatch):
    folder = Path(evaluation.job.output)
    assert EMBED_BYTES * 4 / 3 < 16e6
    monkeypatch.setattr("vla.evaluation.report.EMBED_BYTES", 0)
    sources = {film["src"] for film in Page(write_report(evaluation.as_dict(folder), folder)).of("video")}
    assert sources == {row.video for row in evaluation.rows if row.video}


def test_evaluation_json(evaluation):
    folder = Path(evaluation.job.output)
    data = json.loads(evaluation.save(folder).read_text(encoding="utf-8"))
    first = [row for row in data["episodes"] if (row["split"], row["control"]) == ("seen", "standard")]
    assert data["n_episodes"] == len(first) == 10
    assert data["success_rate"] == sum(row["success"] for row in first) / 10 == evaluation.success_rate
    assert data["wilson_95"][0] < data["success_rate"] < data["wilson_95"][1]
    assert set(data["splits"]) == {"seen", EVIL}
    assert set(data["skills"]) == {"reach"}
    for name in ("counterfactual_pair_rate", "blank_instruction_rate", "shuffled_instruction_rate"):
        assert 0 <= data[name] <= 1
    assert {"seed", "task", "success", "steps", "split", "control", "skill"} <= set(first[0])
    assert data["versions"]["numpy"] == np.__version__
    assert 0 < data["time"]["env_share"] + data["time"]["policy_share"] <= 1
    assert str(folder.parent) not in json.dumps(data)


def test_curves():
    rising = [(float(step), float(step)) for step in range(1000)]
    assert len(thin(rising)) <= 250
    assert thin(rising)[-1] == rising[-1]
    assert curve("a", rising[:1], short) == ""
    assert 'points="56.0,106.0 506.0,12.0"' in curve("a", [(0, 1.0), (1, float("nan")), (2, 2.0)], short)
    assert even_ticks(0, 0.86) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert log_ticks(0.02, 0.5) == pytest.approx([0.03, 0.1, 0.3])
    assert [short(number) for number in (0, 2.5e-4, 0.25, 12, 1500, 2e6)] == [
        "0",
        "2.5e-4",
        "0.25",
        "12",
        "1.5k",
        "2M",
    ]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 2.0], [1e-9, 1e9], [5.0, 5.0]])
def test_any_values_are_drawn_inside_the_frame(values):
    drawn = curve("a", list(enumerate(values)), short, logarithmic=True)
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.-]+)", drawn.partition("polyline")[2])]
    assert len(heights) == 2
    assert all(0 <= y <= 230 for y in heights)


def script(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run scripts/evaluate.py as a user would, with an environment of his on the PYTHONPATH."""
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
    command = [sys.executable, str(REPO / "scripts" / "evaluate.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_script_replays_the_expert(tmp_path):
    config = EvaluateConfig(episodes=6, slots=3, workers=1, videos=2)
    job = Job(output="run", env=EnvConfig("toy_env:Toy-v0"), evaluate=config)
    (tmp_path / "job.yaml").write_text(dump(job))
    done = script("--expert", "job.yaml", "--evaluate.episodes=4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "expert"
    data = json.loads((folder / "evaluation.json").read_text())
    assert (data["success_rate"], data["n_episodes"], data["played_by"]) == (1.0, 4, "expert")
    assert Page(folder / "report.html").of("video")
    assert "100 %" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"), [((), "expected its folder first"), (("nowhere",), "got 'nowhere'")]
)
def test_script_without_a_checkpoint_says_so(tmp_path, arguments, says):
    done = script(*arguments, folder=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
    assert "remedy" in done.stderr
    assert "Traceback" not in done.stderr


def test_script_says_in_one_line_what_it_cannot_write(tmp_path):
    config = EvaluateConfig(episodes=1, slots=1, workers=1, videos=0, controls=False)
    (tmp_path / "job.yaml").write_text(dump(Job(env=EnvConfig("toy_env:Toy-v0"), evaluate=config)))
    done = script("--expert", "job.yaml", "--output=job.yaml", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("evaluate: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_script_evaluates_a_checkpoint(tmp_path):
    """An untrained network goes the whole way, with its own job changed from the command line."""
    import torch

    from vla.data.normalize import Statistics
    from vla.model.vla import VLA
    from vla.training import checkpoint

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    statistics = Statistics.of({key: rng.uniform(-1, 1, (50, 2)) for key in ("observation.state", "action")})
    model = ModelConfig(size="tiny", chunk_size=4, max_prefix=2)
    model = replace(model, image=replace(model.image, pixels=32, patch=8))
    config = EvaluateConfig(episodes=50, slots=3, workers=1, n_action_steps=4, videos=2)
    job = Job(output="run", env=EnvConfig("toy_env:Toy-v0"), model=model, evaluate=config)
    network = VLA(job.model, ToyPolicy.features, statistics)
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 7, job, network, statistics, {}, {}, 1)
    metrics_file(tmp_path / "run")
    done = script("run", "--evaluate.episodes=3", "--evaluate.device=cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert data["n_episodes"] == 3
    assert {row["control"] for row in data["episodes"]} == {"standard", "counterfactual", "shuffled", "blank"}
    weights = json.loads((path / "manifest.json").read_text())["sha256"]["model.safetensors"]
    assert data["checkpoint"] == {"type": "vla", "path": "checkpoints/step_00000007", "sha256": weights}
    assert len(Page(tmp_path / "run" / "report.html").of("figure")) > 4
