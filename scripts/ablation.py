"""Measure what each part of the recipe contributes: short runs with one change, several seeds.

    python scripts/ablation.py data/quickstart/store                # all variants, seeds 0 1 2
    python scripts/ablation.py STORE full "no iBOT" --seeds 0 1 --set optim.lr=5e-4

Every run is `tapct train` and `tapct eval` on configs/smoke.yaml, with STEPS steps in one thread.
Finished runs are not repeated. The table gives mean and sample standard deviation over seeds.
"minus untrained" is the Dice minus that of the untrained network of the same seed. It is not the
lead of `tapct compare`, which is the difference to the best of all baselines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arguments

from tapct.base import exits
from tapct.base.exits import UserError
from tapct.base.recent import LAST_STEPS
from tapct.eval.results import saved

CONFIG = Path("configs/smoke.yaml")
LAST = LAST_STEPS  # steps at the end of a run that its numbers are means of
STEPS = 900  # fewer than the recipe has, so that three seeds of all take less than an hour
# steps of small crops; for others, words of one's own for `tapct train` do (docs/training.md)
FIRST = 600
FULL_CROPS = [
    *("views.global_window=[8,64,64]", "views.global_area=[0.15,0.45]"),
    *("views.local_window=[8,32,32]", "views.local_area=[0.04,0.12]"),
]
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no iBOT": ("losses.ibot=null",),
    "no DINO": ("losses.dino=null",),
    "no KoLeo": ("losses.koleo=null",),
    "Sinkhorn": ("losses.dino.targets.kind=sinkhorn", "losses.ibot.targets.kind=sinkhorn"),
    "RoPE": ("model.positions=rope",),
    "RoPE in mm": ("model.positions=rope", "model.rope.coordinates=mm"),
    "learned and RoPE": ("model.positions=both",),
    # 0.56 of the tokens at the same scale: the area goes with the square of the window
    "small crops first": (
        *("views.global_window=[8,48,48]", "views.global_area=[0.084,0.253]"),
        *("views.local_window=[8,24,24]", "views.local_area=[0.0225,0.0675]"),
        "stages=" + json.dumps([{"start": FIRST, "set": FULL_CROPS}]),
    ),
}
MEASURES = {
    "Dice": "dice",
    "minus untrained": "minus_untrained",
    "Dice on patches": "dice_patch",
    "RankMe": "rankme",
    "information DINO": "dino_information",
    "iBOT": "ibot_information",
    "s of training": "seconds",
}


def outcome(out: Path) -> dict[str, float]:
    """Numbers of a whole run; what a variant does not have is NaN."""
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    own = saved.pick(saved.find(out))
    assert own is not None and own.evaluation is not None, f"{out} has been evaluated"
    models = own.evaluation.tasks["segmentation"].results.models
    untrained = max(
        found["mean_dice_voxel"] for name, found in models.items() if name.startswith("untrained")
    )

    def late(key: str) -> float:
        values = [row[f"health/{key}"] for row in rows[-LAST:] if f"health/{key}" in row]
        return statistics.fmean(values) if values else math.nan

    return {
        "dice": models["pretrained"]["mean_dice_voxel"],
        "minus_untrained": models["pretrained"]["mean_dice_voxel"] - untrained,
        "dice_patch": models["pretrained"]["mean_dice_patch"],
        "seconds": sum(row["seconds/step"] for row in rows),
        **{key: late(key) for key in ("rankme", "dino_information", "ibot_information")},
    }


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one run, unless that is done already."""
    out = options.out / f"{variant.replace(' ', '_')}-{seed}"
    words = [
        f"out={out}",
        f"seed={seed}",
        f"data.store={options.store}",
        "eval.num_pictures=0",
        "checkpoint.keep=1",
    ]
    words += [f"train.steps={STEPS}", *options.set, *VARIANTS[variant]]
    tapct = [sys.executable, "-m", "tapct"]
    asked = out / "asked.txt"
    if not (
        saved.pick(saved.find(out)) is not None
        and asked.exists()
        and asked.read_text() == shlex.join(words)
    ):
        out.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (out / "log.txt").open("w") as log:
            for line in (["train", str(CONFIG), *words], ["eval", str(out)]):
                if subprocess.run(
                    [*tapct, *line], env=environment, stdout=log, stderr=log, check=False
                ).returncode:
                    *_, last = (out / "log.txt").read_text().strip().splitlines() or [""]
                    raise UserError(
                        f"{variant}, seed {seed}: {last.removeprefix('error: ')} "
                        f"({out / 'log.txt'})"
                    )
        asked.write_text(shlex.join(words))
    found = {"variant": variant, "seed": seed, **outcome(out)}
    print(
        f"{variant}, seed {seed}: Dice {found['dice']:.3f}, minus untrained "
        f"{found['minus_untrained']:+.3f}",
        flush=True,
    )
    return found


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return "–"
    return f"{statistics.fmean(kept):.3f}" + (
        f" ± {statistics.stdev(kept):.3f}" if len(kept) > 1 else ""
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per variant."""
    lines = [
        "| variant | seeds | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 2) + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [spread([row[key] for row in mine]) for key in MEASURES.values()]
        lines.append(f"| {variant} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "store", type=Path, help="store of phantom scans with labels, as the quickstart makes it"
    )
    parser.add_argument(
        "variants",
        nargs="*",
        metavar="VARIANT",
        help=f"variants to run: {', '.join(VARIANTS)}; default all",
    )
    parser.add_argument(
        "--seeds",
        type=arguments.whole,
        nargs="+",
        default=[0, 1, 2],
        help="random seeds, default 0 1 2",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="overrides for all variants"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablation"),
        help="folder of runs, default %(default)s",
    )
    parser.add_argument(
        "--jobs", type=arguments.positive, default=2, help="runs at the same time, default 2"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures of every run to")
    options = parser.parse_intermixed_args()
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    asked = [(name, seed) for seed in options.seeds for name in options.variants or VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda pair: run(pair[0], pair[1], options), asked))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
