"""The programs of docs/shipping.md run as they are printed."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from pages import blocks, page

from mgptq_export import pipeline
from mgptq_export.recipe import Recipe

PROGRAMS = blocks(page("docs/shipping.md"), "python")
RECIPE = Recipe(bits=4.5, allocator="uniform", samples=2, sequence_length=32, sensitivity_samples=1, recovery_steps=0)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipping")
    model = tiny_models.write_model(folder / "model", "llama", intermediate_size=160, max_position_embeddings=512)
    pipeline.run(str(model), folder / "out", RECIPE, ["onnx", "llama.cpp"])
    return folder / "out"


@pytest.mark.parametrize(("library", "folder"), [("onnxruntime_genai", "onnx"), ("xllamacpp", "llama.cpp")])
def test_the_program_answers(package: Path, library: str, folder: str) -> None:
    (program,) = [program for program in PROGRAMS if f"import {library}" in program]
    command = [sys.executable, "-c", program, str(package / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
