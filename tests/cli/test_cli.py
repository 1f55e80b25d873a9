"""The command line from end to end, and what it prints when something is wrong: one line, an exit
code, no debris.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from shell import Shell, files_of, leave_code, without_warnings
from shell import shell as shell  # a fixture
from tiny_run import evaluation_of, make_archive, numbers_of, write_config

import tapct
from tapct.data.patients.key import KEY_VARIABLE
from tapct.data.scans import ingest
from tapct.engine import loop

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def program(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "tapct", *map(str, words)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}


# --- from scans to a report ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archive/, store/, tiny.yaml and the finished run run/."""
    folder = tmp_path_factory.mktemp("place")
    make_archive(folder / "archive", num=4, dicom_share=0.3)
    with pytest.MonkeyPatch.context() as patch:
        # a key of its own would hold out other patients in every run of the test
        patch.setenv(KEY_VARIABLE, "tests")
        for words in (
            f"index {folder}/archive --out {folder}/manifest.parquet --workers 0",
            f"pack {folder}/manifest.parquet --out {folder}/store --workers 0",
            f"train {write_config(folder, folder / 'store')} train.steps=4 data.held_out=0.4 "
            "log.tensorboard=true",
        ):
            assert leave_code(patch, *words.split()) == 0
    return folder


def test_from_an_archive_to_a_report(place: Path, shell: Shell, tmp_path: Path) -> None:
    run = place / "run"
    assert [row["step"] for row in numbers_of(run)] == [1, 2, 3, 4]

    printed = shell.good("eval", run)
    results = json.loads(evaluation_of(run, 4).results.read_text())
    values = results["tasks"]["segmentation"]["headline"]["values"]
    assert set(values) >= {"pretrained", "untrained", "raw_hu"}
    for name, value in values.items():
        assert re.search(
            rf"^{name} +mean Dice {value:.3f}  n = 1 scan of 1 patient$", printed, re.M
        )
    assert results["split"]["held_out_from_pretraining"] is True

    assert str(run / "export") in shell.good("export", run)
    scan = next((place / "archive" / "images").glob("*.nii.gz"))
    features = tmp_path / "new" / "features.npz"
    assert str(features) in shell.good("embed", run / "export", scan, "--out", features)
    pretrained = tapct.load_pretrained(run / "export")
    volume = ingest.read_volume(scan)
    embedded = np.load(features)
    assert np.array_equal(embedded["features_DZYX"], pretrained.embed(volume).features_DZYX)
    assert np.isfinite(embedded["features_DZYX"]).all() and embedded["features_DZYX"].std() > 0

    printed = shell.good("report", run)
    assert str(run / "report.html") in printed
    page = (run / "report.html").read_text()
    assert "loss" in page.lower() and "data:image/png" in page


def test_the_export_gives_the_features_of_the_teacher(
    place: Path, shell: Shell, tmp_path: Path
) -> None:
    shell.good("export", place / "run", "--out", tmp_path / "export")
    pretrained = tapct.load_pretrained(tmp_path / "export")
    teacher = load_file(place / "run" / "checkpoints" / "step_00000004" / "teacher.safetensors")
    exported = pretrained.model.state_dict()
    assert teacher.keys() == exported.keys()
    assert all(torch.equal(exported[name], teacher[name]) for name in teacher)
    model = pretrained.section
    again = tapct.config.plugins.load("models", model.name).build(model.config)
    again.load_state_dict(teacher)
    crops = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        one, other = pretrained(crops), again.eval()([crops])[0]
    assert torch.equal(one.cls_BD, other.cls_BD) and torch.equal(one.patches_BND, other.patches_BND)
    assert pretrained.provenance["step"] == 4


def test_an_export_of_a_run_with_a_back_end_for_a_gpu_runs_on_a_cpu(
    place: Path, shell: Shell, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    config = (run / "config.yaml").read_text()
    assert config.count("attention: sdpa") == 1
    (run / "config.yaml").write_text(config.replace("attention: sdpa", "attention: varlen"))
    shell.good("export", run, "--out", tmp_path / "export")
    pretrained = tapct.load_pretrained(tmp_path / "export")
    assert pretrained.section.config.attention == "auto"
    assert pretrained(torch.zeros(1, 4, 16, 16)).cls_BD.isfinite().all()


def test_the_phantom_command_makes_an_archive_that_index_accepts(
    shell: Shell, tmp_path: Path
) -> None:
    printed = shell.good("phantom", "--out", tmp_path / "made", "--num", "1", "--seed", "3")
    assert "1 scans" in printed
    printed = shell.good(
        "index", tmp_path / "made", "--out", tmp_path / "manifest.parquet", "--workers", "0"
    )
    assert "1 accepted" in printed


def test_index_names_each_refused_scan_with_its_reason(
    place: Path, shell: Shell, tmp_path: Path
) -> None:
    scan = next((place / "archive" / "images").glob("*.nii.gz"))
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "good.nii.gz").write_bytes(scan.read_bytes())
    (folder / "torn.nii.gz").write_bytes(scan.read_bytes()[:5000])
    printed = shell.good("index", folder, "--out", tmp_path / "m.parquet", "--workers", "0")
    assert "1 accepted" in printed
    assert [line for line in printed.splitlines() if "torn.nii.gz" in line and "refused" in line]


def test_pack_resumes_where_it_stopped(place: Path, shell: Shell, tmp_path: Path) -> None:
    words = ("pack", place / "manifest.parquet", "--out", tmp_path / "store", "--workers", "0")
    assert "4 packed, 0 kept" in shell.good(*words)
    assert "0 packed, 4 kept" in shell.good(*words)


def test_train_prints_its_config_with_origins_and_does_not_train(
    place: Path, shell: Shell, tmp_path: Path
) -> None:
    config = place / "tiny.yaml"
    printed = shell.good("train", config, f"out={tmp_path}/run", "optim.lr=3e-3", "--print-config")
    lines = {line.split(":")[0]: line for line in printed.splitlines()}
    assert lines["optim.lr"].split() == ["optim.lr:", "0.003", "#", "override"]
    assert lines["train.steps"].split()[:2] == ["train.steps:", "12"]
    assert (
        "tiny.yaml:" in lines["train.steps"] and lines["train.steps"].rpartition(":")[2].isdigit()
    )
    assert lines["seed"].split() == ["seed:", "0", "#", "default"]
    assert not (tmp_path / "run").exists()


def test_plan_prints_all_digits_in_a_narrow_terminal(place: Path, shell: Shell) -> None:
    shell.monkeypatch.setenv("COLUMNS", "60")
    narrow = shell.good("plan", place / "tiny.yaml")
    assert "…" not in narrow and "0.000 TFLOP" not in narrow
    shell.monkeypatch.setenv("COLUMNS", "80")
    assert narrow == shell.good("plan", place / "tiny.yaml")


def test_plan_prints_parameters(place: Path, shell: Shell) -> None:
    printed = shell.good(
        "plan", place / "tiny.yaml", "--memory", "8", "--tflops", "1", "--gpus", "1,2"
    )
    assert (
        "parameters" in printed.lower()
        and "GPU-days" in printed
        and "train.accumulation" in printed
    )


# --- bad input ---

BAD = {
    "missing archive": ("index {here}/nowhere --out {here}/m.parquet", ["{here}/nowhere"]),
    "empty archive": ("index {here}/empty --out {here}/m.parquet", ["{here}/empty"]),
    "archive without scans": ("index {here}/words --out {here}/m.parquet", ["{here}/words"]),
    "missing labels": (
        "index {place}/archive --out {here}/m.parquet --labels {here}/none",
        ["{here}/none"],
    ),
    "bad regex": ("index {place}/archive --out {here}/m.parquet --patient-regex ((", ["(("]),
    "missing manifest": ("pack {here}/m.parquet --out {here}/s", ["m.parquet"]),
    "manifest that is none": ("pack {here}/words/note.txt --out {here}/s", ["note.txt"]),
    "missing config": ("train {here}/none.yaml", ["none.yaml"]),
    "broken config": ("train {here}/broken.yaml", ["broken.yaml"]),
    "unknown key": ("train {config} trian.steps=3", ["trian.steps", "train.steps"]),
    "wrong type": ("train {config} train.steps=many", ["train.steps", "many"]),
    "out of range": ("train {config} train.steps=0", ["train.steps", "0"]),
    "wrong choice": ("train {config} train.precision=fp8", ["train.precision", "fp8", "bf16"]),
    "word that is no override": ("train {config} train.steps", ["train.steps"]),
    "rule between fields": (
        "train {config} train.accumulation=3",
        ["accumulation", "global_batch"],
    ),
    "unknown loss": ("train {config} losses.dyno.weight=1", ["dyno", "dino"]),
    "missing module": ("train {config} losses[mylab.none].weight=1", ["mylab"]),
    "no loss": ("train {config} losses.dino=null losses.ibot=null losses.koleo=null", ["losses"]),
    "view off the patch grid": (
        "train {config} views.global_window=[4,20,20]",
        ["views.global_window", "patch"],
    ),
    "local view off the grid": (
        "train {config} views.local_window=[4,12,12]",
        ["views.local_window", "patch"],
    ),
    "missing store": ("train {config} data.store={here}/nowhere", ["{here}/nowhere", "tapct pack"]),
    "empty store": ("train {config} data.store={here}/empty", ["{here}/empty"]),
    "damaged scan": ("train {config} data.store={here}/torn", ["{here}/torn"]),
    "no GPU": ("train {config} device=cuda", ["device"]),
    "run folder is a file": ("train {config} out={here}/words/note.txt", ["note.txt"]),
    "plan of a wrong config": ("plan {config} model.dim=17", ["model.dim", "17"]),
    "plan for GPUs that cannot share": ("plan {config} --gpus 3,5", ["3, 5", "train.global_batch"]),
    "plan for no numbers": ("plan {config} --gpus 1,x", ["--gpus 1,x"]),
    "plan that fits nowhere": ("plan {config} --memory 1e-6", ["nothing fits", "parallel.shard"]),
    "eval of a missing run": ("eval {here}/nowhere", ["{here}/nowhere"]),
    "eval without checkpoint": ("eval {here}/fresh", ["{here}/fresh", "train"]),
    "eval without labels": ("eval {here}/run data.store={here}/unlabelled", ["label"]),
    "eval with another model": ("eval {here}/run model.depth=3", ["model.depth"]),
    "eval off the patch grid": ("eval {here}/run eval.preprocess.window=[4,15,16]", ["window"]),
    "export of a missing run": ("export {here}/nowhere", ["{here}/nowhere"]),
    "export onto a file": ("export {here}/run --out {here}/words/note.txt/x", ["note.txt"]),
    "embed without export": ("embed {here}/empty {scan}", ["{here}/empty"]),
    "embed to a file of another kind": (
        "embed {here}/run/export {scan} --out {here}/f.pt",
        ["--out {here}/f.pt: features are written as .npz"],
    ),
    "embed to a Parquet file": (
        "embed {here}/run/export {scan} --out {here}/f.parquet",
        ["--out {here}/f.parquet: a Parquet table holds one vector per scan; give --scan"],
    ),
    "report of a part of an index": (
        "index {here}/empty --out {here}/x.parquet --part 1/2 --report {here}/x.html",
        ["--report has no effect with --part"],
    ),
    "report of an index below a file": (
        "index {here}/empty --out {here}/x.parquet --report {here}/words/note.txt/x.html",
        ["--report {here}/words/note.txt/x.html", "not a folder"],
    ),
    "report of a folder of runs": ("report {here}", ["{here} is not a run folder", "{here}/run"]),
    "report of a mistyped run": ("report {here}/rnu", ["did you mean {here}/run?"]),
    "export of a mistyped run": ("export {here}/rnu", ["did you mean {here}/run?"]),
    "eval of a mistyped run": ("eval {here}/rnu", ["did you mean {here}/run?"]),
    "eval with a mistyped store": (
        "eval {here}/run data.store={here}/unlabeled",
        ["store {here}/unlabeled does not exist (did you mean {here}/unlabelled?)", "tapct pack"],
    ),
    "embed a missing scan": (
        "embed {here}/run/export {here}/none.nii.gz --out {here}/f.npz",
        ["none.nii.gz"],
    ),
    "embed a torn scan": (
        "embed {here}/run/export {here}/torn.nii.gz --out {here}/f.npz",
        ["torn.nii.gz"],
    ),
    "embed a text": (
        "embed {here}/run/export {here}/words/note.txt --out {here}/f.npz",
        ["note.txt"],
    ),
    "report of a missing run": ("report {here}/nowhere", ["{here}/nowhere"]),
    "report of an empty folder": ("report {here}/empty", ["{here}/empty"]),
    "phantom into a full folder": ("phantom --out {here}/words --num 1", ["{here}/words"]),
}


@pytest.fixture(scope="module")
def broken_place(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Fills {place}, {config}, {scan} and {here} into text; {here} is a folder of things that are
    wrong.
    """
    here = tmp_path_factory.mktemp("here")
    for name in ("empty", "words", "fresh"):
        (here / name).mkdir()
    (here / "words" / "note.txt").write_text("no scan")
    (here / "broken.yaml").write_text("train: {steps: 3\n")
    shutil.copytree(place / "run", here / "run")
    shutil.copy(here / "run" / "config.yaml", here / "fresh")
    scan = next((place / "archive" / "images").glob("*.nii.gz"))
    (here / "torn.nii.gz").write_bytes(scan.read_bytes()[:5000])
    shutil.copytree(place / "store", here / "torn")
    for packed in (here / "torn").rglob("*.b2nd"):
        packed.write_bytes(packed.read_bytes()[:-2000])
    with pytest.MonkeyPatch.context() as patch:
        (here / "one").mkdir()
        (here / "one" / "scan.nii.gz").write_bytes(scan.read_bytes())
        for words in (
            f"index {here}/one --out {here}/one/m.parquet --workers 0",
            f"pack {here}/one/m.parquet --out {here}/unlabelled --workers 0",
            f"export {here}/run",
        ):
            assert leave_code(patch, *words.split()) == 0
    known = {"place": place, "config": place / "tiny.yaml", "scan": scan, "here": here}
    return lambda text: text.format(**known)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_a_one_line_error_and_leaves_nothing_behind(
    shell: Shell,
    broken_place: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    command, named = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = broken_place(command).split()
    if words[0] == "train" and not any(word.startswith("out=") for word in words):
        words.append(f"out={tmp_path}/run")
    here = Path(broken_place("{here}"))
    before = files_of(here)
    line = shell.bad(*words)
    for part in named:
        assert broken_place(part) in line, line
    assert files_of(here) == before
    left = set(files_of(tmp_path))
    if case == "damaged scan":  # found only when it is read, in a run that has begun
        left -= {
            "run/config.yaml",
            "run/run.json",
            "run/metrics.jsonl",
            "run/trained_on.parquet",
        }
    assert left == set(), "nothing half-written"


def test_debug_shows_the_traceback(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TAPCT_DEBUG", "0")
    code, _, err = shell("--debug", "eval", tmp_path)
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("trian configs/smoke.yaml", ["trian", "train"]),
        ("train --print-confg configs/smoke.yaml", ["--print-confg", "--print-config"]),
        ("phantom", ["--out"]),
        ("phantom --out x --num none", ["--num", "integer"]),
        ("phantom --out x --num 0", ["--num", "1"]),
        ("index", ["SRC"]),
        ("embed", ["MODEL"]),
    ],
)
def test_a_typo_gets_one_clear_message(shell: Shell, words: str, named: list[str]) -> None:
    code, out, err = shell(*words.split())
    assert code == 2 and out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and len(err.splitlines()) == 1
    assert last.endswith(" -h")
    for part in named:
        assert part.lower() in last.lower(), err


def test_an_interrupt_of_any_other_command_is_one_line(
    shell: Shell, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(
            signal.SIGINT
        )  # to this thread: one sent to the process may be taken by another, and late

    monkeypatch.setattr("tapct.data.workers.process_pool.wait", interrupted)  # for the first result
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts with & ignores Ctrl-C
    try:
        code, _, err = shell(
            "pack", place / "manifest.parquet", "--out", tmp_path / "store", "--workers", "0"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and err.splitlines() == ["error: interrupted"]
    assert not files_of(tmp_path)


# --- stopping ---


def wait_for_step(run: Path, step: int, process: Forked) -> None:
    for _ in range(6000):
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no progress in a minute")


def test_ctrl_c_saves_and_prints_how_to_resume(place: Path, shell: Shell, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    words = [
        "train",
        str(place / "tiny.yaml"),
        f"out={run}",
        "train.steps=3000",
        "log.every=1",
        "checkpoint.every=900",
    ]
    process = Forked(["-m", "tapct", *words], env=environment())
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and without_warnings(err) == [], err
    last = out.splitlines()[-1]
    step = len(numbers_of(run))
    assert f"saved at step {step}" in last
    assert (run / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"

    again = shlex.split(last.partition("resume with: ")[2])
    assert again == ["tapct", *words], "the line can be pasted into a shell"


def test_the_line_printed_at_a_stop_resumes(
    place: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer.optimizer_step

    def interrupted(self: loop.Trainer, index: int, batches: object) -> None:
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            until = time.monotonic() + 10.0
            while not self.flag.signal and time.monotonic() < until:  # another thread takes it
                time.sleep(0.001)
        original(self, index, batches)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "optimizer_step", interrupted)
        code, out, err = shell("train", place / "tiny.yaml", f"out={tmp_path}/run", "train.steps=5")
    assert code == 0 and without_warnings(err) == []
    assert "stopped by SIGTERM and saved at step 3" in out
    again = shlex.split(out.splitlines()[-1].partition("resume with: ")[2])
    assert "shows whether it learns" not in out
    finished = shell.good(*again[1:])
    assert "resuming from" in finished
    assert finished.splitlines()[-1].startswith(f"trained: {tmp_path}/run; `tapct report ")
    assert [row["step"] for row in numbers_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert "nothing to train" in shell.good(*again[1:])


# --- start ---


def test_the_command_line_does_not_wait_for_torch() -> None:
    check = (
        "import sys, tapct.cli; print([name for name in ('torch', 'numpy', 'rich.console') if "
        "name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    """Not of wall time, which grows if other processes have both cores."""
    before = os.times()
    done = subprocess.run(
        program("--help"), env=environment(), capture_output=True, text=True, check=True
    )
    after = os.times()
    commands = "phantom index pack train plan eval export embed report submit jobs cancel sweep"
    for command in commands.split():
        assert f"  {command} " in done.stdout
    own = after.children_user - before.children_user
    assert own + after.children_system - before.children_system < 1.0


def test_compare_prints_a_table_and_writes_a_page(
    place: Path, shell: Shell, tmp_path: Path
) -> None:
    page = tmp_path / "both.html"
    printed = shell.good(
        "compare", place / "run", tmp_path / "nix", "--out", page, "--metric", "loss/*"
    )
    assert f"left out: {tmp_path}/nix is not there" in printed and f"curves: {page}" in printed
    last = numbers_of(place / "run")
    mean = sum(row["loss/total"] for row in last) / len(last)
    total_loss = re.search(r"^Total loss +([\d.]+)$", printed, re.MULTILINE)
    assert total_loss is not None and float(total_loss[1]) == pytest.approx(mean, rel=1e-3)
    assert "default-src 'none'" in page.read_text()
    assert "is not there" in shell.bad("compare", tmp_path / "nix")
    assert "there is loss/total" in shell.bad("compare", place / "run", "--metric", "loss/totle")
