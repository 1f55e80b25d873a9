"""Write the tables of docs/configuration.md from the config dataclasses, so that the page cannot be
out of date.

python scripts/make_config_docs.py            rewrite the tables, leave the text around them alone
python scripts/make_config_docs.py --check    write nothing; exit 1 if the page is not current
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.config import plugins
from tapct.run.config import RunConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- tables: made by scripts/make_config_docs.py -->", "<!-- end of tables -->"
WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
}
MANY = {int: "whole numbers", float: "numbers", str: "texts"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
CONTRACT = {  # HUContract is a noun of tapct/types.py, which knows nothing of settings
    "clip_low": "HU below this are set to it; 0.5 percentile of the foreground, arXiv:2512.00872",
    "clip_high": "HU above this are set to it; 99.5 percentile of the foreground, arXiv:2512.00872",
    "mean": "HU, subtracted after the clip; of the foreground, arXiv:2512.00872",
    "std": "HU, divided by after that; of the foreground, arXiv:2512.00872",
}


@dataclass(frozen=True)
class Key:
    """One row of a table."""

    name: str
    kind: str
    default: str
    range: str
    doc: str

    def row(self) -> str:
        cells = (f"`{self.name}`", self.kind, f"`{self.default}`", self.range, self.doc)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def first_paragraph(docstring: str | None) -> str:
    """The first paragraph of a docstring on one line: a summary may be wrapped."""
    return " ".join((docstring or "").strip().split("\n\n")[0].split())


def kind(hint: Any) -> str:
    """The type of a field in words."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "text"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args)
    if typing.get_origin(hint) is tuple:
        return (
            f"list of {MANY.get(args[0], 'sections')}"
            if args[-1] is Ellipsis
            else f"{len(args)} {MANY[args[0]]}"
        )
    return WORDS[hint]


def value(given: Any) -> str:
    """A default as it would stand in YAML; long fractions get six digits."""
    if given is None or isinstance(given, bool):
        return "null" if given is None else str(given).lower()
    if isinstance(given, tuple):
        return f"[{', '.join(map(value, given))}]"
    if isinstance(given, float):
        return repr(given) if len(repr(given)) <= 8 else f"{given:.6g}"
    return str(given)


def allowed(hint: Any, metadata: Any) -> str:
    """The range of a field."""
    choices = metadata.get("choices") or (
        typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    )
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    return ", ".join(
        f"{sign} {metadata[name]:g}"
        for name, sign in BOUNDS.items()
        if metadata.get(name) is not None
    )


def fields_of(config: Any) -> Iterator[tuple[dataclasses.Field[Any], Any, Any]]:
    """Field, resolved type and default of everything that a config can set."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        if item.init:
            yield item, hints[item.name], getattr(config, item.name)


def keys(config: Any, prefix: str) -> Iterator[Key]:
    """All leaves below a config dataclass, plug-ins left out."""
    for item, hint, default in fields_of(config):
        name = prefix + item.name
        if item.metadata.get("plugin_kind"):
            continue
        if dataclasses.is_dataclass(default):
            yield from keys(default, name + ".")
            continue
        doc = item.metadata.get("doc") or (CONTRACT[item.name] if prefix == "contract." else None)
        assert doc, f"{name} has no doc"
        yield Key(name, kind(hint), value(default), allowed(hint, item.metadata), doc)


def table(rows: Iterator[Key]) -> list[str]:
    """A Markdown table, or nothing without rows."""
    lines = [key.row() for key in rows]
    return (
        ["| key | type | default | range | meaning |", "|---|---|---|---|---|", *lines, ""]
        if lines
        else []
    )


def plugin_tables(item: dataclasses.Field[Any], name: str) -> list[str]:
    """The tables of all plug-ins that one section or table can name."""
    is_section = item.metadata["plugin_kind"] == "section"
    folder, chosen = item.metadata["plugin_folder"], item.metadata["plugin_default"]
    default = ", ".join(f"`{each}`" for each in ([chosen] if is_section else chosen))
    place, doc = folder.replace(".", "/"), item.metadata["doc"]
    where = f"{doc[0].upper()}{doc[1:]}. Files of `tapct/{place}`; default: {default}."
    lines = [f"### Plug-ins of `{name}`", "", where, ""]
    if is_section:
        names = ", ".join(f"`{each}`" for each in plugins.available(folder))
        lines += table(
            iter(
                [
                    Key(
                        f"{name}.name",
                        "text",
                        chosen,
                        f"{names}, or a module of yours",
                        "which of them",
                    )
                ]
            )
        )
    for each in plugins.available(folder):
        module = plugins.load(folder, each)
        summary = first_paragraph(module.__doc__)
        prefix = f"{name}." if is_section else f"{name}.{each}."
        lines += [f"**`{each}`** — {summary}", "", *table(keys(module.Config(), prefix))]
    return lines


def plugins_below(config: Any, prefix: str) -> list[str]:
    """The same for every plug-in field below a config dataclass."""
    lines: list[str] = []
    for item, _, default in fields_of(config):
        if item.metadata.get("plugin_kind"):
            lines += plugin_tables(item, prefix + item.name)
        elif dataclasses.is_dataclass(default):
            lines += plugins_below(default, f"{prefix}{item.name}.")
    return lines


def tables() -> str:
    """Everything between the two marks of the page."""
    root = RunConfig()
    lines = ["### The run itself", "", *table(key for key in keys(root, "") if "." not in key.name)]
    for item, _, default in fields_of(root):
        if item.metadata.get("plugin_kind"):
            lines += plugin_tables(item, item.name)
        elif dataclasses.is_dataclass(default):
            summary = first_paragraph(type(default).__doc__)
            lines += [f"### `{item.name}`", "", summary, "", *table(keys(default, item.name + "."))]
            lines += plugins_below(default, item.name + ".")
    return "\n".join(lines).rstrip() + "\n"


def current(page: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE} lacks the line {BEGIN!r} or {END!r} after it")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    wanted = current(page)
    if options.check:
        raise SystemExit(
            0
            if page == wanted
            else f"{PAGE} is not current; run python scripts/make_config_docs.py"
        )
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
