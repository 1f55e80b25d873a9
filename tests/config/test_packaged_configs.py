"""Configs that come with tapct are found by their bare name, from a wheel too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tapct.config import ConfigError, load_config, yamlfile
from tapct.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_name_is_the_config_of_that_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_config(RunConfig, Path(name), [])
    assert by_name.value == load_config(RunConfig, ROOT / "configs" / f"{name}.yaml", []).value


def test_a_file_goes_before_a_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").write_text("seed: 77\n")
    assert load_config(RunConfig, Path("smoke"), []).value.seed == 77


def test_a_folder_of_that_name_does_not_hide_a_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert yamlfile.config_file(Path("smoke")).name == "smoke.yaml"


def test_base_may_name_a_shipped_config_and_a_file_beside_goes_before_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tap_s_3d\nseed: 5\n")
    mine = load_config(RunConfig, tmp_path / "mine.yaml", [])
    shipped = load_config(RunConfig, ROOT / "configs" / "tap_s_3d.yaml", ["seed=5"])
    assert mine.value == shipped.value
    copied = shutil.copy(ROOT / "configs" / "tap_b_3d.yaml", tmp_path)  # its base is tap_s_3d.yaml
    shipped = load_config(RunConfig, ROOT / "configs" / "tap_b_3d.yaml", [])
    assert load_config(RunConfig, Path(copied), []).value == shipped.value
    (tmp_path / "tap_s_3d.yaml").write_text("train: {steps: 4}\n")
    assert load_config(RunConfig, Path(copied), []).value.train.steps == 4
    (tmp_path / "tap_s_3d").write_text("train: {steps: 3}\n")
    assert load_config(RunConfig, tmp_path / "mine.yaml", []).value.train.steps == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smok", "smok: no such config file; did you mean smoke?"),
        ("nothing_like_it", f"no such config file; tapct comes with {', '.join(NAMES)}"),
        ("smoke.yaml", "smoke.yaml: no such config file"),
        ("here/smoke", "here/smoke: no such config file"),
    ],
)
def test_an_unknown_name_is_an_error_with_near_names(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, Path(name), [])
    assert words in str(error.value)


def test_a_wheel_holds_every_module_and_every_config(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tapct", "configs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    modules = {str(path.relative_to(source)) for path in (source / "tapct").rglob("*.py")}
    configs = {f"tapct/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in names if name.endswith((".py", ".yaml"))} == modules | configs
    assert "tapct/py.typed" in names

    # not `tapct train smoke`: it would load torch for the same answer
    program = "from pathlib import Path; from tapct.config import yamlfile; " + (
        "print(*(yamlfile.read_chain(Path('smoke'))[0].sources.values()), sep='\\n')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr
    assert "site/tapct/configs/smoke.yaml:" in printed.stdout
