"""llama.cpp itself, through its C interface: the library that the ``xllamacpp`` package brings."""

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

__all__ = ["LlamaContext", "LlamaModel", "library", "logits", "quantize_rows"]

_POINTER, _TEXT, _BOOL, _FLOAT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool, ctypes.c_float
_INT, _UNSIGNED, _LONG = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64
_IDS = ctypes.POINTER(ctypes.c_int32)

F32 = 0
FLASH_ATTENTION_OFF = 0


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


class ContextParams(ctypes.Structure):
    """``llama_context_params`` of the version that the tests were written for; :func:`library` checks it."""

    _fields_ = (
        ("n_ctx", _UNSIGNED),
        ("n_batch", _UNSIGNED),
        ("n_ubatch", _UNSIGNED),
        ("n_seq_max", _UNSIGNED),
        ("n_rs_seq", _UNSIGNED),
        ("n_outputs_max", _UNSIGNED),
        ("n_outputs_max_per_seq", _UNSIGNED),
        ("n_threads", _INT),
        ("n_threads_batch", _INT),
        ("ctx_type", _INT),
        ("rope_scaling_type", _INT),
        ("pooling_type", _INT),
        ("attention_type", _INT),
        ("flash_attn_type", _INT),
        ("rope_freq_base", _FLOAT),
        ("rope_freq_scale", _FLOAT),
        ("yarn_ext_factor", _FLOAT),
        ("yarn_attn_factor", _FLOAT),
        ("yarn_beta_fast", _FLOAT),
        ("yarn_beta_slow", _FLOAT),
        ("yarn_orig_ctx", _UNSIGNED),
        ("defrag_thold", _FLOAT),
        ("cb_eval", _POINTER),
        ("cb_eval_user_data", _POINTER),
        ("type_k", _INT),
        ("type_v", _INT),
        ("abort_callback", _POINTER),
        ("abort_callback_data", _POINTER),
        ("embeddings", _BOOL),
        ("offload_kqv", _BOOL),
        ("no_perf", _BOOL),
        ("op_offload", _BOOL),
        ("swa_full", _BOOL),
        ("kv_unified", _BOOL),
        ("samplers", _POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _POINTER),
    )


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", _INT),
        ("token", ctypes.POINTER(_INT)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_INT)),
        ("n_seq_id", ctypes.POINTER(_INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

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
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (_POINTER, _POINTER, ContextParams),
    "llama_free": (None, _POINTER),
    "llama_batch_init": (Batch, _INT, _INT, _INT),
    "llama_batch_free": (None, Batch),
    "llama_decode": (_INT, _POINTER, Batch),
    "llama_get_logits": (ctypes.POINTER(_FLOAT), _POINTER),
    "llama_get_logits_ith": (ctypes.POINTER(_FLOAT), _POINTER, _INT),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, _BOOL),
    "ggml_quantize_chunk": (ctypes.c_size_t, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
    **{f"llama_vocab_{name}": (_INT, _POINTER) for name in ("bos", "eos", "eot", "pad")},
}


@LogCallback
def _no_log(_level: int, _text: bytes, _data: int) -> None:
    """llama.cpp prints hundreds of lines for every file."""


@cache
def library() -> ctypes.CDLL:
    """llama.cpp, silent and with its prototypes.

    Raises:
        ModuleNotFoundError: the xllamacpp package is not installed.
        RuntimeError: a version with another layout of its structures.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llama.cpp is not here; run: pip install xllamacpp")
    loaded = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, *arguments) in PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    _check_model_params(loaded.llama_model_default_params())
    _check_context_params(loaded.llama_context_default_params())
    loaded.llama_log_set(_no_log, None)
    loaded.llama_backend_init()
    return loaded


def _check_model_params(params: ModelParams) -> None:
    flags = [getattr(params, name) for name, kind in ModelParams._fields_ if kind is ctypes.c_bool]
    found = (params.n_gpu_layers, params.split_mode, params.main_gpu, flags)
    if found != (-1, 1, 0, [False, False, True] + [False] * 3):
        raise RuntimeError("llama_model_params has another layout in this version of llama.cpp; mend ModelParams")


def _check_context_params(params: ContextParams) -> None:
    sizes = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.rope_scaling_type)
    rest = (params.type_k, params.type_v, params.n_samplers, params.ctx_other)
    if (sizes, rest) != ((512, 2048, 512, 1, -1), (1, 1, 0, None)):
        raise RuntimeError("llama_context_params has another layout in this version of llama.cpp; mend ContextParams")


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


class LlamaContext:
    """A text that grows, as llama.cpp computes it by default.

    Args:
        model: stays open as long as this.
        context: how many tokens the text may have.
        threads: for prompts as for single tokens.
    """

    def __init__(self, model: LlamaModel, context: int, threads: int) -> None:
        self._library = library()
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        self.pointer = self._library.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise RuntimeError("llama.cpp makes no context for the model")
        self._batch = self._library.llama_batch_init(context, 0, 1)
        self._vocabulary = int(model.vocabulary_value("n_tokens"))
        self._length = 0

    def __enter__(self) -> "LlamaContext":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self.pointer)

    def clear(self) -> None:
        """Start anew."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self.pointer), False)
        self._length = 0

    def append(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits behind the last of the new tokens: float32 [vocabulary], valid until the next call."""
        batch, count = self._batch, len(token_ids)
        batch.n_tokens = count
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), self._length + i, i == count - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = self._library.llama_decode(self.pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += count
        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self.pointer, -1), (self._vocabulary,))


def logits(model: LlamaModel, token_ids: Sequence[int], *, context: int | None = None, threads: int = 1) -> np.ndarray:
    """Logits of every position: float32 [sequence, vocabulary].

    Args:
        context: how many tokens the context has room for, as many as given by default; llama.cpp rounds it up to 256.
    """
    loaded, count = library(), len(token_ids)
    params = loaded.llama_context_default_params()
    params.n_ctx = context or count
    params.n_batch = params.n_ubatch = count
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = FLASH_ATTENTION_OFF
    params.type_k = params.type_v = F32  # what is looked at is the weights
    pointer = loaded.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise RuntimeError("llama.cpp makes no context for the model")
    batch = loaded.llama_batch_init(count, 0, 1)
    try:
        batch.n_tokens = count
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = loaded.llama_decode(pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        vocabulary = int(model.vocabulary_value("n_tokens"))
        return np.ctypeslib.as_array(loaded.llama_get_logits(pointer), (count, vocabulary)).copy()
    finally:
        loaded.llama_batch_free(batch)
        loaded.llama_free(pointer)


def quantize_rows(
    ggml_type: int, weight: np.ndarray, row_bytes: int, importance: np.ndarray | None = None
) -> np.ndarray:
    """Rows in a ggml type as llama.cpp's own quantizer rounds them: float32 [rows, columns] to uint8.

    Args:
        importance: float32 [columns], the importance matrix; even by default.
    """
    values, columns = np.ascontiguousarray(weight, np.float32), weight.shape[1]
    packed = np.empty((len(values), row_bytes), np.uint8)
    weights = np.ones(columns, np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    written = library().ggml_quantize_chunk(
        ggml_type, values.ctypes.data, packed.ctypes.data, 0, len(values), columns, weights.ctypes.data
    )
    if written != packed.nbytes:
        raise RuntimeError(f"ggml type {ggml_type} wrote {written} bytes instead of {packed.nbytes}")
    return packed
