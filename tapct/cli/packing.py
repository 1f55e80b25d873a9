"""`tapct pack`: pack a store, verify it and pack damaged scans again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, exits, signals
from tapct.base.counted import counted
from tapct.cli.app import CPUS, Part, Workers, app, examples
from tapct.cli.scan_limits import Memory, Timeout, limits_of

if TYPE_CHECKING:
    from tapct.data.manifest import Manifest
    from tapct.data.packed.pack_report import PackReport


@app.command(
    epilog=examples(
        "tapct pack data/manifest.parquet --out data/store",
        "tapct pack data/manifest.parquet --out data/store --verify --repair",
    )
)
def pack(
    manifest_file: Annotated[
        Path,
        typer.Argument(metavar="MANIFEST", help="manifest written by tapct index, or its folder"),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="folder of the store to write")],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder of the scans, if it has moved since tapct index",
            show_default="where it was, relative to the manifest",
        ),
    ] = None,
    workers: Workers = CPUS,
    timeout: Timeout = 120.0,
    memory_gb: Memory = None,
    level: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="compression level from 1 to 9; 9 gives the smallest files",
            min=1,
            max=9,
        ),
    ] = 1,
    codec: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="zstd, or lz4 for files that are about a fifth larger and faster to read",
        ),
    ] = "zstd",
    tile: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="divide slices into tiles of N by N pixels, for code of your own that reads boxes "
            "(Store.read_box); training reads whole slices, which tiles make slower",
            min=0,
            show_default="whole slices",
        ),
    ] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="pack nothing; read the packed scans again and compare their digests; the exit "
            "code is 2 if a scan is damaged",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="with --verify: pack damaged scans again from the archive"),
    ] = False,
    allow_missing: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="end with exit code 0, not 4, if at most N accepted scans are missing or changed",
            min=0,
        ),
    ] = 0,
    drop_missing: Annotated[
        bool,
        typer.Option(
            "--drop-missing",
            help="remove scans that cannot be packed from the list of the store; without this "
            "option, the store keeps their earlier packed copies",
        ),
    ] = False,
    replace_store: Annotated[
        bool,
        typer.Option(
            "--replace-store", help="let the manifest of another archive replace an existing store"
        ),
    ] = False,
    part: Part = None,
) -> None:
    """Compress the accepted scans into a store for fast reading.

    A second call with the same store packs only the scans that are missing, and those whose packed
    file cannot be opened, for example because it was cut short. If accepted scans cannot be packed,
    because their files are gone or changed, the others are packed and the exit code is 4.
    """
    from tapct.data import manifest
    from tapct.data.index.share import WHOLE, parse_share
    from tapct.data.packed import pack as packer

    if repair and not verify:
        raise exits.UserError("--repair packs again what --verify finds; give both")
    share = parse_share(part)
    if share is not None and verify:
        raise exits.UserError("--part packs a part of the scans; leave out --verify")

    def pack_and_report(again: Collection[str] = ()) -> PackReport:
        with console.progress_bar("pack") as progress:
            report = packer.pack(
                found,
                out,
                workers=max(1, workers),
                level=level,
                codec=codec,
                tile=tile,
                say=console.say_line,
                again=again,
                drop_missing=drop_missing,
                replace_store=replace_store,
                limits=limits_of(timeout, memory_gb),
                progress=progress,
                share=share or WHOLE,
            )
        for line in report.lines():
            console.say_line(line)
        return report

    with signals.leaving_at_sigterm():
        found = manifest.Manifest.read(manifest_file, root)
        if verify and not repair:
            verify_only(found, out, workers, allow_missing)
            return
        report = pack_and_report()
        if repair:
            repair_store(out, workers, pack_and_report)
    missing = report.missing_line(allow_missing)
    if missing:
        raise exits.Incomplete(missing)


def verify_only(manifest: Manifest, folder: Path, workers: int, allow_missing: int) -> None:
    """Verify a store without writing anything.

    Args:
        manifest: manifest that should have been packed.
        folder: folder of the store.
        workers: number of threads.
        allow_missing: number of accepted scans that may be missing.
    Raises:
        UserError: the store is of another manifest, or lacks accepted scans.
        Exit: a scan is damaged; its line has been printed.
    """
    from tapct.data.packed.store import Store
    from tapct.data.packed.verify import check_complete

    damaged = verify_store(folder, workers)
    if damaged:
        raise typer.Exit(exits.WRONG_INPUT)
    check_complete(Store(folder), manifest, allow_missing)


def repair_store(folder: Path, workers: int, pack_again: Callable[[list[str]], object]) -> None:
    """Pack damaged scans again.

    Args:
        folder: folder of the store.
        workers: number of threads.
        pack_again: function that packs the scans with these ids from the archive.
    Raises:
        Exit: scans are damaged still; their lines have been printed.
    """
    from tapct.data.packed.store import Store

    damaged = verify_store(folder, workers)
    if not damaged:
        return
    scans = [Store(folder).scans[i] for i in damaged]
    pack_again([scan.id for scan in scans])
    still_damaged = verify_store(folder, workers)
    by_id = {scan.id for scan in Store(folder).scans}
    lost = [scan.path for scan in scans if scan.id not in by_id]
    lost += [Store(folder).scans[i].path for i in still_damaged]
    if lost:
        console.say_line(f"  not repaired, since they cannot be packed: {', '.join(sorted(lost))}")
        raise typer.Exit(exits.WRONG_INPUT)


def verify_store(folder: Path, workers: int) -> list[int]:
    """Read every scan of a store and print a line per damaged one; their numbers."""
    from tapct.data.packed.store import Store
    from tapct.data.packed.verify import damaged_scans

    store = Store(folder)
    with console.progress_bar("verify") as progress:
        damaged = damaged_scans(store, workers=workers, progress=progress)
    console.say_line(
        f"{len(store) - len(damaged)} of {counted(len(store), 'packed scan')} verified: {folder}"
    )
    for error in damaged.values():
        console.say_line(f"  {error}")
    return list(damaged)
