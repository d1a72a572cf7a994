"""Memory of what outlives a step: weights, hidden states, sums. Where there is not enough of it, in mapped files."""

import copy
import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch
from torch import nn

__all__ = ["IN_MEMORY", "Memory", "memory_for"]

AVAILABLE_SHARE = 0.8
# The original, what is quantized of it, a trial, an evaluation; Hessians are about as large as the weights.
MODELS_AT_ONCE = 5
# Libraries, and what a step takes however small the model is.
LEAST_BYTES = 1 << 30
# Numbers that are copied before they are written to disk.
PIECE = 1 << 24
M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 1 << 20
CONTROL_GROUP_FILES = tuple(
    (Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / used)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
)


class Memory:
    """Keeps tensors; by default where they are.

    With a folder they go to files there, which are mapped and have no names: the system holds as much of them in
    memory as there is room for, and nothing is left of them when the process ends, in whatever way.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        if self.is_paged:
            _return_freed_memory_at_once()
            _allow_many_files()
        self._mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    @property
    def is_paged(self) -> bool:
        """Whether tensors go to files."""
        return self._folder is not None

    def keep(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, or its like in a file; what is not on the CPU stays where it is.

        Args:
            dtype: of what is kept, which then is never the tensor itself.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None or tensor.device.type != "cpu" or not tensor.numel():
            return tensor if dtype is None else tensor.to(dtype, copy=True)
        kept = self._in_file(tensor.shape, dtype or tensor.dtype)
        for source, target in zip(tensor.flatten().split(PIECE), kept.flatten().split(PIECE), strict=True):
            target.copy_(source)
            self.release(tensor, kept)
        return kept

    def zeros(self, *shape: int, device: torch.device) -> torch.Tensor:
        """What sums begin with, float32; in a file where this memory is one of files, and the device the CPU.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None or device.type != "cpu":
            return torch.zeros(shape, device=device)
        return self._in_file(shape, torch.float32)

    def _in_file(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in a file."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            size = math.prod(shape) * dtype.itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would kill the process
            else:
                file.truncate(size)
            mapping = mmap.mmap(file.fileno(), size)
        made = torch.frombuffer(mapping, dtype=dtype).view(shape)
        self._mappings[made.data_ptr()] = mapping
        return made

    def release(self, *tensors: torch.Tensor) -> None:
        """Say that tensors are not needed soon: what is in files need not stay in memory."""
        for tensor in tensors:
            mapping = self._mappings.get(tensor.data_ptr())
            if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapping.madvise(mmap.MADV_DONTNEED)

    def release_weights(self, module: nn.Module) -> None:
        """Say that a module's weights are not needed soon."""
        self.release(*(parameter.data for parameter in module.parameters()))

    def copy_of(self, model: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """A copy of a model, with weights of its own.

        Args:
            dtype: of these weights, where it is another; buffers, such as rotary frequencies, stay as they are.
        """
        own: dict[int, Any] = {}
        for parameter in model.parameters():
            values = parameter.data
            kept = self.keep(values, dtype)
            own[id(parameter)] = nn.Parameter(values.clone() if kept is values else kept, requires_grad=False)
            self.release(values, kept)
        return copy.deepcopy(model, own)

    def release_after_use(self, model: Any) -> None:
        """From now on, release every decoder layer of a model, its embedding and its head when they have computed."""
        if not self.is_paged:
            return

        def release(module: nn.Module, inputs: object, output: object) -> None:
            self.release_weights(module)

        for module in (*model.model.layers, model.model.embed_tokens, model.lm_head):
            module.register_forward_hook(release)


IN_MEMORY = Memory()
"""Keeps everything where it is."""


def _return_freed_memory_at_once() -> None:
    """The C library keeps freed blocks of up to 32 MiB, in the gaps between which larger ones find no room."""
    with suppress(OSError, AttributeError, TypeError):  # other systems' libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def _allow_many_files() -> None:
    """Every mapping counts as an open file, and there are some for each weight."""
    with suppress(ImportError, OSError, ValueError):  # Windows; systems that refuse
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def memory_for(weights: int, folder: Path, most: int | None, processes: int = 1) -> Memory:
    """In memory where a model fits with all that a run makes of it, else in files. What is computed is the same.

    Args:
        weights: how many the model has.
        folder: for files.
        most: bytes that may be used; None for this process' part of most of what is available now.
        processes: how many there are on this machine.
    """
    room = int(AVAILABLE_SHARE * _available()) // processes if most is None else most
    return IN_MEMORY if MODELS_AT_ONCE * 4 * weights + LEAST_BYTES <= room else Memory(folder)


def _available() -> int:
    """Bytes that the machine has left, or the control group that the process is in by itself, as in a container."""
    room = psutil.virtual_memory().available
    for limit, used in CONTROL_GROUP_FILES:
        with suppress(OSError, ValueError):  # no such group; no limit is the word max
            room = min(room, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return max(room, 0)
