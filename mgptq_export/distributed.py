"""Several processes, on one machine or more, that quantize one model together; torchrun starts them.

Every rank runs the same program on the same weights. What is measured is summed over shares of the text, what is solved
is dealt out and gathered, and what must be decided once is decided by the first rank.
"""

import io
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mgptq_export.journal import Journal, Record
from mgptq_export.launch import launched
from mgptq_runtime.errors import BadInputError, DistributedError

__all__ = ["ALONE", "World", "joined"]

T = TypeVar("T")

# A rank that ends is noticed at once, this is for one that hangs: longer than the first rank alone ever takes, which
# writes the calibration text of a large model for hours.
TIMEOUT = timedelta(days=1)
# Where in gloo an error was found.
SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")

logger = logging.getLogger(__name__)


class World:
    """The processes that work on a model together; here the only one, which exchanges nothing.

    Attributes:
        rank: the number of this process.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reads texts, writes files and prints."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """Those of a sequence, or rows of a tensor, that are this rank's: every ``size``-th."""
        return items[self.rank :: self.size]

    def rows(self, count: int) -> slice:
        """Those of ``count`` rows that are this rank's: one run, as long as others' but for one row."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def map(self, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        """The results of all items in order, on every rank; each was computed by one. It takes as many at a time."""
        for start in range(0, len(items), self.size):
            place = start + self.rank
            found = self.gather(function(items[place]) if place < len(items) else None)
            yield from found[: len(items) - start]

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace tensors by their sums over all ranks, the same bits on each."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes; the others wait for it."""
        return make()

    def shared(self, journal: Journal) -> Journal:
        """The first rank's journal, as every rank sees it."""
        return journal

    def leave(self) -> None:
        """Say that this rank will exchange no more; all do so."""


ALONE = World()


class _Ranks(World):
    """Several processes that have found one another.

    Attributes:
        device: of this rank.
        exchanged: bytes by kind of exchange: what every rank put into sums, and what came of gathering and of the first
            rank.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.exchanged = {"summed": 0, "gathered": 0, "from the first": 0}

    def sum_(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            with _typed_errors():
                torch.distributed.all_reduce(tensor)
            self.exchanged["summed"] += tensor.nbytes

    def gather(self, value: Any) -> list[Any]:
        packed: list[Any] = [None] * self.size
        with _typed_errors():
            torch.distributed.all_gather_object(packed, _pack(value))
        self.exchanged["gathered"] += sum(map(len, packed))
        return [self._unpack(one) for one in packed]

    def from_first(self, make: Callable[[], T]) -> T:
        made = make() if self.is_first else None
        packed = [_pack(made)]
        with _typed_errors():
            torch.distributed.broadcast_object_list(packed)
        self.exchanged["from the first"] += len(packed[0])
        return made if made is not None else self._unpack(packed[0])

    def shared(self, journal: Journal) -> Journal:
        return _SharedJournal(self, journal)

    def leave(self) -> None:
        torch.distributed.destroy_process_group()
        amounts = ", ".join(f"{count} bytes {kind}" for kind, count in self.exchanged.items())
        logger.info("%d ranks exchanged %s", self.size, amounts)

    def _unpack(self, packed: bytes) -> Any:
        def here(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else storage.cuda(self.device.index)

        return torch.load(io.BytesIO(packed), map_location=here, weights_only=False)


class _SharedJournal(Journal):
    """The first rank alone reads and writes; the others get what it found. All ask for the same in the same order."""

    def __init__(self, world: World, journal: Journal) -> None:
        super().__init__()
        self._world, self._journal = world, journal

    def within(self, name: str) -> Journal:
        return _SharedJournal(self._world, self._journal.within(name))

    def __contains__(self, name: str) -> bool:
        return self._world.from_first(lambda: name in self._journal)

    def once(self, name: str, make: Callable[[], Record]) -> Record:
        found = self.get(name)
        if found is None:
            made = make()
            self.put(name, made)
            found = self._journal.get(name) or made
        return found

    def get(self, name: str) -> Record | None:
        return self._world.from_first(lambda: self._journal.get(name))

    def put(self, name: str, record: Record) -> None:
        if self._world.is_first:
            self._journal.put(name, record)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun started, until :meth:`World.leave`; without torchrun :data:`ALONE`.

    Args:
        device: of this rank, see :meth:`mgptq_export.launch.Launch.device`. The ranks talk through gloo, of tensors on
            GPUs through NCCL.

    Raises:
        BadInputError: there are fewer GPUs than processes.
        DistributedError: the others cannot be reached. Also later, where one of them ends or hangs.
    """
    launch = launched()
    if launch.size == 1:
        yield ALONE
        return
    here, backend = torch.device(device), "gloo"
    if here.type == "cuda":
        if launch.local_size > (found := torch.cuda.device_count()):
            raise BadInputError(
                f"torchrun started {launch.local_size} processes here, which has {found} GPUs that PyTorch can use; "
                "start one for each, or give --device cpu"
            )
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    with _typed_errors():
        torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    yield _Ranks(launch.rank, launch.size, here)


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Raise DistributedError where an exchange fails: torch raises RuntimeError of whatever gloo and NCCL report."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = SOURCE_LINE.sub("", str(error)).split("\n")[0].split(". ")
        raise DistributedError(
            f"another rank has ended or cannot be reached ({first}); its own message says why, what was finished is "
            "kept: mend that, and start all of them again with --resume"
        ) from error


def _pack(value: Any) -> bytes:
    """For another process, which puts tensors of a GPU on its own.

    Torch's own protocol, 2, writes the bytes of NumPy's arrays as text, half as long again and ten times as slow.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=pickle.DEFAULT_PROTOCOL)
    return buffer.getvalue()
