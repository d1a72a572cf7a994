"""A quantized matrix whose codes are fixed and whose scales are trained."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from mgptq_export.compute import pieces
from mgptq_export.solver.block_fit import half
from mgptq_export.solver.scales import representable
from mgptq_runtime.formats import FORMATS, GGML_FORMATS
from mgptq_runtime.quantized_model import QuantizedLinear, Segment

__all__ = ["BlockMatrix", "Factors"]

ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Factors:
    """What turns a matrix's values into weights: ``values * scales - minima``, block by block.

    Attributes:
        scales: float32 [rows, blocks].
        minima: float32 [rows, blocks], or None where the format has none.
    """

    scales: torch.Tensor
    minima: torch.Tensor | None = None


class BlockMatrix:
    """The values of a matrix in the model's own column order, and its trainable scales.

    Blocks are runs of stored columns, which a permutation scatters over the model's; :meth:`spread` and
    :meth:`block_sums` go from blocks to columns and back.

    Attributes:
        values: int8 [rows, columns], without padding.
        d: float32 [rows, blocks], trained.
        dmin: float32 [rows, blocks], trained; None for types without minima.
    """

    def __init__(self, linear: QuantizedLinear, device: torch.device) -> None:
        parts = [_read_segment(segment) for segment in linear.segments]
        stored = np.concatenate([part.values for part in parts], axis=1)
        place = np.arange(linear.columns) if linear.permutation is None else np.argsort(linear.permutation)
        self.linear = linear
        self.values = torch.from_numpy(stored[:, place]).to(device)
        self.d = _leaf(np.concatenate([part.d for part in parts], axis=1), device)
        # Only types that are a linear's one segment have more than one scale per block.
        self.dmin = None if parts[0].dmin is None else _leaf(parts[0].dmin, device)
        self._scales = None if parts[0].scales is None else torch.from_numpy(parts[0].scales).to(device)
        self._mins = None if parts[0].mins is None else torch.from_numpy(parts[0].mins).to(device)
        self._start = [parameter.detach().clone() for parameter in self.parameters()]
        blocks = (self.d if self._scales is None else self._scales).shape[1]
        self._width = stored.shape[1] // blocks
        block = torch.from_numpy(place // self._width)
        self._block = block.to(device)
        # Whole blocks side by side are summed without a product, whose cost grows with the number of blocks.
        contiguous = linear.permutation is None and linear.columns == stored.shape[1]
        self._members = None if contiguous else functional.one_hot(block, blocks).float().to(device)

    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self.d] if self.dmin is None else [self.d, self.dmin]

    def factors(self) -> Factors:
        """Scales and minima of sub-blocks where the type has these, else of blocks; differentiable."""
        minima = None if self.dmin is None or self._mins is None else _spread(self.dmin, self._mins)
        return Factors(self.d if self._scales is None else _spread(self.d, self._scales), minima)

    def spread(self, of_blocks: torch.Tensor) -> torch.Tensor:
        """Every block's number for each of its columns: [..., blocks] to [..., columns]."""
        return of_blocks.index_select(-1, self._block)

    def block_sums(self, of_columns: torch.Tensor) -> torch.Tensor:
        """Sums over the columns of every block: float32 [rows, columns] to [rows, blocks]."""
        if self._members is None:
            return of_columns.view(len(of_columns), -1, self._width).sum(-1)
        return of_columns @ self._members

    def weight(self, factors: Factors, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns], computed in float32 and rounded to ``dtype`` once."""
        weight = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for piece in pieces(weight):
            part = self.values[piece].float().mul_(self.spread(factors.scales[piece]))
            if factors.minima is not None:
                part -= self.spread(factors.minima[piece])
            weight[piece] = part
        return weight

    def take_gradient(self, gradient: torch.Tensor, rows: slice = ALL_ROWS) -> Factors:
        """Gradients of scales and minima, float32, where the weights of ``rows`` have ``gradient``, [rows, columns].

        All gradients of linears and head pass here, once a step: what else is trained finds its own here.
        """
        values, scales, minima = self.values[rows], [], []
        for piece in pieces(gradient):
            part = gradient[piece].float()
            if self.dmin is not None:
                minima.append(self.block_sums(part).neg_())
            scales.append(self.block_sums(part.mul_(values[piece].float())))
        return Factors(torch.cat(scales), torch.cat(minima) if minima else None)

    @torch.no_grad()
    def round(self) -> None:
        """Make the trained scales what a file can hold; those that were zero stay so.

        Where sub-blocks have scales, a block's own is small, often below the smallest normal float16.
        """
        is_ggml = self.linear.segments[0].format in GGML_FORMATS
        for parameter, start in zip(self.parameters(), self._start, strict=True):
            trained = torch.where(torch.isfinite(parameter), parameter, start)
            rounded = half(trained) if is_ggml else representable(trained, start)
            parameter.copy_(torch.where(start == 0, start, rounded))

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
