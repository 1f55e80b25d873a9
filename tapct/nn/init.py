"""Initial values as pure functions of (seed, parameter name): equal on every device and whatever
other layers a model has.

Each value is drawn in float32 on the host and copied into the parameter. A sharded parameter copies
its own part, so every number of ranks starts from the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapct.base import rng
from tapct.distributed import collectives

CUT = 2.0  # largest absolute value of a truncated normal weight


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(rng.hash_int(seed, f"init/{name}") & (2**63 - 1))


def _copy(parameter: Tensor, value: Tensor) -> None:
    collectives.local_part(parameter).copy_(collectives.part_of_full(value, parameter))


@torch.no_grad()
def constant(parameter: Tensor, value: float) -> None:
    """Set every element to `value`."""
    collectives.local_part(parameter).fill_(value)


@torch.no_grad()
def normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Draw from N(0, std)."""
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    _copy(parameter, value.normal_(0.0, std, generator=_generator(seed, name)))


@torch.no_grad()
def trunc_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Draw from N(0, std) cut at +-2, as DINOv2 and timm do; std 0.02 puts the cut at 100 sigma.

    What lies beyond the cut is drawn again. `torch.nn.init.trunc_normal_` is not used: versions of
    torch draw different numbers for the same seed, and some of them put a few weights on the cut.
    """
    generator = _generator(seed, name)
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    value.normal_(0.0, std, generator=generator)
    while bool((beyond := value.abs() > CUT).any()):
        again = torch.empty_like(value).normal_(0.0, std, generator=generator)
        value = torch.where(beyond, again, value)
    _copy(parameter, value)


@torch.no_grad()
def uniform_fan_in(parameter: Tensor, fan_in: int, seed: int, name: str) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for weights and biases of
    Linear and Conv.
    """
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    _copy(
        parameter, value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=_generator(seed, name))
    )
