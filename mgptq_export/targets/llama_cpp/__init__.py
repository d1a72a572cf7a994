"""The llama.cpp target: a stock GGUF file, of a standard architecture and standard tensor types."""

from mgptq_export.targets.llama_cpp.config import check_llama_cpp_config
from mgptq_export.targets.llama_cpp.export import write_llama_cpp

__all__ = ["check_llama_cpp_config", "write_llama_cpp"]
