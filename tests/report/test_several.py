"""One page about several runs, and a page that is written again while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from shell import Shell
from shell import shell as shell  # a fixture
from test_compare import make_run
from test_report import Page

from tapct.base.exits import UserError
from tapct.report import several, watch


def test_several_runs_are_compared_and_then_shown_one_by_one(tmp_path: Path) -> None:
    other = {"out": "x", "seed": 0, "optim": {"lr": 0.002}}
    runs = [make_run(tmp_path / "a", 30, 1, dice=0.5), make_run(tmp_path / "b", 20, 2, other)]
    out = several.write([*runs, tmp_path / "none"], tmp_path / "both.html")
    html = out.read_text()
    found = Page(html)
    assert html.count('<details class="run"') == 2 and html.count('id="smoothing"') == 1
    assert all(link.startswith("#") for link in found.links)
    anchors = [link[1:] for link in found.links]
    assert all(html.count(f'id="{anchor}"') == 1 for anchor in anchors) and len(anchors) > 20
    assert "optim.lr" in found.words and "none is not there" in found.words
    assert "2 runs side by side" in found.words


def test_runs_that_would_make_the_page_too_large_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / name, 2000, seed) for seed, name in enumerate("ab")]
    whole = len(several.render(runs))
    monkeypatch.setattr("tapct.report.several.MOST_BYTES", whole - 160_000)
    html = several.render(runs)
    assert len(html) < whole - 80_000 and html.count("Left out, so that") == 1
    assert html.count('<details class="run"') == 2 and "b</code> shows it" in html


def test_no_run_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        several.write([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html")
    assert list(tmp_path.iterdir()) == []


class Training:
    """A run that gains a step with every wait."""

    def __init__(self, run: Path, steps: int) -> None:
        self.run, self.steps, self.done = run, steps, 0
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.done += 1
        if self.done > self.steps:
            raise AssertionError("training has finished, and the page is still watched")
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {self.done}, "loss/total": 1.0}}\n')


def watched(run: Path, sleep: Callable[[float], None]) -> tuple[list[float], list[str]]:
    """Reload times of the pages that were written, and the printed lines."""
    from tapct.report import page

    pages: list[float] = []
    lines: list[str] = []

    def write(reload_s: float) -> Path:
        out = page.write(run, reload_s=reload_s)
        pages.append(reload_s)
        assert ('id="reload"' in out.read_text()) == bool(reload_s)
        return out

    watch.watch([run], write, 7.0, lines.append, sleep)
    return pages, lines


def test_the_page_follows_a_run_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    training = Training(tmp_path, 3)
    pages, lines = watched(tmp_path, training)
    assert pages == [7.0, 7.0, 0.0]  # the last page stays as it is
    assert all(wait >= 7.0 for wait in training.waits) and len(training.waits) == 3
    assert lines[0].startswith("waiting: ") and "nothing to report yet" in lines[0]
    assert "written again every 7 s" in lines[1] and "has finished" in lines[2]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "config.yaml", "metrics.jsonl", "report.html"
    ]  # fmt: skip


def test_ctrl_c_ends_the_watch_and_leaves_a_whole_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    pages, lines = watched(tmp_path, interrupted)
    assert pages == [7.0] and "stopped" in lines[-1]
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")


def test_a_folder_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        watched(tmp_path / "none", lambda seconds: None)


def test_the_command_writes_one_page_or_one_of_several_runs(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / name, 5, seed) for seed, name in enumerate("ab")]
    assert "report: " in shell.good("report", runs[0])
    assert (runs[0] / "report.html").is_file()
    shell.good("report", *runs)
    shell.good("report", *runs, "--out", tmp_path / "both.html")
    assert "2 runs side by side" in (tmp_path / "both.html").read_text()
    assert (tmp_path / "report.html").read_text() == (tmp_path / "both.html").read_text()
    (runs[0] / "config.yaml").write_text("train: {steps: 5}\n")
    printed = shell.good("report", runs[0], "--watch", "--every", 1, "--out", tmp_path / "one.html")
    assert (
        "training has finished" in printed
        and "reload"
        not in ((tmp_path / "one.html").read_text().split("<main>")[1].split("</main>")[0])
    )
