"""Bytes of a training step, counted on the real networks and losses without any values.

ParameterCounts are counted from their shapes. For the rest the real step (teacher, student, losses,
backward) runs on torch's fake tensors, which have shapes and types but no memory, while a dispatch
mode adds up the storages that are alive. So whatever the backbone, the losses or their autograd
functions hold is counted as it is, whichever plug-in they are. The bytes of a micro-batch are a
fixed part and a part for each sample; two runs give both.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.config.plugins import Plugin
from tapct.engine import compiled, recompute
from tapct.nn.attention import Attention
from tapct.nn.layers import DropKey, Mlp, SwiGLU
from tapct.ssl import step as ssl_step
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Masks, Views

# Multiples of 5: at any drop rate in tenths, stochastic depth then keeps a whole number of crops,
# the same as it keeps on average.
FEW, MANY = 5, 10
# back-end of torch.compile that decides as `inductor` does which tensors a graph keeps for its
# backward pass, and executes the graphs as they are
PARTITIONED = "aot_eager_decomp_partition"


class NeedsValues(UserError):
    """A plug-in reads the value of a tensor, so that its step cannot run on fake tensors."""


class Valueless(StudentTeacher):
    """Student, teacher and losses on the meta device."""

    def __init__(self, model: Plugin, losses: Sequence[Plugin]) -> None:
        super().__init__(model, losses, 0, device="meta", shard=lambda network, learns: None)

    def init_weights(self, seed: int) -> None:
        """Do nothing: there are no values to draw."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one network, backbone and heads, by how ranks hold them.

    Args:
        shapes: (rows along the first axis, numbers of a row) of every parameter.
        heads, rest: numbers in the heads, and in the backbone outside of its blocks.
        block: numbers of the largest block, the unit that ranks gather; 0 where the backbone has
            none.
        linear: numbers in the linear layers of the blocks, which autocast copies to bf16 in a
            single process and FSDP gathers in bf16; those of tapct's own blocks are left out, which
            are copied one by one and forgotten (`nn.lean`).
        snapshot: as `shapes`, of the teacher's snapshot; empty where no loss wants one.
    """

    shapes: tuple[tuple[int, int], ...]
    heads: int
    rest: int
    block: int
    linear: int
    snapshot: tuple[tuple[int, int], ...] = ()

    def on_fullest_rank(self, shard: int) -> int:
        """Numbers of a network that the first of `shard` ranks holds."""
        return fullest(self.shapes, shard)

    @property
    def total(self) -> int:
        """Numbers of the whole network."""
        return self.on_fullest_rank(1)


@dataclass(frozen=True)
class SampleShape:
    """The views of one sample.

    Args:
        num_globals, num_locals: number of crops.
        global_window, local_window: voxels (z, y, x) of these crops.
        num_tokens: patches N of a global crop.
        masked: mean number of masked patches, all global crops together.
    """

    num_globals: int
    global_window: Size3
    num_locals: int
    local_window: Size3
    num_tokens: int
    masked: float


@dataclass(frozen=True)
class Bytes:
    """Bytes of one micro-batch on one rank, beside weights, gradients and moments.

    Args:
        inputs: bytes of views and masks.
        activations: bytes that the forward pass stores for the backward pass.
        work: bytes in use beside both at the fullest moment: chunks of scores, temporaries, and
            gradients.
        kept: bytes of a micro-batch that stay while the next one is computed: its tokens, for the
            health metrics.
    """

    inputs: float
    activations: float
    work: float
    kept: float


@dataclass(frozen=True)
class Footprint:
    """Bytes of a micro-batch as a function of its size.

    Args:
        few, many: bytes counted with `FEW` and `MANY` samples.
    """

    few: Bytes
    many: Bytes

    def of(self, samples: int) -> Bytes:
        """Bytes of a micro-batch of a number of samples, on the line through the two counts.

        With few prototypes that is too much for a large micro-batch: a chunk of scores does not
        grow once it is full.
        """
        share = (samples - FEW) / (MANY - FEW)
        sizes = {}
        for field in fields(Bytes):
            low, high = getattr(self.few, field.name), getattr(self.many, field.name)
            sizes[field.name] = max(low + share * (high - low), 0.0)
        return Bytes(**sizes)


def count_parameters(pair: StudentTeacher) -> ParameterCounts:
    """Count the parameters of the student."""
    network = pair.student
    blocks = [_numbers(block) for block in network.backbone.repeated_blocks()]
    # these compute their linear layers with `nn.lean`, which forgets each copy at once
    lean = {
        linear
        for layer in network.modules()
        if isinstance(layer, Attention | Mlp | SwiGLU)
        for linear in layer.modules()
    }
    linear = 0
    for block in network.backbone.repeated_blocks():
        for module in block.modules():
            if isinstance(module, nn.Linear) and module not in lean:
                linear += _numbers(module)
    rest = _numbers(network.backbone) - sum(blocks)
    snapshot = () if pair.snapshot is None else shapes_of(pair.snapshot)
    return ParameterCounts(
        shapes_of(network), _numbers(network.heads), rest, max(blocks, default=0), linear, snapshot
    )


def shapes_of(network: nn.Module) -> tuple[tuple[int, int], ...]:
    """(rows along the first axis, numbers of a row) of every parameter."""
    return tuple((len(p), p.numel() // len(p)) if p.ndim else (1, 1) for p in network.parameters())


def fullest(shapes: Sequence[tuple[int, int]], shard: int) -> int:
    """Numbers that the first of `shard` ranks holds: FSDP cuts along the first axis, by rows
    rounded up.
    """
    return sum(-(-rows // shard) * width for rows, width in shapes)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(
    model: Plugin,
    losses: Sequence[Plugin],
    sizes: SampleShape,
    *,
    dtype: torch.dtype,
    bf16: bool,
    every: int = 0,
    compiles: bool = False,
) -> Footprint:
    """Count the bytes of a micro-batch.

    Args:
        model, losses: sections of the config.
        sizes: views of a sample.
        dtype: type of weights and loss state.
        bf16: whether the blocks are in bf16, as FSDP gathers them, and the rest is computed under
            autocast.
        every: interval of the blocks that are computed again in the backward pass; 0: none.
        compiles: whether torch.compile decides what the blocks keep; takes some seconds more.
    Raises:
        NeedsValues: a plug-in reads values.
    """
    try:
        return Footprint(
            *(
                _count(model, losses, sizes, samples, dtype, bf16, every, compiles)
                for samples in (FEW, MANY)
            )
        )
    except RuntimeError as error:  # fake tensors raise it where code reads a value
        names = ", ".join([model.name, *(loss.name for loss in losses)])
        raise NeedsValues(
            f"one of {names} needs values to run ({str(error).splitlines()[0]})"
        ) from error


def _count(
    model: Plugin,
    losses: Sequence[Plugin],
    sizes: SampleShape,
    samples: int,
    dtype: torch.dtype,
    bf16: bool,
    every: int,
    compiles: bool,
) -> Bytes:
    """Run one micro-batch without values."""
    pair = Valueless(model, losses)
    if compiles:
        compiled.compile_blocks(pair, PARTITIONED)
    recompute.recompute_blocks(pair.student.backbone, every)
    pair.train()
    # the CPU stands for any device: a build of torch without CUDA has no fake GPU, and both save
    # the same
    with FakeTensorMode(), LiveBytes() as live:
        give_shapes(pair, dtype, bf16)
        if compiles:  # the first run makes the graphs, which takes memory of its own
            _run(pair, live, sizes, samples, bf16)
        return _run(pair, live, sizes, samples, bf16)


def _run(
    pair: StudentTeacher, live: LiveBytes, sizes: SampleShape, samples: int, bf16: bool
) -> Bytes:
    """Forward and backward of one micro-batch on fake tensors."""
    begin = live.now
    views, masks = _inputs(sizes, samples)
    inputs = live.now - begin
    live.peak = live.now
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = ssl_step.forward(
            pair, views, masks, 0.07, DropKey(0, 0), pair.snapshot is not None
        )
    activations = live.now - begin - inputs
    output.total.backward()
    work = live.peak - begin - inputs - activations
    pair.zero_grad(set_to_none=True)
    del views
    kept = live.now - begin
    del output, masks
    return Bytes(inputs, activations, work, kept)


def give_shapes(
    pair: StudentTeacher,
    dtype: torch.dtype,
    bf16: bool,
    device: torch.device | str = "cpu",
) -> None:
    """Replace meta parameters and buffers by fake ones, in the types that they are computed in.

    Args:
        pair: student, teacher and losses on the meta device.
        dtype: type of weights and loss state.
        bf16: whether the blocks are in bf16, as FSDP gathers them.
        device: device that the fake tensors seem to be on.
    """
    for network in (pair.student, *pair.frozen()):
        narrow = {
            module for block in network.backbone.repeated_blocks() for module in block.modules()
        }
        for module in network.modules():
            kind = torch.bfloat16 if bf16 and module in narrow else dtype
            _replace(module._parameters, kind, device)
            _replace(module._buffers, None, device)
    for module in pair.losses.modules():
        _replace(module._parameters, dtype, device)
        _replace(module._buffers, None, device)


def _replace(
    tensors: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            empty = torch.empty(tensor.shape, dtype=dtype, device=device)
            tensors[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        elif tensor is not None:
            tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _inputs(sizes: SampleShape, samples: int) -> tuple[Views, Masks]:
    """Views and masks of a micro-batch."""
    num_globals, num_locals, tokens = sizes.num_globals, sizes.num_locals, sizes.num_tokens
    views = Views(
        torch.empty(num_globals, samples, *sizes.global_window),
        torch.empty(num_locals, samples, *sizes.local_window),
        torch.empty(num_globals, samples, tokens, dtype=torch.bool),
        torch.empty(num_globals, samples, 3),
        torch.empty(num_locals, samples, 3),
    )
    num_masked = math.ceil(sizes.masked * samples)
    masked = torch.empty(num_globals, samples, tokens, dtype=torch.bool)
    return views, Masks(masked, torch.empty(num_masked, dtype=torch.int64), torch.empty(num_masked))


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations have made and that still are alive.

    Attributes:
        now: bytes of the storages that are alive.
        peak: largest value of `now` since it was last set.
    """

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Always True: else torch.compile would not compile anything while this mode is active."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self.known:
            self.known[name] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.now -= self.known.pop(name)
