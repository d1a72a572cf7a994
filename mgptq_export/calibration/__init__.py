"""Calibration: the text, and what it tells about the model."""

from mgptq_export.calibration.statistics import GroupStatistics, ModelStatistics, collect_statistics
from mgptq_export.calibration.text import calibration_tokens, read_documents, tokenize

__all__ = [
    "GroupStatistics",
    "ModelStatistics",
    "calibration_tokens",
    "collect_statistics",
    "read_documents",
    "tokenize",
]
