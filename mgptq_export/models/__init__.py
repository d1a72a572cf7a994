"""Source models: where they come from, and what the families call their parts."""

from mgptq_export.models.family import FAMILIES, Family, GroupModules, family_of
from mgptq_export.models.source import SourceModel, load_quantized_weights, load_shape, load_source

__all__ = [
    "FAMILIES",
    "Family",
    "GroupModules",
    "SourceModel",
    "family_of",
    "load_quantized_weights",
    "load_shape",
    "load_source",
]
