"""docs/notes.md: every row leads to a function that names it, to a test and to a command that parses."""

import ast
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import ROOT, command_problems, split

PAGE = ROOT / "docs" / "notes.md"
NUMBERED = {
    *(f"1.{number}" for number in range(1, 18)),
    *(f"Remark {number}" for number in range(1, 5)),
    *(
        "Key Idea 1",
        "Proposition 1",
        "Algorithm 1",
        "Summary 1",
        "Summary 2",
        "Figure 1",
        "Figure 2",
        "Figure 3",
        "Figure 4",
        "Figure 5",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; the cells without their backticks, empty where there is nothing to see."""

    notes: str
    code: str
    test: str
    command: str


def rows(text: str) -> list[Row]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert all(len(row) == 5 for row in cells), [row for row in cells if len(row) != 5]
    return [Row(notes=row[0], code=row[2], test=row[3], command=row[4]) for row in cells]


ROWS = rows(PAGE.read_text(encoding="utf-8"))


def thing(name: str) -> Any:
    """What a dotted name stands for: a class or function of a module, or a method."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            found = import_module(".".join(("kinoflow", *parts[:end])))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


def names(label: str, text: str) -> bool:
    """Whether a docstring names this equation, algorithm, figure or section, in any case."""
    number = re.escape(label.removeprefix("Section "))
    return re.search(rf"(?<![\w.]){number}(?![\w]|\.\d)", text, re.IGNORECASE) is not None


def found_tests(path: Path) -> set[str]:
    """The tests that pytest finds in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in found if name.startswith("test_")} if path.name.startswith("test_") else set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.notes} {row.code}")
def test_a_row_leads_to_code_that_names_it(row: Row) -> None:
    assert names(row.notes, thing(row.code).__doc__), f"the docstring of {row.code} does not name {row.notes}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.notes} {row.code}")
def test_a_row_leads_to_a_test(row: Row) -> None:
    path, _, name = row.test.partition("::")
    assert name in found_tests(ROOT / path)


@pytest.mark.parametrize("row", [row for row in ROWS if row.command], ids=lambda row: row.command)
def test_a_command_parses(row: Row) -> None:
    assert [problem for words in split(row.command) for problem in command_problems(words)] == []


def test_every_number_of_the_notes_has_a_row() -> None:
    assert {row.notes for row in ROWS if not row.notes.startswith("Section")} >= NUMBERED


def test_tests_that_the_text_names_exist() -> None:
    text = re.sub(r"^\|.*", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", text)
    assert named
    for path, name in named:
        assert (ROOT / path).is_file() and (not name or name in found_tests(ROOT / path)), f"{path} {name}"


def test_wrong_rows_are_caught() -> None:
    """The tests above can fail."""
    for wrong in ("sample.guidance.gude", "sample.guidence.guide", "guide"):
        with pytest.raises(AttributeError):
            thing(wrong)
    assert names("1.1", "as (1.1) and (1.2) have it") and not names("1.1", "(1.11), 1.1.2 and 21.1")
    assert names("Figure 3", "(figure 3)") and not names("Figure 3", "figure 31")
    assert names("Section 1.1.2", "section 1.1.2 and") and not names("Section 1.1.2", "1.1.21")
    assert found_tests(ROOT / "tests" / "dit_video" / "mixture.py") == set()
