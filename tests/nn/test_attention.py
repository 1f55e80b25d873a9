"""Attention back-ends against attention written out in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapct.base.exits import UserError
from tapct.models import vit
from tapct.nn import attention_blocks, backends
from tapct.nn.attention import Attention
from tapct.nn.backends import BACKENDS, GPU_ONLY, Backend, Span, Spans

SPANS = (Span(3, 7), Span(2, 5), Span(1, 1))


def attend_slowly(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """One crop, one head, one query at a time, in float64."""
    out = torch.zeros_like(v_THC, dtype=torch.float64)
    start = 0
    for span in spans:
        for _ in range(span.crops):
            rows = range(start, start + span.tokens)
            for head in range(q_THC.shape[1]):
                for i in rows:
                    scores = torch.stack(
                        [q_THC[i, head].double() @ k_THC[j, head].double() for j in rows]
                    )
                    weights = (scores / math.sqrt(q_THC.shape[2])).exp()
                    out[i, head] = (
                        sum(w * v_THC[j, head].double() for w, j in zip(weights, rows))
                        / weights.sum()
                    )
            start += span.tokens
    return out


def packed_qkv(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(span.rows for span in SPANS)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = qkv.unbind(1)
    return q, k, v


def attend_under_mask(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, crop_T: Tensor) -> Tensor:
    """All tokens at once, under the block-diagonal mask of the crops that they belong to."""
    scores = torch.einsum("ihc,jhc->hij", q_THC.double(), k_THC.double()) / math.sqrt(
        q_THC.shape[2]
    )
    shares = scores.masked_fill(crop_T[:, None] != crop_T[None, :], -math.inf).softmax(-1)
    return torch.einsum("hij,jhc->ihc", shares, v_THC.double()).to(q_THC.dtype)


def crop_of_rows(starts: Tensor) -> Tensor:
    """The crop of each packed row, from where crops start."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.long().diff())


def varlen_stand_in(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    assert (
        starts.dtype == torch.int32 and torch.equal(starts, starts_k) and int(starts[-1]) == len(q)
    )
    assert max_q == max_k == int(starts.diff().max())
    return attend_under_mask(q, k, v, crop_of_rows(starts))


def xformers_stand_in(q: Tensor, k: Tensor, v: Tensor, attn_bias: list[int]) -> Tensor:
    """Its mask is the list of lengths that it is made of."""
    assert q.shape[0] == 1 and q.shape[1] == sum(attn_bias)
    return attend_under_mask(
        q[0], k[0], v[0], crop_of_rows(torch.tensor([0, *attn_bias]).cumsum(0))
    )[None]


KEEPS_NOTHING = backends.block_mask.__wrapped__
MASKS = SimpleNamespace(
    BlockDiagonalMask=SimpleNamespace(from_seqlens=lambda lengths, device: lengths)
)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Backend]:
    """Back-ends by name; the kernels of those for a GPU are replaced by attention under a
    materialised mask.
    """

    def find(name: str) -> Backend:
        if name in GPU_ONLY:
            monkeypatch.setattr(backends, f"check_{name}", lambda q: None)
            monkeypatch.setattr(backends, "varlen_kernel", lambda: varlen_stand_in)
            ops = SimpleNamespace(fmha=MASKS, memory_efficient_attention=xformers_stand_in)
            monkeypatch.setattr(backends, "xformers_ops", lambda: ops)
            monkeypatch.setattr(backends, "block_mask", KEEPS_NOTHING)
        return BACKENDS[name]

    return find


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_every_backend_agrees_with_attention_written_out(
    backend: Callable[[str], Backend], name: str, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = packed_qkv(dtype)
    torch.testing.assert_close(
        backend(name)(q, k, v, SPANS).double(),
        attend_slowly(q, k, v, SPANS),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_the_gradients_of_attention_written_out(
    backend: Callable[[str], Backend], name: str
) -> None:
    q, k, v = leaves = [part.clone().requires_grad_() for part in packed_qkv(torch.float64)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = torch.autograd.grad((backend(name)(q, k, v, SPANS) * weight).sum(), leaves)

    tokens = torch.tensor([span.tokens for span in SPANS for _ in range(span.crops)])
    crop = torch.repeat_interleave(torch.arange(6), tokens)
    scores = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(8)
    shares = scores.masked_fill(crop[:, None] != crop[None, :], -math.inf).softmax(-1)
    slow = torch.autograd.grad((torch.einsum("hij,jhc->ihc", shares, v) * weight).sum(), leaves)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("long_crop", "blocks", "units"), [(300, False, 1.5), (1, False, 3.0), (1, True, 3.0)]
)
@pytest.mark.parametrize("dtype", backends.HALF)
def test_half_types_on_a_cpu_are_as_good_as_float32_and_kept_as_halves(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, long_crop: int, blocks: bool, units: float
) -> None:
    # widened, by torch's own kernel, and backward in blocks
    monkeypatch.setattr(backends, "LONG_CROP", long_crop)
    monkeypatch.setattr(attention_blocks, "is_faster", lambda: blocks)
    halves = [part.clone().requires_grad_() for part in packed_qkv(dtype)]
    floats = [part.detach().float().requires_grad_() for part in halves]
    weight = torch.randn(halves[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ),
    ):
        out = backends.attend_sdpa(*halves, SPANS)
    assert out.dtype == dtype and {
        tensor.dtype for tensor in kept if tensor.shape == out.shape
    } == {dtype}
    exact = backends.attend_sdpa(*floats, SPANS)
    found = torch.autograd.grad((out * weight).sum(), halves)
    wanted = torch.autograd.grad((exact * weight.float()).sum(), floats)
    unit = torch.finfo(dtype).eps
    for a, b in zip([out, *found], [exact, *wanted], strict=True):
        error = (a.float() - b).abs().max() / b.abs().max()
        assert error.item() < units * unit


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_of_one_crop_never_reach_another(
    backend: Callable[[str], Backend], name: str
) -> None:
    q, k, v = packed_qkv(torch.float32)
    before = backend(name)(q, k, v, SPANS)
    changed = v.clone()
    changed[7:14] += 1.0  # the second crop of the first group
    after = backend(name)(q, k, changed, SPANS)
    moved = (before - after).abs().amax((1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_no_backend_keeps_a_matrix_of_tokens_by_tokens(name: str) -> None:
    q, k, v = (torch.randn(600, 1, 8, requires_grad=True) for _ in range(3))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        BACKENDS[name](q, k, v, (Span(1, 600),))
    assert 0 < max(kept) <= 600 * 8


@pytest.mark.parametrize("spans", [SPANS, SPANS[:1], (Span(1, 4), Span(4, 1), Span(2, 9))])
def test_starts_and_lengths_are_those_that_the_spans_mean(spans: Spans) -> None:
    crop_T = [
        number for number, length in enumerate(backends.crop_lengths(spans)) for _ in range(length)
    ]
    want, number = [], 0
    for span in spans:
        for _ in range(span.crops):
            want += [number] * span.tokens
            number += 1
    assert crop_T == want == crop_of_rows(backends.crop_starts(spans, torch.device("cpu"))).tolist()


def test_the_mask_of_xformers_is_block_diagonal() -> None:
    pytest.importorskip("xformers.ops")
    mask = backends.block_mask(backends.crop_lengths(SPANS), torch.device("cpu"))
    rows = sum(span.rows for span in SPANS)
    crop_T = crop_of_rows(backends.crop_starts(SPANS, torch.device("cpu")))
    assert torch.equal(mask.materialize((rows, rows)) == 0, crop_T[:, None] == crop_T[None, :])


@pytest.mark.parametrize("name", GPU_ONLY)
def test_a_backend_for_a_gpu_gives_an_error_on_a_cpu(name: str) -> None:
    with pytest.raises(
        UserError,
        match=f"model.attention={name} needs a GPU.*not this CPU; set model.attention=auto",
    ):
        BACKENDS[name](*packed_qkv(torch.bfloat16), SPANS)


def test_what_lacks_on_a_gpu_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def q(dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match="varlen needs a GPU from Ampere on, not this V100"):
        backends.check_varlen(q(torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="computes in bf16 or fp16, not in torch.float32"):
        backends.check_varlen(q(torch.float32))
    monkeypatch.setattr(backends, "varlen_kernel", lambda: None)
    with pytest.raises(UserError, match="has no such attention"):
        backends.check_varlen(q(torch.bfloat16))
    monkeypatch.setattr(backends, "xformers_ops", lambda: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '\.\[gpu\]'"):
        backends.check_xformers(q(torch.bfloat16))


def test_auto_takes_the_first_that_device_and_precision_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "varlen_kernel", lambda: varlen_stand_in)
    monkeypatch.setattr(backends, "xformers_ops", lambda: SimpleNamespace())
    assert backends.choose(torch.device("cpu"), bf16) == "sdpa"
    assert backends.choose(cuda, torch.float32) == "sdpa"
    assert backends.choose(cuda, bf16) == "varlen"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backends.choose(cuda, torch.float16) == "xformers"
    monkeypatch.setattr(backends, "xformers_ops", lambda: None)
    assert backends.choose(cuda, torch.float16) == "sdpa"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "not installed"),
        ({"ops": "", "_cpp_lib": "_cpp_library_load_exception = None"}, ""),
        (
            {"ops": "", "_cpp_lib": "_cpp_library_load_exception = OSError('undefined symbol')"},
            "its kernels do not load with torch",
        ),
        ({"ops": "raise OSError('undefined symbol: x')", "_cpp_lib": ""}, "OSError: undefined"),
        ({"ops": "import no_such_triton", "_cpp_lib": ""}, "No module named 'no_such_triton'"),
    ],
)
def test_xformers_is_used_only_if_its_kernels_load(
    files: dict[str, str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "xformers"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    if files:
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    hidden = [None] if not files else []  # an entry of None: the import fails
    for name in ("xformers", "xformers.ops", "xformers._cpp_lib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        for module in hidden:
            monkeypatch.setitem(sys.modules, name, module)
    found, failure = backends._find_xformers.__wrapped__()
    assert (found is None) == bool(why)
    assert why in failure and bool(why) == bool(failure)


@pytest.mark.parametrize("name", ["sdpa", "varlen", "auto"])
def test_the_look_up_of_a_kernel_does_not_break_the_graph_of_a_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    # an operation that is opaque for the compiler, as the kernel is
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *rest: opaque(q))
    monkeypatch.setattr(backends, "check_varlen", lambda q: backends.varlen_kernel())
    backbone = vit.build(
        vit.Config((4, 16, 16), (2, 8, 8), dim=16, depth=1, heads=2, attention=name)
    )
    x_TD = torch.randn(SPANS[0].rows + SPANS[1].rows, 16, requires_grad=True)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        explained = torch._dynamo.explain(backbone.blocks[0].forward)(x_TD, SPANS[:2])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@torch.library.custom_op("tapct_tests::opaque", mutates_args=())
def opaque(q: Tensor) -> Tensor:
    return q.clone()


@opaque.register_fake
def _(q: Tensor) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*GPU_ONLY, "auto"])
def test_every_kernel_of_a_gpu_agrees_with_sdpa_forward_and_backward(name: str) -> None:
    if name == "xformers":
        pytest.importorskip("xformers.ops")
    spans = (Span(3, 70), Span(5, 33), Span(1, 1))
    rows = sum(span.rows for span in spans)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3, 4, 64, generator=generator).cuda().bfloat16()
    weight = torch.randn(rows, 4, 64, generator=generator).cuda().bfloat16()
    found = []
    for each in ("sdpa", name):
        leaf = qkv.clone().requires_grad_()
        out = BACKENDS[each](*leaf.unbind(1), spans)
        found.append((out, torch.autograd.grad((out * weight).sum(), leaf)[0]))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_varlen_never_waits_for_the_device() -> None:
    qkv = torch.randn(
        sum(span.rows for span in SPANS), 3, 2, 8, device="cuda", dtype=torch.bfloat16
    )
    want = BACKENDS["varlen"](*qkv.unbind(1), SPANS)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        found = BACKENDS["varlen"](*qkv.unbind(1), SPANS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, want)


def test_the_projection_is_laid_out_as_in_dinov2() -> None:
    """qkv's rows are (q, k, v) x heads x channels, so that published weights load by name."""
    attention = Attention(16, heads=2).double()
    x = torch.randn(SPANS[0].rows, 16, dtype=torch.float64)
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = (qkv[:, 16 * i : 16 * (i + 1)].reshape(-1, 2, 8) for i in range(3))
    want = (
        attend_slowly(q, k, v, SPANS[:1]).flatten(1) @ attention.proj.weight.T + attention.proj.bias
    )
    torch.testing.assert_close(attention(x, SPANS[:1]), want)


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'flash'.*sdpa"):
        Attention(16, heads=2, backend="flash")
    with pytest.raises(UserError, match="dim 16 is no multiple of heads 3"):
        Attention(16, heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chosen_kernel_of_sdpa_is_taken_on_a_cpu_too(dtype: torch.dtype) -> None:
    q, k, v = packed_qkv(dtype)
    seen = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel), torch.profiler.profile() as profile:
            BACKENDS["sdpa"](q, k, v, SPANS)
        seen.append(any("flash" in event.key for event in profile.key_averages()))
    assert seen == [False, True]


def test_importing_the_network_does_not_load_the_compiler() -> None:
    code = "import sys, tapct.models.vit; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
