"""Copy this tapct into the run folder, so that a job runs the code that was submitted."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from pathlib import Path

import tapct
from tapct.base import files
from tapct.cluster.folders import make_parents
from tapct.run.provenance import git_revision
from tapct.run_folder import RunFolder

PACKAGE = Path(tapct.__file__).resolve().parent


def snapshot_name() -> str:
    """Git revision and a digest of this tapct's files.

    The revision alone would not identify a working tree with uncommitted changes.
    """
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    revision = re.sub(r"[^\w.-]", "", git_revision())
    return "-".join(filter(None, [revision, digest.hexdigest()[:10]]))


def copy_package(root: Path, undo: contextlib.ExitStack) -> Path:
    """Copy this tapct to HOME/code/<name>/tapct, unless that copy exists already.

    Args:
        root: folder for code and logs of a submission.
        undo: stack that removes the copy again.
    Returns:
        HOME/code/<name>, the folder to put on PYTHONPATH.
    """
    target = RunFolder(root.absolute()).code / snapshot_name()
    if target.is_dir():
        return target
    make_parents(target.parent, undo)
    with files.replacing_folder(target) as folder:
        for path in _sources():
            copy = folder / "tapct" / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        (folder / "tapct" / "REVISION").write_text(git_revision() + "\n", encoding="utf-8")
    undo.callback(shutil.rmtree, target, ignore_errors=True)
    return target


def _sources() -> list[Path]:
    sources = (path for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(path for path in sources if "__pycache__" not in path.parts)
