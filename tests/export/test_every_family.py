"""Every family, from a Hugging Face folder and from a GGUF file, to every target, on every runtime.

One run of the pipeline each, and then only the files that it wrote. Torch on the dequantized weights is trusted.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest
import tiny_models
import torch
from gguf_model import write_gguf
from llama_cpp import LlamaModel, logits

from mgptq_export import pipeline
from mgptq_export.checkpoint import read_checkpoint
from mgptq_export.models import load_quantized_weights, load_source
from mgptq_export.recipe import Recipe
from mgptq_runtime.check import check_backend
from mgptq_runtime.package import open_package

pytestmark = pytest.mark.slow

TARGETS = ["container", "onnx", "llama.cpp"]
# Rows of 96 and 160 are no whole blocks of 64, so llama.cpp holds them in types of 4.5 bits and more.
RECIPE = Recipe(bits=4.5, allocator="hessian", samples=4, sequence_length=48, sensitivity_samples=2, recovery_steps=0)
SIZES = {"intermediate_size": 160}
TOKENS = torch.randint(3, 331, (1, 60), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Package:
    model: str
    folder: Path

    def oracle(self, layout: str) -> np.ndarray:
        """Logits of transformers on the weights of a layout's checkpoint: float32 [60, vocabulary]."""
        source = load_source(self.model)
        load_quantized_weights(source, read_checkpoint(self.folder / layout).model)
        with torch.no_grad():
            return source.model(TOKENS).logits[0].numpy()


@pytest.fixture(
    scope="module", params=[(f, kind) for f in tiny_models.FAMILIES for kind in ("folder", "gguf")], ids=str
)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    family, kind = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{kind}")
    model = tiny_models.write_model(folder / "model", family, **SIZES)
    if kind == "gguf":
        write_gguf(folder / "model.gguf", tiny_models.make_model(family, **SIZES), model)
        model = folder / "model.gguf"
    pipeline.run(str(model), folder / "out", RECIPE, TARGETS)
    return Package(str(model), folder / "out")


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL(expected || found) of logits."""
    a, b = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, found))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize(("backend", "level"), [("numpy", 4), ("onnx", 0)])
def test_exact_backends_compute_what_torch_computes(package: Package, backend: str, level: int) -> None:
    opened = open_package(package.folder).backend(backend, accuracy_level=level)
    found = opened.forward(TOKENS.numpy(), opened.new_cache())[0]
    expected = package.oracle("quantized")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("backend", "level"), [("numpy", 4), ("onnx", 0), ("onnx", 4)])
def test_the_check_passes(package: Package, backend: str, level: int) -> None:
    opened = open_package(package.folder)
    runtime = opened.backend(backend, accuracy_level=level)
    result = check_backend(runtime, opened.golden(runtime), opened.bounds(backend, level))
    assert result.passed, result


def test_genai_writes_what_the_onnx_backend_writes(package: Package) -> None:
    prompt = TOKENS[0, :8].tolist()
    model = onnxruntime_genai.Model(str(package.folder / "onnx"))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=28, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = list(generator.get_sequence(0))[len(prompt) :]
    backend = open_package(package.folder).backend("onnx")
    cache, ids = backend.new_cache(), np.array([prompt])
    for token in found:
        assert int(backend.forward(ids, cache)[0, -1].argmax()) == token
        ids = np.array([[token]])
    assert found


def test_llama_cpp_computes_what_torch_computes(package: Package) -> None:
    """Its activations are rounded to 8 bits; 60 tokens, in a context that holds no more than the short one of Phi-3."""
    (path,) = (package.folder / "llama.cpp").glob("*.gguf")
    with LlamaModel(path) as model:
        found = logits(model, TOKENS[0].tolist())
    assert divergence(package.oracle("quantized-tensors"), found) <= 0.01
