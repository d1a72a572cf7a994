"""A quantized model in a package: its checkpoint, and what is kept beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgptq_export.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from mgptq_export.golden import make_golden
from mgptq_export.history import History
from mgptq_export.layouts import LAYOUTS, Calibration, Layout
from mgptq_export.manifest import verify_files
from mgptq_export.models import SourceModel
from mgptq_export.quantize import Repairs
from mgptq_export.recipe import Recipe
from mgptq_runtime.golden import GoldenVectors, read_golden, write_golden
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["Solved", "read_solved", "save_solved", "top_folder", "verified_checkpoint"]

GOLDEN_FILE = "golden.npz"


@dataclass(frozen=True)
class Solved:
    """A quantized model in one layout, on disk."""

    layout: Layout
    checkpoint: Checkpoint
    golden: GoldenVectors
    history: History

    @property
    def recipe(self) -> dict[str, Any]:
        """What it was asked for, as JSON values; older checkpoints lack some."""
        return self.checkpoint.config["quantization_config"]["recipe"]  # type: ignore[no-any-return]

    @property
    def made_with(self) -> dict[str, Any]:
        """``threads``, ``calibration_sequences``, ``calibration_sha256``, None where that was no text file,
        ``tokens_at_once``, None where no ``--max-memory`` made them fewer, and ``processes``.

        Older checkpoints lack some.
        """
        return self.checkpoint.config["quantization_config"].get("made_with", {})  # type: ignore[no-any-return]


def save_solved(
    folder: Path,
    layout: Layout,
    model: QuantizedModel,
    source: SourceModel,
    recipe: Recipe,
    calibration: Calibration,
    repairs: Repairs,
    history: History,
) -> Solved:
    """Write a quantized model into a package's folder, for :func:`mgptq_export.packaging.write_targets` to export.

    Args:
        folder: of the package, which holds no model of this layout.
        source: holds the weights of ``model``, dequantized.
        recipe: what ``model`` was made by.
        calibration: what it was made with; of its tokens golden vectors are made.
        repairs: what had to be mended, for the manifest.
        history: what was found on the way, for the report.
    """
    checkpoint = write_checkpoint(
        folder / layout.folder,
        model,
        name=source.name,
        config=source.config,
        recipe={**recipe.to_json(), "calibration": calibration.text_name},
        repairs=repairs,
        origin=source.origin,
        made_with={
            "threads": torch.get_num_threads(),
            "calibration_sequences": len(calibration.tokens),
            "calibration_sha256": calibration.text_sha256,
            "tokens_at_once": source.tokens_at_once,
            "processes": source.world.size,
        },
        tokenizer_folder=source.tokenizer_folder,
    )
    golden = make_golden(source.model, calibration.tokens)
    write_golden(folder / layout.folder / GOLDEN_FILE, golden)
    history.write(folder / layout.folder)
    return Solved(layout, checkpoint, golden, history)


def read_solved(package: Path, manifest: Mapping[str, Any]) -> list[Solved]:
    """The quantized models of a package.

    Raises:
        PackageError: a file is missing or changed.
    """
    return [
        Solved(
            layout,
            verified_checkpoint(package, manifest, layout),
            read_golden(package / layout.folder / GOLDEN_FILE),
            History.read(package / layout.folder),
        )
        for layout in LAYOUTS.values()
        if layout.name in manifest["layouts"]
    ]


def verified_checkpoint(package: Path, manifest: Mapping[str, Any], layout: Layout) -> Checkpoint:
    """A checkpoint of a package, its files being those that the manifest lists.

    Raises:
        PackageError: a file is missing or changed.
    """
    verify_files(package, [file for file in manifest["files"] if top_folder(file) == layout.folder])
    return read_checkpoint(package / layout.folder)


def top_folder(file: Mapping[str, Any]) -> str:
    """The first part of a file's path in the package."""
    return file["path"].split("/")[0]
