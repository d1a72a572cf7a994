"""Storage formats of quantized weights: the bits on disk, defined once.

``FORMATS`` are the formats of containers and ONNX graphs, which mix inside a matrix; ``GGML_FORMATS`` are stock ggml
types, of which a matrix has one.
"""

from mgptq_runtime.formats.base import Format
from mgptq_runtime.formats.column_blocks import BLOCK_COLUMNS, FORMATS, ColumnFormat, padded_columns
from mgptq_runtime.formats.ggml import GGML_FORMATS, BlockParameters, GgmlFormat

__all__ = [
    "BLOCK_COLUMNS",
    "FORMATS",
    "GGML_FORMATS",
    "BlockParameters",
    "ColumnFormat",
    "Format",
    "GgmlFormat",
    "format_named",
    "padded_columns",
]


def format_named(name: str) -> Format:
    """The format of either registry.

    Raises:
        ValueError: no format has that name.
    """
    found = FORMATS.get(name) or GGML_FORMATS.get(name)
    if found is None:
        raise ValueError(f"unknown format {name!r}; the formats are {', '.join([*FORMATS, *GGML_FORMATS])}")
    return found
