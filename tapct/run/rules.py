"""Rules that a config obeys as a whole: what cannot work is refused, what is probably not intended
is warned of.

`tapct train`, `--print-config`, `plan`, `doctor` and `submit` read a config through
`load_run_config`, so all of them accept the same. The rules are not part of `RunConfig` itself,
because the config of a run that an earlier version has trained must stay readable.

A rule is a generator of lines: the first line of `problems` is an error, and the lines of `doubts`
are warnings. Both hold for every stage of a run. Rules about machine and data are in `start`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid
from tapct.config import ConfigError, Resolved, load_config, plugins
from tapct.eval.features.windows import window_starts
from tapct.nn.contracts import Loss, LossInputs
from tapct.run.config import RunConfig
from tapct.run.stages import ResolvedStage
from tapct.ssl import needs
from tapct.ssl.schedules import Schedules, peak_lr
from tapct.ssl.student_teacher import check_heads, check_same_state, snapshot_times
from tapct.types import AIR_HU, HUContract
from tapct.views import masks


def load_run_config(path: Path, overrides: Sequence[str]) -> Resolved:
    """The config of a run that can be started.

    Args:
        path: YAML file, or the name of a config that comes with tapct.
        overrides: arguments `key=value`.
    Raises:
        ConfigError: the config cannot be read, or it breaks a rule.
    """
    resolved = load_config(RunConfig, path, overrides)
    config: RunConfig = resolved.value
    first, *later = config.resolved_stages()
    for stage in (first, *later):
        for line in problems(stage.config):
            raise ConfigError(with_source(stage.with_name(line), resolved))
    losses = needs.build_losses(first.config.losses)
    for stage in later:
        for name, loss in needs.build_losses(stage.config.losses).items():
            check = functools.partial(check_same_state, name, losses[name], loss)
            for line in caught(check):
                raise ConfigError(with_source(stage.with_name(line), resolved))
    return resolved


def warnings(resolved: Resolved) -> list[str]:
    """Lines about settings that work but are probably not intended, each once."""
    config: RunConfig = resolved.value
    stages = config.resolved_stages()
    lines = [with_source(line, resolved) for line in [*doubts(config), *unused(config)]]
    for stage in stages[1:]:
        try:
            new = [
                line for line in doubts(stage.config) if with_source(line, resolved) not in lines
            ]
        except UserError as error:
            raise UserError(stage.with_name(str(error))) from error
        lines += map(stage.with_name, new)
    for before, stage in zip(stages[:-1], stages[1:], strict=True):
        lines += without_change(before, stage)
    return list(dict.fromkeys(lines))


def with_source(line: str, resolved: Resolved) -> str:
    """A line with the places before it where the keys that it names were set."""
    places = []
    for key in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", line):
        place = resolved.sources.get(key, "default")
        if place != "default":
            places.append(place)
    named = ", ".join(dict.fromkeys(places))
    return f"{named}: {line}" if named else line


def problems(config: RunConfig) -> Iterator[str]:
    """Why a config cannot work, one line per rule that it breaks."""
    if not config.losses:
        names = ", ".join(plugins.available("losses"))
        yield f"losses: every term is switched off; keep at least one of {names}"
        return
    if all(getattr(loss.config, "weight", None) == 0 for loss in config.losses):
        key = needs.losses_key(config.losses[0].name)
        yield f"losses: every weight is 0, so nothing is learned; raise one, e.g. {key}.weight"
    losses = needs.build_losses(config.losses)
    yield from caught(lambda: check_heads(losses), lambda: snapshot_times(losses))
    for name, loss in losses.items():
        problem = loss.problem(loss_inputs(config))
        if problem:
            key = needs.losses_key(name)
            yield f"{key} cannot be computed: {problem}, or set {key}=null"
    patch = needs.patch_of(config.model)
    yield from caught(
        lambda: Schedules(config.optim, config.train.steps, config.train.global_batch),
        lambda: config.eval.preprocess.cell(patch, "eval.preprocess"),
    )
    for op in config.views.ops:
        check = getattr(op.config, "check_contract", None)
        if check is not None:
            yield from caught(functools.partial(check, config.contract))
    if config.eval.during.every and not config.eval.tasks:
        yield (
            "eval.during.every asks for evaluations, and eval.tasks has no task; add one, or set "
            "eval.during.every=0"
        )
    yield from problem_of_best(config)


def problem_of_best(config: RunConfig) -> Iterator[str]:
    """A task that shall choose the best checkpoint and is not evaluated."""
    best, names = config.eval.during.best, [task.name for task in config.eval.tasks]
    if best and names and best not in names:
        near = difflib.get_close_matches(best, names, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]}?" if near else ""
        yield (
            f"eval.during.best {best!r} is no task of eval.tasks, which has "
            f"{', '.join(names)}{meant}"
        )


def caught(*checks: Callable[[], object]) -> Iterator[str]:
    """The error lines of checks that raise UserError."""
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)


def loss_inputs(config: RunConfig) -> LossInputs:
    """What the losses are given in training."""
    counts, num_tokens = mask_counts(config)
    return LossInputs(
        num_globals=config.views.num_globals,
        num_locals=config.views.num_locals,
        num_masked=sum(counts),
        all_masked=min(counts) == num_tokens,
        teacher_temp=max(config.optim.teacher_temp),
    )


def mask_counts(config: RunConfig) -> tuple[list[int], int]:
    """Masked patches of every global crop of a step, and the patches of a global crop."""
    z, y, x = patch_grid(
        config.views.global_window, needs.patch_of(config.model), "views.global_window"
    )
    counts = masks.counts(
        config.masks,
        num_crops_global=config.views.num_globals * config.train.global_batch,
        num_tokens=z * y * x,
        seed=config.seed,
        step=0,
    )
    return counts, z * y * x


def doubts(config: RunConfig) -> Iterator[str]:
    """Settings that work but are probably not intended, one line each."""
    losses = needs.build_losses(config.losses)
    for name, loss in losses.items():
        for clause in loss.warnings(loss_inputs(config)):
            yield f"{needs.losses_key(name)}.{clause}"
    yield from doubts_about_contract(config.contract)
    yield from doubts_about_views(config)
    yield from doubts_about_schedules(config)
    yield from beyond_the_run(config, losses)


def doubts_about_contract(contract: HUContract) -> Iterator[str]:
    """An HU window whose mean and standard deviation belong to another one."""
    usual = HUContract()
    window, statistics = (
        (contract.clip_low, contract.clip_high),
        (contract.mean, contract.std),
    )
    half = (contract.clip_high - contract.clip_low) / 2
    has_usual_window = window == (usual.clip_low, usual.clip_high)
    if not has_usual_window and statistics == (usual.mean, usual.std):
        yield (
            f"contract.clip_low {contract.clip_low:g} and contract.clip_high "
            f"{contract.clip_high:g} are another HU window, but contract.mean and contract.std are "
            f"those of the window from {usual.clip_low:g} to {usual.clip_high:g}; set them to the "
            "mean and standard deviation of your voxels in the new window"
        )
    elif contract.std > half:
        yield (
            f"contract.std {contract.std:g} is more than half of the HU window ({half:g}), which "
            "no standard deviation of values in it can be"
        )
    if contract.clip_low < AIR_HU:
        yield (
            f"contract.clip_low {contract.clip_low:g} is below {AIR_HU}, the lowest HU of a stored "
            "scan: padding would be darker than any air"
        )


def doubts_about_views(config: RunConfig) -> Iterator[str]:
    """Views and masks that contradict each other."""
    views = config.views
    if views.num_locals and views.local_area[0] > views.global_area[1]:
        yield (
            f"views.local_area {list(views.local_area)} lies above views.global_area "
            f"{list(views.global_area)}: every local view shows more than every global one"
        )
    if views.blur_sigma[1] == 0 and max(views.blur_p) > 0:
        yield "views.blur_sigma is [0, 0], so views.blur_p has no effect"
    side = min(views.global_window[1:])
    if views.blur_sigma[1] > side and max(views.blur_p) > 0:
        yield (
            f"views.blur_sigma reaches {views.blur_sigma[1]:g} pixels, more than the {side} of a "
            "view (views.global_window): the blurred view is of one colour"
        )
    counts, num_tokens = mask_counts(config)
    if min(counts) == num_tokens:
        yield "masks.ratio and masks.probability mask every patch: the student sees no image"
    if 0 < max(counts) < config.masks.min_tokens:
        yield (
            f"masks.min_tokens {config.masks.min_tokens} is more than the {max(counts)} patches "
            "that masks.ratio masks at most: no block fits, and single rows are masked instead"
        )
    preprocess = config.eval.preprocess
    for axis, size, side in zip("yx", preprocess.size_yx, preprocess.window[1:], strict=True):
        if preprocess.spacing_mm["zyx".index(axis)]:
            continue  # the size is that of each scan
        if 0 < size < side:
            yield (
                f"eval.preprocess.size_yx is {size} along {axis}, less than the {side} of "
                "eval.preprocess.window: every window is filled up with air"
            )
    for axis, number in (("y", 1), ("x", 2)):
        if preprocess.spacing_mm[number]:
            continue
        size, side = preprocess.size_yx[number - 1], preprocess.window[number]
        patch = needs.patch_of(config.model)[number]
        padded = max(-(-size // patch) * patch, side)
        starts = window_starts(padded, side, preprocess.stride[number])
        if size and preprocess.refine[number] > 1 and not any(at % patch for at in starts):
            yield (
                f"eval.preprocess.refine is {preprocess.refine[number]} along {axis}, but all "
                f"windows of {side} voxels in {padded} lie on one grid of patches, so the cells of "
                "a patch are equal; use a smaller window, or 1"
            )


def doubts_about_schedules(config: RunConfig) -> Iterator[str]:
    """Learning rate, weight decay and momentum with which training cannot work as intended."""
    optim, steps = config.optim, config.train.steps
    schedules = Schedules(optim, steps, config.train.global_batch)
    start, end = optim.momentum
    if start == end == 1:
        yield "optim.momentum is [1, 1]: the teacher never changes"
    elif start > end:
        yield (
            f"optim.momentum falls from {start:g} to {end:g}: the teacher changes faster at the "
            "end than at the start"
        )
    peak = peak_lr(optim, config.train.global_batch)
    if peak >= 1:
        yield (
            f"optim.lr gives a peak learning rate of {peak:.3g}; AdamW moves every weight by about "
            "the learning rate in a step, so use less than 1"
        )
    decay = peak * max(optim.weight_decay)
    if decay >= 1:
        yield (
            f"optim.lr times optim.weight_decay reaches {decay:.3g}; from 1 on, weight decay alone "
            "turns the sign of the weights in a step"
        )
    shares = {
        "optim.warmup_share": schedules.warmup_steps,
        "optim.teacher_temp_warmup_share": schedules.teacher_temp_warmup_steps,
    }
    for key, warmup in shares.items():
        if warmup >= steps > 1:
            yield f"{key} fills all {steps} steps of train.steps: the warm-up never ends"
    if optim.freeze_last_layer_steps >= steps:
        yield (
            f"optim.freeze_last_layer_steps {optim.freeze_last_layer_steps} is not less than "
            f"train.steps {steps}: the last layers of the heads are never trained"
        )


def beyond_the_run(config: RunConfig, losses: dict[str, Loss]) -> Iterator[str]:
    """Intervals that are longer than the run."""
    steps = config.train.steps
    intervals = {
        "checkpoint.every": (config.checkpoint.every, "the only checkpoint is that of the end"),
        "checkpoint.keep_every": (config.checkpoint.keep_every, "it keeps no checkpoint"),
        "log.every": (config.log.every, "metrics are written only with a checkpoint"),
        "eval.during.every": (config.eval.during.every, "only the last step is evaluated"),
        "parallel.desync_every": (config.parallel.desync_every, "the check never runs"),
    }
    for key, (interval, effect) in intervals.items():
        if interval > steps:
            yield f"{key} {interval} is more than train.steps {steps}: {effect}"
    for name, loss in losses.items():
        if loss.snapshot is not None and loss.snapshot.start >= steps:
            yield (
                f"{needs.losses_key(name)}.start {loss.snapshot.start} is not less than "
                f"train.steps {steps}: the first snapshot of the teacher is never taken, and the "
                "term stays 0"
            )


def unused(config: RunConfig) -> Iterator[str]:
    """Settings that differ from their default and that no part of this run reads."""
    train, during, loader = config.train, config.eval.during, config.data.loader
    others = {
        "init_allow": train.init_allow,
        "init_window": train.init_window,
        "init_inflate": train.init_inflate != "mean",
    }
    for name, is_set in others.items():
        if is_set and not train.init:
            yield f"train.{name} has no effect without train.init"
    if train.init and train.resume not in ("auto", "must", "never"):
        yield "train.init has no effect: the run starts from the checkpoint of train.resume"
    if train.init and train.resume == "must":
        yield "train.init has no effect with train.resume=must: a run that resumes has its weights"
    if loader.on_error == "raise" and loader.max_skips != type(loader).max_skips:
        yield "data.loader.max_skips has no effect with data.loader.on_error=raise"
    if during.every and during.how == "process" and during.sbatch:
        yield "eval.during.sbatch has no effect with eval.during.how=process"
    if not during.every and (during.sbatch or during.how != "process"):
        yield "eval.during.how and eval.during.sbatch have no effect with eval.during.every=0"
    if not during.every and during.best:
        yield "eval.during.best has no effect with eval.during.every=0: no checkpoint is kept"


def without_change(before: ResolvedStage, stage: ResolvedStage) -> Iterator[str]:
    """Whether a stage has the settings of the one before it."""
    if stage.config == replace(before.config, stages=()):
        yield (
            f"{stage.name}.set changes nothing: the settings from step {stage.start} on are those "
            "before it"
        )
