"""Blocks that are computed again give the numbers of kept ones, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_ranks import good, largest_difference, largest_state_difference, train
from stopped import STEPS, stopped_run
from tiny_run import config_of

from tapct.base.exits import UserError
from tapct.engine import loop, recompute
from tapct.models import vit
from tapct.nn.contracts import Backbone
from tapct.nn.layers import DropKey
from tapct.run import pretrain
from tapct.types import Tokens

CONFIG = vit.Config(
    window=(8, 32, 32),
    dim=64,
    depth=4,
    heads=2,
    registers=2,
    layer_scale=1.0,
    drop_path=0.4,
    positions="both",
)
WORDS = ("train.precision=fp64", "model.drop_path=0.4")


def value_of(tokens: list[Tokens]) -> torch.Tensor:
    """A scalar on which every token has an influence of its own."""
    parts = [
        part for each in tokens for part in (each.cls_BD, each.registers_BRD, each.patches_BND)
    ]
    return torch.stack(
        [(part.double() * torch.arange(part.numel()).sin().view_as(part)).sum() for part in parts]
    ).sum()


def kept_bytes(
    model: vit.VisionTransformer, crops: list[torch.Tensor], key: DropKey
) -> tuple[int, list[Tokens]]:
    """Bytes beside the parameters that are kept for the backward pass, each storage once, inputs of
    blocks included.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_input(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        note(inputs[0])

    hooks = [block.register_forward_pre_hook(note_input) for block in model.blocks]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tokens = model(crops, None, key)
    for hook in hooks:
        hook.remove()
    return sum(seen.values()), tokens


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_losses_and_gradients_are_those_of_kept_blocks_and_memory_drops(
    every: int, autocast: bool
) -> None:
    crops = [torch.randn(4, 8, 32, 32), torch.randn(6, 8, 16, 16)]
    kept, values, gradients = [], [], []
    for share in (0, every):
        model = vit.build(CONFIG).train()
        recompute.recompute_blocks(model, share)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            size, tokens = kept_bytes(model, crops, DropKey(0, 3))
        value = value_of(tokens)
        value.backward()
        kept.append(size)
        values.append(value.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert torch.equal(values[0], values[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        found = gradients[1][name]
        assert (wanted is None and found is None) or torch.equal(wanted, found), (
            name
        )  # the same sums in the same order
    left = 1 - len(range(0, CONFIG.depth, every)) / CONFIG.depth  # of the blocks
    assert (
        kept[1] < (left + 0.3) * kept[0]
    )  # the rest: inputs of blocks, what comes before and after them


def test_a_pass_without_gradients_computes_a_block_once() -> None:
    calls = []
    block = torch.nn.Linear(2, 2)
    plain = block.forward
    block.forward = lambda x: calls.append(1) or plain(x)  # type: ignore[method-assign]
    recompute.recompute_forward(block)
    with torch.no_grad():
        block(torch.randn(3, 2))
    assert len(calls) == 1
    block(torch.randn(3, 2)).sum().backward()
    assert len(calls) == 3


def test_a_block_that_draws_by_itself_draws_the_same_again() -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(x.shape)

    block, x = Noise(), torch.ones(5, requires_grad=True)
    recompute.recompute_forward(block)
    y = block(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_a_backbone_without_blocks_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"train.recompute=2: this backbone has no repeated blocks.*set it to 0"
    ):
        recompute.recompute_blocks(Backbone(), 2)
    recompute.recompute_blocks(Backbone(), 0)


def test_a_run_may_resume_with_blocks_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    assert pretrain.train(config_of(tmp_path / "kept", store, *WORDS)) == loop.Stop(STEPS)
    stopped_run(monkeypatch, tmp_path, store, 5, *WORDS, "train.recompute=1")
    assert pretrain.train(config_of(tmp_path, store, *WORDS, "train.recompute=2")) == loop.Stop(
        STEPS
    )
    kept = tmp_path / "kept" / "run"
    assert largest_difference(tmp_path / "run", kept, ("loss/", "ce/", "grad_norm/")) == 0
    assert largest_state_difference(tmp_path / "run", kept, tmp_path) == 0


@pytest.mark.dist
def test_two_sharded_ranks_compute_again_and_change_nothing(tmp_path: Path, store: Path) -> None:
    for every in (0, 1):
        good(
            train(
                2,
                tmp_path / str(every),
                store,
                *WORDS,
                "train.steps=4",
                f"train.recompute={every}",
                timeout=300,
            )
        )
    again, kept = (tmp_path / str(every) / "run" for every in (1, 0))
    assert largest_difference(again, kept, ("loss/", "ce/", "grad_norm/")) < 1e-12
    assert largest_state_difference(again, kept, tmp_path) < 1e-12
