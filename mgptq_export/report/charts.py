"""The report's charts, as Vega-Lite specifications (https://vega.github.io/vega-lite/docs/spec.html).

Colours, fonts and background are the page's, see ``page.js``: they follow the reader's light or dark theme.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mgptq_export.report.content import PackageContent, allocation_rows, kinds_of, parts_in_bytes

__all__ = [
    "Spec",
    "allocation_chart",
    "bytes_chart",
    "front_chart",
    "layer_error_chart",
    "quality_chart",
    "recovery_chart",
    "trials_chart",
]

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
LAYER_HEIGHT, BAR_HEIGHT = 14, 28
QUALITY_TOOLTIP = [
    {"field": "perplexity", "format": ".3f"},
    {"field": "kl_divergence", "title": "KL divergence, nats", "format": ".4f"},
    {"field": "top1_agreement", "title": "same most likely token", "format": ".2%"},
]
LOSS_TITLES = {
    "estimated": "estimated loss, nats",
    "decisive": "loss that decided, nats",
    "measured": "loss measured in the trial, nats",
    "with_fewest_bits": "with the fewest bits, nats",
    "with_most_bits": "with the most bits, nats",
}


def allocation_chart(content: PackageContent) -> Spec:
    """Who got which bits: a row for every layer, a field for every linear, cut where the format changes."""
    kinds = kinds_of(content.checkpoint.model)
    rows = [
        {
            **row,
            "start": kinds.index(row["kind"]) + 0.96 * row["start"],
            "end": kinds.index(row["kind"]) + 0.96 * row["end"],
        }
        for row in allocation_rows(content)
    ]
    layers = len({row["layer"] for row in rows})
    formats = list(content.checkpoint.model.weights_by_format())
    names = "[" + ", ".join(f"'{kind}'" for kind in kinds) + "]"
    losses = [name for name in LOSS_TITLES if any(name in row for row in rows)]
    tooltip = [
        {"field": "linear", "title": "linear"},
        {"field": "columns", "title": "columns, as stored"},
        {"field": "format", "title": "format of these"},
        {"field": "bits", "title": "stored bits of the linear", "format": ".3f"},
        *({"field": name, "title": LOSS_TITLES[name], "format": ".3~g"} for name in losses),
    ]
    x_axis = {
        "title": None,
        "orient": "top",
        "values": [place + 0.48 for place in range(len(kinds))],
        "labelExpr": f"{names}[floor(datum.value)]",
        "labelAngle": -40,
        "labelAlign": "left",
        "grid": False,
        "ticks": False,
        "domain": False,
    }
    return _spec(
        rows,
        mark={"type": "rect"},
        height=LAYER_HEIGHT * layers,
        encoding={
            "x": {
                "field": "start",
                "type": "quantitative",
                "axis": x_axis,
                "scale": {"domain": [0, len(kinds)], "nice": False},
            },
            "x2": {"field": "end"},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelOverlap": True}},
            "color": {
                "field": "format",
                "type": "ordinal",
                "sort": formats,
                "scale": {"domain": formats},
                "legend": {"title": "format", "orient": "top"},
            },
            "tooltip": tooltip,
        },
    )


def bytes_chart(content: PackageContent, files: Mapping[str, int]) -> Spec:
    """Where the bytes go: a bar for every model file, its weights by part and all else it holds.

    Args:
        files: by target, what its model files take.
    """
    parts = parts_in_bytes(content.checkpoint.model)
    rows = []
    for target, size in files.items():
        rest = size - sum(parts.values())
        named = {**parts, "tokenizer and metadata": max(rest, 0)}
        rows += [
            {"target": target, "part": part, "bytes": count, "share": count / size, "order": place}
            for place, (part, count) in enumerate(named.items())
        ]
    return _spec(
        rows,
        mark={"type": "bar"},
        height=BAR_HEIGHT * len(files),
        transform=[{"calculate": "datum.bytes / 1e6", "as": "megabytes"}],
        encoding={
            "x": {"field": "megabytes", "type": "quantitative", "title": "MB", "stack": "zero"},
            "y": {"field": "target", "type": "nominal", "title": None},
            "color": {
                "field": "part",
                "type": "nominal",
                "sort": None,
                "legend": {"title": None, "orient": "top", "columns": 2},
            },
            "order": {"field": "order"},
            "tooltip": [
                {"field": "part", "title": "part"},
                {"field": "bytes", "title": "bytes", "format": ","},
                {"field": "share", "title": "of the file", "format": ".1%"},
            ],
        },
    )


def quality_chart(results: Mapping[str, Mapping[str, float]]) -> Spec:
    """Perplexity of the original and of everything that was made of it."""
    rows = [{"name": name, **quality} for name, quality in results.items()]
    return _spec(
        rows,
        mark={"type": "bar"},
        height=BAR_HEIGHT * len(rows),
        encoding={
            "x": {"field": "perplexity", "type": "quantitative", "title": "perplexity, less is better"},
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None},
            "tooltip": [{"field": "name", "title": "computed by"}, *QUALITY_TOOLTIP],
        },
    )


def layer_error_chart(content: PackageContent) -> Spec:
    """How far each layer's output is from the original's, before recovery and after."""
    series = {"solved": content.history.errors_solved, "recovered": content.history.errors_recovered}
    rows = [
        {"layer": layer, "model": name, "error": error}
        for name, errors in series.items()
        for layer, error in enumerate(errors)
    ]
    return _lines(rows, "layer", "layer", "error", "relative error of the layer's output", "model", ".2%")


def front_chart(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Perplexity against size, of everything that a sweep has measured."""
    fields = ("name", "stored_bits", "bytes", "perplexity", "kl_divergence", "top1_agreement", "pareto")
    kinds = {"quantized": "quantized here", "original": "the original, float16", "against": "other programs"}
    points = [{name: row[name] for name in fields} | {"kind": kinds[row["kind"]]} for row in rows]
    for point, row in zip(points, rows, strict=True):
        point["series"] = f"{point['kind']}, {row['layout']} layout" if row["layout"] else point["kind"]
    spec = _spec(points)
    logarithmic = {"type": "log", "nice": False, "padding": 24}
    encoding = {
        "x": {"field": "megabytes", "type": "quantitative", "title": "MB", "scale": logarithmic},
        "y": {"field": "perplexity", "type": "quantitative", "title": "perplexity", "scale": logarithmic},
    }
    series = list(dict.fromkeys(point["series"] for point in points))
    by_series = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": series},
        "legend": {"title": None, "orient": "top", "columns": 1},
    }
    filled = {"test": "datum.pareto", **by_series}
    point = {
        "mark": {"type": "point", "size": 110, "opacity": 1},
        "encoding": {
            **encoding,
            "color": by_series,
            "shape": by_series,
            "fill": {"condition": filled, "value": "transparent"},
            "tooltip": [
                {"field": "name", "title": "model"},
                {"field": "stored_bits", "title": "stored bits", "format": ".4f"},
                {"field": "bytes", "format": ","},
                *QUALITY_TOOLTIP,
            ],
        },
    }
    names = {"mark": {"type": "text", "dy": -13}, "encoding": {**encoding, "text": {"field": "name"}}}
    line = {
        "transform": [{"filter": "datum.kind === 'quantized here'"}],
        "mark": {"type": "line", "opacity": 0.5},
        "encoding": {**encoding, "color": by_series},
    }
    return spec | {
        "height": 380,
        "transform": [{"calculate": "datum.bytes / 1e6", "as": "megabytes"}],
        "layer": [line, point, names],
    }


def trials_chart(divergences: Sequence[float]) -> Spec:
    """What the allocator's trials lost."""
    rows = [{"trial": str(number + 1), "divergence": value} for number, value in enumerate(divergences)]
    return _spec(
        rows,
        mark={"type": "bar"},
        height=BAR_HEIGHT * len(rows),
        encoding={
            "x": {"field": "divergence", "type": "quantitative", "title": "KL divergence, nats per token"},
            "y": {"field": "trial", "type": "ordinal", "title": "trial", "sort": None},
            "tooltip": [{"field": "trial"}, {"field": "divergence", "title": "KL divergence", "format": ".4f"}],
        },
    )


def recovery_chart(divergences: Sequence[float]) -> Spec:
    """The loss along recovery, step by step."""
    rows = [{"step": step, "divergence": value, "loss": "each step"} for step, value in enumerate(divergences)]
    return _lines(rows, "step", "step", "divergence", "KL divergence, nats per token", "loss", ".4f", legend=False)


def _lines(
    rows: list[dict[str, Any]], x: str, x_title: str, y: str, y_title: str, series: str, fmt: str, legend: bool = True
) -> Spec:
    shown = {"title": None, "orient": "top"} if legend else None
    by_series = {"field": series, "type": "nominal", "sort": None, "legend": shown}
    return _spec(
        rows,
        mark={"type": "line", "point": len(rows) < 120},
        height=220,
        encoding={
            "x": {"field": x, "type": "quantitative", "title": x_title, "axis": {"format": "d", "tickMinStep": 1}},
            "y": {
                "field": y,
                "type": "quantitative",
                "title": y_title,
                "axis": {"format": "~%" if "%" in fmt else "~g"},
            },
            "color": by_series,
            "strokeDash": by_series,
            "tooltip": [
                {"field": series, "title": series},
                {"field": x},
                {"field": y, "title": y_title, "format": fmt},
            ],
        },
    )


def _spec(rows: list[dict[str, Any]], **others: Any) -> Spec:
    return {
        "$schema": SCHEMA,
        "width": "container",
        "data": {"values": [_rounded(row) for row in rows]},
        **others,
    }


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Digits that nobody sees would be most of the page."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
