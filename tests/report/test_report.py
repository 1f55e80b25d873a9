from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tapct.base.exits import UserError
from tapct.eval.results import task_statistics
from tapct.eval.results.json_file import Evaluation, SplitRecord, TaskSection
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.report import page
from tapct.report.history import prototypes_ln, read_history
from tapct.report.markup import slug, text

VOID = {"meta", "img", "wbr", "input"}
LN_K = math.log(256)


class Page(HTMLParser):
    """Collects what the tests ask about, and insists that every element is closed where it should
    be.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: dict[str, int] = {}
        self.words = ""
        self.data: list[Any] = []
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.data.append(json.loads(data))
        elif self.open and self.open[-1] not in ("script", "style"):
            self.words += data


def record(step: int, alive: float = 1.0) -> dict[str, Any]:
    """One step's metrics; `alive` scales what the targets show about their sample."""
    wave = 0.1 * math.sin(step * 1.7)
    ce_global, ce_local, ce_ibot = (
        LN_K - alive + wave,
        LN_K - 0.6 * alive - 0.5 * wave,
        LN_K - 1.5 * alive,
    )
    return {
        "step": step, "samples": 8 * step, "lr": 1e-3, "wd": 0.1, "momentum": 0.99,
        "teacher_temp": 0.04,
        "loss/total": 9.0 - alive, "loss/dino_global": ce_global / 5, "loss/koleo": -0.05,
        "loss/ibot": ce_ibot,
        "ce/dino_global": ce_global, "ce/dino_local": ce_local, "ce/ibot": ce_ibot,
        "health/dino_ln_k_minus_ce": LN_K - (ce_global + 4 * ce_local) / 5,
        "health/ibot_ln_k_minus_ce": 1.5 * alive,
        "health/dino_information": alive, "health/dino_marginal_entropy": 5.4,
        "health/dino_target_entropy": 5.4 - alive,
        "health/ibot_information": alive, "health/ibot_marginal_entropy": 5.4,
        "health/ibot_target_entropy": 5.4 - alive,
        "health/dino_prototypes_used": 0.5, "health/rankme": 30.0, "grad_norm/backbone": 1.0,
        "seconds/data": 0.1, "seconds/forward_backward": 0.3, "seconds/step": 0.5,
        "samples_per_second": 16.0,
    }  # fmt: skip


def run_folder(root: Path, steps: int = 40, alive: float = 1.0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metrics.jsonl").write_text(
        "".join(json.dumps(record(s, alive)) + "\n" for s in range(1, steps + 1))
    )
    return root


def add_evaluation(run: Path, **more: Any) -> None:
    def model(dice: dict[str, float | None]) -> dict[str, Any]:
        known = [value for value in dice.values() if value is not None]
        return {"mean_dice": sum(known) / len(known), "dice": dice, "per_scan": {"scan_a": dice}}

    models: dict[str, dict[str, float | None]] = {
        "pretrained": {"liver": 0.8, "<aorta>": 0.4},
        "untrained": {"liver": 0.5, "<aorta>": 0.45},
        "raw_hu": {"liver": 0.2, "<aorta>": None},
    }
    judged = {name: model(dice) for name, dice in models.items()}  # as schema 1 wrote it
    results = {
        "schema": 1,
        "task": "segmentation",
        "organs": ["liver", "<aorta>"],
        "models": judged,
        "resolution": "patch",
        "split": {"mode": "patients", "train": ["x", "y"], "test": ["scan_a"]},
        **more,
    }
    (run / "eval" / "overlays").mkdir(parents=True, exist_ok=True)
    (run / "eval" / "results.json").write_text(json.dumps(results))


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    add_evaluation(run)
    (run / "config.yaml").write_text("seed: 3\nname: </pre><script>alert(1)</script>\n")
    (run / "run.json").write_text(json.dumps({"command": ["tapct", "train", "<b>"],
    "git": {"revision": "abc123"},
        "manifest": {"accepted": 20, "refused": {"not_ct": 2, "missing_slices": 1},
        "digest": "d1g35t"}}))  # fmt: skip
    out = page.write(run)
    html = out.read_text()
    found = Page(html)
    assert out == run / "report.html"
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "eval",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert "default-src 'none'" in html and "<script>alert" not in html and "<aorta>" not in html
    assert found.tags["h2"] == 9 and "missing" not in re.sub(
        r"missing slices|<style>.*</style>", "", html, flags=re.DOTALL
    )
    for words in (
        "seed: 3",
        "abc123",
        "tapct train <b>",
        "d1g35t",
        "23 scans were found, 20 accepted, 3 refused",
        "not ct",
    ):
        assert words in found.words, words


def test_a_task_without_a_result_is_named_with_its_reason(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    add_evaluation(run, without_result={"registration": "no <organ> in common"})
    html = page.write(run).read_text()
    assert '<p class="missing">No result of registration: no &lt;organ&gt; in common</p>' in html


def test_the_dice_table_shows_the_numbers_of_the_results(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    add_evaluation(run)
    words = Page(page.write(run).read_text()).words
    assert (
        "mean over organs, counted at patch resolution. Everything but the backbone is equal. "
        "Learned from 2 scans, evaluated on 1 scan, split by patients." in words
    )
    assert "Segmentation: mean Dice0.600+0.125 over untrained" in words
    assert "liver0.8000.5000.200+0.300" in words
    assert "<aorta>0.4000.450\u2013\u22120.050" in words


def test_every_part_is_explained_before_its_charts(tmp_path: Path) -> None:
    html = page.write(run_folder(tmp_path / "run")).read_text()
    for title, lead in page.LEADS.items():
        heading = f'<h2 id="{slug(title)}">{title}</h2>'
        assert f'{heading}<p class="muted">{text(lead)}</p>' in html


def test_a_page_carries_its_style_its_scripts_and_their_licence(tmp_path: Path) -> None:
    html = page.write(run_folder(tmp_path / "run")).read_text()
    folder = Path(page.__file__).parent
    of_archives = {folder / "web" / "archive.css"}
    files = [*{*(folder / "web").iterdir()} - of_archives, *(folder / "vendor").iterdir()]
    assert {file.name for file in files} >= {"uPlot.iife.min.js", "uPlot.LICENSE.txt", "charts.js"}
    for file in files:
        assert file.read_text() in html, file.name
    style = "".join((folder / "web" / name).read_text() for name in ("base.css", "page.css"))
    scripts = "".join(file.read_text() for file in (folder / "web").glob("*.js"))
    body = html[html.index("<main>") : html.index("</main>")]
    used = set(re.findall(r'class="([^"]+)"', body))
    without_style = {"item", "plain", "chart-title", "sortable"}
    for name in {one for classes in used for one in classes.split()} - without_style:
        assert f".{name}" in style or f"'{name}'" in scripts or f".{name}" in scripts, name


def test_nothing_in_a_page_names_another_host(tmp_path: Path) -> None:
    html = page.write(run_folder(tmp_path / "run")).read_text()
    without_comments = re.sub(r"/\*.*?\*/", "", html, flags=re.DOTALL)
    assert re.findall(r"url\(|@import|https?://\S+|import\(", without_comments) == []
    assert "default-src 'none'" in html and "connect-src" not in html


def lower_is_better(values: dict[str, float], scans: tuple[ScanScore, ...] = ()) -> Evaluation:
    headline = Headline("mean error", values, "lower", "How far off the guess is.")
    results = TaskResults({name: {} for name in values}, scans)
    section = TaskSection({}, "none", 3, 2, 1, headline, results)
    split = SplitRecord("patients", HeldOut(0), (), ())
    return Evaluation({"mylab.tasks.lung_depth": section}, split, {}, (2, 4, 4), 0)


def test_a_task_supplies_all_words_about_its_numbers(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    scans = (ScanScore("a", "pretrained", 1.0), ScanScore("b", "raw_hu", 4.0))
    values = {"pretrained": 1.5, "untrained": 2.0, "raw_hu": 3.0, "blind": math.nan}
    lower_is_better(values, scans).write(run / "eval")
    html = page.write(run).read_text()
    words = Page(html).words
    assert "Lung depth: mean error1.500+0.500 over untrained" in words
    assert "How far off the guess is. Learned from 3 scans, evaluated on 2 scans" in words
    assert "Skipped for lack of labels: 1 scan." in words
    assert "mean error, 0 to 4, lower is better; a tick is one test scan" in words
    assert "blind\u2013" in words
    assert re.findall(r'<span style="width:([\d.]+)%"></span>', html)[:4] == [
        "37.5", "50.0", "75.0", "0.0"
    ]  # fmt: skip
    assert re.findall(r'<i style="left:([\d.]+)%"></i>', html) == ["25.0", "100.0"]
    for foreign in ("Dice", "organ", "decoder"):
        assert foreign not in words


def test_the_verdict_is_in_words(tmp_path: Path) -> None:
    alive = Page(page.write(run_folder(tmp_path / "alive", 200)).read_text()).words
    stuck = Page(page.write(run_folder(tmp_path / "stuck", 200, alive=0.0)).read_text()).words
    assert "Alive" in alive and "Next: Evaluate the features: tapct eval." in alive
    assert "Stuck" in stuck and "nothing is learned" in stuck and "Next: Lower lr" in stuck


def test_there_is_no_verdict_before_200_steps_and_the_end_of_the_warm_up(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 199)
    early = Page(page.write(run).read_text()).words
    assert "Too early to say" in early and "after 200" in early and "Alive" not in early
    run_folder(run, 400)
    (run / "config.yaml").write_text("optim: {warmup_share: 0.1}\ntrain: {steps: 4010}\n")
    words = Page(page.write(run).read_text()).words
    assert "Too early to say" in words and "after 401, when the learning rate" in words
    (run / "config.yaml").write_text("optim: {warmup_share: 0.1}\ntrain: {steps: 4000}\n")
    assert "Alive" in Page(page.write(run).read_text()).words
    with (run / "metrics.jsonl").open("a") as file:  # this one is never too early
        file.write(json.dumps({**record(401), "health/dino_information": None}) + "\n")
        file.write(json.dumps({**record(402), "health/dino_ln_k_minus_ce": None}) + "\n")
    (run / "config.yaml").write_text("optim: {warmup_share: 1.0}\ntrain: {steps: 4000}\n")
    assert "Not finite" in Page(page.write(run).read_text()).words


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    words = Page(page.write(run).read_text()).words
    assert (
        f"tapct eval {run}" in words and "tapct index" in words and "tapct train writes it" in words
    )
    assert words.count("logged none of these numbers") == 4
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text('{"models": {')
    assert "results.json is damaged" in Page(page.write(run).read_text()).words


@pytest.mark.parametrize("content", [None, "", "\n", '{"step": 1, "lo'])
def test_no_finished_step_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(
        UserError, match=r"^[^\n]*nothing to report yet\. Train first: tapct train CONFIG\.$"
    ):
        page.write(tmp_path)
    with pytest.raises(UserError, match=r"run folder .* is not there"):
        page.write(tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_a_cut_line_is_left_out_and_a_resumed_step_replaces_the_old_one(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "v": 1.0},
        {"step": 2, "v": 2.0},
        {"step": 3, "v": 3.0},
        {"step": 2, "v": 20.0},
        {"step": 4, "v": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 5, "v')
    history = read_history(path)
    steps, values = history.column("v")
    assert history.unreadable == 1
    np.testing.assert_array_equal(steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(values, [1, 20, 3, np.nan])
    assert "1 unreadable lines" in Page(page.write(tmp_path).read_text()).words


def test_ln_k_is_found_from_what_is_logged_or_not_claimed(tmp_path: Path) -> None:
    history = read_history(run_folder(tmp_path / "a") / "metrics.jsonl")
    assert prototypes_ln(history, "dino") == pytest.approx(LN_K, abs=1e-4)
    assert prototypes_ln(history, "ibot") == pytest.approx(LN_K, abs=1e-6)
    noise = np.random.default_rng(0).normal(size=(40, 3))
    rows = [
        {"step": i, "ce/x_a": a, "ce/x_b": b, "health/x_ln_k_minus_ce": c}
        for i, (a, b, c) in enumerate(noise.tolist())
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert math.isnan(prototypes_ln(read_history(tmp_path / "metrics.jsonl"), "x"))


def test_ln_k_is_not_claimed_when_the_curves_never_part(tmp_path: Path) -> None:
    row = {"ce/x_a": 5.0, "ce/x_b": 4.0, "health/x_ln_k_minus_ce": 1.0}
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps(row | {"step": i}) for i in range(40))
    )
    assert math.isnan(prototypes_ln(read_history(tmp_path / "metrics.jsonl"), "x"))


def test_a_number_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps(record(41) | {"loss/total": math.nan, "health/dino_ln_k_minus_ce": math.inf})
            + "\n"
        )
    found = Page(page.write(run).read_text())
    assert "Not finite" in found.words and "not finite at 1 of 41" in found.words
    assert found.data[0]["curves"][0]["mean"][-1] is None


def test_small_pictures_go_in_unchanged_and_none_from_outside(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    overlays = [{"scan": "s1", "file": "overlays/a.png", "caption": "A <caption>."}]
    add_evaluation(run, overlays=overlays, pca=[{"scan": "s1", "file": "../../secret.png"}])
    Image.new("RGB", (8, 8), "red").save(run / "eval" / "overlays" / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    found = Page(page.write(run).read_text())
    pictures = [
        base64.b64decode(link.split(",")[1])
        for link in found.links
        if link.startswith("data:image")
    ]
    assert pictures == [(run / "eval" / "overlays" / "a.png").read_bytes()]
    assert (
        "A <caption>. Scan s1." in found.words
        and "picture ../../secret.png is not there" in found.words
    )


def test_many_large_pictures_and_a_long_history_stay_below_3_mb(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=5000)
    names = [f"overlays/{i}.png" for i in range(30)]
    add_evaluation(run, overlays=[{"scan": "s", "file": name} for name in names])
    noise = np.random.default_rng(0).integers(0, 255, (200, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "eval" / names[0])
    for name in names[1:]:
        (run / "eval" / name).write_bytes((run / "eval" / names[0]).read_bytes())
    found = Page(page.write(run).read_text())
    images = [link for link in found.links if link.startswith("data:image")]
    assert len(images) == 24 and "6 more in eval/" in found.words
    shown = Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1])))
    assert shown.width / shown.height == pytest.approx(3, rel=0.05)
    assert (run / "report.html").stat().st_size < 3_000_000


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html is a folder"):
        page.write(run)
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html"]


def with_statistics(num_patients: int) -> Evaluation:
    """Two models on one scan of each patient."""
    scans = tuple(
        ScanScore(f"s{number:02}", model, base + 0.01 * (number % 5) * factor)
        for model, base, factor in (("pretrained", 0.7, 1), ("raw_hu", 0.5, 2))
        for number in range(num_patients)
    )
    values = {
        model: float(np.mean([row.value for row in scans if row.model == model]))
        for model in ("pretrained", "raw_hu")
    }
    plain = lower_is_better(values, scans)
    ((name, section),) = plain.tasks.items()
    patients = {row.scan: f"p{row.scan}" for row in scans}
    found = task_statistics.of_task(section.results, section.headline, {}, patients, 0)
    return replace(plain, tasks={name: replace(section, statistics=found)})


def test_intervals_and_paired_differences_are_on_the_page(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    whole = with_statistics(12)
    whole.write(run / "eval")
    words = Page(page.write(run).read_text()).words
    ((_, section),) = whole.tasks.items()
    assert section.statistics is not None
    metric = section.statistics.of("mean error")
    assert metric is not None
    estimate = metric.whole.models[0].estimate
    assert estimate.interval is not None
    cell = f"[{estimate.interval.low:.3f}, {estimate.interval.high:.3f}]"
    assert f"{section.headline.values['pretrained']:.3f}{cell}12 / 12" in words
    assert "2000 resamples of patients" in words
    (pair,) = metric.whole.differences
    assert f"raw HU patches+{pair.estimate.value:.3f}[" in words
    assert f"{pair.p:.2g}{pair.p_holm:.2g}12 / 12" in words


def test_few_patients_have_a_reason_instead_of_an_interval(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with_statistics(5).write(run / "eval")
    words = Page(page.write(run).read_text()).words
    assert "No interval, because there are only 5 patients (at least 10 are needed)" in words
    assert "Holm" not in words and "[0." not in words
