"""Layers without `${...}` are merged without OmegaConf, to what OmegaConf gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tapct.config import merge, plain, yamlfile
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
    found = merge.merge_layers(RunConfig, layers, Sources())
    monkeypatch.setattr(merge, "is_plain", lambda tree: False)
    by_omegaconf = merge.merge_layers(RunConfig, layers, Sources())
    assert found == by_omegaconf
    assert to_text(found) == to_text(by_omegaconf), "in the same order, too"
    assert [to_text(layer.tree) for layer in layers] == before


def test_overrides_merge_as_in_omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*OVERRIDES, "a={b: 1, c: [1, 2]}", "a={b: {d: 2}}", "a.c=[3]", "a=null", "e.f=1")
    (found,) = read_overrides(words)
    monkeypatch.setattr(yamlfile, "is_plain", lambda tree: False)
    (by_omegaconf,) = read_overrides(words)
    assert found == by_omegaconf and to_text(found.tree) == to_text(by_omegaconf.tree)


@pytest.mark.parametrize(
    ("tree", "is_plain"),
    [
        ({"a": 1, "b": {"c": [1, "x", {"d": None}]}}, True),
        ({"a": "costs $5 {or} more"}, True),
        ({"a": {"b": "${c}"}}, False),
        ({"a": [{"b": "x/${HOME}"}]}, False),
        ({"a": ["???"]}, False),
    ],
)
def test_text_that_omegaconf_replaces_or_refuses_is_found(tree: Any, is_plain: bool) -> None:
    assert plain.is_plain(tree) == is_plain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_tapct_wrote_is_read_as_by_omegaconf(path: Path) -> None:
    text = to_text(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    assert from_text(text) == OmegaConf.to_container(OmegaConf.create(text))
