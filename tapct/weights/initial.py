"""Start a run from weights that exist already (`train.init`): `sources.py` reads them, `fit.py`
brings them to the shapes of the model, and here student and teacher get them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tapct.distributed.collectives import local_part, part_of_full
from tapct.engine import loop
from tapct.nn.contracts import Backbone
from tapct.ssl.student_teacher import StudentTeacher
from tapct.weights import sources
from tapct.weights.fit import Report, Terms, fit


def terms_of(config: loop.Config) -> Terms:
    """What a config allows to be changed in the weights."""
    return Terms(config.init_allow, config.init_inflate)


def check(config: loop.Config, backbone: Backbone) -> None:
    """Compare the weights of `train.init` with a backbone, which may have no values.

    Raises:
        UserError: they do not exist, or do not fit.
    """
    weights = sources.read(sources.locate(Path(config.init)), config.init_window)
    fit(weights, backbone, terms_of(config))


@torch.no_grad()
def apply(file: Path, pair: StudentTeacher, config: loop.Config) -> Report:
    """Put weights into the backbone of student and teacher, sharded or whole; heads keep their
    first values.

    Args:
        file: path from `sources.locate`, read on every rank.
        pair: gets the weights.
        config: settings `train`.
    Raises:
        UserError: the weights do not fit; nothing was changed.
    """
    weights = sources.read(file, config.init_window)
    wanted = pair.student.backbone.state_dict()  # shares memory with the parameters
    report, full = fit(weights, pair.student.backbone, terms_of(config))
    teacher = pair.teacher.backbone.state_dict()
    for name, value in full.items():
        for parameter in (wanted[name], teacher[name]):
            local_part(parameter).copy_(part_of_full(value.to(parameter.dtype), parameter))
    return report
