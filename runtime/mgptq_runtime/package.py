"""A package: the folder that the workstation exported, or one container file alone.

    OUT/
      manifest.json       sizes and SHA-256 of every file
      model.mgptq.gguf    the container: NumPy backend
      onnx/               the ONNX package: ONNX Runtime backend

A file is used only after its size and hash were found to be what the manifest says. What was hashed is what is used:
small files are read once, the container is mapped once; see :mod:`mgptq_runtime.backends.onnx_backend` for the ONNX
package.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from mgptq_runtime.backends import Backend
from mgptq_runtime.check import DEFAULT_BOUNDS, Bounds, bounds_key, read_bounds
from mgptq_runtime.container import Container, parse_container, read_container
from mgptq_runtime.errors import BadInputError, CheckError, PackageError
from mgptq_runtime.files import Buffer, compare_sha256, map_whole, open_in_folder
from mgptq_runtime.golden import MAX_GOLDEN_BYTES, GoldenVectors, parse_golden, validate_golden
from mgptq_runtime.strict_json import MAX_JSON_BYTES, parse_json_object
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
    "Way",
    "file_sha256",
    "open_package",
]

BACKENDS = ("numpy", "onnx")
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
CONTAINER_FILE = "model.mgptq.gguf"
ONNX_FOLDER = "onnx"
GOLDEN_FILE = "onnx/golden.npz"
EXACT_FILE = "onnx/model.exact.onnx"
MAX_TEXT_BYTES = 40 << 20
WAY_OUT = "export the package again"


@dataclass(frozen=True)
class FileEntry:
    """A file of the package: its relative path with slashes, size in bytes, and SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Way:
    """A way to compute a package.

    Attributes:
        name: ``numpy``, ``onnx`` at its default level, or ``onnx_exact`` at level 0.
        backend: one of :data:`BACKENDS`.
        accuracy_level: of ONNX, where it is not the default.
    """

    name: str
    backend: str
    accuracy_level: int = 4


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


def is_hidden(relative: PurePath) -> bool:
    """Whether a file below a package's folder is none of the package's: git's, the hub's, the system's; dots tell."""
    return any(part.startswith(".") for part in relative.parts)


def read_file_entry(entry: Any) -> FileEntry:
    """A file that a manifest lists.

    Raises:
        PackageError: no such entry, or a path that is not plainly inside the package.
    """
    if not isinstance(entry, dict):
        raise PackageError(f"{MANIFEST_FILE}: an entry of files is {entry!r}, it must be an object; {WAY_OUT}")
    path, size, sha256 = entry.get("path"), entry.get("bytes"), entry.get("sha256")
    if not (isinstance(path, str) and type(size) is int and size >= 0 and isinstance(sha256, str)):
        raise PackageError(f"{MANIFEST_FILE}: the file entry {entry!r} needs path, bytes and sha256; {WAY_OUT}")
    pure = PurePosixPath(path)
    is_inside = pure.parts and not pure.is_absolute() and ".." not in pure.parts
    if not is_inside or "\\" in path or "\0" in path or str(pure) != path:
        raise PackageError(
            f"{MANIFEST_FILE}: file path {path!r} must be relative, inside the package, without '..'; {WAY_OUT}"
        )
    return FileEntry(path, size, sha256)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise PackageError(f"{folder} has no {MANIFEST_FILE}; give the exported folder or a .gguf container")
    try:
        with open_in_folder(folder, MANIFEST_FILE) as stream:
            values = parse_json_object(stream.read(MAX_JSON_BYTES + 1), MAX_JSON_BYTES)
    except ValueError as error:
        raise PackageError(f"{path} cannot be read: {error}; export the package again") from error
    if values.get("format_version") != MANIFEST_VERSION:
        raise PackageError(
            f"{path}: format_version is {values.get('format_version')!r}, this program reads {MANIFEST_VERSION}; "
            "use the version of mgptq-runtime that goes with it, or export it again"
        )
    name, files, check = values.get("name"), values.get("files"), values.get("check", {})
    bounds = check.get("bounds", {}) if isinstance(check, dict) else None
    if not isinstance(name, str) or not isinstance(files, list) or not isinstance(bounds, dict):
        raise PackageError(
            f"{path} needs a name, a list of files, and objects check and check.bounds if any; {WAY_OUT}"
        )
    entries = [read_file_entry(entry) for entry in files]
    by_path = {entry.path: entry for entry in entries}
    if len(by_path) != len(entries):
        raise PackageError(f"{path} lists a file twice; {WAY_OUT}")
    return Manifest(name, by_path, {key: _read_bounds(path, key, value) for key, value in bounds.items()}, values)


def _read_bounds(path: Path, key: str, value: Any) -> Bounds:
    if key not in DEFAULT_BOUNDS or not isinstance(value, dict):
        known = ", ".join(DEFAULT_BOUNDS)
        raise PackageError(f"{path}: check.bounds.{key} is not known or no object; known are {known}; {WAY_OUT}")
    return read_bounds(value)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path} cannot be read as UTF-8 text: {error}; export the package again") from error


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(data, MAX_JSON_BYTES)
    except ValueError as error:
        raise PackageError(f"{path} is not a JSON object: {error}; export the package again") from error


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

    def ways(self, backend: str | None = None, accuracy_level: int | None = None) -> list[Way]:
        """The ways to compute it, to be given to :meth:`backend`.

        Args:
            backend: this one alone; None for all that it has.
            accuracy_level: ONNX at this level alone; None for all that it has a graph for.
        """
        found = []
        for name in [backend] if backend else self.backends:
            if name != "onnx":
                found.append(Way(name, name))
                continue
            if accuracy_level in (None, 4):
                found.append(Way(name, name))
            if accuracy_level == 0 or (accuracy_level is None and self._is_listed(EXACT_FILE)):
                found.append(Way("onnx_exact", name, 0))
        return found

    @property
    def name(self) -> str:
        """The model's name."""
        return self.container.name if self.manifest is None else self.manifest.name

    @property
    def lacks_container(self) -> bool:
        """Whether only the other part, the ONNX package, was copied of a package that has both."""
        return self.backends == BACKENDS and not (self.path / CONTAINER_FILE).exists()

    def _entry(self, relative: str) -> FileEntry:
        assert self.manifest is not None
        if relative not in self.manifest.files:
            raise PackageError(
                f"{self.path / relative} is not listed in {MANIFEST_FILE}; remove it, or export the package again"
            )
        return self.manifest.files[relative]

    def _open(self, relative: str) -> BufferedReader:
        """A listed file whose size is right."""
        entry = self._entry(relative)
        stream = open_in_folder(self.path, relative)
        size = os.fstat(stream.fileno()).st_size
        if size != entry.bytes:
            stream.close()
            raise PackageError(
                f"{self.path / relative} has {size} bytes, the manifest says {entry.bytes}; copy or export it again"
            )
        return stream

    def _compare(self, relative: str, content: Buffer) -> None:
        compare_sha256(self.path / relative, hashlib.sha256(content).hexdigest(), self._entry(relative).sha256)

    def _read(self, relative: str, most: int = MAX_TEXT_BYTES) -> bytes:
        """The content of a small file, hashed as it was read."""
        with self._open(relative) as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise PackageError(
                f"{self.path / relative} has more than {most} bytes, the most that is allowed; {WAY_OUT}"
            )
        self._compare(relative, content)
        return content

    def _is_listed(self, relative: str) -> bool:
        return self.manifest is not None and relative in self.manifest.files

    @cached_property
    def container(self) -> Container:
        """The container, read and validated.

        Raises:
            PackageError: the package has none, or the file is not the one that the manifest lists.
            ContainerError, UnsupportedModelError: see :func:`mgptq_runtime.container.read_container`.
        """
        if self.manifest is None:
            return read_container(self.path)
        if self.lacks_container:
            raise PackageError(
                f"{self.path / CONTAINER_FILE} is missing; copy or export the package again, or do without it: "
                "--backend onnx"
            )
        with self._open(CONTAINER_FILE) as stream:
            content = map_whole(stream)
        self._compare(CONTAINER_FILE, content)
        return parse_container(self.path / CONTAINER_FILE, content)

    def _onnx_digests(self) -> dict[str, str]:
        """SHA-256 in hexadecimal of every file in the ONNX package, by name.

        Raises:
            PackageError: a file that is missing, not listed in the manifest, or of another size.
        """
        assert self.manifest is not None
        folder = self.path / ONNX_FOLDER
        files = (path.relative_to(self.path) for path in folder.rglob("*") if not path.is_dir())
        present = {path.as_posix() for path in files if not is_hidden(path)}
        listed = {path for path in self.manifest.files if path.startswith(f"{ONNX_FOLDER}/")}
        for relative in sorted(present | listed):
            self._open(relative).close()
        return {path.removeprefix(f"{ONNX_FOLDER}/"): self.manifest.files[path].sha256 for path in listed}

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

        return OnnxBackend(
            self.path / ONNX_FOLDER,
            accuracy_level=accuracy_level,
            threads=threads,
            digests=self._onnx_digests(),
        )

    def golden(self, backend: Backend) -> GoldenVectors:
        """The golden vectors to replay on a backend.

        Raises:
            CheckError: the package has none.
            PackageError: they are broken.
        """
        if backend.name == "numpy":
            return self.container.golden
        if not self._is_listed(GOLDEN_FILE):
            if "numpy" in self.backends:
                return self.container.golden
            raise CheckError(f"{self.path} has no golden vectors ({GOLDEN_FILE}); export the package again")
        path = self.path / GOLDEN_FILE
        golden = parse_golden(self._read(GOLDEN_FILE, MAX_GOLDEN_BYTES), path)
        try:
            validate_golden(golden, backend.vocabulary_size)
        except ValueError as error:
            raise PackageError(f"{path}: {error}; export the package again") from error
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
        folder = self.path / ONNX_FOLDER

        def read(name: str) -> bytes | None:
            relative = f"{ONNX_FOLDER}/{name}"
            return self._read(relative) if self._is_listed(relative) else None

        tokenizer, template = read("tokenizer.json"), read("chat_template.jinja")
        if tokenizer is None:
            return None
        config, generation, genai = (
            _parse_json(folder / name, data) if (data := read(name)) is not None else {}
            for name in ("tokenizer_config.json", "generation_config.json", "genai_config.json")
        )
        genai_model = genai.get("model")
        if generation.get("eos_token_id") is None and isinstance(genai_model, dict):
            generation["eos_token_id"] = genai_model.get("eos_token_id")
        embedded = config.get("chat_template")
        chat_template = embedded if isinstance(embedded, str) else None
        if template is not None:
            chat_template = _decode(folder / "chat_template.jinja", template)
        return TokenizerData(_decode(folder / "tokenizer.json", tokenizer), config, generation, chat_template)


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
