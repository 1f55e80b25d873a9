"""A run on several archives or on a selection: shares, split, metrics, and what resuming
compares.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, make_store, numbers_of

from tapct.base.exits import SharedError, UserError
from tapct.data.loading.mixture import Mixture
from tapct.data.packed import trained_on
from tapct.data.packed.store import Store
from tapct.run import pretrain
from tapct.run.config import RunConfig
from tapct.run.start import training_data
from tapct.run.training_data import open_store
from tapct.run_folder import RunFolder


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two archives of other scans; their keys differ."""
    folder = tmp_path_factory.mktemp("sites")
    stores = []
    for name, num, seed in (("a", 4, 0), ("b", 3, 9)):
        (folder / name).mkdir()
        stores.append(make_store(folder / name, num=num, seed=seed, key=name))
    return stores[0], stores[1]


def both(sites: tuple[Path, Path], weight: float = 3.0) -> str:
    a, b = sites
    return f"data.stores=[{{path: {a}, weight: {weight}, name: a}}, {{path: {b}, name: b}}]"


def test_a_run_shows_each_archive_in_its_share_and_logs_its_loss(
    sites: tuple[Path, Path], tmp_path: Path
) -> None:
    resolved = config_of(tmp_path, sites[0], both(sites), "train.steps=3", "log.every=1")
    config: RunConfig = resolved.value
    pretrain.train(resolved)
    lines = numbers_of(config.out)
    batch = config.train.global_batch
    for line in lines:
        samples = {name: line[f"archive/{name}/samples"] for name in "ab"}
        assert sum(samples.values()) == batch
        # DINO and iBOT are divided by archive, the other losses compare samples
        terms = sum(v for k, v in line.items() if k.startswith(("loss/dino", "loss/ibot")))
        parts = [line.get(f"archive/{n}/loss", 0.0) * samples[n] / batch for n in "ab"]
        assert sum(parts) == pytest.approx(terms, rel=1e-4)
        assert all((f"archive/{n}/loss" in line) == (samples[n] > 0) for n in "ab")
    total = sum(line["archive/a/samples"] for line in lines)
    if 3 * batch % 4 == 0:
        assert total == 3 * batch * 3 / 4
    listed = trained_on.read(RunFolder(config.out).trained_on).from_step
    scans = [scan for site in sites for scan in Store(site).scans]
    assert {scan.digest for scan in listed} == {scan.checksum for scan in scans}
    assert {scan.patient_key for scan in listed} == {Store(site).patient_key for site in sites}
    about = json.loads(RunFolder(config.out).provenance.read_text())["training"]
    assert about["scans"] == 7 and "a: 75.00% of the samples" in about["about"][0]


def test_other_shares_or_another_selection_are_another_archive(
    sites: tuple[Path, Path], tmp_path: Path
) -> None:
    def digest(*words: str) -> str:
        config = config_of(tmp_path, sites[0], *words).value
        return training_data(config, open_store(config.data), None).digest

    plain = digest()
    assert plain == Store(sites[0]).digest == digest("data.select=''")
    found = [
        plain,
        digest("data.select=depth > 0"),
        digest("data.select=depth > 1"),
        digest(both(sites)),
        digest(both(sites, 2.0)),
        digest(both(sites).replace("name: b", "name: c")),  # a name draws the order of scans
        digest(both(sites), "data.select=depth > 0"),
    ]
    assert len(set(found)) == len(found)
    moved = both((sites[0].parent / ".." / "a" / "store", sites[1]))
    assert digest(moved) == digest(both(sites))


def test_a_selection_chooses_by_the_manifest_and_prints_its_counts(
    sites: tuple[Path, Path], tmp_path: Path, shell: Shell
) -> None:
    store = Store(sites[0])
    table = store.facts(["id", "hu_p50"])
    assert table is not None
    middle = float(np.median(table.column("hu_p50")))
    words = f"data.select=hu_p50 <= {middle!r} and depth > 0"
    config = config_of(tmp_path, sites[0], words).value
    data = training_data(config, store, None)
    chosen = [v <= middle for v in table.column("hu_p50").to_pylist()]
    assert data.rows.tolist() == np.flatnonzero(chosen).tolist() and 0 < sum(chosen) < 4
    config_file = tmp_path / "tiny.yaml"
    printed = shell.good("train", config_file, words, "--print-config")
    assert f"# data.select: {sum(chosen)} of 4 scans of {sites[0]} fulfil hu_p50" in printed
    assert (
        "#   4 of 4 fulfil depth > 0" in printed and f"digest of the data: {data.digest}" in printed
    )


@pytest.mark.parametrize("names", [["hu_p50"], ["kernel", "hu_p50"], ["depth"], ["hu_p50", "id"]])
def test_the_columns_of_a_selection_may_be_in_the_store_in_the_manifest_or_in_both(
    sites: tuple[Path, Path], names: list[str]
) -> None:
    store = Store(sites[0])
    manifest = store.manifest()
    table = store.facts(names)
    assert manifest is not None and table is not None and table.column_names == names
    for name in names:
        assert table.column(name).to_pylist() == [getattr(row, name) for row in manifest.accepted]


def test_a_selection_by_columns_of_the_manifest_alone(
    sites: tuple[Path, Path], tmp_path: Path
) -> None:
    def num_chosen(select: str) -> int:
        config = config_of(tmp_path, sites[0], f"data.select={select}").value
        return len(training_data(config, open_store(config.data), None).rows)

    manifest = Store(sites[0]).manifest()
    assert manifest is not None
    ages = sorted(row.age_years for row in manifest.accepted)
    assert num_chosen(f"age_years <= {ages[1]!r}") == sum(age <= ages[1] for age in ages)
    soft = [row for row in manifest.accepted if row.kernel != "B70f"]
    assert num_chosen("kernel not in ['B70f']") == len(soft)


def test_what_cannot_be_mixed_or_selected_is_refused_with_one_line(
    sites: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = sites

    def refused(*words: str) -> str:
        def start() -> None:
            config = config_of(tmp_path, a, *words).value
            training_data(config, open_store(config.data), None)

        with pytest.raises((UserError, SharedError)) as error:
            start()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean spacing_z_mm" in refused("data.select=spacing <= 5")
    assert "leaves no scan: data.select: 0 of 4" in refused("data.select=depth > 9999")
    twice = f"data.stores=[{{path: {a}, name: a}}, {{path: {a}, name: b}}]"
    assert "a and b hold the same scans" in refused(twice)
    assert "2 archives have the name store" in refused(
        f"data.stores=[{{path: {a}}}, {{path: {b}}}]"
    )
    assert "2 patient keys" in refused(both(sites), "data.join_patients=true")
    assert "characters than letters" in refused(f"data.stores=[{{path: {a}, name: 'x y'}}]")
    assert "no scan of b" in refused(
        both(sites), f"data.select=id != '' and patient in {[s.patient for s in Store(a).scans]}"
    )


def test_a_copy_of_a_held_out_scan_in_another_archive_is_not_trained_on(
    sites: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    copy = make_store(
        tmp_path / "copy", num=5, seed=0, key="copy"
    )  # the scans of a and one more, another key
    stores = (sites[0], copy)
    for seed in range(40):
        words = ("data.held_out=0.4", f"data.split_seed={seed}")
        config = config_of(tmp_path, sites[0], both(stores), *words).value
        store = open_store(config.data)
        try:
            data = training_data(config, store, None)
        except SharedError:
            continue  # nobody is left of one of them
        held_out = config.data.held_out_mask(store.scans, config.seed)
        checksums = np.array([scan.checksum for scan in store.scans])
        held = set(checksums[held_out])
        assert not held & set(checksums[data.rows])
        if any("not trained on, because" in line for line in data.lines):
            break
    else:
        raise AssertionError("no seed put a scan on two sides")
    assert isinstance(data.drawn, Mixture)
    assert sorted(np.concatenate(data.drawn.rows)) == data.rows.tolist()


def test_the_sums_of_an_archive_are_those_of_its_samples() -> None:
    from types import SimpleNamespace

    from tapct.engine.archives import Archives
    from tapct.types import LossResult

    value_B = torch.tensor([1.0, 2.0, 4.0, 8.0])
    divided = LossResult((), None, lambda: value_B)
    output = SimpleNamespace(results=(divided, LossResult(()), divided))
    batch = SimpleNamespace(scan_B=torch.tensor([0, 4, 5, 3]))
    sums = Archives(("a", "b"), (4, 6)).sums(output, batch)  # type: ignore[arg-type]
    # two losses, as means over 4 samples: times 4 are the losses of single samples
    assert sums is not None and sums.tolist() == [[2 * 4 * 9.0, 2.0], [2 * 4 * 6.0, 2.0]]
    nothing = SimpleNamespace(results=(LossResult(()),))
    assert Archives(("a",), (4,)).sums(nothing, batch) is None  # type: ignore[arg-type]
