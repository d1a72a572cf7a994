"""A package: the folder that the workstation exported, or one container file alone.

    OUT/
      manifest.json       sizes and SHA-256 of every file
      model.mgptq.gguf    the container: NumPy backend
      onnx/               the ONNX package: ONNX Runtime backend

A file is used only after its size and hash were found to be what the manifest says.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mgptq_runtime.backends import Backend
from mgptq_runtime.check import DEFAULT_BOUNDS, Bounds, bounds_key, read_bounds
from mgptq_runtime.container import Container, read_container
from mgptq_runtime.errors import BadInputError, CheckError, PackageError
from mgptq_runtime.golden import GoldenVectors, read_golden, validate_golden
from mgptq_runtime.strict_json import parse_json_object
from mgptq_runtime.tokenizer import TextTokenizer, TokenizerData

__all__ = [
    "BACKENDS",
    "CONTAINER_FILE",
    "MANIFEST_FILE",
    "MANIFEST_VERSION",
    "ONNX_FOLDER",
    "FileEntry",
    "Manifest",
    "Package",
    "file_sha256",
    "open_package",
]

BACKENDS = ("numpy", "onnx")
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
CONTAINER_FILE = "model.mgptq.gguf"
ONNX_FOLDER = "onnx"
GOLDEN_FILE = "onnx/golden.npz"
MAX_MANIFEST_BYTES = 1 << 24


@dataclass(frozen=True)
class FileEntry:
    """A file of the package: its relative path with slashes, size in bytes, and SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    name: the model's name.
    files: by path.
    bounds: what a check must meet, by ``numpy``, ``onnx_exact`` and ``onnx_fast``; may lack some.
    values: the whole of ``manifest.json``.
    """

    name: str
    files: Mapping[str, FileEntry]
    bounds: Mapping[str, Bounds]
    values: Mapping[str, Any]


def _read_file_entry(entry: Any) -> FileEntry:
    if not isinstance(entry, dict):
        raise PackageError(f"{MANIFEST_FILE}: an entry of files is {entry!r}, it must be an object")
    path, size, sha256 = entry.get("path"), entry.get("bytes"), entry.get("sha256")
    if not (isinstance(path, str) and type(size) is int and size >= 0 and isinstance(sha256, str)):
        raise PackageError(f"{MANIFEST_FILE}: the file entry {entry!r} needs path, bytes and sha256")
    pure = PurePosixPath(path)
    is_inside = pure.parts and not pure.is_absolute() and ".." not in pure.parts
    if not is_inside or "\\" in path or "\0" in path or str(pure) != path:
        raise PackageError(f"{MANIFEST_FILE}: file path {path!r} must be relative, inside the package, without '..'")
    return FileEntry(path, size, sha256)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise PackageError(f"{folder} has no {MANIFEST_FILE}; give the exported folder or a .gguf container")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise PackageError(f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
        values = parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {error}; export the package again") from error
    if values.get("format_version") != MANIFEST_VERSION:
        raise PackageError(
            f"{path}: format_version is {values.get('format_version')!r}, this program reads {MANIFEST_VERSION}"
        )
    name, files, check = values.get("name"), values.get("files"), values.get("check", {})
    bounds = check.get("bounds", {}) if isinstance(check, dict) else None
    if not isinstance(name, str) or not isinstance(files, list) or not isinstance(bounds, dict):
        raise PackageError(f"{path} needs a name, a list of files, and objects check and check.bounds if any")
    entries = [_read_file_entry(entry) for entry in files]
    by_path = {entry.path: entry for entry in entries}
    if len(by_path) != len(entries):
        raise PackageError(f"{path} lists a file twice")
    return Manifest(name, by_path, {key: _read_bounds(path, key, value) for key, value in bounds.items()}, values)


def _read_bounds(path: Path, key: str, value: Any) -> Bounds:
    if key not in DEFAULT_BOUNDS or not isinstance(value, dict):
        known = ", ".join(DEFAULT_BOUNDS)
        raise PackageError(f"{path}: check.bounds.{key} is not known or no object; known are {known}")
    return read_bounds(value)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify_file(folder: Path, entry: FileEntry) -> Path:
    path = folder / entry.path
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PackageError(f"{path} is a link out of the package, to {path.resolve()}; copy the file itself")
        if not path.is_file():
            raise PackageError(f"{path} is missing, the manifest lists it; copy or export the package again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise PackageError(f"{path} has {size} bytes, the manifest says {entry.bytes}; copy or export it again")
        actual = file_sha256(path)
    except (OSError, RuntimeError) as error:
        raise PackageError(f"{path} cannot be read: {error}") from error
    if actual != entry.sha256:
        raise PackageError(f"{path} has SHA-256 {actual}, the manifest says {entry.sha256}; copy or export it again")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json_object(_read_text(path))
    except ValueError as error:
        raise PackageError(f"{path} is not a JSON object: {error}") from error


class Package:
    """What :func:`open_package` found; files are verified and read when they are needed.

    Attributes:
        path: the folder, or the container file.
        manifest: None for a container alone.
        backends: names of the backends that can run it, the preferred one last.
    """

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        self.path = path
        self.manifest = manifest
        self._verified: dict[str, Path] = {}
        if manifest is None:
            self.backends: tuple[str, ...] = ("numpy",)
        else:
            has = {"numpy": CONTAINER_FILE in manifest.files, "onnx": f"{ONNX_FOLDER}/model.onnx" in manifest.files}
            self.backends = tuple(name for name in BACKENDS if has[name])
        if not self.backends:
            raise PackageError(
                f"{path} holds neither {CONTAINER_FILE} nor {ONNX_FOLDER}/model.onnx, so nothing runs here; a file in "
                "llama.cpp/ runs in llama.cpp; for this program, run the export with --targets container,onnx"
            )

    @property
    def name(self) -> str:
        """The model's name."""
        return self.container.name if self.manifest is None else self.manifest.name

    def _verify(self, relative: str) -> Path:
        assert self.manifest is not None
        if relative not in self.manifest.files:
            raise PackageError(f"{self.path / relative} is not listed in {MANIFEST_FILE}; export the package again")
        if relative not in self._verified:
            self._verified[relative] = _verify_file(self.path, self.manifest.files[relative])
        return self._verified[relative]

    def _verify_optional(self, relative: str) -> Path | None:
        listed = self.manifest is not None and relative in self.manifest.files
        return self._verify(relative) if listed else None

    @cached_property
    def container(self) -> Container:
        """The container, read and validated.

        Raises:
            PackageError: the package has none, or the file is not the one that the manifest lists.
            ContainerError, UnsupportedModelError: see :func:`mgptq_runtime.container.read_container`.
        """
        return read_container(self.path if self.manifest is None else self._verify(CONTAINER_FILE))

    @cached_property
    def onnx_folder(self) -> Path:
        """The ONNX package, every file in it verified.

        Raises:
            PackageError: a file that is missing, changed, or not listed in the manifest.
        """
        if self.manifest is None:
            raise PackageError(f"{self.path} is a container alone; the ONNX package comes in an exported folder")
        folder = self.path / ONNX_FOLDER
        present = {path.relative_to(self.path).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        listed = {path for path in self.manifest.files if path.startswith(f"{ONNX_FOLDER}/")}
        for relative in sorted(present | listed):
            self._verify(relative)
        return folder

    def backend(self, name: str | None = None, *, accuracy_level: int = 4, threads: int | None = None) -> Backend:
        """Load the package in a backend.

        Args:
            name: one of :attr:`backends`; None for ONNX Runtime where the package has it, else NumPy.
            accuracy_level: ONNX only: 4 for int8 activations (fast), 0 for float32 (exact).
            threads: ONNX only: None for its default.

        Raises:
            BadInputError: a backend that this package has nothing for.
            PackageError, ContainerError, UnsupportedModelError: files that cannot be used.
        """
        name = name or self.backends[-1]
        if name not in self.backends:
            raise BadInputError(f"{self.path} cannot run on backend {name!r}; it has: {', '.join(self.backends)}")
        if name == "numpy":
            from mgptq_runtime.backends.numpy_backend import NumpyBackend

            return NumpyBackend(self.container.model)
        from mgptq_runtime.backends.onnx_backend import OnnxBackend

        return OnnxBackend(self.onnx_folder, accuracy_level=accuracy_level, threads=threads)

    def golden(self, backend: Backend) -> GoldenVectors:
        """The golden vectors to replay on a backend.

        Raises:
            CheckError: the package has none.
            PackageError: they are broken.
        """
        if backend.name == "numpy":
            return self.container.golden
        path = self._verify_optional(GOLDEN_FILE)
        if path is None:
            if "numpy" in self.backends:
                return self.container.golden
            raise CheckError(f"{self.path} has no golden vectors ({GOLDEN_FILE}); export the package again")
        golden = read_golden(path)
        try:
            validate_golden(golden, backend.vocabulary_size)
        except ValueError as error:
            raise PackageError(f"{path}: {error}") from error
        return golden

    def bounds(self, backend: str, accuracy_level: int) -> Bounds:
        """What a check on a backend must meet: the manifest's bounds, or the defaults."""
        key = bounds_key(backend, accuracy_level)
        stated = self.manifest.bounds if self.manifest else {}
        return stated.get(key, DEFAULT_BOUNDS[key])

    def tokenizer(self, backend: Backend) -> TextTokenizer:
        """The tokenizer that goes with a backend.

        Raises:
            PackageError: there is none, or one that is broken or does not fit the model's vocabulary.
        """
        data = self._onnx_tokenizer_data() if backend.name == "onnx" else None
        if data is None and "numpy" in self.backends:
            data = self.container.tokenizer
        if data is None:
            raise PackageError(f"{self.path} has no tokenizer; export it from a model folder with tokenizer.json")
        return TextTokenizer(data, backend.vocabulary_size)

    def _onnx_tokenizer_data(self) -> TokenizerData | None:
        def path(name: str) -> Path | None:
            return self._verify_optional(f"{ONNX_FOLDER}/{name}")

        tokenizer, template = path("tokenizer.json"), path("chat_template.jinja")
        if tokenizer is None:
            return None
        config, generation, genai = (
            _read_json(file) if (file := path(name)) else {}
            for name in ("tokenizer_config.json", "generation_config.json", "genai_config.json")
        )
        genai_model = genai.get("model")
        if "eos_token_id" not in generation and isinstance(genai_model, dict):
            generation["eos_token_id"] = genai_model.get("eos_token_id")
        embedded = config.get("chat_template")
        chat_template = _read_text(template) if template else embedded if isinstance(embedded, str) else None
        return TokenizerData(_read_text(tokenizer), config, generation, chat_template)


def open_package(path: Path) -> Package:
    """Open an exported folder, or a container file.

    Raises:
        PackageError: a path that is neither, or a manifest that is broken.
    """
    if path.is_dir():
        return Package(path, _read_manifest(path))
    if not path.exists():
        raise PackageError(f"{path} does not exist; give the exported folder or a .gguf container")
    return Package(path, None)
