"""Every family's package, from a quantized tiny model: torch on the dequantized weights is trusted."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import tiny_models
import torch
from transformers import PreTrainedTokenizerFast

from mgptq_export.checkpoint import write_checkpoint
from mgptq_export.models import load_source
from mgptq_export.quantize import quantize
from mgptq_export.recipe import Recipe
from mgptq_export.targets.onnx import export_onnx
from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.backends.onnx_backend import OnnxBackend
from mgptq_runtime.generate import generate_tokens
from mgptq_runtime.golden import GoldenVectors

pytestmark = pytest.mark.slow

RECIPE = Recipe(bits=3.0, allocator="hessian", samples=6, sequence_length=48, sensitivity_samples=2, recovery_steps=0)
VOCABULARY = tiny_models.COMMON["vocab_size"]

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny_models.FAMILIES},
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads of 24": ("llama", {"head_dim": 24}),
    "llama, linear": ("llama", {"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 4.0}}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                **PLAIN,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "phi3, window": (
        "phi3",
        {
            "rope_parameters": PLAIN,
            "partial_rotary_factor": 1.0,
            "sliding_window": 8,
            "original_max_position_embeddings": 256,
        },
    ),
}
# Up to here one set of frequencies rotates all tokens, whether they come one by one or at once.
UNIFORM_CONTEXT = {"phi3": 32}


@dataclass(frozen=True)
class Family:
    """A quantized tiny model, its oracle and its package."""

    name: str
    torch_model: Any
    numpy: NumpyBackend
    folder: Path

    @cached_property
    def exact(self) -> OnnxBackend:
        return OnnxBackend(self.folder, accuracy_level=0, threads=1)

    @cached_property
    def fast(self) -> OnnxBackend:
        return OnnxBackend(self.folder, threads=1)

    def oracle(self, token_ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.torch_model(torch.from_numpy(token_ids)).logits.numpy()


@pytest.fixture(scope="module", params=list(VARIANTS))
def family(request: pytest.FixtureRequest, golden: GoldenVectors, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, overrides = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("family")
    original = tiny_models.write_model(root / "original", name, **overrides)
    source = load_source(str(original))
    model = quantize(source, RECIPE).model
    config = json.loads((original / "config.json").read_text())
    checkpoint = write_checkpoint(
        root / "quantized", model, name=name, config=config, recipe={}, tokenizer_folder=original
    )
    export_onnx(checkpoint, golden, root / "onnx")
    return Family(request.param, source.model, NumpyBackend(model), root / "onnx")


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, VOCABULARY, (batch, length))


def in_steps(backend: Any, token_ids: np.ndarray) -> np.ndarray:
    cache = backend.new_cache(len(token_ids))
    return np.concatenate([backend.forward(step, cache) for step in np.split(token_ids, token_ids.shape[1], 1)], 1)


def greedy(backend: OnnxBackend, prompt: np.ndarray, count: int) -> list[int]:
    cache, found = backend.new_cache(), [int(token) for token in prompt]
    logits = backend.forward(prompt[None], cache)
    while len(found) < len(prompt) + count:
        found.append(int(logits[0, -1].argmax()))
        logits = backend.forward(np.array([found[-1:]]), cache)
    return found


@pytest.mark.parametrize("length", [5, 24, 60, 200])
def test_exact_logits_are_torchs_within_and_beyond_windows_and_short_contexts(family: Family, length: int) -> None:
    token_ids = tokens(2, length)
    expected = family.oracle(token_ids)
    found = family.exact.forward(token_ids, family.exact.new_cache(2))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_fast_logits_are_close_to_torchs(family: Family) -> None:
    token_ids = tokens(2, 60)
    p = torch.log_softmax(torch.from_numpy(family.oracle(token_ids)).double(), -1)
    q = torch.log_softmax(torch.from_numpy(family.fast.forward(token_ids, family.fast.new_cache(2))).double(), -1)
    assert (p.exp() * (p - q)).sum(-1).mean() <= 0.001


def test_steps_equal_the_whole_sequence(family: Family) -> None:
    token_ids = tokens(1, UNIFORM_CONTEXT.get(family.name, 100))
    expected = family.oracle(token_ids)
    assert np.abs(in_steps(family.exact, token_ids) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("length", [20, 31, 32, 33, 150])
def test_greedy_texts_are_those_of_transformers(family: Family, length: int) -> None:
    """Also where the text outgrows the short context, in its prompt or while it is written."""
    prompt, count = tokens(1, length), 20
    expected = family.torch_model.generate(
        torch.from_numpy(prompt), do_sample=False, max_new_tokens=count, eos_token_id=[]
    )
    for backend in (family.numpy, family.exact):
        found = generate_tokens(backend, prompt[0].tolist(), max_tokens=count)
        assert list(found) == expected[0, length:].tolist(), backend.name


def test_steps_equal_those_of_the_numpy_backend(family: Family) -> None:
    """Also where the frequencies change on the way: earlier keys keep their rotation in both."""
    token_ids = tokens(1, 100)
    expected = in_steps(family.numpy, token_ids)
    assert np.abs(in_steps(family.exact, token_ids) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_checker_passes(family: Family) -> None:
    onnx.checker.check_model(str(family.folder / "model.onnx"), full_check=True)


@pytest.mark.parametrize("length", [3, 9, 20, 40, 70])
def test_genai_generates_the_same_tokens(family: Family, length: int) -> None:
    (prompt,) = tokens(1, length)
    model = og.Model(str(family.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length + 24, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt[None].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    if len(found) < length + 24:
        # genai ends before an end token, which it does not return.
        found.append(tiny_models.COMMON["eos_token_id"])
    assert found == greedy(family.fast, prompt, len(found) - length)


def test_genai_reads_the_tokenizer_and_its_chat_template(family: Family) -> None:
    expected = PreTrainedTokenizerFast.from_pretrained(family.folder)
    messages = [{"role": "user", "content": "Hello, what is a quantized model?"}]
    tokenizer = og.Tokenizer(og.Model(str(family.folder)))
    text = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert text == expected.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(text).tolist() == expected(text).input_ids
