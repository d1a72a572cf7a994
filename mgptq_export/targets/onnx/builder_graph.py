"""The float graph of a family, from onnxruntime-genai's model builder, without any large weight in memory."""

import contextlib
import importlib
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mgptq_export.checkpoint import Checkpoint, copy_tokenizer
from mgptq_export.targets.onnx.families import Family, family_named
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["build_float_graph", "check_onnx_config"]

logger = logging.getLogger(__name__)

# Bits and segments belong to each linear, and a tied table is shared when it is packed: nothing is fused here.
BUILDER_OPTIONS = {"fuse_qkv": False, "shared_embeddings": False}

# The builder's tables for other kinds (linear, yarn, longrope) differ from those of transformers.
ROPE_TYPES = ("default", "llama3", "dynamic")
HEAD_SIZE_MULTIPLE = 16


def check_onnx_config(config: Any) -> None:
    """Refuse a configuration whose graph would not load, or would compute something else.

    Args:
        config: a transformers configuration.

    Raises:
        UnsupportedModelError: what is wrong.
    """
    way_out = "use --targets container"
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"the onnx target does not support rotary type {rope!r}; supported: {', '.join(ROPE_TYPES)}; {way_out}"
        )
    partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1.0):
        raise UnsupportedModelError(f"the onnx target does not support partial rotary embeddings; {way_out}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size % HEAD_SIZE_MULTIPLE:
        raise UnsupportedModelError(
            f"the onnx target needs a head size that is a multiple of {HEAD_SIZE_MULTIPLE}, "
            f"this model has {head_size}; {way_out}"
        )


def _write_config_folder(folder: Path, checkpoint: Checkpoint, family: Family) -> None:
    """A Hugging Face folder without weights: what the builder reads configuration and token ids from."""
    folder.mkdir()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["architectures"] = config.get("architectures") or [family.architecture]
    (folder / "config.json").write_text(json.dumps(config))
    copy_tokenizer(checkpoint.folder, folder)


def _model_without_weights(config: Any, family: Family, tensors: Mapping[str, Any]) -> torch.nn.Module:
    """The Hugging Face model with the checkpoint's tensors, and shapes only where weights are quantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for parameter, _ in list(model.named_parameters()):
        module, _, attribute = parameter.rpartition(".")
        tensor = family.tensor_name(parameter)
        if tensor is None:
            continue
        if tensor not in tensors:
            raise UnsupportedModelError(f"the configuration asks for {parameter}, the checkpoint has no {tensor}")
        value = torch.nn.Parameter(torch.from_numpy(tensors[tensor].copy()), requires_grad=False)
        setattr(model.get_submodule(module), attribute, value)
    return model


def _run_builder(folder: Path, checkpoint: Checkpoint, family: Family) -> ir.Model:
    # create_model would load a checkpoint of full float weights and write them out again;
    # the family's builder class makes the same graph from shapes, its weights being lazy.
    builders = importlib.import_module("onnxruntime_genai.models.builders")
    family_builder: Any = getattr(builders, family.builder)
    config = AutoConfig.from_pretrained(folder)
    check_onnx_config(config)

    class GraphBuilder(family_builder):
        def load_weights(self, input_path: str) -> torch.nn.Module:
            return _model_without_weights(config, family, checkpoint.model.tensors)

    builder = GraphBuilder(
        config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(folder / "cache"), dict(BUILDER_OPTIONS)
    )
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
    family = family_named(checkpoint.model.family)
    _write_config_folder(folder, checkpoint, family)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            model = _run_builder(folder, checkpoint, family)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"onnxruntime-genai's builder refused {checkpoint.name}: {type(error).__name__}: {error}\n"
            f"{printed.getvalue()[-2000:]}"
        ) from error
    logger.debug("builder output:\n%s", printed.getvalue())
    return model, json.loads((folder / "genai_config.json").read_text())
