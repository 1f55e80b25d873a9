"""What `tapct index` prints about the labels of an archive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelReport:
    """Counts of labels that were used, cannot be used, or belong to no scan.

    Args:
        num_scans: number of accepted scans.
        num_labelled: number of them with labels.
        unusable: reason code and number of accepted scans whose labels were found and not used.
        unmatched: paths of label files that belong to no scan, below the root where they lie
            there.
        num_given: number of files in the folder of `--labels`; 0 without the option.
        num_given_used: number of scans whose labels lie in that folder.
        num_several: number of accepted scans for which several label maps were found.
        example: a label map that was used and one of the same scan that was not.
        contradiction: how the label files of one scan contradict each other, with their names.
        notes: one line for each thing in a `dataset.json` that is not used.
    """

    num_scans: int
    num_labelled: int
    unusable: tuple[tuple[str, int], ...] = ()
    unmatched: tuple[str, ...] = ()
    num_given: int = 0
    num_given_used: int = 0
    notes: tuple[str, ...] = ()
    num_several: int = 0
    example: tuple[str, str] = ("", "")
    contradiction: str = ""

    def lines(self) -> list[str]:
        """Lines for the terminal; empty for an archive without any labels."""
        if not (self.num_labelled or self.unusable or self.unmatched or self.num_given):
            return []
        parts = [f"labels: {self.num_labelled} of {self.num_scans} scans"]
        if self.unusable:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.unusable)
            total = sum(count for _, count in self.unusable)
            parts.append(f"{total} found but not used ({counts})")
        if self.unmatched:
            parts.append(f"unmatched label files: {len(self.unmatched)}, e.g. {self.unmatched[0]}")
        lines = ["; ".join(parts)]
        if self.contradiction:
            lines.append(f"labels that are not used, e.g. {self.contradiction}")
        if self.num_several:
            used, other = self.example
            scans = f"{self.num_several} scan{'s have' if self.num_several > 1 else ' has'}"
            lines.append(
                f"{scans} several label maps; the first was used, e.g. {used} and not {other}; "
                "docs/data.md gives the order"
            )
        return [*lines, *self.notes]
