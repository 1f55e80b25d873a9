"""The split of an archive: which patients are held out from pretraining."""

from __future__ import annotations

from collections.abc import Iterable

from tapct.base.hashing import hash_int


def held_out_patients(patients: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Choose whole patients, the same ones for the same seed whatever the order of the scans.

    Args:
        patients: keyed hashes, one per scan; repeated for several scans of one patient.
        share: share of the patients, in [0, 1); the count is rounded, but at least one patient is
            chosen where share > 0 and there are two patients.
        seed: random seed of the run.
    Returns:
        The chosen patients; empty for share 0.
    """
    names = sorted(set(patients), key=lambda name: (hash_int(seed, f"held_out/{name}"), name))
    if share <= 0 or len(names) < 2:
        return frozenset()
    return frozenset(names[: min(max(round(share * len(names)), 1), len(names) - 1)])
