"""Virtual environments that have the torch of this one, and nothing else of it.

pip installs further packages from PyPI into them; torch itself is several hundred MB and is linked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Settings that would let other packages or caches of this environment in.
_LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_HOME", "HF_TOKEN", "TRANSFORMERS_CACHE")


def with_requirements(name: str, found: dict[str, metadata.Distribution]) -> None:
    """Add a distribution and all that it requires here, by normalised name."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        found[key] = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return  # of another platform
    for text in found[key].requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with_requirements(requirement.name, found)


def link_torch(folder: Path) -> None:
    """Fill a folder with links to torch, numpy and what they require."""
    folder.mkdir(parents=True)
    found: dict[str, metadata.Distribution] = {}
    for name in ("torch", "numpy"):
        with_requirements(name, found)
    for distribution in found.values():
        root = Path(str(distribution.locate_file("")))
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if (root / top).exists() and not (folder / top).exists():
                (folder / top).symlink_to(root / top)


class TorchEnvironment:
    """A virtual environment with torch, and the packages that pip installs.

    Args:
        folder: folder to make.
        packages: arguments of `pip install`, e.g. transformers==4.49.0.
    """

    def __init__(self, folder: Path, packages: Sequence[str]) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"
        link_torch(folder / "torch")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "venv" / "lib" / version / "site-packages"
        (site / "torch.pth").write_text(f"{folder / 'torch'}\n")
        self.install(packages)

    def install(self, packages: Sequence[str]) -> None:
        self.run(["-m", "pip", "install", "--quiet", *packages], self.folder)

    def run(self, arguments: Sequence[str], folder: Path) -> str:
        """Standard output of this environment's Python; a failure raises with its error output."""
        kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        kept |= {"HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=folder, env=kept, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout
