"""Time of the backward pass of attention in bf16 on a CPU: torch's kernel, and in blocks.

    OMP_NUM_THREADS=1 python scripts/bench_attention.py
    OMP_NUM_THREADS=1 python scripts/bench_attention.py --shape 2 6 1733 72 --repeats 20

The two take turns, so that other load on the machine affects both alike. Times are processor times,
the fastest of some calls, next to bf16 matrix products (2048 cubed). Errors are those of the
gradients of queries, keys and values against attention written out in float64: the norm of the
difference divided by the norm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import arguments
import torch
from torch import Tensor

from tapct.base import exits
from tapct.distributed.device import prepare_cpu
from tapct.nn import attention_blocks

SHAPES = [(2, 6, 1733, 72), (1, 6, 2357, 64), (4, 6, 785, 64), (8, 6, 400, 64)]


def fastest(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Processor seconds of the fastest call of each run; the runs take turns."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return best


def relative_errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Norm of the difference divided by the norm, of each gradient."""
    pairs = zip(found, exact, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, object]:
    """Times and errors for crops, heads, tokens and channels of a head."""
    crops, heads, tokens, channels = shape
    q, k, v, dout = (
        torch.randn(crops, tokens, 4, heads, channels).bfloat16().transpose(1, 3).unbind(2)
    )
    out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    square = torch.randn(2048, 2048).bfloat16()

    def kernel() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, norms, 0.0, False
            )
        )
        return found

    def blocks() -> None:
        attention_blocks.differentiate(dout, q, k, v, out, norms, into)

    runs = {"kernel": kernel, "blocks": blocks, "gemm": lambda: square @ square}
    seconds = fastest(runs, repeats)
    leaves = [x[:1].double().requires_grad_() for x in (q, k, v)]
    shares = (leaves[0] @ leaves[1].mT * channels**-0.5).softmax(-1)
    exact = torch.autograd.grad(shares @ leaves[2], leaves, dout[:1].double())
    return {
        "shape": shape,
        "seconds": seconds,
        "times as fast": seconds["kernel"] / seconds["blocks"],
        "gemm flops per second": 2 * 2048**3 / seconds["gemm"],
        "error of the kernel": relative_errors(tuple(x[:1] for x in kernel()), exact),
        "error of blocks": relative_errors(tuple(x[:1] for x in into), exact),
    }


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        nargs=4,
        type=arguments.positive,
        metavar=("CROPS", "HEADS", "TOKENS", "CHANNELS"),
        help="one shape to measure, default: four shapes",
    )
    parser.add_argument(
        "--repeats", type=arguments.positive, default=5, help="calls, default %(default)s"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()
    prepare_cpu()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, AMX: "
        f"{'yes' if attention_blocks.has_amx() else 'no'}, AVX512-BF16: "
        f"{'yes' if attention_blocks.has_avx512_bf16() else 'no'}"
    )
    found = []
    for shape in [tuple(options.shape)] if options.shape else SHAPES:
        found.append(measure(shape, options.repeats))
        print(json.dumps(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
