"""What a package holds."""

from typing import Any

from mgptq_runtime.container import Container
from mgptq_runtime.package import Package

__all__ = ["describe"]


def _describe_container(container: Container) -> dict[str, Any]:
    model = container.model
    weights_by_format = model.weights_by_format()
    total = sum(weights_by_format.values())
    return {
        "family": model.family,
        "hyperparameters": dict(model.hyperparameters),
        "linear_weights": model.linear_weights,
        "bits_stored": model.bits_stored,
        "format_shares": {fmt: weights / total for fmt, weights in weights_by_format.items()},
        "embedding_formats": sorted({segment.format for table in model.tables() for segment in table.segments}),
        "tied_head": model.head is None,
        "has_tokenizer": container.tokenizer is not None,
        "has_chat_template": container.tokenizer is not None and container.tokenizer.chat_template is not None,
        "golden_positions": container.golden.token_ids.size,
        "recipe": dict(container.recipe),
        "content_sha256": container.sha256,
    }


def describe(package: Package) -> dict[str, Any]:
    """Facts about a package, as JSON values.

    Keys: name, backends, files (path and bytes), as the manifest lists them; with a container that is there: family,
    hyperparameters, linear_weights, bits_stored, format_shares (of the linear weights), embedding_formats (of embedding
    and head), tied_head, has_tokenizer, has_chat_template, golden_positions, recipe, content_sha256.

    Raises:
        PackageError, ContainerError, UnsupportedModelError: files that cannot be used.
    """
    if package.manifest is None:
        files = [{"path": package.path.name, "bytes": package.path.stat().st_size}]
    else:
        files = [{"path": entry.path, "bytes": entry.bytes} for entry in package.manifest.files.values()]
    facts: dict[str, Any] = {"name": package.name, "backends": list(package.backends), "files": files}
    if "numpy" in package.backends and not package.lacks_container:
        facts |= _describe_container(package.container)
    return facts
