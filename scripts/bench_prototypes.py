"""Time and memory of the fused prototype loss, beside plain matrix products.

    python scripts/bench_prototypes.py       # 20,000 rows, 65,536 prototypes, width 256, as TAP-CT
    python scripts/bench_prototypes.py --rows 2000 --device cuda --json out.json

The reference computes only the products that the loss cannot avoid: scores of teacher and student,
gradients of features and prototypes; with Sinkhorn, one more product of teacher scores per
iteration. It works on chunks of rows, with the fastest of several chunk sizes. So the ratio is the
cost of softmaxes, sums and statistics.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.base import exits
from tapct.nn.prototype_loss import prototype_loss
from tapct.nn.prototype_scores import TeacherScores
from tapct.nn.sinkhorn import sinkhorn_bias

ITERATIONS = 3
CHUNKS = (128, 256, 512, 1024)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Shortest time of some runs."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def chain(tensors: tuple[Tensor, ...], chunk: int, extra: int) -> None:
    """Compute only the products.

    Args:
        tensors: student and teacher features, student and teacher prototypes.
        chunk: number of rows at once.
        extra: number of further products of teacher scores.
    """
    student_MW, teacher_MW, student_KW, teacher_KW = tensors
    gradient_KW, gradient_MW = torch.zeros_like(student_KW), torch.empty_like(student_MW)
    memory_CK = student_MW.new_empty(
        min(chunk, len(student_MW)), len(student_KW)
    )  # fresh pages would cost time
    for start in range(0, len(student_MW), chunk):
        rows = slice(start, min(start + chunk, len(student_MW)))
        scores_CK = memory_CK[: rows.stop - start]
        for _ in range(1 + extra):
            torch.mm(teacher_MW[rows], teacher_KW.T, out=scores_CK)
        torch.mm(student_MW[rows], student_KW.T, out=scores_CK)
        torch.mm(scores_CK, student_KW, out=gradient_MW[rows])
        gradient_KW.addmm_(scores_CK.T, student_MW[rows])


def fused(tensors: tuple[Tensor, ...], sinkhorn: bool) -> None:
    """Compute the loss forward and backward."""
    student_MW, teacher_MW, student_KW, teacher_KW = tensors
    student, prototypes = (
        student_MW[None].detach().requires_grad_(),
        student_KW.detach().requires_grad_(),
    )
    teacher = TeacherScores(teacher_MW[None], teacher_KW, 0.05, torch.zeros_like(teacher_KW[:, 0]))
    if sinkhorn:
        bias_K = sinkhorn_bias(teacher, ITERATIONS)
        teacher = TeacherScores(teacher_MW[None], teacher_KW, 0.05, bias_K)
    weight_1M = torch.full_like(student[..., 0], 1 / len(student_MW))
    prototype_loss(student, prototypes, weight_1M, teacher, 0.1, cross=False).value.backward()


def peak_bytes(device: str) -> int:
    """Highest memory so far of this process, or of the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all figures.

    Memory comes first: the peak of a process never falls, and the reference has larger chunks.
    """

    def make(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, options.width, device=options.device), dim=-1)

    tensors = (
        make(options.rows),
        make(options.rows),
        make(options.prototypes),
        make(options.prototypes),
    )
    few = (tensors[0][:8], tensors[1][:8], *tensors[2:])
    fused(few, sinkhorn=False)
    before, memory = peak_bytes(options.device), {}
    found: dict[str, Any] = {
        "rows": options.rows,
        "prototypes": options.prototypes,
        "width": options.width,
    }
    kinds = {"centring": False, "sinkhorn": True}
    for name, sinkhorn in kinds.items():
        fused(tensors, sinkhorn)
        memory[name] = peak_bytes(options.device) - before
    for name, sinkhorn in kinds.items():
        took = seconds(partial(fused, tensors, sinkhorn), options.device, options.repeats)
        extra = ITERATIONS if sinkhorn else 0
        plain = {}
        for chunk in CHUNKS:
            reference = partial(chain, tensors, chunk, extra)
            plain[chunk] = seconds(reference, options.device, options.repeats)
        fastest = min(plain, key=plain.__getitem__)
        flops = (8 + 2 * extra) * options.rows * options.prototypes * options.width
        found[name] = {
            "seconds": took,
            "chain_seconds": plain[fastest],
            "chain_chunk": fastest,
            "ratio": took / plain[fastest],
            "chain_flops_per_second": flops / plain[fastest],
            "extra_peak_bytes": memory[name],
        }
    found["written_out_bytes"] = 3 * 4 * options.rows * options.prototypes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=arguments.positive, default=20_000, help="tokens, default %(default)s"
    )
    parser.add_argument(
        "--prototypes", type=arguments.positive, default=65_536, help="default %(default)s"
    )
    parser.add_argument(
        "--width", type=arguments.positive, default=256, help="of the bottleneck, default 256"
    )
    parser.add_argument(
        "--repeats", type=arguments.positive, default=2, help="runs; the fastest counts, default 2"
    )
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()
    found = measure(options)
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    print(f"{options.rows} rows, {options.prototypes} prototypes, width {options.width}: {where}")
    for name in ("centring", "sinkhorn"):
        one = found[name]
        print(
            f"{name:<9} {one['seconds']:.2f} s, products alone {one['chain_seconds']:.2f} s "
            f"({one['chain_flops_per_second'] / 1e9:.0f} GFLOP/s): {one['ratio']:.2f} times; "
            f"{one['extra_peak_bytes'] / 1e9:.2f} GB more memory at its peak"
        )
    print(
        "three matrices of scores, written out in float32: "
        f"{found['written_out_bytes'] / 1e9:.1f} GB"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
