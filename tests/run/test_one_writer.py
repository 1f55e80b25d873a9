"""One process trains in a run folder, and one config is trained by all ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config_of, make_store, own_plugin

from tapct.base.exits import UserError
from tapct.base.lease import Lease, LostLease
from tapct.engine import loop
from tapct.run import pretrain
from tapct.run.provenance import code_digest, facts_of_rank

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))
import many_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def content_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.*")}


def other_holder(run: Path) -> Lease:
    """Another process that trains in this run folder."""
    lease = Lease(run / "lease.json", "the run folder", {"SLURM_JOB_ID": "77"})
    lease.acquire()
    return lease


def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    pretrain.train(config_of(tmp_path, store, "train.steps=4"))
    assert not (run / "lease.json").exists(), "a run that has ended holds no lease"
    other = other_holder(run)
    before = content_of(run)
    with pytest.raises(UserError, match=r"being written by another process \(.*job 77, since"):
        pretrain.train(config_of(tmp_path, store, "optim.lr=1e-4"), allow_change=True)
    assert content_of(run) == before
    other.release()
    assert pretrain.train(config_of(tmp_path, store, "train.steps=4")) == loop.Stop(4)


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_run_that_has_lost_its_folder_stops_and_writes_nothing_more(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, on_error: str
) -> None:
    run = tmp_path / "run"
    original = loop.Trainer.optimizer_step
    others: list[Lease] = []
    before: dict[str, bytes] = {}

    def with_thief(self: loop.Trainer, step: int, batches: Any) -> None:
        if step == 6:
            (run / "lease.json").unlink()  # as if this process had been suspended for minutes
            others.append(other_holder(run))
            before.update(content_of(run))
        original(self, step, batches)

    monkeypatch.setattr(loop.Trainer, "optimizer_step", with_thief)
    words = (f"log.every={log_every}", "checkpoint.asynchronous=false", "checkpoint.every=4")
    words += (f"checkpoint.on_error={on_error}",)
    with pytest.raises(LostLease, match=r"no longer this process's to write: it belongs to host"):
        pretrain.train(config_of(tmp_path, store, *words))
    assert content_of(run) == before and "checkpoints/step_00000004/meta.json" in before
    others[0].check()
    others[0].release()


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_folder_that_was_lost_in_a_save_keeps_what_the_other_process_writes(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    run = tmp_path / "run"
    theirs = run / "checkpoints" / ".writing_step_00000004"
    others: list[Lease] = []
    original = pretrain.Checkpoints._write

    def with_thief(self: Any, *args: Any) -> Path:
        if others:
            others.append(others[0])
            return original(self, *args)
        (run / "lease.json").unlink()
        others.append(other_holder(run))
        theirs.mkdir(parents=True)
        (theirs / "part.distcp").write_bytes(b"theirs")
        return original(self, *args)

    monkeypatch.setattr(pretrain.Checkpoints, "_write", with_thief)
    words = ("checkpoint.every=4", f"checkpoint.on_error={on_error}", "train.steps=40")
    with pytest.raises(LostLease):
        pretrain.train(config_of(tmp_path, store, *words))
    assert len(others) == 1, "no second checkpoint was begun"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [theirs.name]
    assert (theirs / "part.distcp").read_bytes() == b"theirs"
    others[0].release()


def test_the_lease_of_a_killed_process_does_not_stop_the_next(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    lease = Lease(run / "lease.json", "the run folder", {})
    lease.acquire()
    lease.over.set()
    head, _, beats = (run / "lease.json").read_bytes().partition(b"\n")
    # the process id of one that has ended
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    gone = head.replace(f'"pid": {os.getpid()}'.encode(), f'"pid": {child}'.encode())
    (run / "lease.json").write_bytes(gone + b"\n" + beats)
    assert pretrain.train(config_of(tmp_path, store)) == loop.Stop(12)
    assert not (run / "lease.json").exists()


@pytest.mark.dist
def test_ranks_with_different_settings_all_end_with_the_difference(
    tmp_path: Path, store: Path
) -> None:
    ended = many_ranks.train(
        2, tmp_path, store, "log.wandb.name=${NODE}", each=[{"NODE": "one"}, {"NODE": "two"}]
    )
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    assert "log.wandb.name is two there and one on rank 0" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.dist
def test_a_taken_run_folder_ends_all_ranks(tmp_path: Path, store: Path) -> None:
    other = other_holder(tmp_path / "run")
    ended = many_ranks.train(2, tmp_path, store)
    other.release()
    assert ended.returncode == 2 and "being written by another process" in ended.stderr
    assert not (tmp_path / "run").exists(), "it was made for the lease alone"


def test_the_facts_of_a_rank_name_data_code_and_every_setting(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = config_of(tmp_path, store)
    facts = facts_of_rank(resolved, CPU)
    assert facts["optim.lr"] == "0.01" and "data.store" not in facts
    assert len(facts["digest of data.store"]) == 32
    missing = facts_of_rank(config_of(tmp_path, store, "data.store=nowhere"), CPU)
    assert missing["digest of data.store"].startswith("unknown (nowhere")
    changed = [name for name in facts if missing[name] != facts[name]]
    assert changed == ["digest of data.store"]


def test_the_digest_of_the_code_covers_plug_ins_outside_of_tapct(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_plugin(monkeypatch, tmp_path, "spread", "from tapct.losses.koleo import Config, build\n")
    config = config_of(tmp_path, store, "losses[mylab.spread]={}").value
    before = code_digest(config)
    assert before == code_digest(config) != code_digest(config_of(tmp_path, store).value)
    file = tmp_path / "code" / "mylab" / "spread.py"
    file.write_text(file.read_text() + "# changed\n")
    assert code_digest(config) != before
