"""Whether the test scans of an evaluation were held out from pretraining: checked, never assumed.

A test scan was trained on if its voxels were (equal digests), whatever its name and store. A test
patient was trained on if any scan of theirs was: the hashes are equal and have the same key, or the
evaluated store holds a scan of this patient whose voxels were trained on. The latter finds patients
that were identified by another rule or hashed with another key when the network was trained.

A scan of pretraining that is not in the evaluated store is compared by the hash of its patient
alone. Hashes by different rules differ for one person, so then the claim is `unknown`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tapct.base.counted import counted

if TYPE_CHECKING:  # the report reads results without loading pyarrow and blosc2
    from tapct.data.packed.trained_on import SeenScan, TrainedOn
    from tapct.eval.scans.usable import ScanRow

UNKNOWN = "unknown"
# the PatientID of a header and that of a JSON file have one hash
_KIND_OF_RULE = {"side_car": "header"}
NOT_COMPARABLE = ("", "kept")  # values of `patient_from` that do not name the rule of a hash
BY_EARLIER_VERSION = "the results were written by an earlier version of tapct, which did not check"


@dataclass(frozen=True)
class HeldOut:
    """What is known about the test scans.

    Args:
        num_test: number of test scans.
        num_scans: test scans whose voxels were trained on.
        num_patients: other test scans, whose patient was trained on.
        unknown: reason why there may be more of either; empty where both numbers are complete.
    """

    num_test: int
    num_scans: int = 0
    num_patients: int = 0
    unknown: str = ""

    @property
    def value(self) -> bool | str:
        """True, False or `unknown`, as results.json holds it."""
        if self.num_scans or self.num_patients:
            return False
        return UNKNOWN if self.unknown else True

    def caveat(self) -> str:
        """What a reader must know, as one line; empty where all test scans were held out."""
        if self.value is True:
            return ""
        if self.value == UNKNOWN:
            return f"whether the test scans were pretrained on is unknown: {self.unknown}"
        at_least = "at least " if self.unknown else ""
        of_all = f"of {counted(self.num_test, 'test scan')}"
        others = (
            f"{self.num_patients} {'is' if self.num_patients == 1 else 'are'} of patients whose "
            "other scans were pretrained on"
        )
        if not self.num_scans:
            return at_least + others.replace(" ", f" {of_all} ", 1)
        were = "was" if self.num_scans == 1 else "were"
        line = f"{at_least}{self.num_scans} {of_all} {were} pretrained on"
        return f"{line}, and {others}" if self.num_patients else line


def no_list(test: Sequence[ScanRow]) -> HeldOut:
    """What is known of the test scans without a list of the scans of pretraining: nothing."""
    return HeldOut(len(test), unknown="there is no list of the scans of pretraining")


def check(
    test: Sequence[ScanRow],
    *,
    rows: Sequence[ScanRow],
    digests: Mapping[str, str],
    patient_key: str,
    trained_on: TrainedOn,
    patient_rules: Mapping[str, str] | None = None,
) -> HeldOut:
    """Compare the test scans with the scans that a network has been trained on.

    Args:
        test: test scans.
        rows: all scans of the evaluated store.
        digests: scan ID -> digest of its voxels.
        patient_key: name of the key of their patient hashes.
        trained_on: scans of pretraining.
        patient_rules: scan ID -> rule that identified its patient, as in the manifest; None where
            all scans have one rule.
    """
    seen_digests = {scan.digest for scan in trained_on.from_step}
    seen_patients, keys, nameless = set(), set(), 0
    for scan in trained_on.from_step:
        keys.add(scan.patient_key)
        nameless += not scan.patient
        if scan.patient and scan.patient_key == patient_key:
            seen_patients.add(scan.patient)
    for row in rows:
        if row.patient and digests[row.id] in seen_digests:
            seen_patients.add(row.patient)
    num_scans = num_patients = num_nameless = 0
    for row in test:
        if digests[row.id] in seen_digests:
            num_scans += 1
        elif row.patient in seen_patients:
            num_patients += 1
        elif not row.patient:
            num_nameless += 1
    reasons = list(trained_on.unknown)
    if keys - {patient_key}:
        reasons.append(
            "no test scan has the voxels of a scan of pretraining, but the patients cannot be "
            "compared, because their hashes were made with another key"
            if not (num_scans or num_patients)
            else "the patients of some scans of pretraining are hashed with another key"
        )
    if patient_rules is not None:
        others = [row for row in test if row.patient and row.patient not in seen_patients]
        present = {digests[row.id] for row in rows}
        reasons += _other_rules(
            [scan for scan in trained_on.from_step if scan.digest not in present],
            patient_key,
            {patient_rules[row.id] for row in others},
        )
    if nameless or num_nameless:
        reasons.append("the patients of some scans are not known")
    return HeldOut(len(test), num_scans, num_patients, "; ".join(reasons))


def _other_rules(
    absent: Sequence[SeenScan], patient_key: str, test_rules: Collection[str]
) -> list[str]:
    """Why the patients of test scans cannot be compared with those of scans that the evaluated
    store lacks; empty where they can.

    Args:
        absent: scans of pretraining that the evaluated store does not hold.
        patient_key: name of the key of the test patients' hashes.
        test_rules: rules that identified the patients of the test scans that may be held out.
    """
    rules = {_KIND_OF_RULE.get(rule, rule) for rule in test_rules}
    # a kept hash is of a rule of an earlier day, which is not known
    different = [
        scan
        for scan in absent
        if scan.patient
        and scan.patient_key == patient_key
        and (
            scan.patient_from in NOT_COMPARABLE
            or rules - {_KIND_OF_RULE.get(scan.patient_from, scan.patient_from)}
        )
    ]
    if not rules or not different:
        return []
    seen = sorted({scan.patient_from or "unknown" for scan in different})
    tested = sorted({rule or "unknown" for rule in test_rules})
    are = "is" if len(different) == 1 else "are"
    return [
        f"{counted(len(different), 'scan')} of pretraining {are} not in this store, and the "
        f"patients were identified by other rules (patient_from: {', '.join(seen)}; of the test "
        f"scans: {', '.join(tested)}), so they cannot be compared"
    ]
