"""Export targets: how each wants its weights laid out, and who writes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.layouts import COLUMNS, TENSORS, Layout
from mgptq_export.targets.container import check_container_tokenizer, write_container
from mgptq_export.targets.gguf_tokenizer import check_tokenizer
from mgptq_export.targets.llama_cpp import check_llama_cpp_config, write_llama_cpp
from mgptq_export.targets.onnx import export_onnx
from mgptq_export.targets.onnx.builder_graph import check_onnx_config
from mgptq_export.targets.onnx.export import MODEL, WEIGHTS
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.package import CONTAINER_FILE, ONNX_FOLDER

__all__ = ["TARGETS", "Target", "target_named"]


@dataclass(frozen=True)
class Target:
    """Attributes:
    layout: of the weights that it takes; targets of one layout share one solution.
    path: the file or folder in the package.
    model_files: of the package, what a size of the model counts: patterns of paths.
    write: writes it, whole or not at all.
    check_config: raises UnsupportedModelError for a transformers configuration that it cannot hold.
    check_tokenizer: raises BadInputError or UnsupportedModelError for tokenizer files (a folder), rows of the
        embedding and a ``config.json`` that it cannot hold.
    """

    layout: Layout
    path: str
    write: Callable[[Checkpoint, GoldenVectors, Path], None]
    check_config: Callable[[Any], None] = lambda config: None
    check_tokenizer: Callable[[Path, int, Mapping[str, Any]], None] = lambda folder, rows, config: None
    model_files: tuple[str, ...] = ()

    def counts(self, path: str) -> bool:
        """Whether a path in the package is of a model file."""
        return any(PurePosixPath(path).match(pattern) for pattern in self.model_files)

    def model_bytes(self, package: Path) -> int:
        """Bytes of the model files in a package."""
        return sum(path.stat().st_size for pattern in self.model_files for path in package.glob(pattern))


TARGETS: dict[str, Target] = {
    "container": Target(
        COLUMNS,
        CONTAINER_FILE,
        write_container,
        check_tokenizer=check_container_tokenizer,
        model_files=(CONTAINER_FILE,),
    ),
    "onnx": Target(
        COLUMNS,
        ONNX_FOLDER,
        export_onnx,
        check_onnx_config,
        # Neither the exact graph, which only checks need, nor the tokenizer.
        model_files=(f"{ONNX_FOLDER}/{MODEL}", f"{ONNX_FOLDER}/{WEIGHTS}"),
    ),
    "llama.cpp": Target(
        TENSORS,
        "llama.cpp",
        write_llama_cpp,
        check_llama_cpp_config,
        check_tokenizer,
        model_files=("llama.cpp/*.gguf",),
    ),
}


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        BadInputError: no such target.
    """
    if name not in TARGETS:
        raise BadInputError(f"target {name!r} is unknown; choose from {', '.join(TARGETS)}")
    return TARGETS[name]
