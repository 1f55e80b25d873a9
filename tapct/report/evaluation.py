"""The part of the page that shows what the frozen features are worth: Dice tables, overlays, PCA
pictures.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tapct.report.plots import number, text

PICTURE_BYTES = 1_700_000  # all pictures together, so that the page stays below 3 MB
MOST_PICTURES = 24
OPEN_ORGANS = 20  # a longer organ table starts folded
MODEL_WORDS = {
    "pretrained": "pretrained, frozen",
    "untrained": "untrained, frozen",
    "untrained_layerscale1": "untrained, LayerScale 1",
    "raw_hu": "raw HU patches",
}
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def finite(value: object) -> float:
    """A number, or NaN for null and whatever is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def mean(values: Sequence[float]) -> float:
    """Mean of what is finite; NaN when nothing is."""
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def dice(value: float) -> str:
    """Dice with three decimals, or a dash."""
    return f"{value:.3f}" if math.isfinite(value) else "\u2013"


def gain(results: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """Pretrained mean Dice, its lead over the best baseline and that baseline's name; None without
    both.
    """
    means = {
        name: finite(found.get("mean_dice")) for name, found in results.get("models", {}).items()
    }
    own = means.pop("pretrained", math.nan)
    rivals = {name: value for name, value in means.items() if math.isfinite(value)}
    if not math.isfinite(own) or not rivals:
        return None
    best = max(rivals, key=lambda name: rivals[name])
    return own, own - rivals[best], MODEL_WORDS.get(best, best)


def signed(value: float) -> str:
    """A difference of Dice with its sign, coloured."""
    if not math.isfinite(value):
        return "\u2013"
    sign, look = ("+", "up") if value >= 0 else ("\u2212", "down")
    return f'<span class="{look}">{sign}{abs(value):.3f}</span>'


def models_table(results: Mapping[str, Any]) -> str:
    """Mean Dice of every model as a bar, with one tick per test scan."""
    rows = []
    for name, found in results["models"].items():
        score = finite(found.get("mean_dice"))
        scans = [
            mean([finite(v) for v in one.values()]) for one in found.get("per_scan", {}).values()
        ]
        scan_marks = "".join(
            f'<i style="left:{100 * v:.1f}%"></i>' for v in scans if math.isfinite(v)
        )
        width = 100 * score if math.isfinite(score) else 0.0
        first = ' class="first"' if name == "pretrained" else ""
        rows.append(
            f"<tr{first}><th>{text(MODEL_WORDS.get(name, name.replace('_', ' ')))}</th>"
            '<td class="track"><div><span '
            f'style="width:{width:.1f}%"></span>{scan_marks}</div></td>'
            f'<td class="n">{dice(score)}</td></tr>'
        )
    what = "<th>mean Dice, 0 to 1; a tick is one test scan</th>"
    head = f'<thead><tr><th>model</th>{what}<th class="n">mean</th></tr></thead>'
    return (
        '<div class="scroll"><table '
        f'class="models">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def organs_table(results: Mapping[str, Any]) -> str:
    """Dice of every organ and model, and the pretrained model's lead over the best other one."""
    models: Mapping[str, Any] = results["models"]
    organs = results.get("organs") or list(
        dict.fromkeys(o for found in models.values() for o in found.get("dice", {}))
    )
    rows = []
    for organ in organs:
        scores = {name: finite(found.get("dice", {}).get(organ)) for name, found in models.items()}
        known = [value for value in scores.values() if math.isfinite(value)]
        cells = []
        for value in scores.values():
            best = ' class="n best"' if known and value == max(known) else ' class="n"'
            width = f' style="--v:{100 * value:.1f}%"' if math.isfinite(value) else ""
            cells.append(f"<td{best}{width}>{dice(value)}</td>")
        rivals = [v for name, v in scores.items() if name != "pretrained" and math.isfinite(v)]
        lead = scores.get("pretrained", math.nan) - max(rivals) if rivals else math.nan
        rows.append(
            f"<tr><th>{text(str(organ).replace('_', ' '))}</th>{''.join(cells)}<td "
            f'class="n">{signed(lead)}</td></tr>'
        )
    heads = "".join(
        f'<th class="n">{text(MODEL_WORDS.get(n, n.replace("_", " ")))}</th>' for n in models
    )
    table = (
        f'<div class="scroll"><table class="organs"><thead><tr><th>organ</th>{heads}<th '
        'class="n">lead over best '
        f"baseline</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    is_open = " open" if len(organs) <= OPEN_ORGANS else ""
    return (
        f"<details{is_open}><summary>Dice of each of {len(organs)} "
        f"organs</summary>{table}</details>"
    )


def split_words(results: Mapping[str, Any]) -> str:
    """How the scans were split and where Dice was counted, in sentences."""
    split = results.get("split", {})
    train, test, mode = len(split.get("train", ())), len(split.get("test", ())), split.get("mode")
    by = f", split by {text(mode)}" if mode else ""
    note = f" <b>{text(split['note'])}.</b>" if split.get("note") else ""
    grid = (
        f" Dice is counted at {text(results['resolution'])} resolution."
        if results.get("resolution")
        else ""
    )
    return f"The decoder was fitted on {train} scans and judged on {test}{by}.{note}{grid}"


def encode(path: Path, budget: int) -> tuple[bytes, str]:
    """A picture's bytes and type; re-encoded, then made smaller, if it is larger than its budget in
    bytes.
    """
    data = path.read_bytes()
    if len(data) <= budget:
        return data, MIME[path.suffix.lower()]
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    for _ in range(6):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=88, method=4)
        if buffer.tell() <= budget:
            break
        picture = picture.resize(
            (max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)),
            Image.Resampling.LANCZOS,
        )
    return buffer.getvalue(), "image/webp"


def pictures(
    folder: Path, entries: Sequence[Mapping[str, Any]], fallback: str, share: float
) -> str:
    """Pictures inside the page, with captions.

    Args:
        folder: where `file` of each entry starts; a file outside it is not shown.
        entries: objects with `file`, and maybe `caption` and `scan`.
        fallback: caption of a picture that has none.
        share: part of `PICTURE_BYTES` that these pictures may take.
    """
    shown = entries[:MOST_PICTURES]
    budget = int(share * PICTURE_BYTES * 0.73 / max(1, len(shown)))  # base64 takes 4/3 of the bytes
    parts = []
    for entry in shown:
        path = (folder / str(entry.get("file", ""))).resolve()
        words = text(entry.get("caption") or fallback)
        scan = str(entry.get("scan", ""))
        caption = words if not scan or scan in words else f"{words} Scan {text(scan)}."
        inside = path.is_relative_to(folder.resolve()) and path.suffix.lower() in MIME
        if not inside or not path.is_file():
            parts.append(
                f'<p class="missing">picture {text(entry.get("file", "without a name"))} is not '
                "there</p>"
            )
            continue
        data, mime = encode(path, budget)
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        parts.append(
            f'<figure><img alt="{caption}" '
            f'src="{source}"><figcaption>{caption}</figcaption></figure>'
        )
    more = len(entries) - len(shown)
    rest = f'<p class="muted">{more} more in {text(folder.name)}/</p>' if more > 0 else ""
    return f'<div class="pictures">{"".join(parts)}</div>{rest}'


def evaluation(folder: Path, results: Mapping[str, Any], why_not: str, command: str) -> str:
    """The whole part.

    Args:
        folder: the run's eval folder.
        results: eval/results.json, maybe empty.
        why_not: why it is empty.
        command: what makes it.
    """
    if not results.get("models"):
        reason = text(why_not or "no model was judged")
        return (
            f'<p class="missing">No evaluation yet ({reason}). <code>{text(command)}</code> '
            "makes it.</p>"
        )
    parts = [
        f"<p>{split_words(results)} A linear decoder reads frozen features; everything but the "
        "backbone is equal.</p>"
    ]
    parts.append(f'<div class="two">{models_table(results)}{organs_table(results)}</div>')
    both = bool(results.get("overlays")) and bool(results.get("pca"))
    if results.get("overlays"):
        words = "CT, reference labels and prediction of the linear decoder."
        parts.append(
            f"<h3>Segmentation</h3>{pictures(folder, results['overlays'], words, 0.6 if both else 1.0)}"
        )
    if results.get("pca"):
        words = (
            "CT and its patch features: the first three principal components as red, green "
            "and blue."
        )
        parts.append(
            f"<h3>Patch features</h3>{pictures(folder, results['pca'], words, 0.4 if both else 1.0)}"
        )
    if finite(results.get("seconds")) > 0:
        parts.append(
            f'<p class="muted">The evaluation took {number(finite(results["seconds"]), 3)} s.</p>'
        )
    return "".join(parts)
