"""From quantized models on disk to a whole package: exports, their check, model card, report and manifest."""

import importlib.metadata
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mgptq_export.layouts import COLUMNS
from mgptq_export.manifest import listed_files
from mgptq_export.report import CARD_FILE, REPORT_FILE, PackageContent, model_card, report_page
from mgptq_export.solved import Solved
from mgptq_export.targets import target_named
from mgptq_runtime.check import DEFAULT_BOUNDS, check_backend
from mgptq_runtime.errors import BudgetError
from mgptq_runtime.package import MANIFEST_FILE, MANIFEST_VERSION, open_package
from mgptq_runtime.progress import report, stage, track

__all__ = ["complete", "describe", "runs_on_backends", "versions", "write_targets"]

logger = logging.getLogger(__name__)

VERSIONED = (
    *("mgptq-export", "mgptq-runtime", "torch", "torch_geometric", "transformers", "numpy"),
    *("onnx", "onnxruntime", "gguf"),
)


def write_targets(folder: Path, solved: Sequence[Solved], targets: Sequence[str]) -> None:
    """Export what a package's folder holds in checkpoints; for :func:`complete` to make a package of.

    Raises:
        BudgetError: a model file is larger than the size that its recipe asks for.
    """
    if not targets:
        return
    by_layout = {one.layout.name: one for one in solved}
    with stage("export"), track("Exporting", len(targets)) as advance:
        for name in targets:
            target = target_named(name)
            one = by_layout[target.layout.name]
            target.write(one.checkpoint, one.golden, folder / target.path)
            _check_size(folder, name, one)
            advance()


def _check_size(folder: Path, name: str, solved: Solved) -> None:
    """Raise BudgetError where a target's model file is larger than its recipe's size."""
    size = solved.recipe.get("size")
    found = target_named(name).model_bytes(folder)
    if size is not None and found > size:
        raise BudgetError(
            f"the model file of target {name} takes {found} bytes, more than the {size} that the model was quantized "
            f"for; quantize it again with {name} among the --targets, or for a smaller --size"
        )


def complete(
    folder: Path,
    solved: Sequence[Solved],
    targets: Sequence[str],
    evaluating: Callable[[], dict[str, Any] | None] = lambda: None,
) -> dict[str, Any]:
    """Replay the golden vectors on all that a package's exports run on, and write what tells of its content.

    Args:
        targets: all that ``folder`` holds exports for.
        evaluating: see :func:`mgptq_export.pipeline.evaluate_package` for what it returns; None where there is no
            evaluation. It is called once the package can be opened.

    Returns:
        the manifest, which is written last; model card and report are made of it.
    """
    manifest = _manifest(solved, targets)
    _write_manifest(folder, manifest)
    manifest["check"]["results"] = _replayed(folder, targets)
    manifest["evaluation"] = evaluating()
    return describe(folder, solved, manifest)


def describe(folder: Path, solved: Sequence[Solved], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write model card and report of a package, and the manifest, which is returned with the files there are now."""
    contents = [PackageContent(one.layout, one.checkpoint, one.history) for one in solved]
    files = [one for one in listed_files(folder) if one["path"] not in (CARD_FILE, REPORT_FILE)]
    described = {**manifest, "files": files}
    (folder / CARD_FILE).write_text(model_card(described, contents), encoding="utf-8")
    (folder / REPORT_FILE).write_text(report_page(described, contents), encoding="utf-8")
    return _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest that lists what the folder now holds; it is returned."""
    whole = {**manifest, "files": listed_files(folder)}
    temporary = folder / f".{MANIFEST_FILE}"
    temporary.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST_FILE)
    return whole


def _replayed(folder: Path, targets: Sequence[str]) -> dict[str, Any]:
    """By what a package was run on, what the check found, as JSON values."""
    if not runs_on_backends(targets):
        return {}
    opened, results = open_package(folder), {}
    with stage("check"):
        for way in opened.ways():
            backend = opened.backend(way.backend, accuracy_level=way.accuracy_level, threads=torch.get_num_threads())
            golden, bounds = opened.golden(backend), opened.bounds(way.backend, way.accuracy_level)
            with track(f"Checking {way.name}", len(golden.token_ids)) as advance:
                results[way.name] = check_backend(backend, golden, bounds, advance).to_json()
            for failure in results[way.name]["failures"]:
                logger.warning("the check on %s failed: %s", way.name, failure)
        report(f"{sum(result['passed'] for result in results.values())} of {len(results)} passed")
    return results


def runs_on_backends(targets: Sequence[str]) -> bool:
    """Whether any of the exports is for the runtime's own backends."""
    return any(target_named(target).layout is COLUMNS for target in targets)


def _manifest(solved: Sequence[Solved], targets: Sequence[str]) -> dict[str, Any]:
    """All but the files and what is found out by running the exports."""
    first = solved[0].checkpoint
    return {
        "format_version": MANIFEST_VERSION,
        "name": first.name,
        "family": first.model.family,
        "origin": first.config["quantization_config"].get("origin", {}),
        "bits": _bits(solved[0]),
        "size": {"requested": solved[0].recipe.get("size")},
        "layouts": {one.layout.name: _layout_json(one) for one in solved},
        "targets": list(targets),
        "recipe": solved[0].recipe,
        "threads": solved[0].made_with.get("threads", torch.get_num_threads()),
        "calibration_sequences": solved[0].made_with.get("calibration_sequences"),
        "calibration_sha256": solved[0].made_with.get("calibration_sha256"),
        "tokens_at_once": solved[0].made_with.get("tokens_at_once"),
        "processes": solved[0].made_with.get("processes", 1),
        "versions": versions(),
        "check": {
            "bounds": {name: asdict(bounds) for name, bounds in DEFAULT_BOUNDS.items()},
            "results": {},
        },
        "evaluation": None,
    }


def _layout_json(solved: Solved) -> dict[str, Any]:
    repairs = solved.checkpoint.config["quantization_config"].get("repairs", {})
    return {
        "folder": solved.layout.folder,
        "bits": _bits(solved),
        "recovery_steps": solved.recipe.get("recovery_steps"),
        "repairs": repairs,
    }


def _bits(solved: Solved) -> dict[str, Any]:
    model = solved.checkpoint.model
    return {
        "requested": solved.recipe["bits"],
        "stored": model.bits_stored,
        "linear_weights": model.linear_weights,
        "weights_by_format": model.weights_by_format(),
        "tables": {
            table.name: {segment.format: table.rows * segment.columns for segment in table.segments}
            for table in model.tables()
        },
    }


def versions() -> dict[str, str]:
    """Of everything that has a part in what a package holds."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONED}}
