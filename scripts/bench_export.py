"""Load time, memory and features of an export for transformers, at full size, beside tapct.

    python scripts/bench_export.py --config tap_s_3d

Prints Markdown tables: load times, then one row per input with the largest difference to tapct and
the peak memory of the forward pass above the loaded model. The weights are random; differences and
times do not depend on training. Every row is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from process_memory import reset_peak, resident_mib

from tapct.base.geometry import times
from tapct.config import load_config
from tapct.models import vit
from tapct.run.config import RunConfig
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export
from tapct.weights.huggingface.folder import save_folder
from tapct.weights.huggingface.model_card import ModelFacts
from tapct.weights.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((1, 12, 224, 224), (1, 24, 224, 224), (1, 48, 224, 224), (1, 12, 256, 192))


def write(config_name: str, folder: Path) -> str:
    """Write both exports of a network with random weights; returns its size in words."""
    resolved = load_config(RunConfig, ROOT / "configs" / f"{config_name}.yaml", ["data.store=x"])
    config: RunConfig = resolved.value
    model = vit.build(config.model.config)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # an initial gain of 1e-5 would hide differences
            torch.nn.init.constant_(parameter, 0.5)
    settings = FeatureSettings(config.model, config.contract, config.eval.preprocess)
    save_export(folder / "tapct", model, settings, {})
    save_folder(folder / "hf", model, settings, ModelFacts(config_name))
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"


def load(kind: str, folder: Path) -> Any:
    """The model of one of the two exports."""
    if kind == "tapct":
        return load_pretrained(folder / "tapct")
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder / "hf", trust_remote_code=True)


def measure(kind: str, folder: Path, shape: tuple[int, ...] | None, answer: Any) -> None:
    """In a process of its own: seconds and memory of loading and of one forward pass."""
    torch.set_num_threads(1)
    if kind == "hf":
        import transformers

        transformers.logging.disable_progress_bar()
        from transformers import AutoModel  # noqa: F401, its import is not part of the load time
    before, start = reset_peak(), time.perf_counter()
    model = load(kind, folder)
    found = {"load_s": time.perf_counter() - start, "load_mib": resident_mib("VmHWM") - before}
    if shape is not None:
        crops = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before, start = reset_peak(), time.perf_counter()
        with torch.no_grad():
            if kind == "tapct":
                tokens = model(crops)
                patches, cls = tokens.patches_BND, tokens.cls_BD
            else:
                output = model(crops[:, None])
                patches, cls = output.last_hidden_state, output.pooler_output
        found |= {
            "forward_s": time.perf_counter() - start,
            "forward_mib": resident_mib("VmHWM") - before,
        }
        torch.save((patches, cls), folder / f"{kind}.pt")
    answer.put(json.dumps(found))


def measured(*arguments: Any) -> dict[str, float]:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=measure, args=(*arguments, answer))
    process.start()
    found: dict[str, float] = json.loads(answer.get())
    process.join()
    return found


def main() -> None:
    import arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="tap_s_3d", help="name of a file in configs/")
    parser.add_argument(
        "--inputs", type=arguments.whole, default=len(SHAPES), help="number of inputs"
    )
    options = parser.parse_args()
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write(options.config, folder)
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        print(f"{options.config}, {size}, float32, one thread, {versions}\n")
        print("| export | load, s | memory, MiB |\n|---|---|---|")
        for kind in ("tapct", "hf"):
            found = measured(kind, folder, None)
            print(f"| {kind} | {found['load_s']:.2f} | {found['load_mib']:.0f} |")
        print("\n| input | largest difference | largest value | seconds, tapct | hf | "
              "memory in MiB, tapct | hf |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for shape in SHAPES[: options.inputs]:
            own, theirs = (measured(kind, folder, shape) for kind in ("tapct", "hf"))
            pairs = list(zip(torch.load(folder / "tapct.pt"), torch.load(folder / "hf.pt")))
            worst = max(float((one - other).abs().max()) for one, other in pairs)
            largest = max(float(one.abs().max()) for one, _ in pairs)
            print(f"| {times(shape[1:])} | {worst:.1e} | {largest:.1f} | {own['forward_s']:.1f} | "
                  f"{theirs['forward_s']:.1f} | {own['forward_mib']:.0f} | "
                  f"{theirs['forward_mib']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
