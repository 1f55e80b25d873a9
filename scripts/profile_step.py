"""Processor time of one training step by operation and by shape, on one thread of a CPU.

    OMP_NUM_THREADS=1 python scripts/profile_step.py configs/bench_vit432.yaml train.precision=bf16

The scans are synthetic, as in scripts/bench_step.py. Processor time is measured around every
operation that autograd or a module calls, forward and backward: unlike the times of
torch.profiler, it does not count the time in which other jobs had the CPU. Two steps run first; the
first line has the fastest of two more steps without the profile.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arguments
import bench_step
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tapct import config as configs
from tapct.base import exits
from tapct.distributed.device import prepare_cpu
from tapct.run.config import RunConfig


class Times(TorchDispatchMode):
    """Adds up the processor time and the number of calls of operations.

    Attributes:
        seconds, calls: by name of the operation, and by its name and shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.calls: Counter[tuple[str, ...]] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and add its time."""
        began = time.thread_time()
        found = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - began
        for key in ((str(func),), (str(func), shapes_of(args))):
            self.seconds[key] += seconds
            self.calls[key] += 1
        return found


def shapes_of(args: Sequence[Any]) -> str:
    """Shape and dtype of each tensor; `*` marks one that is not contiguous."""
    words = []
    for each in args:
        if isinstance(each, Tensor):
            star = "" if each.is_contiguous() else "*"
            words.append(f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}{star}")
    return ", ".join(words)


def main() -> None:
    """Print the operations that take longest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="config of the step")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    parser.add_argument(
        "--rows", type=arguments.positive, default=30, help="rows of a table, default %(default)s"
    )
    options = parser.parse_intermixed_args()
    prepare_cpu()
    torch.set_num_threads(1)
    config = configs.load_config(RunConfig, options.config, options.overrides).value
    trainer = bench_step.trainer_of(config, torch.device("cpu"), [])
    trainer.pair.train()
    feed = bench_step.batches(config, 256)
    steps = []
    for step in range(4):
        began = time.process_time()
        trainer.optimizer_step(step, feed)
        trainer.flush()
        steps.append(time.process_time() - began)
    with Times() as times:
        trainer.optimizer_step(4, feed)
    total = sum(times.seconds.values()) / 2  # every call counts once by name and once by shape
    print(f"a step {min(steps[2:]):.2f} s, operations {total:.2f} s")
    for length in (1, 2):
        keys = [key for key in times.seconds if len(key) == length]
        keys.sort(key=lambda key: -times.seconds[key])
        for key in keys[: options.rows]:
            seconds = times.seconds[key]
            print(
                f"{seconds * 1e3:9.1f} ms {seconds / total:6.1%} {times.calls[key]:6d}  "
                f"{'  '.join(key)}"
            )
        print()


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
