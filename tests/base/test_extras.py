"""Error messages name extras that exist, and packages that belong to them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tapct.base.extras import installing

ROOT = Path(__file__).parents[2]


def calls() -> list[tuple[str, str]]:
    """Extra and packages of every call of `installing` in tapct."""
    found = []
    for file in sorted((ROOT / "tapct").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "installing":
                found.append(tuple(ast.literal_eval(each) for each in node.args))
    return found


def test_every_message_names_an_extra_that_contains_its_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(calls()) > 5
    for extra, package in calls():
        listed = re.search(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
        assert listed is not None, extra
        assert f'"{package}>=' in listed[1], (extra, package)


def test_readme_lists_the_extras_of_the_messages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra, _ in calls():
        assert f"\n| `{extra}` |" in readme
        assert f"-e '.[{extra}]'" in installing(extra, "x")
