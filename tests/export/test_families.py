"""Every family, calibrated and quantized, against transformers on the dequantized weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from mgptq_export.families import FAMILIES, family_of
from mgptq_export.models import load_source
from mgptq_export.quantize import quantize
from mgptq_export.recipe import Recipe
from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families import FAMILIES as RUNTIME_FAMILIES

RECIPE = Recipe(bits=3.0, allocator="hessian", samples=6, sequence_length=48, sensitivity_samples=2, recovery_steps=0)


def test_workstation_and_runtime_know_the_same_families() -> None:
    assert set(FAMILIES) == set(RUNTIME_FAMILIES) == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_numpy_backend_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    """Torch is trusted; prompts of 24 and of 60 tokens, shorter and longer than every window and short context."""
    source = load_source(str(tiny_models.write_model(tmp_path / family, family)))
    model = quantize(source, RECIPE).model
    backend = NumpyBackend(model)
    for length in (24, 60):
        tokens = torch.randint(331, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = source.model(tokens).logits.numpy()
        found = backend.forward(tokens.numpy(), backend.new_cache(2))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"rope_parameters": "yarn"}, "rotary parameters 'yarn'"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("phi3", {"sliding_window": 0}, "sliding_window 0"),
        ("gemma3", {"sliding_window": None}, "sliding_window"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "without sliding_attention"),
    ],
)
def test_broken_configurations_are_refused(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(tiny_models.COMMON | tiny_models.FAMILIES[family] | settings)
