"""Read the configs of runs that earlier versions of tapct have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapct.data.loading.loader import without_backend
from tapct.eval.results.old_formats import config_with_task_table


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run with its keys as this version has them.

    Args:
        tree: whole config of a run, as read from its config.yaml or checkpoint; a newer one is
            returned unchanged.
    """
    return with_split_version(without_backend(config_with_task_table(tree)))


def with_split_version(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run with `data.split_version`; 1 where it has none, since the run began
    before there was a second rule for the choice of held-out patients.

    Args:
        tree: whole config of a run; a newer one is returned unchanged.
    """
    data = tree.get("data")
    section = dict(data) if isinstance(data, Mapping) else {}
    return {**tree, "data": {"split_version": 1, **section}}
