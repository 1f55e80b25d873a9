"""The command that installs an optional package, for error messages."""

from __future__ import annotations


def installing(extra: str, packages: str) -> str:
    """How to install packages that are not installed by default, as a part of a sentence.

    Args:
        extra: name of the extra in pyproject.toml.
        packages: the packages of it that are needed, as arguments of pip.
    """
    return (
        f"in the folder of tapct, run pip install -c constraints.txt -e '.[{extra}]'; if you have "
        f"no such folder, run pip install {packages}"
    )
