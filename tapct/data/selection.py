"""A selection of scans as one expression over columns of the manifest, for example
`spacing_z_mm <= 5 and kernel not in ['B70f']`.

The text is read by Python's parser and never evaluated: of its syntax only comparisons, `and`,
`or`, `not`, `in`, arithmetic and `known(COLUMN)` are translated, into an expression of Arrow. Every
name must be a column.

A number that no file gives (NaN) fails every comparison, and `not` makes that true: write
`known(age_years) and ...` where it matters.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.acero
import pyarrow.compute as pc

from tapct.base.exits import UserError
from tapct.data.manifest import Row

MOST_CHARACTERS = 4000
# paths name patients in some archives, and lists have no order to compare
_NOT_SELECTABLE = ("path", "label_path", "file_paths", "merged_labels", "origin_mm", "directions")
_TEXT, _NUMBER, _TRUTH = "text", "a number", "true or false"
_KINDS = {"str": _TEXT, "int": _NUMBER, "float": _NUMBER}
_COMPARE = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_ARITHMETIC = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide}
_Value: TypeAlias = tuple[Any, str]  # an expression of Arrow, or a constant, and its kind


def selectable() -> dict[str, str]:
    """Column -> kind of its values, of the columns that a selection may name."""
    return {
        field.name: _KINDS[str(field.type)]
        for field in dataclasses.fields(Row)
        if str(field.type) in _KINDS and field.name not in _NOT_SELECTABLE
    }


@dataclass(frozen=True)
class Condition:
    """One of the conditions that a selection joins by `and`.

    Args:
        text: its text.
        expression: its expression in Arrow.
    """

    text: str
    expression: pc.Expression


@dataclass(frozen=True)
class Selection:
    """A parsed selection.

    Args:
        text: text as it was written.
        columns: names of the columns that it reads, sorted.
        conditions: conditions that all must hold.
    """

    text: str
    columns: tuple[str, ...]
    conditions: tuple[Condition, ...]

    def apply(self, table: pa.Table) -> pa.Array:
        """Whether each row is selected: bool, without nulls.

        Args:
            table: table that has `columns`.
        """
        return self.apply_and_count(table)[0]

    def apply_and_count(self, table: pa.Table) -> tuple[pa.Array, list[str]]:
        """`apply`, and for several conditions the number of rows for which each of them holds,
        whatever the others do, as lines for people.
        """
        masks = [_mask(table, one.expression) for one in self.conditions]
        whole = reduce(pc.and_, masks)
        if len(masks) == 1:
            return whole, []
        lines = [
            f"  {num_true(mask)} of {len(table)} fulfil {one.text}"
            for mask, one in zip(masks, self.conditions, strict=True)
        ]
        return whole, lines


def parse(text: str, option: str) -> Selection:
    """Read a selection.

    Args:
        text: text, such as `spacing_z_mm <= 5 and kernel not in ['B70f']`.
        option: setting or option that gives it, for error lines.
    Raises:
        UserError: the text is no such expression, or names something that is no column.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{option} has {len(text)} characters, more than {MOST_CHARACTERS}; select with a "
            "shorter expression"
        )
    text = _one_line(text, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the parser below refuses it by name
            tree = ast.parse(text, mode="eval").body
        parser = _Parser(option, text)
        parts = [tree]
        if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And):
            parts = tree.values
        conditions = []
        for part in parts:
            expression, kind = parser.value(part)
            if kind != _TRUTH:
                raise parser.wrong(part, f"is {kind}, not a condition; compare it, e.g. with <= 5")
            conditions.append(Condition(parser.text_of(part), expression))
    except UserError:
        raise
    except SyntaxError as error:
        # ast names the place by line and column; a selection is one short line
        raise UserError(
            f"{option}: {_short(text)} is not an expression ({error.msg}); write e.g. "
            "\"spacing_z_mm <= 5 and kernel not in ['B70f']\""
        ) from None
    except (RecursionError, MemoryError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{option}: {_short(text)} cannot be read ({type(error).__name__}); write a shorter "
            "expression"
        ) from None
    if not parser.columns:
        raise UserError(f"{option}: {_short(text)} names no column, so it selects nothing")
    return Selection(text, tuple(sorted(parser.columns)), tuple(conditions))


def _one_line(text: str, option: str) -> str:
    """A selection that was written in several lines, as YAML allows, as one line."""
    text = text.strip()
    if "\n" not in text:
        return text
    if "#" in text:  # without its line end, a comment would hide all that follows
        raise UserError(
            f"{option}: {_short(text)} has several lines and a #, which begins a comment; write "
            "it without comments"
        )
    return " ".join(line.strip() for line in text.splitlines())


class _Parser:
    """Translates one tree; collects the columns that it names."""

    def __init__(self, option: str, text: str) -> None:
        self.option, self.text = option, text
        self.kinds = selectable()
        self.columns: set[str] = set()

    def text_of(self, node: ast.expr) -> str:
        """What was written for a node."""
        return ast.get_source_segment(self.text, node) or self.text

    def wrong(self, node: ast.expr, rule: str) -> UserError:
        """An error about a part of the text."""
        return UserError(f"{self.option}: {_short(self.text_of(node))} {rule}")

    def value(self, node: ast.expr) -> _Value:
        """The expression of a node and its kind."""
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.Name):
            return self.column(node)
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(one) for one in node.values]
            if isinstance(node.op, ast.And):
                return reduce(lambda left, right: left & right, parts), _TRUTH
            return reduce(lambda left, right: left | right, parts), _TRUTH
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.BinOp):
            return self.arithmetic(node)
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        if isinstance(node, ast.Call):
            return self.known(node)
        raise self.wrong(
            node,
            "is not allowed in a selection; it may have columns, numbers, text in quotes, "
            "comparisons, and, or, not, in [...], + - * / and known(COLUMN)",
        )

    def truth(self, node: ast.expr) -> Any:
        """The expression of a node that must be a condition."""
        expression, kind = self.value(node)
        if kind != _TRUTH:
            raise self.wrong(node, f"is {kind}, not a condition; compare it, e.g. with == or <=")
        return expression

    def constant(self, node: ast.Constant) -> _Value:
        """A number or text."""
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float, str)):
            raise self.wrong(node, "is neither a number nor text in quotes")
        if isinstance(node.value, str):
            return pc.scalar(node.value), _TEXT
        try:
            number = float(node.value)
        except OverflowError:  # of a whole number; 1e999 is infinite
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(node, "is too large a number")
        return pc.scalar(number), _NUMBER

    def column(self, node: ast.Name) -> _Value:
        """A column of the manifest."""
        if node.id not in self.kinds:
            near = difflib.get_close_matches(node.id, self.kinds, n=2, cutoff=0.5)
            guess = f"did you mean {' or '.join(near)}? " if near else ""
            if node.id in _NOT_SELECTABLE:
                guess = "it cannot be used here; "
            raise UserError(
                f"{self.option}: no column is named {node.id}; {guess}the columns are "
                f"{', '.join(self.kinds)}; text is written in quotes"
            )
        self.columns.add(node.id)
        kind = self.kinds[node.id]
        column = pc.field(node.id)
        return (column.cast(pa.float64()) if kind == _NUMBER else column), kind

    def unary(self, node: ast.UnaryOp) -> _Value:
        """`not`, and a sign before a number."""
        if isinstance(node.op, ast.Not):
            return ~self.truth(node.operand), _TRUTH
        if isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self.number(node.operand)
            return (pc.negate(value) if isinstance(node.op, ast.USub) else value), _NUMBER
        raise self.wrong(node, "is not allowed in a selection; write not")

    def arithmetic(self, node: ast.BinOp) -> _Value:
        """Two numbers joined by + - * or /."""
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            word = "and" if isinstance(node.op, ast.BitAnd) else "or"
            raise self.wrong(node, f"joins two parts by a sign; write {word}")
        if type(node.op) not in _ARITHMETIC:
            raise self.wrong(node, "has a sign that a selection does not know; it knows + - * /")
        left, right = self.number(node.left), self.number(node.right)
        return _ARITHMETIC[type(node.op)](left, right), _NUMBER

    def number(self, node: ast.expr) -> Any:
        """The expression of a node that must be a number."""
        expression, kind = self.value(node)
        if kind != _NUMBER:
            raise self.wrong(node, f"is {kind}, and a number is needed here")
        return expression

    def comparison(self, node: ast.Compare) -> _Value:
        """One comparison or several, as in `1 <= spacing_z_mm <= 5`."""
        parts = []
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, (ast.In, ast.NotIn)):
                found = self.membership(left, right)
                parts.append(~found if isinstance(operator, ast.NotIn) else found)
            elif type(operator) in _COMPARE:
                parts.append(self.compared(node, left, operator, right))
            else:
                raise self.wrong(node, "compares with is; write == or !=")
            left = right
        return reduce(lambda a, b: a & b, parts), _TRUTH

    def compared(self, node: ast.expr, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Any:
        """One comparison of two values of one kind."""
        (one, kind), (other, other_kind) = self.value(left), self.value(right)
        if kind != other_kind or kind == _TRUTH:
            raise self.wrong(
                node,
                f"compares {kind} with {other_kind}; text is written in quotes, a number without",
            )
        return _COMPARE[type(operator)](one, other)

    def membership(self, left: ast.expr, right: ast.expr) -> Any:
        """`COLUMN in ['a', 'b']`, and `'mark' in marks`."""
        if isinstance(right, ast.Name):
            mark, kind = self.value(left)
            column, column_kind = self.column(right)
            if not isinstance(left, ast.Constant) or kind != _TEXT or column_kind != _TEXT:
                raise self.wrong(left, f"must be text in quotes where it is searched in {right.id}")
            return self.contains(column, right.id, str(left.value))
        if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            raise self.wrong(right, "is no list; write e.g. kernel in ['B30f', 'B40f']")
        value, kind = self.value(left)
        constants = [self._plain(one, kind) for one in right.elts]
        if not constants:
            raise self.wrong(right, "is an empty list, in which nothing is")
        arrow_type = pa.string() if kind == _TEXT else pa.float64()
        return pc.is_in(value, options=pc.SetLookupOptions(pa.array(constants, arrow_type)))

    def _plain(self, node: ast.expr, kind: str) -> str | float:
        """A constant of a list."""
        sign = 1.0
        signs = {ast.UAdd: 1.0, ast.USub: -1.0}
        if kind == _NUMBER and isinstance(node, ast.UnaryOp) and type(node.op) in signs:
            sign, node = signs[type(node.op)], node.operand
        if not isinstance(node, ast.Constant) or self.constant(node)[1] != kind:
            raise self.wrong(node, f"stands in a list whose values must be {kind}")
        if kind == _TEXT:
            return node.value  # type: ignore[return-value]
        return sign * float(node.value)  # type: ignore[arg-type]

    @staticmethod
    def contains(column: Any, name: str, text: str) -> Any:
        """Whether a column has a text: as one of the codes of `marks`, else anywhere in it."""
        if name != "marks":
            return pc.match_substring(column, text)
        return pc.match_substring_regex(column, f"(^|,){re.escape(text)}(,|$)")

    def known(self, node: ast.Call) -> _Value:
        """`known(COLUMN)`: whether the value of a scan in this column is known."""
        is_known = isinstance(node.func, ast.Name) and node.func.id == "known"
        if not is_known or node.keywords or len(node.args) != 1:
            raise self.wrong(
                node, "is not allowed in a selection; the only function is known(COLUMN)"
            )
        if not isinstance(node.args[0], ast.Name):
            raise self.wrong(node, "must name one column")
        column, kind = self.column(node.args[0])
        if kind == _TEXT:
            return pc.not_equal(column, pc.scalar("")), _TRUTH
        return ~pc.is_nan(column), _TRUTH


def num_true(mask: pa.Array) -> int:
    """Number of rows at which a mask is true."""
    return int(pc.sum(mask).as_py() or 0)


def _mask(table: pa.Table, expression: pc.Expression) -> pa.Array:
    """Rows for which an expression holds; a null counts as no."""
    projected = pa.acero.Declaration.from_sequence(
        [
            pa.acero.Declaration("table_source", pa.acero.TableSourceNodeOptions(table)),
            pa.acero.Declaration("project", pa.acero.ProjectNodeOptions([expression], ["chosen"])),
        ]
    ).to_table(use_threads=False)
    return pc.fill_null(projected.column("chosen"), False).combine_chunks()


def _short(text: str) -> str:
    """A text for an error line."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= 120 else f"'{line[:117]}...'"
