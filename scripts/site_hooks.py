"""Hooks of mkdocs (mkdocs.yml): pages from files outside of docs/, links, tables from CSV files.

The Markdown files are written for GitHub. Before mkdocs renders them, this file changes copies of
them in memory:

    README.md         becomes the home page; the sections in README_PAGES become pages of their own
    links             to files that are no pages lead to a page of the site with the file's text
    lists             are indented by four spaces per level, as Python-Markdown needs it
    links to a CSV    that stand alone in a paragraph get the file as a table below them
"""

from __future__ import annotations

import csv
import posixpath
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Sections of README.md (level 2) that are pages; all others stay on the home page.
README_PAGES = {"Install": "install.md", "First run": "first-run.md", "The tree": "code.md"}
COPIED_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
HOME = "index.md"
START = """
[Install](docs/install.md){ .md-button .md-button--primary }
[First run](docs/first-run.md){ .md-button }
[Tutorial](docs/tutorial.md){ .md-button }
[Your own data](docs/data.md){ .md-button }
"""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml", ".sh": "bash"}

CODE_OR_LINK = re.compile(
    r"(?P<fence>^ *(?P<ticks>```+)[^\n]*\n.*?^ *(?P=ticks)[ ]*$)"
    r"|(?P<span>(?P<quote>`+)(?!`).+?(?<!`)(?P=quote)(?!`))"
    r"|\]\((?P<target>[^)\s]+)(?P<title>[^)]*)\)",
    re.DOTALL | re.MULTILINE,
)
ITEM = re.compile(r"( *)([-*+]|\d+\.)( +)\S")
CSV_ALONE = re.compile(
    r"(?<=\n\n)(?:<!-- (?P<options>[^\n]*) -->\n)?"
    r"\[(?P<text>[^\]\n]+)\]\((?P<path>[^)\s]+\.csv)\)\n(?=\n|\Z)"
)


def slug(heading: str) -> str:
    """Anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


# --- README as pages ---


def split_readme(text: str) -> dict[str, str]:
    """Home page and the pages of README_PAGES, by their place in the site; headings of a page
    begin at level 1.
    """
    pieces = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    pages = {HOME: ""}
    for piece in pieces:
        title = piece.partition("\n")[0].removeprefix("## ")
        page = README_PAGES.get(title, HOME)
        if page == HOME:
            pages[HOME] += piece
        else:
            pages[page] = re.sub(r"^##", "#", piece, flags=re.MULTILINE)
    return pages


def readme_anchors(text: str) -> dict[str, str]:
    """Page of each anchor of README.md."""
    return {
        slug(heading): page
        for page, piece in split_readme(text).items()
        for heading in re.findall(r"^#+ (.*)$", piece, re.MULTILINE)
    }


# --- links ---


def address(target: str, folder: str, page: str, anchors: dict[str, str]) -> str:
    """Target of a link as the site needs it.

    Args:
        target: target of a link as GitHub reads it.
        folder: folder of its file in the repository, "" for the root.
        page: page of the site that gets the text of this file.
        anchors: page of each anchor of README.md.
    """
    if re.match(r"[a-z]+:", target):
        return target
    path, _, anchor = target.partition("#")
    if not path and (folder or page in COPIED_PAGES.values()):
        return target
    place = posixpath.normpath(posixpath.join(folder, path)) if path else "README.md"
    hash_ = f"#{anchor}" if anchor else ""
    if place == "README.md":
        goal = anchors.get(anchor, HOME)
        if anchor == slug(next((name for name, own in README_PAGES.items() if own == goal), "")):
            hash_ = ""  # the title of the page
    elif place in COPIED_PAGES:
        goal = COPIED_PAGES[place]
    elif place.startswith("docs/"):
        goal = place.removeprefix("docs/")
    else:
        goal = f"source/{place}.md"
    return posixpath.relpath(goal, posixpath.dirname(page) or ".") + hash_


def relink(text: str, change: Callable[[str], str]) -> str:
    """Change the targets of all links that are not in code."""

    def replace(match: re.Match[str]) -> str:
        if match["target"] is None:
            return match[0]
        return f"]({change(match['target'])}{match['title']})"

    return CODE_OR_LINK.sub(replace, text)


def links_of(text: str) -> list[str]:
    """Targets of all links that are not in code."""
    return [found["target"] for found in CODE_OR_LINK.finditer(text) if found["target"]]


# --- lists ---


def four_spaces(text: str) -> str:
    """Indent what belongs to a list item by four spaces per level."""
    lines: list[str] = []
    offsets: list[int] = []  # columns at which the texts of the open items begin
    fence = ""
    for line in text.split("\n"):
        stripped = line.lstrip(" ")
        indent = len(line) - len(stripped)
        if not stripped:
            lines.append(line)
            continue
        item = None if fence else ITEM.match(line)
        after_blank = not lines or not lines[-1].strip()
        if not fence and (after_blank or item):
            offsets = [offset for offset in offsets if offset <= indent]
        depth = sum(offset <= indent for offset in offsets)
        if item and indent - (offsets[-1] if offsets else 0) < 4:
            if not offsets and not after_blank:
                lines.append("")  # Python-Markdown begins a list only after an empty line
            offsets.append(indent + len(item[2]) + len(item[3]))
        if depth:
            line = " " * (4 * depth + indent - offsets[depth - 1]) + stripped
        if stripped.startswith("```"):
            fence = "" if fence else "```"
        lines.append(line)
    return "\n".join(lines)


# --- tables ---


def shown(cell: str) -> str:
    """A cell of a table; numbers with three decimals, small ones with one digit."""
    if re.fullmatch(r"-?\d+\.\d+(e[-+]\d+)?", cell):
        return f"{float(cell):.3f}" if abs(float(cell)) >= 0.001 else f"{float(cell):.1g}"
    return cell.replace("|", "\\|")


def table_of(text: str, options: str) -> str:
    """A CSV file as a Markdown table.

    Args:
        text: content of the file.
        options: columns to show, and values that a row must have, e.g.
            `model value 'metric=mean Dice' part!=all`; empty for the whole file.
    """
    rows = list(csv.DictReader(text.splitlines()))
    words = shlex.split(options)
    rules = [re.match(r"(.+?)(!?=)(.*)", word) for word in words if "=" in word]
    wanted = {rule[1]: (rule[2] == "=", rule[3]) for rule in rules if rule}
    columns = [word for word in words if "=" not in word] or list(rows[0])
    unknown = [name for name in [*columns, *wanted] if name not in rows[0]]
    if unknown:
        raise ValueError(f"the table has no column {unknown[0]!r}; it has {', '.join(rows[0])}")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        if all((row[name] == value) == equal for name, (equal, value) in wanted.items()):
            cells = [shown(row[name]) for name in columns]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(text: str, folder: Path) -> str:
    """Put the content of every CSV file below a link to it that is a paragraph of its own."""

    def replace(match: re.Match[str]) -> str:
        content = (folder / match["path"]).read_text(encoding="utf-8")
        table = table_of(content, match["options"] or "")
        return f"{table}\n\nAll columns: [{match['text']}]({match['path']})\n"

    return CSV_ALONE.sub(replace, text)


# --- what mkdocs calls ---


def for_site(text: str, source: str, page: str, anchors: dict[str, str]) -> str:
    """The text of a Markdown file of the repository for a page of the site."""
    folder = posixpath.dirname(source)
    text = with_tables(text, ROOT / folder)
    return four_spaces(relink(text, lambda target: address(target, folder, page, anchors)))


def source_page(place: str) -> str:
    """A page with the text of a file, or with links to the Python files of a folder."""
    path = ROOT / place
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {place}\n\n"
    if path.is_dir():
        files = sorted(path.glob("*.py"))
        return head + "".join(f"- [{file.name}]({path.name}/{file.name}.md)\n" for file in files)
    code = path.read_text(encoding="utf-8")
    return f"{head}````{LANGUAGES.get(path.suffix, 'text')}\n{code}\n````\n"


def pages_outside_docs() -> dict[str, str]:
    """All pages of the site that are no files of docs/, by their place in it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    anchors = readme_anchors(readme)
    pieces = split_readme(readme)
    first, heading, rest = pieces[HOME].partition("\n## ")
    pieces[HOME] = first + START + heading + rest
    pages = {}
    for page, piece in pieces.items():
        pages[page] = for_site(piece, "README.md", page, anchors)
    for source, page in COPIED_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        pages[page] = for_site(text, source, page, anchors)
    texts = dict(pages)
    for file in sorted((ROOT / "docs").rglob("*.md")):
        page = file.relative_to(ROOT / "docs").as_posix()
        texts[page] = for_site(file.read_text(encoding="utf-8"), f"docs/{page}", page, anchors)
    for page, text in texts.items():
        for target in links_of(text):
            goal = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if goal.startswith("source/"):
                place = goal.removeprefix("source/").partition("#")[0].removesuffix(".md")
                if not (ROOT / place).exists():
                    continue  # a dead link, which mkdocs reports
                pages[f"source/{place}.md"] = source_page(place)
                if (ROOT / place).is_dir():
                    for file in (ROOT / place).glob("*.py"):
                        inner = f"{place}/{file.name}"
                        pages[f"source/{inner}.md"] = source_page(inner)
    return pages


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    for page, text in pages_outside_docs().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Change the text of a file of docs/ for the site."""
    if page.file.generated_by:
        return markdown
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    place = page.file.src_uri
    return for_site(markdown, f"docs/{place}", place, readme_anchors(readme))
