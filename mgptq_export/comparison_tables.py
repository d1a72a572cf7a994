"""What people see of a comparison of two packages."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mgptq_runtime.messages import printable

__all__ = ["comparison_tables"]

LINEARS_SHOWN = 10


def comparison_tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    """What :func:`mgptq_export.comparison.compare_packages` found, as rich renders it; part by part."""
    yield _sizes(found)
    differing = [(f"{what} {name}", one) for what in ("recipe", "versions") for name, one in found[what].items()]
    if differing:
        yield _table(
            "What differs", ("", "A", "B"), [(name, _json(one["a"]), _json(one["b"])) for name, one in differing]
        )
    for name, layout in found["layouts"].items():
        if allocation := layout.get("allocation"):
            yield from _allocation(name, allocation)
    yield from _quality(found["evaluation"])
    if found["perplexity"]:
        yield from _perplexity(found["perplexity"])
    if found["generation"]:
        yield from _generation(found["generation"])


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table of texts, in which nothing is markup: names, paths and texts are strangers'."""
    table = Table(*columns, title=Text(printable(title)))
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    return table


def _incomparable(what: str, section: dict[str, Any]) -> Text:
    return Text(printable(f"{what} cannot be compared: {section['reason']}"))


def _json(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _sizes(found: dict[str, Any]) -> Table:
    def size(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.2f} MB"

    sizes = found["sizes"]
    named = {**{f"{name} model file": one for name, one in sizes["targets"].items()}, "all files": sizes["files"]}
    rows = [(key, found["a"][key], found["b"][key]) for key in ("path", "name", "family")]
    rows += [(name, size(one["a"]), size(one["b"])) for name, one in named.items()]
    for name, layout in found["layouts"].items():
        asked, stored = layout["requested"], layout["stored"]
        rows.append((f"bits asked, {name} layout", _json(asked["a"]), _json(asked["b"])))
        rows.append((f"bits stored, {name} layout", _number(stored["a"]), _number(stored["b"])))
    return _table("Two packages", ("", "A", "B"), rows)


def _allocation(name: str, allocation: dict[str, Any]) -> Iterator[RenderableType]:
    if not allocation["comparable"]:
        yield _incomparable(f"Allocations of the {name} layout", allocation)
        return

    def row(what: str, one: dict[str, Any]) -> tuple[str, ...]:
        return what, _number(one["a"], 3), _number(one["b"], 3), f"{one['b'] - one['a']:+.3f}"

    columns = ("linear", "A", "B", "B - A")
    kinds = [row(kind, one) for kind, one in allocation["kinds"].items()]
    yield _table(f"Stored bits per weight, {name} layout", columns, kinds)
    differing = [row(one["name"], one) for one in allocation["linears"] if one["a"] != one["b"]]
    if differing:
        shown = differing[:LINEARS_SHOWN]
        yield _table(f"{len(shown)} of {len(differing)} linears that differ, most first", columns, shown)
    else:
        yield Text("every linear has the same stored bits in both")


def _quality(evaluation: dict[str, Any]) -> Iterator[RenderableType]:
    if not evaluation["comparable"]:
        yield _incomparable("Recorded quality", evaluation)
        return
    title = f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['window']} tokens, as recorded"
    rows = []
    for name, one in evaluation["results"].items():
        for side in ("a", "b"):
            found = one[side]
            numbers = _number(found["perplexity"], 3), _number(found["kl_divergence"]), f"{found['top1_agreement']:.2%}"
            rows.append((name, side.upper(), *numbers))
    yield _table(title, ("", "package", "perplexity", "KL divergence", "top-1 agreement"), rows)


def _perplexity(scored: dict[str, Any]) -> Iterator[RenderableType]:
    if not scored["comparable"]:
        yield _incomparable("Perplexity", scored)
        return
    title = f"{scored['text']}, {scored['windows']} windows of {scored['window']} tokens, {scored['backend']}"
    yield _table(title, ("", "A", "B"), [("perplexity", _number(scored["a"], 3), _number(scored["b"], 3))])


def _generation(generation: dict[str, Any]) -> Iterator[RenderableType]:
    if not generation["comparable"]:
        yield _incomparable("Generated texts", generation)
        return
    rows = []
    for one in generation["prompts"]:
        same, divergent = one["same_tokens"], one["first_divergent_token"]
        told = f"all {same}" if divergent is None else str(divergent)
        rows.append((one["prompt"], told, one["a"], "the same" if divergent is None else one["b"]))
    title = f"Greedy texts up to the first divergent token, at most {generation['tokens']}, {generation['backend']}"
    yield _table(title, ("prompt", "same tokens", "A", "B"), rows)
