"""The resampler: against torch.nn's attention, conditioning, images apart, gradients, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import parity
from torch import Tensor, nn
from torch.nn import functional as F

from vla.config import ConfigError, ImageConfig, ModelConfig, ResamplerConfig
from vla.explain.maps import weights
from vla.model.parameters import initialise_network
from vla.model.resampler import RESAMPLERS, AllTokens, Resampler

B, IMAGES, V, N, D, TEXT_WIDTH = 2, 3, 16, 5, 128, 16


def resampler(tokens: int = N, layers: int = 2, **options: object) -> Resampler:
    torch.manual_seed(0)
    image = ImageConfig(pixels=64, resampler=ResamplerConfig(tokens, layers))
    module = Resampler(ModelConfig(size="tiny", image=image, **options), TEXT_WIDTH, V)
    initialise_network(module)
    return module.eval()


def inputs() -> tuple[Tensor, Tensor]:
    """Three images for each of two instructions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, IMAGES, V, D, generator=generator), torch.randn(B, TEXT_WIDTH, generator=generator)


def reference(module: Resampler, image: Tensor, instruction: Tensor) -> Tensor:
    """One image (V, D) under one instruction, by torch.nn's attention and the written formulas."""
    x = module.queries + module.instruction(instruction)  # (N, D)
    image = module.image_norm(image)
    for layer in module.layers:
        ours = layer.attention
        theirs = nn.MultiheadAttention(D, ours.n_heads, dtype=image.dtype)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        x = x + theirs(layer.around_attention.norm(x), image, image)[0]
        up, out = layer.feed_forward.up, layer.feed_forward.out
        x = x + out(F.gelu(up(layer.around_feed_forward.norm(x))))
    return module.norm(x)


def test_it_is_the_formula_on_every_image_alone() -> None:
    module = resampler().double()
    images, instruction = (x.double() for x in inputs())
    got = module(images, instruction)
    assert got.shape == (B, IMAGES, N, D)
    for b in range(B):
        for i in range(IMAGES):
            expected = reference(module, images[b, i], instruction[b])
            parity("resampler", "torch.nn.MultiheadAttention", got[b, i], expected, 1e-12)


def test_an_image_changes_its_own_tokens_only() -> None:
    module, (images, instruction) = resampler(), inputs()
    before = module(images, instruction)
    images[1, 2] = images[1, 2].flip(0, 1)
    changed = (module(images, instruction) - before).abs().amax(dim=(2, 3)) > 1e-6  # (B, I)
    assert changed.tolist() == [[False, False, False], [False, False, True]]


def looked_at(module: Resampler, queries: Tensor, image: Tensor) -> Tensor:
    """Where the first layer's queries (N, D) look in an image (V, D)."""
    attention: Any = module.layers[0].attention
    return weights(attention.split(attention.query(queries[None])), attention.key_values(image[None]).k)


def test_the_instruction_changes_what_is_asked_of_its_own_images() -> None:
    module, (images, instruction) = resampler(), inputs()
    before = module(images, instruction)
    looked = looked_at(module, module.queries, images[0, 0])
    instruction[1] = instruction[1].flip(0)
    changed = (module(images, instruction) - before).abs().amax(dim=(2, 3)) > 1e-3
    assert changed.tolist() == [[False] * IMAGES, [True] * IMAGES]
    shifted = module.queries + module.instruction(instruction[1])
    assert not torch.allclose(looked, looked_at(module, shifted, images[0, 0]))


def test_patches_have_no_order_and_queries_have_one() -> None:
    module, (images, instruction) = resampler(), inputs()
    x = module(images, instruction)
    torch.testing.assert_close(x, module(images.flip(2), instruction), atol=1e-5, rtol=1e-5)
    assert torch.cdist(x[0, 0], x[0, 0])[~torch.eye(N, dtype=torch.bool)].min() > 1
    with torch.no_grad():
        module.queries.copy_(module.queries.flip(0))
    torch.testing.assert_close(x.flip(2), module(images, instruction), atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_parameter() -> None:
    module, (images, instruction) = resampler(), inputs()
    module(images, instruction).square().mul(torch.arange(D)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("layers", [1, 8])
def test_branches_are_scaled_by_depth(layers: int) -> None:
    module = resampler(layers=layers)
    for layer in module.layers:
        deviation = layer.attention.out.weight.std().item()
        assert deviation == pytest.approx((D * 2 * layers) ** -0.5, rel=0.03)
    assert module.layers[0].attention.query.weight.std().item() == pytest.approx(D**-0.5, rel=0.03)


def test_dropout_is_the_networks() -> None:
    module, (images, instruction) = resampler(dropout=0.5), inputs()
    assert torch.equal(module(images, instruction), module(images, instruction))
    module.train()
    assert not torch.equal(module(images, instruction), module(images, instruction))


def test_no_resampler_leaves_all_tokens() -> None:
    assert [RESAMPLERS[wanted] for wanted in (False, True)] == [AllTokens, Resampler]
    module = AllTokens(ModelConfig(size="tiny"), TEXT_WIDTH, V)
    images, instruction = inputs()
    assert module(images, instruction) is images
    assert module.count == V
    assert not list(module.parameters())


def test_as_many_queries_as_patches_is_the_limit() -> None:
    assert resampler(tokens=V).count == V
    image = ImageConfig("resnet18", pixels=64, resampler=ResamplerConfig(tokens=V + 1))
    with pytest.raises(ConfigError, match=r"resampler\.tokens: got 17, expected at most the 16 tokens"):
        Resampler(ModelConfig(size="tiny", image=image), TEXT_WIDTH, V)


def test_it_exports() -> None:
    module, arguments = resampler(), inputs()
    program = torch.export.export(module, arguments)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments), atol=1e-6, rtol=1e-6)
