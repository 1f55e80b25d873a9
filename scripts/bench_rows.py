"""Measure how a run starts on an archive of many scans: seconds and memory by stage.

    python scripts/bench_rows.py --rows 1000000
    python scripts/bench_rows.py --rows 10000000 --json bench_rows.json

The list of the store and the manifest are synthetic; the few scans that the first batch shows are
packed for real. Each measurement is a process of its own, as a rank is:

    open       the list of the store, mapped into memory and its checksum compared
    select     data.select over columns of the store and the manifest
    split      data.held_out, and the rows that are trained on
    batch      the first batch of 4 slabs
    sampler    which scan sample 10^12 shows, mean of 1000

Memory is that of the process: its private bytes, and the pages of files that ranks of a machine
share. Next to it, a process reads the manifest with pyarrow alone, and makes a dictionary of each
row; the ratio is its time, for all rows, over that from `open` to the first batch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tapct.base import exits
from tapct.base.files import write_atomically
from tapct.data.loading.slabs import draw_slab
from tapct.data.manifest import Manifest, RowTable, rows_as_table, write_table
from tapct.data.packed.packed_scan import encode
from tapct.data.packed.store import Store, packed_file
from tapct.data.packed.store_index import index_of_columns, write_index
from tapct.run.data_config import DataConfig
from tapct.run.training_data import choose, open_store
from tapct.types import Volume

SHAPE_ZYX, SPACING_MM = (40, 64, 64), (2.0, 0.8, 0.8)
SELECT, HELD_OUT, BATCH, DEPTH = "spacing_z_mm <= 4 and kernel not in ['B70f']", 0.1, 4, 24
MOST_PLAIN = 100_000  # rows that are made dictionaries for the comparison
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def hex_texts(num: int, digits: int, seed: int, of: int | None = None) -> pa.Array:
    """Random texts of hex digits; `of` of them are different."""
    rng = np.random.default_rng(seed)
    letters = _HEX[rng.integers(0, 16, (of or num, digits), dtype=np.uint8)]
    if of is not None:
        letters = letters[rng.integers(0, of, num)]
    offsets = np.arange(0, (num + 1) * digits, digits, dtype=np.int32)
    return pa.StringArray.from_buffers(
        num, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters))
    )


def repeated(value: Any, num: int, kind: pa.DataType) -> pa.Array:
    """A column of one value."""
    return pa.array([value], kind).take(pa.array(np.zeros(num, np.int64)))


def make_archive(folder: Path, num: int) -> None:
    """A manifest and a store of this number of scans, and the packed scans of the first batch."""
    hu_ZYX = np.random.default_rng(0).integers(-1000, 500, SHAPE_ZYX).astype(np.int16)
    volume = Volume(hu_ZYX, SPACING_MM)
    checksum = encode(volume, "any", 1)[1].checksum
    ids, patients = hex_texts(num, 16, 0), hex_texts(num, 32, 1, of=max(1, num // 2))
    kernels = pa.array(["B30f", "B40f", "B70f", ""]).take(
        pa.array(np.random.default_rng(2).integers(0, 4, num))
    )
    empty = rows_as_table(())
    table: dict[str, pa.Array] = {}
    for field in empty.schema:
        value: Any = "" if pa.types.is_string(field.type) else 0
        table[field.name] = repeated([] if pa.types.is_list(field.type) else value, num, field.type)
    table |= {"id": ids, "path": ids, "patient": patients, "kernel": kernels}
    table["status"] = repeated("accepted", num, pa.string())
    table["spacing_z_mm"] = repeated(SPACING_MM[0], num, pa.float64())
    table["digest"] = repeated(checksum, num, pa.string())
    rows = RowTable(pa.table(table, schema=empty.schema))
    manifest = Manifest(rows, folder)
    write_table(manifest, folder / "m.parquet")
    columns: dict[str, Any] = {"id": ids, "patient": patients, "checksum": table["digest"]}
    for name, size in zip(("depth", "height", "width"), SHAPE_ZYX, strict=True):
        columns[name] = repeated(size, num, pa.int32())
    for name, mm in zip(("spacing_z_mm", "spacing_y_mm", "spacing_x_mm"), SPACING_MM, strict=True):
        columns[name] = repeated(mm, num, pa.float64())
    for name, text in (("label_digest", ""), ("label_names", "[]"), ("patient_from", "header")):
        columns[name] = repeated(text, num, pa.string())
    about = {
        "manifest_digest": manifest.digest,
        "manifest_file": "../m.parquet",
        "digest": "0" * 32,
        "summary": {"accepted": num},
        "patient_key": "bench",
    }
    (folder / "store").mkdir()
    write_index(folder / "store", index_of_columns(columns, about))
    store = open_store(config_of(folder))
    assert isinstance(store, Store)
    data = choose(config_of(folder), store, 0)
    for sample in range(BATCH):
        slab = draw_slab(sample, store, 0, DEPTH, rows=data.rows)
        scan_id = store.scans.id(slab.scan)
        file = packed_file(store.path, scan_id)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, encode(volume, scan_id, 1)[0])


def config_of(folder: Path) -> DataConfig:
    """The section `data` of the run."""
    return DataConfig(store=folder / "store", select=SELECT, held_out=HELD_OUT)


def memory() -> tuple[float, float]:
    """Private bytes of this process and shared pages of files, in GB."""
    found = dict(
        re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)
    )
    private = int(found["Anonymous"])
    return private / 1e6, (int(found["Rss"]) - int(found["Anonymous"])) / 1e6


def start_run(folder: Path) -> dict[str, Any]:
    """Seconds and memory of the stages, in this process."""
    from tapct.data.loading import loader  # what a rank imports is not part of the stages

    stages: dict[str, Any] = {}
    began, cpu_began = time.perf_counter(), time.process_time()

    def done(name: str) -> None:
        nonlocal began, cpu_began
        private, shared = memory()
        stages[name] = {
            "seconds": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu_began,
            "private_GB": private,
            "shared_GB": shared,
        }
        began, cpu_began = time.perf_counter(), time.process_time()

    store = open_store(config_of(folder))
    done("open")
    data = choose(config_of(folder), store, 0)
    done("select and split")
    config = loader.Config(slab_depth=DEPTH, workers=0)
    with loader.build(config, store, seed=0, global_batch=BATCH, rows=data.drawn) as batches:
        next(batches)
    done("batch")
    for sample in range(10**12, 10**12 + 1000):
        draw_slab(sample, store, 0, DEPTH, rows=data.rows)
    done("sampler, 1000 samples from 10^12 on")
    stages["rows"] = len(data.rows)
    return stages


def read_plainly(folder: Path, num: int) -> float:
    """Seconds in which pyarrow alone reads the manifest and makes a dictionary of each row; the
    dictionaries of at most `MOST_PLAIN` rows are made, and their time is scaled to all.
    """
    began = time.perf_counter()
    table = pyarrow.parquet.read_table(folder / "m.parquet")
    read = time.perf_counter() - began
    began = time.perf_counter()
    made = len(table.slice(0, MOST_PLAIN).to_pylist())
    return read + (time.perf_counter() - began) * num / made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=arguments.positive, default=1_000_000, help="scans, default %(default)s"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(read_plainly(options.plain, options.rows))
        return
    if options.start:
        print(json.dumps(start_run(options.start)))
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        began = time.perf_counter()
        make_archive(folder, options.rows)
        made = time.perf_counter() - began
        command = [sys.executable, __file__, "--start", text]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(3)]
        plain_command = [sys.executable, __file__, "--plain", text, "--rows", str(options.rows)]
        plain = float(subprocess.check_output(plain_command))
    best = min(runs, key=lambda run: sum(run[name]["seconds"] for name in run if name in STAGES))
    print(f"{options.rows:,} rows, made in {made:.0f} s; {best['rows']:,} are trained on")
    for name, row in best.items():
        if isinstance(row, dict):
            print(
                f"  {name:36} {row['seconds']:7.3f} s  {row['cpu_s']:7.3f} s of a processor  "
                f"{row['private_GB']:5.2f} GB private  {row['shared_GB']:5.2f} GB shared"
            )
    total = sum(best[name]["seconds"] for name in STAGES)
    cpu = sum(best[name]["cpu_s"] for name in STAGES)
    print(f"  {'open to first batch':36} {total:7.3f} s  {cpu:7.3f} s of a processor")
    print(f"  {'pyarrow alone, all rows':36} {plain:7.3f} s: {plain / total:.1f} times as long")
    best |= {"plain_s": plain, "plain_ratio": plain / total}
    if options.json:
        options.json.write_text(json.dumps(best, indent=1) + "\n")


STAGES = ("open", "select and split", "batch")

if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
