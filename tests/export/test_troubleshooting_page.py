"""docs/troubleshooting.md has a section for every error, and quotes only what the programs say. The code is trusted."""

import ast
import re
from collections.abc import Iterator

import pytest
from pages import ROOT, headings, page, section

from mgptq_runtime import errors

TEXT = page("docs/troubleshooting.md")
SECTIONS = [name.strip("`") for name in headings(TEXT) if name.startswith("`")]
SOURCES = [path for folder in ("mgptq_export", "runtime/mgptq_runtime") for path in (ROOT / folder).rglob("*.py")]
# The first cell of a row of a table.
QUOTES = re.findall(r"^\| `(.+?)` \|", TEXT, re.MULTILINE)


def texts() -> Iterator[str]:
    """Every string of the source code, what it fills in being an ellipsis."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def source_texts() -> list[str]:
    return list(texts())


def test_every_error_has_one_section_and_every_section_an_error():
    assert sorted(SECTIONS) == sorted(errors.__all__)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "MgptqError"])
def test_a_section_says_what_is_seen_and_the_way_out(name):
    rows = re.findall(r"^\| `.+?` \| (.+?) \|$", section(TEXT, f"`{name}`"), re.MULTILINE)
    assert rows and all(rows)


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_that_is_quoted_is_one_that_a_program_can_print(source_texts, quote):
    pattern = re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in source_texts)
