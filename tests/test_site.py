"""The documentation site: every page has a place in the menu, links lead to it from both GitHub and
the site, lists keep their form, and its tables, layouts and tutorial are true.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import markdown
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from scan_files import noise_ct, write_nifti, write_series
from shell import Shell
from shell import shell as shell  # a fixture
from test_docs import ROOT, commands

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest

DOCS = ROOT / "docs"
PAGES = {file.relative_to(DOCS).as_posix(): file for file in sorted(DOCS.rglob("*.md"))}
LAYOUTS = sorted((DOCS / "layouts").glob("*.md"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hooks = script("site_hooks")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python functions."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def settings() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    return found


def leaves(entry: Any) -> Iterator[str]:
    """The pages of a part of the menu."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(inner)


# --- menu, links, anchors ---


def test_the_menu_has_every_page_once_and_no_other() -> None:
    menu = list(leaves(settings()["nav"]))
    made = {page for page in hooks.pages_outside_docs() if not page.startswith("source/")}
    assert sorted(menu) == sorted(set(PAGES) | made)


def test_a_page_of_the_site_is_readme_or_a_file_of_docs() -> None:
    assert not set(hooks.pages_outside_docs()) & set(PAGES)


@pytest.mark.parametrize(
    ("target", "source", "page", "expected"),
    [
        ("https://arxiv.org/abs/1", "docs/a.md", "a.md", "https://arxiv.org/abs/1"),
        ("mailto:a@b.c", "docs/a.md", "a.md", "mailto:a@b.c"),
        ("#below", "docs/a.md", "a.md", "#below"),
        ("data.md#labels", "docs/a.md", "a.md", "data.md#labels"),
        ("../data.md#labels", "docs/layouts/a.md", "layouts/a.md", "../data.md#labels"),
        ("../tapct/types.py", "docs/a.md", "a.md", "source/tapct/types.py.md"),
        ("../../tapct/types.py", "docs/api/a.md", "api/a.md", "../source/tapct/types.py.md"),
        ("../README.md", "docs/a.md", "a.md", "index.md"),
        ("../README.md#citation", "docs/a.md", "a.md", "index.md#citation"),
        ("../README.md#install", "docs/a.md", "a.md", "install.md"),
        ("../../README.md#the-tree", "docs/api/a.md", "api/a.md", "../code.md"),
        ("../CONTRIBUTING.md#commits", "docs/a.md", "a.md", "contributing.md#commits"),
        ("docs/data.md#labels", "README.md", "first-run.md", "data.md#labels"),
        ("docs/pipeline.svg", "README.md", "index.md", "pipeline.svg"),
        ("#the-tree", "README.md", "index.md", "code.md"),
        ("tapct/run_folder.py", "README.md", "code.md", "source/tapct/run_folder.py.md"),
        ("LICENSE", "README.md", "index.md", "source/LICENSE.md"),
        ("#commits", "CONTRIBUTING.md", "contributing.md", "#commits"),
        ("README.md#install", "CONTRIBUTING.md", "contributing.md", "install.md"),
        ("results/hn.csv", "docs/results.md", "results.md", "results/hn.csv"),
    ],
)
def test_a_link_of_a_file_leads_to_the_page_of_the_site(
    target: str, source: str, page: str, expected: str
) -> None:
    anchors = hooks.readme_anchors((ROOT / "README.md").read_text())
    folder = source.rpartition("/")[0]
    assert hooks.address(target, folder, page, anchors) == expected


def test_links_in_code_are_left_alone() -> None:
    text = '[a](b.md) `[a](b.md)`\n\n```text\n[a](b.md)\n```\n\n[`a`](b.md "t") ``a`](b.md)``\n'
    changed = hooks.relink(text, lambda target: f"<{target}>")
    assert changed == (
        '[a](<b.md>) `[a](b.md)`\n\n```text\n[a](b.md)\n```\n\n[`a`](<b.md> "t") ``a`](b.md)``\n'
    )


def test_every_section_of_readme_is_on_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    pages = hooks.split_readme(text)
    assert set(pages) == {"index.md", *hooks.README_PAGES.values()}
    lines = [line for piece in pages.values() for line in piece.splitlines()]
    promoted = [re.sub(r"^#+ ", "# ", line) for line in text.splitlines()]
    assert sorted(re.sub(r"^#+ ", "# ", line) for line in lines) == sorted(promoted)
    for page, piece in pages.items():
        assert piece.startswith("# "), page


def test_every_link_of_the_site_leads_to_a_page_and_a_heading() -> None:
    texts = dict(hooks.pages_outside_docs())
    anchors = hooks.readme_anchors((ROOT / "README.md").read_text())
    for page, file in PAGES.items():
        texts[page] = hooks.for_site(file.read_text(), f"docs/{page}", page, anchors)
    counted = 0
    for page, text in texts.items():
        if page.startswith("source/"):
            continue
        for target in hooks.links_of(text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            place = (DOCS / page).parent.joinpath(path).resolve() if path else DOCS / page
            goal = place.relative_to(DOCS).as_posix()
            assert goal in texts or place.is_file(), (page, target)
            headings = re.findall(r"^#+ (.*)$", texts.get(goal, ""), re.MULTILINE)
            assert not anchor or anchor in map(hooks.slug, headings), (page, target)
            counted += 1
    assert counted > 200


# --- form of the pages ---


def counts_of(html: str) -> dict[str, int]:
    return {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in ("li", "pre", "table", "h2")}


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *PAGES])
def test_lists_code_and_tables_of_a_page_are_those_that_github_shows(page: str) -> None:
    text = (PAGES[page] if page in PAGES else ROOT / page).read_text()
    text = re.sub(r"^::: .*\n(?:    .*\n)*", "", text, flags=re.MULTILINE)
    on_github = MarkdownIt("commonmark").enable("table").render(text)
    plugins = ["tables", "sane_lists", "pymdownx.superfences"]
    on_site = markdown.markdown(hooks.four_spaces(text), extensions=plugins)
    assert counts_of(on_site) == counts_of(on_github)


def test_lists_that_python_markdown_reads_in_another_way_are_indented() -> None:
    text = "text\n- a\n  b\n  - c\n\n    d\n\n        code\n- e\n\ntext\n\n1. a\n   - b\n"
    plain = markdown.markdown(text, extensions=["sane_lists"])
    indented = markdown.markdown(hooks.four_spaces(text), extensions=["sane_lists"])
    reference = MarkdownIt("commonmark").render(text)
    assert counts_of(plain) != counts_of(reference) == counts_of(indented)


def test_sections_of_docstrings_are_found() -> None:
    griffe_extension = script("site_docstrings")
    text = "One line.\n\nArgs:\n    a: number.\nReturns:\n    Text: this.\nRaises:\n    Error: b.\n"
    value = griffe_extension.separated(text)
    assert griffe_extension.separated(value) == value
    function = griffe.Function("f", parameters=griffe.Parameters(griffe.Parameter("a")))
    kinds = {}
    for name, docstring in (("before", text), ("after", value)):
        parsed = griffe.Docstring(docstring, parent=function).parse("google", warnings=False)
        kinds[name] = [section.kind.value for section in parsed]
    assert kinds["after"] == ["text", "parameters", "returns", "raises"]
    assert kinds["before"] != kinds["after"]


# --- tables and pictures ---


def test_a_table_has_the_rows_and_columns_that_are_asked_for() -> None:
    text = "model,seed,value\na|b,all,0.123456\nc,0,2\nd,all,9.999e-05\n"
    assert hooks.table_of(text, "value model seed=all").splitlines() == [
        "| value | model |",
        "|---|---|",
        "| 0.123 | a\\|b |",
        "| 0.0001 | d |",
    ]
    assert hooks.table_of(text, "model seed!=all").splitlines()[2:] == ["| c |"]
    with pytest.raises(ValueError, match="no column 'modle'"):
        hooks.table_of(text, "modle")


def test_the_page_of_results_shows_every_csv_file_and_none_of_its_tables_is_empty() -> None:
    text = (DOCS / "results.md").read_text()
    files = {found["path"] for found in hooks.CSV_ALONE.finditer(text)}
    assert files == {f"results/{file.name}" for file in (DOCS / "results").glob("*.csv")}
    for found in hooks.CSV_ALONE.finditer(text):
        content = (DOCS / found["path"]).read_text()
        shown = hooks.table_of(content, found["options"] or "").splitlines()[2:]
        words = shlex.split(found["options"])
        asked = dict(word.split("=") for word in words if "=" in word and "!=" not in word)
        left_out = dict(word.split("!=") for word in words if "!=" in word)
        matching = [
            row
            for row in csv.DictReader(content.splitlines())
            if all(row[name] == value for name, value in asked.items())
            and not any(row[name] == value for name, value in left_out.items())
        ]
        assert len(shown) == len(matching) > 0


def test_the_costs_of_the_recipes_are_those_in_the_headers_of_the_configs() -> None:
    """tests/test_docs.py compares these headers with `tapct plan`."""
    text = (DOCS / "recipes.md").read_text()
    rows = re.findall(r"^\| `(tap_\w+)` \|(.*)\|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {path.stem for path in (ROOT / "configs").glob("tap_*")}
    for name, rest in rows:
        header = (ROOT / "configs" / f"{name}.yaml").read_text()
        same = re.search(r"^# Hardware and time: as (\w+\.yaml)", header, re.MULTILINE)
        if same:
            header = (ROOT / "configs" / same[1]).read_text()
        found = re.search(
            r"([\d.]+) PFLOP a step, ([\d.]+) EFLOP.*?about ([\d.]+) GPU-days",
            " ".join(header.split()).replace("# ", ""),
        )
        assert found is not None
        *_, step, total, days = (cell.strip() for cell in rest.split("|"))
        assert (step, total, days) == found.groups(), name


def test_every_picture_is_shown_and_small() -> None:
    pages = "".join(file.read_text() for file in PAGES.values())
    for path in sorted((DOCS / "pictures").iterdir()):
        assert f"pictures/{path.name})" in pages, path.name
        assert path.stat().st_size < 250_000
        with Image.open(path) as image:
            assert 600 < image.width < 1400
    scripts = [ROOT / "scripts" / f"make_{kind}pictures.py" for kind in ("", "report_")]
    source = "".join(path.read_text() for path in scripts)
    drawn = re.findall(r'(?:save\(figure|write\(.+), "(.+?)"\)', source)
    assert sorted(drawn) == sorted(path.name for path in (DOCS / "pictures").iterdir())


# --- layouts ---


IN_DICOM = np.diag([0.8, 0.7, 2.0, 1.0])  # the grid of `write_series`
IN_DICOM[:3, 3] = -10.0, -20.0, 100.0


def write_row(folder: Path, scan: str, labels: str, seed: int) -> None:
    """A tiny scan at the first path and a label map at the second one."""
    affine = None
    if scan.endswith(".nii.gz"):
        (folder / scan).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(folder / scan, noise_ct(seed))
    elif scan:
        ids = {"SeriesInstanceUID": f"1.2.{seed}", "StudyInstanceUID": f"1.3.{seed}"}
        numbers = [f"1.2.{seed}.{slice_}" for slice_ in range(6)]
        write_series(
            folder / scan, noise_ct(seed), edit=lambda z: {**ids, "SOPInstanceUID": numbers[z]}
        )
        affine = IN_DICOM
    if labels:
        (folder / labels).parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((6, 24, 26), np.uint8)
        mask[1:4, 2:9, 2 : 9 + seed] = 1
        write_nifti(folder / labels, mask, affine)


@pytest.mark.parametrize(
    "page", [page for page in LAYOUTS if page.stem != "csv"], ids=lambda p: p.stem
)
def test_the_files_of_a_layout_page_are_scans_with_these_labels(page: Path, tmp_path: Path) -> None:
    rows = re.findall(r"^\| (`[^`]+` )?\| (`[^`]+` )?\|$", page.read_text(), re.MULTILINE)
    assert len(rows) >= 2
    expected: dict[str, set[str]] = {}
    last = ""
    for seed, row in enumerate(rows):
        scan, labels = (cell.strip("` ") for cell in row)
        last = scan or last
        expected.setdefault(last, set()).update({labels} - {""})
        write_row(tmp_path / "in", scan, labels, seed)
    manifest = build_manifest(tmp_path / "in", tmp_path / "manifest.parquet")
    found = {row.path: row for row in manifest.rows}
    assert set(found) == set(expected)
    for scan, labels in expected.items():
        assert found[scan].status == "accepted", found[scan]
        label_path = found[scan].label_path
        if len(labels) > 1:  # one mask per organ: the folder is the label map
            assert {str(Path(name).parent) for name in labels} == {label_path}
        else:
            assert label_path == next(iter(labels), "")


# --- the tutorial ---


def steps_of(page: Path) -> Iterator[tuple[str, str]]:
    """Commands, YAML files, Python programs and shown outputs of a page, in its order."""
    text = page.read_text()
    parts = r"^```(?P<kind>\w+)\n(?P<block>.*?)^```$|^    (?P<command>tapct [^\n]*)$"
    for found in re.finditer(parts, text, re.MULTILINE | re.DOTALL):
        yield (found["kind"] or "command"), (found["block"] or found["command"])


def without_numbers(text: str) -> list[str]:
    """Lines of a text with every number masked: scores differ between machines."""
    return [re.sub(r"\d+(\.\d+)?", "0", line.strip()) for line in text.strip().splitlines()]


def test_the_steps_of_the_tutorial_are_found_in_order() -> None:
    kinds = [kind for kind, _ in steps_of(DOCS / "tutorial.md")]
    assert kinds.count("command") == 11 and kinds.count("text") == 2
    assert kinds.index("yaml") < kinds.index("python") and kinds[0] == kinds[-1] == "command"
    assert commands(DOCS / "tutorial.md") == [
        text for kind, text in steps_of(DOCS / "tutorial.md") if kind == "command"
    ]


@pytest.mark.slow
def test_the_tutorial_runs_word_for_word(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Without it, the key is random, and with it which of the nine patients are held out.
    monkeypatch.setenv("TAPCT_PATIENT_KEY", "tutorial")
    printed = ""
    for kind, text in steps_of(DOCS / "tutorial.md"):
        if kind == "command":
            printed = shell.good(*shlex.split(text)[1:])
        elif kind == "yaml":
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif kind == "text":
            lines = without_numbers(printed)
            assert [line for line in without_numbers(text) if line not in lines] == []
        else:
            done = subprocess.run(
                [sys.executable, "-c", text],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(r"\(64, \d+, 16, 16\) \(.+\)\n\(64,\)\n", done.stdout)
    patients = {row.patient for row in Manifest.read(Path("manifest.parquet")).rows}
    assert len(patients) == 9
    for name in ("runs/first/report.html", "runs/first/export/config.json", "features.npz"):
        assert Path(name).is_file(), name


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_other_hosts(
    tmp_path: Path,
) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*build, str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=\"?(?:https?:)?//[^>]+>"
        r"|<link(?![^>]+rel=\"?canonical)[^>]+href=\"?(?:https?:)?//[^>]+>"
    )
    for page in pages:
        assert loads.findall(page.read_text()) == [], page.name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style.name
