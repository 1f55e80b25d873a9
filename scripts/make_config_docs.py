"""Write the tables of docs/configuration.md from the config dataclasses, so that the page cannot be
out of date.

python scripts/make_config_docs.py            rewrite the tables, keep the text around them
python scripts/make_config_docs.py --check    write nothing; exit 1 if the tables are out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
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
WIDTH = 100
WORDS = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "string",
    Path: "path",
    type(None): "null",
}
MANY = {int: "integers", float: "numbers", str: "strings"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
# HUContract is defined in tapct/types.py, which must not import `setting`; so its docs are here.
CONTRACT = {
    "clip_low": "HU; lower values are set to this; 0.5th percentile of the foreground, "
    "arXiv:2512.00872",
    "clip_high": "HU; higher values are set to this; 99.5th percentile of the foreground, "
    "arXiv:2512.00872",
    "mean": "HU; subtracted after clipping; mean of the foreground, arXiv:2512.00872",
    "std": "HU; values are divided by this; standard deviation of the foreground, arXiv:2512.00872",
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


def kind(hint: Any) -> str:
    """Type of a field as the tables print it."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "string"
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
    """Default of a field as YAML; long fractions get six digits."""
    if given is None or isinstance(given, bool):
        return "null" if given is None else str(given).lower()
    if isinstance(given, tuple):
        return f"[{', '.join(map(value, given))}]"
    if isinstance(given, float):
        return repr(given) if len(repr(given)) <= 8 else f"{given:.6g}"
    return str(given)


def allowed(hint: Any, metadata: Any) -> str:
    """Allowed values of a field."""
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
    """Field, resolved type and default of every field that a config can set."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        if item.init:
            yield item, hints[item.name], getattr(config, item.name)


def keys(config: Any, prefix: str) -> Iterator[Key]:
    """All leaf keys below a config dataclass, without those of plug-ins."""
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


def summary_of(documented: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())


def wrapped(text: str) -> list[str]:
    """A paragraph of the page, broken at 100 columns, and the blank line after it."""
    return [*textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def table(rows: Iterator[Key]) -> list[str]:
    """A Markdown table; empty if there are no rows."""
    lines = [key.row() for key in rows]
    return (
        ["| key | type | default | range | meaning |", "|---|---|---|---|---|", *lines, ""]
        if lines
        else []
    )


def plugin_tables(item: dataclasses.Field[Any], name: str) -> list[str]:
    """Tables of all plug-ins that can be named in one section or table of the config."""
    is_section = item.metadata["plugin_kind"] == "section"
    folder, chosen = item.metadata["plugin_folder"], item.metadata["plugin_default"]
    default = ", ".join(f"`{each}`" for each in ([chosen] if is_section else chosen))
    place, doc = folder.replace(".", "/"), item.metadata["doc"]
    where = f"{doc[0].upper()}{doc[1:]}. Files of `tapct/{place}`; default: {default}."
    lines = [f"### Plug-ins of `{name}`", "", *wrapped(where)]
    if is_section:
        names = ", ".join(f"`{each}`" for each in plugins.available(folder))
        lines += table(
            iter(
                [
                    Key(
                        f"{name}.name",
                        "string",
                        chosen,
                        f"{names}, or a module of your own",
                        "file or module to use",
                    )
                ]
            )
        )
    for each in plugins.available(folder):
        module = plugins.load(folder, each)
        prefix = f"{name}." if is_section else f"{name}.{each}."
        lines += wrapped(f"**`{each}`** — {summary_of(module)}")
        lines += table(keys(module.Config(), prefix))
    return lines


def plugins_below(config: Any, prefix: str) -> list[str]:
    """Tables of all plug-ins below a config dataclass."""
    lines: list[str] = []
    for item, _, default in fields_of(config):
        if item.metadata.get("plugin_kind"):
            lines += plugin_tables(item, prefix + item.name)
        elif dataclasses.is_dataclass(default):
            lines += plugins_below(default, f"{prefix}{item.name}.")
    return lines


def tables() -> str:
    """The text between the two marks of the page."""
    root = RunConfig()
    lines = ["### The run", "", *table(key for key in keys(root, "") if "." not in key.name)]
    for item, _, default in fields_of(root):
        if item.metadata.get("plugin_kind"):
            lines += plugin_tables(item, item.name)
        elif dataclasses.is_dataclass(default):
            lines += [f"### `{item.name}`", "", *wrapped(summary_of(type(default)))]
            lines += table(keys(default, item.name + "."))
            lines += plugins_below(default, item.name + ".")
    return "\n".join(lines).rstrip() + "\n"


def current(page: str) -> str:
    """The page with new tables."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE} lacks the line {BEGIN!r} or {END!r} after it")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is not current"
    )
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
