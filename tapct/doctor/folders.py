"""Room in a folder, asked in a process of its own, because a dead network disk answers nobody:
`python -m` this.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tapct.doctor.answers import answer
from tapct.doctor.facts import Space


def space(path: Path, must_exist: bool) -> Space:
    """Room in a folder and whether it can be written, tried with a small file.

    Args:
        must_exist: else its nearest parent is looked at, in which it would be made.
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
    """Answer for one folder."""
    answer("space", lambda: space(Path(arguments["path"]), arguments["must_exist"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
