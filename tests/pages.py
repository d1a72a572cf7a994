"""The project's pages in Markdown: their sections, fenced blocks and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def page(name: str) -> str:
    """The text of a page, by its path from the root of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    """What the fenced blocks of a language hold; those that name none are commands."""
    return [content for found, content in BLOCK.findall(text) if found == language]


def headings(text: str) -> list[str]:
    """Of all levels, in their order."""
    return HEADING.findall(BLOCK.sub("", text))


def section(text: str, heading: str) -> str:
    """What stands under a heading of any level, up to the next heading outside fenced blocks."""
    start = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    assert start, f"no heading {heading!r}"
    rest = text[start.end() :]
    ends = [found.start() for found in HEADING.finditer(rest)]
    inside = [(found.start(), found.end()) for found in BLOCK.finditer(rest)]
    outside = [end for end in ends if not any(low <= end < high for low, high in inside)]
    return rest[: outside[0]] if outside else rest


def links(text: str) -> list[str]:
    """Targets of links that are no addresses."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}
