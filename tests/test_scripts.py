"""Scripts refuse what they cannot do with a one-line error, as tapct does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (  # imported by other scripts or by mkdocs
    *("arguments.py", "mask_statistics.py", "process_memory.py"),
    *("benchmark_data.py", "benchmark_table.py"),
    *("site_docstrings.py", "site_hooks.py"),
)
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name not in LIBRARIES)
HELP = """
import contextlib, io, json, runpy, sys
pages = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    pages[path] = page.getvalue()
print(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """What each script prints with --help, all in one process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    known = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100"}
    done = forked.run(["-c", HELP, *SCRIPTS], known)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_fits_100_columns_and_explains_every_option(
    script: Path, pages: dict[str, str]
) -> None:
    page = pages[str(script)]
    usage, rest = page.split("\n\n", 1)
    assert usage.startswith("usage: ") and rest[0].isupper()
    assert [line for line in page.splitlines() if len(line) > 100] == []
    lines = rest.partition("\noptions:\n")[2].splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("  -"):
            continue
        below = lines[number + 1] if number + 1 < len(lines) else ""
        explained = re.search(r"\S  +\S", line) or below.startswith(" " * 20)
        assert explained, f"{script.name}: no help for {line.strip()}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "bench_step.py configs/smok.yaml",
            "configs/smok.yaml: no such config file; did you mean configs/smoke.yaml?",
        ),
        ("bench_prototypes.py --rows 0", "argument --rows: '0' is not an integer above 0"),
        ("bench_index.py --workers ", "argument --workers: give at least one integer above 0"),
        ("bench_index.py --workers=1,,2", "argument --workers: '' is not an integer above 0"),
        ("bench_index.py --flat=4,x", "argument --flat: 'x' is not an integer above 0"),
        ("bench_index.py --files 99 --flat ", "--files 99 is less than a series of --slices 100"),
        ("bench_index.py --files 300 --flat 4,2", "--files 300 is less than a series of --slices"),
        ("bench_index.py --archive nowhere", "--archive nowhere is no folder"),
        ("bench_store.py --tiles=64,", "argument --tiles: '' is not an integer above 0"),
        ("bench_eval.py runs/x --tasks ", "--tasks '': give two different tasks or more"),
        ("bench_eval.py runs/x --tasks=knn,", "--tasks 'knn,': give two different tasks or more"),
        ("bench_export.py --inputs=-1", "argument --inputs: '-1' is not an integer of 0 or more"),
        ("bench_whole_scan.py --shape 0 1 1", "argument --shape: '0' is not an integer above 0"),
        ("ablation.py store --seeds x", "argument --seeds: 'x' is not an integer of 0 or more"),
        (
            "ablation.py {empty} full --seeds 0 --out {empty}/out",
            "full, seed 0: {empty} holds no store.parquet",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: str, message: str) -> None:
    line = words.format(empty=tmp_path).split(" ")  # a space at the end is an empty value
    done = forked.run([ROOT / "scripts" / line[0], *line[1:]], cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {message.format(empty=tmp_path)}" in done.stderr.splitlines()[-1], done.stderr
