"""Source models: where they come from."""

from mgptq_export.models.source import (
    SourceModel,
    check_local,
    count_model_weights,
    load_dequantized,
    load_quantized_weights,
    load_shape,
    load_source,
)

__all__ = [
    "SourceModel",
    "check_local",
    "count_model_weights",
    "load_dequantized",
    "load_quantized_weights",
    "load_shape",
    "load_source",
]
