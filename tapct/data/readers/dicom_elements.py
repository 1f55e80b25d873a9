"""Elements of a DICOM header, read from their bytes, and a data set opened once.

Many archives hold values that the standard forbids: numbers with too many digits, whole numbers
with a point, identifiers with letters. pydicom warns of them or raises when such a value is
converted. Here text and numbers are taken from the bytes of the element, and what pydicom must
decode is decoded in silence.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tapct.base.marks import file_name
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.tag import BaseTag

_PREAMBLE = 128  # bytes before the four letters DICM
_UID_ROOT = "1.2.840.10008."  # of every SOP class of the standard


@contextmanager
def quiet() -> Iterator[None]:
    """Read with pydicom so that none of its warnings and log lines reaches the terminal."""
    from pydicom import config

    log = logging.getLogger("pydicom")
    was_disabled = log.disabled
    try:
        log.disabled = True
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = was_disabled


def read_dataset(path: Path, tags: Sequence[str | int] | None) -> Dataset | None:
    """Read a file with pydicom, opening it once.

    A file without preamble is read where its first element looks like one of DICOM and its content
    is that of an image or another object of the standard.

    Args:
        path: path of the file.
        tags: keywords or numbers of the elements to keep, without pixels; None for all.
    Returns:
        The data set; None where the file is not DICOM.
    Raises:
        Refused: `truncated`, a file with preamble that pydicom cannot read to its end.
        Exception: whatever pydicom raises for other damage of a file with preamble.
    """
    with path.open("rb") as file:
        return read_from(file, path, tags)


def read_from(file: BinaryIO, path: Path, tags: Sequence[str | int] | None) -> Dataset | None:
    """`read_dataset` from a file that is open."""
    import pydicom

    start = file.read(_PREAMBLE + 4)
    has_preamble = start[_PREAMBLE:] == b"DICM"
    if not has_preamble and not _starts_like_dicom(start):
        return None
    file.seek(0)
    with quiet():
        try:
            dataset = pydicom.dcmread(
                file,
                force=not has_preamble,
                stop_before_pixels=tags is not None,
                specific_tags=None if tags is None else [_tag(name) for name in tags],
            )
        except EOFError as error:
            raise Refused("truncated", f"{file_name(path)} ends early; copy it again") from error
        except Exception as error:
            if has_preamble or isinstance(error, MemoryError):
                raise
            return None
        if not has_preamble and not _is_plausible(dataset):
            return None
        _complete_meta(dataset)
    return dataset


def _starts_like_dicom(start: bytes) -> bool:
    """Whether the first bytes can be an element of group 2 or 8, in any transfer syntax."""
    if len(start) < 8:
        return False
    for order in ("little", "big"):
        group = int.from_bytes(start[:2], order)
        element = int.from_bytes(start[2:4], order)
        length = int.from_bytes(start[4:8], order)
        is_explicit = start[4:6].isalpha() and start[4:6].isupper()
        if group in (2, 8) and element <= 0x100 and (is_explicit or length <= 1024):
            return True
    return False


def _is_plausible(dataset: Dataset) -> bool:
    """Whether a data set that was read without preamble holds what every DICOM object has."""
    is_object = text(dataset, "SOPClassUID").startswith(_UID_ROOT)
    return is_object or bool(
        unsigned(dataset, "Rows") and unsigned(dataset, "Columns") and text(dataset, "Modality")
    )


def _complete_meta(dataset: Dataset) -> None:
    """Name the transfer syntax where the meta header does not: as pydicom has read the file."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if dataset.file_meta.get("TransferSyntaxUID"):
        return
    is_implicit, is_little = dataset.original_encoding
    if is_implicit:
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    elif is_little:
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    else:
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian


def text(dataset: Dataset, name: str | int) -> str:
    r"""The text of an element without padding, several values separated by `\`; empty without
    one.
    """
    value = _value(dataset, name)
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("latin-1").strip(" \0")
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value).strip(" \0")
    return "\\".join(str(item).strip(" \0") for item in value)


def decoded_text(dataset: Dataset, name: str) -> str:
    """The text of an element in the character set of the file, several values separated by `/`."""
    from pydicom.multival import MultiValue

    raw = _value(dataset, name)
    if isinstance(raw, bytes) and raw.isascii() and b"\x1b" not in raw:
        return raw.decode("ascii").strip(" \0").replace("\\", "/")  # the same in every set
    with quiet():
        try:
            value = dataset.get(name)
        except Exception:  # the bytes do not fit the declared character set or type
            value = None
            del dataset[name]
    if isinstance(value, MultiValue):
        return "/".join(map(str, value))
    return "" if value is None else str(value)


def numbers(dataset: Dataset, name: str) -> tuple[float, ...]:
    """The numbers of an element; NaN for a value that is none, empty without values."""
    return split_numbers(text(dataset, name))


def split_numbers(content: str) -> tuple[float, ...]:
    r"""Numbers from a text that separates them by `\`; NaN for a part that is none."""
    return tuple(_number(part) for part in content.split("\\")) if content else ()


def number(dataset: Dataset, name: str) -> float | None:
    """The first number of an element; None without a value, NaN for a value that is none."""
    values = numbers(dataset, name)
    return values[0] if values else None


def whole(dataset: Dataset, name: str) -> int:
    """A whole number that is written as text; 0 without a value that is one."""
    values = numbers(dataset, name)
    return int(values[0]) if values and math.isfinite(values[0]) else 0


def unsigned(dataset: Dataset, name: str) -> int:
    """A binary whole number such as Rows; 0 without one."""
    value = _value(dataset, name)
    if isinstance(value, bytes):
        raw: Any = dataset.get_item(_tag(name))
        return int.from_bytes(value[:2], "little" if raw.is_little_endian else "big")
    return value if isinstance(value, int) else 0


def _number(part: str) -> float:
    """A number from its text; NaN where it is none."""
    try:
        return float(part.strip(" \0"))
    except ValueError:
        return math.nan


def _value(dataset: Dataset, name: str | int) -> Any:
    """The value of an element as pydicom holds it: bytes where it has not been converted."""
    element = dataset.get_item(_tag(name))
    return None if element is None else element.value


@functools.cache
def _tag(name: str | int) -> BaseTag:
    """The tag of an element; pydicom takes longer to look it up than to read the element."""
    from pydicom.tag import Tag

    return Tag(name)
