"""Linear layers that make their input again: the numbers of the plain formula, and what they
keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tapct.models import vit
from tapct.nn import lean
from tapct.nn.backends import Span
from tapct.nn.layers import Subset
from tapct.nn.lean import lean_linear
from tapct.nn.norm import LayerNorm

T, D, E = 7, 5, 4


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def parts(bias: bool, gain: bool) -> tuple[nn.Linear, Tensor | None]:
    linear = nn.Linear(D, E, bias=bias).double()
    return linear, torch.randn(E, dtype=torch.float64, requires_grad=True) if gain else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize(("before", "num_inputs"), [(gelu, 1), (product, 2)])
def test_it_is_the_formula_with_its_gradients(
    bias: bool, gain: bool, before: Callable[..., Tensor], num_inputs: int
) -> None:
    linear, gain_E = parts(bias, gain)
    inputs = [torch.randn(T, D, dtype=torch.float64, requires_grad=True) for _ in range(num_inputs)]
    leaves = [*inputs, *linear.parameters(), *([] if gain_E is None else [gain_E])]
    plain = before(*inputs) @ linear.weight.T
    plain = plain if linear.bias is None else plain + linear.bias
    plain = plain if gain_E is None else plain * gain_E
    lean = lean_linear(linear, before, *inputs, gain_E=gain_E)
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn(T, E, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((y * dy).sum(), leaves) for y in (lean, plain))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def by_leaf(*leaves: Tensor) -> Tensor:
        return lean_linear(linear, before, *leaves[:num_inputs], gain_E=gain_E)

    assert torch.autograd.gradcheck(by_leaf, leaves)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_many_rows_are_computed_by_parts_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, bias: bool, gain: bool
) -> None:
    norm, calls = LayerNorm(D).double(), []
    linear, gain_E = parts(bias, gain)
    nn.init.normal_(norm.weight)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *norm.parameters(), *linear.parameters(), *([] if gain_E is None else [gain_E])]

    def noted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        calls.append(len(x))
        return norm.formula(x, weight, bias)

    plain = linear(norm(x)) if gain_E is None else linear(norm(x)) * gain_E
    monkeypatch.setattr(lean, "WHOLE_BYTES", 8 * D * (T - 1))
    monkeypatch.setattr(lean, "PART_BYTES", 8 * D * rows_at_once)
    found = lean_linear(linear, noted, x, norm.weight, norm.bias, gain_E=gain_E)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn(T, E, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((y * dy).sum(), leaves) for y in (found, plain))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert sum(calls) == 2 * T and max(calls) <= rows_at_once
    norm.requires_grad_(False)
    found = lean_linear(linear, noted, x.detach(), norm.weight, norm.bias, gain_E=gain_E)
    found.backward(dy)
    torch.testing.assert_close(linear.weight.grad, wanted[3], rtol=1e-12, atol=1e-12)


def test_frozen_parameters_and_inputs_get_no_gradient() -> None:
    linear, gain_E = parts(True, True)
    assert gain_E is not None
    x, y = (torch.randn(T, D, dtype=torch.float64) for _ in range(2))
    lean_linear(linear, product, x, y.requires_grad_(), gain_E=gain_E).sum().backward()
    assert x.grad is None and y.grad is not None and linear.weight.grad is not None
    linear.requires_grad_(False).zero_grad()
    lean_linear(linear, product, x, y, gain_E=gain_E.detach()).sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is None


def test_another_kind_of_layer_and_hooks_of_inference_are_called() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(T, D)
    torch.manual_seed(0)
    plain = nn.Linear(D, E)
    torch.manual_seed(0)
    adapted = Adapter(D, E)
    torch.testing.assert_close(lean_linear(adapted, gelu, x), 2 * lean_linear(plain, gelu, x))
    seen: list[Tensor] = []
    plain.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        found = lean_linear(plain, gelu, x, gain_E=torch.full((E,), 3.0))
    torch.testing.assert_close(found, 3 * seen[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_block_keeps_ten_numbers_per_token_and_channel(ffn: str, autocast: bool) -> None:
    """Its input, queries, keys, values, what attention gives, the stream after it, the hidden layer
    (4, gated 5.3).
    """
    dim, spans = 48, (Span(2, 21), Span(3, 9))
    rows = sum(span.rows for span in spans)
    block = vit.Block(vit.Config(window=(4, 16, 16), dim=dim, depth=1, heads=2, ffn=ffn))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x_TD = torch.randn(rows, dim, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        block(x_TD, spans)
    large = [
        each
        for pointer, each in kept.items()
        if pointer not in parameters and each.numel() >= rows * dim
    ]
    hidden = block.mlp.fc1.out_features if ffn == "mlp" else block.mlp.w12.out_features
    half = 2 if autocast else 4
    wanted = rows * (2 * 4 * dim + half * (3 + 1) * dim + half * hidden)
    assert sum(each.untyped_storage().nbytes() for each in large) == wanted


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("layer_scale", [1.0, None])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_block_is_the_plain_pre_norm_residual_with_its_gradients(
    ffn: str, layer_scale: float | None, dropped: bool
) -> None:
    spans = (Span(2, 5), Span(2, 3))
    config = vit.Config(
        window=(4, 16, 16), dim=12, depth=1, heads=2, ffn=ffn, layer_scale=layer_scale, qk_norm=True
    )
    block = vit.Block(config).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x_TD = torch.randn(16, 12, dtype=torch.float64, requires_grad=True)
    first = Subset(torch.arange(5, 13), (Span(1, 5), Span(1, 3)), (2.0, 2.0)) if dropped else None
    second = Subset(torch.arange(10), (Span(2, 5), Span(0, 3)), (1.0, 1.0)) if dropped else None

    def attention(x: Tensor, lengths: list[int]) -> Tensor:
        whole = []
        for crop in block.norm1(x).split(lengths):
            q, k, v = (block.attn.qkv(crop).view(-1, 3, 2, 6).unbind(1)[i] for i in range(3))
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
            weights = torch.softmax(torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(6), dim=-1)
            whole.append(torch.einsum("hqk,khc->qhc", weights, v).flatten(1))
        return block.ls1(block.attn.proj(torch.cat(whole)))

    def feed_forward(x: Tensor) -> Tensor:
        if ffn == "mlp":
            return block.ls2(block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(x)))))
        gate, value = block.mlp.w12(block.norm2(x)).chunk(2, dim=-1)
        return block.ls2(block.mlp.w3(gate * torch.sigmoid(gate) * value))

    if dropped:  # by loops over crops: kept rows 5..12 of attention, 0..9 of the feed-forward
        branch = 2 * attention(x_TD[5:13], [5, 3])
        plain = torch.cat([x_TD[:5], x_TD[5:13] + branch, x_TD[13:]])
        plain = torch.cat([plain[:10] + feed_forward(plain[:10]), plain[10:]])
    else:
        plain = x_TD + attention(x_TD, [5, 5, 3, 3])
        plain = plain + feed_forward(plain)
    lean = block(x_TD, spans, (first, second))
    torch.testing.assert_close(lean, plain, rtol=1e-11, atol=1e-11)
    leaves = [x_TD, *block.parameters()]
    dy = torch.randn_like(plain)
    got, wanted = (torch.autograd.grad((y * dy).sum(), leaves) for y in (lean, plain))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_in_bf16_the_error_is_that_of_the_plain_formula() -> None:
    torch.manual_seed(0)
    norm, linear, gain_E = (
        LayerNorm(64),
        nn.Linear(64, 96),
        torch.full((96,), 1e-5, requires_grad=True),
    )
    x = (3 * torch.randn(200, 64)).requires_grad_()
    dy = torch.randn(200, 96)
    leaves = [x, norm.weight, norm.bias, *linear.parameters(), gain_E]

    def run(lean: bool, narrow: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            if lean:
                y = lean_linear(linear, norm.formula, x, norm.weight, norm.bias, gain_E=gain_E)
            else:
                y = linear(norm(x)) * gain_E
        return [y.float(), *torch.autograd.grad((y * dy).sum(), leaves)]

    exact, plain, lean = run(False, False), run(False, True), run(True, True)
    for a, b, c in zip(exact, plain, lean, strict=True):
        scale = a.abs().max()
        assert (c - a).abs().max() < 2 * (b - a).abs().max() + 1e-6 * scale
