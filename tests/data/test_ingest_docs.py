"""docs/ingest.md lists every reason, mark and threshold, and the test of each reason."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from reasons import PACKAGE, reasons_in_code
from torture_cases import CASES

from tapct.data.checks.check_rules import CheckRules

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent.parent / "docs" / "ingest.md"
CODE = re.compile(r"`([a-z][a-z0-9_]*)`")


def table(head: str) -> list[list[str]]:
    """Cells of the table whose first column has this head."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(f"| {head} |")
    lines = text[start : text.index("\n\n", start)].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_lists_exactly_the_reasons_of_the_code() -> None:
    listed = [code for row in table("reason") for code in CODE.findall(row[0])]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(reasons_in_code())


@pytest.mark.parametrize("row", table("reason"), ids=lambda row: row[0].strip("`"))
def test_the_named_test_mentions_the_reason(row: list[str]) -> None:
    reasons, _, next_step, tests = row
    assert next_step
    for reason in CODE.findall(reasons):
        named = re.findall(r"`([\w/]+\.py)`", tests)
        assert named, f"no test is named for {reason}"
        for name in named:
            text = (TESTS / name).read_text(encoding="utf-8")
            assert re.search(rf"\b{reason}\b", text), f"{name} does not mention {reason}"


def test_the_verdicts_of_the_torture_folder_are_listed() -> None:
    reasons = {code for row in table("reason") for code in CODE.findall(row[0])}
    marks = {code for row in table("mark") for code in CODE.findall(row[0])}
    for case in CASES:
        verdict, _, mark = case.verdict.partition(":")
        assert verdict in reasons | {"accepted"}, case
        assert mark in marks | {""}, case


def test_the_thresholds_are_listed_with_their_defaults() -> None:
    listed = {row[0].strip("`"): row[1] for row in table("rule")}
    defaults = {field.name: str(field.default) for field in dataclasses.fields(CheckRules)}
    assert listed == defaults


def test_every_threshold_is_read_by_a_check() -> None:
    read = {
        node.attr
        for file in (PACKAGE / "data" / "checks").glob("*_check.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert {field.name for field in dataclasses.fields(CheckRules)} <= read
