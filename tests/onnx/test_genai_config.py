"""What genai is told of a model's own settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import random_llama

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.targets.onnx.genai_config import complete_genai_config
from mgptq_runtime.errors import PackageError

BUILDER = {
    "model": {"context_length": 131072, "eos_token_id": 7, "type": "guessed", "vocab_size": 512},
    "search": {"do_sample": False, "max_length": 131072, "top_k": 50, "num_beams": 1},
}


def completed(folder: Path, generation: dict[str, Any] | None, **config: Any) -> dict[str, Any]:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return complete_genai_config(BUILDER, Checkpoint(folder, random_llama(), {"model_type": "gemma3_text", **config}))


def test_every_end_token_of_the_models_files_ends_a_text(tmp_path: Path) -> None:
    config = completed(tmp_path, {"eos_token_id": [1, 106]}, eos_token_id=1)
    assert config["model"]["eos_token_id"] == [1, 106, 7]


def test_an_end_token_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    assert completed(tmp_path, {"eos_token_id": [1, 512]})["model"]["eos_token_id"] == [1, 7]


def test_one_end_token_is_no_list(tmp_path: Path) -> None:
    assert completed(tmp_path, None, eos_token_id=[7])["model"]["eos_token_id"] == 7


def test_models_search_defaults_hold(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    search = completed(tmp_path, generation)["search"]
    assert search == {**generation, "num_beams": 1, "max_length": 2048}


def test_type_is_the_models_and_the_context_stays(tmp_path: Path) -> None:
    model = completed(tmp_path, None)["model"]
    assert (model["type"], model["context_length"]) == ("gemma3_text", 131072)
    assert BUILDER["model"]["type"] == "guessed"


def test_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(PackageError, match="generation_config"):
        completed(tmp_path, None)
