"""Plug-ins import one module of tapct, `tapct.extend`, and it names all that they may use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tapct import extend

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_docs_hold_an_example_of_every_kind_of_plugin() -> None:
    files = {example.splitlines()[0].removeprefix("# mylab/") for example in EXAMPLES}
    assert {name.partition("/")[0] for name in files} >= {"losses", "models", "ops", "tasks"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_an_example_imports_no_other_module_of_tapct(example: str) -> None:
    names = set()
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "tapct" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tapct":
            assert node.module == "tapct.extend"
            names |= {alias.name for alias in node.names}
    assert names and names <= set(extend.__all__)


def test_every_name_is_there_and_the_docstring_explains_it() -> None:
    assert sorted(set(extend.__all__)) == sorted(extend.__all__)
    public = {name for name in vars(extend) if not name.startswith("_")}
    assert public - {"annotations"} == set(extend.__all__)
    described = set(re.findall(r"`(\w+)`", extend.__doc__ or ""))
    assert set(extend.__all__) <= described
