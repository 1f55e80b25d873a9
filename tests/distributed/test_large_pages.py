"""A process that trains or evaluates asks Linux for large pages for its large tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Whether the memory of a large tensor is marked for large pages ("hg" in smaps), after the imports
# of a training.
CODE = """
import pathlib
import torch
from tapct.distributed.device import prepare_cpu
from tapct.run import pretrain

prepare_cpu()
large = torch.ones(1 << 24)
address, inside, flags = large.data_ptr(), False, []
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        start, end = (int(number, 16) for number in first.split("-"))
        inside = start <= address < end
    elif inside and first == "VmFlags:":
        flags = line.split()
print("hg" in flags)
"""


def asks(**variables: str) -> bool:
    """Whether a new process asks; not a forked one, where torch has read the variable already."""
    environment = {
        name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"
    }
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return ended.stdout.split()[-1] == "True"


@pytest.mark.skipif(
    not OFFERED.is_file() or "[never]" in OFFERED.read_text(), reason="Linux offers no large pages"
)
def test_large_tensors_ask_for_large_pages_if_the_user_does_not_refuse() -> None:
    assert asks()
    assert not asks(THP_MEM_ALLOC_ENABLE="0")
