"""`tapct embed` over many scans: what is written, and that a killed call is resumed."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from scan_files import noise_ct, save_scan
from shell import Shell, files_of
from shell import shell as shell  # a fixture
from tiny_export import tiny_export

import tapct
from tapct.base import exits, files
from tapct.base.exits import UserError
from tapct.data.scans import ingest
from tapct.run.embed import many_scans, named_scans, outputs, vector_table
from tapct.run.embed.scan_vector import VectorChoice

NAMES = ("a1", "b2", "c3")
COLUMNS = [
    "id", "path", "label", "block", "kind", "vector", "shape_zyx", "spacing_mm_zyx",
    "origin_mm_xyz", "directions", "stamp",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three scans, of which the last two lie in folders of their own."""
    folder = tmp_path_factory.mktemp("embed")
    tiny_export(folder / "model")
    for seed, name in enumerate(NAMES):
        below = folder / "images" / ("" if seed == 0 else f"sub{seed}")
        save_scan(below / f"{name}.nii.gz", noise_ct(seed))
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    return tapct.load_pretrained(place / "model")


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "vectors.parquet").to_pylist()


def expected(model: Any, path: Path) -> np.ndarray:
    found = model.embed(path)
    return np.concatenate([found.cls_D, found.features_DZYX.reshape(8, -1).mean(1)])


def test_a_table_has_one_row_per_scan(
    place: Path, model: Any, tmp_path: Path, shell: Shell
) -> None:
    printed = shell.good(
        "embed", place / "model", place / "images", "--scan", "--out", tmp_path / "v"
    )
    assert f"3 vectors in {tmp_path / 'v' / 'vectors.parquet'}" in printed
    assert "embed 3/3" in printed and ("scans/s" in printed or "s/scan" in printed)
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["vectors.parquet"]
    table = pq.read_table(tmp_path / "v" / "vectors.parquet")
    assert table.column_names == COLUMNS
    assert str(table.schema.field("vector").type) == "list<element: float>"
    found = rows(tmp_path / "v")
    assert [row["id"] for row in found] == list(NAMES)
    assert [row["path"] for row in found] == ["a1.nii.gz", "sub1/b2.nii.gz", "sub2/c3.nii.gz"]
    for row in found:
        path = place / "images" / row["path"]
        np.testing.assert_allclose(row["vector"], expected(model, path), rtol=1e-4, atol=1e-6)
        volume = tapct.read_volume(path)
        assert (row["kind"], row["block"], row["label"]) == ("cls_mean", "last", None)
        assert tuple(row["shape_zyx"]) == volume.hu_ZYX.shape
        assert tuple(row["spacing_mm_zyx"]) == pytest.approx(volume.spacing_mm)
        assert tuple(row["origin_mm_xyz"]) == pytest.approx(volume.origin_mm)
        assert row["directions"] == pytest.approx(np.eye(3).ravel())


@pytest.mark.parametrize("form", ["parquet", "npz", "zarr", "cvpr26"])
def test_a_call_that_was_killed_is_finished_by_the_next_one_with_equal_results(
    form: str, place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("embed", place / "model", place / "images", "--format", form, "--out")
    shell.good(*words, tmp_path / "whole")
    real, reads = many_scans.read_source, []

    def interrupted(source: Any) -> Any:
        reads.append(source.path.name)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return real(source)

    monkeypatch.setattr(many_scans, "read_source", interrupted)
    code, out, err = shell(*words, tmp_path / "parts")
    assert code == exits.INTERRUPTED and "1 of 3 scans are done; repeat the command" in out
    assert err == "error: interrupted\n"
    assert "vectors.parquet" not in {path.name for path in (tmp_path / "parts").iterdir()}
    part = tmp_path / "parts" / vector_table.PART
    if part.exists():  # what a power cut leaves of the next line
        with open(part, "ab") as file:
            file.write(b'{"id": "b2", "path": "sub')
    assert "1 " in shell.good(*words, tmp_path / "parts")
    assert len(reads) == 4
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() and whole == parts
    shell.good(*words, tmp_path / "parts")
    assert len(reads) == 4 and files_of(tmp_path / "parts") == parts


def test_sigterm_while_a_scan_is_read_is_no_fault_of_the_scan(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(source: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ingest, "read_image", terminated)
    words = ("embed", place / "model", place / "images", "--scan", "--out", tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, printed, _ = shell(*words)
    assert code == exits.TERMINATED and "no vector" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_table_and_its_part_costs_nothing(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("embed", place / "model", place / "images", "--scan", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(vector_table.Path, "unlink", lambda *_, **__: None)
        shell.good(*words)
    assert (tmp_path / vector_table.PART).exists()
    before = (tmp_path / "vectors.parquet").read_bytes()
    shell.good(*words)
    assert (tmp_path / "vectors.parquet").read_bytes() == before
    assert not (tmp_path / vector_table.PART).exists()


def test_broken_changed_new_and_removed_scans_in_a_table(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    images, out = tmp_path / "images", tmp_path / "v"
    shutil.copytree(place / "images", images)
    words = ("embed", place / "model", images, "--scan", "--out", out)
    shell.good(*words)
    first = {row["id"]: row["vector"] for row in rows(out)}
    whole = (images / "a1.nii.gz").read_bytes()
    (images / "a1.nii.gz").write_bytes(whole[: len(whole) // 2])
    save_scan(images / "sub1" / "b2.nii.gz", noise_ct(8))
    save_scan(images / "aa.nii.gz", noise_ct(9))
    code, printed, err = shell(*words)
    assert code == exits.INCOMPLETE and "no vector of a1: " in printed
    assert "1 of 4 scans has no vector" in err and "(a1)" in err
    second = {row["id"]: row["vector"] for row in rows(out)}
    assert list(second) == ["aa", "b2", "c3"]
    assert second["c3"] == first["c3"] and second["b2"] != first["b2"]
    (images / "a1.nii.gz").write_bytes(whole)
    shutil.rmtree(images / "sub2")
    shell.good(*words)
    third = {row["id"]: row["vector"] for row in rows(out)}
    assert list(third) == ["a1", "aa", "b2", "c3"]  # a scan that is gone keeps its row
    assert third["a1"] == first["a1"]
    assert "was made with another vector" in shell.bad(*words, "--vector", "cls")
    tiny_export(tmp_path / "other", seed=1)
    assert "was made with another model" in shell.bad("embed", tmp_path / "other", *words[2:])
    (out / "vectors.parquet").write_bytes(b"no table")
    assert "vectors.parquet is damaged" in shell.bad(*words)


def test_two_calls_do_not_write_one_table(place: Path, tmp_path: Path, shell: Shell) -> None:
    handle = vector_table._locked(tmp_path)
    words = ("embed", place / "model", place / "images", "--scan", "--out", tmp_path)
    assert "another tapct embed writes to" in shell.bad(*words)
    os.close(handle)
    shell.good(*words)


def test_calls_that_share_the_scans_write_the_table_of_one_call(
    place: Path, model: Any, tmp_path: Path, shell: Shell
) -> None:
    words = ("embed", place / "model", place / "images", "--scan", "--out")
    shell.good(*words, tmp_path / "one")
    encoder = many_scans.encoder_of(model, torch.device("cpu"))
    cases = named_scans.find_cases(place / "images", None, None)
    out = tmp_path / "shared"
    for share, some in ((1, cases.found[::2]), (2, cases.found[1:])):  # one scan is in both
        output = many_scans.output_for("parquet", out, encoder, VectorChoice(), share)
        with output:
            assert "another tapct embed" in shell.bad(*words, out)
            with pytest.raises(UserError, match="another tapct embed"):
                many_scans.output_for("parquet", out, encoder, VectorChoice(), share).__enter__()
            with many_scans.output_for("parquet", out, encoder, VectorChoice(), 3):
                pass  # other shares may write
        many_scans.embed_cases(encoder, named_scans.NamedScans(tuple(some)), output, out)
    names = [f"{vector_table.PART}.{number}" for number in (1, 2, 3)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "3 vectors in" in shell.good(*words, out)
    assert files_of(out) == files_of(tmp_path / "one")


def test_a_table_of_scans_has_paths_ids_and_labels(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    images = place / "images"
    table = tmp_path / "scans.csv"
    table.write_text(
        f"path,id,label\n{images / 'a1.nii.gz'},first,ill\n"
        "sub1/b2.nii.gz,second,\nsub2/none.nii.gz,third,well\n"
    )
    words = ("embed", place / "model", table, "--root", images, "--scan", "--out")
    code, printed, err = shell(*words, tmp_path / "v")
    assert code == exits.INCOMPLETE and "no vector of third: no scan has this name" in printed
    assert [(row["id"], row["label"]) for row in rows(tmp_path / "v")] == [
        ("first", "ill"), ("second", ""),
    ]  # fmt: skip
    table.write_text("path\nsub1/b2.nii.gz\nsub2/c3\n")
    shell.good(*words, tmp_path / "w")
    assert [row["id"] for row in rows(tmp_path / "w")] == ["b2", "c3"]
    table.write_text("file\nx\n")
    assert "has no column that names the cases" in shell.bad(*words, tmp_path / "x")
    table.write_text("path\nx.nii.gz\n")
    assert "none of the 1 rows" in shell.bad(*words, tmp_path / "x")
    table.write_text("path,id\na1.nii.gz,x\nsub1/b2.nii.gz,x\n")
    assert "the same case ID x" in shell.bad(*words, tmp_path / "x")


def test_a_corrected_label_needs_no_new_vector(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = tmp_path / "scans.csv", tmp_path / "v"
    words = ("embed", place / "model", table, "--root", place / "images", "--scan", "--out", out)
    table.write_text("path,id,label\na1.nii.gz,x,ill\nsub1/b2.nii.gz,y,well\n")
    shell.good(*words)
    before = rows(out)
    table.write_text("path,id,label\na1.nii.gz,x,well\nsub1/b2.nii.gz,y,well\n")
    monkeypatch.setattr(vector_table, "vector_of", None)  # nothing is computed
    assert "2 vectors" in shell.good(*words)
    assert rows(out) == [{**before[0], "label": "well"}, before[1]]


def test_equal_file_names_get_the_names_of_their_folders(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    for seed, folder in enumerate(("P1", "P2")):
        save_scan(tmp_path / "scans" / folder / "ct.nii.gz", noise_ct(seed))
    words = ("embed", place / "model", tmp_path / "scans", "--out", tmp_path / "v")
    shell.good(*words)
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["P1_ct.npz", "P2_ct.npz"]
    (tmp_path / "scans.csv").write_text("path\nscans/P1/ct.nii.gz\nscans/P2/ct.nii.gz\n")
    shell.good("embed", place / "model", tmp_path / "scans.csv", "--scan", "--out", tmp_path / "w")
    assert [row["id"] for row in rows(tmp_path / "w")] == ["scans_P1_ct", "scans_P2_ct"]


def test_dense_features_in_npz_and_zarr_are_those_of_embed(
    place: Path, model: Any, tmp_path: Path, shell: Shell
) -> None:
    scan = place / "images" / "a1.nii.gz"
    want = model.embed(scan)
    for form in ("npz", "zarr"):
        words = ("embed", place / "model", scan, "--format", form, "--out", tmp_path / form)
        assert "1 feature file in" in shell.good(*words)
    with np.load(tmp_path / "npz" / "a1.npz", allow_pickle=False) as found:
        for name, array in want.arrays().items():
            np.testing.assert_array_equal(found[name], array)
        assert json.loads(str(found["tapct"]))["stamp"]
    group = zarr.open_group(tmp_path / "zarr" / "a1.zarr", mode="r")
    np.testing.assert_array_equal(group["features"][:], want.features_DZYX)
    np.testing.assert_array_equal(group["cls"][:], want.cls_D)
    assert group["features"].metadata.dimension_names == ("channel", "z", "y", "x")
    facts = group.attrs["tapct"]
    assert facts["origin_mm"] == pytest.approx(want.origin_mm)
    assert np.allclose(facts["directions"], want.directions)
    (scales,) = group.attrs["ome"]["multiscales"]
    scale, translation = scales["datasets"][0]["coordinateTransformations"]
    z, y, x = want.centres_mm[1, 2, 3][::-1]
    at = np.asarray(scale["scale"]) * [0, 1, 2, 3] + translation["translation"]
    np.testing.assert_allclose(at, [0, z, y, x])
    assert [axis["name"] for axis in scales["axes"]] == ["c", "z", "y", "x"]


def test_a_vector_in_npz_and_its_kinds(
    place: Path, model: Any, tmp_path: Path, shell: Shell
) -> None:
    scan = place / "images" / "a1.nii.gz"
    dense = model.embed(scan).features_DZYX.reshape(8, -1)
    words = ("embed", place / "model", scan, "--scan", "--format", "npz")
    shell.good(*words, "--vector", "mean_std_max", "--out", tmp_path / "a")
    with np.load(tmp_path / "a" / "a1.npz") as found:
        want = np.concatenate([dense.mean(1), dense.std(1), dense.max(1)])
        np.testing.assert_allclose(found["vector_D"], want, rtol=1e-5, atol=1e-6)
    shell.good(*words, "--vector", "registers", "--block", "last4", "--out", tmp_path / "b")
    with np.load(tmp_path / "b" / "a1.npz") as found:
        assert found["vector_D"].shape == (2 * 8,)


def test_without_zarr_one_line_shows_how_to_install_it(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("embed", place / "model", place / "images", "--format", "zarr", "--out")
    monkeypatch.setattr(zarr, "__version__", "2.18.3")
    assert "2.18.3 is installed" in shell.bad(*words, tmp_path / "out")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "zarr":
            raise ImportError("no zarr here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install -c constraints.txt -e '.[zarr]'" in shell.bad(*words, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_used_are_one_line(place: Path, tmp_path: Path, shell: Shell) -> None:
    model, images = place / "model", place / "images"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, expected in (
        ((model, tmp_path / "none", "--scan", "--out", tmp_path / "o"), "none does not exist"),
        ((tmp_path / "none", images, "--scan", "--out", tmp_path / "o"), "none"),
        ((model, tmp_path / "empty", "--scan", "--out", tmp_path / "o"), "holds no scans"),
        ((model, images, "--scan"), "--out is missing"),
        ((model, images), "--out is missing"),
        ((model, images, "--out", tmp_path / "f.npz"), "scans of a folder, give a folder as --out"),
        ((model, images, "--scan", "--out", tmp_path / "v.parquet"), "looks like a file"),
        ((model, images, "--scan", "--out", tmp_path / "file"), "is a file"),
        ((model, images, "--scan", "--out", tmp_path / "file" / "x"), "is not a folder"),
    ):
        assert expected in shell.bad("embed", *words)
    assert not (tmp_path / "f.npz").exists()


def test_memory_that_does_not_suffice_for_one_scan_leaves_the_others(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = many_scans.read_source

    def read(source: Any) -> Any:
        if source.path.name.startswith("b2"):
            raise MemoryError("bad allocation")
        return real(source)

    monkeypatch.setattr(many_scans, "read_source", read)
    words = ("embed", place / "model", place / "images", "--scan", "--out", tmp_path)
    code, printed, _ = shell(*words)
    assert code == exits.INCOMPLETE and "no vector of b2: out_of_memory: " in printed
    assert [row["id"] for row in rows(tmp_path)] == ["a1", "c3"]


def test_calls_that_start_at_once_do_not_stop_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_atomically

    def and_remove(path: Path, content: bytes) -> None:
        write(path, content)
        path.unlink()  # the other call has removed its own file, which has the same name

    monkeypatch.setattr(files, "write_atomically", and_remove)
    outputs.make_folder(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
