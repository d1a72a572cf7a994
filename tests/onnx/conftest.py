"""Packages that the ONNX tests share; each is exported once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from llama_oracle import llama_config, oracle_logits
from reproducible import _exact_products, _one_thread  # noqa: F401
from synthetic import random_llama

from mgptq_export.checkpoint import Checkpoint, write_checkpoint
from mgptq_export.targets.onnx import export_onnx
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.quantized_model import QuantizedModel

# hidden 96, intermediate 200 and vocabulary 301 fill no whole blocks of 64.
MODELS = {
    "tied": {"seed": 0},
    "odd": {"seed": 1, "hidden": 96, "intermediate": 200, "heads": 6, "kv_heads": 3, "vocabulary": 301, "tied": False},
}


@dataclass(frozen=True)
class Exported:
    """A synthetic model, its checkpoint and its package."""

    checkpoint: Checkpoint
    folder: Path

    @property
    def model(self) -> QuantizedModel:
        return self.checkpoint.model

    @cached_property
    def token_ids(self) -> np.ndarray:
        return np.random.default_rng(7).integers(0, self.model.embedding.rows, (2, 40))

    @cached_property
    def oracle(self) -> np.ndarray:
        """Logits of transformers for ``token_ids``."""
        return oracle_logits(self.model, self.token_ids)


@pytest.fixture(scope="session")
def golden() -> GoldenVectors:
    shape = (1, 4, 3)
    return GoldenVectors(
        token_ids=np.zeros(shape[:2], np.int32),
        top_ids=np.zeros(shape, np.int32),
        top_logits=np.zeros(shape, np.float32),
        log_partition=np.zeros(shape[:2], np.float32),
        hidden_digests=np.zeros((3, 1, 8), np.float32),
    )


@pytest.fixture(scope="session", params=list(MODELS))
def exported(
    request: pytest.FixtureRequest, golden: GoldenVectors, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    model = random_llama(**MODELS[request.param])
    checkpoint = write_checkpoint(
        folder / "quantized", model, name="tiny", config=llama_config(model), recipe={}, tokenizer_folder=folder
    )
    export_onnx(checkpoint, golden, folder / "onnx")
    return Exported(checkpoint, folder / "onnx")
