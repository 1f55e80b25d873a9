"""A share of the scans of `tapct eval` and `tapct embed`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tapct.data.index.share import WHOLE, Share
from tapct.eval.passes.reader import ScanReader
from tapct.eval.runner import _fill
from tapct.run.embed.named_scans import NamedScan, NamedScans

IDS = [f"scan{number}" for number in range(40)]


def filled(share: Share) -> list[str]:
    """The scans whose features a share computes."""
    seen: list[str] = []
    wanted = [SimpleNamespace(scan=SimpleNamespace(id=name), blocks={0: (1,)}) for name in IDS]
    features = SimpleNamespace(
        missing=lambda rows: wanted,
        fill=lambda some, check, done: seen.extend(one.scan.id for one in some),
        release=lambda: None,
    )
    reader: Any = SimpleNamespace(
        features=features,
        rows=lambda: (),
        split=SimpleNamespace(train=(), test=()),
        check_skips=lambda: None,
    )
    _fill(cast(ScanReader, reader), None, share)
    return seen


def test_shares_of_the_features_are_all_features() -> None:
    shares = [filled(Share(number, 3)) for number in (1, 2, 3)]
    assert all(shares) and sorted(sum(shares, [])) == sorted(IDS)
    assert filled(WHOLE) == IDS


def test_shares_of_named_scans_are_all_scans() -> None:
    cases = cast(tuple[NamedScan, ...], tuple(SimpleNamespace(id=name) for name in IDS))
    whole = NamedScans(cases, ("lost",))
    assert whole.of_share(WHOLE) is whole
    shares = [whole.of_share(Share(number, 2)) for number in (1, 2)]
    assert sorted(case.id for share in shares for case in share.found) == sorted(IDS)
    assert all(share.found and not share.missing for share in shares)
