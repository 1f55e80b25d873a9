"""Pictures of an evaluation inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tapct.eval.results.json_file import Picture
from tapct.report.markup import text

PICTURE_BYTES = 1_700_000  # all pictures of a page together
MOST_PICTURES = 24
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def encode(path: Path, budget: int) -> tuple[bytes, str]:
    """Bytes and type of a picture; re-encoded, then made smaller, if it is above its budget.

    Args:
        path: picture file.
        budget: most bytes.
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


def pictures(folder: Path, entries: Sequence[Picture], share: float) -> str:
    """Pictures inside the page, with captions.

    Args:
        folder: folder that `file` of each entry is relative to; a file outside it is not shown.
        entries: pictures to show.
        share: part of `PICTURE_BYTES` that these pictures may take.
    """
    first = entries[:MOST_PICTURES]
    budget = int(share * PICTURE_BYTES * 0.73 / max(1, len(first)))  # base64 takes 4/3 of the bytes
    parts = []
    for entry in first:
        path = (folder / entry.file).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.suffix.lower() in MIME
        if not inside or not path.is_file():
            missing = text(entry.file or "without a name")
            parts.append(f'<p class="missing">picture {missing} is not there</p>')
            continue
        caption = text(entry.caption)
        if entry.scan and entry.scan not in entry.caption:
            caption = f"{caption.rstrip('.')}. Scan {text(entry.scan)}.".removeprefix(". ")
        data, mime = encode(path, budget)
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        parts.append(
            f'<figure><img alt="{caption}" src="{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    more = len(entries) - len(first)
    rest = f'<p class="muted">{more} more in {text(folder.name)}/</p>' if more > 0 else ""
    return f'<div class="pictures">{"".join(parts)}</div>{rest}'
