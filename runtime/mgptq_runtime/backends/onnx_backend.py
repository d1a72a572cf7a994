"""The ONNX Runtime backend: runs a package of the ONNX target.

The graph is read once, hashed, validated, and given to ONNX Runtime as what was read. The weights are hashed from one
descriptor and then mapped by ONNX Runtime itself, since a copy in memory would take twice their size: a file that was
put in their place, changed or renamed in between is noticed when the model is loaded, before anything is computed.
"""

import contextlib
import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mgptq_runtime.backends.checks import check_tokens
from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.files import compare_sha256, identity, open_in_folder
from mgptq_runtime.onnx_file import MAX_MODEL_BYTES, validate_onnx
from mgptq_runtime.strict_json import MAX_JSON_BYTES, parse_json_object

__all__ = ["ACCURACY_LEVELS", "OnnxBackend", "OnnxCache"]

ACCURACY_LEVELS = {0: "model.exact.onnx", 4: "model.onnx"}
EXTERNAL_DATA = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"
# Where attention rotates by tables of its own, a graph does not ask for them.
POSITIONS = "position_ids"
# Graphs that have it keep the logits from this position on, by default the last; others keep all.
FIRST_LOGIT = "first_logit"
# Metadata of graphs that rotate long texts otherwise.
SHORT_CONTEXT = "mgptq.short_context"
FIRST_CAPACITY = 64
FATAL_ERRORS_ONLY = 4
WEIGHTS_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
# As in containers.
LIMITS = {
    "layers": 1024,
    "kv_heads": 512,
    "head_size": 1024,
    "vocabulary_size": 1 << 22,
    "context_length": 1 << 24,
}


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
        binding: the session's, the buffers bound; a step binds the rest.
    """

    batch: int
    length: int = 0
    buffers: list[np.ndarray] = field(default_factory=list)
    binding: Any = None


def _read_shape(path: Path, content: bytes) -> _Shape:
    try:
        model = parse_json_object(content, MAX_JSON_BYTES)["model"]
        decoder = model["decoder"]
        shape = _Shape(
            layers=decoder["num_hidden_layers"],
            kv_heads=decoder["num_key_value_heads"],
            head_size=decoder["head_size"],
            vocabulary_size=model["vocab_size"],
            context_length=model["context_length"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(
            f"{path} is not a configuration of onnxruntime-genai ({type(error).__name__}: {error}); "
            "export the package again"
        ) from error
    for name, value in vars(shape).items():
        if type(value) is not int or not 1 <= value <= LIMITS[name]:
            raise PackageError(
                f"{path}: {name} must be an integer of 1 to {LIMITS[name]}, found {value!r}; export the package again"
            )
    return shape


def _read(folder: Path, name: str, limit: int, digests: Mapping[str, str] | None) -> bytes:
    """A file's content, at most ``limit`` bytes, compared with its digest."""
    with open_in_folder(folder, name) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise PackageError(f"{folder / name} has more than {limit} bytes, the most that is allowed; export it again")
    if digests is not None:
        compare_sha256(folder / name, hashlib.sha256(content).hexdigest(), digests[name])
    return content


@contextlib.contextmanager
def _unchanged_weights(folder: Path, digests: Mapping[str, str] | None) -> Iterator[int]:
    """Verify the file of weights, give its size, and see afterwards that its path named it all the while."""
    path = folder / EXTERNAL_DATA
    with open_in_folder(folder, EXTERNAL_DATA) as stream:
        before = os.fstat(stream.fileno())
        if digests is not None:
            compare_sha256(path, hashlib.file_digest(stream, "sha256").hexdigest(), digests[EXTERNAL_DATA])
        yield before.st_size
        try:
            after = path.stat()
        except OSError as error:
            raise PackageError(f"{path} went away while it was read: {error}; copy the package again") from error
        if identity(before) != identity(after):
            raise PackageError(f"{path} was changed while it was read; let nothing write to it and run again")


def _session_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep what a prompt took, and is no faster
    return options


def _return_freed_memory() -> None:
    """Give what loading has freed back to the system; glibc would keep it for this process."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _open_session(path: Path, model: bytes, weights_bytes: int, threads: int | None) -> ort.InferenceSession:
    try:
        validate_onnx(model, EXTERNAL_DATA, weights_bytes)
    except ValueError as error:
        raise PackageError(f"{path} cannot be used: {error}; export the package again") from error
    options = _session_options(threads)
    try:
        os.fspath(path.parent).encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"{path.parent} has a name that is not UTF-8, which ONNX Runtime cannot open; rename it"
        ) from error
    options.add_session_config_entry(WEIGHTS_FOLDER_KEY, str(path.parent))
    try:
        # Its fallback would print to standard output, and try the same again.
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime has no common base class for what it raises
        raise PackageError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}; export the package again"
        ) from error


def _place(array: np.ndarray) -> dict[str, Any]:
    """Where an array lies, for a binding."""
    return {
        "device_type": "cpu",
        "device_id": 0,
        "element_type": array.dtype.type,
        "shape": array.shape,
        "buffer_ptr": array.ctypes.data,
    }


class OnnxBackend:
    """A package's ONNX model in ONNX Runtime; see :class:`mgptq_runtime.backends.Backend`.

    Attributes:
        name: ``onnx``.
        vocabulary_size, context_length: from ``genai_config.json``.
        short_context: from the graph's metadata.
        accuracy_level: 4 (int8 activations for b1 and b2 weights, fast) or 0 (float32 activations, exact).
    """

    name = "onnx"

    def __init__(
        self,
        folder: Path,
        *,
        accuracy_level: int = 4,
        threads: int | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Load a package.

        Args:
            folder: holds ``model.onnx``, ``model.exact.onnx``, ``model.onnx.data`` and ``genai_config.json``.
            accuracy_level: a key of :data:`ACCURACY_LEVELS`.
            threads: of ONNX Runtime; None for one per physical core.
            digests: SHA-256 in hexadecimal, by name, that the files must have; None where nothing states them.

        Raises:
            BadInputError: an accuracy level or a number of threads that there is not.
            PackageError: files that are missing, broken, changed while they are read, or do not belong together.
        """
        if accuracy_level not in ACCURACY_LEVELS:
            raise BadInputError(f"accuracy level {accuracy_level} is none of {list(ACCURACY_LEVELS)}")
        if threads is not None and threads < 1:
            raise BadInputError(f"threads must be 1 or more, not {threads}")
        name = ACCURACY_LEVELS[accuracy_level]
        for needed in (name, EXTERNAL_DATA, GENAI_CONFIG):
            if digests is not None and needed not in digests:
                raise PackageError(f"{folder / needed} is not listed in manifest.json; export the package again")
        config = _read(folder, GENAI_CONFIG, MAX_JSON_BYTES, digests)
        model = _read(folder, name, MAX_MODEL_BYTES, digests)
        self._shape = _read_shape(folder / GENAI_CONFIG, config)
        self.accuracy_level = accuracy_level
        self.vocabulary_size = self._shape.vocabulary_size
        self.context_length = self._shape.context_length
        with _unchanged_weights(folder, digests) as weights_bytes:
            self._session = _open_session(folder / name, model, weights_bytes, threads)
        _return_freed_memory()
        self._check_interface(folder / name)
        self.short_context = self._read_short_context(folder / name)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{kind}" for layer in range(self._shape.layers) for kind in ("key", "value")]

    def _check_interface(self, path: Path) -> None:
        """A graph and a configuration that do not belong together are refused here, not in the middle of a run."""
        shape = self._shape
        try:
            inputs, outputs = (
                {value.name: (value.type, value.shape) for value in values}
                for values in (self._session.get_inputs(), self._session.get_outputs())
            )
        except UnicodeDecodeError as error:
            raise PackageError(f"{path}: a name is not UTF-8 ({error}); export the package again") from error
        wanted = {"input_ids", "attention_mask", *self._cache_names("past_key_values")}
        if set(inputs) - {POSITIONS} != wanted or set(outputs) != {"logits", *self._cache_names("present")}:
            raise PackageError(
                f"{path}: its inputs and outputs are not those of {shape.layers} layers in {GENAI_CONFIG}; "
                "export the package again"
            )
        self._takes_positions = POSITIONS in inputs
        self._takes_first_logit = FIRST_LOGIT in {value.name for value in self._session.get_overridable_initializers()}
        caches = [inputs[name] for name in self._cache_names("past_key_values")]
        caches += [outputs[name] for name in self._cache_names("present")]
        for kind, sizes in caches:
            is_right = len(sizes) == 4 and sizes[1] == shape.kv_heads and sizes[3] in (shape.head_size, "kv_cache_dim")
            if kind != "tensor(float)" or not is_right:
                raise PackageError(
                    f"{path}: a cache is {kind} {sizes}, {GENAI_CONFIG} says float and {shape}; "
                    "export the package again"
                )
        logits_type, sizes = outputs["logits"]
        if logits_type != "tensor(float)" or len(sizes) != 3 or sizes[2] != shape.vocabulary_size:
            raise PackageError(
                f"{path}: logits are {logits_type} {sizes}, {GENAI_CONFIG} says {shape.vocabulary_size} tokens; "
                "export the package again"
            )

    def _read_short_context(self, path: Path) -> int:
        try:
            value = self._session.get_modelmeta().custom_metadata_map.get(SHORT_CONTEXT, str(self.context_length))
        except UnicodeDecodeError as error:
            raise PackageError(f"{path}: its metadata is not UTF-8 ({error}); export the package again") from error
        is_number = value.isascii() and value.isdecimal() and len(value) < 9
        if not (is_number and 1 <= int(value) <= self.context_length):
            raise PackageError(
                f"{path}: {SHORT_CONTEXT} is {value[:80]!r}, it must be a number of 1 to {self.context_length}; "
                "export the package again"
            )
        return int(value)

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
        cache.binding = self._bind(grown)

    def _bind(self, buffers: list[np.ndarray]) -> Any:
        """A binding of the cache's buffers, which are the most of what a step binds."""
        binding = self._session.io_binding()
        names = zip(self._cache_names("past_key_values"), self._cache_names("present"), strict=True)
        for (past, present), buffer in zip(names, buffers, strict=True):
            # One buffer for both: the attention writes the new positions only, and copies nothing.
            binding.bind_input(past, **_place(buffer))
            binding.bind_output(present, **_place(buffer))
        return binding

    def forward(self, token_ids: np.ndarray, cache: OnnxCache, *, first_logit: int = 0) -> np.ndarray:
        """Append tokens to the cached sequences.

        Args:
            token_ids: int64 [batch, sequence], the new tokens only.
            cache: from :meth:`new_cache`; extended in place.
            first_logit: the first of the new positions whose logits are computed; -1 for the last alone.

        Returns:
            logits, float32 [batch, positions, vocabulary].

        Raises:
            BadInputError: shapes that do not fit, a token id or a position out of range, or more tokens than the
                context holds.
        """
        check_tokens(token_ids, cache.batch, cache.length, self.vocabulary_size, self.context_length, first_logit)
        self._reserve(cache, cache.length + token_ids.shape[1])
        if cache.batch == 1 or cache.length == 0:
            return self._run(token_ids, cache, first_logit)
        # ONNX Runtime's attention extends a filled cache by several tokens for a single sequence only.
        steps = [self._run(step, cache, 0) for step in np.split(token_ids, token_ids.shape[1], axis=1)]
        return np.concatenate(steps[first_logit:], axis=1)

    def _run(self, token_ids: np.ndarray, cache: OnnxCache, first_logit: int) -> np.ndarray:
        batch, count = token_ids.shape
        total = cache.length + count
        binding = cache.binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids, np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, total), np.int64))
        if self._takes_positions:
            positions = np.arange(cache.length, total, dtype=np.int64)
            binding.bind_cpu_input(POSITIONS, np.tile(positions, (batch, 1)))
        first = np.array([first_logit % count], np.int64)
        if self._takes_first_logit:
            # ONNX Runtime's binding of an array would look for its type among the inputs that have no value.
            binding.bind_input(FIRST_LOGIT, **_place(first))
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as in _open_session
            raise PackageError(
                f"ONNX Runtime {ort.__version__} cannot run the package: {error}; export it again"
            ) from error
        cache.length = total
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        kept = count - int(first[0])
        wanted = (batch, kept if self._takes_first_logit else count, self.vocabulary_size)
        if logits.shape != wanted:
            raise PackageError(f"the ONNX model computes logits of {logits.shape}, not {wanted}; export it again")
        return logits[:, -kept:]
