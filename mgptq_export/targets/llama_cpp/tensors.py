"""The tensors of a stock GGUF file: packed rows as they are, in llama.cpp's order and under its names."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter

from mgptq_export.families import FAMILIES, Family
from mgptq_export.targets.llama_cpp.config import WAY_OUT
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.formats import GGML_FORMATS, GgmlFormat
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel

__all__ = ["add_tensors"]

HEAD_COUNTS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
BIAS = "_bias"
FREQUENCIES = "_inverse_frequencies"


def add_tensors(writer: GGUFWriter, model: QuantizedModel, config: Any) -> None:
    """Add all weights.

    Args:
        config: the model's transformers configuration.

    Raises:
        BadInputError: a linear is not one tensor of a ggml type in its natural column order.
        UnsupportedModelError: a bias that llama.cpp does not take.
        ValueError: linears that llama.cpp holds as one tensor differ in type.
    """
    family = FAMILIES[model.family]
    for name, values in family.gguf_rotary_tensors(config, model.tensors).items():
        writer.add_tensor(name, values)
    _add_packed(writer, "token_embd", [model.embedding])
    if model.head is not None:
        _add_packed(writer, "output", [model.head])
    for name, parts in _fused(family, model):
        _add_packed(writer, name, parts, _row_order(family, model.hyperparameters, name))
    for name in sorted(model.tensors):
        if not name.endswith(FREQUENCIES):  # the family has said them in llama.cpp's way
            _add_float(writer, family, model, name)


def _fused(family: Family, model: QuantizedModel) -> Iterator[tuple[str, list[QuantizedLinear]]]:
    """llama.cpp's matrices in forward order: name, and the linears whose rows it consists of."""
    whole = {part: name for name, parts in family.gguf_fused.items() for part in parts}
    found: dict[str, list[QuantizedLinear]] = {}
    for linear in model.linears():
        block, _, part = linear.name.rpartition(".")
        found.setdefault(f"{block}.{whole.get(part, part)}", []).append(linear)
    yield from found.items()


def _row_order(family: Family, hyperparameters: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Which row of a matrix goes where: its rotary halves become neighbours, head by head."""
    heads = hyperparameters.get(HEAD_COUNTS.get(name.rpartition(".")[2], ""))
    if not family.rotary_pairs or heads is None:
        return None
    size = hyperparameters["attention.key_length"]
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).ravel()


def _ggml_data(linear: QuantizedLinear) -> tuple[GgmlFormat, np.ndarray]:
    """Type and packed rows of a linear, uint8 [rows, row_bytes]."""
    formats = [segment.format for segment in linear.segments]
    if len(formats) != 1 or formats[0] not in GGML_FORMATS or linear.permutation is not None:
        raise BadInputError(
            f"{linear.name} is stored as {', '.join(formats)}, llama.cpp takes one of {', '.join(GGML_FORMATS)} "
            "for a whole matrix; quantize the model with --targets llama.cpp"
        )
    return GGML_FORMATS[formats[0]], linear.segments[0].data


def _add_packed(
    writer: GGUFWriter, name: str, parts: list[QuantizedLinear], row_order: np.ndarray | None = None
) -> None:
    formats, data = zip(*(_ggml_data(part) for part in parts), strict=True)
    if len({fmt.name for fmt in formats}) > 1:
        types = ", ".join(f"{part.name} {fmt.name}" for part, fmt in zip(parts, formats, strict=True))
        raise ValueError(f"{name} is one tensor in llama.cpp, its parts must have one type: {types}")
    rows = np.concatenate(data) if len(data) > 1 else data[0]
    if row_order is not None:
        rows = rows[row_order]
    # Of int8 the writer takes shape and type as given; of uint8 it would look the type up, and it knows no Q2_0.
    writer.add_tensor(
        f"{name}.weight",
        np.ascontiguousarray(rows).view(np.int8),
        raw_shape=(len(rows), parts[0].columns),
        raw_dtype=formats[0].ggml_type,  # type: ignore[arg-type]
    )


def _add_float(writer: GGUFWriter, family: Family, model: QuantizedModel, name: str) -> None:
    """A norm or a bias."""
    values = np.ascontiguousarray(model.tensors[name], np.float32)
    if not name.endswith(BIAS):
        writer.add_tensor(f"{name}.weight", values)
        return
    linear = name.removesuffix(BIAS)
    if linear.rpartition(".")[2] not in family.gguf_biases:
        raise UnsupportedModelError(f"llama.cpp takes no {name} for {family.name} models; {WAY_OUT}")
    order = _row_order(family, model.hyperparameters, linear)
    writer.add_tensor(f"{linear}.bias", values if order is None else values[order])
