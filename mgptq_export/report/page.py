"""``report.html`` and ``sweep.html``: pages that need no network, made from the run's own records."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mgptq_export.report.charts import (
    Spec,
    allocation_chart,
    bytes_chart,
    front_chart,
    layer_error_chart,
    quality_chart,
    recovery_chart,
    trials_chart,
)
from mgptq_export.report.content import PackageContent
from mgptq_export.report.facts import flattered, float16_bytes, mended, model_bytes, verdict
from mgptq_export.targets import target_named
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["REPORT_FILE", "report_page", "sweep_page"]

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Figure:
    """A chart with what is said of it.

    Attributes:
        id: of its element in the page.
        title, text: above and below it; ``text`` says what is to be seen, for those who cannot see it, too.
        spec: of the chart.
    """

    id: str
    title: str
    text: str
    spec: Spec

    @property
    def columns(self) -> list[str]:
        """Of the table of its numbers."""
        return list(dict.fromkeys(name for row in self.spec["data"]["values"] for name in row))

    @property
    def rows(self) -> list[list[Any]]:
        """Of the table of its numbers."""
        return [[row.get(name, "") for name in self.columns] for row in self.spec["data"]["values"]]


def report_page(manifest: Mapping[str, Any], contents: Sequence[PackageContent]) -> str:
    """The page of a package.

    Args:
        manifest: as it will be written, the files so far included.
        contents: of every layout of weights in the package.

    Returns:
        HTML. All that comes from a model's own files is escaped.
    """
    return _rendered(
        "package.html.j2",
        list(_figures(manifest, contents)),
        manifest=manifest,
        verdict=verdict(manifest),
        float16_bytes=float16_bytes(contents[0].checkpoint.model),
        model_bytes=model_bytes(manifest),
        warnings=list(_warnings(manifest)),
    )


def sweep_page(swept: Mapping[str, Any]) -> str:
    """The page of a sweep, HTML: perplexity against size.

    Args:
        swept: see :func:`mgptq_export.sweep.sweep`.
    """
    return _rendered("sweep.html.j2", [_front_figure(swept["rows"])], swept=swept)


def _front_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    return Figure(
        "front",
        "What bytes buy",
        "Every point is a model, further left smaller and further down better; filled ones are on the Pareto front. "
        "The line leads along the budgets of one sweep.",
        front_chart(rows),
    )


def _rendered(template: str, figures: Sequence[Figure], **values: Any) -> str:
    charts = Markup(_inline_json({figure.id: figure.spec for figure in figures}))
    return (
        _environment().get_template(template).render(figures=figures, charts=charts, script=Markup(_script()), **values)
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mgptq_export.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["megabytes"] = lambda count: f"{count / 1e6:.1f} MB"
    return environment


def _inline_json(values: Any) -> str:
    """JSON that cannot end the element that holds it."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


@cache
def _script() -> str:
    """Vega-Lite and the page's own script, as one."""
    import vl_convert

    own = files("mgptq_export.report").joinpath("page.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(own).replace("</script", "<\\/script")


def _figures(manifest: Mapping[str, Any], contents: Sequence[PackageContent]) -> Iterator[Figure]:
    if manifest["evaluation"]:
        yield Figure(
            "quality",
            "How good it is",
            "Perplexity of the original and of what was made of it, on the same windows of the same text.",
            quality_chart(manifest["evaluation"]["results"]),
        )
    for rows in [content.history.sweep for content in contents if content.history.sweep][:1]:
        yield _front_figure(rows)
    for content in contents:
        yield from _layout_figures(manifest, content, f", {content.layout.name} layout" if len(contents) > 1 else "")


def _layout_figures(manifest: Mapping[str, Any], content: PackageContent, where: str) -> Iterator[Figure]:
    name, history = content.layout.name, content.history
    bits = manifest["layouts"][name]["bits"]["stored"]
    sizes = {target: size for target, size in model_bytes(manifest).items() if _is_of(target, content)}
    yield Figure(
        f"allocation-{name}",
        f"Who got which bits{where}",
        f"A row is a layer, a field in it a linear, cut where its format changes. {bits:.4f} bits are stored per "
        "weight; a linear that would lose more with fewer bits got more. Hover a field for its numbers. "
        f"Columns of embedding and head: {_table_columns(content.checkpoint.model)}.",
        allocation_chart(content),
    )
    if sizes:
        yield Figure(
            f"bytes-{name}",
            f"Where the bytes go{where}",
            "What each model file holds, by part.",
            bytes_chart(content, sizes),
        )
    if history.errors_solved:
        yield Figure(
            f"layers-{name}",
            f"How far each layer is from the original{where}",
            "Relative difference of the residual stream behind every layer, mean over calibration tokens: once solved, "
            "and after recovery, where there was any. Recovery trains the predictions, so layers may end further away.",
            layer_error_chart(content),
        )
    if history.trials:
        yield Figure(
            f"trials-{name}",
            f"What the allocator tried{where}",
            "KL divergence from the original of every trial, on the eighth of the calibration text that was held out, "
            "or on all of it where there are fewer than eight sequences; of the best one the assignment was taken, and "
            "where drift is corrected its matrices.",
            trials_chart(history.trials),
        )
    if history.recovery:
        yield Figure(
            f"recovery-{name}",
            f"Recovery, step by step{where}",
            "KL divergence from the original on each step's batch of text, before the step.",
            recovery_chart(history.recovery),
        )


def _table_columns(model: QuantizedModel) -> str:
    """Such as ``64 in b4, 512 in b3``; of an untied head, too."""
    told = [", ".join(f"{one.columns} in {one.format}" for one in table.segments) for table in model.tables()]
    return " and ".join(dict.fromkeys(told))


def _is_of(target: str, content: PackageContent) -> bool:
    return target_named(target).layout is content.layout


def _warnings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know before the package is shipped."""
    for label, result in manifest["check"]["results"].items():
        for failure in result["failures"]:
            yield f"The check on {label} failed: {failure}."
    if flattered(manifest):
        yield "It was evaluated on the text that it was calibrated on; on other text it is worse."
    for name, layout in manifest["layouts"].items():
        for phrase in mended(layout["repairs"]):
            yield f"{name} layout: {phrase}."
