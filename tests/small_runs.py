"""What the workstation's tests share: a recipe that takes a second, and what it is run on and makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import EntryNotFoundError

from mgptq_export import pipeline
from mgptq_export.models import SourceModel
from mgptq_export.quantize import Quantization
from mgptq_export.recipe import Recipe

# Whole blocks of 64 columns, and enough of them for a fine-grained budget.
EVEN = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}

RECIPE = Recipe(
    samples=4, own_samples=1, sequence_length=64, sensitivity_samples=2, trials=2, training_steps=3, recovery_steps=0
)


@dataclass(frozen=True)
class Quantized:
    """A model after :func:`mgptq_export.quantize.quantize`, which has replaced its weights."""

    source: SourceModel
    result: Quantization


@dataclass(frozen=True)
class Package:
    """A package with both targets, and the manifest that :func:`mgptq_export.pipeline.run` returned."""

    folder: Path
    manifest: dict[str, Any]
    model: Path
    text: pipeline.EvaluationText


def nothing_there(api: object, repository: str, name: str) -> NoReturn:
    """In the place of ``HfApi.hf_hub_download``: a repository without files."""
    raise EntryNotFoundError(f"{repository} has no {name}")
