"""`tapct doctor CONFIG --selftest` finds what it shall find, and a proof that could not run never
counts as passed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tapct.cli.app import app
from tapct.config import load_config
from tapct.doctor import selftest, short_run
from tapct.doctor.selftest import Proof, Subject
from tapct.run.config import RunConfig

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = load_config(RunConfig, SMOKE, ["device=cpu", "data.loader.slab_depth=8"]).value
    return Subject(SMOKE, ("device=cpu",), config, torch.device("cpu"))


def passing(subject: Subject) -> Iterator[Proof]:
    yield Proof("one", "ok", "equal")
    yield Proof("two", "not proven", "there is no GPU here")


def failing(subject: Subject) -> Iterator[Proof]:
    yield Proof("three", "fail", "differs")


def raising(subject: Subject) -> Iterator[Proof]:
    yield Proof("four", "ok", "equal")
    raise RuntimeError("CUDA error: an illegal memory access\nsecond line")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *proofs: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of the command with other proofs."""
    monkeypatch.setattr(selftest, "PROOFS", proofs)
    out = folder / "found.json"
    ended = CliRunner().invoke(app, ["doctor", str(SMOKE), "--selftest", "--json", str(out)])
    return ended.exit_code, json.loads(out.read_text())


def test_what_could_not_run_is_not_counted_as_proven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, found = run(monkeypatch, tmp_path, passing)
    assert code == 0 and found["passed"]
    assert found["verdict"] == "1 proven; 1 not proven: two"
    assert [proof["state"] for proof in found["proofs"]] == ["ok", "not proven"]


@pytest.mark.parametrize(
    ("proof", "named"), [(failing, "three"), (raising, "raising: RuntimeError: CUDA error")]
)
def test_a_failed_proof_is_named_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proof: Any, named: str
) -> None:
    code, found = run(monkeypatch, tmp_path, passing, proof, passing)
    assert code == 1 and not found["passed"]
    (failed,) = [each for each in found["proofs"] if each["state"] == "fail"]
    assert f"{failed['name']}: {failed['text']}".startswith(named)
    assert len(found["proofs"]) >= 5  # the proofs after it were run too


def test_a_wrong_attention_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    right = {proof.name: proof.state for proof in selftest.attention_agrees(subject)}
    assert right["attention sdpa"] == right["attention auto"] == "ok"
    assert right["attention varlen"] == right["attention xformers"] == "not proven"

    def without_last_crop(q: Tensor, k: Tensor, v: Tensor, spans: Any) -> Tensor:
        return (
            selftest.BACKENDS["sdpa"](q, k, v, spans) * (torch.arange(len(q)) < 300)[:, None, None]
        )

    monkeypatch.setattr(selftest, "BACKENDS", {**selftest.BACKENDS, "auto": without_last_crop})
    wrong = {proof.name: proof.state for proof in selftest.attention_agrees(subject)}
    assert wrong["attention auto"] == "fail"


def test_a_run_that_forgets_its_moments_is_found(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    assert [proof.state for proof in selftest.resume_is_equal(subject)] == ["ok"]
    load = selftest.checkpoint.load

    def forget(saved: Path, pair: Any, optimizer: torch.optim.Optimizer) -> None:
        load(saved, pair, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(selftest.checkpoint, "load", forget)
    assert [proof.state for proof in selftest.resume_is_equal(subject)] == ["fail"]


def test_scans_of_a_short_run_do_not_depend_on_the_ranks() -> None:
    together = short_run.batch_of(range(4), depth=2, in_plane=16).hu_BZYX
    halves = [short_run.batch_of(half, 2, 16).hu_BZYX for half in (range(2), range(2, 4))]
    assert torch.equal(together, torch.cat(halves))
    assert len({slab.numpy().tobytes() for slab in together}) == 4


def test_the_self_test_needs_a_config() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--selftest"])
    assert ended.exit_code != 0


@pytest.mark.slow
def test_the_whole_self_test_passes_here(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert selftest.report(SMOKE, ["device=cpu"], out)
    found = json.loads(out.read_text())
    states = {proof["name"]: proof["state"] for proof in found["proofs"]}
    for name in ("fp32 and fp64", "bf16 and fp32", "compiled blocks", "whole graphs", "resume"):
        assert states[name] == "ok"
    assert states["2 ranks by gloo, bf16"] == states["peak memory"] == "ok"
