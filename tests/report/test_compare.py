"""Runs side by side: the numbers against a second computation, and what is missing or broken."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import Page, lower_is_better

from tapct.base.exits import UserError
from tapct.eval.results import task_statistics
from tapct.eval.results.json_file import Evaluation, SplitRecord, TaskSection
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.report import charts, compare, compare_page, page
from tapct.report.markup import text as escaped

DICE, NOTHING = "Segmentation: mean Dice, higher is better", "Evaluation of frozen features"
Config = dict[str, Any]
BASE: Config = {
    "out": "runs/x",
    "seed": 0,
    "optim": {"lr": 0.001},
    "model": {"patch": [4, 8, 8]},
    "device": "cpu",
}


def make_run(
    folder: Path, steps: int, seed: int, config: Config | None = None, dice: float | None = None
) -> Path:
    """A run folder with drawn metrics; rankme only at every tenth step."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss/total": 5 + draw.random(), "loss/ibot": draw.random()}
            row |= {
                "health/ibot_ln_k_minus_ce": draw.random(),
                "health/ibot_information": draw.random(),
            }
            row |= {"health/rankme": draw.random()} if step % 10 == 0 else {}
            file.write(json.dumps({**row, "seconds/step": 0.1 + draw.random()}) + "\n")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**(config or BASE), "out": str(folder)}, sort_keys=False)
    )
    if dice is not None:
        (folder / "eval").mkdir()
        models = {
            "pretrained": {"mean_dice": dice},
            "untrained": {"mean_dice": 0.2},
            "raw_hu": {"mean_dice": 0.1},
        }
        (folder / "eval" / "results.json").write_text(
            json.dumps({"schema": 1, "task": "segmentation", "models": models})
        )
    return folder


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table_of(comparison: compare.Comparison) -> dict[str, list[str]]:
    return dict(compare.numbers(comparison))


def value(cell: str) -> float:
    return float(cell.replace("\u2212", "-"))


def test_numbers_are_means_of_the_last_twenty_steps(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", 57, 1, dice=0.5),
        make_run(tmp_path / "b", 8, 2),
        make_run(tmp_path / "c", 95, 3),
    ]
    shown = table_of(compare.read(runs))
    assert shown["Steps"] == ["57", "8", "95"]
    names = {
        "Total loss": "loss/total", "iBOT loss, weighted": "loss/ibot", "iBOT ln K \u2212 CE":
        "health/ibot_ln_k_minus_ce", "iBOT information": "health/ibot_information",
    }  # fmt: skip
    for name, metric in names.items():
        slow = [statistics.fmean([row[metric] for row in rows_of(run)][-20:]) for run in runs]
        assert [value(cell) for cell in shown[name]] == pytest.approx(slow, abs=1e-3), name
    slow_seconds = [statistics.median(row["seconds/step"] for row in rows_of(run)) for run in runs]
    assert [value(cell) for cell in shown["Seconds per step, median"]] == pytest.approx(
        slow_seconds, abs=1e-2
    )
    ranks = [
        [row["health/rankme"] for row in rows_of(run) if "health/rankme" in row] for run in runs
    ]
    assert shown["RankMe"][1] == compare.BLANK  # 8 steps: never written
    assert value(shown["RankMe"][0]) == pytest.approx(
        statistics.fmean(ranks[0][-2:]), abs=1e-3
    )  # steps 40 and 50
    assert shown[DICE] == ["0.500", compare.BLANK, compare.BLANK]
    assert shown["Segmentation: lead over the best baseline"] == [
        "+0.300",
        compare.BLANK,
        compare.BLANK,
    ]


def test_a_metric_that_is_written_rarely_shows_its_newest_value(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 30, 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"step": step, "loss/total": 1.0}) + "\n" for step in range(31, 100)
        )
    shown = table_of(compare.read([run]))
    assert value(shown["RankMe"][0]) == pytest.approx(rows_of(run)[29]["health/rankme"], abs=1e-3)
    assert value(shown["Total loss"][0]) == 1


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    other = {
        **BASE,
        "device": "cuda",
        "optim": {"lr": 0.002},
        "model": {"patch": [4, 16, 16]},
        "more": 1,
    }
    runs = [
        make_run(tmp_path / "a", 5, 1),
        make_run(tmp_path / "b", 5, 2, other),
        make_run(tmp_path / "c", 5, 3),
    ]
    comparison = compare.read(runs)
    assert dict(compare.settings(comparison)) == {
        "optim.lr": ["0.001", "0.002", "0.001"],
        "model.patch": ["4 8 8", "4 16 16", "4 8 8"],
        "more": ["\u2013", "1", "\u2013"],
        "device": ["cpu", "cuda", "cpu"],
    }
    assert list(comparison.keys)[-1] == "device"  # changes no curve
    assert compare.labels(comparison) == ["a", "b", "c"]  # a and c have equal settings
    assert compare.labels(compare.read(runs[:2])) == [
        "lr 0.001, patch 4 8 8, more \u2013", "lr 0.002, patch 4 16 16, more 1"
    ]  # fmt: skip
    assert compare.read(runs[::2]).keys == ()


def test_the_shares_of_archives_affect_training_and_the_place_of_one_does_not() -> None:
    bookkeeping = ("data.store", "device", "train.resume", "eval.max_scans", "data.loader.workers")
    assert all(map(compare.is_bookkeeping, bookkeeping))
    assert not any(map(compare.is_bookkeeping, ("data.stores", "data.select", "train.steps")))


def test_a_page_asks_nobody_for_anything_and_holds_the_table(tmp_path: Path) -> None:
    evil = {**BASE, "name": "</script><script src='https://evil'>"}
    runs = [make_run(tmp_path / "<b>", 700, 1, evil, dice=0.4), make_run(tmp_path / "b", 40, 2)]
    comparison = compare.read(runs)
    html = compare_page.write(comparison, tmp_path / "page.html").read_text()
    assert "default-src 'none'" in html and "<b></th>" not in html and "<script src" not in html
    without_comments = re.sub(r"/\*.*?\*/", "", html, flags=re.DOTALL)
    assert Page(html).links == []
    assert re.findall(r"url\(|@import|https?://(?!evil)", without_comments) == []
    for name, cells in [*compare.numbers(comparison), *compare.settings(comparison)]:
        body = "".join(f'<td class="n">{escaped(cell)}</td>' for cell in cells)
        assert f'<th scope="row">{escaped(name)}</th>{body}' in html
    assert html.count('<figure class="chart">') == len(comparison.metrics) == 6
    assert len(html) < 300_000
    first, second = Page(html).data[0]["curves"]
    assert first["x"][-1] == 700 and second["x"][-1] == 40  # each ends where it ends


def test_a_run_keeps_its_colour_where_another_lacks_the_metric(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 8, 1), make_run(tmp_path / "b", 30, 2)]
    chart = compare_page._chart(compare.read(runs), "health/rankme")
    assert "var(--c1)" in chart and "var(--c0)" not in chart


def test_fifteen_runs_look_different(tmp_path: Path) -> None:
    looks = {re.sub(r"\s+", " ", charts.line_key(i)) for i in range(15)}
    assert len(looks) == 15


@pytest.mark.parametrize("width", [40, 80, 132])
def test_the_table_fits_the_terminal_however_many_runs(tmp_path: Path, width: int) -> None:
    long = {**BASE, "losses": {"dino": {"head": {"num_prototypes_of_a_very_long_name": "x" * 50}}}}
    runs = [
        make_run(tmp_path / f"sweep_with_a_long_name_{i}", 3, i, long if i else None)
        for i in range(9)
    ]
    comparison = compare.read(runs)
    text = compare.render_text(comparison, width)
    assert max(map(len, text.splitlines())) <= width and text.isascii()
    squeezed = re.sub(r"\s", "", text)
    assert text.count("Total loss") * max(1, (width - 33) // 16) >= 9 or width == 40
    for cell in table_of(comparison)["Total loss"]:
        assert cell in squeezed


def test_what_is_no_run_is_reported_with_one_line_each(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", 5, 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss/to')
    folders = [
        good,
        tmp_path / "good" / ".." / "good",
        tmp_path / "empty",
        tmp_path / "file",
        tmp_path / "no",
        bare,
    ]
    comparison = compare.read(folders)
    assert [run.name for run in comparison.runs] == ["good"]
    ends = (
        "it is shown once",
        "no metrics.jsonl",
        "is not a run folder",
        "is not there",
        "no finished step yet",
    )
    assert len(comparison.notes) == len(ends)
    for note, end in zip(comparison.notes, ends, strict=True):
        assert note.endswith(end) and "\n" not in note
    with pytest.raises(UserError, match="is not there"):
        compare.read([tmp_path / "no"])


def test_broken_files_leave_blanks(tmp_path: Path) -> None:
    good, ill = (
        make_run(tmp_path / "good", 30, 1, dice=0.3),
        make_run(tmp_path / "ill", 30, 2, dice=0.3),
    )
    with (ill / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 31, "loss/total": null, "seconds/step": "fast"}\n[1]\n{"step": '
            '"x"}\n{"step": 32, "lo'
        )
    (ill / "config.yaml").write_text("a: [1,\n b")
    (ill / "eval" / "results.json").write_text('{"models": ')
    comparison = compare.read([good, ill])
    shown = table_of(comparison)
    assert shown["Total loss"][1] == "not finite" and shown["Steps"] == ["30", "31"]
    assert shown[DICE][1] == compare.BLANK and shown["iBOT information"][1] != compare.BLANK
    (unchecked,) = (note for note in comparison.notes if "is unknown" in note)
    assert [note.split(": ", 1)[1] for note in comparison.notes if note != unchecked] == [
        "3 unreadable lines of metrics.jsonl were skipped",
        "config.yaml is damaged; its settings are blank",
        "results.json is damaged: it holds no JSON object; its evaluation is blank",
    ]
    assert "not finite at 1 of 31" in compare_page.render(comparison)
    assert comparison.keys == ()


@pytest.mark.parametrize(
    "results",
    [
        {"models": []},
        {"models": {"pretrained": 3}},
        {"models": {"pretrained": {"mean_dice": None}}},
        {},
    ],
)
def test_strange_results_are_a_blank(tmp_path: Path, results: Any) -> None:
    run = make_run(tmp_path / "a", 5, 1, dice=0.3)
    (run / "eval" / "results.json").write_text(json.dumps(results))
    assert table_of(compare.read([run]))[NOTHING] == [compare.BLANK]


def test_a_value_without_baselines_has_no_lead(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 5, 1)
    lower_is_better({"pretrained": 0.5}).write(run / "eval")
    shown = table_of(compare.read([run]))
    assert shown["Lung depth: mean error, lower is better"] == ["0.500"]
    assert shown["Lung depth: lead over the best baseline"] == [compare.BLANK]


def test_runs_with_different_tasks_share_a_table(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", 5, 1, dice=0.5),
        make_run(tmp_path / "b", 5, 2),
        make_run(tmp_path / "c", 5, 3),
    ]
    lower_is_better({"pretrained": 2.0, "raw_hu": 1.0, "untrained": 3.0}).write(runs[1] / "eval")
    shown = table_of(compare.read(runs))
    assert shown[DICE] == ["0.500", compare.BLANK, compare.BLANK]
    assert shown["Lung depth: mean error, lower is better"] == [
        compare.BLANK,
        "2.000",
        compare.BLANK,
    ]
    leads = shown["Lung depth: lead over the best baseline"]
    assert leads == [compare.BLANK, "\u22121.000", compare.BLANK]
    assert NOTHING not in shown


def test_the_results_of_an_earlier_version_are_compared_and_reported(tmp_path: Path) -> None:
    """The file was written by the last version with schema 1."""
    run = make_run(tmp_path / "a", 5, 1)
    (run / "eval").mkdir()
    shutil.copy(Path(__file__).with_name("results_schema_1.json"), run / "eval" / "results.json")
    old = json.loads((run / "eval" / "results.json").read_text())
    dice = {name: model["mean_dice"] for name, model in old["models"].items()}
    comparison = compare.read([run])
    (note,) = comparison.notes
    assert "whether the test scans were pretrained on is unknown" in note
    assert table_of(comparison)[DICE] == [f"{dice['pretrained']:.3f}"]
    best = max(dice["untrained"], dice["raw_hu"])
    lead = f"{dice['pretrained'] - best:+.3f}"
    assert table_of(comparison)["Segmentation: lead over the best baseline"] == [lead]
    words = Page(page.write(run).read_text()).words
    for organ in old["organs"]:
        cells = "".join(f"{model['dice'][organ]:.3f}" for model in old["models"].values())
        assert f"{organ}{cells}" in words
    assert f"evaluated on {len(old['split']['test'])} scans, split by patients" in words


def test_an_earlier_config_has_the_keys_of_today(tmp_path: Path) -> None:
    old = {**BASE, "eval": {"task": {"name": "segmentation", "l2": 0.1}, "batch": 8}}
    new = {**BASE, "eval": {"tasks": {"segmentation": {"l2": 0.1}}, "batch": 4}}
    runs = [make_run(tmp_path / "a", 5, 1, old), make_run(tmp_path / "b", 5, 2, new)]
    assert compare.read(runs).keys == ("eval.batch",)


def test_runs_of_one_name_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    first = make_run(tmp_path / "x" / "run", 5, 1)
    shutil.copytree(first, tmp_path / "y" / "run")
    names = [run.name for run in compare.read([first, tmp_path / "y" / "run"]).runs]
    assert names == ["x/run", "y/run"]


def test_chosen_metrics_are_drawn_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 25, 1)
    assert compare.read([run], ["health/ibot*", "loss/total"]).metrics == (
        "health/ibot_ln_k_minus_ce", "health/ibot_information", "loss/total"
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--metric loss/totl: no run has it; there is loss/total"):
        compare.read([run], ["loss/totl"])


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    comparison = compare.read([make_run(tmp_path / "a", 5, 1)])
    with pytest.raises(UserError, match="could not be written"):
        compare_page.write(comparison, tmp_path / "no" / "page.html")


def evaluated_run(folder: Path, shift: float, num_scans: int = 24, step: float = 0.01) -> Path:
    """A run whose pretrained model has a Dice on each of some scans, two per patient."""
    run = make_run(folder, 5, 1)
    ids = tuple(f"s{number:02}" for number in range(num_scans))
    scores = []
    for number, scan in enumerate(ids):
        dice = 0.4 + 0.02 * (number // 2) + shift + step * (number % 3)
        scores.append(ScanScore(scan, "pretrained", dice, {"liver": dice}))
    mean = sum(score.value for score in scores) / num_scans
    headline = Headline("mean Dice", {"pretrained": mean}, "higher", "Dice.", (0, 1))
    found = TaskResults({"pretrained": {}}, tuple(scores), None, True)
    first = tuple(ids[number // 2 * 2] for number in range(num_scans))
    patients = dict(zip(ids, first))
    own = task_statistics.of_task(found, headline, {}, patients, 0)
    section = TaskSection({}, "voxels", 1, num_scans, 0, headline, found, (), own)
    split = SplitRecord("patients", HeldOut(num_scans), ("t",), ids, test_patients=first)
    Evaluation({"segmentation": section}, split, {}, (2, 4, 4), 0).write(run / "eval")
    return run


def test_runs_on_the_same_test_scans_are_compared_by_patient(tmp_path: Path) -> None:
    one = evaluated_run(tmp_path / "one", 0.0)
    two = evaluated_run(tmp_path / "two", 0.1, step=0.02)
    table = table_of(compare.read([one, two]))
    gaps = [0.1 + 0.01 * (number % 3) for number in range(24)]
    mean = sum(gaps) / 24
    assert table["Segmentation: minus one"] == [compare.BLANK, f"+{mean:.3f}"]
    interval = table["Segmentation: 95 % interval of the difference"][1]
    low, high = (float(end) for end in interval.strip("[]").split(", "))
    # the patients differ by far more than the runs: an unpaired interval would be wider
    assert 0 < low < mean < high and high - low < 0.01
    assert table["Segmentation: p of the difference"][1] == "0.00049"  # 2 of 2^12 flips
    own = table["Segmentation: 95 % interval"][0]
    assert own.startswith("[0.") and "Segmentation: p, adjusted" not in " ".join(table)
    three = table_of(compare.read([one, two, evaluated_run(tmp_path / "three", 0.05)]))
    assert len(three["Segmentation: p, adjusted for 2 (Holm)"]) == 3


def test_runs_on_other_test_scans_have_a_reason_instead_of_a_difference(tmp_path: Path) -> None:
    one, two = evaluated_run(tmp_path / "one", 0.0), evaluated_run(tmp_path / "two", 0.1, 22)
    comparison = compare.read([one, two])
    assert "Segmentation: minus one" not in table_of(comparison)
    assert any(
        "two: no paired difference to one in segmentation: the test scans differ" in note
        for note in comparison.notes
    )
