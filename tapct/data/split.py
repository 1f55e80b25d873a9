"""Which patients are kept out of pretraining, so that frozen features are judged on people the model never saw."""

from __future__ import annotations

from collections.abc import Iterable

from tapct import rng


def held_out_patients(patients: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Choose whole patients, the same ones for the same seed whatever the order of the scans.

    Args:
        patients: keyed hashes, one per scan; repeated for several scans of one patient.
        share: of the patients, in [0, 1); rounded, but at least one where share > 0 and there are two patients.
        seed: of the run.
    Returns:
        The chosen patients; empty for share 0.
    """
    names = sorted(set(patients), key=lambda name: (rng.hash_int(seed, f"held_out/{name}"), name))
    if share <= 0 or len(names) < 2:
        return frozenset()
    return frozenset(names[: min(max(round(share * len(names)), 1), len(names) - 1)])
