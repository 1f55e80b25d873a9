"""`tapct embed --format cvpr26`: one vector per scan, as the challenge reads them."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scan_files import noise_ct, save_scan
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_export import tiny_export
from tiny_run import make_archive

import tapct
from tapct.base import exits
from tapct.data.scans.ingest import read_volume

NAMES = ("amos_0001", "amos_0004", "amos_0038")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three scans, and label maps with 1 and 5 in two of them."""
    folder = tmp_path_factory.mktemp("embed")
    tiny_export(folder / "model")
    for seed, name in enumerate(NAMES):
        save_scan(folder / "images" / f"{name}.nii.gz", noise_ct(seed))
        labels = np.zeros((6, 24, 26), np.uint8)
        labels[2:4, 8:16, 4:12] = 1
        labels[2:4, 8:16, 12:20] = 5 if seed else 0
        save_scan(folder / "totalseg" / f"{name}.nii.gz", labels)
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """The vectors of a folder, read as the challenge reads them."""
    found = {}
    for file in sorted(folder.iterdir()):
        with h5py.File(file, "r") as content:
            found[file.name] = content["y_hat"][:]
    return found


def embed(place: Path, out: Path, *words: str | Path) -> tuple[Any, ...]:
    return ("embed", place / "model", place / "images", "--out", out, "--format", "cvpr26", *words)


def test_the_vectors_are_those_of_load_pretrained(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    shell.good(*embed(place, tmp_path / "vectors"))
    found = read(tmp_path / "vectors")
    assert list(found) == [f"{name}.h5" for name in NAMES]
    pretrained = tapct.load_pretrained(place / "model")
    for name in NAMES:
        embedding = pretrained.embed(read_volume(place / "images" / f"{name}.nii.gz"))
        mean_D = embedding.features_DZYX.reshape(8, -1).mean(1)
        vector = found[f"{name}.h5"]
        assert vector.dtype == np.float32 and vector.shape == (16,)
        np.testing.assert_allclose(vector, [*embedding.cls_D, *mean_D], rtol=1e-5, atol=1e-6)
    assert not np.allclose(*list(found.values())[:2])


def test_a_mask_pools_the_patches_that_it_covers(place: Path, tmp_path: Path, shell: Shell) -> None:
    words = ("--masks", place / "totalseg", "--organ", "1")
    shell.good(*embed(place, tmp_path / "one", *words))
    pretrained = tapct.load_pretrained(place / "model")
    volume = read_volume(place / "images" / "amos_0001.nii.gz")
    features_DZYX = pretrained.embed(volume).features_DZYX
    # 24x26 voxels become 16x16, of which a patch is 4x4: weights are shares of the patches' voxels
    mask_ZYX = np.zeros((6, 24, 26))
    mask_ZYX[2:4, 8:16, 4:12] = 1
    rows = (np.arange(24) + 0.5) * 16 / 24 // 4
    columns = (np.arange(26) + 0.5) * 16 / 26 // 4
    shares_YX = np.zeros((4, 4))
    for y in range(24):
        for x in range(26):
            shares_YX[int(rows[y]), int(columns[x])] += mask_ZYX[2, y, x]
    counts_YX = np.outer(np.bincount(rows.astype(int)), np.bincount(columns.astype(int)))
    weights_YX = shares_YX / counts_YX
    expected = (features_DZYX[:, 1] * weights_YX).sum((1, 2)) / weights_YX.sum()
    np.testing.assert_allclose(read(tmp_path / "one")["amos_0001.h5"], expected, rtol=0.05)

    code, out, err = shell(*embed(place, tmp_path / "five", "--masks", place / "totalseg",
                                  "--organ", "5"))  # fmt: skip
    assert code == exits.INCOMPLETE and "no vector of amos_0001: not_labels" in out
    assert "1 of 3 scans has no vector" in err and list(read(tmp_path / "five")) == [
        "amos_0004.h5", "amos_0038.h5",
    ]  # fmt: skip


def test_a_broken_scan_is_named_and_a_second_call_computes_the_rest(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "vectors"
    shutil.copytree(place / "images", scans)
    broken = scans / "amos_0004.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    words = ("embed", place / "model", scans, "--out", out, "--format", "cvpr26")
    code, printed, err = shell(*words)
    assert code == exits.INCOMPLETE and "no vector of amos_0004: " in printed
    assert len(read(out)) == 2 and "Traceback" not in printed + err
    kept = (out / "amos_0001.h5").stat().st_mtime_ns
    broken.write_bytes(whole)
    assert "2 vectors" in shell.good(*words) and len(read(out)) == 3
    assert (out / "amos_0001.h5").stat().st_mtime_ns == kept

    save_scan(scans / "amos_0001.nii.gz", noise_ct(7))
    before = read(out)["amos_0001.h5"]
    shell.good(*words)
    assert not np.allclose(read(out)["amos_0001.h5"], before)
    assert "was made with another vector" in shell.bad(*words, "--vector", "cls")
    tiny_export(tmp_path / "other", seed=1)
    assert "was made with another model" in shell.bad("embed", tmp_path / "other", *words[2:])


def test_a_table_names_the_cases(place: Path, tmp_path: Path, shell: Shell) -> None:
    table = tmp_path / "gallstone.csv"
    table.write_text("case_id,gallstone,split\namos_0038.nii.gz,1,train\namos_0001,0,val\n")
    words = ("embed", place / "model", table, "--format", "cvpr26", "--vector", "cls")
    shell.good(*words, "--root", place / "images", "--out", tmp_path / "a")
    assert list(read(tmp_path / "a")) == ["amos_0001.h5", "amos_0038.h5"]
    table.write_text("id,split,ill\namos_0038,train,1\nabsent,val,0\n")
    code, out, _ = shell(*words, "--root", place / "images", "--out", tmp_path / "b")
    assert code == exits.INCOMPLETE and "no vector of absent: no scan has this name" in out
    table.write_text("id\n../amos_0038\n")
    line = shell.bad(*words, "--root", place / "images", "--out", tmp_path / "c")
    assert "cannot be the name of a file" in line


def test_the_cache_gives_the_same_vectors_and_reads_no_weights_again(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("--cache", tmp_path / "cache", "--block", "last4")
    shell.good(*embed(place, tmp_path / "plain", *cache[2:]))
    shell.good(*embed(place, tmp_path / "first", *cache))
    entries = sorted((tmp_path / "cache").rglob("*.features"))
    assert len(entries) == 6  # two blocks of three scans
    monkeypatch.setattr("tapct.run.embed.one_scan.Extractor", None)
    shell.good(*embed(place, tmp_path / "second", *cache))
    plain, first, second = (read(tmp_path / name) for name in ("plain", "first", "second"))
    for name, vector in plain.items():
        assert vector.shape == (32,)
        np.testing.assert_allclose(first[name], vector, rtol=2e-3, atol=2e-3)
        assert np.array_equal(first[name], second[name])


def test_without_h5py_one_line_shows_how_to_install_it(
    place: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ImportError("no h5py here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install -c constraints.txt -e '.[eval]'" in shell.bad(
        *embed(place, tmp_path / "out")
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--format", "hdf5"], "must be one of npz, parquet, cvpr26, zarr"),
        (["--format", "parkett"], "did you mean parquet?"),
        (["--masks", "x"], "--masks needs --scan or --format parquet or cvpr26"),
        (["--vector", "cls", "--format", "zarr"], "--vector needs --scan"),
        (["--scan", "--format", "zarr"], "--format zarr holds dense ones"),
        (["--format", "cvpr26", "--vector", "clss"], "must be one of cls, mean"),
        (["--format", "cvpr26", "--block", "first"], "must be one of last, middle"),
        (["--format", "cvpr26", "--vector", "mask"], "do not fit"),
        (["--format", "cvpr26", "--organ", "liver"], "give --masks DIR"),
        (["--format", "cvpr26", "--masks", "nowhere"], "--masks nowhere is not a folder"),
        (["--format", "cvpr26", "--root", "x"], "is only used with a CSV file"),
    ],
)
def test_wrong_options_are_one_line(
    place: Path, tmp_path: Path, shell: Shell, words: list[str], expected: str
) -> None:
    out = tmp_path / "out"
    assert expected in shell.bad("embed", place / "model", place / "images", "--out", out, *words)
    assert not out.exists()


def test_two_scans_of_one_name_are_an_error(place: Path, tmp_path: Path, shell: Shell) -> None:
    for seed, folder in enumerate("ab"):
        save_scan(tmp_path / "scans" / folder / "case1.nii.gz", noise_ct(seed))
    words = ("embed", place / "model", tmp_path / "scans", "--out", tmp_path / "v")
    assert "the same case ID case1" in shell.bad(*words, "--format", "cvpr26")


def test_a_phantom_archive_becomes_a_folder_of_vectors(
    place: Path, tmp_path: Path, shell: Shell
) -> None:
    archive = make_archive(tmp_path / "archive", num=3, dicom_share=0.5)
    words = ("embed", place / "model", "--format", "cvpr26", "--vector", "cls", "--out")
    shell.good(*words, tmp_path / "a", archive)  # the label maps are no scans
    shell.good(*words, tmp_path / "b", archive / "scan_labels.csv")
    found, named = read(tmp_path / "a"), read(tmp_path / "b")
    cases = {path.name.split(".")[0] for path in (archive / "labels").glob("*.nii.gz")}
    assert set(found) == {f"{case}.h5" for case in cases} and len(cases) == 3
    assert all(np.array_equal(found[name], named[name]) for name in named) and len(named) == 3
