"""Source models: where they come from."""

from mgptq_export.models.source import SourceModel, load_quantized_weights, load_shape, load_source

__all__ = ["SourceModel", "load_quantized_weights", "load_shape", "load_source"]
