"""`tapct index --report` and `tapct report MANIFEST`: one HTML page about an archive, which needs
no other file.

The page names no path, no file and no patient: scans have their IDs. It shows slices of scans, so
only its owner can read it.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.manifest import ACCEPTED, ARCHIVE_FILE, REFUSED, Manifest
from tapct.data.packed import foreground
from tapct.data.packed.foreground import Foreground
from tapct.data.packed.scan_list import patient_numbers
from tapct.data.packed.store import INDEX_NAME, Store
from tapct.data.patients.split import are_below
from tapct.report import archive_pictures
from tapct.report.archive_pictures import ScanPicture
from tapct.report.document import save, static_document
from tapct.report.markup import text
from tapct.types import HUContract

MOST_BARS = 12
EQUAL_WITHIN = 1e-4  # of the value; smaller differences would give bars with equal labels
SPLIT_SHARES = (0.1, 0.2, 0.3)
# columns of text that are shown as bars, and their titles
CATEGORIES = {
    "manufacturer": "Manufacturer",
    "sex": "Sex",
    "kernel": "Kernel",
    "contrast": "Contrast agent",
    "body_part": "Body part",
    "year": "Year of the study",
    "kind": "File format",
}
EXPLAINED = {  # rule that identified the patient -> words
    "header": "PatientID of the header",
    "folder": "folder",
    "column": "table (--patient-column)",
    "regex": "--patient-regex",
    "bids": "BIDS name",
    "side_car": "JSON file beside the scan",
    "study": "DICOM study",
    "guess": "guessed from the file name",
    "kept": "kept from an older manifest",
    "": "unknown",
}


def is_archive(path: Path) -> bool:
    """Whether a path is a manifest, the folder of one or a store, and not a run."""
    names = (INDEX_NAME, ARCHIVE_FILE)
    return path.suffix == ".parquet" or any((path / name).is_file() for name in names)


def open_archive(path: Path) -> tuple[Manifest, Store | None]:
    """The manifest of an archive, and its store where the path is one.

    Raises:
        UserError: there is none, or the manifest of the store is gone.
    """
    is_store = path.name == INDEX_NAME or (path / INDEX_NAME).is_file()
    if not is_store:
        return Manifest.read(path), None
    store = Store(path if path.is_dir() else path.parent)
    manifest = store.manifest()
    if manifest is None:
        raise UserError(
            f"the manifest that {store.path} was packed from is gone or has changed; give a "
            "manifest"
        )
    return manifest, store


def write(
    path: Path,
    out: Path | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the page about an archive, whole or not at all.

    Args:
        path: manifest, folder of one (`tapct index --out FOLDER`), or store.
        out: HTML file to write; None writes a file with the name of the manifest beside it, or
            `archive.html` in the store.
        workers: number of processes that read scans for pictures; 0 reads in this one.
        progress: function that is called with (pictures drawn, pictures in all).
    Raises:
        UserError: the archive cannot be read, or the file cannot be written.
    """
    path = files.expand_path(path)
    manifest, store = open_archive(path)
    assert manifest.file is not None, "a manifest that was read has a file"
    if store is not None:
        name, beside = store.path.resolve().name, store.path / "archive.html"
    else:
        name = path.resolve().name if path.is_dir() else path.resolve().stem
        beside = manifest.file.with_suffix(".html")
    out = out or beside
    files.check_new_file(out)
    rows = archive_pictures.chosen_rows(manifest)
    pictures = archive_pictures.draw(manifest, rows, workers, progress=progress)
    own = None
    if store is not None:
        with contextlib.suppress(foreground.NoForeground):  # a page without this section
            own = foreground.measure(store)
    out.parent.mkdir(parents=True, exist_ok=True)
    return save(page(name, manifest, pictures, own), out, files.PRIVATE)


def page(
    name: str,
    manifest: Manifest,
    pictures: Sequence[ScanPicture] = (),
    own: Foreground | None = None,
) -> str:
    """The HTML of the page.

    Args:
        name: title.
        manifest: manifest.
        pictures: slices of scans.
        own: statistics of the foreground; None where no store was given.
    """
    table = manifest.table()
    accepted = table.filter(pc.equal(table.column("status"), ACCEPTED))
    refused = table.filter(pc.equal(table.column("status"), REFUSED))
    parts = [
        f"<h1>{text(name)}</h1><p class='muted'>What the archive holds, by its manifest. Scans "
        "have their IDs; no path and no patient is named here.</p>",
        tiles(accepted, refused),
        section_of_reasons(manifest, pictures),
        section_of_patients(accepted, refused),
        section_of_distributions(accepted),
        section_of_values(accepted, own),
        f"<footer>digest of the manifest: {manifest.digest}; written by tapct. The slices can show "
        "a person, so protect this page as you protect the scans.</footer>",
    ]
    return static_document(f"{name}: archive", "".join(parts))


def count(number: int) -> str:
    """A count for people."""
    return f"{number:,}".replace(",", "\u2009")


def size_text(num_bytes: int) -> str:
    """A size for people: 3.6 MB, 217 GB."""
    units = ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
    # three digits, 999.5 of a unit are 1 of the next
    limit, unit = next((each for each in units if num_bytes < 999.5 * each[0]), units[-1])
    size = num_bytes / limit
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def tiles(accepted: pa.Table, refused: pa.Table) -> str:
    """The counts at the top."""
    patients = pc.count_distinct(accepted.column("patient")).as_py()
    labelled = pc.sum(pc.not_equal(accepted.column("label_digest"), "")).as_py() or 0
    size = pc.sum(accepted.column("bytes")).as_py() or 0
    shown = {
        "accepted scans": count(len(accepted)),
        "refused scans": count(len(refused)),
        "patients": count(patients),
        "scans with labels": count(int(labelled)),
        "size of the accepted files": size_text(size),
    }
    cells = "".join(f"<div class='tile'><dt>{k}</dt><dd>{v}</dd></div>" for k, v in shown.items())
    return f"<dl class='tiles'>{cells}</dl>"


def bars(rows: Iterable[tuple[str, int]]) -> str:
    """A table of labels, bars and counts."""
    rows = list(rows)
    most = max((number for _, number in rows), default=1) or 1
    cells = []
    for label, number in rows:
        bar = f"<i style='width:{100 * number / most:.1f}%'></i>" if number else ""
        cells.append(
            f"<tr><th>{text(label)}</th><td class='track'>{bar}</td><td class='n'>{count(number)}"
            "</td></tr>"
        )
    return f"<table class='bars'>{''.join(cells)}</table>"


def chart(title: str, content: str, note: str = "") -> str:
    """One chart with its title."""
    below = f"<p class='note'>{text(note)}</p>" if note else ""
    return f"<div class='chart'><h3>{text(title)}</h3>{content}{below}</div>"


def section_of_reasons(manifest: Manifest, pictures: Sequence[ScanPicture]) -> str:
    """Counts by reason, and slices of accepted and refused scans."""
    summary = manifest.summary()
    num_accepted = summary.pop(ACCEPTED)
    counts = [(ACCEPTED, num_accepted), *summary.items()]
    parts = ["<h2>Accepted and refused</h2><div class='reasons'>", bars(counts)]
    if summary:
        parts.append(
            "<p class='note'>The reasons are explained in docs/ingest.md; the manifest has a line "
            "about each scan.</p>"
        )
    parts.append("</div>")
    shown = [one for one in pictures if one.row.status == ACCEPTED and one.png]
    if shown:
        parts.append("<h3>Accepted scans, middle slice, -200 to 300 HU</h3>")
        parts.append(gallery([(one, size_of(one)) for one in shown]))
    refused = [one for one in pictures if one.row.status == REFUSED and one.png]
    if refused:
        parts.append("<h3>Refused scans, middle slice, as stored</h3>")
        parts.append(gallery([(one, one.row.reason) for one in refused]))
    missing = sum(not one.png for one in pictures)
    if missing:
        parts.append(
            f"<p class='note'>{missing} of {len(pictures)} chosen scans cannot be read and have no "
            "picture.</p>"
        )
    return "".join(parts)


def size_of(picture: ScanPicture) -> str:
    """The caption of an accepted scan."""
    row = picture.row
    return (
        f"{row.depth} × {row.height} × {row.width}, {row.spacing_z_mm:.3g} × "
        f"{row.spacing_y_mm:.2g} mm"
    )


def gallery(pictures: Sequence[tuple[ScanPicture, str]]) -> str:
    """Slices with captions."""
    figures = []
    for picture, caption in pictures:
        data = base64.b64encode(picture.png).decode()
        scan = picture.row.id
        figures.append(
            f"<figure><img alt='slice of scan {text(scan)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{text(caption)}<br>{text(scan)}</figcaption></figure>"
        )
    return f"<div class='pictures'>{''.join(figures)}</div>"


def section_of_patients(accepted: pa.Table, refused: pa.Table) -> str:
    """Patients, how they were identified, the split and duplicates."""
    patients = accepted.column("patient").to_pylist()
    per_patient = Counter(Counter(patients).values())
    charts = [
        chart(
            "Scans of a patient",
            bars((str(n), per_patient[n]) for n in sorted(per_patient)[:MOST_BARS]),
            "number of patients by their number of scans",
        )
    ]
    rules = Counter(map(str, accepted.column("patient_from").to_pylist()))
    charts.append(
        chart(
            "How patients were identified",
            bars(
                (EXPLAINED.get(rule or "", str(rule)), number)
                for rule, number in rules.most_common()
            ),
            "guesses need a check: --patient-regex or --patient-column" if rules["guess"] else "",
        )
    )
    duplicates = [one for one in refused.column("duplicate_of").to_pylist() if one]
    rows = [("refused as copies", len(duplicates)), ("scans that have copies", len({*duplicates}))]
    charts.append(chart("Duplicates", bars(rows)))
    return (
        "<h2>Patients</h2>" + split_table(accepted) + f"<div class='charts'>{''.join(charts)}</div>"
    )


def split_table(accepted: pa.Table) -> str:
    """Patients and scans on both sides of the split for some shares."""
    if not len(accepted):
        return ""
    column = accepted.column("patient").combine_chunks()
    numbers = patient_numbers(column).to_numpy()
    rows = []
    for share in SPLIT_SHARES:
        held_out = are_below(numbers, share, 0)
        cells = [len(np.unique(numbers[~held_out])), int((~held_out).sum())]
        cells += [len(np.unique(numbers[held_out])), int(held_out.sum())]
        numbers_of = "".join(f"<td>{count(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th>data.held_out={share:g}</th>{numbers_of}</tr>")
    return (
        "<div class='scroll'><table class='plain'><thead><tr><th>split (data.split_seed=0)</th>"
        "<th>patients for training</th><th>scans for training</th><th>held-out patients</th>"
        f"<th>held-out scans</th></tr></thead>{''.join(rows)}</table></div>"
    )


def section_of_distributions(accepted: pa.Table) -> str:
    """Bars of categories and histograms of numbers of the accepted scans."""
    charts, without_values = [], []
    for column, title in CATEGORIES.items():
        found = category(accepted, column)
        if found is None:
            continue
        counts = Counter(found)
        unknown = counts.pop("", 0)
        if not counts:
            without_values.append(title)
            continue
        shown = counts.most_common(MOST_BARS)
        if column == "year":
            shown = sorted(shown)
        rest = sum(counts.values()) - sum(number for _, number in shown)
        rows = [*shown, *([("others", rest)] if rest else [])]
        if unknown:
            rows.append(("unknown", unknown))
        charts.append(chart(title, bars(rows)))
    for title, unit, measured in measures(accepted):
        if np.isfinite(measured).any():
            charts.append(histogram(title, unit, measured))
        else:
            without_values.append(title)
    note = ""
    if without_values and len(accepted):
        named = ", ".join(without_values).lower()
        note = f"<p class='note'>In no file of the accepted scans: {named}.</p>"
    return f"<h2>Accepted scans</h2><div class='charts'>{''.join(charts)}</div>{note}"


def category(accepted: pa.Table, column: str) -> list[str] | None:
    """The values of a column of text; None where the manifest has no such column."""
    if column == "year":
        return [str(date)[:4] for date in accepted.column("study_date").to_pylist()]
    if column not in accepted.column_names:
        return None
    return [str(value) for value in accepted.column(column).to_pylist()]


def measures(accepted: pa.Table) -> list[tuple[str, str, np.ndarray]]:
    """Title, unit and values of the numbers of the accepted scans."""
    of = {
        name: accepted.column(name).to_numpy().astype(float)
        for name in (
            *("age_years", "depth", "height", "width"),
            *("spacing_z_mm", "spacing_y_mm", "spacing_x_mm"),
        )
    }
    return [
        ("Age", "years", of["age_years"]),
        ("Distance of slices", "mm", of["spacing_z_mm"]),
        ("Size of pixels", "mm", of["spacing_y_mm"]),
        ("Slices", "", of["depth"]),
        ("Extent along the body", "mm", of["depth"] * of["spacing_z_mm"]),
        ("Field of view", "mm", of["width"] * of["spacing_x_mm"]),
    ]


def histogram(title: str, unit: str, values: np.ndarray, num: int = 10) -> str:
    """Bars over equal ranges between round numbers."""
    known = values[np.isfinite(values)]
    note = f"{count(len(values) - len(known))} unknown" if len(known) < len(values) else ""
    heading = f"{title}, {unit}" if unit else title
    if not len(known):
        return chart(heading, "", f"unknown for all {count(len(values))} scans")
    low, high = float(known.min()), float(known.max())
    if high - low <= EQUAL_WITHIN * max(abs(low), abs(high)):  # files round 0.7 mm in many ways
        return chart(heading, bars([(f"{np.median(known):.6g}", len(known))]), note)
    step = round_step((high - low) / num)
    edges = np.arange(math.floor(low / step), math.floor(high / step) + 2) * step
    counts, _ = np.histogram(known, edges)
    rows = [
        (f"{start:.6g} to {end:.6g}", int(number))
        for start, end, number in zip(edges, edges[1:], counts)
    ]
    middle = f"median {np.median(known):.4g}"
    return chart(heading, bars(rows), f"{middle}; {note}" if note else middle)


def round_step(width: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is not below a width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def section_of_values(accepted: pa.Table, own: Foreground | None) -> str:
    """HU percentiles of the scans, and the foreground beside the published contract."""
    published = HUContract()
    rows = [
        (
            "published contract",
            *(published.clip_low, published.clip_high, published.mean, published.std),
        )
    ]
    if own is not None:
        kind = "labels" if own.by_labels else "body"
        rows.append(
            (f"this archive, {kind} of {own.scans} scans", own.low, own.high, own.mean, own.std)
        )
    table = "".join(
        f"<tr><th>{text(name)}</th>{''.join(f'<td>{value:.1f}</td>' for value in values)}</tr>"
        for name, *values in rows
    )
    how = "" if own is not None else (
        "<p class='note'>The foreground of this archive is measured on its store: <code>tapct "
        "report STORE</code>, or <code>tapct contract STORE</code> for a config.</p>"
    )  # fmt: skip
    charts = [
        histogram(f"{title} percentile of the body", "HU", accepted.column(name).to_numpy())
        for name, title in (("hu_p005", "0.5"), ("hu_p50", "50"), ("hu_p995", "99.5"))
    ]
    return (
        "<h2>Values</h2><div class='scroll'><table class='plain'><thead><tr><th>foreground, HU</th>"
        "<th>percentile 0.5</th><th>percentile 99.5</th><th>mean</th><th>std</th></tr></thead>"
        f"{table}</table></div>{how}<p class='note'>Below: one value of each scan, of its voxels "
        f"above -500 HU.</p><div class='charts'>{''.join(charts)}</div>"
    )
