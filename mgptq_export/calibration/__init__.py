"""Calibration: the text, and what it tells about the model."""

from mgptq_export.calibration.attribution import Attribution, attribute
from mgptq_export.calibration.drift import DriftFlow, Measured
from mgptq_export.calibration.flow import FIRST_TOKEN_WEIGHT, LARGEST_WEIGHT, HessianAccumulator, LayerFlow
from mgptq_export.calibration.statistics import GroupStatistics, ModelStatistics, collect_statistics
from mgptq_export.calibration.text import calibration_sha256, calibration_tokens, file_tokens, recovery_tokens

__all__ = [
    "FIRST_TOKEN_WEIGHT",
    "LARGEST_WEIGHT",
    "Attribution",
    "DriftFlow",
    "GroupStatistics",
    "HessianAccumulator",
    "LayerFlow",
    "Measured",
    "ModelStatistics",
    "attribute",
    "calibration_sha256",
    "calibration_tokens",
    "collect_statistics",
    "file_tokens",
    "recovery_tokens",
]
