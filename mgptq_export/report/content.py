"""What a report is made of: a checkpoint and its history, in the shapes that charts and tables want."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.history import History
from mgptq_export.layouts import Layout
from mgptq_runtime.formats import FORMATS, GGML_FORMATS
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel

__all__ = ["PackageContent", "allocation_rows", "kinds_of", "parts_in_bytes"]

LOSS_FIELDS = ("estimated", "decisive", "measured", "with_fewest_bits", "with_most_bits")


@dataclass(frozen=True)
class PackageContent:
    """One layout of weights in a package, and how it came about."""

    layout: Layout
    checkpoint: Checkpoint
    history: History


def kinds_of(model: QuantizedModel) -> list[str]:
    """What linears there are in a layer, in forward order: ``attn_q``, ..."""
    return list(dict.fromkeys(linear.name.split(".")[-1] for linear in model.linears()))


def allocation_rows(content: PackageContent) -> Iterator[dict[str, Any]]:
    """A row for every run of columns of one format, along every linear.

    ``start`` and ``end`` are shares of the linear's columns, ``bits`` are stored per weight of the whole linear, losses
    are those of :func:`mgptq_export.allocation.decision.losses_of_linears`.
    """
    for linear in content.checkpoint.model.linears():
        _, layer, kind = linear.name.split(".")
        losses = content.history.losses.get(linear.name, {})
        covered, start = sum(segment.columns for segment in linear.segments), 0
        for segment in linear.segments:
            end = start + segment.columns
            yield {
                "linear": linear.name,
                "layer": int(layer),
                "kind": kind,
                "format": segment.format,
                "columns": f"{start} to {min(end, linear.columns) - 1}",
                "start": start / covered,
                "end": end / covered,
                "bits": linear.stored_bytes * 8 / (linear.rows * linear.columns),
                **{name: losses[name] for name in LOSS_FIELDS if name in losses},
            }
            start = end


def parts_in_bytes(model: QuantizedModel) -> dict[str, int]:
    """What the weights take, by part: codes and scales of linears, permutations, embedding and head, all else."""
    parts: Counter[str] = Counter()
    for linear in model.linears():
        codes = _code_bytes(linear)
        parts["codes of linears"] += codes
        parts["scales of linears"] += linear.stored_bytes - codes
    parts["column orders"] = sum(group.permutation_bytes for group in model.groups)
    parts["embedding and head"] = sum(table.stored_bytes for table in model.tables())
    parts["norms and biases"] = sum(array.nbytes for array in model.tensors.values())
    return dict(parts)


def _code_bytes(linear: QuantizedLinear) -> int:
    """Without scales and minima; padding included."""
    total = 0.0
    for segment in linear.segments:
        levels = (FORMATS.get(segment.format) or GGML_FORMATS[segment.format]).levels
        total += linear.rows * segment.columns * (levels - 1).bit_length() / 8
    return int(total)
