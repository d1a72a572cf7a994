"""The size of a container that is not written."""

from mgptq_export.targets.container import add_metadata, add_tensors
from mgptq_export.targets.gguf_size import SizingWriter, gguf_size
from mgptq_export.targets.skeleton import PlannedFile, Skeleton, most_padding
from mgptq_runtime.container import ARCHITECTURE
from mgptq_runtime.formats import FORMATS
from mgptq_runtime.package import CONTAINER_FILE

__all__ = ["container_files"]


def container_files(skeleton: Skeleton) -> list[PlannedFile]:
    """The container; each matrix is taken to have as many segments as it can have.

    Raises:
        BadInputError: the tokenizer does not fit the model.
    """
    writer = SizingWriter(None, ARCHITECTURE)
    add_metadata(writer, skeleton.checkpoint)
    add_tensors(writer, skeleton.model, skeleton.golden)
    size = gguf_size(writer) + skeleton.unspent + _padding(skeleton, writer.data_alignment)
    return [PlannedFile(CONTAINER_FILE, size, size)]


def _padding(skeleton: Skeleton, alignment: int) -> int:
    """The most that aligns the segments of all that competes; nothing where rows are a multiple of 16."""
    return sum(
        len(linear.segments)
        * max(most_padding(linear.rows * FORMATS[fmt].block_bytes, alignment) for fmt in skeleton.formats_of(linear))
        for linear in skeleton.competing()
    )
