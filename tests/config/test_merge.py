"""Layers without `${...}` are merged without OmegaConf, to what OmegaConf gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tapct.config import merge
from tapct.config.sources import Sources
from tapct.config.yamlfile import from_text, read_chain, read_overrides, to_text
from tapct.run.config import RunConfig

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
OVERRIDES = (
    "model.dim=96", "losses.gram.start=3", "losses.koleo=null", "eval.baselines=[raw_hu]",
    "views.ops={}", "losses={ibot: {weight: 2}}", "data.loader=null", "model={name: vit, depth: 2}",
)  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_plain_layers_merge_as_in_omegaconf(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [*read_chain(path), *read_overrides(OVERRIDES)]
    before = [to_text(layer.tree) for layer in layers]
    plain = merge.merge_layers(RunConfig, layers, Sources())
    monkeypatch.setattr(merge, "is_plain", lambda tree: False)
    by_omegaconf = merge.merge_layers(RunConfig, layers, Sources())
    assert plain == by_omegaconf
    assert to_text(plain) == to_text(by_omegaconf), "in the same order, too"
    assert [to_text(layer.tree) for layer in layers] == before


@pytest.mark.parametrize(
    ("tree", "plain"),
    [
        ({"a": 1, "b": {"c": [1, "x", {"d": None}]}}, True),
        ({"a": "costs $5 {or} more"}, True),
        ({"a": {"b": "${c}"}}, False),
        ({"a": [{"b": "x/${HOME}"}]}, False),
        ({"a": ["???"]}, False),
    ],
)
def test_text_that_omegaconf_replaces_or_refuses_is_found(tree: Any, plain: bool) -> None:
    assert merge.is_plain(tree) == plain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_tapct_wrote_is_read_as_by_omegaconf(path: Path) -> None:
    text = to_text(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    assert from_text(text) == OmegaConf.to_container(OmegaConf.create(text))
