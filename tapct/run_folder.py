"""What a run folder holds. Only this file of tapct names paths in it.

    RUN/
      config.yaml                       resolved config
      run.json                          command, versions, git revision, machine, data, all starts
      trained_on.parquet                scans and patients that the run has been trained on
      metrics.jsonl                     one line per optimizer step
      lease.json                        while a process trains: which one
      tensorboard/*                     the metrics for TensorBoard, with log.tensorboard
      wandb/*                           with log.wandb.mode=offline or online
      checkpoints/
        latest                          name of the newest checkpoint
        step_00000500/
          .metadata, *.distcp           weights, optimizer, centres, random state (torch DCP)
          meta.json                     step, samples seen, config, data digest
          teacher.safetensors           the teacher's backbone alone
          files.json                    size and sha256 of the other files
      eval/DATASET/step_00000500/       one folder per data set and checkpoint
        results.json                    after tapct eval, or with eval.during.every
        results.csv                     the same numbers as a table
        pictures/*                      of some test scans
        predictions/TASK/MODEL/*        predicted label maps, if a task is set to write them
        meta.json                       of the checkpoint, with eval.during.every
        teacher.safetensors             until the step has been evaluated; kept of the best step
        log.txt                         output of the evaluation
        validation/*                    the same on validation patients, with eval.validation_share
      eval/best.json                    best step by one headline, and the value of every step
      eval/features/*                   cache of frozen features, see eval/cache.py
      eval/data/NAME/*                  public data set of `tapct eval --data`, indexed and packed
      eval/results.json                 link to the newest results on the run's own data set
      export/
        config.json                     after tapct export: what the features depend on
        model.safetensors               the teacher's backbone
        trained_on.parquet              scans and patients that it has been trained on
      export-eval/DATASET/*             after tapct eval RUN/export: results and pictures
      report.html                       after tapct report
      jobs/.submitting                  while a job is submitted: which process does it
      jobs/20260131-120000/             after tapct submit or sweep, one folder per submission
        config.yaml                     config of the job
        submission.json                 job id, time, number of steps
        events.jsonl                    starts and ends of the job
        places                          job folder of each run of a sweep
        log.txt                         output of a run of tapct sweep
        *                               batch script, logs and state of the job
      code/REVISION/tapct/*             copy of tapct that the job runs

DATASET is the name of a store and the first digits of its digest, NAME the name of a public data
set alone. Earlier versions wrote
RUN/eval/results.json, whatever the data set, and RUN/eval/steps/step_00000500/results.json.

Files whose names begin with a dot, except DCP's `.metadata`, are being written or left by a process
that was killed while it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STEP_NAME = re.compile(r"step_\d+")
_TRAINED_ON = "trained_on.parquet"
_EARLIER_STEPS = "steps"  # folder of the evaluations of earlier versions


def step_name(step: int) -> str:
    """Name of the folder of a step: step_00000500."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint or evaluation, by the name of its folder."""
    return int(path.name.removeprefix("step_"))


def has_step_name(path: Path) -> bool:
    """Whether a path has the name of a checkpoint; whether it exists is not checked."""
    return _STEP_NAME.fullmatch(path.name) is not None


def evaluations_beside(folder: Path) -> Path:
    """Parent of the evaluations of weights that are not read through a run folder: NAME-eval beside
    the folder NAME of the weights.
    """
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-eval")


def features_beside(evaluations: Path) -> Path:
    """The feature cache of a model.

    Args:
        evaluations: parent of its evaluations, such as RUN/eval.
    """
    return evaluations / "features"


def data_beside(evaluations: Path) -> Path:
    """Parent of the data sets that an evaluation has indexed and packed.

    Args:
        evaluations: parent of the evaluations of a model, such as RUN/eval.
    """
    return evaluations / "data"


@dataclass(frozen=True)
class CheckpointFolder:
    """Paths in one checkpoint.

    Args:
        path: RUN/checkpoints/step_00000500.
    """

    path: Path

    @property
    def meta(self) -> Path:
        """Step, samples seen, config and data digest."""
        return self.path / "meta.json"

    @property
    def teacher(self) -> Path:
        """The teacher's backbone alone."""
        return self.path / "teacher.safetensors"

    @property
    def fingerprints(self) -> Path:
        """Size and sha256 of the other files."""
        return self.path / "files.json"


@dataclass(frozen=True)
class CheckpointsFolder:
    """Paths among the checkpoints of a run.

    Args:
        path: RUN/checkpoints.
    """

    path: Path

    @property
    def latest(self) -> Path:
        """File that holds the name of the newest checkpoint."""
        return self.path / "latest"

    def step(self, step: int) -> CheckpointFolder:
        """The checkpoint of a step, whether or not it exists."""
        return CheckpointFolder(self.path / step_name(step))

    def half_written(self, step: int) -> Path:
        """Folder of the checkpoint of a step while ranks write their parts of it."""
        return self.path / f".writing_{step_name(step)}"

    def half_removed(self, checkpoint: Path) -> Path:
        """Name that a checkpoint gets before its files are removed."""
        return self.path / f".old_{checkpoint.name}"

    def finished(self) -> list[Path]:
        """Checkpoint folders by step, oldest first; whether they are whole is not checked."""
        return sorted(filter(has_step_name, self.path.glob("step_*")), key=step_of)

    def leftovers(self) -> Iterator[Path]:
        """Folders that a process left which was killed while it wrote or removed a checkpoint."""
        for pattern in (".writing_*", ".old_*", ".step_*"):
            yield from self.path.glob(pattern)


@dataclass(frozen=True)
class EvaluationFolder:
    """Paths in one evaluation.

    Args:
        path: RUN/eval/DATASET/step_00000500, or a folder of the user's choice.
    """

    path: Path

    @property
    def results(self) -> Path:
        """All numbers, and how they were made."""
        return self.path / "results.json"

    @property
    def table(self) -> Path:
        """The same numbers as a table, one row per number."""
        return self.path / "results.csv"

    @property
    def validation(self) -> EvaluationFolder:
        """The evaluation on validation patients, with eval.validation_share."""
        return EvaluationFolder(self.path / "validation")

    @property
    def predictions(self) -> Path:
        """Folder of the predicted label maps, with eval.tasks.segmentation.predictions."""
        return self.path / "predictions"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures of some test scans."""
        return self.path / "pictures"

    @property
    def meta(self) -> Path:
        """Meta file of the checkpoint that is evaluated."""
        return self.path / "meta.json"

    @property
    def teacher(self) -> Path:
        """The teacher's backbone, kept until the step has been evaluated, and of the best step."""
        return self.path / "teacher.safetensors"

    @property
    def log(self) -> Path:
        """Output of the process that evaluates."""
        return self.path / "log.txt"


@dataclass(frozen=True)
class ExportFolder:
    """Paths in an export.

    Args:
        path: RUN/export, or a folder of the user's choice.
    """

    path: Path

    @property
    def card(self) -> Path:
        """All that the features depend on; see `weights/card.py`."""
        return self.path / "config.json"

    @property
    def weights(self) -> Path:
        """The teacher's backbone."""
        return self.path / "model.safetensors"

    @property
    def trained_on(self) -> Path:
        """Scans and patients that the backbone has been trained on."""
        return self.path / _TRAINED_ON


@dataclass(frozen=True)
class JobFolder:
    """Paths of one submission to SLURM.

    Args:
        path: RUN/jobs/<time>.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved config of the job."""
        return self.path / "config.yaml"

    @property
    def submission(self) -> Path:
        """Job id, time and number of steps."""
        return self.path / "submission.json"

    @property
    def events(self) -> Path:
        """Starts and ends of the job, one JSON object per line."""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """Output of a run of `tapct sweep`; jobs of SLURM have one log per rank."""
        return self.path / "log.txt"

    @property
    def places(self) -> Path:
        """Job folder of each run of a sweep, one per line."""
        return self.path / "places"


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder; nothing is read or made.

    Args:
        path: the folder, `out` of the config.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved config."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Command, versions, git revision, machine and data."""
        return self.path / "run.json"

    @property
    def lease(self) -> Path:
        """Process that writes the folder; see `base/lease.py`."""
        return self.path / "lease.json"

    @property
    def submitting(self) -> Path:
        """While a job is submitted: which process does it."""
        return self.jobs / ".submitting"

    @property
    def trained_on(self) -> Path:
        """Scans and patients that the run has been trained on."""
        return self.path / _TRAINED_ON

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """Page of `tapct report`."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Folder of Weights & Biases."""
        return self.path / "wandb"

    @property
    def wandb_run_id(self) -> Path:
        """Identity of the run at Weights & Biases, kept over restarts."""
        return self.wandb / "tapct_run_id"

    @property
    def checkpoints(self) -> CheckpointsFolder:
        """The checkpoints."""
        return CheckpointsFolder(self.path / "checkpoints")

    @property
    def evaluations(self) -> Path:
        """Parent of the evaluations."""
        return self.path / "eval"

    def evaluation(self, dataset: str, step: int) -> EvaluationFolder:
        """The evaluation of a step on a data set, whether or not it exists."""
        return EvaluationFolder(self.evaluations / dataset / step_name(step))

    def evaluations_of_steps(self) -> Iterator[tuple[str, EvaluationFolder]]:
        """Folders of evaluations that exist, each with the name of its data set; the name is empty
        for folders of earlier versions, which did not record it.
        """
        # [!.]: a hidden folder is of a process that makes the link, and may vanish meanwhile
        for path in sorted(filter(has_step_name, self.evaluations.glob("[!.]*/step_*"))):
            of_earlier = path.parent.name == _EARLIER_STEPS
            yield "" if of_earlier else path.parent.name, EvaluationFolder(path)

    @property
    def features(self) -> Path:
        """Cache of the features that evaluations computed."""
        return features_beside(self.evaluations)

    @property
    def best(self) -> Path:
        """The best step by one headline, and the value of every step."""
        return self.evaluations / "best.json"

    @property
    def newest_results(self) -> Path:
        """Link to the newest results on the run's own data set."""
        return self.evaluations / EvaluationFolder(self.evaluations).results.name

    @property
    def earlier_evaluation(self) -> EvaluationFolder:
        """Where earlier versions wrote the newest evaluation, whatever its data set."""
        return EvaluationFolder(self.evaluations)

    @property
    def export(self) -> ExportFolder:
        """The exported teacher."""
        return ExportFolder(self.path / "export")

    @property
    def export_evaluations(self) -> Path:
        """Parent of the evaluations of the exported teacher."""
        return self.path / evaluations_beside(self.export.path).name

    @property
    def jobs(self) -> Path:
        """Parent of the submissions to SLURM."""
        return self.path / "jobs"

    def submissions(self) -> list[JobFolder]:
        """Submissions that wrote their submission.json, in order of name, that is of time."""
        names = sorted(self.jobs.glob(f"*/{JobFolder(Path()).submission.name}"))
        return [JobFolder(path.parent) for path in names]

    @property
    def code(self) -> Path:
        """Parent of the copies of tapct that jobs run."""
        return self.path / "code"

    def own_folders(self) -> set[str]:
        """Names of the folders that belong to the run, so that no other run lies in them."""
        return {
            path.name
            for path in (
                self.checkpoints.path,
                self.evaluations,
                self.export.path,
                self.export_evaluations,
                self.jobs,
                self.code,
                self.tensorboard,
                self.wandb,
            )
        }
