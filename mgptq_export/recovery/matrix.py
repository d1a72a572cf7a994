"""A quantized matrix whose codes are fixed and whose scales are trained."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from mgptq_export.solver.scales import representable
from mgptq_runtime.formats import FORMATS, GGML_FORMATS
from mgptq_runtime.quantized_model import QuantizedLinear, Segment

__all__ = ["BlockMatrix", "Factors", "block_sums", "dequantize"]

# Rows are taken in pieces of about this many weights, so that float32 copies stay small and near the processor.
PIECE_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Factors:
    """What turns a matrix's values into weights: ``values * scales - minima``, block by block.

    Attributes:
        scales: float32 [rows, blocks].
        minima: float32 [rows, blocks], or None where the format has none.
    """

    scales: torch.Tensor
    minima: torch.Tensor | None = None


def dequantize(values: torch.Tensor, factors: Factors, dtype: torch.dtype) -> torch.Tensor:
    """Weights of a matrix, or of some of its rows.

    Args:
        values: int8 [rows, columns], whole blocks.
        factors: of as many rows.

    Returns:
        [rows, columns], computed in float32 and rounded to ``dtype`` once.
    """
    rows, columns = values.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=values.device)
    step = max(1, PIECE_WEIGHTS // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        scales = factors.scales[piece].unsqueeze(-1)
        part = values[piece].float().view(*scales.shape[:2], -1).mul_(scales)
        if factors.minima is not None:
            part -= factors.minima[piece].unsqueeze(-1)
        weight[piece] = part.view(-1, columns)
    return weight


def block_sums(gradient: torch.Tensor, values: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, ...]:
    """Gradients of scales and minima where a matrix's weights have ``gradient``, [rows, columns].

    Returns:
        (of scales, of minima), float32 [rows, blocks] each; the second only where there are minima.
    """
    blocks = (*factors.scales.shape, -1)
    gradient = gradient.float().view(blocks)
    scales = (gradient * values.view(blocks)).sum(-1)
    return (scales,) if factors.minima is None else (scales, -gradient.sum(-1))


class BlockMatrix:
    """The values of a matrix in storage order, and its trainable scales.

    Attributes:
        values: int8 [rows, columns], padded to whole blocks; zero in the padding.
        d: float32 [rows, blocks], trained.
        dmin: float32 [rows, blocks], trained; None for types without minima.
        permutation, inverse: int64 [columns]: the column at each place, and the place of each column; or None.
    """

    def __init__(self, linear: QuantizedLinear, device: torch.device) -> None:
        parts = [_read_segment(segment) for segment in linear.segments]
        self.linear = linear
        self.values = torch.from_numpy(np.concatenate([part.values for part in parts], axis=1)).to(device)
        self.values[:, linear.columns :] = 0
        self.d = _leaf(np.concatenate([part.d for part in parts], axis=1), device)
        # Only types that are a linear's one segment have more than one scale per block.
        self.dmin = None if parts[0].dmin is None else _leaf(parts[0].dmin, device)
        self._scales = None if parts[0].scales is None else torch.from_numpy(parts[0].scales).to(device)
        self._mins = None if parts[0].mins is None else torch.from_numpy(parts[0].mins).to(device)
        self._start = [parameter.detach().clone() for parameter in self.parameters()]
        self.permutation = self.inverse = None
        if linear.permutation is not None:
            self.permutation = torch.from_numpy(linear.permutation.astype(np.int64)).to(device)
            self.inverse = self.permutation.argsort()

    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self.d] if self.dmin is None else [self.d, self.dmin]

    def factors(self) -> Factors:
        """Scales and minima of sub-blocks where the type has these, else of blocks; differentiable."""
        minima = None if self.dmin is None or self._mins is None else _spread(self.dmin, self._mins)
        return Factors(self.d if self._scales is None else _spread(self.d, self._scales), minima)

    @torch.no_grad()
    def round(self) -> None:
        """Make the trained scales what a file can hold; those that were zero stay so."""
        for parameter, start in zip(self.parameters(), self._start, strict=True):
            parameter.copy_(torch.where(start == 0, start, representable(parameter, start)))

    def quantized(self) -> QuantizedLinear:
        """The matrix with its rounded scales; all else as it was."""
        d = _halves(self.d)
        segments, start = [], 0
        for segment in self.linear.segments:
            if segment.format in GGML_FORMATS:
                segments.append(self._ggml_segment(segment, d))
                continue
            fmt = FORMATS[segment.format]
            codes, scales = fmt.unpack(segment.data)
            stop = start + scales.shape[1]
            segments.append(Segment(segment.format, fmt.pack(codes, d[:, start:stop])))
            start = stop
        return replace(self.linear, segments=tuple(segments))

    def _ggml_segment(self, segment: Segment, d: np.ndarray) -> Segment:
        fmt = GGML_FORMATS[segment.format]
        codes, parameters = fmt.unpack(segment.data)
        dmin = None if self.dmin is None else _halves(self.dmin)
        return Segment(segment.format, fmt.pack(codes, replace(parameters, d=d, dmin=dmin)))


@dataclass(frozen=True)
class _Read:
    """A segment's values, int8 [rows, columns], and parameters, float32; None where the format has none."""

    values: np.ndarray
    d: np.ndarray
    scales: np.ndarray | None = None
    dmin: np.ndarray | None = None
    mins: np.ndarray | None = None


def _read_segment(segment: Segment) -> _Read:
    if segment.format in FORMATS:
        fmt = FORMATS[segment.format]
        codes, scales = fmt.unpack(segment.data)
        return _Read(_values(codes, fmt.step, fmt.offset), scales.astype(np.float32))
    ggml = GGML_FORMATS[segment.format]
    codes, parameters = ggml.unpack(segment.data)
    rest = (parameters.scales, parameters.dmin, parameters.mins)
    return _Read(
        _values(codes, ggml.step, ggml.offset),
        parameters.d.astype(np.float32),
        *(None if array is None else array.astype(np.float32) for array in rest),
    )


def _values(codes: np.ndarray, step: int, offset: int) -> np.ndarray:
    """All formats' values lie in -128 .. 127."""
    return (codes.astype(np.int16) * np.int16(step) + np.int16(offset)).astype(np.int8)


def _leaf(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device).requires_grad_()


def _spread(blocks: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] times [rows, sub_blocks], every block's number for its sub-blocks."""
    return blocks.repeat_interleave(multipliers.shape[1] // blocks.shape[1], dim=1) * multipliers


def _halves(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float16)
