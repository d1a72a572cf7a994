"""What only a real model shows: sizes, quality, agreement of the runtimes and memory."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
import torch
from gguf_model import write_gguf
from llama_cpp import LlamaModel, logits

from mgptq_export.calibration import file_tokens
from mgptq_export.checkpoint import read_checkpoint
from mgptq_export.models import SourceModel, load_quantized_weights, load_source
from mgptq_export.planning import plan_model
from mgptq_export.recipe import Recipe
from mgptq_export.targets.onnx import read_onnx_weights
from mgptq_runtime.package import open_package
from mgptq_runtime.quantized_model import QuantizedModel

# A processor without fast bfloat16 takes four times as long as one with it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def dequantized(model: QuantizedModel) -> dict[str, np.ndarray]:
    tables = [linear for linear in (model.embedding, model.head) if linear is not None]
    return {linear.name: linear.dequantize() for linear in [*model.linears(), *tables]}


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "mgptq_runtime", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_delivers_the_bits_that_were_asked_for(manifest: dict[str, Any]) -> None:
    assert 2.45 < manifest["bits"]["stored"] <= 2.5
    assert manifest["bits"]["linear_weights"] == 106_168_320


def test_container_is_at_most_56_megabytes(package: Path) -> None:
    assert (package / "model.mgptq.gguf").stat().st_size <= 56_000_000


def test_weights_are_identical_in_checkpoint_container_and_onnx(package: Path) -> None:
    checkpoint = dequantized(read_checkpoint(package / "quantized").model)
    container = dequantized(open_package(package).container.model)
    onnx = read_onnx_weights(package / "onnx")
    assert container.keys() == checkpoint.keys() == onnx.keys() - {"output"}
    for name, weight in checkpoint.items():
        assert np.array_equal(container[name], weight), name
        assert np.array_equal(onnx[name], weight), name


def test_numpy_backend_computes_what_torch_computes(package: Path, smollm2: Path, held_out: Path) -> None:
    """Torch on the dequantized weights is trusted.

    On running text: behind random tokens, float32's own error alone can be as large as the bound.
    """
    source = load_source(str(smollm2))
    load_quantized_weights(source, read_checkpoint(package / "quantized").model)
    opened = open_package(package)
    backend = opened.backend("numpy")
    tokens = np.array(opened.tokenizer(backend).encode(held_out.read_text()[:5_000])[:256])[None]
    with torch.no_grad():
        expected = source.model(torch.from_numpy(tokens)).logits.numpy()
    found = backend.forward(tokens, backend.new_cache())
    assert np.abs(found - expected).max() <= 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_checks_pass_on_every_backend(package: Path) -> None:
    for level in ("4", "0"):
        result = json.loads(run("check", str(package), "--accuracy-level", level, "--json"))
        assert result["passed"]
        assert [row["backend"] for row in result["backends"]] == ["numpy", "onnx"]


def test_onnx_runtime_agrees_with_numpy_on_text(package: Path, held_out: Path) -> None:
    """NumPy is trusted; 1024 tokens of running text."""
    opened = open_package(package)
    numpy, fast = opened.backend("numpy"), opened.backend("onnx")
    exact = opened.backend("onnx", accuracy_level=0)
    ids = np.array(opened.tokenizer(numpy).encode(held_out.read_text()[:20_000])[:1024])
    reference, by_level = [], {"fast": [], "exact": []}
    for window in ids.reshape(4, 1, 256):
        reference.append(numpy.forward(window, numpy.new_cache())[0])
        by_level["fast"].append(fast.forward(window, fast.new_cache())[0])
        by_level["exact"].append(exact.forward(window, exact.new_cache())[0])
    expected = torch.log_softmax(torch.from_numpy(np.concatenate(reference)).double(), -1)
    found = {name: np.concatenate(logits) for name, logits in by_level.items()}
    agreement = {name: (logits.argmax(-1) == expected.argmax(-1).numpy()).mean() for name, logits in found.items()}
    assert np.abs(found["exact"] - np.concatenate(reference)).max() <= 1e-2
    assert agreement["exact"] >= 0.999
    predicted = torch.log_softmax(torch.from_numpy(found["fast"]).double(), -1)
    assert float((expected.exp() * (expected - predicted)).sum(-1).mean()) <= 0.02
    assert agreement["fast"] >= 0.97


def test_every_export_scores_what_the_checkpoint_scores(manifest: dict[str, Any]) -> None:
    results = manifest["evaluation"]["results"]
    checkpoint = results["checkpoint"]["perplexity"]
    assert results["numpy"]["perplexity"] == pytest.approx(checkpoint, rel=1e-3)
    assert results["onnx_exact"]["perplexity"] == pytest.approx(checkpoint, rel=1e-3)
    assert results["onnx"]["perplexity"] == pytest.approx(checkpoint, rel=0.02)


def test_perplexity_on_wikitext_is_at_most_75(manifest: dict[str, Any]) -> None:
    if manifest["evaluation"]["text"] != "wikitext2-test.txt" or manifest["recipe"]["calibration"] == "self":
        pytest.skip("WikiText-2 or the calibration text is not here; set MGPTQ_TEXT_DATA")
    assert manifest["evaluation"]["results"]["checkpoint"]["perplexity"] <= 75


MEMORY_PROBE = """
import sys
from pathlib import Path
import onnxruntime
from onnx import TensorProto, helper
from mgptq_runtime.backends.onnx_backend import OnnxBackend

value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one_node", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
backend = OnnxBackend(Path(sys.argv[1]))
print(resident() - before)
"""


def test_loading_takes_at_most_twice_the_files_beyond_onnx_runtime_itself(package: Path) -> None:
    folder = package / "onnx"
    done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, str(folder)], check=True, capture_output=True, text=True)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "model.exact.onnx")
    assert int(done.stdout) <= 2 * size


def test_generates_the_same_text_on_both_backends_at_full_precision(package: Path) -> None:
    prompt = ("--chat", "--prompt", "What is the capital of France?", "--max-tokens", "12", "--json")
    numpy = json.loads(run("generate", str(package), "--backend", "numpy", *prompt))
    onnx = json.loads(run("generate", str(package), "--backend", "onnx", "--accuracy-level", "0", *prompt))
    assert numpy["tokens"] == onnx["tokens"]
    assert numpy["text"].strip()


PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):",
    "List three uses of a paper clip.",
    "The history of the Roman Empire begins",
)


def genai_greedy(folder: Path, prompt: str, count: int) -> tuple[list[int], list[int]]:
    """The prompt's tokens, as a chat's first message, and the tokens that follow."""
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    chat = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": prompt}]), add_generation_prompt=True)
    start = tokenizer.encode(chat).tolist()
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(start) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(start)
    while not generator.is_done():
        generator.generate_next_token()
    return start, list(generator.get_sequence(0))[len(start) :]


def test_genai_writes_the_text_that_the_onnx_backend_writes(package: Path) -> None:
    """Our ONNX backend is trusted: greedy, up to 64 tokens for each of 5 prompts, the chat template genai's own."""
    backend = open_package(package).backend("onnx")
    written = 0
    for prompt in PROMPTS:
        start, found = genai_greedy(package / "onnx", prompt, 64)
        cache, tokens, ids = backend.new_cache(), [], np.array([start])
        for _ in found:
            tokens.append(int(backend.forward(ids, cache)[0, -1].argmax()))
            ids = np.array([[tokens[-1]]])
        assert found == tokens
        written += len(found)
    assert written >= 64


# llama.cpp


def gguf_file(package: Path) -> Path:
    (path,) = (package / "llama.cpp").glob("*.gguf")
    return path


def test_the_llama_cpp_file_is_at_most_54_megabytes_and_as_large_as_planned(package: Path, smollm2: Path) -> None:
    assert gguf_file(package).name == "SmolLM2-135M-Instruct-MGPTQ-2.5bpw.gguf"
    size = gguf_file(package).stat().st_size
    assert size <= 54_000_000
    planned = plan_model(str(smollm2), Recipe(bits=2.5), ["llama.cpp"])["targets"]["llama.cpp"]["file_bytes"]
    assert 0.995 * planned <= size <= planned


@dataclass(frozen=True)
class Agreement:
    top1: float
    divergence: float


@pytest.fixture(scope="module")
def dequantized_source(package: Path, smollm2: Path) -> SourceModel:
    """Torch with the weights of the llama.cpp file."""
    source = load_source(str(smollm2))
    load_quantized_weights(source, read_checkpoint(package / "quantized-tensors").model)
    return source


def agreement(source: SourceModel, file: Path, text: Path, windows: int) -> Agreement:
    """llama.cpp against torch, which is trusted, on windows of 256 tokens of running text."""
    tokens = torch.tensor(file_tokens(text, source)[: 256 * windows]).view(windows, 256)
    agreeing, divergence, threads = 0, 0.0, torch.get_num_threads()
    with LlamaModel(file) as model, torch.no_grad():
        for window in tokens:
            expected = torch.log_softmax(source.model(window[None]).logits[0].double(), -1)
            found = torch.log_softmax(torch.from_numpy(logits(model, window.tolist(), threads=threads)).double(), -1)
            agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
            divergence += float((expected.exp() * (expected - found)).sum())
    return Agreement(agreeing / tokens.numel(), divergence / tokens.numel())


def test_llama_cpp_computes_what_torch_computes_but_for_its_8_bit_activations(
    package: Path, dequantized_source: SourceModel, held_out: Path
) -> None:
    """Rounded activations move near ties: the head's alone change 3 % of the most likely tokens of this model."""
    found = agreement(dequantized_source, gguf_file(package), held_out, 4)
    assert found.divergence <= 0.01
    assert found.top1 >= 0.92


def test_llama_cpp_computes_what_torch_computes_where_nothing_is_rounded(
    dequantized_source: SourceModel, held_out: Path, tmp_path: Path
) -> None:
    """The same weights in a file of floats, for which llama.cpp does not round activations."""
    write_gguf(tmp_path / "float.gguf", dequantized_source.model, dequantized_source.tokenizer_folder)
    found = agreement(dequantized_source, tmp_path / "float.gguf", held_out, 2)
    assert found.divergence <= 1e-5
    assert found.top1 >= 0.998


def test_llama_cpp_scores_at_most_1_35_times_the_containers_perplexity(manifest: dict[str, Any]) -> None:
    """Same budget, whole tensors instead of blocks of columns."""
    results = manifest["evaluation"]["results"]
    assert results["llama.cpp_checkpoint"]["perplexity"] <= 1.35 * results["checkpoint"]["perplexity"]


def test_llama_cpp_tokenizes_as_the_model_does(package: Path, smollm2: Path, held_out: Path) -> None:
    source, text = load_source(str(smollm2)), held_out.read_text()[:20_000]
    assert source.tokenizer is not None
    with LlamaModel(gguf_file(package), vocab_only=True) as model:
        assert model.tokenize(text) == source.tokenizer.encode(text, add_special_tokens=False).ids
