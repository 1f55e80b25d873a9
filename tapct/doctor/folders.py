"""Probe of the room in a folder: `python -m tapct.doctor.folders space ARGUMENTS`.

It runs in a process of its own, because a call to a dead network disk never returns.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tapct.doctor.facts import Space
from tapct.doctor.probes import report


def space(path: Path, must_exist: bool) -> Space:
    """Measure the room in a folder, and write a small file to it.

    Args:
        path: folder.
        must_exist: False: a missing folder is replaced by its nearest parent that exists.
    """
    folder = path.absolute()
    while not must_exist and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    total, free = 0, 0
    try:
        total, _, free = shutil.disk_usage(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tapct-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Space(str(path), total, free, error.strerror or str(error))
    return Space(str(path), total, free)


def main(arguments: dict[str, Any]) -> None:
    """Report on one folder."""
    report("space", lambda: space(Path(arguments["path"]), arguments["must_exist"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
