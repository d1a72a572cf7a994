"""Which of the processes that torchrun started this one is. Nothing heavy is imported here."""

import os
from dataclasses import dataclass

from mgptq_runtime.errors import BadInputError

__all__ = ["Launch", "launched"]


@dataclass(frozen=True)
class Launch:
    """Attributes:
    rank, size: this process' number among all, and how many there are, on all nodes.
    local_rank, local_size: the same on this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def device(self, asked: str) -> str:
        """The torch device of this process: of several GPUs on a node each takes its own.

        Raises:
            BadInputError: one GPU was asked for, for several processes.
        """
        if self.size == 1 or asked == "cpu":
            return asked
        if asked != "cuda":
            raise BadInputError(
                f"device {asked!r} is for one process, torchrun started {self.size}; give --device cpu, or --device "
                "cuda, of which every process takes a GPU of its own"
            )
        return f"cuda:{self.local_rank}"


def launched() -> Launch:
    """What torchrun says; without it, the only process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Launch()
    return Launch(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
