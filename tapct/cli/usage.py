"""Errors of the command line itself, such as an unknown option, in the form of our other errors:
one line that names the thing, the value, the rule and the next step.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

_RULES = {  # type of an error of pydantic, by which some versions of Typer check values
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "bool_parsing": "true or false",
}


def usage_line(error: Any, words: Sequence[str], commands: Any) -> str:
    """One line for an error that click or Typer has found on the command line.

    Args:
        error: ClickException; Typer brings its own copy of click in some versions, so its class is
            known by its name alone.
        words: words of the command line after `tapct`.
        commands: the group of all commands, of click.
    """
    context = getattr(error, "ctx", None)
    names = _names_of(context, words, commands)
    command = " ".join(["tapct", *names])
    kinds = {cls.__name__ for cls in type(error).__mro__}
    help_line = f"see {command} -h"
    message = str(error.format_message()).rstrip(".")
    if "NoSuchOption" in kinds:
        near = _nearest(error.option_name, _known_options(names, commands))
        question = f"did you mean {near}? " if near else ""
        return f"{command} has no option {error.option_name}; {question}{help_line}"
    if "MissingParameter" in kinds and getattr(error, "param", None) is not None:
        return f"{command} needs {_shown(error.param)}; {help_line}"
    if "BadOptionUsage" in kinds:
        needs = "takes no value" if "not take" in message else "needs a value"
        return f"the option {error.option_name} {needs}; {help_line}"
    if "BadParameter" in kinds and getattr(error, "param", None) is not None:
        return f"{_bad_value(error)}; {help_line}"
    unknown = re.match(r"No such command '(.*?)'", message)
    if unknown:
        near = _nearest(unknown[1], commands.commands)
        question = f"did you mean '{near}'? " if near else ""
        return f"tapct has no command '{unknown[1]}'; {question}see tapct -h"
    extra = re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message)
    if extra:
        return f"{command} takes no further argument, but got: {extra[1]}; {help_line}"
    return f"{message}; {help_line}"


def first_argument(words: Sequence[str], command: Any) -> str:
    """The first word of a command line that is no option and no value of one; empty without one.

    Args:
        words: words after the name of the command.
        command: command of click, by which options without a value are known.
    """
    flags = {"-h", "--help"}
    for parameter in command.params:
        if getattr(parameter, "is_flag", False):
            flags.update(parameter.opts)
    left = iter(words)
    for word in left:
        if not word.startswith("-"):
            return word
        if word not in flags and "=" not in word:
            next(left, None)
    return ""


def no_submitted_word(word: str, divided: Sequence[str], commands: Collection[str]) -> str:
    """One line where the word behind `tapct submit` is not a config, but another command or a
    mistyped one; else empty.

    Args:
        word: first word that is no option.
        divided: commands that `tapct submit` takes.
        commands: all commands.
    """
    if not word.isidentifier() or Path(word).exists():
        return ""
    takes = f"tapct submit takes a config, or {', '.join(divided[:-1])} or {divided[-1]}"
    if word in commands:
        hint = "tapct submit CONFIG trains" if word == "train" else "see tapct submit -h"
        return f"tapct submit does not take the command {word}: {takes}; {hint}"
    from tapct.config.yamlfile import shipped_names  # slow, and needed for a mistake alone

    shipped = shipped_names()
    near = difflib.get_close_matches(word.lower(), [*shipped, *divided], n=1)
    if word in shipped or not near or near[0] in shipped:
        return ""
    return f"{word} is no config and no command; did you mean {near[0]}? {takes}"


def _names_of(context: Any, words: Sequence[str], commands: Any) -> list[str]:
    """Names of the commands below `tapct` that a command line has reached.

    Args:
        context: context of click; None where the error has none.
        words: words of the command line, of which the first command is taken without a context.
        commands: the group of all commands.
    """
    if context is None:
        return [word for word in words if word in commands.commands][:1]
    names = []
    while context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return names[::-1]


def _known_options(names: Sequence[str], commands: Any) -> list[str]:
    """All options of the command that a command line has reached; `submit index` has its own
    options and those of `index`.
    """
    _, *divided = names[0].split() if names else [""]
    reached = ["submit-array", *divided] if divided else names[:1]
    known = [_options_of(commands.commands[name]) for name in reached if name in commands.commands]
    return sum(known, []) or _options_of(commands)


def _options_of(command: Any) -> list[str]:
    """All options of a command as they are written, such as `--out` and `-h`."""
    found = ["--help"]
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found += parameter.opts
    return found


def _nearest(given: str, known: Iterable[str]) -> str:
    """The most similar name; empty where none is similar."""
    # without their dashes, by which all options are alike
    bare = {name.lstrip("-"): name for name in sorted(known)}
    close = difflib.get_close_matches(given.lstrip("-"), bare, n=1)
    return bare[close[0]] if close else ""


def _shown(parameter: Any) -> str:
    """An argument or option with its value, such as `--out FILE` or `CONFIG`."""
    metavar = re.sub(r"[{}\[\]]", "", parameter.metavar or "")
    if parameter.param_type_name == "argument":
        return metavar or str(parameter.name).upper()
    return f"{parameter.opts[0]} {metavar}".strip()


def _bad_value(error: Any) -> str:
    """What is wrong with the value of an argument or option."""
    parameter = error.param
    name = parameter.opts[0] if parameter.param_type_name == "option" else _shown(parameter)
    found = getattr(error.__cause__, "errors", None)
    if found is None:  # versions of click that check values themselves name the value
        return f"{name}: {str(error.message).rstrip('.')}"
    problem = found()[0]
    rule = _RULES.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
    return f"{name} is {problem['input']}; rule: {rule}"
