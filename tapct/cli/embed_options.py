"""The options of `tapct embed`, checked before torch is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tapct.base import exits, files

_LIKE_A_FILE = re.compile(r"\.[a-z][a-z0-9]{0,7}$", re.I)


@dataclass(frozen=True)
class EmbedOptions:
    """What is written, and where.

    Args:
        form: one of `FORMATS`.
        is_vector: whether each scan gives one vector; else dense features.
        folder: folder of the results.
        file: file for the dense features of one scan; None to write into `folder`.
    """

    NPZ: ClassVar[str] = "npz"
    PARQUET: ClassVar[str] = "parquet"
    CVPR26: ClassVar[str] = "cvpr26"
    ZARR: ClassVar[str] = "zarr"
    FORMATS: ClassVar[tuple[str, ...]] = (NPZ, PARQUET, CVPR26, ZARR)

    form: str
    is_vector: bool
    folder: Path
    file: Path | None = None

    @classmethod
    def of(
        cls,
        scan: Path,
        out: Path | None,
        form: str,
        per_scan: bool,
        vector_words: Mapping[str, object],
    ) -> EmbedOptions:
        """Check the options.

        Args:
            scan: scan, folder or table.
            out: option --out.
            form: option --format; empty for the default.
            per_scan: option --scan.
            vector_words: options that concern vectors alone, by name; false where not given.
        Raises:
            UserError: options that contradict each other, an unknown format, or an --out of the
                wrong kind.
        """
        form = form or (cls.PARQUET if per_scan else cls.NPZ)
        if form not in cls.FORMATS:
            near = difflib.get_close_matches(form.lower(), cls.FORMATS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise exits.UserError(f"--format {form}: must be one of {', '.join(cls.FORMATS)}{hint}")
        if per_scan and form == cls.ZARR:
            raise exits.UserError(
                "--scan gives one vector per scan; --format zarr holds dense ones"
            )
        is_vector = per_scan or form in (cls.PARQUET, cls.CVPR26)
        for option, value in vector_words.items():
            if value and not is_vector:
                raise exits.UserError(
                    f"{option} needs --scan or --format {cls.PARQUET} or {cls.CVPR26}: it chooses "
                    "the vector of a scan"
                )
        return cls._with_out(scan, out, form, is_vector)

    @classmethod
    def _with_out(cls, scan: Path, out: Path | None, form: str, is_vector: bool) -> EmbedOptions:
        """The options with the place of the results."""
        dense_file = form == cls.NPZ and not is_vector
        may_be_one = scan.suffix.lower() not in (".csv", ".tsv")
        if out is None:
            if not dense_file or scan.is_dir() or not may_be_one:
                raise exits.UserError("--out is missing; give a folder for the results")
            out = Path("features.npz")
        if out.suffix.lower() == ".npz" and not out.is_dir():
            if not dense_file:
                raise exits.UserError(
                    f"--out {out}: give a folder; the files in it get their names"
                )
            if not may_be_one:
                raise exits.UserError(
                    f"--out {out} is one file, and {scan} names many scans; give a folder"
                )
            files.check_new_path(out)
            return cls(form, is_vector, out.parent, out)
        if _LIKE_A_FILE.search(out.name) and not out.is_dir():
            if dense_file and out.suffix.lower() == ".parquet":
                raise exits.UserError(
                    f"--out {out}: a Parquet table holds one vector per scan; give --scan and a "
                    f"folder, such as {out.with_suffix('')}"
                )
            if dense_file:
                raise exits.UserError(
                    f"--out {out}: features are written as .npz; use {out}.npz, or a folder"
                )
            raise exits.UserError(
                f"--out {out} looks like a file; give a folder, such as {out.with_suffix('')}, and "
                "the files in it get their names"
            )
        files.check_new_path(out)
        if out.exists() and not out.is_dir():
            raise exits.UserError(f"--out {out} is a file; give a folder for the results")
        return cls(form, is_vector, out)
