"""The prototype head against its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct.nn.heads import Config, PrototypeHead
from tapct.nn.prototype_loss import prototype_loss, return_both
from tapct.nn.prototype_scores import TeacherScores

TINY = Config(num_prototypes=32, hidden=24, bottleneck=8, layers=3)
PLAIN = replace(TINY, last_layer="plain")


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["weight_norm", "plain"])
def test_the_head_is_the_formula_in_float64(config: Config) -> None:
    head = PrototypeHead(16, config).double()
    if config is TINY:
        with torch.no_grad():
            head.last_layer.weight_g.uniform_(0.5, 2.0)
    x = torch.randn(5, 16, dtype=torch.float64)
    h = x
    for index in (0, 2, 4):
        layer: Any = head.mlp[index]
        h = h @ layer.weight.T + layer.bias
        if index < 4:
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    features = h / (h * h).sum(1, keepdim=True).sqrt()
    weight: Tensor = head.last_layer.weight if config is PLAIN else None
    if config is TINY:
        v, g = head.last_layer.weight_v, head.last_layer.weight_g
        weight = torch.stack([g[k, 0] * v[k] / (v[k] @ v[k]).sqrt() for k in range(32)])
    torch.testing.assert_close(head.features(x), features)
    torch.testing.assert_close(head.prototypes(), weight)
    torch.testing.assert_close(head(x), features @ weight.T)


def test_the_last_layer_is_torchs_weight_norm_of_a_linear() -> None:
    head = PrototypeHead(16, TINY)
    linear = torch.nn.Linear(8, 32, bias=False)
    with torch.no_grad():
        linear.weight.copy_(head.last_layer.weight_v)
    reference = torch.nn.utils.parametrizations.weight_norm(linear)
    reference.parametrizations.weight.original0.data.fill_(1.0)
    torch.testing.assert_close(head.prototypes(), reference.weight)


def test_fresh_prototypes_have_length_one_and_pytorchs_directions() -> None:
    head = PrototypeHead(16, Config(num_prototypes=4096, hidden=24, bottleneck=64))
    torch.testing.assert_close(head.prototypes().norm(dim=1), torch.ones(4096))
    v = head.last_layer.weight_v
    assert v.abs().max().item() == pytest.approx(64**-0.5, rel=1e-3)  # U(-1/8, 1/8)
    assert v.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.01)
    values = dict(head.named_parameters())
    assert values["mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert all(values[f"mlp.{i}.bias"].abs().max() == 0 for i in (0, 2, 4))
    assert isinstance(head.last_layer.weight_g, torch.nn.Parameter)  # the gain is trained


def test_initial_weights_depend_on_the_seed_alone() -> None:
    heads = [PrototypeHead(16, TINY) for _ in range(3)]
    for head, seed in zip(heads, (3, 3, 4), strict=True):
        torch.rand(seed)  # the global generator plays no part
        head.init_weights(seed)
    a, b, c = (head.state_dict() for head in heads)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["mlp.0.weight"], c["mlp.0.weight"])
    assert not torch.equal(a["last_layer.weight_v"], c["last_layer.weight_v"])


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_mlp_has_as_many_layers_as_asked_for(layers: int) -> None:
    head = PrototypeHead(16, Config(num_prototypes=8, hidden=24, bottleneck=4, layers=layers))
    linears = [module for module in head.mlp if isinstance(module, torch.nn.Linear)]
    assert len(linears) == layers
    assert head(torch.randn(3, 16)).shape == (3, 8)


def test_parameter_names_are_dinov2s() -> None:
    linear = [f"mlp.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(PrototypeHead(16, TINY).state_dict()) == [
        *linear,
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert list(PrototypeHead(16, PLAIN).state_dict()) == [*linear, "last_layer.weight"]


def test_a_plain_last_layer_starts_as_dinov3s() -> None:
    weight = PrototypeHead(16, replace(PLAIN, num_prototypes=4096, bottleneck=64)).prototypes()
    assert weight.std().item() == pytest.approx(0.02, rel=0.01) and weight.mean().abs() < 1e-4
    lengths = weight.norm(dim=1)
    assert (
        lengths.mean().item() == pytest.approx(0.02 * 64**0.5, rel=0.01) and lengths.std() > 0.005
    )  # not normed


def test_what_a_head_hands_out_does_not_change_with_its_weights() -> None:
    """FSDP frees a weight after the call that gathered it."""
    for config in (TINY, PLAIN):
        head = PrototypeHead(16, config)
        with torch.no_grad():
            _, prototypes = head(torch.randn(2, 16), return_both)
            before = prototypes.clone()
            for parameter in head.parameters():
                parameter.zero_()
        assert torch.equal(prototypes, before)


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["weight_norm", "plain"])
def test_gradcheck_from_tokens_and_every_weight_to_the_fused_loss(config: Config) -> None:
    small = replace(config, num_prototypes=5, hidden=4, bottleneck=3, layers=2)
    head = PrototypeHead(4, small).double()
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(make(*parameter.shape))
    teacher = TeacherScores(make(2, 3, 3), make(5, 3), 0.5, make(5))
    weight = make(4, 3).abs()
    names = list(dict(head.named_parameters()))

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        def compare(features: Tensor, prototypes: Tensor) -> Tensor:
            return prototype_loss(
                features.unflatten(0, (4, 3)), prototypes, weight, teacher, 0.3, cross=True
            ).value

        values = dict(zip(names, weights, strict=True))
        value: Tensor = torch.func.functional_call(head, values, (x, compare))
        return value

    inputs = (
        make(12, 4).requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in head.parameters()),
    )
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["weight_norm", "plain"])
def test_features_and_prototypes_stay_float32_under_autocast(config: Config) -> None:
    head = PrototypeHead(16, config)
    with torch.autocast("cpu", torch.bfloat16):
        features, prototypes = head.features(torch.randn(5, 16)), head.prototypes()
        logits = head(torch.randn(5, 16))
    assert features.dtype == prototypes.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert (
        PrototypeHead(16, config).bfloat16().prototypes().dtype == torch.float32
    )  # as FSDP gathers it in bf16


def test_a_head_on_the_meta_device_has_no_values() -> None:
    with torch.device("meta"):
        head = PrototypeHead(768, Config())
    assert all(p.is_meta for p in head.parameters())
    assert sum(p.numel() for p in head.parameters()) == (768 * 2048 + 2048) + (2048**2 + 2048) + (
        2048 * 256 + 256
    ) + (65536 * 257)
