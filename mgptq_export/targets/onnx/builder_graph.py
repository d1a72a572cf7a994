"""The float graph of a family, from onnxruntime-genai's model builder, without any large weight in memory."""

import contextlib
import copy
import importlib
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mgptq_export.checkpoint import Checkpoint, copy_tokenizer
from mgptq_export.families import FAMILIES, Family
from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families import FAMILIES as RUNTIME_FAMILIES
from mgptq_runtime.families.decoder import Decoder
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["build_float_graph", "check_onnx_config", "decoder_of"]

logger = logging.getLogger(__name__)

# Bits and segments belong to each linear, and a tied table is shared when it is packed: nothing is fused here.
# Every layer keeps the whole text, so that one kind of cache serves all families; windows are the attention's.
BUILDER_OPTIONS = {"fuse_qkv": False, "shared_embeddings": False, "windowed_kv_cache": False}

# Of ONNX Runtime's GroupQueryAttention.
HEAD_SIZE_MULTIPLE = 8


def check_onnx_config(config: Any) -> None:
    """Refuse a configuration whose graph would not run.

    Args:
        config: a transformers configuration.

    Raises:
        UnsupportedModelError: what is wrong.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size % HEAD_SIZE_MULTIPLE:
        raise UnsupportedModelError(
            f"the onnx target needs a head size that is a multiple of {HEAD_SIZE_MULTIPLE}, "
            f"this model has {head_size}; use --targets container"
        )


def decoder_of(model: QuantizedModel) -> Decoder:
    """The runtime's family of a model: what the graph has to compute.

    Raises:
        UnsupportedModelError: an unknown family, or unusable hyper-parameters.
    """
    if model.family not in FAMILIES:
        raise UnsupportedModelError(
            f"the onnx target does not support the family {model.family!r}; it has {', '.join(FAMILIES)}"
        )
    return RUNTIME_FAMILIES[model.family].from_hyperparameters(model.hyperparameters)


def _write_config_folder(folder: Path, checkpoint: Checkpoint, family: Family) -> None:
    """A Hugging Face folder without weights: what the builder reads configuration and token ids from."""
    folder.mkdir()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["architectures"] = config.get("architectures") or [family.architecture]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_tokenizer(checkpoint.folder, folder)


def _model_without_weights(config: Any, family: Family, tensors: Mapping[str, Any]) -> torch.nn.Module:
    """The Hugging Face model with the checkpoint's tensors, and shapes only where weights are quantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for parameter, _ in list(model.named_parameters()):
        module, _, attribute = parameter.rpartition(".")
        tensor = family.tensor_of_parameter(parameter)
        if tensor is None:
            continue
        if tensor not in tensors:
            raise UnsupportedModelError(f"the configuration asks for {parameter}, the checkpoint has no {tensor}")
        value = torch.nn.Parameter(torch.from_numpy(tensors[tensor].copy()), requires_grad=False)
        setattr(model.get_submodule(module), attribute, value)
    return model


def _builder_config(config: Any) -> Any:
    """What the builder is told: the model, with plain rotary embeddings, for which it needs no knowledge of kinds."""
    plain = copy.deepcopy(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
    plain.partial_rotary_factor = 1.0
    plain.rope_local_base_freq = 1.0
    return plain


def _graph_builder(checkpoint: Checkpoint, config: Any) -> Any:
    """The family's builder class; where it has numbers of its own, the runtime's family decides."""
    decoder, family = decoder_of(checkpoint.model), FAMILIES[checkpoint.model.family]
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # official builds of the library report their use by default
    family_builder: Any = getattr(importlib.import_module("onnxruntime_genai.models.builders"), family.onnx_builder)

    class GraphBuilder(family_builder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.embed_attrs["scale"] = decoder.embedding_scale
            self.attention_attrs["scale"] = decoder.scale
            # Norms are stored as what they multiply by.
            self.layernorm_attrs["add_offset"] = 0

        def load_weights(self, input_path: str) -> torch.nn.Module:
            return _model_without_weights(config, family, checkpoint.model.tensors)

        def make_layer(self, layer_id: int, layer: torch.nn.Module) -> None:
            # Fused matrices are cut into linears that would be made with random weights.
            with torch.device("meta"):
                super().make_layer(layer_id, layer)

        def is_fused_rope_supported(self) -> bool:
            return False

        def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
            table = torch.zeros(2, self.head_size)
            return table, table

        def get_attention_op_attributes(self, **arguments: Any) -> dict[str, Any]:
            window = decoder.window(arguments["layer_id"]) or -1
            return {**super().get_attention_op_attributes(**arguments), "local_window_size": window}

    return GraphBuilder


def _run_builder(folder: Path, checkpoint: Checkpoint) -> ir.Model:
    # create_model would load a checkpoint of full float weights and write them out again;
    # the family's builder class makes the same graph from shapes, its weights being lazy.
    config = AutoConfig.from_pretrained(folder)
    check_onnx_config(config)
    dtype, cache = ir.DataType.FLOAT, str(folder / "cache")
    graph_builder = _graph_builder(checkpoint, config)
    builder = graph_builder(_builder_config(config), dtype, dtype, "cpu", cache, dict(BUILDER_OPTIONS))
    builder.make_model(str(folder))
    builder.model.graph.sort()
    builder.make_genai_config(config, {}, str(folder))
    return builder.model


def build_float_graph(checkpoint: Checkpoint, folder: Path) -> tuple[ir.Model, dict[str, Any]]:
    """Build the graph whose embedding and MatMul weights are still to be replaced.

    Args:
        checkpoint: gives configuration, norms and biases.
        folder: scratch; created, left to the caller to remove.

    Returns:
        The graph (weights of embedding and MatMul nodes are shapes without values), and the genai configuration.

    Raises:
        UnsupportedModelError: an unknown family, or the builder refused the configuration.
    """
    decoder_of(checkpoint.model)
    _write_config_folder(folder, checkpoint, FAMILIES[checkpoint.model.family])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            model = _run_builder(folder, checkpoint)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"onnxruntime-genai's builder refused {checkpoint.name}: {type(error).__name__}: {error}\n"
            f"{printed.getvalue()[-2000:]}"
        ) from error
    logger.debug("builder output:\n%s", printed.getvalue())
    return model, json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
