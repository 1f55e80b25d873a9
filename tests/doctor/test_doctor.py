"""Each check of `tapct doctor` in each of its outcomes; a probe that hangs is ended; the sum over
gloo is real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from doctor_cases import CASES, H100, HUNG
from forked import python, with_nest
from forked import python_from_nest as python_from_nest  # a fixture
from tiny_run import make_store, write_config

from tapct import cli
from tapct.data.loading import read_rate
from tapct.doctor import checkup, device, folders, machine, site, verdicts
from tapct.doctor.facts import (
    INSTALL,
    AllReduce,
    AttentionKernels,
    Broken,
    Copy,
    Finding,
    Gpus,
    Settings,
    Slurm,
    Space,
    Torch,
)
from tapct.doctor.probes import Probe, Reports


@pytest.mark.parametrize(
    ("state", "finding", "words", "remedy"), CASES, ids=lambda one: getattr(one, "name", None)
)
def test_facts_lead_to_the_finding(state: str, finding: Finding, words: str, remedy: str) -> None:
    assert finding.state == state, finding
    assert words in finding.text and remedy in finding.remedy
    assert bool(finding.remedy) == (state != "ok")
    for line in checkup.lines(finding, 80):
        assert len(line) <= 80


def test_every_check_was_shown_to_pass_and_to_complain() -> None:
    states: dict[str, set[str]] = {}
    for _, finding, *_ in CASES:
        states.setdefault(finding.name, set()).add(finding.state)
    partial = {"umask": {"ok", "warn"}, "wandb": {"ok", "fail"}, "config": {"ok", "fail"}}
    assert {
        name: found for name, found in states.items() if found != {"ok", "warn", "fail"}
    } == partial


# --- probes -------------------------------------------------------------------------------------


def write_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurm_is_asked_and_a_dead_controller_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert machine.slurm() is None
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    write_program(programs, "sinfo", "printf 'gpu up\\ngpu up\\nold drain\\n'")
    write_program(programs, "squeue", "printf '12\\n13_4\\n'")
    assert machine.slurm() == Slurm(("gpu",), ("old",), 2)
    write_program(programs, "squeue", "echo 'squeue: error: no controller' >&2; exit 1")
    assert machine.slurm() == Broken("squeue: error: no controller")
    write_program(programs, "sinfo", "sleep 60 & sleep 60")
    begin = time.monotonic()
    found = machine.slurm(0.5)
    assert isinstance(found, Broken) and "did not respond within 0.5 s" in found.why
    assert time.monotonic() - begin < 30  # of the 60 s that it hangs


def test_requirements_are_held_against_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "madeup-1.0.dist-info"
    about.mkdir()
    wanted = (
        "numpy>=1",
        "pytest>=999",
        "no-such-package>=2",
        "nor-this ; extra == 'gpu'",
        "nor-this; os_name == 'nt'",
    )
    head = "Metadata-Version: 2.1\nName: madeup\nVersion: 1.0\nRequires-Python: >=3.8\n"
    (about / "METADATA").write_text(head + "".join(f"Requires-Dist: {line}\n" for line in wanted))
    monkeypatch.syspath_prepend(tmp_path)
    found = machine.packages("madeup")
    assert not isinstance(found, Broken)
    reported = {one.name: (one.wanted, one.fits) for one in found}
    assert reported == {
        "python": (">=3.8", True), "numpy": (">=1", True), "pytest": (">=999", False),
        "no-such-package": (">=2", False)
    }  # fmt: skip
    assert isinstance(machine.packages("no-such-package"), Broken)


def test_tapct_itself_meets_its_requirements() -> None:
    found = machine.packages()
    assert isinstance(found, Broken) or [one for one in found if not one.fits] == []


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/gone\n", {"cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/j\n1:name=x:/\n",
            {"cpu/j/cpu.cfs_quota_us": "300000", "cpu/j/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("nonsense\n", {}, None),
    ],
)
def test_the_share_of_the_control_group_is_read(
    tmp_path: Path, membership: str, files: dict[str, str], cpus: float | None
) -> None:
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "membership").write_text(membership)
    assert machine.cgroup_cpus(tmp_path / "membership", tmp_path / "root") == cpus


def test_a_folder_is_tried_by_writing(tmp_path: Path) -> None:
    there = folders.space(tmp_path, must_exist=True)
    assert there.refusal == "" and 0 < there.free <= there.total and list(tmp_path.iterdir()) == []
    assert folders.space(tmp_path / "a" / "run", must_exist=False).refusal == ""
    assert folders.space(tmp_path / "a", must_exist=True).refusal == "No such file or directory"
    (tmp_path / "file").write_text("")
    assert folders.space(tmp_path / "file", must_exist=True).refusal == "Not a directory"
    assert checkup.check_folder("temporary", tmp_path / "no").state == "fail"
    assert checkup.check_folder("disk", tmp_path / "no").text.startswith(str(tmp_path / "no"))


def test_a_missing_permission_is_not_called_a_lack_of_space() -> None:
    for refusal in ("Permission denied", "Read-only file system"):
        finding = verdicts.room("disk", Space("/a", 0, 0, refusal), 1, 2, "free some space")
        assert finding.state == "fail" and "permission" in finding.remedy
        assert "space" not in finding.remedy
    for refusal in ("Not a directory", "Stale file handle"):
        finding = verdicts.room("disk", Space("/a", 0, 0, refusal), 1, 2, "free some space")
        assert finding.state == "fail" and "check the path" in finding.remedy
    for facts in (Space("/a", 9, 0), Space("/a", 9, 0, "No space left on device")):
        assert verdicts.room("disk", facts, 1, 2, "free some space").remedy == "free some space"


def test_a_key_for_wandb_is_found_without_a_setting(tmp_path: Path) -> None:
    assert not machine.has_wandb_key({}, tmp_path) and not machine.has_wandb_key({}, None)
    assert machine.has_wandb_key({"WANDB_API_KEY": "x"}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert machine.has_wandb_key({}, tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("doctor"))


def test_slabs_are_counted_and_their_bytes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_rate, "READ_SECONDS", 0.2)
    read, sizes = read_rate.Store.read_slab, []

    def counted(self: read_rate.Store, *where: int) -> np.ndarray:
        slab = read(self, *where)
        sizes.append(slab.nbytes)
        return slab

    monkeypatch.setattr(read_rate.Store, "read_slab", counted)
    begin = time.perf_counter()
    found = site.reads(str(store), 6, 2)
    whole = time.perf_counter() - begin
    assert found.scans == 4 and found.threads == 2
    assert len(sizes) / whole <= found.slabs <= len(sizes) / 0.2
    assert found.rate / found.slabs == pytest.approx(sum(sizes) / len(sizes))
    planes = [y * x * 2 for _, y, x in (scan.shape_ZYX for scan in read_rate.Store(store).scans)]
    assert set(sizes) <= {6 * plane for plane in planes}


def test_what_the_config_sets_for_its_machine_is_read(store: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, store)
    overrides = ["log.wandb.mode=online", "train.precision=bf16", "data.loader.workers=3"]
    assert site.settings(str(path), overrides) == Settings(
        str(tmp_path / "run"), str(store), 6, 3, "online", "cpu", "bf16"
    )


def test_attention_runs_on_this_cpu() -> None:
    found = device.attention("cpu")
    assert "math" in found.kernels and found.device == "cpu"


# --- processes ----------------------------------------------------------------------------------

HANGING = """
import subprocess, sys, time
print('@doctor {"topic": "torch", "facts": {"version": "9", "cuda": "", "driver": ""}}', flush=True)
print('@doctor {"topic": "gpus", "fac', end="", flush=True)
open(sys.argv[0] + ".grandchild", "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that reports one thing and hangs with a child of its own."""
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def ends_within(seconds: float, process: int) -> bool:
    """A killed process of another parent may be seen for a moment longer."""
    until = time.monotonic() + seconds
    while alive := is_alive(process):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return not alive


def test_a_hung_child_is_ended_within_its_time_and_what_it_reported_counts(hanging: Path) -> None:
    begin = time.monotonic()
    reported = Probe(
        "hanging", "torch", {}, 3.0
    ).reports()  # long enough to start on a busy machine
    assert 2.9 < time.monotonic() - begin < 40  # of the 60 s that it hangs
    assert reported.of("torch", Torch) == Torch("9", "", "")
    assert reported.of("gpus", Gpus) == Broken("no response within 3 s; it was ended")
    assert ends_within(10.0, int((hanging / "hanging.py.grandchild").read_text()))


def test_a_child_that_dies_is_reported_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    why = Probe("dying", "torch", {}, 20).reports().of("torch", Torch)
    assert why == Broken(
        "ended without a result: ImportError: libcudart.so.13: cannot open", INSTALL
    )
    assert (
        verdicts.all_reduce(why, "gloo").remedy == INSTALL
    )  # and not that the host name leads nowhere


def test_when_all_probes_hang_each_check_fails_with_a_remedy_in_time(
    hanging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DEVICE", "SITE"):
        monkeypatch.setattr(checkup, name, "hanging")
    monkeypatch.setattr(machine, "slurm", lambda: None)
    begin = time.monotonic()
    found = {one.name: one for one in checkup.findings(Path("x.yaml"), [], None, seconds=3.0)}
    assert time.monotonic() - begin < 45  # all hang side by side for 60 s
    for name in ("config", "gpu", "attention", "gloo sum"):
        assert (
            found[name].state == "fail"
            and "no response within 3 s" in found[name].text
            and found[name].remedy
        )
    assert found["torch"].text.startswith("9")


def test_two_gpus_are_read_and_sum_over_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (79 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    seen, build = device.gpus(), device.torch_build()
    assert seen == Gpus((H100, H100), "2.27.7") and (build.cuda, build.driver) == ("12.8", "13.1")
    reported = {
        "torch": build, "gpus": seen, "copy": Copy(2e12, 5e10), "all_reduce": AllReduce(2, True,
        3e11),
        "attention": AttentionKernels("cuda", ("math",), "", True),
    }  # fmt: skip
    asked: list[tuple[str, dict[str, object]]] = []

    class Fixed(Probe):
        def __init__(
            self, module: str, kind: str, arguments: dict[str, object], seconds: float = 1.0
        ) -> None:
            asked.append((kind, arguments))

        def reports(self) -> Reports:
            facts = {topic: json.loads(json.dumps(asdict(one))) for topic, one in reported.items()}
            return Reports([{"topic": topic, "facts": one} for topic, one in facts.items()], HUNG)

        def stop(self) -> None: ...

    monkeypatch.setattr(checkup, "Probe", Fixed)
    monkeypatch.setattr(machine, "has_nvidia", lambda: True)
    monkeypatch.setattr(checkup, "check_folder", lambda name, path: Finding(name, "ok", ""))
    found = {one.name: one for one in checkup.findings(None, [], None)}
    assert "2 x NVIDIA H100" in found["gpu"].text and found["nccl"].text == "2.27.7"
    assert "driver supports 13.1" in found["torch"].text and found["gpu copy"].state == "ok"
    assert found["attention"].state == "warn"  # JSON's list is the facts' tuple again
    assert found["nccl sum"].text == "all-reduce over 2 processes, 300 GB/s"
    ranks = [
        (one["backend"], one["rank"], one["world"]) for kind, one in asked if kind == "all_reduce"
    ]
    assert ranks == [("gloo", 0, 2), ("gloo", 1, 2), ("nccl", 0, 2), ("nccl", 1, 2)]


@pytest.mark.dist
def test_the_doctor_runs_whole_with_a_real_sum_over_gloo(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MASTER_PORT", "1")  # left by a launcher
    # a folder of its own: another test may run a doctor at the same time
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    code, out = leave_code(
        monkeypatch, capsys, write_config(tmp_path, store), "data.loader.workers=1"
    )
    heads = [line.split()[0] for line in out.splitlines()[:-1] if not line.startswith(" ")]
    assert set(heads) <= {"ok", "warn", "fail"} and code == ("fail" in heads)
    assert [line for line in out.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    reported = re.search(
        r"^(\w+) +gloo sum +all-reduce over 2 processes, ([\d.]+) GB/s(: slow)?$", out, re.MULTILINE
    )
    assert reported is not None and 0 < float(reported[2]) < 200, out
    assert reported[1] == (
        "ok" if float(reported[2]) * verdicts.GB >= verdicts.LEAST_GLOO else "warn"
    ), out  # it may well be busy
    for line in (
        "ok   config",
        "ok   store",
        "ok   attention",
        "ok   wandb",
        "ok   shared memory",
    ):
        assert f"\n{line}" in out, out
    # from 2 to 20 GB of free space are a warning
    disk = "ok" if shutil.disk_usage(tmp_path).free >= 20e9 else "warn"
    assert re.search(rf"^{disk} +disk ", out, re.MULTILINE), out
    assert re.search(r"^1[5-8] checks: \d+ ok, \d+ warn, \d+ fail$", out.splitlines()[-1])
    assert list(own.glob("tapct-doctor-*")) == []


def test_a_mistyped_key_is_one_clear_line_and_nothing_is_printed_about_other_folders(
    store: Path, tmp_path: Path, python_from_nest: None
) -> None:
    config, overrides = write_config(tmp_path, store), ["optim.lrr=1"]
    site_probe = Probe(
        checkup.SITE, "site", {"config": str(config), "overrides": overrides, "store": ""}
    )
    settings, found = checkup.site_findings(site_probe.reports(), config, None)
    assert settings == Settings()
    (line,) = found
    assert checkup.lines(line, 80) == [
        "fail config        optim.lrr = 1: unknown key; did you mean optim.lr?",
        "                -> correct this key=value on the command line",
    ]


WITHOUT_TORCH = """
import sys
from pathlib import Path
from tapct.doctor import checkup, machine, verdicts
sys.executable = sys.argv[1]  # of the probes
machine.slurm = lambda: None
states = [finding.state for finding in checkup.findings(Path("none.yaml"), [], None)]
loaded = {"torch", "numpy", "matplotlib", "nibabel", "blosc2"} & set(sys.modules)
print(len(states), sorted(loaded))
"""


@pytest.mark.dist
def test_the_process_of_the_command_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    """All checks run; only the probes, which are processes of their own, load torch."""
    root = Path(checkup.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, python()],
        env=with_nest({**os.environ, "PYTHONPATH": str(root)}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    num_checks, loaded = done.stdout.split(" ", 1)
    assert int(num_checks) >= 12 and loaded.strip() == "[]"


def leave_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["tapct", "doctor", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_is_1_if_anything_fails(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [
        Finding("one", "ok", "well"),
        Finding("two", state, "[what] it is", "do that" if code else ""),
    ]  # type: ignore[arg-type]
    monkeypatch.setattr(checkup, "findings", lambda *asked: iter(two))
    found, out = leave_code(monkeypatch, capsys)
    assert found == code and "[what] it is" in out and out.splitlines()[-1].startswith("2 checks: ")
    assert ("                -> do that" in out) == bool(code)
