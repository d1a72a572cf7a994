"""Layouts: how quantized weights may lie in files, one file each."""

from mgptq_export.layouts.base import BITS_WINDOW, Allocated, Calibration, Layout, Reach, SolvedGroup, stacked_rows
from mgptq_export.layouts.columns import ColumnLayout
from mgptq_export.layouts.tensors import TensorLayout

__all__ = [
    "BITS_WINDOW",
    "COLUMNS",
    "LAYOUTS",
    "TENSORS",
    "Allocated",
    "Calibration",
    "Layout",
    "Reach",
    "SolvedGroup",
    "stacked_rows",
]

COLUMNS: Layout = ColumnLayout()
TENSORS: Layout = TensorLayout()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (COLUMNS, TENSORS)}
