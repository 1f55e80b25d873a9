"""What is shipped: the sdist is the repository, the wheel of both is one, and it works anywhere."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
ADDED = {"PKG-INFO", "setup.cfg"}  # setuptools writes these into every sdist


def run(*words: str | Path, cwd: Path) -> str:
    """What a program prints that succeeds; it does not see this checkout of tapct."""
    done = started(*words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def started(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=kept, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git repository")
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(names) > 500
    return sorted(names)


@pytest.fixture(scope="module")
def tree(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without what git does not know."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD, "build_sdist", out, cwd=tree)
    (file,) = out.iterdir()
    return file


def test_the_sdist_holds_every_file_of_the_repository(sdist: Path, tracked: list[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = [Path(entry.name) for entry in archive.getmembers() if entry.isfile()]
    found = {Path(*name.parts[1:]).as_posix() for name in names}
    found = {name for name in found - ADDED if not name.startswith("tapct.egg-info/")}
    assert sorted(found) == tracked


def contents(wheel: Path) -> dict[str, str]:
    """File -> digest of its content; the list of digests in the wheel itself is left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("/RECORD")
        }


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD, "build_wheel", out, cwd=tree)
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_sdist_builds_the_wheel_of_the_tree(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-c", BUILD, "build_wheel", tmp_path, cwd=source)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name and contents(again) == contents(wheel)


def environment(folder: Path) -> Path:
    """An environment without tapct, which borrows all other packages; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    home = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # a .pth file in a folder that such a line adds is not read, so an editable tapct is not seen
    Path(home.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = started(python, "-c", "import tapct", cwd=folder)
    assert "No module named 'tapct'" in missing.stderr
    return python


def install(python: Path, source: str | Path) -> None:
    words = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(python, *words, "--ignore-installed", source, cwd=python.parent)


@pytest.mark.slow
def test_the_wheel_trains_the_shipped_config_in_an_empty_folder(
    wheel: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "env")
    install(python, wheel)
    tapct, here = python.parent / "tapct", tmp_path / "empty"
    here.mkdir()
    (here / "mine.yaml").write_text("base: smoke.yaml\nseed: 5\n")
    site = run(python, "-c", "import tapct; print(tapct.__file__)", cwd=here)
    assert site.startswith(str(tmp_path / "env"))
    run(tapct, "phantom", "--out", "scans", "--num", "4", cwd=here)
    run(tapct, "index", "scans", "--out", "manifest.parquet", cwd=here)
    run(tapct, "pack", "manifest.parquet", "--out", "store", cwd=here)
    tiny = ("data.store=store", "train.steps=2", "train.global_batch=2", "eval.during.every=0")
    run(tapct, "train", "smoke", "out=runs/smoke", *tiny, cwd=here)
    run(tapct, "train", "mine.yaml", "out=runs/mine", *tiny, cwd=here)
    run(tapct, "export", "runs/mine", cwd=here)
    run(tapct, "embed", "runs/mine/export", "scans", "--scan", "--out", "vectors", cwd=here)
    assert (here / "vectors" / "vectors.parquet").stat().st_size > 0
    assert (here / "runs" / "smoke" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_pip_installs_from_git(tracked: list[str], tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(python, f"git+file://{ROOT}")
    (tmp_path / "mine.yaml").write_text("base: smoke.yaml\n")
    tapct = python.parent / "tapct"
    assert run(tapct, "--version", cwd=tmp_path).strip()
    for config in ("smoke", "mine.yaml"):
        printed = run(tapct, "train", config, "--print-config", cwd=tmp_path)
        assert re.search(r"env/lib/.*/tapct/configs/smoke\.yaml:", printed)
