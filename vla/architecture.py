"""The configuration of the network: every system of the mission is a field here.

Variants are names, each of which one dict in vla/model/ turns into a class. Sizes that the data
knows (cameras, state and action dimensions) are not configured. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from vla.checks import one_of, require

# Transformer and from-scratch ViT sizes; parameters without the text encoder.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(d_model=128, n_heads=4, d_ff=384, n_encoder_layers=2, n_decoder_layers=2,
                 image_width=128, image_depth=2, image_heads=4),
    "small": dict(d_model=256, n_heads=8, d_ff=1024, n_encoder_layers=4, n_decoder_layers=4,
                  image_width=192, image_depth=6, image_heads=6),
    "base": dict(d_model=384, n_heads=6, d_ff=1536, n_encoder_layers=4, n_decoder_layers=4,
                 image_width=256, image_depth=8, image_heads=8),
}  # fmt: skip


def require_positive(field_name: str, got: float) -> None:
    require(0 < got < math.inf, field_name, got, "a positive number")


@dataclass(frozen=True)
class ResamplerConfig:
    """Learned, instruction-conditioned queries that read each image's tokens and replace them."""

    tokens: int = 0  # per image; 0 keeps the backbone's own
    layers: int = 2

    def __post_init__(self) -> None:
        require(self.tokens >= 0, "model.image.resampler.tokens", self.tokens, "0 or more")
        require_positive("model.image.resampler.layers", self.layers)


@dataclass(frozen=True)
class ImageConfig:
    """Image tokens: `scratch` is a timm ViT at the model size's width and depth."""

    backbone: str = "scratch"  # or any timm name that yields a token grid
    pixels: int = 128  # side of the square image given to the backbone
    patch: int = 16  # scratch only
    stem: str = "conv"  # scratch only: conv | patch
    conditioning: str = "film"  # of image tokens on the instruction: film | none
    pretrained: bool = False
    frozen: bool = False  # needs weights: pretrained, or train.init
    lr_multiplier: float = 1.0
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)

    def __post_init__(self) -> None:
        one_of("model.image.stem", self.stem, ("conv", "patch"))
        one_of("model.image.conditioning", self.conditioning, ("film", "none"))
        for name in ("pixels", "patch", "lr_multiplier"):
            require_positive(f"model.image.{name}", getattr(self, name))
        if self.backbone != "scratch":
            return
        require(
            self.pixels % self.patch == 0,
            "model.image.pixels", self.pixels, f"a multiple of patch={self.patch}",
        )  # fmt: skip
        require(
            self.stem == "patch" or self.patch in (4, 8, 16, 32),
            "model.image.patch", self.patch, "4, 8, 16 or 32 with stem=conv",
        )  # fmt: skip
        require(
            not self.pretrained,
            "model.image.pretrained", True, "False with backbone=scratch", "name a timm backbone",
        )  # fmt: skip
        patches = (self.pixels // self.patch) ** 2
        require(
            self.resampler.tokens <= patches,
            "model.image.resampler.tokens", self.resampler.tokens,
            f"at most the {patches} tokens of a {self.pixels} px image in patches of {self.patch}",
            "take fewer, smaller patches, or larger images",
        )  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Text tokens: `minilm` is all-MiniLM-L6-v2 from its installed package, else from the hub."""

    encoder: str = "minilm"  # or a local folder, or a hub name, or scratch: a BERT of the sizes below
    frozen: bool = True
    lr_multiplier: float = 0.1  # when not frozen
    max_tokens: int = 32
    width: int = 128  # scratch only, as are the next three
    layers: int = 2
    heads: int = 4
    # Its dropout is BERT's own, 0.1.
    vocabulary: int = 1000  # WordPieces learned from the dataset's instructions, at most

    def __post_init__(self) -> None:
        for name in ("max_tokens", "lr_multiplier"):
            require_positive(f"model.text.{name}", getattr(self, name))
        if self.encoder != "scratch":
            return
        require(
            not self.frozen, "model.text.frozen", True, "False with encoder=scratch",
            "set model.text.frozen=false and model.text.lr_multiplier=1, it has nothing to keep",
        )  # fmt: skip
        for name in ("width", "layers", "vocabulary"):
            require_positive(f"model.text.{name}", getattr(self, name))
        require(
            self.heads > 0 and self.width % self.heads == 0,
            "model.text.heads", self.heads, f"a divisor of width={self.width}",
        )  # fmt: skip


@dataclass(frozen=True)
class AttentionConfig:
    """Self-attention of the encoder. full: every token to every token, the others for long sequences."""

    kind: str = "full"  # full | window | linformer | lsh
    window: int = 128  # window: tokens seen to either side
    rank: int = 128  # linformer: length that keys and values are projected to
    chunk: int = 64  # lsh: sorted tokens that attend together, and to the chunk before
    hashes: int = 2  # lsh: rounds of hashing

    def __post_init__(self) -> None:
        one_of("model.attention.kind", self.kind, ("full", "window", "linformer", "lsh"))
        for name in ("window", "rank", "chunk", "hashes"):
            require_positive(f"model.attention.{name}", getattr(self, name))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) on frozen parts; the rest of the network trains as before."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # an adapter's output counts alpha / rank
    dropout: float = 0.0
    on: tuple[str, ...] = ("text",)  # text | image | trunk (encoder and decoder)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank", self.rank, "0 or more")
        require_positive("model.lora.alpha", self.alpha)
        require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "a share in [0, 1)")
        require(len(self.on) > 0, "model.lora.on", list(self.on), "at least one of text, image, trunk")
        for part in self.on:
            one_of("model.lora.on", part, ("text", "image", "trunk"))


@dataclass(frozen=True)
class ModelConfig:
    """The network of the mission; numbers left at 0 come from SIZES[size]."""

    size: str = "small"
    chunk_size: int = 16
    n_obs_steps: int = 1
    normalization: str = "mean_std"  # of states and actions: mean_std | min_max | quantiles
    norm: str = "pre"  # pre | post
    positions: str = "learned"  # of action tokens: sinusoidal | learned
    activation: str = "gelu"  # gelu | relu | swiglu
    dropout: float = 0.0
    fusion: str = "concat"  # concat: one sequence | cross: image and state tokens attend to words
    decoding: str = "parallel"  # parallel: all actions in one pass | autoregressive: each from those before
    head: str = "l1"  # l1 | bins | gmm | flow
    bins: int = 256  # bins: per action dimension
    components: int = 5  # gmm: of each action's mixture
    flow_steps: int = 10  # flow: of Euler's method, from noise to actions
    flow_layers: int = 2  # flow: causal layers that see the noisy chunk
    max_prefix: int = 8  # longest committed prefix drawn in training
    prefix_probability: float = 0.25  # share of training samples that carry one
    camera_dropout: float = 0.0  # share of training samples that miss one of their cameras
    auxiliary: float = 0.0  # weight of a training-only loss on where things are; 0: none
    # Of image backbone (where timm can), encoder, decoder and flow: forget activations and compute them again
    # going backward; parts of the sequence that the feed-forward layers handle in turn.
    checkpointing: bool = False
    feed_forward_chunks: int = 1
    d_model: int = 0
    n_heads: int = 0
    d_ff: int = 0
    n_encoder_layers: int = 0
    n_decoder_layers: int = 0
    image_width: int = 0
    image_depth: int = 0
    image_heads: int = 0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        one_of("model.size", self.size, SIZES)
        for name, value in SIZES[self.size].items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        one_of("model.normalization", self.normalization, ("mean_std", "min_max", "quantiles"))
        one_of("model.norm", self.norm, ("pre", "post"))
        one_of("model.positions", self.positions, ("sinusoidal", "learned"))
        one_of("model.activation", self.activation, ("gelu", "relu", "swiglu"))
        one_of("model.fusion", self.fusion, ("concat", "cross"))
        one_of("model.decoding", self.decoding, ("parallel", "autoregressive"))
        one_of("model.head", self.head, ("l1", "bins", "gmm", "flow"))
        require(
            self.decoding == "parallel" or self.head != "flow",
            "model.decoding", self.decoding, "parallel with head=flow, which makes the chunk as a whole",
            "set model.decoding=parallel, or take another head",
        )  # fmt: skip
        for name in ("chunk_size", "n_obs_steps", "components", "flow_steps", "flow_layers",
                     "feed_forward_chunks", *SIZES[self.size]):  # fmt: skip
            require_positive(f"model.{name}", getattr(self, name))
        require(self.bins > 1, "model.bins", self.bins, "2 or more")
        require(
            0 <= self.max_prefix < self.chunk_size,
            "model.max_prefix", self.max_prefix, f"0 ≤ max_prefix < chunk_size={self.chunk_size}",
        )  # fmt: skip
        for name in ("prefix_probability", "camera_dropout"):
            require(0 <= getattr(self, name) <= 1, f"model.{name}", getattr(self, name), "a share in [0, 1]")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a share in [0, 1)")
        require(0 <= self.auxiliary < math.inf, "model.auxiliary", self.auxiliary, "0 or more")
        for width, heads in (("d_model", "n_heads"), ("image_width", "image_heads")):
            d, n = getattr(self, width), getattr(self, heads)
            require(d % n == 0, f"model.{heads}", n, f"a divisor of {width}={d}")

    @property
    def deployed(self) -> ModelConfig:
        """Of the network that acts: adapters are merged, and what only training needs is left out."""
        return replace(self, lora=LoraConfig(), auxiliary=0.0)
