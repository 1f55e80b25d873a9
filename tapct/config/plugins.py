"""Plug-ins: one file per loss, backbone, op or task; the name of the file is its name in YAML.

A plug-in module contains `@dataclass(frozen=True) class Config` and `build(config, ...)`. A bare
name (`dino`) is a file of a tapct folder; a dotted name (`mylab.losses.foo`) is a user's own module
on the Python path or in the working directory. Folders are listed without importing the modules in
them, so that a list of names is fast.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tapct.base.exits import UserError

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plugin:
    """A plug-in that a config names, with its settings.

    It is the value of a plug-in section, or of one entry of a plug-in table.

    Args:
        name: file name in its tapct folder, or a dotted module name.
        config: instance of that module's `Config`.
    """

    name: str
    config: Any


def available(folder: str) -> tuple[str, ...]:
    """Names of the plug-ins in a tapct folder, sorted, found without importing them.

    Args:
        folder: path below the package, e.g. `losses` or `views/ops`; `views.ops` is the same.
    Raises:
        ValueError: tapct has no such folder.
    """
    path = _PACKAGE.joinpath(*_parts(folder))
    if not path.is_dir():
        raise ValueError(f"tapct has no plug-in folder {folder!r}")
    return tuple(sorted(file.stem for file in path.glob("*.py") if not file.name.startswith("_")))


def title(folder: str, name: str) -> str:
    """Name of one of tapct's plug-ins for people: its docstring up to the first colon.

    Args:
        folder: plug-in folder, e.g. losses.
        name: name of the plug-in in YAML; any other name is returned as it is.
    """
    if name not in available(folder):
        return name
    file = _PACKAGE.joinpath(*_parts(folder), f"{name}.py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or name
    return text.splitlines()[0].partition(":")[0]


def load(folder: str, name: str) -> ModuleType:
    """Import a plug-in and check that it has the parts of one.

    Args:
        folder: tapct folder that bare names are looked up in, e.g. `losses`.
        name: file name, e.g. `dino` for tapct/losses/dino.py, or the dotted name of a user's
            module.
    Returns:
        The module, with a frozen dataclass `Config` and a function `build`.
    Raises:
        UserError: the plug-in does not exist (the near names are listed), cannot be imported, or
            lacks a part.
    """
    if "." in name:
        module = _import_user_module(folder, name)
    else:
        if name not in available(folder):
            raise UserError(_unknown(folder, name))
        module = importlib.import_module(".".join(["tapct", *_parts(folder), name]))
    _check(module, folder, name)
    return module


def section(folder: str, default: str, doc: str) -> Any:
    """A dataclass field of type `Plugin`.

    In YAML it is a mapping with `name` and the fields of that plug-in's `Config`.

    Args:
        folder: plug-in folder, e.g. `models`.
        default: name of the plug-in where the config names none.
        doc: purpose of the section.
    """
    return dataclasses.field(
        default_factory=lambda: _default(folder, default),
        metadata={
            "doc": doc,
            "plugin_kind": "section",
            "plugin_folder": folder,
            "plugin_default": default,
        },
    )


def table(folder: str, default: tuple[str, ...], doc: str) -> Any:
    """A dataclass field of type `tuple[Plugin, ...]`.

    In YAML it is a mapping from the name of a plug-in to its fields. Entries are in order of
    appearance, defaults first; `null` switches one off; `{}` takes all its defaults.

    Args:
        folder: plug-in folder, e.g. `losses`.
        default: names of the plug-ins that are on by default.
        doc: purpose of the table.
    """
    return dataclasses.field(
        default_factory=lambda: tuple(_default(folder, name) for name in default),
        metadata={
            "doc": doc,
            "plugin_kind": "table",
            "plugin_folder": folder,
            "plugin_default": default,
        },
    )


def _parts(folder: str) -> list[str]:
    return folder.replace("/", ".").split(".")


def _default(folder: str, name: str) -> Plugin:
    return Plugin(name, load(folder, name).Config())


def _unknown(folder: str, name: str) -> str:
    names = available(folder)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    there = f"there are {', '.join(names) or 'none'}"
    return (
        f"no plug-in {name!r} in {folder}: {hint}{there}; your own module needs its dotted "
        "name, e.g. mylab.foo"
    )


def _import_user_module(folder: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"plug-in name {name!r} for {folder} is not a module name: write it as "
            f"mylab.{folder}.foo"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        # `python -m` puts the working directory on the path, a console script does not; worker
        # processes inherit the path
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"no module {error.name!r} for the plug-in {name!r} ({folder}): put it on "
                f"PYTHONPATH or start tapct in the folder that holds {name.split('.')[0]}; tapct's "
                f"own are {', '.join(available(folder))}"
            ) from error
        raise UserError(
            f"plug-in {name!r} ({folder}) needs the module {error.name!r}, which is missing"
        ) from error
    except Exception as error:
        text = str(error).replace("\n", " ")
        raise UserError(
            f"plug-in {name!r} ({folder}) cannot be imported: {type(error).__name__}: {text}"
        ) from error


def _check(module: ModuleType, folder: str, name: str) -> None:
    config = getattr(module, "Config", None)
    lacks = []
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        lacks.append("a dataclass named Config")
    elif not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        lacks.append("frozen=True on its Config")
    if not callable(getattr(module, "build", None)):
        lacks.append("a function named build")
    if lacks:
        raise UserError(
            f"plug-in {name!r} ({folder}), {module.__file__}, lacks {' and '.join(lacks)}"
        )
