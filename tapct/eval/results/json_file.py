"""results.json: what one evaluation measured, on which scans, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tapct.base import files
from tapct.base.counted import counted
from tapct.eval.results import old_formats, terminal
from tapct.eval.results.task_section import Picture as Picture
from tapct.eval.results.task_section import TaskSection as TaskSection
from tapct.eval.results.task_section import (
    number,
    pictures_from_json,
    section_from_json,
    section_to_json,
)
from tapct.eval.results.terminal import shown as shown
from tapct.eval.results.terminal import title_of as title_of
from tapct.eval.scans.held_out import BY_EARLIER_VERSION, HeldOut
from tapct.eval.scans.train_test import BLOCKS
from tapct.run_folder import EvaluationFolder

SCHEMA = 4
PATIENTS_CHECKED = 3  # first schema whose evaluation compared patients with those of pretraining


@dataclass(frozen=True)
class UnreadScan:
    """A scan of the split that could not be read and was skipped.

    Args:
        scan: scan ID.
        side: `train` or `test`.
        reason: code of the reason and one line.
    """

    scan: str
    side: str
    reason: str


@dataclass(frozen=True)
class SplitRecord:
    """Which scans were used for what.

    Args:
        mode: `patients` or `blocks`.
        held_out: whether the test scans were held out from pretraining.
        train: IDs of the scans that tasks learned from.
        test: IDs of the scans that models were evaluated on.
        unread: scans that could not be read; they are in neither list.
        test_patients: for each test scan, the first test scan of the same patient in the order of
            their IDs; empty text where the patient is unknown. Empty in results of earlier
            versions.
        on_validation: whether the test scans are those of validation patients.
        num_chosen_on: number of test scans by which the checkpoint was chosen as the best one.
    """

    mode: str
    held_out: HeldOut
    train: tuple[str, ...]
    test: tuple[str, ...]
    unread: tuple[UnreadScan, ...] = ()
    test_patients: tuple[str, ...] = ()
    on_validation: bool = False
    num_chosen_on: int = 0

    @property
    def caveat(self) -> str:
        """What a reader must know about the numbers, as one line; empty where there is nothing. The
        terminal, the report and `tapct compare` print this line.
        """
        parts = [self.held_out.caveat()]
        if self.mode == BLOCKS:
            fit = "trained and tested on scans of one patient: a fit, not generalisation"
            parts.insert(0, fit)
        if self.num_chosen_on:
            parts.append(
                f"the checkpoint was chosen as the best one on {self.num_chosen_on} of "
                f"{counted(len(self.test), 'test scan')}, so the result is optimistic"
            )
        for side in ("train", "test"):
            num = sum(scan.side == side for scan in self.unread)
            if num:
                total = num + len(getattr(self, side))
                name = "training" if side == "train" else "test"
                parts.append(f"{num} of {total} {name} scans could not be read and were skipped")
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class EvaluatedData:
    """The data set of an evaluation.

    Args:
        name: name of its folder, see `eval/results/saved.py`.
        manifest: digest of the manifest.
        store: digest of the store, which depends on the voxels and not on their compression.
        labels: digest of the labels of all scans.
        num_scans: number of scans in the store.
        tables: digest of the values and points of `eval.scan_labels` and `eval.landmarks`; empty
            without them.
    """

    name: str
    manifest: str
    store: str
    labels: str
    num_scans: int
    tables: str = ""


@dataclass(frozen=True)
class EvaluatedWeights:
    """The weights of the pretrained model.

    Args:
        run: name of the run folder; of an export without one, its own name.
        step: finished steps; None where unknown.
        samples: samples seen; None where unknown.
        sha256: hash of the file with the weights.
        store: digest of the store that the run was trained on at that step; empty where unknown.
        source: where they were read: `run`, `checkpoint` (without its run folder) or `export`.
    """

    run: str
    step: int | None
    samples: int | None
    sha256: str
    store: str
    source: str = "run"


@dataclass(frozen=True)
class Origin:
    """What an evaluation was made from, and how.

    Args:
        data: its data set; None where it was called from Python with other scans.
        weights: weights of the pretrained model; None as above.
        command: command line, without absolute paths; empty where it was called from Python.
        git_revision: revision of tapct; empty where unknown.
        versions: package -> version.
        machine: processor, and the GPU where features were computed on one.
    """

    data: EvaluatedData | None = None
    weights: EvaluatedWeights | None = None
    command: str = ""
    git_revision: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""


@dataclass(frozen=True)
class EvaluatedBackbone:
    """How one model of an evaluation was run.

    Args:
        patch: voxels (z, y, x) of its patch.
        blocks: blocks whose features were read, counted from 0.
        preprocess: its preprocessing.
        contract: its HU contract.
        features: its key in the feature cache, which stands for its weights too.
        held_out: whether its pretraining has seen the test scans, as `SplitRecord.held_out` of the
            pretrained model; None for baselines, which were trained on nothing.
    """

    patch: tuple[int, ...]
    blocks: tuple[int, ...]
    preprocess: Mapping[str, Any]
    contract: Mapping[str, Any]
    features: str
    held_out: bool | str | None = None


@dataclass(frozen=True)
class Cost:
    """What the features of an evaluation cost.

    Args:
        seconds: seconds by part: read, prepare, forward, write, load. Parts run side by side, so
            their sum can exceed the wall time.
        num_scans: scans of the evaluation.
        num_computed: pairs of scan and model whose features were computed.
        num_cached: pairs whose features were in the cache.
        features_bytes: bytes of the features of this evaluation in the cache.
        cache_bytes: bytes of the whole cache.
    """

    seconds: Mapping[str, float]
    num_scans: int
    num_computed: int
    num_cached: int
    features_bytes: int
    cache_bytes: int

    def line(self) -> str:
        """The cost as one line for a terminal."""
        parts = ", ".join(f"{part} {value:.3g} s" for part, value in self.seconds.items())
        return (
            f"features of {counted(self.num_scans, 'scan')}: {self.num_computed} computed, "
            f"{self.num_cached} in the cache ({self.features_bytes / 1e9:.3g} GB, the whole cache "
            f"{self.cache_bytes / 1e9:.3g} GB); {parts}"
        )


@dataclass(frozen=True)
class Evaluation:
    """The content of results.json.

    Args:
        tasks: task name -> its results, in the order of the config.
        split: which scans were used for what.
        preprocess: settings of `eval.preprocess`.
        patch: voxels (z, y, x) of a patch.
        seed: random seed of the split and of the choice of training patches.
        pca: pictures of patch features.
        volumes: test scans at reduced resolution with label maps and feature colours, for the
            viewer of the report; see `pictures/volumes.py`.
        origin: data, weights, command and versions.
        seconds: wall time.
        backbones: model name -> how it was run; empty in results of earlier versions.
        cost: what the features cost; None in results of earlier versions.
        settings: settings of `eval` that decide which scans are used, see `over_steps.py`; empty
            in results of earlier versions.
        without_result: name of each task that has no result -> reason.
        models_without_result: name of each model whose features could not be computed -> reason.
    """

    tasks: Mapping[str, TaskSection]
    split: SplitRecord
    preprocess: Mapping[str, Any]
    patch: tuple[int, ...]
    seed: int
    pca: tuple[Picture, ...] = ()
    origin: Origin = field(default_factory=Origin)
    seconds: float = math.nan
    backbones: Mapping[str, EvaluatedBackbone] = field(default_factory=dict)
    cost: Cost | None = field(default=None, compare=False)  # differs between equal evaluations
    settings: Mapping[str, Any] = field(default_factory=dict)
    volumes: tuple[Picture, ...] = ()
    without_result: Mapping[str, str] = field(default_factory=dict)
    models_without_result: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that is written; NaN becomes null."""
        tasks = {name: section_to_json(section) for name, section in self.tasks.items()}
        content = {
            "schema": SCHEMA,
            "data": None if self.origin.data is None else asdict(self.origin.data),
            "weights": None if self.origin.weights is None else asdict(self.origin.weights),
            "tasks": tasks,
            "without_result": self.without_result,
            "models_without_result": self.models_without_result,
            "split": _split_to_json(self.split),
            "settings": self.settings,
            "preprocess": self.preprocess,
            "patch": self.patch,
            "seed": self.seed,
            "pca": [asdict(picture) for picture in self.pca],
            "volumes": [asdict(picture) for picture in self.volumes],
            "versions": self.origin.versions,
            "machine": self.origin.machine,
            "git_revision": self.origin.git_revision,
            "command": self.origin.command,
            "seconds": self.seconds,
            "backbones": {name: asdict(one) for name, one in self.backbones.items()},
            "cost": None if self.cost is None else asdict(self.cost),
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def lines(self) -> list[str]:
        """Headlines as lines for a terminal, what they are means of, and the caveat."""
        lines = ["on the validation patients:"] if self.split.on_validation else []
        for name, section in self.tasks.items():
            if len(self.tasks) > 1:
                lines.append(f"{name} ({section.headline.direction} is better)")
            lines.extend(terminal.task_lines(section))
        lines += self.missing_lines()
        if self.split.caveat:
            lines.append(f"caveat: {self.split.caveat}")
        for name, backbone in self.backbones.items():
            if backbone.held_out not in (None, True):
                lines.append(f"caveat: {_held_out_line(name, backbone.held_out)}")
        if self.cost is not None:
            lines.append(self.cost.line())
        return lines

    def missing_lines(self) -> list[str]:
        """One line per task and per model that has no result."""
        tasks = [f"no result of {name}: {why}" for name, why in self.without_result.items()]
        models = self.models_without_result.items()
        return [*tasks, *(f"no result of model {name}: {why}" for name, why in models)]

    def missing(self) -> str:
        """Tasks and models without a result, e.g. `1 task without a result: depth`; or empty."""
        parts = [
            f"{counted(len(names), kind)} without a result: {', '.join(names)}"
            for kind, names in (
                ("task", self.without_result),
                ("model", self.models_without_result),
            )
            if names
        ]
        return ", ".join(parts)

    def write(self, folder: Path) -> None:
        """Write FOLDER/results.json; the file is either the old or the new one, never half."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        files.write_atomically(EvaluationFolder(folder).results, text)


def from_json(content: Mapping[str, Any]) -> Evaluation:
    """Rebuild an evaluation from what `Evaluation.to_json` wrote, of this or an earlier schema.

    Raises:
        ValueError: the content is no evaluation, or of a later schema.
    """
    schema = content.get("schema", 1)
    if schema == 1:
        content = old_formats.results_from_schema_1(content)
    elif schema not in range(2, SCHEMA + 1):
        raise ValueError(f"it has schema {schema}, this version of tapct reads up to {SCHEMA}")
    try:
        data, weights = content.get("data"), content.get("weights")
        origin = Origin(
            None if data is None else EvaluatedData(**data),
            None if weights is None else EvaluatedWeights(**weights),
            str(content.get("command", "")),
            str(content.get("git_revision", "")),
            content.get("versions", {}),
            str(content.get("machine", "")),
        )
        return Evaluation(
            {name: section_from_json(section) for name, section in content["tasks"].items()},
            _split_from_json(content.get("split", {}), was_checked=schema >= PATIENTS_CHECKED),
            content.get("preprocess", {}),
            tuple(content.get("patch", ())),
            int(content.get("seed", 0)),
            pictures_from_json(content.get("pca", ())),
            origin,
            number(content.get("seconds")),
            {name: _backbone(model) for name, model in content.get("backbones", {}).items()},
            None if content.get("cost") is None else Cost(**content["cost"]),
            content.get("settings", {}),
            pictures_from_json(content.get("volumes", ())),
            content.get("without_result", {}),
            content.get("models_without_result", {}),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is no evaluation ({type(error).__name__}: {error})") from error


def check_writable(section: TaskSection) -> None:
    """Raise an error if JSON cannot hold the results of a task, or they cannot be read again."""
    text = json.dumps(_plain(section_to_json(section)), allow_nan=False)
    section_from_json(json.loads(text))


def read(folder: Path) -> tuple[Evaluation | None, str]:
    """Read FOLDER/results.json.

    Returns:
        The evaluation and an empty text, or None and the reason.
    """
    path = EvaluationFolder(folder).results
    if not path.is_file():
        return None, f"{path.name} is not there"
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        return None, f"{path.name} is damaged: it holds no JSON object"
    try:
        return from_json(content), ""
    except ValueError as error:
        return None, f"{path.name} cannot be used: {error}"


def _held_out_line(name: str, held_out: bool | str | None) -> str:
    if held_out is False:
        return (
            f"{name} was pretrained on some of the test scans, or on other scans of a test patient"
        )
    return f"whether {name} was pretrained on the test scans is unknown"


def _backbone(content: Mapping[str, Any]) -> EvaluatedBackbone:
    tuples = {key: tuple(content[key]) for key in ("patch", "blocks")}
    return EvaluatedBackbone(**{**content, **tuples})


def _split_to_json(split: SplitRecord) -> dict[str, Any]:
    return {
        "mode": split.mode,
        "held_out_from_pretraining": split.held_out.value,
        "on_validation_patients": split.on_validation,
        "test_scans_chosen_on": split.num_chosen_on,
        "test_scans_pretrained_on": split.held_out.num_scans,
        "test_scans_of_pretrained_patients": split.held_out.num_patients,
        "unknown": split.held_out.unknown,
        "train": split.train,
        "test": split.test,
        "test_patients": split.test_patients,
        "unread": [asdict(scan) for scan in split.unread],
        "note": split.caveat,
    }


def _split_from_json(content: Mapping[str, Any], *, was_checked: bool) -> SplitRecord:
    test = tuple(content.get("test", ()))
    held_out = HeldOut(
        len(test),
        int(content.get("test_scans_pretrained_on", 0)),
        int(content.get("test_scans_of_pretrained_patients", 0)),
        str(content.get("unknown", "")) if was_checked else BY_EARLIER_VERSION,
    )
    unread = tuple(UnreadScan(**one) for one in content.get("unread", ()))
    mode = str(content.get("mode", ""))
    patients = tuple(map(str, content.get("test_patients", ())))
    return SplitRecord(
        mode,
        held_out,
        tuple(content.get("train", ())),
        test,
        unread,
        patients,
        bool(content.get("on_validation_patients", False)),
        int(content.get("test_scans_chosen_on", 0)),
    )


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy's numbers as Python's, arrays and tuples as lists, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
