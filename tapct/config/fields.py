"""One config field: its declaration, and the check of a value against its type and range.

Neither torch nor OmegaConf is imported here, so that light modules can declare their settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tapct.base.files import expand_path

KeyPath: TypeAlias = tuple[str, ...]

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
_BOUNDS = {
    "ge": (lambda value, bound: value >= bound, ">="),
    "gt": (lambda value, bound: value > bound, ">"),
    "le": (lambda value, bound: value <= bound, "<="),
    "lt": (lambda value, bound: value < bound, "<"),
}


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    is_path: bool = False,
) -> Any:
    """One field of a frozen config dataclass.

    Rules between fields belong in `__post_init__`, as `UserError`.

    Args:
        default: value where the config gives none.
        doc: meaning of the field, with its unit, and where the default comes from.
        ge: smallest allowed value, also of every element of a tuple.
        gt: bound above which the value, or every element of a tuple, must lie.
        le: largest allowed value, also of every element of a tuple.
        lt: bound below which the value, or every element of a tuple, must lie.
        choices: allowed values; None allows all.
        is_path: whether a field of type text holds a path, in which `~` and `$NAME` are replaced;
            fields of type Path always do.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    return dataclasses.field(default=default, metadata={**metadata, "is_path": is_path})


def checked(hint: Any, value: Any, metadata: Mapping[str, Any]) -> Any:
    """Convert a plain YAML value to the type of a field, and check its range.

    The check is strict: text is never read as a number, nor a number as true or false.

    Args:
        hint: resolved annotation: bool, int, float, str, Path, Literal, tuple, or a union of those
            (with None).
        value: value from YAML: None, bool, int, float, str or list.
        metadata: metadata of the field, from `setting`.
    Returns:
        The value in the type of the field: lists become tuples, whole numbers become floats in a
        field of type float, and a number such as 1e4 becomes 10000 in a field of type int.
    Raises:
        ValueError: the rule that the value breaks, as a phrase such as "must be >= 0".
    """
    result = _typed(hint, value)
    for item in _flat(result):
        _check_range(item, metadata)
    if metadata.get("is_path") and result:
        return str(expand_path(result))
    return result


def kind(hint: Any) -> str:
    """The values that a field allows, in words, e.g. "a list of 3, each item a number"."""
    if hint is None or hint is type(None):
        return "null"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list, each item {kind(args[0])}"
        if len(set(args)) == 1:
            return f"a list of {len(args)}, each item {kind(args[0])}"
        return "a list of " + ", ".join(kind(arg) for arg in args)
    if dataclasses.is_dataclass(hint):
        return "a section with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return _KINDS[hint]


def dotted(path: KeyPath) -> str:
    """A key as it is written in an override: `optim.lr`, `losses[mylab.losses.foo].weight`,
    `stages[0].start`.
    """
    text = "".join(f"[{part}]" if "." in part or part.isdigit() else f".{part}" for part in path)
    return text.removeprefix(".")


def nearest_keys(unknown: str, keys: Sequence[str], most: int = 2) -> list[str]:
    """The known keys that are most like an unknown one, best first; empty when none is like it.

    Args:
        unknown: dotted key that no field has.
        keys: dotted keys of all fields.
        most: most keys to return.
    """
    scores: dict[str, float] = {}
    for key in keys:
        # the right name in the wrong section counts nearly as much as a likeness of the whole key
        same_name = _likeness(_last(unknown), _last(key)) - 0.02
        if _initials(_last(unknown)) == _last(key) or _last(unknown) == _initials(_last(key)):
            same_name = 0.9  # learning_rate and lr
        scores[key] = max(_likeness(unknown, key), same_name)
    best = max(scores.values(), default=0.0)
    near = [key for key, score in scores.items() if score >= max(0.65, best - 0.03)]
    return sorted(near, key=lambda key: (-_likeness(unknown, key), key))[:most]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _initials(name: str) -> str:
    """The first letter of each word in a name; empty for a single word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _typed(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(hint, args, value)
    if hint is None or hint is type(None):
        fits = value is None
    elif origin is typing.Literal:
        fits = any(value == arg and type(value) is type(arg) for arg in args)
    elif origin is tuple:
        return _typed_tuple(hint, args, value)
    elif hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif hint is int:
        fits = _is_whole(value)
    elif hint is Path:
        fits = isinstance(value, str) and value != ""
    elif hint in (bool, str):
        fits = isinstance(value, hint)
    elif dataclasses.is_dataclass(hint):
        fits = False  # a section is converted elsewhere, so this value is something else
    else:
        # a mistake of the code that declares the field, not of the config
        raise TypeError(f"config fields cannot have the type {hint}")
    if not fits:
        rule = f"must be {kind(hint)}"
        if hint is str and isinstance(value, (bool, int, float)):
            rule += "; quote it if you mean text"
        raise ValueError(rule)
    if hint is Path:
        return expand_path(value)
    if hint not in (int, float):
        return value
    try:
        return hint(value)
    except OverflowError as error:  # a whole number that no float can hold
        raise ValueError("must be finite") from error


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number, also one that YAML reads as a float, such as 1e4.

    Floats from 2^53 on are not all the whole number that was written, so they do not count.
    """
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2**53
    return isinstance(value, int) and not isinstance(value, bool)


def _typed_union(hint: Any, args: tuple[Any, ...], value: Any) -> Any:
    if int in args and isinstance(value, int) and not isinstance(value, bool):
        return value  # int | float keeps what was written
    reasons = []
    for arg in args:
        try:
            return _typed(arg, value)
        except ValueError as error:
            if arg is not type(None):
                reasons.append(str(error))
    if len(reasons) == 1 and "a list" in reasons[0]:
        # an optional list: the reason of the list names the expected length as well
        raise ValueError(f"{reasons[0]}, or null")
    raise ValueError(f"must be {kind(hint)}")


def _typed_tuple(hint: Any, args: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be {kind(hint)}")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise ValueError(f"must be {kind(hint)}, not {len(value)}")
    try:
        return tuple(_typed(arg, item) for arg, item in zip(args, value, strict=True))
    except ValueError as error:
        raise ValueError(f"must be {kind(hint)}") from error


def _flat(value: Any) -> list[Any]:
    """The elements of a tuple and of the tuples in it, or the value itself."""
    if not isinstance(value, tuple):
        return [value]
    elements: list[Any] = []
    for item in value:
        elements += _flat(item)
    return elements


def _check_range(value: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    choices = metadata.get("choices")
    if choices is not None and value is not None and value not in choices:
        named = [str(choice) or "'' (empty)" for choice in choices]
        raise ValueError("must be one of " + ", ".join(named))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = [(name, metadata[name]) for name in _BOUNDS if metadata.get(name) is not None]
        if not all(_BOUNDS[name][0](value, bound) for name, bound in bounds):
            rules = [f"{_BOUNDS[name][1]} {bound}" for name, bound in bounds]
            raise ValueError(f"must be {' and '.join(rules)}")
