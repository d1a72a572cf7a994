"""What a long job has finished, on disk: one that was stopped goes on from there, and ends with the same bytes."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mgptq_runtime.errors import BadInputError

__all__ = ["FORGETFUL", "Journal", "Kept", "Record"]

FACTS = "facts"


@dataclass(frozen=True)
class Record:
    """Attributes:
    arrays: by name.
    facts: JSON values.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Any = None


@dataclass
class Kept:
    """What has been written, parts of the job included: records, their bytes on disk, seconds until they were there."""

    records: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Journal:
    """Records by name. Each is on disk whole or not at all, and has reached the disk when it is said to be there.

    Args:
        folder: where records lie; None to remember nothing.
        kept: counts what is written.
    """

    def __init__(self, folder: Path | None = None, kept: Kept | None = None) -> None:
        self._folder = folder
        self.kept = kept or Kept()

    def within(self, name: str) -> "Journal":
        """A journal of its own for a part of the job."""
        return Journal(self._folder and self._folder / name, self.kept)

    def __contains__(self, name: str) -> bool:
        return self._folder is not None and self._path(name).exists()

    @property
    def empty(self) -> bool:
        """Whether it holds nothing."""
        return self._folder is None or not any(self._folder.rglob("*.safetensors"))

    def once(self, name: str, make: Callable[[], Record]) -> Record:
        """The record of this name; made, and kept, where there is none.

        Of what is kept, arrays are parts of the file, which take memory as they are used.
        """
        if name not in self:
            made = make()
            if self._folder is None:
                return made
            self.put(name, made)
        found = self.get(name)
        assert found is not None
        return found

    def get(self, name: str) -> Record | None:
        """The record of this name, or None.

        Raises:
            BadInputError: it is damaged.
            OSError: the system cannot read it now.
        """
        if name not in self:
            return None
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                arrays = {name: file.get_tensor(name).numpy() for name in names}
                return Record(arrays, json.loads(file.metadata()[FACTS]))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's fault, not the file's
                raise
            raise BadInputError(f"{path} is damaged ({error}); start anew with --overwrite") from error

    def put(self, name: str, record: Record) -> None:
        """Keep a record, in the place of one of the same name."""
        if self._folder is None:
            return
        start = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays = {key: np.ascontiguousarray(array) for key, array in record.arrays.items()}
        partial = self._folder / f".{name}.partial"
        try:
            save_file(arrays, partial, metadata={FACTS: json.dumps(record.facts)})
            _flush(partial, os.O_RDWR)
            partial.replace(self._path(name))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with suppress(PermissionError):  # folders cannot be opened on Windows
            _flush(self._folder, os.O_RDONLY)
        self.kept.records += 1
        self.kept.bytes += self._path(name).stat().st_size
        self.kept.seconds += time.monotonic() - start

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


FORGETFUL = Journal()


def _flush(path: Path, access: int) -> None:
    """Wait until a file, or a folder's list of files, has reached the disk."""
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
