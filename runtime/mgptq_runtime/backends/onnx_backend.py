"""The ONNX Runtime backend: runs a package of the ONNX target."""

import contextlib
import ctypes
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mgptq_runtime.backends.checks import check_tokens
from mgptq_runtime.errors import BadInputError, PackageError

__all__ = ["ACCURACY_LEVELS", "OnnxBackend", "OnnxCache"]

ACCURACY_LEVELS = {0: "model.exact.onnx", 4: "model.onnx"}
EXTERNAL_DATA = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"
# Where attention rotates by tables of its own, a graph does not ask for them.
POSITIONS = "position_ids"
FIRST_CAPACITY = 64
ERRORS_ONLY = 3


@dataclass(frozen=True)
class _Shape:
    """What ``genai_config.json`` says of the model."""

    layers: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    context_length: int


@dataclass
class OnnxCache:
    """Keys and values of ``batch`` sequences of ``length`` tokens.

    Attributes:
        batch, length: sequences, and tokens in each.
        buffers: per layer the keys, then the values: float32 [batch, kv_heads, capacity, head_size]; the first
            ``length`` positions are filled. ONNX Runtime appends in place.
    """

    batch: int
    length: int = 0
    buffers: list[np.ndarray] = field(default_factory=list)


def _read_shape(path: Path) -> _Shape:
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        shape = _Shape(
            layers=decoder["num_hidden_layers"],
            kv_heads=decoder["num_key_value_heads"],
            head_size=decoder["head_size"],
            vocabulary_size=model["vocab_size"],
            context_length=model["context_length"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(
            f"{path} is not a configuration of onnxruntime-genai ({type(error).__name__}: {error}); "
            "export the package again"
        ) from error
    for name, value in vars(shape).items():
        if type(value) is not int or value < 1:
            raise PackageError(f"{path}: {name} must be a positive integer, found {value!r}; export the package again")
    return shape


def _check_files(folder: Path, model: str) -> None:
    for name in (model, EXTERNAL_DATA):
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{path} is missing; export the package again")
        if path.resolve().parent != folder.resolve():
            raise PackageError(f"{path} is a link out of the package, to {path.resolve()}; copy the file itself")


def _session_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    return options


def _return_freed_memory() -> None:
    """Give what loading has freed back to the system; glibc would keep it for this process."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for what it raises
        raise PackageError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error


class OnnxBackend:
    """A package's ONNX model in ONNX Runtime; see :class:`mgptq_runtime.backends.Backend`.

    Attributes:
        name: ``onnx``.
        vocabulary_size, context_length: from ``genai_config.json``.
        accuracy_level: 4 (int8 activations for b1 and b2 weights, fast) or 0 (float32 activations, exact).
    """

    name = "onnx"

    def __init__(self, folder: Path, *, accuracy_level: int = 4, threads: int | None = None) -> None:
        """Load a package.

        Args:
            folder: holds ``model.onnx``, ``model.exact.onnx``, ``model.onnx.data`` and ``genai_config.json``.
            accuracy_level: a key of :data:`ACCURACY_LEVELS`.
            threads: of ONNX Runtime; None for one per physical core.

        Raises:
            BadInputError: an accuracy level or a number of threads that there is not.
            PackageError: files that are missing, broken, or do not belong together.
        """
        if accuracy_level not in ACCURACY_LEVELS:
            raise BadInputError(f"accuracy level {accuracy_level} is none of {list(ACCURACY_LEVELS)}")
        if threads is not None and threads < 1:
            raise BadInputError(f"threads must be 1 or more, not {threads}")
        self._shape = _read_shape(folder / GENAI_CONFIG)
        self.accuracy_level = accuracy_level
        self.vocabulary_size = self._shape.vocabulary_size
        self.context_length = self._shape.context_length
        model = ACCURACY_LEVELS[accuracy_level]
        _check_files(folder, model)
        self._session = _open_session(folder / model, _session_options(threads))
        _return_freed_memory()
        self._check_interface(folder / model)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{kind}" for layer in range(self._shape.layers) for kind in ("key", "value")]

    def _check_interface(self, path: Path) -> None:
        """A graph and a configuration that do not belong together are refused here, not in the middle of a run."""
        shape = self._shape
        inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}
        outputs = {value.name: (value.type, value.shape) for value in self._session.get_outputs()}
        wanted = {"input_ids", "attention_mask", *self._cache_names("past_key_values")}
        if set(inputs) - {POSITIONS} != wanted or set(outputs) != {"logits", *self._cache_names("present")}:
            raise PackageError(
                f"{path}: its inputs and outputs are not those of {shape.layers} layers in {GENAI_CONFIG}; "
                "export the package again"
            )
        self._takes_positions = POSITIONS in inputs
        caches = [inputs[name] for name in self._cache_names("past_key_values")]
        caches += [outputs[name] for name in self._cache_names("present")]
        for kind, (_, heads, _, size) in caches:
            sizes_agree = heads == shape.kv_heads and size in (shape.head_size, "kv_cache_dim")
            if kind != "tensor(float)" or not sizes_agree:
                raise PackageError(f"{path}: a cache of {kind} {heads} x {size}, {GENAI_CONFIG} says float {shape}")
        logits_type, logits_shape = outputs["logits"]
        if logits_type != "tensor(float)" or logits_shape[-1] != shape.vocabulary_size:
            raise PackageError(f"{path}: logits {logits_shape}, {GENAI_CONFIG} says {shape.vocabulary_size} tokens")

    def new_cache(self, batch: int = 1) -> OnnxCache:
        """An empty KV cache for ``batch`` sequences of equal length."""
        return OnnxCache(batch)

    def _reserve(self, cache: OnnxCache, length: int) -> None:
        """Give the cache room for ``length`` positions; it grows by doubling, up to the context."""
        capacity = cache.buffers[0].shape[2] if cache.buffers else 0
        if length <= capacity:
            return
        capacity = max(length, min(max(FIRST_CAPACITY, 2 * capacity), self.context_length))
        shape = (cache.batch, self._shape.kv_heads, capacity, self._shape.head_size)
        grown = [np.zeros(shape, np.float32) for _ in range(2 * self._shape.layers)]
        for new, old in zip(grown, cache.buffers, strict=False):
            new[:, :, : cache.length] = old[:, :, : cache.length]
        cache.buffers = grown

    def forward(self, token_ids: np.ndarray, cache: OnnxCache) -> np.ndarray:
        """Append tokens to the cached sequences.

        Args:
            token_ids: int64 [batch, sequence], the new tokens only.
            cache: from :meth:`new_cache`; extended in place.

        Returns:
            logits, float32 [batch, sequence, vocabulary].

        Raises:
            BadInputError: shapes that do not fit, a token id out of range, or more tokens than the context holds.
        """
        check_tokens(token_ids, cache.batch, cache.length, self.vocabulary_size, self.context_length)
        self._reserve(cache, cache.length + token_ids.shape[1])
        if cache.batch == 1 or cache.length == 0:
            return self._run(token_ids, cache)
        # ONNX Runtime's attention extends a filled cache by several tokens for a single sequence only.
        steps = [self._run(step, cache) for step in np.split(token_ids, token_ids.shape[1], axis=1)]
        return np.concatenate(steps, axis=1)

    def _run(self, token_ids: np.ndarray, cache: OnnxCache) -> np.ndarray:
        total = cache.length + token_ids.shape[1]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids, np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((cache.batch, total), np.int64))
        if self._takes_positions:
            positions = np.arange(cache.length, total, dtype=np.int64)
            binding.bind_cpu_input(POSITIONS, np.tile(positions, (cache.batch, 1)))
        names = zip(self._cache_names("past_key_values"), self._cache_names("present"), strict=True)
        for (past, present), buffer in zip(names, cache.buffers, strict=True):
            where: dict[str, Any] = {
                "device_type": "cpu",
                "device_id": 0,
                "element_type": np.float32,
                "shape": buffer.shape,
                "buffer_ptr": buffer.ctypes.data,
            }
            # One buffer for both: the attention writes the new positions only, and copies nothing.
            binding.bind_input(past, **where)
            binding.bind_output(present, **where)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as in _open_session
            raise PackageError(f"ONNX Runtime {ort.__version__} cannot run the package: {error}") from error
        cache.length = total
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits
