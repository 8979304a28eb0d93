"""Calls of fixed shapes: the same bits as the network asked directly, and nothing that a CUDA graph cannot hold."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_policy import TASKS, B, make_policy, observe, two_cameras
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import toy_job, toy_model, toy_store

from vla import compiling, fast_policy, policy
from vla.config import ConfigError
from vla.device import autocast
from vla.fast_policy import Buffers, Shape, input_fields
from vla.model.text import TextCache
from vla.model.vla import VLA
from vla.observation import IMAGES, STATE, Features, Observation, Tokens
from vla.policy import Policy

A, H = 2, 4
TEXTS = ["reach red", "go to the blue target", "reach green", "", "reach red " * 7]
EVERY = [("parallel", head) for head in ("l1", "bins", "gmm", "flow")] + [
    ("autoregressive", head) for head in ("l1", "bins", "gmm")
]


def network(**options: Any) -> VLA:
    features = Features(dict.fromkeys(("front", "wrist"), (32, 32)), 2, A, 10)
    torch.manual_seed(0)
    return VLA(toy_model(**options), features, toy_store().statistics()).eval()


def asked(rng: np.random.Generator, cameras: int = 2) -> dict[str, Any]:
    """Anything that a robot may ask of a policy with two cameras and camera_dropout."""
    b, sides = int(rng.integers(1, 4)), [(32, 32), (24, 40)]
    side = sides[rng.integers(2)]
    images = {n: rng.integers(0, 256, (b, 1, *side, 3), np.uint8) for n in ("front", "wrist")[:cameras]}
    if rng.random() < 0.5:
        del images[("front", "wrist")[rng.integers(2)]]
    call: dict[str, Any] = {"images": images, "state": rng.normal(size=(b, 1, 2)).astype(np.float32)}
    call["tasks"] = [TEXTS[i] for i in rng.integers(0, len(TEXTS), b)]
    if rng.random() < 0.5:
        call["prefix"] = rng.normal(size=(b, H, A)).astype(np.float32)
        call["prefix_length"] = rng.integers(0, 3, b)
    return call


@torch.inference_mode()
def directly(model: VLA, text: TextCache, precision: str, call: dict[str, Any]) -> np.ndarray:
    """The network asked without buffers, its weights as they were trained."""
    images = call["images"]
    every = {n: images.get(n, np.zeros_like(next(iter(images.values())))) for n in ("front", "wrist")}
    absent = torch.tensor([[n not in images for n in every]] * len(call["tasks"]))
    observation = Observation(
        {n: torch.from_numpy(x).permute(0, 1, 4, 2, 3) for n, x in every.items()},
        torch.from_numpy(call["state"]), text(call["tasks"]), absent if absent.any() else None,
    )  # fmt: skip
    prefix = [torch.from_numpy(call[n]) for n in ("prefix", "prefix_length") if n in call]
    with autocast(torch.device("cpu"), precision):
        return model.predict_chunk(observation, *prefix).float().numpy()


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calls_in_any_order_give_the_bits_of_the_network_itself(precision: str, decoding: str) -> None:
    model = network(camera_dropout=0.3, decoding=decoding)
    ours = Policy(model, toy_job(Path(), model.config, precision=precision), "cpu")
    text, rng = TextCache(model.text), np.random.default_rng(0)
    kept = []
    for _ in range(15):
        call = asked(rng)
        expected = directly(model, text, precision, call)
        kept.append((ours.predict_chunk(**call), expected))
        np.testing.assert_array_equal(*kept[-1])
    for got, expected in kept:  # later calls leave earlier answers alone
        np.testing.assert_array_equal(got, expected)
    assert next(model.head.parameters()).dtype == torch.float32  # the caller's network is as it was


def test_words_padded_to_the_most_there_may_be_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where an instruction of another length must not make another graph."""
    model, rng = network(camera_dropout=0.3), np.random.default_rng(1)
    plain, padded = (Policy(model, toy_job(Path(), model.config), "cpu") for _ in range(2))
    monkeypatch.setattr(padded, "_words", lambda text: model.config.text.max_tokens)
    for _ in range(15):
        call = asked(rng)
        np.testing.assert_allclose(padded.predict_chunk(**call), plain.predict_chunk(**call), atol=1e-5)
    assert {shape.words for shape in padded.calls} == {model.config.text.max_tokens}
    assert len({shape.words for shape in plain.calls}) > 1


def test_inputs_lie_side_by_side_and_keep_their_place() -> None:
    model = network(camera_dropout=0.3)
    fields = input_fields(model, Shape(3, 8, ((32, 32), (24, 40))))
    assert sorted(fields) == sorted(
        (IMAGES + "front", IMAGES + "wrist", STATE, "prefix", "prefix_length", "absent")
    )
    buffers, rng = Buffers(fields, torch.device("cpu")), np.random.default_rng(0)
    written = {name: rng.integers(0, 2, shape) for name, (shape, _) in fields.items()}
    places = {name: tensor.data_ptr() for name, tensor in buffers.tensors.items()}
    for name, array in buffers.arrays.items():
        np.copyto(array, written[name], casting="unsafe")
    buffers.send()
    for name, (shape, dtype) in fields.items():
        tensor = buffers.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype, tensor.data_ptr()) == (shape, dtype, places[name])
        assert (tensor.data_ptr() - buffers.device.data_ptr()) % fast_policy.ALIGNED == 0
        np.testing.assert_array_equal(tensor.numpy(), written[name].astype(tensor.numpy().dtype))


class HostReads(TorchDispatchMode):
    """Notes what waits for the device, and what comes from the host: neither can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values(), result) if isinstance(x, Tensor) and x.ndim > 0]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(f"{func} from {[x.device.type for x in tensors]}")
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.found.append(str(func))
        return result


def on_fake_gpu(call: Callable[[VLA, dict[str, Tensor], Tokens], Any], **options: Any) -> list[str]:
    """What `call` does that a CUDA graph cannot hold. No GPU is needed: nothing is computed."""
    model = network(camera_dropout=0.3, **options)
    shape, text = Shape(2, 32, ((32, 32), (24, 40))), model.text
    del model.text
    mode = FakeTensorMode()
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            with mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            delattr(module, name)
            module.register_buffer(name, fake)
    with mode, torch.inference_mode():
        fields = input_fields(model, shape).items()
        inputs = {name: torch.zeros(size, dtype=dtype, device="cuda") for name, (size, dtype) in fields}
        words = Tokens(
            torch.zeros(2, 32, text.width, device="cuda"),
            torch.zeros(2, 32, dtype=torch.bool, device="cuda"),
        )
        with HostReads() as reads, autocast(torch.device("cuda"), "bf16"):
            call(model, inputs, words)
    return reads.found


def predict(model: VLA, inputs: dict[str, Tensor], words: Tokens) -> Tensor:
    images = {n: inputs[IMAGES + n].permute(0, 1, 4, 2, 3) for n in ("front", "wrist")}
    observation = Observation(images, inputs[STATE], words, inputs["absent"])
    chunk = model.predict_chunk(observation, inputs["prefix"], inputs["prefix_length"])
    assert (chunk.device.type, tuple(chunk.shape)) == ("cuda", (2, H, A))
    return chunk


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
@pytest.mark.parametrize(("decoding", "head"), EVERY)
def test_nothing_waits_for_a_gpu(decoding: str, head: str) -> None:
    assert on_fake_gpu(predict, decoding=decoding, head=head) == []


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_what_waits_for_a_gpu_is_noticed() -> None:
    assert on_fake_gpu(lambda m, inputs, words: inputs["prefix"].to("cpu"))
    assert on_fake_gpu(lambda m, inputs, words: torch.ones(3, device="cpu").to("cuda"))
    with pytest.raises(Exception, match="_local_scalar_dense|data-dependent|nonzero"):
        on_fake_gpu(lambda m, inputs, words: inputs["prefix"].sum().item())


@pytest.mark.parametrize(("decoding", "head"), EVERY)
def test_the_network_is_one_graph_for_the_compiler(
    decoding: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(function: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(fast_policy, "compiled", traced)
    job = toy_job(Path(), toy_model(decoding=decoding, head=head))
    model = VLA(job.model, toy_store().features, toy_store().statistics())
    images, state = observe()
    eager, compiled = (Policy(model, job, "cpu", launch=name) for name in ("eager", "compiled"))
    prefix = np.random.default_rng(0).normal(size=(B, H, A)), np.array([0, 2, 1])
    for tasks in (TASKS, TEXTS[1:4]):
        expected = eager.predict_chunk(images, state, tasks, *prefix)
        np.testing.assert_allclose(compiled.predict_chunk(images, state, tasks, *prefix), expected, atol=1e-5)
    assert len(compiled.calls) == 1


def test_shapes_are_kept_and_compiled_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(fast_policy, "compiled", lambda function: made.append(function) or function)
    monkeypatch.setattr(policy, "SHAPES", 3)
    monkeypatch.setattr(policy, "COMPILED", 2)
    job = toy_job(Path(), toy_model())
    ours = Policy(
        VLA(job.model, toy_store().features, toy_store().statistics()), job, "cpu", launch="compiled"
    )
    for b in (1, 2, 3, 4, 5, 1):
        images, state = observe(n=b)
        expected = make_policy().predict_chunk(images, state, ["reach red"] * b)
        assert ours.predict_chunk(images, state, ["reach red"] * b).shape == expected.shape
        assert len(ours.calls) <= 3
    assert len(made) == 2


def test_warming_up_prepares_the_shape_that_comes() -> None:
    ours = two_cameras(camera_dropout=0.3)
    ours.warm_up(2)
    before = list(ours.calls)
    images, state = observe(n=2)
    ours.predict_chunk(images | {"wrist": images["front"]}, state, ["reach red"] * 2)
    assert list(ours.calls) == before


def test_launches_have_names() -> None:
    job = toy_job(Path())
    model = VLA(job.model, toy_store().features, toy_store().statistics())
    with pytest.raises(ConfigError, match="launch: got 'fast', expected one of auto, eager, graph, compiled"):
        Policy(model, job, "cpu", launch="fast")
    assert Policy(model, job, "cpu", launch="auto").launch == "eager"


def test_compiled_code_lies_where_others_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "chosen"))
    compiling.keep_on_disk()
    assert os.environ[compiling.CACHE] == str(tmp_path / "chosen")
    monkeypatch.delenv(compiling.CACHE)
    compiling.keep_on_disk()
    folder = Path(os.environ[compiling.CACHE])
    assert folder == tmp_path / "vla" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(compiling.CACHE, default_cache_dir())  # as importing torch's compiler does
    compiling.keep_on_disk()
    assert Path(os.environ[compiling.CACHE]) == folder
    monkeypatch.delenv(compiling.CACHE)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match=r"compiled code: got .*others can write.*remedy: set TORCHINDUCTOR"):
        compiling.keep_on_disk()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="compiled code: got .*remedy"):
        compiling.keep_on_disk()


PROGRAM = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_fast_policy import toy_job, toy_model, toy_store, observe, Policy, VLA, np, torch
from torch._dynamo.utils import counters
job = toy_job(Path(), toy_model(dropout=0.0))
torch.manual_seed(0)
model = VLA(job.model, toy_store().features, toy_store().statistics())
call = (*observe(n=1), ["reach red"])
eager, ours = (Policy(model, job, "cpu", launch=name).predict_chunk(*call) for name in ("eager", "compiled"))
np.testing.assert_allclose(ours, eager, atol=1e-4)
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_the_second_start_reads_what_the_first_compiled(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != compiling.CACHE} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    root = Path(__file__).resolve().parents[1]
    for hits in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (done.returncode, done.stdout.strip()) == (0, hits), done.stderr
    assert any((tmp_path / "vla" / "compiled").iterdir())
