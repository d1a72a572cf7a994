"""What all storage formats have in common."""

from typing import ClassVar

import numpy as np

from mgptq_runtime.errors import ContainerError

__all__ = ["Format"]


class Format:
    """One storage format: rows of whole blocks, a block being some columns in some bytes.

    Class attributes:
        name: the name in files.
        block_columns: columns of a block.
        block_bytes: bytes of a block, scales included.
        bits_per_weight: stored bits of a weight, scales included.
    """

    name: ClassVar[str]
    block_columns: ClassVar[int]
    block_bytes: ClassVar[int]
    bits_per_weight: ClassVar[float]

    def _blocks(self, data: np.ndarray) -> np.ndarray:
        """Packed rows, uint8 [rows, blocks * block_bytes], to uint8 [rows, blocks, block_bytes]."""
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % self.block_bytes:
            raise ContainerError(
                f"a {self.name} segment needs uint8 rows of whole {self.block_bytes}-byte blocks, "
                f"got {data.dtype} {data.shape}"
            )
        return data.reshape(data.shape[0], -1, self.block_bytes)

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Weights of packed rows: uint8 [rows, blocks * block_bytes] to float32 [rows, blocks * block_columns]."""
        raise NotImplementedError

    def validate_codes(self, data: np.ndarray) -> None:
        """Check packed rows, uint8 [rows, blocks * block_bytes], for bytes that are no code.

        Raises:
            ContainerError: there is one.
        """
