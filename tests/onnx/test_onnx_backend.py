"""The runtime's ONNX backend against transformers on the dequantized weights, which is trusted."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.targets.onnx import export_onnx
from mgptq_runtime.backends.onnx_backend import OnnxBackend
from mgptq_runtime.errors import BadInputError, PackageError


@pytest.fixture(scope="module")
def exact(exported) -> OnnxBackend:
    return OnnxBackend(exported.folder, accuracy_level=0, threads=1)


@pytest.fixture(scope="module")
def fast(exported) -> OnnxBackend:
    return OnnxBackend(exported.folder, threads=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def in_pieces(backend: OnnxBackend, token_ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    cache = backend.new_cache(len(token_ids))
    pieces = np.split(token_ids, np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([backend.forward(piece, cache) for piece in pieces], axis=1)


def test_exact_logits_are_the_oracles(exported, exact):
    logits = exact.forward(exported.token_ids, exact.new_cache(2))
    assert logits.shape == exported.oracle.shape and logits.dtype == np.float32
    assert np.abs(logits - exported.oracle).max() <= 1e-4
    assert np.array_equal(logits.argmax(axis=-1), exported.oracle.argmax(axis=-1))


def test_fast_logits_are_close_to_the_oracles(exported, fast):
    p = log_softmax(exported.oracle)
    q = log_softmax(fast.forward(exported.token_ids, fast.new_cache(2)))
    assert (np.exp(p) * (p - q)).sum(axis=-1).mean() <= 0.02


@pytest.mark.parametrize("sizes", [[1] * 40, [5, 35], [3, 1, 16, 20]], ids=["steps", "two", "chunks"])
@pytest.mark.parametrize("batch", [1, 2])
def test_cached_decoding_equals_the_whole_sequence(exported, exact, batch, sizes):
    logits = in_pieces(exact, exported.token_ids[:batch], sizes)
    assert np.abs(logits - exported.oracle[:batch]).max() <= 1e-4


def test_cache_outgrows_its_first_capacity_up_to_the_context(exported, exact):
    token_ids = np.resize(exported.token_ids[:1], (1, exact.context_length))
    whole = exact.forward(token_ids, exact.new_cache())
    grown = in_pieces(exact, token_ids, [63, 1, 1, 100, exact.context_length - 165])
    assert np.abs(whole - grown).max() <= 1e-4


def test_caches_are_independent(exported, exact):
    first, second = exact.new_cache(), exact.new_cache()
    exact.forward(exported.token_ids[:1, :20], first)
    exact.forward(exported.token_ids[1:, :20], second)
    logits = exact.forward(exported.token_ids[:1, 20:], first)
    assert np.abs(logits - exported.oracle[:1, 20:]).max() <= 1e-4


def test_earlier_logits_are_not_overwritten(exported, exact):
    cache = exact.new_cache()
    first = exact.forward(exported.token_ids[:1, :1], cache)
    kept = first.copy()
    exact.forward(exported.token_ids[:1, 1:2], cache)
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("first_logit", [0, 4, 9, -1, -4, -10])
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_are_given_from_the_first_that_is_asked_for(exported, exact, batch, first_logit):
    cache = exact.new_cache(batch)
    for start in range(0, 40, 10):
        step = slice(start, start + 10)
        logits = exact.forward(exported.token_ids[:batch, step], cache, first_logit=first_logit)
        expected = exported.oracle[:batch, step][:, first_logit:]
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 1e-4


@pytest.mark.parametrize("first_logit", [10, -11])
def test_logits_of_positions_that_are_not_new_are_refused(exported, exact, first_logit):
    with pytest.raises(BadInputError, match=f"first_logit is {first_logit}, of 10 new tokens it may be -10 to 9"):
        exact.forward(exported.token_ids[:1, :10], exact.new_cache(), first_logit=first_logit)


def test_package_that_computes_all_logits_always_still_runs(exported, package):
    path = package / "model.exact.onnx"
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    cut = next(node for node in graph.node if node.name == "/lm_head/last/Slice")
    for node in graph.node:
        node.input[:] = [cut.input[0] if name == cut.output[0] else name for name in node.input]
    graph.node.remove(cut)
    for values in (graph.input, graph.initializer):
        values.remove(next(value for value in values if value.name == "first_logit"))
    next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim[1].dim_param = "s"
    del graph.value_info[:]
    onnx.save(model, path)
    backend = OnnxBackend(package, accuracy_level=0, threads=1)
    cache = backend.new_cache()
    logits = backend.forward(exported.token_ids[:1, :20], cache)
    assert np.abs(logits - exported.oracle[:1, :20]).max() <= 1e-4
    last = backend.forward(exported.token_ids[:1, 20:], cache, first_logit=-3)
    assert last.shape[1] == 3 and np.abs(last - exported.oracle[:1, -3:]).max() <= 1e-4


def test_genai_generates_the_same_tokens(exported, fast):
    prompt, length = exported.token_ids[0, :5], 40
    model = og.Model(str(exported.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt[None].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    cache, ours = fast.new_cache(), list(prompt)
    logits = fast.forward(prompt[None], cache)
    while len(ours) < len(tokens):
        ours.append(int(logits[0, -1].argmax()))
        logits = fast.forward(np.array([ours[-1:]]), cache)
    assert len(tokens) > len(prompt) and ours == tokens


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (np.zeros((2, 1), np.int64), "cache of 1"),
        (np.zeros((1, 0), np.int64), "cache of 1"),
        (np.array([[-1]]), "vocabulary"),
        (np.array([[1 << 20]]), "vocabulary"),
        (np.zeros((1, 257), np.int64), "context of 256"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(exact, token_ids, message):
    with pytest.raises(BadInputError, match=message):
        exact.forward(token_ids, exact.new_cache())


def test_unknown_accuracy_level_and_threads_are_refused(exported):
    with pytest.raises(BadInputError, match="accuracy level 3"):
        OnnxBackend(exported.folder, accuracy_level=3)
    with pytest.raises(BadInputError, match="threads"):
        OnnxBackend(exported.folder, threads=0)


@pytest.fixture
def package(exported, tmp_path):
    return shutil.copytree(exported.folder, tmp_path / "package")


def test_a_folder_that_onnx_runtime_cannot_name_is_refused(package, tmp_path):
    with pytest.raises(BadInputError, match="a name that is not UTF-8"):
        OnnxBackend(shutil.copytree(package, tmp_path / "\udce9"))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_missing_file_is_named(package, name):
    (package / name).unlink()
    with pytest.raises(PackageError, match=name):
        OnnxBackend(package)


@pytest.mark.parametrize("name", ["model.onnx", "genai_config.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage", b"[]"])
def test_garbage_is_a_package_error(package, name, content):
    (package / name).write_bytes(content)
    with pytest.raises(PackageError, match=name):
        OnnxBackend(package)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_truncated_file_is_a_package_error(package, name):
    path = package / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PackageError, match=r"model\.onnx"):
        OnnxBackend(package)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_key_value_heads", 8),
        ("head_size", 0),
        ("head_size", "8"),
    ],
)
def test_configuration_that_contradicts_the_graph_is_refused(package, key, value):
    path = package / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(PackageError):
        OnnxBackend(package)


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "²", "9" * 40, "99999999"])
def test_a_short_context_that_is_no_number_or_beyond_the_context_is_refused(package, value):
    path = package / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.metadata_props.add(key="mgptq.short_context", value=value)
    onnx.save(graph, path)
    with pytest.raises(PackageError, match=r"mgptq\.short_context is .*, it must be a number of 1 to"):
        OnnxBackend(package)


def test_linked_weights_outside_the_package_are_refused(package, tmp_path):
    shutil.move(package / "model.onnx.data", tmp_path / "elsewhere")
    (package / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="link"):
        OnnxBackend(package)


def test_external_data_cannot_escape_the_package(package, tmp_path):
    shutil.move(package / "model.onnx.data", tmp_path / "weights.data")
    (package / "model.onnx.data").write_bytes(b"")
    graph = (package / "model.onnx").read_bytes()
    # The new location is as long as the old one, so that every length in the file still holds.
    (package / "model.onnx").write_bytes(graph.replace(b"model.onnx.data", b"../weights.data"))
    with pytest.raises(PackageError, match=r"model\.onnx"):
        OnnxBackend(package)


def test_graph_that_does_not_ask_for_positions_gets_none(exported, package):
    path = package / "model.exact.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.graph.input.remove(next(value for value in graph.graph.input if value.name == "position_ids"))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(4)[None], "position_ids"))
    onnx.save(graph, path)
    backend = OnnxBackend(package, accuracy_level=0)
    logits = backend.forward(exported.token_ids[:1, :4], backend.new_cache())
    assert np.abs(logits - exported.oracle[:1, :4]).max() <= 1e-4


def test_genai_uses_the_packages_tokenizer(exported, golden, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat and the hat and the bat"
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=10**30
    ).save_pretrained(tmp_path / "quantized")
    checkpoint = Checkpoint(tmp_path / "quantized", exported.model, exported.checkpoint.config)
    export_onnx(checkpoint, golden, tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == exported.model.hyperparameters["context_length"]
    model = og.Model(str(tmp_path / "onnx"))
    assert og.Tokenizer(model).encode(text).tolist() == tokenizer.encode(text).ids
