"""What the contract tests of all plug-in folders share: which plug-ins there are, and other values
of their settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tapct.base.exits import UserError
from tapct.config import plugins

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


def examples() -> dict[str, str]:
    """Dotted module name -> text of the plug-ins of docs/extending.md, a user's own files."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        path = block.splitlines()[0].removeprefix("# ").removesuffix(".py")
        found[path.replace("/", ".")] = block
    return found


def cases(folder: str, user_folder: str) -> list[str]:
    """Names of all plug-ins of a kind: the files of tapct's folder and the examples of the docs.

    Args:
        folder: folder of tapct, e.g. views.ops.
        user_folder: folder of the examples, e.g. ops.
    """
    own = [name for name in examples() if name.startswith(f"mylab.{user_folder}.")]
    assert own, f"docs/extending.md has no example in mylab/{user_folder}"
    return [*plugins.available(folder), *own]


@contextmanager
def user_modules(folder: Path) -> Iterator[None]:
    """The examples of the docs as files of a folder on the path, and forgotten afterwards."""
    for name, text in examples().items():
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    known = {name for name in sys.modules if name.split(".")[0] == "mylab"}
    for name in known:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def default(folder: str, name: str) -> Any:
    """The `Config` of a plug-in with all its defaults."""
    return plugins.load(folder, name).Config()


def leaves(config: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields that are no sections themselves."""
    found: list[tuple[str, ...]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += leaves(value, (*prefix, field.name))
        else:
            found.append((*prefix, field.name))
    return found


def with_value(config: Any, path: Sequence[str], value: Any) -> Any:
    """The same config with another value at a path."""
    first, *rest = path
    if rest:
        value = with_value(getattr(config, first), rest, value)
    return dataclasses.replace(config, **{first: value})


def others(config: Any, path: Sequence[str]) -> list[Any]:
    """The config with other values of one field, as far as it accepts them."""
    section = config
    for name in path[:-1]:
        section = getattr(section, name)
    (field,) = (each for each in dataclasses.fields(section) if each.name == path[-1])
    value = getattr(section, field.name)
    found = []
    for other in candidates(value, field.metadata):
        if other == value:
            continue
        try:
            found.append(with_value(config, path, other))
        except UserError:  # a rule between fields
            continue
    return found


def candidates(value: Any, metadata: Any) -> list[Any]:
    """Values in the range of a field, some near to a given one and some far from it."""
    if metadata.get("choices"):
        return list(metadata["choices"])
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple):
        columns = [candidates(item, metadata) for item in value]
        return [tuple(row) for row in itertools.zip_longest(*columns, fillvalue=value[0])]
    if value is None:
        value = 1.0
    if isinstance(value, int):
        numbers: list[Any] = [value // 2, value * 2, value + 1, value - 1]
    else:
        assert isinstance(value, float), f"no other value of {value!r} is known"
        numbers = [value / 2, value * 2, value + 1.0, value - 1.0, 0.0, 1.0]
    return [number for number in numbers if in_range(number, metadata)]


def in_range(number: float, metadata: Any) -> bool:
    """Whether a number keeps the bounds of a field."""
    bounds = {key: metadata.get(key) for key in ("ge", "gt", "le", "lt")}
    return not (
        (bounds["ge"] is not None and number < bounds["ge"])
        or (bounds["gt"] is not None and number <= bounds["gt"])
        or (bounds["le"] is not None and number > bounds["le"])
        or (bounds["lt"] is not None and number >= bounds["lt"])
    )


def bases(config: Any) -> list[Any]:
    """A config, and the same with another choice in one field: some fields count with one only."""
    found = [config]
    for path in leaves(config):
        section = config
        for name in path[:-1]:
            section = getattr(section, name)
        (field,) = (each for each in dataclasses.fields(section) if each.name == path[-1])
        if field.metadata.get("choices"):
            found += others(config, path)
    return found
