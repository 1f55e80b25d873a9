"""Plug-ins: found by file name, loaded by name, refused with a reason."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tapct.base.exits import UserError
from tapct.config import plugins

GOOD = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        weight: float = 1.0

    def build(config):
        return config.weight
"""


@pytest.fixture()
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the user's own, as working directory; its name is not used twice, for modules are
    remembered.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    package = f"lab_{tmp_path.name.replace('-', '_')}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "good.py").write_text(textwrap.dedent(GOOD))
    return package


def refusal(folder: str, name: str) -> str:
    with pytest.raises(UserError) as caught:
        plugins.load(folder, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_listing_a_folder_imports_nothing() -> None:
    code = (
        "import sys; from tapct.config import plugins; before = set(sys.modules); "
        "[plugins.available(f) for f in ('models', 'losses', 'views/ops', 'eval.tasks')]; "
        "assert set(sys.modules) == before, set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_the_files_of_the_folder() -> None:
    folder = Path(plugins.__file__).parent.parent / "losses"
    expected = {
        path.name[:-3]
        for path in folder.iterdir()
        if path.suffix == ".py" and path.name != "__init__.py"
    }
    assert set(plugins.available("losses")) == expected
    assert plugins.available("views/ops") == plugins.available("views.ops")


def test_a_folder_that_tapct_lacks_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="no plug-in folder 'lossses'"):
        plugins.available("lossses")


def test_the_title_of_a_plugin_is_the_beginning_of_its_docstring() -> None:
    assert plugins.title("losses", "ibot") == "iBOT"
    assert plugins.title("losses", "koleo") == "KoLeo"
    assert plugins.title("losses", "backbone") == "backbone"


def test_a_misspelt_name_gets_the_near_ones() -> None:
    line = refusal("losses", "koloe")
    assert "no plug-in 'koloe' in losses" in line
    assert "did you mean koleo?" in line
    assert all(name in line for name in plugins.available("losses"))


@pytest.mark.parametrize("name", ["", "../types", "losses/dino", "a..b", ".dino", "my-lab.x"])
def test_what_is_no_name_is_refused(name: str) -> None:
    assert repr(name) in refusal("losses", name)


def test_a_users_module_is_found_in_the_working_directory(user_module: str) -> None:
    module = plugins.load("losses", f"{user_module}.good")
    assert module.build(module.Config(weight=2.0)) == 2.0


def test_the_error_of_a_missing_user_module_names_where_it_was_looked_for(user_module: str) -> None:
    assert "PYTHONPATH" in refusal("losses", f"{user_module}.absent")
    assert "no module 'nolab'" in refusal("losses", "nolab.absent")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def build(config): ...", "lacks a dataclass named Config"),
        ("class Config: ...\ndef build(config): ...", "lacks a dataclass named Config"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass Config:\n    x: int = 1\n",
            "lacks frozen=True",
        ),
        (textwrap.dedent(GOOD).replace("def build", "def make"), "lacks a function named build"),
        ("import not_on_this_machine", "needs the module 'not_on_this_machine', which is missing"),
        ("x = 1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def build(:\n", "cannot be imported: SyntaxError"),
    ],
)
def test_a_users_module_without_a_part_is_refused_with_the_part(
    user_module: str, text: str, reason: str
) -> None:
    (Path(user_module) / "broken.py").write_text(text)
    assert reason in refusal("losses", f"{user_module}.broken")


def test_sections_and_tables_default_to_the_plug_ins_own_config(user_module: str) -> None:
    @dataclass(frozen=True)
    class Root:
        one: plugins.Plugin = plugins.section("losses", f"{user_module}.good", "one")
        many: tuple[plugins.Plugin, ...] = plugins.table("losses", (f"{user_module}.good",), "many")

    config = plugins.load("losses", f"{user_module}.good").Config()
    assert Root().one == plugins.Plugin(f"{user_module}.good", config)
    assert Root().many == (Root().one,)


@pytest.mark.parametrize("folder", ["models", "losses", "views/ops", "eval/tasks"])
def test_every_plug_in_of_tapct_loads_and_has_defaults(folder: str) -> None:
    for name in plugins.available(folder):
        module = plugins.load(folder, name)
        assert isinstance(module.Config(), module.Config)
