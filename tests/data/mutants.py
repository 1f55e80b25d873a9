"""Damaged scan files for tests: bytes, fields of headers and lengths, changed at random."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import pydicom
import SimpleITK
from scan_files import make_ct, make_slice, write_nifti

SHAPE_ZYX = (6, 16, 18)
Change = Callable[[bytes, random.Random], bytes]

SHORTS = (0, 1, -1, 2, 3, 4, 7, 8, 16, 255, 256, 512, 1000, 4096, 32767, -32768)
FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-3, 1e-30, 1e-45, 3e38, -3e38, 1e4, 352.0, 348.0, 0.04, 51.0),
    *(float("nan"), float("inf"), float("-inf"), 1024.0, -1024.0, 2.0),
)
# offset and format of the fields of a NIfTI-1 header
NIFTI_FIELDS = [
    *((0, "<i"), (39, "<b"), (70, "<h"), (72, "<h"), (108, "<f"), (112, "<f"), (116, "<f")),
    *((123, "<b"), (252, "<h"), (254, "<h"), (344, "<i")),
    *((40 + 2 * k, "<h") for k in range(8)),
    *((76 + 4 * k, "<f") for k in range(8)),
    *((256 + 4 * k, "<f") for k in range(6)),
    *((280 + 4 * k, "<f") for k in range(12)),
]
TOKENS = (
    *(
        "",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "1e-400",
        "65536",
        "2147483648",
    ),
    *(
        "2147483648",
        "9" * 40,
        "9" * 3000,
        "a" * 100_000,
        "%s%n%x",
        "\0\0",
        "(0,0,0)",
        "none",
        "LIST",
    ),
    *("short", "double", "uchar", "raw", "gzip", "hex", "ascii", "True", "False", "MET_UCHAR"),
    *("LOCAL", "../x", "/etc/passwd", "%03d.raw 1 9 1", "big", "1 0 0 0 1 0 0 0 1", "é" * 300),
)
DICOM_TAGS = (
    *((0x0002, 0x0000), (0x0002, 0x0010), (0x0008, 0x0005), (0x0008, 0x0008), (0x0008, 0x0016)),
    *((0x0008, 0x0060), (0x0010, 0x0020), (0x0018, 0x0050), (0x0020, 0x000E), (0x0020, 0x0032)),
    *((0x0020, 0x0037), (0x0028, 0x0002), (0x0028, 0x0008), (0x0028, 0x0010), (0x0028, 0x0011)),
    *((0x0028, 0x0030), (0x0028, 0x0100), (0x0028, 0x0101), (0x0028, 0x0102), (0x0028, 0x0103)),
    *((0x0028, 0x1052), (0x0028, 0x1053), (0x7FE0, 0x0010)),
)
DICOM_TEXTS = (
    *(
        b"nan",
        b"inf",
        b"1e400",
        b"-0",
        b"0\\0",
        b"",
        b"1\\2\\3",
        b"\xff" * 8,
        b"\0" * 4,
        b"99999999",
    ),
    *(b"1e-300\\1e-300", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.1.99", b"MR"),
    *(b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.5", b"\\" * 50, b"1,5", b"ISO 2022 IR 87"),
)


def flip_bytes(content: bytes, draw: random.Random) -> bytes:
    """Up to 16 bytes become others."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
    return bytes(changed)


def flip_header(content: bytes, draw: random.Random) -> bytes:
    """As `flip_bytes`, near the start."""
    return flip_bytes(content[:600], draw) + content[600:]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.randbytes(draw.choice((1, 2, 4, 100, 5000))) + content[at:]


def repeat(content: bytes, draw: random.Random) -> bytes:
    begin, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:end] + content[begin:]


def blank(content: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(content)), draw.choice((4, 64, 512))
    filling = draw.choice((b"\0", b"\xff", b" "))
    return content[:at] + filling * min(length, len(content) - at) + content[at + length :]


def edit_nifti(content: bytes, draw: random.Random) -> bytes:
    """One to three fields of the header get values that are odd or absurd."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        offset, form = draw.choice(NIFTI_FIELDS)
        value = draw.choice(FLOATS if form == "<f" else SHORTS)
        if form == "<b":
            value = int(value) % 128
        struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def edit_text(content: bytes, draw: random.Random) -> bytes:
    """One or two lines of a text header are changed, repeated, removed or exchanged."""
    end = content.find(b"\n\n") if content.startswith(b"NRRD") else content.find(b"LOCAL") + 5
    lines = content[:end].decode("latin-1").split("\n")
    for _ in range(draw.choice((1, 1, 2))):
        k, kind = draw.randrange(len(lines)), draw.randrange(6)
        if kind == 0:
            del lines[k]
        elif kind == 1:
            lines.insert(draw.randrange(len(lines) + 1), lines[k])
        elif kind == 2 and len(lines) > 1:
            other = draw.randrange(len(lines))
            lines[k], lines[other] = lines[other], lines[k]
        else:
            words = lines[k].split(" ")
            words[draw.randrange(len(words))] = draw.choice(TOKENS)
            lines[k] = " ".join(words)
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "replace") + content[end:]


def edit_dicom(content: bytes, draw: random.Random) -> bytes:
    """The VR, the length or the value of one or two elements is changed."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2))):
        at = changed.find(struct.pack("<HH", *draw.choice(DICOM_TAGS)))
        if at < 0:
            continue
        kind = draw.randrange(4)
        if kind == 0:
            changed[at + 4 : at + 6] = draw.choice((b"SQ", b"UN", b"OB", b"DS", b"US", b"\0\0"))
        elif kind == 1:
            length = draw.choice((0, 1, 2, 3, 7, 255, 0xFFFE, 0xFFFF))
            changed[at + 6 : at + 8] = struct.pack("<H", length)
        elif kind == 2:
            text = draw.choice(DICOM_TEXTS)
            length = int.from_bytes(changed[at + 6 : at + 8], "little")
            changed[at + 6 : at + 8 + length] = struct.pack("<H", len(text)) + text
        else:
            changed[at + 8 : at + 10] = struct.pack("<h", draw.choice(SHORTS))
    return bytes(changed)


ANYWHERE: tuple[Change, ...] = (flip_bytes, flip_header, cut, insert, repeat, blank)


def originals(folder: Path) -> dict[str, bytes]:
    """One whole scan of each kind: file name and content."""
    folder.mkdir(parents=True)
    hu_ZYX = make_ct(SHAPE_ZYX)
    image = SimpleITK.GetImageFromArray(hu_ZYX)
    image.SetSpacing((0.8, 0.7, 2.5))
    for name, is_compressed in (("a.nrrd", 0), ("b.nrrd", 1), ("a.mha", 0), ("b.mha", 1)):
        SimpleITK.WriteImage(image, folder / name, bool(is_compressed))
    write_nifti(folder / "a.nii", hu_ZYX)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def slices_of(number: int, draw: random.Random) -> list[bytes]:
    """The files of one DICOM series with identifiers of its own, sometimes compressed."""
    contents = []
    hu_ZYX = make_ct(SHAPE_ZYX, seed=number % 50)[:3]
    is_deflated = draw.random() < 0.1
    for k, pixels in enumerate(hu_ZYX):
        uid = f"1.2.3.{number}"
        dataset = make_slice(
            pixels, 2.0 * k, k + 1, SeriesInstanceUID=uid, StudyInstanceUID=f"1.2.{number}"
        )
        if is_deflated:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        stream = io.BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        contents.append(stream.getvalue())
    return contents


def write_mutants(folder: Path, first: int, num: int) -> list[Path]:
    """Write damaged scans, each in a folder of its own.

    Args:
        folder: folder to make.
        first: number of the first mutant; a number always gives the same mutant.
        num: number of mutants.
    Returns:
        The files, one of each mutant.
    """
    whole = originals(folder.with_name(f"{folder.name}_originals"))
    names = [*whole, "gz", "dicom", "dicom"]
    written = []
    for number in range(first, first + num):
        draw = random.Random(number)
        name = names[number % len(names)]
        place = folder / f"{number:05d}"
        place.mkdir(parents=True)
        if name == "dicom":
            contents = slices_of(number, draw)
            k = draw.randrange(len(contents))
            contents[k] = draw.choice((edit_dicom, edit_dicom, *ANYWHERE))(contents[k], draw)
            for i, content in enumerate(contents):
                (place / f"s{i}.dcm").write_bytes(content)
            written.append(place / f"s{k}.dcm")
            continue
        suffix = ".nii.gz" if name == "gz" else name[1:]
        file = place / f"x{number}{suffix}"
        file.write_bytes(_mutant(whole, name, draw))
        written.append(file)
    return written


def _mutant(whole: dict[str, bytes], name: str, draw: random.Random) -> bytes:
    """The content of one damaged file."""
    if name == "gz":
        if draw.random() < 0.3:  # the compressed bytes
            return draw.choice(ANYWHERE)(gzip.compress(whole["a.nii"], mtime=0), draw)
        inside = draw.choice((edit_nifti, *ANYWHERE))(whole["a.nii"], draw)
        if draw.random() < 0.1:
            inside += bytes(draw.choice((1, 1000, 1 << 22)))  # more than the header promises
        return gzip.compress(inside, zlib.Z_BEST_SPEED, mtime=0)
    edit = edit_nifti if name.endswith(".nii") else edit_text
    return draw.choice((edit, edit, edit, *ANYWHERE))(whole[name], draw)


def nibabel_zyx(path: Path) -> nibabel.Nifti1Image:
    """A NIfTI file with axes x, y, z towards left, back and head, as nibabel reads it."""
    image = nibabel.load(path)
    if image.ndim > 3:
        image = nibabel.funcs.squeeze_image(image)
    axes = nibabel.orientations.io_orientation(image.affine)
    lps = nibabel.orientations.axcodes2ornt("LPS")
    return image.as_reoriented(nibabel.orientations.ornt_transform(axes, lps))
