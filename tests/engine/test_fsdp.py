"""A sharded network computes with the numbers of the whole one where these must not be rounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tapct.distributed.world import mesh_of
from tapct.engine import fsdp
from tapct.models import vit
from tapct.nn import heads
from tapct.nn.prototype_loss import return_both
from tapct.ssl.student_teacher import Network

pytestmark = pytest.mark.dist


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(last_layer: str) -> Network:
    backbone = vit.build(vit.Config((4, 16, 16), (2, 8, 8), dim=16, depth=1, heads=2))
    settings = heads.Config(num_prototypes=24, hidden=16, bottleneck=8, last_layer=last_layer)
    head = heads.PrototypeHead(16, settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.last_layer.parameters():  # no power of two, which bf16 would keep
        nn.init.normal_(parameter, 1.0, 0.1, generator=generator)
    return Network(backbone, {"dino": head})


@pytest.mark.parametrize("keeps_gradient", [True, False])
@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_prototypes_are_not_rounded_to_bf16(
    one_rank: None, last_layer: str, keeps_gradient: bool
) -> None:
    whole = network(last_layer)
    sharded = copy.deepcopy(whole)
    fsdp.shard(sharded, mesh_of("cpu", 1, 1), bf16=True, keeps_gradient=keeps_gradient)
    x_RD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, found = (each.heads["dino"](x_RD, return_both) for each in (whole, sharded))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
