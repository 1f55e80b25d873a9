"""Copy this tapct into the run folder, so that a job runs the code that was submitted."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

import tapct
from tapct.run.provenance import git_revision

PACKAGE = Path(tapct.__file__).resolve().parent


def new_folder(parent: Path, name: str, undo: contextlib.ExitStack) -> Path:
    """Make an absolute folder PARENT/NAME, or NAME-2 and so on; `undo` takes it and new parents
    away again.
    """
    parent = parent.absolute()
    for above in reversed([parent, *parent.parents]):
        if not above.exists():
            above.mkdir()
            undo.callback(remove_empty, above)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder
    raise AssertionError(f"a thousand submissions in one second in {parent}")


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sources() -> list[Path]:
    return sorted(
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def snapshot_name() -> str:
    """Git revision and content of this tapct; the revision alone says too little of a tree with
    local changes.
    """
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    revision = re.sub(r"[^\w.-]", "", git_revision())
    return "-".join(filter(None, [revision, digest.hexdigest()[:10]]))


def snapshot(home: Path, undo: contextlib.ExitStack) -> Path:
    """Copy this tapct to HOME/code/<name>/tapct, unless it is there already; returns
    HOME/code/<name>.
    """
    target = home.absolute() / "code" / snapshot_name()
    if target.is_dir():
        return target
    for above in reversed([target.parent, *target.parent.parents]):
        if not above.exists():
            above.mkdir()
            undo.callback(remove_empty, above)
    aside = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    undo.callback(shutil.rmtree, aside, ignore_errors=True)
    for path in _sources():
        copy = aside / "tapct" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (aside / "tapct" / "REVISION").write_text(git_revision() + "\n", encoding="utf-8")
    aside.chmod(0o755)  # mkdtemp's is for its owner alone
    aside.rename(target)
    undo.callback(shutil.rmtree, target, ignore_errors=True)
    return target
