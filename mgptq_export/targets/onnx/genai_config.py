"""What onnxruntime-genai is told beside the graph: ``genai_config.json``."""

import json
from collections.abc import Mapping
from typing import Any

from mgptq_export.checkpoint import Checkpoint
from mgptq_runtime.errors import PackageError

__all__ = ["complete_genai_config"]

# genai fills the cache of so many tokens with zeros before the first; whoever wants more of the context asks for it.
DEFAULT_MAX_LENGTH = 2048

SEARCH_KEYS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")


def _generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.folder / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is no JSON ({error}); correct or remove it") from error
    return found if isinstance(found, dict) else {}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]


def complete_genai_config(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The builder's configuration with what it leaves out or guesses.

    Every token that ends a text in the model's own files ends it in genai, the model's own search defaults hold, and
    ``max_length`` is what a small device can hold.

    Args:
        config: as the builder wrote it.

    Raises:
        PackageError: the checkpoint's ``generation_config.json`` is no JSON.
    """
    generation = _generation_config(checkpoint)
    model, search = dict(config["model"]), dict(config["search"])
    sources = (generation.get("eos_token_id"), checkpoint.config.get("eos_token_id"), model["eos_token_id"])
    ends = list(dict.fromkeys(token for source in sources for token in _ids(source) if token < model["vocab_size"]))
    model["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    model["type"] = checkpoint.config["model_type"]
    search |= {key: generation[key] for key in SEARCH_KEYS if generation.get(key) is not None}
    search["max_length"] = min(model["context_length"], DEFAULT_MAX_LENGTH)
    return {**config, "model": model, "search": search}
