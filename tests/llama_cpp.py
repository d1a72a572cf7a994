"""llama.cpp itself, through its C interface: the library that the ``xllamacpp`` package brings."""

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

__all__ = ["LlamaModel", "library"]


class ModelParams(ctypes.Structure):
    """``llama_model_params`` of the version that the tests were written for; :func:`library` checks it."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_POINTER, _INT, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_IDS = ctypes.POINTER(ctypes.c_int32)
PROTOTYPES: dict[str, tuple] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, LogCallback, _POINTER),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (_POINTER, _TEXT, ModelParams),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_model_chat_template": (_TEXT, _POINTER, _TEXT),
    "llama_tokenize": (_INT, _POINTER, _TEXT, _INT, _IDS, _INT, _BOOL, _BOOL),
    "llama_detokenize": (_INT, _POINTER, _IDS, _INT, _TEXT, _INT, _BOOL, _BOOL),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_vocab_get_text": (_TEXT, _POINTER, _INT),
    "llama_vocab_is_eog": (_BOOL, _POINTER, _INT),
    "llama_vocab_is_control": (_BOOL, _POINTER, _INT),
    "llama_vocab_get_add_bos": (_BOOL, _POINTER),
    "llama_vocab_get_add_eos": (_BOOL, _POINTER),
    **{f"llama_vocab_{name}": (_INT, _POINTER) for name in ("bos", "eos", "eot", "pad")},
}


@LogCallback
def _no_log(_level: int, _text: bytes, _data: int) -> None:
    """llama.cpp prints hundreds of lines for every file."""


@cache
def library() -> ctypes.CDLL:
    """llama.cpp, silent and with its prototypes; skips the test where the package is absent.

    Raises:
        RuntimeError: a version with another layout of ``llama_model_params``.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("the xllamacpp package is not installed")
    loaded = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, *arguments) in PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    params = loaded.llama_model_default_params()
    flags = [getattr(params, name) for name, kind in ModelParams._fields_ if kind is ctypes.c_bool]
    if (params.n_gpu_layers, params.split_mode, params.main_gpu, flags) != (
        -1,
        1,
        0,
        [False, False, True] + [False] * 3,
    ):
        raise RuntimeError("llama_model_params has another layout in this version of llama.cpp; mend ModelParams")
    loaded.llama_log_set(_no_log, None)
    loaded.llama_backend_init()
    return loaded


class LlamaModel:
    """A GGUF file as llama.cpp loads it.

    Args:
        path: the file.
        vocab_only: load metadata and tokenizer, no tensors.

    Raises:
        ValueError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        self._library = library()
        params = self._library.llama_model_default_params()
        params.vocab_only = vocab_only
        self.pointer = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocabulary = self._library.llama_model_get_vocab(self.pointer)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.llama_model_free(self.pointer)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special``, beginning and end tokens as the file asks for."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), add_special, parse_special
        )
        return ids[:count]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, special tokens only where asked for."""
        ids, buffer = (ctypes.c_int32 * len(tokens))(*tokens), ctypes.create_string_buffer(64 * len(tokens) + 64)
        count = self._library.llama_detokenize(
            self.vocabulary, ids, len(ids), buffer, len(buffer), not special, special
        )
        return buffer.raw[:count].decode(errors="replace")

    def vocabulary_value(self, name: str, *arguments: int) -> int | bool | bytes:
        """What ``llama_vocab_<name>`` says: ``bos``, ``eos``, ``eot``, ``pad``, ``get_add_bos``, ``n_tokens``."""
        return getattr(self._library, f"llama_vocab_{name}")(self.vocabulary, *arguments)

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        template = self._library.llama_model_chat_template(self.pointer, None)
        return None if template is None else template.decode()
