"""Words and phrases that our prose does not use, each with what to write instead.

Pages, help texts and all Python files are checked with the same list. `findings` takes plain
text; `prose` cuts a Markdown page down to what is prose: code is left out, comments in command
examples are kept; `prose_of_code` does the same for a Python file.
"""

from __future__ import annotations

import ast
import re

# (regular expression, what to write instead); matched without regard to case
FORBIDDEN: tuple[tuple[str, str], ...] = (
    # one word per thing
    (r"\b(go|goes|going|went|gone) on\b", "resume, continue"),
    (r"\bjudg(e|es|ed|ing)\b", "evaluate, test, decide"),
    (r"\b(tell|tells|telling|told)\b", "print, report, log, show, distinguish"),
    (r"\b(says|saying|said)\b", "print, report, state, show"),
    (r"\bspeaks?\b", "print, report"),
    (r"\bnumbers? of gpus to\b|\bnumbers of (gpus|ranks)\b", "GPU counts, rank counts"),
    (r"\bas of sbatch\b", "passed to sbatch as --partition"),
    (r"\bshap(e|es|ed|ing) (\w+ )?(the |its |another )?curve\b", "affect training"),
    (r"\bgets? on\b", "make progress"),
    (r"\bnext move\b", "next step"),
    (r"\bpassed over\b", "skipped"),
    (r"\b(written|write|writes) aside\b", "written to a temporary folder and renamed"),
    (r"\bin (one|a) line\b", "with a one-line error or message"),
    (r"\bwithout a word\b|\blast word\b", "without a message, last report"),
    (r"\b(the|some|more) words (of|from|to)\b", "the arguments of, the settings of"),
    # idioms and old forms that a reader has to decode
    (r"\bat hand\b", "available"),
    (r"\bso many\b", "this number of"),
    (r"\bin vain\b", "without progress"),
    (r"\bfor ever\b", "permanently"),
    (r"\banew\b", "again"),
    (r"\bas ever\b", "as usual"),
    (r"\ball the same\b", "anyway"),
    (r"\bas (it|they) stands?\b", "unchanged"),
    (r"\bof (ours|yours|then|that day)\b", "our own, your own, at that time"),
    (r"\bsuch (an? )?one\b", "name the thing"),
    (r"\bsigns? of life\b", "shows that the run learns"),
    (r"\bwhat it is worth\b|\bworth (most|nothing)\b", "name the effect"),
    (r"\bnothing is to be\b|\bproves nothing\b", "does not show"),
    (r"\b(here|there|where)(in|of|from|upon)\b", "name the thing"),
)

_COMMENT = re.compile(r"(?:^|\s)#\s+(.*)$")
_GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*)"  # a phrase may be broken over two lines


def findings(text: str) -> list[str]:
    """Forbidden words in a text, e.g. "line 3: 'told': write print, report".

    Args:
        text: prose; what stands in backticks is code and is not checked.
    """
    without_code = re.sub(r"(`+)[^`]+?\1", lambda match: "\n" * match[0].count("\n") + "CODE", text)
    messages = []
    for pattern, better in FORBIDDEN:
        for match in re.finditer(pattern.replace(" ", _GAP), without_code, re.IGNORECASE):
            line = without_code.count("\n", 0, match.start()) + 1
            phrase = " ".join(match[0].split())
            messages.append((line, f"line {line}: {phrase!r}: write {better}"))
    return [message for _, message in sorted(messages)]


def prose(page: str) -> str:
    """A Markdown page without code; the number of its lines stays as it was.

    Fenced blocks are emptied, the comments of indented blocks stay, since they are prose.
    Link targets are cut.
    """
    lines, fenced = [], False
    for line in page.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            lines.append("")
        elif fenced:
            lines.append("")
        elif line.startswith("    "):
            comment = _COMMENT.search(line)
            lines.append(comment[1] if comment else "")
        else:
            lines.append(line)
    return re.sub(r"\]\([^)\s]*\)", "]", "\n".join(lines))


def prose_of_code(source: str) -> str:
    """What people read of a Python file: comments, docstrings, and names of classes and tests as
    words (a method such as `judge` may have to have its name); the numbers of lines stay.
    """
    comments = [_COMMENT.search(line) for line in source.split("\n")]
    lines = ["" if comment is None else f" {comment[1]}" for comment in comments]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef) or name.startswith("test_"):
            lines[node.lineno - 1] += f" {name.replace('_', ' ').strip()}"
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            for number, line in enumerate(ast.get_docstring(node, clean=False).splitlines()):
                lines[text.lineno - 1 + number] += f" {line.strip()}"
    return "\n".join(line.strip() for line in lines)
