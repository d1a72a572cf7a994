"""The llama.cpp target: what llama.cpp itself computes from the file, against transformers on the same weights.

Torch is trusted. llama.cpp rounds activations to 8 bits before it multiplies with packed weights, so of packed files
the distributions are compared; of a copy with the same weights in float32, whose activations stay as they are, the
logits themselves.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from llama_cpp import LlamaModel, logits, quantize_rows
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig

from mgptq_export.checkpoint import Checkpoint, write_checkpoint
from mgptq_export.golden import make_golden
from mgptq_export.models import SourceModel, load_quantized_weights, load_source
from mgptq_export.targets.llama_cpp import check_llama_cpp_config, write_llama_cpp
from mgptq_export.targets.llama_cpp.modelfile import modelfile
from mgptq_runtime.errors import BadInputError, OutputExistsError, UnsupportedModelError
from mgptq_runtime.formats import FORMATS, GGML_FORMATS
from mgptq_runtime.golden import GoldenVectors, read_golden
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

# Heads of 16 in all of them, as the rotary factors of the tiny Phi-3 want.
NARROW = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
ODD = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 12, "num_key_value_heads": 6}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {**tiny_models.FAMILIES["phi3"]["rope_parameters"], "original_max_position_embeddings": 512}
LONG = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "rope_parameters": LONGROPE,
}
GEMMA_ROPE = tiny_models.FAMILIES["gemma3"]["rope_parameters"]
LOCAL, GLOBAL = "sliding_attention", "full_attention"

CLEAR_MARGIN = 0.3
MAX_DIVERGENCE = 0.01


class Exported(NamedTuple):
    source: SourceModel
    folder: Path
    file: Path


def random_tokens(vocabulary: int, count: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (1, count), generator=torch.Generator().manual_seed(count))


def simple_golden(source: SourceModel) -> GoldenVectors:
    return make_golden(source.model, random_tokens(source.model.config.vocab_size, 16))


def rounded(source: SourceModel, type_of: Callable[[str], str]) -> QuantizedModel:
    """Every matrix rounded by llama.cpp in the type that ``type_of`` gives for its name."""

    def pack(name: str, weight: torch.Tensor) -> QuantizedLinear:
        rows, columns = weight.shape
        fmt = GGML_FORMATS[type_of(name)]
        row_bytes = columns // fmt.block_columns * fmt.block_bytes
        data = quantize_rows(fmt.ggml_type, weight.detach().numpy(), row_bytes)
        return QuantizedLinear(name, rows, columns, (Segment(fmt.name, data),))

    groups = [
        InputGroup(group.name, None, tuple(pack(name, module.weight) for name, module in group.modules.items()))
        for group in source.groups()
    ]
    head = None if source.tied else pack("output", source.model.lm_head.weight)
    embedding = pack("token_embd", source.model.get_input_embeddings().weight)
    family = source.family
    hyperparameters, tensors = family.hyperparameters(source.model), family.other_tensors(source.model)
    return QuantizedModel(family.name, hyperparameters, tuple(groups), embedding, head, tensors)


def checkpoint_of(source: SourceModel, folder: Path, type_of: Callable[[str], str]) -> Checkpoint:
    model = rounded(source, type_of)
    load_quantized_weights(source, model)
    return write_checkpoint(
        folder, model, name="tiny", config=source.config, recipe={"bits": 2.5}, tokenizer_folder=source.tokenizer_folder
    )


def export(folder: Path, family: str, type_of: Callable[[str], str] = lambda name: "q8_0", **sizes: Any) -> Exported:
    source = load_source(str(tiny_models.write_model(folder / "model", family, **sizes)))
    checkpoint = checkpoint_of(source, folder / "quantized", type_of)
    write_llama_cpp(checkpoint, simple_golden(source), folder / "out")
    return Exported(source, folder / "out", folder / "out" / "tiny-MGPTQ-2.5bpw.gguf")


@torch.no_grad()
def torch_logits(source: SourceModel, tokens: torch.Tensor) -> torch.Tensor:
    return source.model(tokens).logits[0].double()


def llama_cpp_logits(path: Path, tokens: torch.Tensor, context: int | None = None) -> torch.Tensor:
    with LlamaModel(path) as model:
        return torch.from_numpy(logits(model, tokens[0].tolist(), context=context)).double()


def check_distributions(exported: Exported) -> None:
    tokens = random_tokens(exported.source.model.config.vocab_size, 60)
    expected, found = torch_logits(exported.source, tokens), llama_cpp_logits(exported.file, tokens)
    expected_log, found_log = expected.log_softmax(-1), found.log_softmax(-1)
    divergence = (expected_log.exp() * (expected_log - found_log)).sum(-1)
    best, second = expected.topk(2).values.T
    clear = best - second > CLEAR_MARGIN
    agree = (expected.argmax(-1) == found.argmax(-1))[clear].double().mean()
    assert clear.sum() >= 10
    assert agree >= 0.99
    assert divergence.mean() <= MAX_DIVERGENCE


def types_in_turn() -> Callable[[str], str]:
    """Another type for each group of linears and for each that stands alone, so that fused ones share theirs."""
    types, chosen = cycle(GGML_FORMATS), {}
    fused = {"attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "ffn_gate": "up", "ffn_up": "up"}

    def type_of(name: str) -> str:
        block, _, linear = name.rpartition(".")
        key = f"{block}.{fused.get(linear, linear)}"
        if key not in chosen:
            chosen[key] = next(types)
        return chosen[key]

    return type_of


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    ("sizes", "ggml_type"), [(NARROW, "q4_0"), (ODD, "q2_0"), (WIDE, "mixed")], ids=["narrow", "odd", "wide"]
)
def test_llama_cpp_predicts_what_torch_predicts(
    family: str, sizes: dict[str, int], ggml_type: str, tmp_path: Path
) -> None:
    type_of = types_in_turn() if ggml_type == "mixed" else lambda name: ggml_type
    check_distributions(export(tmp_path, family, type_of, **sizes))


@pytest.mark.parametrize("ggml_type", GGML_FORMATS)
def test_every_type_serves_embedding_and_linears(ggml_type: str, tmp_path: Path) -> None:
    check_distributions(export(tmp_path, "llama", lambda name: ggml_type, **WIDE))


def write_float_copy(path: Path, copy: Path) -> None:
    """The same file with all weights in float32."""
    reader = GGUFReader(path)
    writer = GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny_models.FAMILIES},
    "llama, other head size": ("llama", {"head_dim": 32}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2, linear": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN, "rms_norm_eps": 1e-3}),
    "gemma3, other pattern": ("gemma3", {"layer_types": [LOCAL, LOCAL, GLOBAL] * 2 + [LOCAL]}),
    "gemma3, global only": ("gemma3", {"layer_types": [GLOBAL] * 7}),
    "gemma3, local only": ("gemma3", {"num_hidden_layers": 4}),
    "gemma3, as many layers as 27B": ("gemma3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    "gemma3, local frequencies": (
        "gemma3",
        {"rope_parameters": GEMMA_ROPE | {LOCAL: {"rope_type": "default", "rope_theta": 500.0}}},
    ),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3, one length": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "partial_rotary_factor": 1.0},
    ),
}


def check_exactly(exported: Exported, tokens: torch.Tensor, context: int | None = None) -> None:
    copy = exported.file.with_suffix(".float32")
    write_float_copy(exported.file, copy)
    expected, found = torch_logits(exported.source, tokens), llama_cpp_logits(copy, tokens, context)
    # llama.cpp looks GELU up in a table of 16-bit numbers.
    tolerance = 5e-3 if exported.source.family.name == "gemma3" else 1e-5
    assert (expected - found).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_float_activations_the_logits_agree(variant: str, tmp_path: Path) -> None:
    """The prompt is longer than Gemma's window of 8 and Phi's short context of 32."""
    family, settings = VARIANTS[variant]
    check_exactly(export(tmp_path, family, **NARROW | settings), random_tokens(331, 60))


@pytest.mark.parametrize(("length", "context"), [(300, 512), (600, 1024)], ids=["short", "long"])
def test_longrope_follows_the_context(length: int, context: int, tmp_path: Path) -> None:
    """llama.cpp goes by the context it is started with, torch by the text: here both are short, or both long."""
    check_exactly(export(tmp_path, "phi3", **NARROW | LONG), random_tokens(331, length), context)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rotary type 'dynamic'"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "attention_factor 1.5"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast 16"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary type 'llama3'"),
        ("qwen2", {"head_dim": 32}, "192 wide"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma3", {"attention_bias": True}, "attention_bias"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma3", {"rope_parameters": GEMMA_ROPE | {LOCAL: LINEAR}}, "local gemma3"),
    ],
)
def test_what_llama_cpp_cannot_represent_is_refused(family: str, settings: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(**tiny_models.COMMON | tiny_models.FAMILIES[family] | NARROW | settings)
    with pytest.raises(UnsupportedModelError, match=rf"{reason}.*use --targets container"):
        check_llama_cpp_config(config)


def test_a_window_that_llama_cpp_ignores_is_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = tiny_models.COMMON | tiny_models.FAMILIES["phi3"] | NARROW | {"sliding_window": 16}
    check_llama_cpp_config(AutoConfig.for_model(**settings))
    assert "beyond 16 tokens" in caplog.text


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tied Llama in Q8_0."""
    return export(tmp_path_factory.mktemp("narrow"), "llama", **NARROW)


def test_folder_holds_what_others_need(narrow: Exported) -> None:
    assert {path.name for path in narrow.folder.iterdir()} == {narrow.file.name, "Modelfile", "golden.npz"}
    fields = {name: field.contents() for name, field in GGUFReader(narrow.file).fields.items()}
    assert (fields["general.architecture"], fields["general.name"]) == ("llama", "tiny")
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (7, 2)
    assert json.loads(fields["mgptq.recipe"]) == {"bits": 2.5}
    assert fields["mgptq.bits_stored"] == 8.5
    weights = sum(module.weight.numel() for group in narrow.source.groups() for module in group.modules.values())
    assert json.loads(fields["mgptq.weights_by_type"]) == {"q8_0": weights}
    assert read_golden(narrow.folder / "golden.npz").token_ids.shape == (1, 16)


def test_same_checkpoint_gives_same_bytes(narrow: Exported, tmp_path: Path) -> None:
    again = export(tmp_path, "llama", **NARROW)
    for path in narrow.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


def test_existing_folder_is_left_alone(narrow: Exported, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(narrow.source, tmp_path / "quantized", lambda name: "q8_0")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists"):
        write_llama_cpp(checkpoint, simple_golden(narrow.source), tmp_path / "out")


def test_fused_linears_of_two_types_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attn_qkv is one tensor in llama\.cpp.*attn_q q8_0, .*attn_k q4_0"):
        export(tmp_path, "phi3", lambda name: "q4_0" if name.endswith("attn_k") else "q8_0", **NARROW)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "quantized"}


def test_column_formats_are_refused(narrow: Exported, tmp_path: Path) -> None:
    def in_columns(linear: QuantizedLinear) -> QuantizedLinear:
        fmt = FORMATS["b4"]
        data = np.zeros((linear.rows, -(-linear.columns // fmt.block_columns) * fmt.block_bytes), np.uint8)
        return QuantizedLinear(linear.name, linear.rows, linear.columns, (Segment("b4", data),))

    checkpoint = checkpoint_of(narrow.source, tmp_path / "quantized", lambda name: "q8_0")
    model = checkpoint.model
    group = model.groups[0]
    changed = InputGroup(group.name, None, tuple(in_columns(linear) for linear in group.linears))
    other = replace(model, groups=(changed, *model.groups[1:]))
    changed_checkpoint = Checkpoint(checkpoint.folder, other, checkpoint.config)
    with pytest.raises(BadInputError, match=r"stored as b4.*quantize the model with --targets llama\.cpp"):
        write_llama_cpp(changed_checkpoint, simple_golden(narrow.source), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"quantized"}


def test_server_completes_a_prompt_with_torchs_tokens(narrow: Exported) -> None:
    """Greedy: each token is torch's best for the text before it, but for what 8-bit activations change."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(narrow.file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    prompt = "The statement"
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": prompt, "max_tokens": 8, "temperature": 0.0, "logprobs": 1}
    )
    found = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert narrow.source.tokenizer is not None
    with LlamaModel(narrow.file) as model:
        tokens = model.tokenize(prompt, add_special=True)
    expected = torch_logits(narrow.source, torch.tensor([tokens + found]))[len(tokens) - 1 : -1]
    chosen = expected[torch.arange(len(found)), torch.tensor(found)]
    assert len(found) == 8
    assert (expected.max(-1).values - chosen).max() <= CLEAR_MARGIN


CHATML = tiny_models.CHAT_TEMPLATE
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{{ '<start_of_turn>model\n' }}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
PHI3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}"
PHI4 = PHI3.replace("\n", "")


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (LLAMA3_CHAT, "<|eot_id|>"),
        (PHI3, "<|end|>"),
        (PHI4, "<|end|>"),
    ],
    ids=["chatml", "gemma", "llama3", "phi3", "phi4"],
)
def test_modelfile_says_how_the_model_is_talked_to(template: str, stop: str) -> None:
    text = modelfile("a.gguf", template, {"bos_token": "<s>"})
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """{{- range .Messages }}')
    assert text.endswith(f'\nPARAMETER stop "{stop}"\n')


def test_modelfile_of_an_unknown_template_says_what_to_do() -> None:
    assert "add a TEMPLATE here" in modelfile("a.gguf", "{{ messages[0].content }}", {})
    assert modelfile("a.gguf", None, {}) == "FROM ./a.gguf\n"


@pytest.mark.parametrize("name", ["Phi-3-mine", "my_phi3"])
def test_a_name_like_phi3s_does_not_keep_llama_cpp_from_loading(name: str, tmp_path: Path) -> None:
    source = load_source(str(tiny_models.write_model(tmp_path / "model", "llama", **NARROW)))
    checkpoint = checkpoint_of(source, tmp_path / "quantized", lambda _: "q8_0")
    checkpoint.config["quantization_config"]["name"] = name
    write_llama_cpp(checkpoint, simple_golden(source), tmp_path / "out")
    with LlamaModel(tmp_path / "out" / f"{name}-MGPTQ-2.5bpw.gguf"):
        pass


def test_the_name_says_phi3_where_the_tokenizer_is_phi3s(tmp_path: Path) -> None:
    """Only by that does llama.cpp know that special tokens swallow the white space behind them."""
    source = load_source(str(tiny_models.write_model(tmp_path / "model", "phi3", **NARROW, vocab_size=340)))
    tiny_models.write_tokenizer(source.tokenizer_folder, 331)
    tokenizer = Tokenizer.from_file(str(source.tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("</s>", rstrip=True)])
    tokenizer.add_special_tokens(["<s>", "<unk>"])
    tokenizer.save(str(source.tokenizer_folder / "tokenizer.json"))
    write_llama_cpp(
        checkpoint_of(source, tmp_path / "quantized", lambda _: "q8_0"), simple_golden(source), tmp_path / "out"
    )
    text = "<|user|>\nHello"
    with LlamaModel(tmp_path / "out" / "tiny-MGPTQ-2.5bpw.gguf") as model:
        assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids
