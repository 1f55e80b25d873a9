"""The command line: one file per group of commands.

Every command imports what it needs inside itself, so that `tapct --help` does not wait for torch.
"""

# Importing a group registers its commands; the order here is the order in `tapct --help`.
from tapct.cli import data, packing, archive  # isort: skip
from tapct.cli import training, cluster, arrays, evaluation, weights  # isort: skip
from tapct.cli.app import main

__all__ = [
    "archive",
    "arrays",
    "cluster",
    "data",
    "evaluation",
    "main",
    "packing",
    "training",
    "weights",
]
