"""The size of a stock GGUF file that is not written."""

import json

from mgptq_export.targets.gguf_size import SizingWriter, gguf_size
from mgptq_export.targets.llama_cpp.export import file_name, fill_writer
from mgptq_export.targets.skeleton import PlannedFile, Skeleton, most_padding
from mgptq_runtime.formats import GGML_FORMATS

__all__ = ["llama_cpp_files"]

FOLDER = "llama.cpp"
TYPES_KEY = "mgptq.weights_by_type"


def llama_cpp_files(skeleton: Skeleton) -> list[PlannedFile]:
    """The GGUF file.

    Raises:
        BadInputError: the tokenizer is absent, or does not fit the model.
        UnsupportedModelError: a model or a tokenizer that llama.cpp cannot represent.
    """
    writer = SizingWriter(None, skeleton.model.family)
    fill_writer(writer, skeleton.checkpoint)
    possible = {fmt for linear in skeleton.model.linears() for fmt in skeleton.formats_of(linear)}
    longest = json.dumps(dict.fromkeys(sorted(possible), skeleton.model.linear_weights))
    writer.kv_data[0][TYPES_KEY].value = longest
    size = gguf_size(writer) + skeleton.unspent + _padding(skeleton, writer.data_alignment)
    return [PlannedFile(f"{FOLDER}/{file_name(skeleton.checkpoint)}", size, size)]


def _padding(skeleton: Skeleton, alignment: int) -> int:
    """The most that aligns the linears; nothing where rows are a multiple of 16."""
    return sum(
        max(most_padding(linear.rows * GGML_FORMATS[fmt].block_bytes, alignment) for fmt in skeleton.formats_of(linear))
        for linear in skeleton.model.linears()
    )
