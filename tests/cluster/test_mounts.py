"""Folders that a job mounts in its container."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_store

from tapct.base.exits import UserError
from tapct.cluster import mounts
from tapct.data.manifest import Manifest


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside of the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "data" / "scans").mkdir(parents=True)
    for name in ("p.csv", "scans/file.dcm"):
        (tmp_path / "data" / name).touch()
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("word", "folder"),
    [
        ("{data}/scans/*/ct.nii.gz", "{data}/scans"),
        ("{data}/sc*", "{data}"),
        ("{data}/scans/file.dcm[1-20]", "{data}/scans"),
        ("{data}/p.csv:person", "{data}"),
        ("--patient-column={data}/p.csv:person", "{data}"),
        ("lung={data}/scans", "{data}/scans"),
        ("--masks=lung={data}/scans", "{data}/scans"),
        ("{data}/reports/new/r.html", "{data}"),
        ("--cache={data}/cache", "{data}"),
        ("/no-such-folder/r.html", ""),
        ("/", ""),
        ("/*/ct.nii.gz", ""),
        ("new.html", ""),
        ("depth > 9", ""),
    ],
)
def test_a_word_of_a_command_names_a_folder(data: Path, word: str, folder: str) -> None:
    found = mounts.named_by(["index", word.format(data=data)]) - {str(Path.cwd())}
    assert found == ({folder.format(data=data)} if folder else set())


def test_a_config_names_only_what_exists(data: Path) -> None:
    config = {"out": f"{data}/runs/new", "eval": {"tables": [f"{data}/scans/*.csv"]}, "seed": 1}
    assert mounts.named_in(config) == {f"{data}/scans"}


def test_the_root_of_a_manifest_is_mounted_where_it_exists(data: Path) -> None:
    store = make_store(data / "archive")
    (manifest,) = data.joinpath("archive").rglob("manifest.parquet")
    root = Manifest.read(manifest).root
    words = ["pack", str(manifest), "--root", str(data / "scans"), "--out", str(store)]
    assert str(root) in mounts.named_by(words)
    root.rename(root.with_name("elsewhere"))
    assert str(root) not in mounts.named_by(words)


def test_a_store_needs_the_manifest_that_was_packed(data: Path) -> None:
    store = make_store(data / "archive")
    (data / "link").symlink_to(data / "archive")
    behind_link = data / "link" / "store"
    both = {str(data / "archive"), str(data / "link")}
    assert mounts.of_manifests([str(behind_link), str(data)]) == both
    assert str(store.parent) in mounts.named_by(["eval", "run", str(store)])
    (store.parent / "manifest.parquet").unlink()
    assert mounts.of_manifests([str(store)]) == set()


def test_a_folder_of_the_nodes_is_mounted_as_written(data: Path) -> None:
    (data / "disk").symlink_to(data / "scans")
    cache = str(data / "disk" / "cache")
    Path(cache).mkdir()  # also on this machine
    config = {"data": {"store": str(data / "scans"), "cache": {"dir": cache}}}
    assert mounts.named_in(config) == {str(data / "scans")}
    assert mounts.outermost(["/store"], [cache]) == sorted([cache, "/store"])
    with pytest.raises(UserError, match="comma or colon"):
        mounts.outermost(["/store"], ["/local/a:b"])
