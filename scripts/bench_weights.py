"""Measure load time and memory of every way by which weights come in and go out.

    python scripts/bench_weights.py            # ViT-S: about 22 million parameters
    python scripts/bench_weights.py --dim 768  # ViT-B

Prints a Markdown table. The 3D rows hold the same random weights in the layout of a published 3D
TAP-CT model, the 2D rows those of a DINOv2 with registers. Each number comes from a process of its
own with one thread; seconds are processor time, and the files are in the page cache. Loading ends
when every weight has been read once, because some libraries read a file only when its numbers are
used. Beside each way, plain `torch.load` or `safetensors.load_file` reads the same file; a program
of torch.export and a model of ONNX have no such reader, so the .safetensors file with the same
weights is read.

The largest difference is that of patch tokens and class token to a network that is written out in
tests/foreign_weights.py in float64, on a crop that is smaller than the native window.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from process_memory import reset_peak, resident_mib
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import foreign_weights as foreign  # noqa: E402

# tapct is imported inside functions: a process that loads a folder with transformers must not have
# it, and no import is part of a load time
HEAD = 64  # channels of an attention head
GRID_3D, PATCH_3D, GRID_2D = (3, 28, 28), (4, 8, 8), (37, 37)
CROP_3D, CROP_2D = (1, 8, 64, 48), (1, 1, 56, 70)
FREE = ("d", "h", "w")  # names of the free sizes of exported programs
NAMES = ("last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Way:
    """One way to load weights.

    Args:
        name: for people.
        kind: key of `OPENERS`.
        source: argument of the opener.
        file: file with the weights, whose size is shown.
        plain: file that torch.load or safetensors reads in comparison.
        truth: file with crops and the tokens that belong to them.
        arguments: further arguments of `tapct.load_pretrained`.
    """

    name: str
    kind: str
    source: Path
    file: Path
    plain: Path
    truth: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)


def open_plain(source: Path, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that reads the tensors of a file and does nothing else."""
    from safetensors.torch import load_file

    if source.suffix == ".safetensors":
        return lambda: load_file(source)
    return lambda: torch.load(source, map_location="cpu", weights_only=True)


def open_tapct(source: Path, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    import tapct

    load = tapct.load_pretrained
    return lambda: load(source, **arguments)


def open_transformers(source: Path, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    import transformers
    from transformers import AutoModel

    transformers.logging.disable_progress_bar()
    return lambda: AutoModel.from_pretrained(source, trust_remote_code=True)


def open_program(source: Path, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    from torch.export import load

    return lambda: load(source).module()


def open_onnx(source: Path, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return lambda: onnxruntime.InferenceSession(str(source), options)


OPENERS: dict[str, Callable[[Path, Mapping[str, Any]], Callable[[], Any]]] = {
    "plain": open_plain,
    "tapct": open_tapct,
    "transformers": open_transformers,
    "program": open_program,
    "onnx": open_onnx,
}


def read_all(loaded: Any) -> None:
    """Read every weight once. A session of ONNX Runtime has already done so."""
    if isinstance(loaded, torch.nn.Module):
        loaded = loaded.state_dict()
    if isinstance(loaded, Mapping):
        for value in loaded.values():
            read_all(value)
    elif isinstance(loaded, Tensor):
        loaded.sum()


@torch.no_grad()
def tokens_of(kind: str, model: Any, crops_BZYX: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens and class tokens."""
    crops = crops_BZYX[:, None]
    if kind == "tapct":
        tokens = model(crops)
        return tokens.patches_BND, tokens.cls_BD
    if kind == "onnx":
        patches, cls = model.run(list(NAMES), {"pixel_values": crops.numpy()})
        return torch.from_numpy(patches), torch.from_numpy(cls)
    output = model(pixel_values=crops, return_dict=False)
    return output[0], output[1]


def measure(kind: str, source: Path, arguments: Mapping[str, Any], truth: Any, answer: Any) -> None:
    """In a process of its own: processor seconds of imports and loading, memory, difference.

    Args:
        kind: key of `OPENERS`.
        source: file or folder to load.
        arguments: of `tapct.load_pretrained`.
        truth: file with crops and tokens; None where only tensors are read.
        answer: queue that gets the numbers as JSON.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    load = OPENERS[kind](source, arguments)
    imports_s = time.process_time() - start
    before, start = reset_peak(), time.process_time()
    loaded = load()
    read_all(loaded)
    load_s = time.process_time() - start
    found = {"imports_s": imports_s, "load_s": load_s, "mib": resident_mib("VmHWM") - before}
    if kind == "transformers":
        assert "tapct" not in sys.modules, "a folder for transformers must not need tapct"
    if truth is not None:
        known = torch.load(truth, weights_only=True)
        pairs = zip(tokens_of(kind, loaded, known["crops"]), known["tokens"], strict=True)
        found["difference"] = max(float((one - other).abs().max()) for one, other in pairs)
    answer.put(json.dumps(found))


def measured(
    kind: str, source: Path, arguments: Mapping[str, Any], truth: Path | None, repeats: int
) -> dict[str, float]:
    """The fastest of several `measure` in processes of their own, with the smallest memory."""
    context = multiprocessing.get_context("spawn")
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        answer = context.Queue()
        process = context.Process(target=measure, args=(kind, source, arguments, truth, answer))
        process.start()
        while answer.empty() and process.is_alive():
            time.sleep(0.01)
        process.join(60)
        assert process.exitcode == 0, f"{kind} {source.name} ended with {process.exitcode}"
        runs.append(json.loads(answer.get()))
    return {key: min(run[key] for run in runs) for key in runs[0]}


def write_ways(folder: Path, dim: int, depth: int) -> list[Way]:
    """Write the same weights in all forms."""
    published = foreign.dinov2((1, *PATCH_3D), 3 * 28 * 28, registers=4, dim=dim, depth=depth)
    flat = foreign.dinov2((3, 14, 14), 37 * 37, registers=4, dim=dim, depth=depth)
    truth = folder / "3d.pt"
    write_truth(truth, published, torch.randn(CROP_3D, generator=generator()), GRID_3D)
    return [*ways_3d(folder, published, truth), *ways_2d(folder, flat, dim)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def write_truth(
    path: Path, tensors: Mapping[str, Tensor], crops_BZYX: Tensor, native: tuple[int, ...]
) -> None:
    """Crops, and patch and class tokens from the network that is written out."""
    images = crops_BZYX[:, None]
    if len(native) == 2:
        images = crops_BZYX[:, :1].expand(-1, 3, -1, -1)
    heads = tensors["norm.weight"].numel() // HEAD
    cls_BD, patches_BND = foreign.encode(tensors, images, heads=heads, native=native)
    torch.save({"crops": crops_BZYX, "tokens": (patches_BND, cls_BD)}, path)


def ways_3d(folder: Path, tensors: dict[str, Tensor], truth: Path) -> list[Way]:
    """A published 3D model, and what tapct makes of it."""
    import tapct
    from tapct.run import importing
    from tapct.run_folder import CheckpointFolder, RunFolder
    from tapct.weights.huggingface.folder import save_folder
    from tapct.weights.huggingface.model_card import ModelFacts

    theirs, export, hf = folder / "published", folder / "export", folder / "hf"
    save({f"model.{name}": value for name, value in tensors.items()}, theirs)
    (theirs / "config.json").write_text(json.dumps({"architectures": ["TAPCTModel"]}))
    importing.import_weights(theirs, export)
    loaded = tapct.load_pretrained(export)
    save_folder(hf, loaded.model, loaded.settings, ModelFacts("random weights"))
    run = write_run(folder, theirs, loaded.section.config)
    checkpoint = next(RunFolder(run).checkpoints.path.glob("step_*"))
    teacher = CheckpointFolder(checkpoint).teacher

    def way(name: str, kind: str, source: Path, file: Path, plain: Path | None = None) -> Way:
        return Way(name, kind, source, file, plain or file, truth)

    weights = "model.safetensors"
    ways = [
        way("own run", "tapct", run, teacher),
        way("checkpoint of it", "tapct", checkpoint, teacher),
        way("export of tapct", "tapct", export, export / weights),
        way("published TAP-CT layout", "tapct", theirs, theirs / weights),
        way("`export --hf`, torch and transformers", "transformers", hf, hf / weights),
        way("`export --hf`, tapct", "tapct", hf, hf / weights),
        way("torch.export program", "program", folder / "a.pt2", folder / "a.pt2", hf / weights),
    ]
    write_program(hf, folder / "a.pt2")
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        write_onnx(hf, folder / "a.onnx")
        session = folder / "a.onnx"
        ways.append(way("ONNX Runtime session", "onnx", session, session, hf / weights))
    else:
        print("no row for ONNX: pip install onnx onnxscript onnxruntime\n", file=sys.stderr)
    return ways


def save(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Write model.safetensors into a folder; returns its path."""
    from safetensors.torch import save_file

    folder.mkdir()
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def write_run(folder: Path, source: Path, vit: Any) -> Path:
    """A run of one step that starts from the weights and does not change them: learning rate 0."""
    from tapct.config import load_config
    from tapct.data.index.build import build_manifest
    from tapct.data.packed import pack
    from tapct.data.phantom import archive as phantom
    from tapct.run import pretrain
    from tapct.run.config import RunConfig

    sizes = phantom.Config(num=2, slices=(16, 16), in_plane=(48, 48), dicom_share=0.0, workers=1)
    run, store = folder / "run", folder / "store"
    words = [
        *(f"out={run}", f"data.store={store}", "device=cpu", "log.tensorboard=false"),
        *("data.loader.slab_depth=16", "data.loader.workers=0", "views.num_locals=1"),
        *("views.global_window=[4,16,16]", "views.local_window=[4,8,8]", "views.candidates=1"),
        *(f"model.dim={vit.dim}", f"model.depth={vit.depth}", f"model.heads={vit.heads}"),
        *("model.registers=4", "model.pos_resize=linear", "losses.dino.head.num_prototypes=64"),
        *("train.steps=1", "train.global_batch=2", "train.precision=fp32", "optim.lr=1e-30"),
        *("optim.min_lr=0.0", "optim.momentum=[1.0,1.0]", "optim.freeze_last_layer_steps=0"),
        *("losses.ibot.head.num_prototypes=64", f"train.init={source}"),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        phantom.write(folder / "archive", sizes)
        found = build_manifest(
            folder / "archive",
            folder / "manifest.parquet",
            labels=None,
            patient_regex=None,
            min_depth=1,
            workers=0,
            progress=None,
        )
        pack.pack(found, store, workers=0)
        pretrain.train(load_config(RunConfig, ROOT / "configs" / "tap_s_3d.yaml", words))
    return run


def traced(folder: Path) -> tuple[Any, Tensor, dict[int, Any]]:
    """A model of a folder for transformers, crops to trace it with, and its free sizes."""
    from torch.export import Dim

    model = open_transformers(folder, {})()
    sides = [side * Dim(name, min=2) for side, name in zip(PATCH_3D, FREE, strict=True)]
    crops = torch.zeros(2, 1, *(n * side for n, side in zip((2, 3, 4), PATCH_3D, strict=True)))
    return model, crops, {0: Dim("batch"), **dict(enumerate(sides, 2))}


def write_program(folder: Path, out: Path) -> None:
    model, crops, free = traced(folder)
    inputs = {"pixel_values": crops, "return_dict": False}  # a class of transformers is not saved
    shapes = {"pixel_values": free, "return_dict": None}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), out)


def write_onnx(folder: Path, out: Path) -> None:
    model, crops, free = traced(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model,
            kwargs={"pixel_values": crops, "return_dict": False},
            f=str(out),
            input_names=["pixel_values"],
            output_names=list(NAMES),
            dynamic_shapes={"pixel_values": free, "return_dict": None},
            dynamo=True,
            external_data=False,
        )


def ways_2d(folder: Path, tensors: dict[str, Tensor], dim: int) -> list[Way]:
    """A 2D DINOv2 in the forms of several projects, and as a 3D model."""
    teacher = {f"backbone.{name}": value for name, value in foreign.as_chunks(tensors).items()}
    pth = folder / "dinov2_teacher.pth"
    torch.save({"teacher": teacher, "iteration": 1}, pth)
    timm = save(foreign.as_timm(tensors), folder / "timm")
    hf = save(foreign.as_transformers(tensors), folder / "dinov2_hf")
    facts = {"model_type": "dinov2_with_registers", "image_size": 518}
    facts["num_attention_heads"] = dim // HEAD
    (hf.parent / "config.json").write_text(json.dumps(facts))
    flat, slabs = folder / "2d.pt", folder / "2d_slabs.pt"
    crops = torch.randn(CROP_2D, generator=generator())
    write_truth(flat, tensors, crops, GRID_2D)
    known = torch.load(flat, weights_only=True)
    torch.save({**known, "crops": crops.repeat(1, 4, 1, 1)}, slabs)  # constant along z
    deep = {"settings": ["model.patch=[4,14,14]"], "allow": "inflated"}
    allowed = {"allow": "inflated"}
    return [
        Way("DINOv2 teacher `.pth`", "tapct", pth, pth, pth, flat, allowed),
        Way("the same, inflated to 3D", "tapct", pth, pth, pth, slabs, deep),
        Way("names of timm", "tapct", timm, timm, timm, flat, {"allow": "inflated,missing"}),
        Way("`Dinov2WithRegistersModel`", "tapct", hf.parent, hf, hf, flat, allowed),
    ]


def main() -> None:
    import arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=arguments.positive, default=384, help="channels of a token")
    parser.add_argument("--depth", type=arguments.positive, default=12, help="number of blocks")
    parser.add_argument(
        "--repeats",
        type=arguments.positive,
        default=3,
        help="processes per way; the fastest counts",
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only ways with this in the name"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    options = parser.parse_args()
    if options.dim % HEAD:
        parser.error(f"--dim {options.dim} is no multiple of {HEAD}, the channels of a head")
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.dim} channels, {options.depth} blocks, float32, one thread, {versions}\n")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        ways = write_ways(Path(scratch), options.dim, options.depth)
        names = ", ".join(way.name for way in ways)
        ways = [way for way in ways if any(part in way.name for part in options.only)]
        if not ways:
            parser.error(f"--only {' '.join(options.only)} is in no name of a way: {names}")
        print("| way | file, MiB | imports, s | load, s | × plain read | memory, MiB | "
              "× plain read | largest difference |\n" + "|---" * 8 + "|")  # fmt: skip
        for way in ways:
            plain = measured("plain", way.plain, {}, None, options.repeats)
            found = measured(way.kind, way.source, way.arguments, way.truth, options.repeats)
            size = way.file.stat().st_size / 2**20
            rows.append({"way": way.name, "file_mib": size, "plain": plain, **found})
            print(f"| {way.name} | {size:.0f} | {found['imports_s']:.1f} | {found['load_s']:.2f} | "
                  f"{found['load_s'] / plain['load_s']:.1f} | {found['mib']:.0f} | "
                  f"{found['mib'] / plain['mib']:.1f} | {found['difference']:.1e} |",
                  flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
