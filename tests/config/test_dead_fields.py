"""No config field is dead: each is read by the code that it configures."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

from field_reads import config_classes, unread_fields

import tapct


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(tapct.__path__, "tapct.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def test_every_config_field_is_read() -> None:
    found = modules()
    assert len(config_classes(found)) >= 10
    assert unread_fields(found) == []


def unread_in(text: str, tmp_path: Path) -> list[str]:
    file = tmp_path / "sample.py"
    head = "from __future__ import annotations\nfrom dataclasses import dataclass, field, replace\n"
    file.write_text(head + "from tapct.config import setting\n" + textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location("sample", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module
    try:
        spec.loader.exec_module(module)
        return [name.removeprefix("sample.") for name in unread_fields([module])]
    finally:
        del sys.modules["sample"]


CONFIGS = """
    @dataclass(frozen=True)
    class Inner:
        weight: float = setting(1.0, "w")
        decay: float = setting(1.0, "d")

    @dataclass(frozen=True)
    class Config:
        weight: float = setting(1.0, "w")
        inner: Inner = field(default_factory=Inner)

        def __post_init__(self):
            assert self.weight > 0 and self.inner.decay > 0
"""


def test_a_field_is_not_alive_because_another_class_has_one_of_its_name(tmp_path: Path) -> None:
    assert unread_in(
        CONFIGS + "\n    def use(config: Config): return config.inner.weight\n", tmp_path
    ) == [
        "Inner.decay",
        "Config.weight",
    ]


def test_a_field_that_is_only_checked_is_dead(tmp_path: Path) -> None:
    assert unread_in(CONFIGS, tmp_path) == [
        "Inner.weight",
        "Inner.decay",
        "Config.weight",
        "Config.inner",
    ]


def test_a_field_that_is_only_written_is_dead(tmp_path: Path) -> None:
    code = (
        "\n    def use(config: Config): return replace(config, weight=2, "
        "inner=Inner(decay=3)).inner.weight\n"
    )
    assert unread_in(CONFIGS + code, tmp_path) == ["Inner.decay", "Config.weight"]


def test_reads_through_bases_heirs_and_protocols_count(tmp_path: Path) -> None:
    code = """
    from typing import Protocol

    class HasWeight(Protocol):
        weight: float
        inner: Inner

    @dataclass(frozen=True)
    class Heir(Inner):
        more: int = setting(1, "m")

    def use(some: HasWeight, inner: Inner): return some.weight, inner.decay
    """
    assert unread_in(CONFIGS + code, tmp_path) == [
        "Inner.weight",
        "Config.inner",
        "Heir.weight",
        "Heir.more",
    ]


def test_reads_are_found_by_many_ways(tmp_path: Path) -> None:
    code = """
    class Part:
        def __init__(self, config: Config | None, many: list[Inner]):
            self.own, self.many = config, many

        @property
        def first(self) -> Inner:
            return self.many[0]

        def one(self):
            return [entry.weight for entry in self.many]

        def two(self):
            return (lambda: self.first.decay)()

    def make() -> Part: ...

    def three():
        part = make()
        return part.own.weight
    """
    assert unread_in(CONFIGS + code, tmp_path) == ["Config.inner"]
