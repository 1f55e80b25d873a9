"""Whether a run may resume from a checkpoint: which keys may differ, which data, and which
checkpoint it is.

| what changed | what happens |
|---|---|
| where and how it runs (`HARMLESS`): out, device, ranks, logging, evaluation ... | resumes |
| what affects training: model, views, losses, ... | refused; `--allow-change` resumes |
| the archive (digest of the store) | refused; `data.on_change=rebase` takes the new one |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapct.base import console
from tapct.base.exits import UserError
from tapct.config import Resolved, from_dict, to_dict
from tapct.config.flat import flatten
from tapct.engine import checkpoint
from tapct.engine.checkpoint import Checkpoints
from tapct.run.old_configs import upgraded
from tapct.run_folder import RunFolder, has_step_name

# Keys that do not affect training: where and how a run works, and not what it computes.
HARMLESS = (
    "out",
    "device",
    "model.attention",
    "data.store",
    "data.on_change",
    "data.cache.",
    "data.loader.workers",
    "data.loader.prefetch",
    "data.loader.on_error",
    "data.loader.max_skips",
    "parallel.",
    "checkpoint.",
    "log.",
    "eval.",
    "train.compile",
    "train.recompute",
    "train.resume",
    "train.save_before_end_s",
)


WORDS = ("auto", "must", "never")


def find_start(
    checkpoints: Checkpoints,
    wanted: str,
    config: Any,
    allow_change: bool,
    say: Callable[[str], object] = console.say,
) -> Path | None:
    """The checkpoint to resume from, or None for a new run; damaged ones are named and skipped.

    Args:
        checkpoints: of the run folder.
        wanted: `auto`, `must`, `never`, or the path of a checkpoint or of another run's folder.
        config: of now, a RunConfig.
        allow_change: whether to resume even though settings that affect training have changed;
            they are logged.
        say: function that prints a line.
    Raises:
        UserError: `must` finds none, `never` finds one, the path is no whole checkpoint, or the
            config does not fit.
    """
    check_wanted(wanted, checkpoints.folder, bool(checkpoints.finished()))
    saved, complaints = checkpoints.newest_whole()
    for complaint in complaints:
        say(complaint)
    if saved is None and complaints:
        raise UserError(
            f"every checkpoint of {checkpoints.folder.parent} is damaged; choose another out= to "
            "start anew"
        )
    if saved is None and wanted not in WORDS:
        saved = named_checkpoint(Path(wanted), say)
    if saved is None:
        if wanted == "must":
            raise UserError(
                f"train.resume=must, but {checkpoints.folder} holds no whole checkpoint"
            )
        return None
    changed = changed_since(saved, config)
    if changed and not allow_change:
        raise UserError(what_changed(changed, saved))
    for key, old, new in changed:
        say(f"--allow-change: {key} was {old} and is {new} from here on")
    return saved


def with_split_of(
    resolved: Resolved, saved: Path, say: Callable[[str], object] = console.say
) -> Resolved:
    """The config of a resumed run, with the rule by which the run began to choose its held-out
    patients.

    Runs of earlier versions began with rule 1. Another rule would train on patients that were held
    out until now.

    Args:
        resolved: config of now, a RunConfig.
        saved: checkpoint to resume from.
        say: function that prints a line.
    """
    config = resolved.value
    version = upgraded(checkpoint.read_meta(saved).config)["data"]["split_version"]
    if version == config.data.split_version:
        return resolved
    if config.data.held_out > 0:
        say(
            f"the run keeps rule {version} for its held-out patients (data.split_version), with "
            "which it began"
        )
    data = replace(config.data, split_version=version)
    return Resolved(
        replace(config, data=data), {**resolved.sources, "data.split_version": "checkpoint"}
    )


def check_resume(
    resolved: Resolved, allow_change: bool, say: Callable[[str], object]
) -> Path | None:
    """The checkpoint that a run which is started now resumes from, before it starts; nothing is
    written.

    Args:
        resolved: config of the run.
        allow_change: whether to resume even though settings that affect training have changed.
        say: function that prints a line, e.g. on a damaged checkpoint that is skipped.
    Raises:
        UserError: as `find_start`.
    """
    config = resolved.value
    checkpoints = Checkpoints(RunFolder(config.out).checkpoints.path, config.checkpoint.keep)
    return find_start(checkpoints, config.train.resume, config, allow_change, say)


def check_archive(saved: Path, digest: str, on_change: str) -> str:
    """Compare the archive that a checkpoint was trained on with the one of now.

    Args:
        saved: checkpoint to resume from.
        digest: digest of the store of now.
        on_change: `data.on_change`.
    Returns:
        A line about another archive that the run continues with; empty for the same one.
    Raises:
        UserError: it is another one, and `data.on_change` refuses it.
    """
    before = checkpoint.read_meta(saved).data_digest
    if before == digest:
        return ""
    line = f"{saved} was trained on another archive (digest {before[:12]}, now {digest[:12]})"
    if on_change == "refuse":
        raise UserError(
            f"{line}; point data.store at the old one, or give data.stores its old names and "
            "weights, set data.on_change=rebase, or start a new run with another out="
        )
    return f"{line}; continuing with the new one"


def check_wanted(wanted: str, checkpoints: Path, has_some: bool) -> None:
    """Raise UserError where `train.resume` names nothing, or forbids the checkpoints of the run.

    Args:
        wanted: `train.resume`.
        checkpoints: folder of the run's checkpoints.
        has_some: whether there are any.
    """
    if wanted not in WORDS and not Path(wanted).exists():
        raise UserError(
            f"train.resume={wanted}: neither one of {', '.join(WORDS)} nor a path that exists"
        )
    if wanted == "never" and has_some:
        raise UserError(
            f"{checkpoints.parent} holds checkpoints and train.resume=never; choose another out= "
            "or remove it"
        )


def named_checkpoint(path: Path, say: Callable[[str], object]) -> Path:
    """A checkpoint by its own path, or the newest whole one of a run folder.

    Args:
        path: checkpoint or run folder.
        say: function that prints a line.
    Raises:
        UserError: there is none, or it is damaged.
    """
    if has_step_name(path) and path.is_dir():
        complaint = checkpoint.damage(path)
        if complaint is not None:
            raise UserError(f"train.resume={path}: it is damaged: {complaint}")
        return path
    saved, complaints = Checkpoints(RunFolder(path).checkpoints.path, keep=1).newest_whole()
    for complaint in complaints:
        say(complaint)
    if saved is None:
        raise UserError(
            f"train.resume={path}: neither a checkpoint nor a run folder with a whole one"
        )
    return saved


def with_new_keys(old: dict[str, Any], cls: type) -> dict[str, Any]:
    """The config of a checkpoint with the defaults of keys that came later, which leave all as it
    was before them, and with renamed keys under their new names.
    """
    try:
        return to_dict(from_dict(cls, upgraded(old), "checkpoint"))
    except UserError:  # a key is gone, or a value is refused now: it is reported unchanged
        return old


def changed_since(saved: Path, config: Any) -> list[tuple[str, Any, Any]]:
    """`changed_keys` of a checkpoint and the config of now, a RunConfig."""
    old = with_new_keys(checkpoint.read_meta(saved).config, type(config))
    changed = changed_keys(old, to_dict(config))
    if old.get("data", {}).get("split_version") == 1:  # `with_split_of` keeps it
        changed = [change for change in changed if change[0] != "data.split_version"]
    return changed


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Leaves that differ between two resolved configs and affect training: (dotted key, old,
    new).
    """
    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [(key, before.get(key), after.get(key)) for key in keys if not key.startswith(HARMLESS)]


def shown(value: Any) -> Any:
    """A value in an error line; an empty text would be invisible."""
    return "empty" if value == "" else value


def what_changed(changed: list[tuple[str, Any, Any]], saved: Path) -> str:
    """The line that refuses to resume from a checkpoint, with every key that differs."""
    (key, old, new), *others = changed
    named, beyond = (
        [other for other, _, _ in others[:8]],
        "" if len(others) <= 8 else f" and {len(others) - 8} more",
    )
    more = f" (also changed: {', '.join(named)}{beyond})" if others else ""
    return (
        f"{key} was {shown(old)} when {saved} was written and is {shown(new)} now{more}; settings "
        "that affect training cannot change on resume. Restore it, choose another out=, or pass "
        "--allow-change"
    )
