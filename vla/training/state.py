"""The state of training as flat named tensors, and back: weights, optimiser, average, torch's random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vla.model.vla import VLA
from vla.training.average import Average
from vla.training.ranks import laid_out

RANDOM = ("random.torch", "random.noise", "random.samples")


def state_of(
    model: VLA, optimizer: torch.optim.Optimizer, average: Average, device: torch.device
) -> dict[str, Tensor]:
    """Named tensors, without those that text/ of a checkpoint holds: the text encoder that does not train."""
    names = {id(p): n for n, p in model.named_parameters()}
    state = {f"weights.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state |= {f"fixed.{n}": tensor for n, tensor in fixed(model, average).items()}
    for parameter, slots in optimizer.state.items():
        state |= {f"adamw.{key}.{names[id(parameter)]}": value for key, value in slots.items()}
    state |= {f"average.{n}": w for n, w in average.weights.items()}
    state |= {"random.torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generator(generator: torch.Generator, state: Tensor) -> None:
    """Raises ValueError for the state of a generator on another kind of device, which draws other numbers."""
    kinds = {torch.Generator().get_state().numel(): "CPU"}
    got, own = (kinds.get(x.numel(), "GPU") for x in (state, generator.get_state()))
    if got != own:
        raise ValueError(
            f"The training state does not fit here. got: random numbers drawn on the {got}. expected: on the {own} "
            "(frames are drawn on a GPU if its free memory holds them all). remedy: resume where it was trained, "
            "or begin a new run with train.init."
        )
    generator.set_state(state.cpu())


def fixed(model: VLA, average: Average) -> dict[str, Tensor]:
    """What the optimiser does not train: frozen weights, running statistics; none of the text encoder."""
    everything = model.state_dict()
    names = everything.keys() - average.weights.keys()
    return {n: everything[n] for n in sorted(names) if not n.startswith("text.encoder.")}


def load_state(
    state: dict[str, Tensor],
    model: VLA,
    optimizer: torch.optim.Optimizer,
    average: Average,
    device: torch.device,
) -> None:
    """Take over what `state_of` gave. Raises ValueError when it is of another version."""
    wanted = {f"fixed.{n}" for n in fixed(model, average)} | {f"weights.{n}" for n in average.weights}
    if missing := sorted((wanted | set(RANDOM)) - state.keys()):
        raise ValueError(
            f"The training state is of another version. got: none of {missing[:3]}. expected: what this "
            "version's training needs. remedy: resume with the version that wrote it, or begin a new "
            "run with train.init."
        )
    with torch.no_grad():
        for name, tensor in fixed(model, average).items():
            tensor.copy_(laid_out(state[f"fixed.{name}"], tensor))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.copy_(laid_out(state[f"weights.{name}"], parameter))
            average.weights[name].copy_(laid_out(state[f"average.{name}"], parameter))
            slots = optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := state.get(f"adamw.{key}.{name}")) is None:
                    continue
                saved = laid_out(saved.to(parameter.device), parameter)
                # In place where it is there: a graph may have captured it.
                slots[key] = slots[key].copy_(saved) if key in slots else saved
    torch.set_rng_state(state["random.torch"].cpu())
    if "random.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"].cpu(), device)
