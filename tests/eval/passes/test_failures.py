"""What fails in an evaluation costs its own result, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, evaluation_of, make_store, own_plugin
from torch import Tensor, nn
from torso_scans import PATCH, PREPROCESS, Row, torso_of

from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.data.packed.packed_scan import Damaged
from tapct.distributed.world import LostRank
from tapct.engine import loop
from tapct.eval import runner
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures
from tapct.eval.models.baselines import NamedModel, RawPatches
from tapct.eval.passes.failures import ends_all
from tapct.eval.results.json_file import Evaluation, from_json
from tapct.eval.scans.usable import Labels
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.run import pretrain
from tapct.types import HUContract

ROWS = [Row(f"s{n}", f"p{n}", str(n)) for n in range(4)]


@dataclasses.dataclass(frozen=True)
class Config:
    """A task without settings."""


class Brightness(Task[str, float]):
    """The mean of the first feature of each test scan."""

    labels = Labels.NONE

    def __init__(self) -> None:
        self.scores: list[ScanScore] = []
        self.learned: list[str] = []

    def truth(self, scan: Any, grid: Any, in_play_Z: Any) -> str:
        return str(scan.id)

    def learn(self, model: str, dense: DenseFeatures, truth: str) -> None:
        self.learned.append(f"{model} {truth}")

    def fit(self) -> None:
        assert self.learned

    def judge(self, model: str, dense: DenseFeatures, truth: str) -> float:
        value = float(dense.features_DZYX[0].mean())
        self.scores.append(ScanScore(truth, model, value))
        return value

    def draw(self, path: Path, truth: str, predictions: Mapping[str, float]) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
        return "brightness"

    def results(self) -> TaskResults:
        models = {score.model: {"n": len(self.scores)} for score in self.scores}
        return TaskResults(models, tuple(self.scores))

    def headline(self) -> Headline:
        models = dict.fromkeys(score.model for score in self.scores)
        values = {m: np.mean([s.value for s in self.scores if s.model == m]) for m in models}
        return Headline("brightness", cast(Any, values), "higher", "Mean of a feature.")


class Fails(Exception):
    """The error of a user's own task."""


def failing(method: str, what: Exception | Callable[..., Any]) -> type[Brightness]:
    """The task, one method of which raises an error or does something else."""

    def fail(self: Any, *_: Any) -> Any:
        if isinstance(what, Exception):
            raise what
        return what()

    return type("Broken", (Brightness,), {method: fail})


class Backbone(nn.Module):
    """Raw patches of a model that computes features of the first scans only."""

    def __init__(self, good_windows: int, error: Exception | None = None) -> None:
        super().__init__()
        self.raw, self.patch, self.dim = RawPatches(PATCH), PATCH, RawPatches(PATCH).dim
        self.left, self.error = good_windows, error
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, crops: list[Tensor]) -> Any:
        self.left -= len(crops[0])
        if self.left < 0:
            if self.error is not None:
                raise self.error
            crops = [crop * torch.nan for crop in crops]
        return self.raw(crops)


def evaluate(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    tasks: Mapping[str, type[Brightness]],
    *further: NamedModel,
    first: NamedModel | None = None,
    store: MemoryStore | None = None,
    **settings: Any,
) -> Evaluation:
    real = plugins.load

    def load(folder: str, name: str) -> Any:
        if name not in tasks:
            return real(folder, name)

        class Module:
            @staticmethod
            def build(config: Any, *, seed: int) -> Brightness:
                return tasks[name]()

        return Module

    monkeypatch.setattr(plugins, "load", load)
    config = runner.Config(
        tasks=tuple(Plugin(name, Config()) for name in tasks), **{"num_pictures": 0} | settings
    )
    return runner.evaluate(
        [first or NamedModel("raw_hu", RawPatches(PATCH)), *further], ROWS,
        cast(Any, store) or MemoryStore(ROWS, torso_of), config, contract=HUContract(), out=out,
        preprocess=PREPROCESS,
    )  # fmt: skip


def not_json() -> TaskResults:
    return TaskResults({"raw_hu": {"what": {1, 2}}})


@pytest.mark.parametrize(
    ("method", "what", "reason"),
    [
        ("truth", Fails("a"), r"truth\(\) of train scan s\d raised Fails: a \(test_fail.*line \d+"),
        ("learn", Fails("a"), r"learn\(\) of model raw_hu on scan s\d raised Fails: a \(test_f"),
        ("fit", Fails(), r"fit\(\) raised Fails \(test_failures.py, line \d+\)"),
        ("judge", Fails("a\nb"), r"judge\(\) of model raw_hu on scan s\d raised Fails: a b \("),
        ("judge", Damaged("x"), "x"),
        ("label_map", Fails("a"), r"label_map\(\) of model raw_hu on scan s\d raised Fails: a"),
        ("results", Fails("a"), r"results\(\).* raised Fails: a"),
        ("results", dict, r"results\(\) returned a dict; it must return a TaskResults"),
        ("results", not_json, r"results\(\).* raised TypeError: .*set.* not JSON"),
        ("headline", lambda: 0.5, r"headline\(\) returned a float; it must return a Headline"),
        ("predicted_scans", Fails("a"), r"predicted_scans\(\) raised Fails: a"),
        ("fit", OSError(2, "No such file", "/home/x/a.csv"), r"'path-[0-9a-f]{8}'"),
        ("fit", torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_a_task_that_fails_does_not_lose_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    what: Any,
    reason: str,
) -> None:
    alone = evaluate(monkeypatch, tmp_path / "alone", {"good": Brightness})
    assert alone.without_result == {} and alone.missing() == ""
    tasks: dict[str, type[Brightness]] = {"bad": failing(method, what), "good": Brightness}
    found = evaluate(monkeypatch, tmp_path / "both", tasks)
    assert found.tasks == alone.tasks and list(found.without_result) == ["bad"]
    assert re.search(reason, found.without_result["bad"]), found.without_result
    printed = " ".join(capsys.readouterr().out.split())
    assert "task bad is left out: " in printed
    assert f"no result of bad: {found.without_result['bad']}" in found.lines()
    assert found.missing() == "1 task without a result: bad"
    content = json.loads((tmp_path / "both" / "results.json").read_text())
    assert from_json(content) == found and "/home" not in json.dumps(content)
    assert content["without_result"] == found.without_result
    if isinstance(what, Exception):  # alone, it is the error itself, with its traceback
        with pytest.raises(type(what)):
            evaluate(monkeypatch, tmp_path / "bad", {"bad": failing(method, what)})
        both = {"bad": failing(method, what), "worse": failing("fit", Fails("last"))}
        with pytest.raises((type(what), Fails)):
            evaluate(monkeypatch, tmp_path / "worse", both)


@pytest.mark.parametrize(
    "what",
    [
        KeyboardInterrupt(),
        SystemExit(143),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        LostRank("rank 1 has ended"),
    ],
    ids=lambda what: type(what).__name__,
)
@pytest.mark.parametrize("method", ["fit", "draw"])
def test_what_ends_the_process_ends_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, what: BaseException
) -> None:
    def end() -> None:
        raise what

    tasks: dict[str, type[Brightness]] = {"bad": failing(method, end), "good": Brightness}
    with pytest.raises(type(what)):
        evaluate(monkeypatch, tmp_path, tasks, num_pictures=1)
    assert not (tmp_path / "results.json").exists()
    assert not isinstance(what, Exception) or ends_all(what)


@pytest.mark.parametrize("method", ["draw", "layers", "slices_of_interest", "draw_results"])
def test_a_picture_that_cannot_be_drawn_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    alone = evaluate(monkeypatch, tmp_path / "alone", {"good": Brightness}, num_pictures=1)
    tasks: dict[str, type[Brightness]] = {
        "bad": failing(method, Fails("no colours")),
        "good": Brightness,
    }
    found = evaluate(monkeypatch, tmp_path / "both", tasks, num_pictures=1)
    assert found.tasks["good"] == alone.tasks["good"] and found.without_result == {}
    assert found.tasks["bad"].headline == alone.tasks["good"].headline
    assert len(found.tasks["good"].pictures) == 1
    assert len(found.tasks["bad"].pictures) == (method != "draw")
    assert len(found.pca) == len(found.volumes) == 1
    line = f"task bad: a picture is left out: {method}()"
    printed = " ".join(capsys.readouterr().out.split())
    assert line in printed and "raised Fails: no colours (" in printed


def test_a_scan_that_is_read_for_its_picture_alone_costs_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features are in the cache, so that its voxels are read for the picture only."""
    evaluate(monkeypatch, tmp_path, {"good": Brightness})

    class Broken(MemoryStore):
        def read(self, i: int) -> np.ndarray:
            raise Damaged(f"scan {self.scans[i].id} is damaged")

    store = Broken(ROWS, torso_of)
    found = evaluate(monkeypatch, tmp_path, {"good": Brightness}, store=store, num_pictures=1)
    assert len(found.tasks["good"].pictures) == 1 and found.pca == ()
    assert "features: a picture is left out: scan s" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("good_windows", [0, 40])
@pytest.mark.parametrize("error", [None, Fails("no kernel")])
def test_a_model_that_fails_does_not_lose_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    good_windows: int,
    error: Exception | None,
) -> None:
    tasks = {"good": Brightness}
    alone = evaluate(monkeypatch, tmp_path / "alone", tasks)
    further = [
        NamedModel("broken", Backbone(good_windows, error)),
        NamedModel("equal", Backbone(good_windows, error)),  # has the same features
        NamedModel("again", RawPatches(PATCH)),
    ]
    found = evaluate(monkeypatch, tmp_path / "both", tasks, *further)
    headline = found.tasks["good"].headline.values
    assert list(headline) == list(found.backbones) == ["raw_hu", "again"]
    assert headline["raw_hu"] == headline["again"] == alone.tasks["good"].headline.values["raw_hu"]
    assert list(found.models_without_result) == ["broken", "equal"]
    what = "some features are not finite" if error is None else "raised Fails: no kernel ("
    assert what in found.models_without_result["broken"]
    assert found.missing() == "2 models without a result: broken, equal"
    assert found.cost is not None and found.cost.num_computed + found.cost.num_cached == 8
    assert from_json(json.loads((tmp_path / "both" / "results.json").read_text())) == found
    assert "model equal is left out" in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "both").rglob("*.tmp*"))
    # the model that the evaluation is about is the first one
    with pytest.raises(Exception, match="not finite" if error is None else "no kernel"):
        evaluate(monkeypatch, tmp_path / "first", tasks, further[2], first=further[0])
    with pytest.raises(MemoryError):
        evaluate(
            monkeypatch, tmp_path / "memory", tasks, NamedModel("big", Backbone(0, MemoryError()))
        )


BROKEN = """
from dataclasses import dataclass
from tapct.extend import Labels, Task, setting

@dataclass(frozen=True)
class Config:
    size: int = setting(0, "size")

class Broken(Task):
    labels = Labels.NONE
    def __init__(self, config): self.size = config.size
    def truth(self, scan, grid, in_play_Z): return scan.id
    def learn(self, model, dense, truth): pass
    def fit(self): self.weight = 1 / self.size
    def judge(self, model, dense, truth): pass
    def results(self): pass
    def headline(self): pass

def build(config, *, seed):
    return Broken(config)
"""


def test_the_command_names_a_users_own_task_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    own_plugin(monkeypatch, tmp_path, "broken", BROKEN)
    words = ("eval.tasks.segmentation.steps=5", "eval.num_pictures=0", "eval.baselines=[raw_hu]")
    resolved = config_of(tmp_path, make_store(tmp_path / "data"), *words, "checkpoint.every=12",
        "eval.tasks[mylab.broken]={}")  # fmt: skip
    assert pretrain.train(resolved) == loop.Stop(12)
    run = tmp_path / "run"
    code, out, err = shell("eval", run)
    assert code == 4 and "Traceback" not in out + err
    why = "fit() raised ZeroDivisionError: division by zero (broken.py, line 14)"
    assert f"no result of mylab.broken: {why}" in " ".join(out.split())
    assert "error: 1 task without a result: mylab.broken; the lines above" in " ".join(err.split())
    content = json.loads(evaluation_of(run, 12).results.read_text())
    assert content["without_result"] == {"mylab.broken": why}
    assert list(content["tasks"]) == ["segmentation"]
