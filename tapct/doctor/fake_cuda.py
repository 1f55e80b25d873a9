"""A GPU that computes nothing: fake CUDA tensors on a machine without a GPU.

torch's fake tensors have shapes, types and a device, but no memory. A build of torch without CUDA
lacks three things that a training step on such tensors needs; `fake_cuda` supplies them:

    device guard      indexing and autograd switch the current device; the guard of torch's meta
                      device, which does nothing, takes this task
    streams, events   objects that ignore every call
    backward pass     autograd's engine asks for a real accelerator; `run_backward` does the same
                      in Python, node by node, with the formulas of torch

`HostWaits` records every operation for which the host would wait for the GPU.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)  # of the GPU that is stood in for, an H100
PACKAGE = str(Path(__file__).resolve().parent.parent) + "/"

# operations whose result has a size or a Python value that only the device knows
WAITING = frozenset(
    {
        "aten._local_scalar_dense",  # item, float, int, bool, if
        "aten.nonzero",
        "aten.masked_select",
        "aten.equal",
        "aten.is_nonzero",
        "aten.unique_dim",
        "aten._unique2",
        "aten.bincount",
        "aten.histc",
        "aten._linalg_svd",  # cusolver reports failures to the host
        "aten._linalg_eigh",
        "aten.linalg_qr",
    }
)


# operations on counters that the host keeps in tensors of its own, with real numbers
COUNTERS = frozenset({"aten._local_scalar_dense.default", "aten.fill_.Scalar"})


class Ignored:
    """Stands for a stream or an event: every method exists and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        """A method that takes anything and returns another such object."""
        return lambda *args, **kwargs: Ignored()


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Compute on fake tensors, those of the device `cuda` too.

    Raises:
        RuntimeError: this version of torch keeps its device guards elsewhere.
    """
    stand_ins = {
        (torch.cuda, "Stream"): Ignored,
        (torch.cuda, "Event"): Ignored,
        (torch.cuda, "current_stream"): lambda device=None: Ignored(),
        (torch.cuda, "stream"): lambda stream: nullcontext(),
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "get_device_capability"): lambda device=None: CAPABILITY,
        (torch.cuda, "is_bf16_supported"): lambda *args, **kwargs: True,
        # else autocast is switched off
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (Tensor, "pin_memory"): lambda self, *args: self,
        (Tensor, "record_stream"): lambda self, stream: None,
        (torch.autograd, "_engine_run_backward"): run_backward,
    }
    with ExitStack() as stack:
        stack.enter_context(device_guard())
        for (owner, name), value in stand_ins.items():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def device_guard() -> Iterator[None]:
    """Let the guard of the meta device stand for that of CUDA, where torch has none."""
    if torch.backends.cuda.is_built():
        # torch does the same by itself on a machine without a GPU
        torch._C._ensureCUDADeviceGuardSet()
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        # std::array of one pointer per type of device; CUDA is type 1, meta is type 14
        guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except ValueError as error:
        raise RuntimeError(f"torch {torch.__version__} has no such list of guards") from error
    cuda, meta = 1, 14
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


class HostWaits(TorchDispatchMode):
    """Records every operation for which the host would wait for the GPU, and its place.

    Attributes:
        waits: (operation, lines of tapct that called it) -> number of calls.
        operations: number of operations on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record the operation, then run it."""
        kwargs = kwargs or {}
        tensors = [each for each in args if isinstance(each, Tensor)]
        if str(func) != "prim.device.default":  # a question of autograd, not an operation
            self.operations += any(each.device.type == "cuda" for each in tensors)
        reason = why_waiting(func, args, kwargs)
        if reason:
            self.waits[reason, place()] += 1
        if str(func) in COUNTERS and not isinstance(args[0], FakeTensor):
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def why_waiting(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Name of an operation for which the host waits, with the reason; empty for all others."""
    name = str(func)
    tensors = [each for each in args if isinstance(each, Tensor)]
    on_gpu = any(each.device.type == "cuda" for each in tensors)
    if on_gpu and (name in WAITING or name.rpartition(".")[0] in WAITING):
        return name
    if name == "aten.repeat_interleave.Tensor" and on_gpu and kwargs.get("output_size") is None:
        return f"{name} without output_size"
    if name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and on_gpu:
        kinds = (torch.bool, torch.uint8)
        if any(isinstance(each, Tensor) and each.dtype in kinds for each in args[1]):
            return f"{name} with a mask, whose size only the device knows"
    if name.startswith("aten._to_copy.") and kwargs.get("device") is not None:
        source, target = tensors[0].device.type, torch.device(kwargs["device"]).type
        if source != target and "cuda" in (source, target) and not kwargs.get("non_blocking"):
            return f"{name} from {source} to {target}, blocking"
    if name.startswith("aten.copy_.") and len(tensors) == 2:
        target, source = (each.device.type for each in tensors)
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if source != target and not non_blocking:
            return f"{name} from {source} to {target}, blocking"
    return ""


def place() -> str:
    """The innermost lines of tapct that are being executed, innermost first."""
    lines = []
    for frame in traceback.extract_stack():
        if frame.filename.startswith(PACKAGE) and frame.filename != __file__:
            lines.append(f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}")
    return " < ".join(reversed(lines[-3:]))


# how fake tensors report that an operation needs a value; `HostWaits` has recorded it before
NeedsValue = (DataDependentOutputException, DynamicOutputShapeException)


def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """What autograd's engine does, in this thread: gradients of leaves, or of `inputs`.

    Nodes are called in an order in which every gradient has been added up before it is passed on.
    Hooks are not called.

    Args:
        outputs, gradients: roots of the graph and their gradients.
        retain_graph, create_graph: not used: fake tensors take no memory.
        inputs: tensors whose gradients are returned; none: they are added to the leaves.
        allow_unreachable, accumulate_grad: as in the engine, not used.
    """
    wanted = [get_gradient_edge(each) for each in inputs]
    found: dict[GradientEdge, Tensor] = {}
    ready: dict[Any, dict[int, Tensor]] = defaultdict(dict)

    def pass_on(edge: GradientEdge, gradient: Tensor) -> None:
        # as the engine does: a gradient has the shape and dtype of the output that it belongs to
        about = edge.node._input_metadata[edge.output_nr]
        gradient = gradient.sum_to_size(about.shape).to(about.dtype)
        kept = ready[edge.node]
        so_far = kept.get(edge.output_nr)
        kept[edge.output_nr] = gradient if so_far is None else so_far + gradient

    roots = [get_gradient_edge(each) for each in outputs]
    for edge, gradient in zip(roots, gradients, strict=True):
        if gradient is not None:
            pass_on(edge, gradient)
    open_calls = _uses(roots)
    waiting = [edge.node for edge in dict.fromkeys(roots) if not open_calls[edge.node]]
    with torch.no_grad():
        while waiting:
            node = waiting.pop()
            arrived = ready.pop(node, {})
            for edge in wanted:
                if edge.node is node and edge.output_nr in arrived:
                    found[edge] = arrived[edge.output_nr]
            for edge, gradient in _call(node, arrived, accumulates=not inputs):
                if edge.node is not None and gradient is not None:
                    pass_on(edge, gradient)
            for below, _ in node.next_functions:
                if below is not None:
                    open_calls[below] -= 1
                    if not open_calls[below]:
                        waiting.append(below)
    return tuple(found.get(edge) for edge in wanted)


def _uses(roots: Sequence[GradientEdge]) -> Counter[Any]:
    """How many edges of the graph lead to each node."""
    uses: Counter[Any] = Counter()
    stack = [edge.node for edge in roots]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            uses[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return uses


def _call(
    node: Any, arrived: Mapping[int, Tensor], accumulates: bool
) -> list[tuple[GradientEdge, Tensor | None]]:
    """Compute what a node passes on to each of the nodes below it.

    Args:
        node: node of the graph.
        arrived: gradients of its outputs, by their numbers.
        accumulates: whether gradients are added to the leaves.
    """
    if not arrived or (not node.next_functions and not accumulates):
        return []
    edges = [GradientEdge(below, number) for below, number in node.next_functions]
    gradients = [arrived.get(i) for i in range(len(node._input_metadata))]
    if not hasattr(node, "needs_input_grad"):  # one of torch's own
        results = node(*gradients)
        return list(zip(edges, results if isinstance(results, tuple) else (results,)))
    # a Function in Python: missing gradients are zeros, and every argument has a result
    for i, about in enumerate(node._input_metadata):
        if gradients[i] is None:
            gradients[i] = torch.zeros(about.shape, dtype=about.dtype, device=about.device)
    results = node.apply(*gradients)
    kept = [each for each, need in zip(results, node.needs_input_grad, strict=True) if need]
    return list(zip([edge for edge in edges if edge.node is not None], kept, strict=True))
