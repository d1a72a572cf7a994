"""Looking at a package."""

from collections import Counter
from pathlib import Path
from typing import Any

from mgptq_export.layouts import LAYOUTS
from mgptq_export.manifest import read_manifest
from mgptq_export.solved import verified_checkpoint
from mgptq_runtime.formats import FORMATS, GGML_FORMATS
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["inspect_package"]


def inspect_package(package: Path) -> dict[str, Any]:
    """What a package holds, as JSON values.

    Returns:
        ``manifest``; and ``layouts``: for every layout of weights in the package the ``formats`` in use and ``kinds``:
        for each kind of linear (``attn_q``, ...) and ``token_embd`` its weights, its stored bits per weight without
        permutations, and its weights by format, padding included.

    Raises:
        PackageError: no complete package.
    """
    manifest = read_manifest(package)
    layouts = {
        name: _kinds(verified_checkpoint(package, manifest, layout).model)
        for name, layout in LAYOUTS.items()
        if name in manifest["layouts"]
    }
    return {"manifest": manifest, "layouts": layouts}


def _kinds(model: QuantizedModel) -> dict[str, Any]:
    weights: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    by_format: dict[str, Counter[str]] = {}
    for linear in [*model.linears(), *model.tables()]:
        kind = linear.name.split(".")[-1]
        weights[kind] += linear.rows * linear.columns
        stored[kind] += linear.stored_bytes * 8
        for segment in linear.segments:
            by_format.setdefault(kind, Counter())[segment.format] += linear.rows * segment.columns
    used = [name for name in (*FORMATS, *GGML_FORMATS) if any(name in counts for counts in by_format.values())]
    kinds = {
        kind: {
            "weights": weights[kind],
            "bits_stored": stored[kind] / weights[kind],
            "weights_by_format": dict(by_format[kind]),
        }
        for kind in weights
    }
    return {"formats": used, "kinds": kinds}
