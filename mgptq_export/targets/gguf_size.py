"""The size of a GGUF file that is not written."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

__all__ = ["SizingWriter", "gguf_size"]


class SizingWriter(GGUFWriter):
    """Takes what a GGUFWriter takes, and keeps no tensor."""

    def add_tensor(
        self,
        name: str,
        tensor: np.ndarray,
        raw_shape: Sequence[int] | None = None,
        raw_dtype: Any = None,
        tensor_endianess: Any = None,
    ) -> None:
        """Take name, shape and type."""
        shape = tensor.shape if raw_shape is None else raw_shape
        self.add_tensor_info(name, shape, tensor.dtype, tensor.nbytes, raw_dtype=raw_dtype)


def gguf_size(writer: SizingWriter) -> int:
    """Bytes of the file that a filled writer would write: its own header, and the tensors with their padding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.flush()
        finally:
            writer.close()
        header = path.stat().st_size
    sizes = [header, *(info.nbytes for info in writer.tensors[0].values())]
    return sum(writer.ggml_pad(size, writer.data_alignment) for size in sizes)
