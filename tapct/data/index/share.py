"""A share of an index or a pack: what one of several processes does."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from tapct.base.exits import UserError

_FORM = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Share:
    """The share of one process; shares of one number do not overlap, and together they are all.

    Args:
        number: number of the process, from 1.
        total: number of processes.
    """

    number: int = 1
    total: int = 1

    @property
    def name(self) -> str:
        """The share in a file name; empty for the whole."""
        return f"{self.number}of{self.total}" if self.total > 1 else ""

    def has(self, name: bytes | str) -> bool:
        """Whether the work of this name belongs to the share, by a hash of the name."""
        content = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
        return zlib.crc32(content) % self.total == self.number - 1


WHOLE = Share()


def parse_share(text: str | None) -> Share | None:
    """The share that `--part I/N` names; None without the option.

    Raises:
        UserError: the text is no I/N with 1 <= I <= N.
    """
    if text is None:
        return None
    match = _FORM.fullmatch(text.strip())
    number, total = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= total:
        raise UserError(f"--part {text}: rule: I/N with I from 1 to N, such as 3/16")
    return Share(number, total)
