"""`tapct import`: weights from elsewhere become an export, with a table of what was done."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_weights as foreign
import numpy as np
import torch
from scan_files import noise_ct, save_scan
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_export import tiny_export
from weights_parity import file_of, prefixed

import tapct
from tapct.config.plugins import Plugin

TAP = foreign.dinov2((1, 4, 8, 8), 2 * 4 * 4, registers=4)


def test_published_weights_become_an_export_that_embeds_a_scan(
    shell: Shell, tmp_path: Path
) -> None:
    source = file_of(prefixed(TAP, "model."), model_type="tapct")(tmp_path / "theirs")
    printed = shell.good("import", source, "--out", tmp_path / "ours", "--window", "8,32,32")
    assert "3D, patch 4x8x8, 1 channel, positions for 2x4x4 patches" in printed
    assert "group" in printed and "blocks.*.attn.qkv" in printed
    card = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert card["provenance"]["published_as"] == "theirs"
    assert card["preprocess"]["window"] == [8, 32, 32]
    scan = tmp_path / "scan.nii.gz"
    save_scan(scan, noise_ct(1))
    shell.good("embed", tmp_path / "ours", scan, "--out", tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as features:
        assert features["features_DZYX"].shape[0] == foreign.DIM
        assert np.isfinite(features["features_DZYX"]).all()


def test_weights_of_another_project_must_be_imported_before_they_are_evaluated(
    shell: Shell, tmp_path: Path
) -> None:
    source = file_of(TAP, model_type="tapct")(tmp_path / "theirs")
    assert f"`tapct import {source} --out FOLDER`" in shell.bad("eval", source)


def test_a_2d_file_becomes_3d_only_where_that_is_allowed(shell: Shell, tmp_path: Path) -> None:
    source = file_of(foreign.dinov2(), "dino.pth")(tmp_path / "2d")
    words = ("import", source, "model.patch=[4,14,14]", "--out", tmp_path / "3d")
    line = shell.bad(*words)
    assert "depth 1 to 4 by mean" in line and "add --allow inflated" in line
    printed = shell.good(*words, "--allow", "inflated", "--inflate", "centre")
    assert "depth 1 to 4 by centre" in printed
    loaded = tapct.load_pretrained(tmp_path / "3d")
    assert loaded.section.config.window == (4, 56, 56)
    assert loaded.provenance["fit"]["inflated"] == ["patch_embed.proj.weight"]


def test_an_own_export_keeps_its_values_card_and_origin(shell: Shell, tmp_path: Path) -> None:
    first = tiny_export(tmp_path / "first")
    shell.good("import", first, "preprocess.stride=[2,4,4]", "--out", tmp_path / "second")
    one, two = tapct.load_pretrained(first), tapct.load_pretrained(tmp_path / "second")
    assert isinstance(one.section, Plugin) and one.section == two.section
    assert two.preprocess.stride == (2, 4, 4)
    assert two.provenance["run"] == "tiny" and "published_as" not in two.provenance
    state = two.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())


def test_wrong_words_are_one_line(shell: Shell, tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source")
    out = ("--out", tmp_path / "out")
    assert "holds the source" in shell.bad("import", source, "--out", source)
    assert "three numbers of voxels" in shell.bad("import", source, *out, "--window", "8,x")
    assert "inflate: middle is none of" in shell.bad("import", source, *out, "--inflate", "middle")
    assert "allow: all is none of" in shell.bad("import", source, *out, "--allow", "all")
    assert "give a run folder" in shell.bad("import", tmp_path / "nothing", *out)
    assert "hu_contrac" in shell.bad("import", source, "hu_contrac.mean=1", *out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").touch()
    assert "exists and is no export" in shell.bad("import", source, *out)
