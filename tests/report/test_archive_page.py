"""The page about an archive: its counts are those of the manifest, and it names no path."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, save_scan
from shell import Shell
from shell import shell as shell  # a fixture

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.index.sub_manifest import write_selected
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import foreground, pack
from tapct.report import archive
from tapct.report.archive import bars, histogram, page, round_step

NAME = "Ophelia"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans, one of them twice, and a file that is no CT."""
    folder = tmp_path_factory.mktemp("archive")
    for i in range(3):
        hu_ZYX = make_ct((6 + i, 24, 26), i)
        save_scan(folder / NAME / f"{NAME}{i}.nii.gz", hu_ZYX, (0.8, 0.7, 1.0 + i))
    save_scan(folder / NAME / "copy.nii.gz", make_ct((6, 24, 26), 0), (0.8, 0.7, 1.0))
    save_scan(folder / NAME / "mr.nii.gz", np.full((6, 24, 26), 300, np.int16))
    build_manifest(folder / NAME, folder / "m.parquet", workers=0, min_depth=1)
    return folder


def test_the_page_has_the_counts_of_the_manifest_and_no_path(folder: Path, shell: Shell) -> None:
    printed = shell.good("report", folder / "m.parquet")
    file = folder / "m.html"
    html = file.read_text(encoding="utf-8")
    assert str(file) in printed and file.stat().st_mode & 0o777 == 0o600
    manifest = Manifest.read(folder / "m.parquet")
    for reason, number in manifest.summary().items():
        assert re.search(rf"<th>{reason}</th>.*?<td class='n'>{number}</td>", html)
    assert NAME not in html and "http" not in html.replace("http-equiv", "")
    assert all(row.patient not in html for row in manifest.rows if row.patient)
    pictures = re.findall(r"alt='slice of scan (\w+)'", html)
    assert len(pictures) == 5 and set(pictures) == {row.id for row in manifest.rows}
    assert "published contract" in html and "-1008.0" in html
    assert "<th>scans that have copies</th>" in html


def test_the_page_of_a_store_has_the_foreground(folder: Path) -> None:
    pack.pack(Manifest.read(folder / "m.parquet"), folder / "store")
    html = archive.write(folder / "store").read_text(encoding="utf-8")
    assert "this archive, body of 3 scans" in html
    assert archive.is_archive(folder / "store") and not archive.is_archive(folder)
    (folder / "moved").mkdir(exist_ok=True)
    (folder / "m.parquet").rename(folder / "moved" / "m.parquet")
    with pytest.raises(UserError, match="is gone or has changed; give a manifest"):
        archive.write(folder / "store")
    (folder / "moved" / "m.parquet").rename(folder / "m.parquet")


def test_the_folder_of_an_archive_stands_for_its_manifest(folder: Path, shell: Shell) -> None:
    grown, html = folder / "grown", folder / "page.html"
    words = ["index", folder / NAME, "--out", grown, "--workers", "1", "--report", html]
    assert f"report: {html}" in shell.good(*words)
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(grown / "manifest.html") in shell.good("report", grown)
    sub, page_of_sub = folder / "chosen.parquet", folder / "chosen.html"
    words = ["index", grown, "--select", "depth == 7", "--out", sub]
    shell.good(*words, "--report", page_of_sub)
    assert [row.depth for row in Manifest.read(sub).rows] == [7]
    assert "<dt>accepted scans</dt><dd>1</dd>" in page_of_sub.read_text(encoding="utf-8")
    assert "--data" in shell.bad("report", grown, "--data", "x")


@pytest.mark.parametrize("words", [["--part", "1/2"], ["--min-depth", "3"], ["--fresh"]])
def test_an_option_without_effect_on_a_selection_is_refused(
    folder: Path, tmp_path: Path, shell: Shell, words: list[str]
) -> None:
    given = ["index", folder / "m.parquet", "--select", "depth > 6"]
    line = shell.bad(*given, "--out", tmp_path / "sub.parquet", *words)
    assert f"{words[0]} has no effect with --select" in line
    for out in (tmp_path, tmp_path / "sub.txt"):
        assert "is no .parquet file" in shell.bad(*given, "--out", out)
    assert not list(tmp_path.iterdir())


def test_a_store_without_foreground_has_a_page_without_its_statistics(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all label maps hold background alone."""
    pack.pack(Manifest.read(folder / "m.parquet"), tmp_path / "store")
    monkeypatch.setattr(foreground, "body_voxels", lambda store, i: np.zeros(0, np.int16))
    html = archive.write(tmp_path / "store").read_text(encoding="utf-8")
    assert "published contract" in html and "this archive, body of" not in html


def test_a_place_that_may_not_be_written_is_refused_before_scans_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.access stands for a read-only mount, since root may write to every other folder."""
    place = tmp_path / "mounted" / "new" / "page.html"
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(archive.archive_pictures, "draw", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(UserError, match="give another place with --out"):
        archive.write(folder / "m.parquet", place)


def test_an_archive_without_an_accepted_scan_has_a_page(tmp_path: Path) -> None:
    rows = (Row("1" * 16, "x<b>.nii", "nifti", reason="not_ct"),)
    html = page("a<b>", Manifest(rows, tmp_path))
    assert "a&lt;b&gt;" in html and "<b>" not in html


def test_a_folder_in_place_of_the_page_is_refused_before_scans_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive.archive_pictures, "draw", None)
    with pytest.raises(UserError, match="is a folder; give the file to write"):
        archive.write(folder / "m.parquet", folder)


def test_bars_and_ranges_hold_every_value() -> None:
    assert bars([("a<", 3), ("b", 0)]).count("<i ") == 1
    for values in (
        [1.0, 1.0],
        [0.3, 7.2, 7.3],
        [-1000.0, 3000.0, 2.0],
        [5.0, float("nan")],
        [0.7, 0.7000000000000001],
        [0.7, float(np.float32(0.7))],
        [-1000.0, -1000.02],
        [1000.0, 1001.0, 1001.0],
        [100.001, 100.012],
    ):
        chart = histogram("T", "mm", np.array(values))
        shown = [int(text) for text in re.findall(r"<td class='n'>(\d+)</td>", chart)]
        assert sum(shown) == np.isfinite(values).sum()
        labels = re.findall(r"<th>(.*?)</th>", chart)
        assert len(labels) == len(set(labels))
        assert ("1 unknown" in chart) == bool(np.isnan(values).any())
    for equal, label in (([5.0, 5.0], "5"), ([0.7, float(np.float32(0.7))], "0.7")):
        assert re.findall(r"<th>(.*?)</th>", histogram("T", "mm", np.array(equal))) == [label]
    assert [round_step(x) for x in (0.3, 1.0, 1.1, 30.0)] == [0.5, 1.0, 2.0, 50.0]


def test_a_sub_manifest_has_the_selected_rows_and_names_where_they_came_from(
    folder: Path, tmp_path: Path, shell: Shell
) -> None:
    whole = Manifest.read(folder / "m.parquet")
    out = tmp_path / "sub.parquet"
    text = "spacing_z_mm < 2.5 and depth > 2"
    printed = shell.good("index", folder / "m.parquet", "--select", text, "--out", out)
    assert f"2 of 3 accepted scans of {folder / 'm.parquet'} fulfil {text}" in printed
    sub = Manifest.read(out)
    expected = [row.id for row in whole.accepted if row.spacing_z_mm < 2.5]
    assert [row.id for row in sub.rows] == expected and sub.root == whole.root
    step = {"manifest": whole.digest, "accepted": 3, "select": text}
    assert sub.selected_from == (step,) and sub.digest != whole.digest
    list(write_selected(out, tmp_path / "sub2.parquet", "depth == 7"))
    twice = Manifest.read(tmp_path / "sub2.parquet")
    assert [one["manifest"] for one in twice.selected_from] == [whole.digest, sub.digest]
    assert len(pack.pack(twice, tmp_path / "store").packed) == 1
    for words, part in (
        ((folder, "--select", text), "index the folder first"),
        ((out, "--select", "depth > 99"), "leaves none of the 2"),
        ((out, "--select", "depht > 9"), "did you mean depth"),
    ):
        line = shell.bad("index", *words, "--out", tmp_path / "never.parquet")
        assert part in line and not (tmp_path / "never.parquet").exists()
    assert "would be lost" in shell.bad("index", out, "--select", text, "--out", out)
    assert Manifest.read(out).digest == sub.digest == replace(sub).digest


def test_columns_without_a_value_share_one_line(folder: Path) -> None:
    html = page("m", Manifest.read(folder / "m.parquet"))
    assert "<h3>Manufacturer</h3>" not in html and "<h3>Slices</h3>" in html
    (line,) = re.findall(r"In no file of the accepted scans: ([^<]*)\.</p>", html)
    assert "manufacturer" in line and "age" in line and "slices" not in line


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 kB"),
        (3_617_000, "3.62 MB"),
        (999_600_000, "1 GB"),
        (217e9, "217 GB"),
        (3.2e12, "3.2 TB"),
    ],
)
def test_sizes_have_a_unit_that_fits(num_bytes: int, shown: str) -> None:
    assert archive.size_text(num_bytes) == shown
