"""A GGUF file of every family against the Hugging Face model that it was made of; transformers is trusted."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf_model import write_gguf
from transformers import AutoModelForCausalLM

from mgptq_export.models import load_shape, load_source
from mgptq_runtime.errors import BadInputError, UnsupportedModelError

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny_models.FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama with larger heads": ("llama", {"head_dim": 32}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64, "max_position_embeddings": 131_072}),
    "llama with linear rope": ("llama", {"rope_parameters": LINEAR}),
    "tied qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "gemma3 1b": (
        "gemma3",
        {"rope_parameters": {"full_attention": PLAIN | {"rope_theta": 1e6}, "sliding_attention": PLAIN}},
    ),
    "gemma3 27b": (
        "gemma3",
        {"num_hidden_layers": 62, "hidden_size": 48, "intermediate_size": 32, "query_pre_attn_scalar": 8},
    ),
    "phi3 4k": (
        "phi3",
        {
            "rope_parameters": PLAIN,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 256,
            "sliding_window": 20,
        },
    ),
    "tied phi3": ("phi3", {"tie_word_embeddings": True}),
}
COMPARED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "hidden_act",
    "hidden_activation",
    "bos_token_id",
    "eos_token_id",
)


def converted(tmp_path: Path, variant: str, **options: Any) -> tuple[Any, Path]:
    """A transformers model and the GGUF file made of it."""
    family, overrides = deepcopy(VARIANTS[variant])  # transformers completes the rotary parameters in place
    folder = tiny_models.write_model(tmp_path / "folder", family, **overrides)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_gguf(tmp_path / "model.gguf", model, folder, **options)
    return model, tmp_path / "model.gguf"


def logits(model: Any, length: int) -> torch.Tensor:
    """Of random prompts."""
    tokens = torch.randint(331, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gguf_file_gives_the_logits_of_the_folder_it_was_made_of(variant: str, tmp_path: Path) -> None:
    """Prompts of 24 and of 60 tokens, shorter and longer than the long-context switch and every window."""
    model, path = converted(tmp_path, variant)
    loaded = load_source(str(path))
    for length in (24, 60):
        expected, found = logits(model, length), logits(loaded.model, length)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gguf_file_gives_the_configuration_of_the_folder_it_was_made_of(variant: str, tmp_path: Path) -> None:
    model, path = converted(tmp_path, variant)
    loaded, shape = load_source(str(path)), load_shape(str(path))
    assert all(loaded.config[key] == value for key, value in shape.config.items())
    for key in COMPARED:
        if hasattr(model.config, key):
            assert loaded.config[key] == getattr(model.config, key), key


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_q8_0_file_gives_its_dequantized_weights(family: str, tmp_path: Path) -> None:
    """gguf-py is trusted; rows are quantized on their own, so llama.cpp's order of them does not matter."""
    kind = gguf.GGMLQuantizationType.Q8_0
    folder = tiny_models.write_model(tmp_path / "folder", family, intermediate_size=224)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_gguf(tmp_path / "model.gguf", model, folder, matrix_type=kind)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            packed = gguf.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.dequantize(packed, kind))
    expected, found = logits(model, 24), logits(load_source(str(tmp_path / "model.gguf")).model, 24)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Files that are refused


@pytest.mark.parametrize(
    "options",
    [{"metadata": {"expert_count": 8}}, {"tensors": {"blk.0.ffn_up_exps.weight": np.zeros((2, 4, 32))}}],
    ids=["expert_count", "tensor"],
)
def test_experts_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    _, path = converted(tmp_path, "llama", **options)
    with pytest.raises(UnsupportedModelError, match="mixture-of-experts models are not supported"):
        load_source(str(path))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("falcon", "'falcon' is not supported; supported: llama, qwen2, qwen3, gemma3, phi3"),
        ("qwen3moe", "mixture-of-experts models are not supported"),
    ],
)
def test_another_architecture_is_refused(architecture: str, message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=message):
        load_source(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("key", ["block_count", "attention.layer_norm_rms_epsilon", "token_embd.weight"])
def test_a_file_without_a_hyper_parameter_or_its_embedding_is_refused(family: str, key: str, tmp_path: Path) -> None:
    _, path = converted(tmp_path, family, without=key)
    with pytest.raises(BadInputError, match=rf"lacks ({family}\.)?{key}"):
        load_source(str(path))


def test_a_long_phi3_without_its_short_factors_is_refused(tmp_path: Path) -> None:
    _, path = converted(tmp_path, "phi3", without="rope_factors_short.weight")
    with pytest.raises(BadInputError, match=r"lacks rope_factors_short\.weight"):
        load_source(str(path))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_unknown_tensor_is_refused(family: str, tmp_path: Path) -> None:
    _, path = converted(tmp_path, family, tensors={"blk.0.ssm_a.weight": np.zeros(32)})
    with pytest.raises(UnsupportedModelError, match=rf"'blk\.0\.ssm_a\.weight', which is no part.* {family}"):
        load_source(str(path))


def test_biases_that_the_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    """transformers would leave them out."""
    _, path = converted(tmp_path, "qwen2", tensors={"blk.0.ffn_down.bias": np.zeros(96)})
    with pytest.raises(UnsupportedModelError, match=r"does not have: model\.layers\.0\.mlp\.down_proj\.bias"):
        load_source(str(path))


@pytest.mark.parametrize(
    ("variant", "metadata", "message"),
    [
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "scaled rotary.*'yarn'"),
        ("llama", {"rope.scaling.attn_factor": 1.5}, "scaled rotary"),
        ("llama", {"rope.dimension_count": 8}, "rope.dimension_count 8 is not supported"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ("phi3 4k", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "rotary type 'linear'"),
    ],
)
def test_variants_that_the_runtime_cannot_run_are_refused(
    variant: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, path = converted(tmp_path, variant, metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=message):
        load_source(str(path))


def test_rotary_factors_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.0, 8)
    _, path = converted(tmp_path, "llama", tensors={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModelError, match=r"not those of Llama 3\.1 with factor 8\.0.*folder"):
        load_source(str(path))


def test_hyper_parameters_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    _, path = converted(tmp_path, "qwen3", metadata={"attention.head_count": "six"})
    with pytest.raises(BadInputError, match=r"hyper-parameters cannot be used: .*six"):
        load_source(str(path))


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="one of 2 parts"):
        load_source(str(path))


def test_a_type_that_gguf_py_does_not_know_is_named(tmp_path: Path) -> None:
    _, path = converted(tmp_path, "llama", tensors={"marked.weight": np.zeros(32)})
    data = bytearray(path.read_bytes())
    at = data.index(b"marked.weight") + len(b"marked.weight") + 4 + 8  # behind one dimension: the type
    data[at : at + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"a type that gguf-py cannot read.*999"):
        load_source(str(path))


@pytest.mark.parametrize(("key", "value"), [("attention.head_count_kv", 0), ("block_count", 2**31)])
def test_counts_that_no_file_can_hold_are_refused_at_once(key: str, value: int, tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    write_gguf(tmp_path / "a.gguf", tiny_models.make_model("llama"), folder, metadata={key: value})
    with pytest.raises(BadInputError, match="download it again"):
        load_source(str(tmp_path / "a.gguf"))


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_models.make_model("llama"), folder)
    path.write_bytes(path.read_bytes().replace(b"<|im_start|>", b"\xff|im_start|>", 1))
    with pytest.raises(BadInputError, match="is not UTF-8"):
        load_source(str(path))
