"""Defaults of a cluster for `tapct submit`, from a YAML file.

TAPCT_SITE names the file; without this variable it is ~/.config/tapct/site.yaml. Its keys are the
long options of `tapct submit`. A section with the name of a command replaces them for it:

    partition: gpu
    account: lab
    cpus-per-task: 9
    setup: [module load cuda]
    sbatch: ["--gres=gpu:h100:4"]
    index: {partition: cpu, sbatch: []}

A value that is null is not given; in a section, this removes the value that holds for all commands.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from tapct.base import files
from tapct.base.exits import UserError
from tapct.cluster import sbatch_options
from tapct.config.repeated_keys import RepeatedKey, parse

VARIABLE = "TAPCT_SITE"
LISTS = ("sbatch", "setup", "srun-args")  # the values of the file come before those of the command
NOT_OF_A_SITE = ("sweep", "allow-change", "dry-run", "job-name", "dependency")
SECTIONS = ("train", "index", "pack", "embed", "eval")  # train: `tapct submit CONFIG`


def site_file(environment: Mapping[str, str]) -> Path | None:
    """The file with the defaults of this cluster; None where there is none.

    Args:
        environment: environment variables, `os.environ`.
    Raises:
        UserError: TAPCT_SITE names no file.
    """
    named = environment.get(VARIABLE, "")
    if named:
        path = files.expand_path(named)
        if not path.is_file():
            raise UserError(f"{VARIABLE}={named} is no file; correct or unset the variable")
        return path
    home = files.home_folder()
    path = Path() if home is None else home / ".config" / "tapct" / "site.yaml"
    return path if path.is_file() else None


def with_site(
    given: Mapping[str, Any],
    explicit: Collection[str],
    command: str = "train",
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Options of a command with the defaults of the site where the command line has none.

    Args:
        given: option -> value, with dashes in the names; a default where none was given.
        explicit: options that the command line has given.
        command: section of the file that replaces the other keys.
        environment: environment variables.
    Raises:
        UserError: the file of the site is no YAML mapping, or names no option.
    """
    path = site_file(environment)
    if path is None:
        return dict(given)
    content = read(path)
    sections = {name: content.pop(name) or {} for name in SECTIONS if name in content}
    defaults = checked_section(path, "", content, given)
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(
                f"{path}: {name} must map options of tapct submit to values, e.g. {name}: "
                "{partition: cpu}"
            )
        of_command = checked_section(path, f"{name}.", section, given)
        if name == command:
            defaults |= of_command
    defaults = {name: value for name, value in defaults.items() if value is not None}
    own = sbatch_options.parse(given["sbatch"] or ())
    own |= {name: str(given[name]) for name in explicit if name in sbatch_options.NAMED}
    options, replaced = dict(given), sbatch_options.are_replaced
    for name, value in defaults.items():
        if name == "sbatch":
            parsed = {text: sbatch_options.parse([text]) for text in value}
            value = [text for text, one in parsed.items() if not replaced(one, own)]
        if name in LISTS:
            options[name] = [*value, *(given[name] or [])]
        elif name not in explicit and not replaced({name: value}, own):
            options[name] = value
    return options


def checked_section(
    path: Path, prefix: str, section: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Options in the file by their names with dashes, in their types; None for one that is null.

    Args:
        path: file of the site.
        prefix: name of the section in front of its keys.
        section: key -> value, a text, a list of texts or None.
        given: all options, with values of their types.
    Raises:
        UserError: a key names no option that a site can set, or a value has another type.
    """
    options: dict[str, Any] = {}
    for written, value in section.items():
        name, key = str(written).replace("_", "-"), f"{prefix}{written}"
        if name not in given or name in NOT_OF_A_SITE:
            known = sorted(set(given) - set(NOT_OF_A_SITE))
            near = difflib.get_close_matches(name, known, 1)
            question = f" did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{path}: {key} is no option that a site can set;{question} it can set "
                f"{', '.join(known)}"
            )
        if value is None:
            options[name] = None
        elif name in LISTS:
            lines = [value] if isinstance(value, str) else value
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                raise UserError(f"{path}: {key} must be a text or a list of texts")
            options[name] = lines
        else:
            options[name] = checked(path, key, value, given[name])
    return options


def checked(path: Path, key: str, value: Any, default: Any) -> Any:
    """A value of the file in the type of the option.

    Args:
        path: file of the site.
        key: key in the file.
        value: value in the file, a text.
        default: default of the option.
    Raises:
        UserError: it has another type.
    """
    if isinstance(default, bool):
        kind, read_as = "true or false", {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in read_as:
            return read_as[value.lower()]
    elif isinstance(default, int):
        kind = "a whole number that is not negative"
        if isinstance(value, str) and value.isascii() and value.isdigit():
            return int(value)
    else:
        kind = "a text"
        if isinstance(value, str):
            return value
    raise UserError(f"{path}: {key} is {value!r}, but must be {kind}")


class _Loader(yaml.BaseLoader):
    """Every value stays a text, since YAML would read the time limit 12:00:00 as 43200; but null,
    ~ and nothing are None.
    """


_NULL = "tag:yaml.org,2002:null"
_Loader.add_implicit_resolver(_NULL, re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(_NULL, lambda loader, node: None)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        UserError: it holds something else, or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parse(text, _Loader, same=lambda key: key.replace("_", "-"))
        content = yaml.load(text, Loader=_Loader)
    except RepeatedKey as error:
        raise UserError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must map options of tapct submit to values, e.g. partition: gpu")
    return content
