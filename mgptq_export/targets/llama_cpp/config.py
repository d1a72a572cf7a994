"""Which models a stock GGUF file can hold."""

from typing import Any

from mgptq_export.families import family_of
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["WAY_OUT", "check_llama_cpp_config"]

WAY_OUT = "use --targets container"


def check_llama_cpp_config(config: Any) -> None:
    """Refuse a configuration that llama.cpp would not load, or would compute otherwise.

    Args:
        config: a transformers configuration.

    Raises:
        UnsupportedModelError: what is wrong.
    """
    try:
        family_of(config.to_dict()).check_gguf_config(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the llama.cpp target cannot hold this model: {error}; {WAY_OUT}") from error
