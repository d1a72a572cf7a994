"""The formats' grids as the solver needs them."""

from dataclasses import dataclass
from functools import cache

import torch

from mgptq_runtime.formats import FORMATS, GGML_FORMATS

__all__ = ["Grid", "grid_of"]


@dataclass(frozen=True)
class Grid:
    """Weights ``(step * c + offset) * d`` for codes ``c`` in ``0 .. levels - 1``.

    ``extreme`` is the largest ``|step * c + offset|``; ``symmetric`` grids gain nothing from a negative scale.
    """

    levels: int
    step: int
    offset: int

    @property
    def extreme(self) -> int:
        return max(-self.offset, self.step * (self.levels - 1) + self.offset)

    @property
    def symmetric(self) -> bool:
        return -self.offset == self.step * (self.levels - 1) + self.offset

    def nearest(self, ratio: torch.Tensor) -> torch.Tensor:
        """Nearest values of the grid continued without end: any shape of ``weight / scale``, to integers as floats."""
        if self.step == 1:
            return ratio.round()
        return ((ratio - self.offset) / self.step).round_().mul_(self.step).add_(self.offset)

    def clip(self, values: torch.Tensor, *, mirrored: bool = False) -> torch.Tensor:
        """Values of the endless grid, cut to this grid, or to its mirror image for the same weights at ``-scale``."""
        low, high = self.offset, self.step * (self.levels - 1) + self.offset
        return values.clamp(-high, -low) if mirrored else values.clamp(low, high)

    def round(self, ratio: torch.Tensor) -> torch.Tensor:
        """Nearest grid values of any shape of ``weight / scale``."""
        return self.clip(self.nearest(ratio))

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of grid values."""
        return ((values - self.offset) / self.step).round().to(torch.uint8)


@cache
def grid_of(name: str) -> Grid:
    """The grid of a format of :mod:`mgptq_runtime.formats`, of either registry."""
    if name == "q8_0":
        # The type could hold -128, which llama.cpp never writes and its kernels need not expect.
        return Grid(levels=255, step=1, offset=-127)
    fmt = FORMATS.get(name) or GGML_FORMATS[name]
    return Grid(fmt.levels, fmt.step, fmt.offset)
