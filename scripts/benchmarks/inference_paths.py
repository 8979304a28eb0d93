"""What inference.py measures: the networks with random weights, ours on every path, and the peers.

A candidate is a call: one observation of uint8 pictures, a state and a known instruction in the host's memory in,
a chunk of actions in the host's memory out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla.architecture import ImageConfig, ModelConfig, TextConfig
from vla.config import Job, TrainConfig
from vla.data.normalize import Statistics
from vla.manifest import read_manifest, seal
from vla.model.text import MINILM_PACKAGE
from vla.model.vla import VLA
from vla.observation import ACTION, STATE, Features, Tokens
from vla.policy import Policy
from vla.training import checkpoint

Call = Callable[[], Any]
TASK = "press the red button"
STATE_DIM, ACTION_DIM, FPS = 8, 7, 10
# scene -> size of the network, image backbone, cameras, pixels
SCENES = {
    "small": ("small", "scratch", 1, 128),
    "27 M": ("base", "scratch", 1, 128),
    "ViT-S, two cameras": ("base", "vit_small_patch16_224", 2, 224),
    "quick": ("tiny", "scratch", 1, 32),
}


def model_config(scene: str, decoding: str = "parallel") -> ModelConfig:
    """Text by MiniLM where it is installed: its features are computed once and then known."""
    size, backbone, _, pixels = SCENES[scene]
    text = TextConfig() if find_spec(MINILM_PACKAGE) else TextConfig("scratch", frozen=False)
    if scene == "quick":
        text = TextConfig("scratch", frozen=False, width=32, layers=1)
    image = ImageConfig(backbone, pixels)
    return ModelConfig(size=size, decoding=decoding, chunk_size=16, image=image, text=text)


def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    return Statistics.of({STATE: rng.normal(size=(99, STATE_DIM)), ACTION: rng.normal(size=(99, ACTION_DIM))})


def network(scene: str, decoding: str = "parallel") -> VLA:
    """Random weights, the same ones at every call."""
    _, _, cameras, pixels = SCENES[scene]
    features = Features({f"camera{i}": (pixels, pixels) for i in range(cameras)}, STATE_DIM, ACTION_DIM, FPS)
    torch.manual_seed(0)
    return VLA(model_config(scene, decoding), features, statistics(), instructions=[TASK]).eval()


def parameters(model: nn.Module) -> int:
    """Without the text encoder, which does not run again for a known instruction."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("text."))


def policy(model: VLA, device: str, precision: str, launch: str) -> Policy:
    return Policy(
        model, Job(model=model.config, train=TrainConfig(precision=precision)), device, launch=launch
    )


def observation(scene: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Noise: images camera -> (1, 1, h, w, 3), state (1, 1, P)."""
    rng, (_, _, cameras, pixels) = np.random.default_rng(0), SCENES[scene]
    shape = (1, 1, pixels, pixels, 3)
    images = {f"camera{i}": rng.integers(0, 256, shape, np.uint8) for i in range(cameras)}
    return images, np.zeros((1, 1, STATE_DIM), np.float32)


def call(some_policy: Any, scene: str) -> Call:
    images, state = observation(scene)
    return lambda: some_policy.predict_chunk(images, state, [TASK])


# --- peers -------------------------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """vla.model.transformer.Encoder by torch.nn.TransformerEncoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(**layer_options(config))
        norm = nn.LayerNorm(config.d_model)
        self.layers = nn.TransformerEncoder(layer, config.n_encoder_layers, norm, enable_nested_tensor=False)

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(self.layers(tokens.x, src_key_padding_mask=tokens.pad), tokens.pad)


class TorchDecoder(nn.Module):
    """vla.model.transformer.Decoder by torch.nn.TransformerDecoder."""

    mask: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(**layer_options(config))
        self.layers = nn.TransformerDecoder(layer, config.n_decoder_layers, nn.LayerNorm(config.d_model))
        mask = torch.ones(config.chunk_size, config.chunk_size, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, memory: Tokens) -> Tensor:
        return self.layers(
            x, memory.x, tgt_mask=self.mask, memory_key_padding_mask=memory.pad, tgt_is_causal=True
        )


def layer_options(config: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": config.d_model, "nhead": config.n_heads, "dim_feedforward": config.d_ff,
        "dropout": config.dropout, "activation": "gelu", "batch_first": True, "norm_first": True,
    }  # fmt: skip


def torch_network(scene: str) -> VLA:
    """Ours with its transformer written with torch.nn: the same tokens, head, sizes and number of parameters."""
    model = network(scene)
    ours = parameters(model)
    model.encoder, model.decoder = TorchEncoder(model.config), TorchDecoder(model.config)  # pyright: ignore
    assert parameters(model) == ours
    return model.eval()


def lerobot_act(scene: str, device: str, autocast: bool) -> tuple[Call, int]:
    """LeRobot's ACT at its own sizes, for these pictures and this chunk, and its parameters.

    Pictures become float in [0, 1] on the device; its normalisation is left out, in its favour. autocast: as
    its own programs do it with `policy.use_amp`.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    images, state = observation(scene)
    _, _, _, pixels = SCENES[scene]
    keys = {name: f"observation.images.{name}" for name in images}
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, pixels, pixels)) for key in keys.values()}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    config = ACTConfig(
        chunk_size=16, n_action_steps=16, pretrained_backbone_weights=None, device=device, input_features=inputs,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )  # fmt: skip
    torch.manual_seed(0)
    act = ACTPolicy(config).to(device).eval()

    @torch.inference_mode()
    def predict() -> np.ndarray:
        batch = {
            key: torch.from_numpy(images[name][0]).to(device).permute(0, 3, 1, 2).float() / 255
            for name, key in keys.items()
        }
        batch[STATE] = torch.from_numpy(state[0]).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            return act.predict_action_chunk(batch).float().cpu().numpy()

    return predict, sum(p.numel() for p in act.parameters())


# --- exports -----------------------------------------------------------------------------------


def saved(scene: str, folder: Path) -> Path:
    """The network as a run's output folder."""
    model = network(scene)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    job = Job(model=model.config)
    checkpoint.save(folder / "checkpoints", 0, job, model, statistics(), weights, {}, keep=1)
    return folder


def exports(scene: str, folder: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """format -> folder. ONNX is traced once; its other types are made from that, as scripts/export.py does."""
    from vla.export.export import export
    from vla.export.formats import FORMATS, POLICY

    source, made = saved(scene, folder / "run"), {}
    for name in formats:
        made[name] = folder / name
        if name in ("onnx", "aoti"):
            export(source, name, made[name])
            continue
        shutil.copytree(made["onnx"], made[name])
        FORMATS[name][0](made[name] / POLICY)
        seal(made[name], read_manifest(made[name], "export"))
    return made
