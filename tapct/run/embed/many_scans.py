"""`tapct embed`: the features of many scans, one after the other.

A second call computes only what is missing, and what belongs to a scan or mask that has changed.
What is written, and how, is the work of an `Output`; see `outputs.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tapct.base import console
from tapct.base.counted import counted
from tapct.base.exits import Incomplete, single_line
from tapct.data.readers.raw import is_out_of_memory
from tapct.data.scans.ingest import OUT_OF_MEMORY, read_source
from tapct.eval.cache import Config as CacheConfig
from tapct.eval.cache import FeatureCache, model_key
from tapct.run.embed.named_scans import NamedScan, NamedScans
from tapct.run.embed.one_scan import ScanEncoder
from tapct.run.embed.outputs import (
    CVPR26,
    NPZ,
    PARQUET,
    ZARR,
    ChallengeFiles,
    NpzFiles,
    Output,
    ZarrFolders,
    load_h5py,
)
from tapct.run.embed.outputs import check_writable as check_writable
from tapct.run.embed.scan_vector import VectorChoice
from tapct.run.embed.vector_table import VectorTable
from tapct.run.embed.zarr_features import load_zarr
from tapct.types import Refused
from tapct.weights.pretrained import Pretrained

MOST_NAMES = 12


def encoder_of(
    pretrained: Pretrained, device: torch.device, cache: Path | None = None
) -> ScanEncoder:
    """The model of an export, ready to compute features.

    Args:
        pretrained: model on `device`.
        device: device of the model.
        cache: folder of a feature cache; None for none.
    """
    key = model_key(pretrained.model, pretrained.contract, pretrained.preprocess, device)
    return ScanEncoder(
        pretrained.model,
        key,
        pretrained.contract,
        pretrained.preprocess,
        device,
        None if cache is None else FeatureCache(cache, CacheConfig().quota_gb),
    )


def check_library(form: str) -> None:
    """Raise UserError where the library of a format is not installed."""
    if form == CVPR26:
        load_h5py()
    elif form == ZARR:
        load_zarr()


def output_for(
    form: str, out: Path, encoder: ScanEncoder, wanted: VectorChoice | None, share: int = 0
) -> Output:
    """The output of a format.

    Args:
        form: one of `outputs.FORMATS`.
        out: folder to write.
        encoder: model.
        wanted: vector; None for dense features.
        share: number of this call, from 1, among several that share the scans and the folder; 0
            where there is one call.
    """
    if form == PARQUET:
        return VectorTable(out, encoder, wanted, share)
    if form == ZARR:
        return ZarrFolders(out, encoder, wanted)
    if form == CVPR26:
        return ChallengeFiles(out, encoder, wanted)
    assert form == NPZ, form
    return NpzFiles(out, encoder, wanted)


def embed_cases(encoder: ScanEncoder, cases: NamedScans, output: Output, out: Path) -> int:
    """Write the result of every scan; a scan that cannot be used is named, and the others are
    written.

    Args:
        encoder: model.
        cases: scans.
        output: where the results go.
        out: folder of the results, for what is printed.
    Returns:
        Number of results of these scans.
    Raises:
        Incomplete: some scans have no result.
        UserError: nothing can be written, or `out` holds results of another model or kind.
    """
    problems = dict.fromkeys(cases.missing, "no scan has this name")
    num = len(cases.found) + len(cases.missing)
    with output:
        todo = [case for case in cases.found if not output.is_done(case)]
        num_done = len(cases.found) - len(todo)
        if num_done:
            console.say(f"{counted(num_done, output.what)} in {out} from an earlier call")
        try:
            with console.progress_bar("embed", "scan") as progress, encoder.using_cache():
                for number, case in enumerate(todo, 1):
                    problem = _embed(case, output)
                    if problem:
                        problems[case.id] = problem
                    progress(number, len(todo))
                    num_done += 1
        except KeyboardInterrupt:
            console.say(
                f"{num_done} of {counted(num, 'scan')} are done; repeat the command to compute the "
                "others"
            )
            raise
        output.finish()
    for name, problem in problems.items():
        console.say_line(f"no {output.what} of {name}: {single_line(problem)}")
    if problems:
        raise Incomplete(_missing_line(problems, num, output.what, out))
    return len(cases.found)


def _embed(case: NamedScan, output: Output) -> str:
    """Compute and write the result of one scan; returns why there is none."""
    stamp = case.stamp()
    try:
        output.add(case, read_source(case.source), stamp)
        return ""
    except Refused as error:
        problem = f"{error.reason}: {error.detail}"
    except (MemoryError, RuntimeError) as error:
        if not (is_out_of_memory(error) or isinstance(error, torch.OutOfMemoryError)):
            raise
        problem = f"{OUT_OF_MEMORY}: {single_line(error, 200)}"
    output.remove(case)  # the result of an earlier version of its scan
    return problem


def _missing_line(problems: dict[str, str], num: int, what: str, out: Path) -> str:
    names = ", ".join(list(problems)[:MOST_NAMES])
    more = len(problems) - MOST_NAMES
    ending = f" and {more} more" if more > 0 else ""
    verb = "has" if len(problems) == 1 else "have"
    return (
        f"{len(problems)} of {counted(num, 'scan')} {verb} no {what} in {out} ({names}{ending}); "
        "the lines above give the reasons; mend them and repeat the command, which computes the "
        "rest"
    )
