"""Write the ONNX package."""

import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.targets.onnx.builder_graph import build_float_graph, decoder_of
from mgptq_export.targets.onnx.constant_shapes import declare_constant_shapes
from mgptq_export.targets.onnx.external_data import externalize
from mgptq_export.targets.onnx.genai_config import complete_genai_config
from mgptq_export.targets.onnx.last_logits import keep_last_logits
from mgptq_export.targets.onnx.node_names import EMBEDDING_NODE, HEAD_NODE, matmul_node
from mgptq_export.targets.onnx.operators import DOMAIN, OPSET, VERSION, operators
from mgptq_export.targets.onnx.rotations import compute_rotations
from mgptq_export.targets.onnx.standard_norms import standardize_norms
from mgptq_export.targets.onnx.swap_embedding import swap_embedding
from mgptq_export.targets.onnx.swap_linears import swap_linears
from mgptq_export.targets.onnx.tokenizer_files import write_tokenizer
from mgptq_runtime.errors import OutputExistsError, UnsupportedModelError
from mgptq_runtime.golden import GoldenVectors, write_golden
from mgptq_runtime.quantized_model import InputGroup, QuantizedModel

__all__ = ["export_onnx", "quantized_graph", "set_operators"]

logger = logging.getLogger(__name__)

MODEL = "model.onnx"
EXACT_MODEL = "model.exact.onnx"
WEIGHTS = "model.onnx.data"
GOLDEN = "golden.npz"

# 11 holds opset 23; newer runtimes read it, and the checker knows it.
IR_VERSION = 11
# For whoever keeps keys in a cache: up to how many tokens a text is rotated as short ones are.
SHORT_CONTEXT = "mgptq.short_context"
FAST_LEVEL, EXACT_LEVEL = 4, 0


def _head_group(model: QuantizedModel) -> InputGroup:
    """The head as an input group; a tied one is the embedding again, under its own name."""
    head = model.head or replace(model.embedding, name="output")
    return InputGroup(head.name, head.permutation, (head,))


def quantized_graph(checkpoint: Checkpoint, graph_model: ir.Model, *, pairs: bool = True) -> ir.Model:
    """Swap the matrices of the family's float graph for packed ones, in place; ``pairs``: see :func:`swap_linears`."""
    quantized = checkpoint.model
    head = _head_group(quantized)
    node_names = {linear.name: matmul_node(linear.name) for linear in quantized.linears()}
    node_names[head.linears[0].name] = HEAD_NODE
    graph = graph_model.graph
    declare_constant_shapes(graph)
    standardize_norms(graph)
    decoder = decoder_of(quantized)
    compute_rotations(graph, decoder, quantized.tensors)
    keep_last_logits(graph, HEAD_NODE)
    swap_embedding(graph, quantized.embedding, EMBEDDING_NODE)
    swap_linears(graph, (*quantized.groups, head), node_names, pairs=pairs)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="mgptq-export")
    model.opset_imports.update({"": OPSET, "com.microsoft": 1, DOMAIN: VERSION})
    if decoder.short_context < decoder.context_length:
        model.metadata_props[SHORT_CONTEXT] = str(decoder.short_context)
    return model


def set_operators(model: ir.Model, accuracy_level: int) -> None:
    """Put those of our operators that the graph uses into the model, in place of any others."""
    used = {node.op_identifier() for node in model.graph}
    model.functions.clear()
    for function in operators(accuracy_level):
        if function.identifier() in used:
            model.functions[function.identifier()] = function


def _save(model: ir.Model, folder: Path) -> None:
    """Write both graphs onto one file of weights."""
    externalize(model.graph, folder / WEIGHTS)
    for name, accuracy_level in ((MODEL, FAST_LEVEL), (EXACT_MODEL, EXACT_LEVEL)):
        set_operators(model, accuracy_level)
        ir.save(model, folder / name)


def _check_genai_config(config: dict[str, Any], model: QuantizedModel) -> None:
    """Refuse a configuration of the builder that does not fit the checkpoint."""
    if config["model"]["vocab_size"] != model.embedding.rows:
        raise UnsupportedModelError(
            f"the configuration says {config['model']['vocab_size']} tokens, the embedding has {model.embedding.rows}"
        )


def export_onnx(checkpoint: Checkpoint, golden: GoldenVectors, folder: Path) -> None:
    """Write the package for ONNX Runtime and onnxruntime-genai.

    ``model.onnx`` (int8 activations where they are precise enough, what genai loads), ``model.exact.onnx`` (float32
    activations, to check and to evaluate), ``model.onnx.data`` (the weights of both), ``genai_config.json``, the
    checkpoint's tokenizer files and ``golden.npz``. The same checkpoint gives the same bytes. The folder appears when
    it is complete.

    Args:
        checkpoint: what to export; its folder holds the tokenizer files.
        golden: vectors to put beside the model.
        folder: where to; must not exist.

    Raises:
        OutputExistsError: ``folder`` exists.
        UnsupportedModelError: a family or a configuration that cannot be exported.
    """
    if folder.exists():
        raise OutputExistsError(f"{folder} exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        graph_model, genai_config = build_float_graph(checkpoint, scratch / "builder")
        package = scratch / "package"
        package.mkdir()
        _save(quantized_graph(checkpoint, graph_model), package)
        _check_genai_config(genai_config, checkpoint.model)
        genai_config = complete_genai_config(genai_config, checkpoint)
        (package / "genai_config.json").write_text(json.dumps(genai_config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(checkpoint.folder, package, genai_config["model"]["context_length"])
        write_golden(package / GOLDEN, golden)
        package.rename(folder)
    logger.info("wrote %s", folder)
