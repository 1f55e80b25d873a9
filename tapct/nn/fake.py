"""Tensors without values, with which `tapct plan` counts bytes."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values. Such tensors of a plan lie on the CPU and stand for any
    device, so what is done for the sake of a CPU must not be done with them.
    """
    return isinstance(tensor, FakeTensor)
