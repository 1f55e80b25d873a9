"""Settings that cannot work are refused, and doubtful ones are warned of, before the first step;
`--print-config` accepts what `train` accepts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import make_store, write_config

from tapct.base.exits import UserError
from tapct.data.packed.scan_list import (
    SHAPE,
    SPACING,
    ScanList,
    StoredScan,
    columns_of,
    no_paths,
)
from tapct.nn.contracts import LossInputs
from tapct.run import pretrain, rules, start

# settings, separated by blanks -> a part of the error line
REFUSED = {
    # contract
    "contract.clip_low=900": "contract.clip_low 900 is not below contract.clip_high 822",
    "contract.clip_low=822": "contract.clip_low 822 is not below",
    "contract.mean=900": "contract.mean 900 lies outside the window",
    "contract.mean=-1009": "contract.mean -1009 lies outside",
    "contract.std=0": "contract.std 0 must be above 0",
    "contract.std=-1": "contract.std -1 must be above 0",
    "contract.mean=.nan": "must be finite",
    "contract.clip_high=.inf": "must be finite",
    # views and masks
    "views.num_globals=0": "must be >= 1",
    "views.num_globals=1 views.num_locals=0": "losses.dino cannot be computed: it compares",
    "views.global_area=[0.5,0.2]": "the lower end comes first",
    "views.aspect=[2,1]": "the lower end comes first",
    "views.z_zoom=[2,1]": "the lower end comes first",
    "views.z_zoom=[1,2]": "data.loader.slab_depth 6 is less than",
    "views.global_window=[8,16,16]": "data.loader.slab_depth 6 is less than",
    "views.global_window=[4,16,20]": "is no multiple of the patch",
    "views.local_window=[3,8,8]": "is no multiple of the patch",
    "masks.ratio=[0.5,0.1]": "the lower end comes first",
    "masks.probability=0": "losses.ibot cannot be computed: it predicts masked patches",
    "masks.ratio=[0,0]": "these settings mask none",
    "masks.ratio=[0,0.1]": "these settings mask none",  # of 8 patches
    "train.global_batch=2 masks.probability=0.2": "these settings mask none",  # of 4 crops
    "views.ops={window_jitter:{low_hu:400,high_hu:500}}"
    " contract.clip_high=-200 contract.mean=-500": "contract.clip_high are only 808 HU",
    # model
    "model.patch=[3,8,8]": "is no multiple of the patch",
    "model.heads=3": "no multiple of model.heads",
    "model.mlp_ratio=0.01": "less than one channel",
    "model.ffn=swiglu model.mlp_ratio=0.1": "less than one channel",
    "model.in_chans=3": "a run needs 1",
    "model.drop_path=1": "must be >= 0.0 and < 1.0",
    # losses
    "losses.dino=null losses.ibot=null losses.koleo=null": "every term is switched off",
    "losses.dino.weight=0 losses.ibot.weight=0 losses.koleo.weight=0": "every weight is 0",
    "losses.dino=null losses.ibot.share_dino_head=true": "which is switched off",
    "losses.ibot.share_dino_head=true losses.ibot.head.num_prototypes=8": "head sections differ",
    "losses.dino.weight=-1": "must be >= 0",
    "losses.dino.student_temp=0": "must be >= 0.001",
    "losses.dino.head.num_prototypes=1": "must be >= 2",
    "losses.dino=null losses.ibot=null losses.koleo=null losses.gram.tokens=masked"
    " masks.probability=0": "losses.gram cannot be computed",
    "losses.dino=null losses.ibot=null losses.koleo=null losses.gram.tokens=unmasked"
    " masks.probability=1 masks.ratio=[1,1]": "mask every patch",
    # optimizer and schedules
    "optim.lr=0": "must be > 0",
    "optim.lr=1e-9": "is below min_lr",
    "optim.momentum=[0.9,1.1]": "must be >= 0.0 and <= 1.0",
    "optim.teacher_temp=[0,0.1]": "must be >= 0.001",
    "optim.warmup_share=1": "must be >= 0.0 and < 1.0",
    "optim.betas=[0.9,1]": "must be >= 0.0 and < 1.0",
    "optim.clip_norm=0": "must be >=",
    "optim.freeze_last_layer_steps=-1": "must be >= 0",
    # length and batch
    "train.steps=0": "must be >= 1",
    "train.steps=1.5": "must be a whole number",
    "train.steps=1e4.5": "must be a whole number",
    "train.accumulation=3": "cannot be shared equally",
    "train.accumulation=4": "losses.koleo needs at least 2 samples",
    "train.init_allow=[anything]": "is none of",
    "seed=-1": "must be >= 0",
    "seed=18446744073709551616": "must be >= 0 and <",
    # the rest
    "checkpoint.every=0": "must be >= 1",
    "checkpoint.keep=0": "must be >= 1",
    "log.every=0": "must be >= 1",
    "data.held_out=1": "must be >= 0.0 and < 1.0",
    "data.loader.slab_depth=3": "data.loader.slab_depth 3 is less than",
    "parallel.timeout_s=1e30": "must be >=",
    "eval.preprocess.stride=[4,16,60]": "stride is 60 along x, more than the window of 16",
    "eval.preprocess.stride=[3,16,16]": "eval.preprocess.stride 3x16x16 is no multiple",
    "eval.preprocess.window=[5,16,16]": "eval.preprocess.window 5x16x16 is no multiple",
    "eval.tasks.segmentation=null eval.during.every=4": "eval.tasks has no task",
    "eval.during.device=gpu": "must be one of",
    "stages=[{start:3,set:[views.num_globals=1,views.num_locals=0]}]": "stages[0]: losses.dino",
    "stages=[{start:3,set:[optim.lr=1e-9]}]": "stages[0]: peak learning rate",
    "stages=[{start:12,set:[optim.lr=1e-3]}]": "is not less than train.steps 12",
    "losses.gram.start=4"
    " stages=[{start:3,set:[losses.gram.start=8]}]": "stages[0]: losses.gram: the teacher's copy",
}
# settings -> a part of the warning
DOUBTED = {
    "contract.clip_high=400": "contract.mean and contract.std are those of the window",
    "contract.clip_low=-1100 contract.mean=0": "is below -1024",
    "contract.std=2000": "is more than half of the HU window",
    "views.local_area=[0.9,1] views.global_area=[0.1,0.5]": "lies above views.global_area",
    "views.blur_sigma=[0,0]": "views.blur_p has no effect",
    "views.blur_sigma=[0,99]": "views.blur_sigma reaches 99 pixels",
    "masks.ratio=[1,1] masks.probability=1": "mask every patch",
    "masks.min_tokens=9": "masks.min_tokens 9 is more than the 4 patches",
    "losses.dino.student_temp=0.05": "losses.dino.student_temp 0.05 is not above",
    "losses.ibot.student_temp=0.05": "losses.ibot.student_temp 0.05 is not above",
    "optim.teacher_temp=[0.04,0.2]": "is not above the teacher's temperature 0.2",
    "losses.dino.targets.sinkhorn_iterations=5": "sinkhorn_iterations has no effect",
    "losses.dino.targets={kind:sinkhorn,centre_momentum:0.5}": "centre_momentum has no effect",
    "losses.gram={}": "losses.gram.start 100000 is not less than train.steps 12",
    "optim.momentum=[1,1]": "the teacher never changes",
    "optim.momentum=[0.999,0.9]": "optim.momentum falls",
    "optim.lr=2": "a peak learning rate of 2",
    "optim.weight_decay=[200,200]": "turns the sign",
    "optim.warmup_share=0.99": "optim.warmup_share fills all 12 steps",
    "optim.teacher_temp_warmup_share=0.99": "optim.teacher_temp_warmup_share fills all 12 steps",
    "optim.freeze_last_layer_steps=12": "the last layers of the heads are never trained",
    "checkpoint.every=13": "checkpoint.every 13 is more than train.steps 12",
    "checkpoint.keep_every=13": "it keeps no checkpoint",
    "log.every=13": "log.every 13 is more than train.steps 12",
    "eval.during.every=13": "only the last step is evaluated",
    "parallel.desync_every=13": "the check never runs",
    "train.init_allow=[missing]": "train.init_allow has no effect without train.init",
    "train.init_inflate=centre": "train.init_inflate has no effect without train.init",
    "train.init_window=[4,8,8]": "train.init_window has no effect without train.init",
    "data.loader.max_skips=3": "data.loader.max_skips has no effect",
    "eval.during.every=4 eval.during.sbatch=[--time=1]": "eval.during.sbatch has no effect",
    "eval.during.how=job": "have no effect with eval.during.every=0",
    "eval.preprocess.size_yx=[8,8]": "less than the 16 of eval.preprocess.window",
    "eval.preprocess={size_yx:[16,16],window:[4,16,16],stride:[4,12,16],refine:[1,2,1]}": (
        "refine is 2 along y, but all windows of 16 voxels in 16 lie on one grid of patches"
    ),
    "stages=[{start:3,set:[]}]": "stages[0].set changes nothing",
    "stages=[{start:3,set:['optim.momentum=[1,1]']}]": "stages[0]: optim.momentum is [1, 1]",
}
# settings that are unusual and meant: neither refused nor warned of
MEANT = (
    "train.steps=1e4",
    "views.num_globals=1",
    "views.num_globals=1 views.num_locals=0 losses.dino=null",
    "views.num_locals=0 views.local_window=[5,7,7]",
    "losses.ibot=null masks.probability=0",
    "losses.dino=null",
    "losses.koleo=null train.global_batch=2",
    "contract.clip_low=-1000 contract.clip_high=1000 contract.mean=0 contract.std=1000",
    "optim.weight_decay=[0.4,0.04]",
    "optim.warmup_share=0 optim.teacher_temp_warmup_share=0",
    "eval.tasks.segmentation=null",
    "eval.preprocess.size_yx=[0,0]",
    "eval.during.every=4",
    "optim.momentum=[0.99,0.99]",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    return write_config(folder, make_store(folder))


def words_of(text: str) -> list[str]:
    """Settings of the tables above; `{a:1}` is written without blanks there."""
    return [word.replace(":", ": ").replace("{", "{ ") for word in text.split()]


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_work_is_refused(config: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain.read_config(config, words_of(text))
    line = str(caught.value)
    assert REFUSED[text] in line and "\n" not in line


@pytest.mark.parametrize("text", DOUBTED)
def test_what_is_probably_not_intended_is_warned_of(config: Path, text: str) -> None:
    resolved = pretrain.read_config(config, words_of(text))
    lines = rules.warnings(resolved)
    assert any(DOUBTED[text] in line for line in lines), lines
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("text", MEANT)
def test_what_is_meant_is_accepted_without_a_message(config: Path, text: str) -> None:
    assert rules.warnings(pretrain.read_config(config, words_of(text))) == []


def test_a_warning_names_the_line_where_the_setting_is_written(
    tmp_path: Path, config: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {config}\nseed: 1\noptim:\n  momentum: [1, 1]\n")
    (line,) = rules.warnings(pretrain.read_config(path, []))
    assert line.startswith(f"{path}:4: optim.momentum is [1, 1]")


# settings that depend on the machine and the data -> a part of the error line
AT_START = {
    "device=cuda": "torch sees no GPU",
    "model.attention=varlen": "needs a GPU",
    "train.resume=must": "holds no whole checkpoint",
    "train.resume=/nowhere": "nor a path that exists",
    "train.init=/nowhere": "give a run folder",
    "data.store=/": "holds no store.parquet",
    "out=/dev/null": "/dev/null is a file and not a folder",
    "out=/dev/null/run": "/dev/null is a file and not a folder",
}


@pytest.mark.parametrize("text", AT_START)
def test_print_config_refuses_what_train_refuses(
    tmp_path: Path, config: Path, shell: Shell, text: str
) -> None:
    words = [config, f"out={tmp_path}/run", *text.split()]
    code, printed, error = shell("train", *words, "--print-config")
    assert code == 2 and AT_START[text] in error and "seed: " in printed
    code, _, error = shell("train", *words)
    assert code == 2 and AT_START[text] in error and not (tmp_path / "run").exists()


def test_print_config_accepts_a_config_whose_store_does_not_exist_yet(
    config: Path, shell: Shell
) -> None:
    code, printed, error = shell("train", config, "data.store=later", "--print-config")
    assert code == 0 and "seed: " in printed
    assert error == "warning: data.store later does not exist yet, so the data was not checked\n"


def test_wandb_without_a_home_folder_is_refused_before_the_first_step(
    tmp_path: Path, config: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and passwd
    words = ("train", config, f"out={tmp_path}/run", "log.wandb.mode=offline")
    assert "wandb needs a home folder" in shell.bad(*words)
    code, _, error = shell(*words, "--print-config")
    assert code == 2 and "wandb needs a home folder" in error
    assert not (tmp_path / "run").exists()


def test_print_config_refuses_a_run_folder_of_another_config(
    tmp_path: Path, config: Path, shell: Shell
) -> None:
    words = ("train", config, f"out={tmp_path}/run", "train.steps=1", "checkpoint.every=1")
    shell.good(*words)
    assert "optim.lr was 0.01" in shell.bad(*words, "optim.lr=0.02", "--print-config")
    shell.good(*words, "optim.lr=0.02", "--print-config", "--allow-change")
    shell.good(*words, "--print-config")


def test_print_config_refuses_another_archive_as_train_does(
    tmp_path: Path, config: Path, shell: Shell
) -> None:
    words = ("train", config, f"out={tmp_path}/run", "train.steps=1", "checkpoint.every=1")
    shell.good(*words)
    other = f"data.store={make_store(tmp_path / 'other', num=3, seed=8)}"
    line = shell.bad(*words, other, "--print-config")
    assert "was trained on another archive" in line and line == shell.bad(*words, other)
    code, _, error = shell(*words, other, "data.on_change=rebase", "--print-config")
    assert code == 0 and "continuing with the new one" in error


def test_print_config_names_damaged_checkpoints_as_train_does(
    tmp_path: Path, config: Path, shell: Shell
) -> None:
    words = ("train", config, f"out={tmp_path}/run", "train.steps=2", "checkpoint.every=1")
    shell.good(*words)
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    (steps[-1] / "teacher.safetensors").write_bytes(b"half")
    code, _, error = shell(*words, "--print-config")
    assert code == 0 and f"checkpoint {steps[-1].name} is damaged and was skipped" in error
    (steps[0] / "teacher.safetensors").write_bytes(b"half")
    line = shell.bad(*words, "--print-config")
    assert "every checkpoint of" in line and line == shell.bad(*words)


class Rows:
    """A store of scans without voxels, as far as warnings read it."""

    def __init__(self, patients: str, labels: str = "", depth: int = 20, guessed: int = 0) -> None:
        self.path, self.digest, self.guessed = Path("store"), "d" * 32, guessed
        scans = [
            StoredScan(str(i), (depth, 64, 64), (1.0, 1.0, 1.0), patient, "",
                       "digest" if patient in labels else "", "")
            for i, patient in enumerate(patients)
        ]  # fmt: skip
        numbers = dict.fromkeys((*SHAPE, *SPACING), pa.float64())
        self.scans = ScanList(
            {
                name: pa.array(values, numbers.get(name, pa.string()))
                for name, values in columns_of(scans).items()
            },
            no_paths,
        )

    def __len__(self) -> int:
        return len(self.scans)

    def num_guessed_patients(self) -> int:
        return self.guessed


# settings, store -> a part of the warning; empty for none
DATA = (
    ("", Rows("abcdefgh"), ""),
    ("", Rows("abcdefgh", "abc"), "data.held_out is 0, so pretraining sees all patients"),
    ("train.global_batch=12", Rows("abcdefgh"), "holds a scan up to 2 times"),
    ("", Rows("aaaa"), "all 4 scans for training are of one patient"),
    ("data.held_out=0.4", Rows("eeee"), "holds out none of the store's patients (1)"),
    ("data.held_out=0.4 data.split_version=1", Rows("aaaa"), "(1) by rule 1 (data.split_version)"),
    ("data.held_out=0.4", Rows("abcdefgh", "abcdefgh", guessed=3), "3 of 8 scans were guessed"),
    ("data.held_out=0", Rows("abcdefgh", guessed=3), ""),
    ("", Rows("abcdefgh", depth=3), "views of that depth are always filled up with air"),
    ("data.held_out=0.4", Rows("abcdefgh", "abcdefgh"), ""),
    (
        "stages=[{start:3,set:[data.loader.on_error=skip,data.loader.max_skips=9]}]",
        Rows("abcdefgh"),
        "stages[0]: data.loader.max_skips 9 is not less than the 8 scans",
    ),
)


@pytest.mark.parametrize(("text", "store", "expected"), DATA)
def test_data_that_does_not_fit_the_settings_is_warned_of(
    config: Path, text: str, store: Rows, expected: str
) -> None:
    run = pretrain.read_config(config, words_of(text)).value
    any_store: Any = store
    rows = start.training_rows(run, any_store, None)
    lines = list(start.data_warnings(run, any_store, rows))
    one_patient = [line for line in lines if "are of one patient" in line]
    assert bool(one_patient) == (len({scan.patient for scan in store.scans}) == 1)
    others = [line for line in lines if line not in one_patient]
    assert len(others or one_patient) == bool(expected), lines
    assert expected in (others or one_patient or [""])[0]


def test_patients_with_labels_that_are_not_held_out_are_counted(config: Path) -> None:
    run = pretrain.read_config(config, []).value
    (line,) = start.doubts_about_test_patients(run, cast(Any, Rows("aabbcdef", "abc")))
    assert "also the 3 that have label maps" in line and "data.held_out=0.2" in line
    for text, store in (
        ("data.held_out=0", Rows("aabb", "a")),  # one labelled patient cannot be held out and kept
        ("data.held_out=0", Rows("abcdefgh")),
        ("data.held_out=0.4", Rows("abcdefgh", "abcdefgh")),
    ):
        run = pretrain.read_config(config, words_of(text)).value
        assert not list(start.doubts_about_test_patients(run, cast(Any, store)))


def test_labels_on_one_side_of_the_split_are_warned_of(config: Path) -> None:
    run = pretrain.read_config(config, ["data.held_out=0.4"]).value
    held_out = run.data.held_out_patients("abcdefgh", 0)
    for labelled, word in ((held_out, "all"), (set("abcdefgh") - held_out, "none")):
        store: Any = Rows("abcdefgh", "".join(labelled))
        (line,) = start.data_warnings(run, store, start.training_rows(run, store, None))
        assert (
            f"holds out {word} of the {len(labelled)} patients that the task segmentation" in line
        )


def test_a_store_without_training_scans_is_refused(config: Path) -> None:
    run = pretrain.read_config(config, ["data.held_out=0.4"]).value
    (held_out, *_) = run.data.held_out_patients("abcdefgh", 0)
    every: Any = Rows(held_out)
    with pytest.raises(UserError, match="holds out all of the store's patients"):
        start.training_rows(run, every, None)
    none: Any = Rows("")
    with pytest.raises(UserError, match="holds no scan"):
        start.training_rows(run, none, None)


def test_settings_that_the_data_makes_pointless_are_warned_of_by_both(
    tmp_path: Path, config: Path, shell: Shell
) -> None:
    settings = ["train.global_batch=6", "data.held_out=0", "data.loader.on_error=skip"]
    deep = ["views.global_window=[40,16,16]", "data.loader.slab_depth=40", "views.num_locals=0"]
    words = ["train", config, f"out={tmp_path}/run", "train.steps=1", *settings, *deep]
    code, _, error = shell(*words, "--print-config")
    assert code == 0
    assert "train.global_batch 6 is more than the 4 scans" in error
    assert "a step holds a scan up to 2 times" in error
    assert "needs 40 slices, and the deepest scan" in error
    assert "data.loader.max_skips 10 is not less than the 4 scans" in error
    code, _, trained = shell(*words)
    assert code == 0 and trained == error


def test_a_label_that_no_scan_has_is_warned_of_before_training(config: Path, shell: Shell) -> None:
    words = ("train", config, "--print-config")
    code, _, error = shell(*words, "eval.tasks.segmentation.body=[nosuch]")
    assert code == 0 and "eval.tasks.segmentation.body names 'nosuch'" in error
    assert "`tapct eval` would refuse it" in error
    code, _, error = shell(*words, "eval.tasks.segmentation.organs=[liver]")
    assert code == 0 and "liver" not in error


def test_one_global_view_is_compared_with_the_local_ones(
    tmp_path: Path, config: Path, shell: Shell
) -> None:
    words = ("views.num_globals=1", "train.steps=2", "log.every=1", "checkpoint.every=2")
    shell.good("train", config, f"out={tmp_path}/run", *words)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "dino_local" in rows and "dino_global" not in rows and "null" not in rows


def test_a_loss_is_asked_with_the_numbers_of_the_run(config: Path) -> None:
    run = pretrain.read_config(config, ["train.global_batch=8"]).value
    # 16 crops, half of them masked with shares 0.15, 0.2, ... 0.5 of 8 patches
    masked = sum(int(8 * (0.1 + 0.4 * i / 8) + 1e-9) for i in range(1, 9))
    assert rules.loss_inputs(run) == LossInputs(2, 2, masked, False, 0.07)
