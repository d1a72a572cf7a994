"""The small files of a Hugging Face folder, read as what they are: anyone's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.package import MANIFEST_FILE
from mgptq_runtime.strict_json import parse_json_object

__all__ = ["check_folder", "check_small_files", "read_config", "read_json", "without_steering"]

MAX_JSON_BYTES = 1 << 28
READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".py", ".md")
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
QUANTIZED_KEYS = ("quantization_config", "compression_config")
# These say how transformers is to work, not what the model is: code from the hub that computes attention, other
# weight files, and labels of which it makes tables.
STEERING_KEYS = (
    "attn_implementation",
    "experts_implementation",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "transformers_weights",
)


def check_folder(folder: Path) -> None:
    """Refuse links that lead out of a folder: what they lead to would end in the package.

    Those of the hub's cache are allowed: from ``<cache>/<repository>/snapshots/<revision>`` to the repository's
    ``blobs``, and on to the store that all repositories share.

    Raises:
        BadInputError: such a link; a package; or an adapter, which is only a part of a model.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    try:
        links = [path for path in sorted(folder.iterdir()) if path.suffix in READ_SUFFIXES and path.is_symlink()]
        targets = {path: path.resolve() for path in links}
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError
        raise BadInputError(f"{folder} cannot be read: {error}") from error
    for path, target in targets.items():
        if not any(target.is_relative_to(place) for place in allowed):
            raise BadInputError(f"{path} is a link out of the folder, to {target}; copy the file itself")
    if not (folder / "config.json").exists() and (folder / MANIFEST_FILE).exists():
        raise BadInputError(f"{folder} is a package, its model is quantized already; start from the original model")
    if (folder / "adapter_config.json").exists():
        raise BadInputError(f"{folder} holds an adapter (adapter_config.json); merge it into its model first")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadInputError: no regular file, more than 256 MiB, or what :func:`parse_json_object` refuses.
    """
    return _parse(path, _read(path))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise BadInputError(f"{path} cannot be read: it is not a file; mend or remove it")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise BadInputError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are allowed; mend or remove it")
        return path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}; mend or remove it") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(content)
    except ValueError as error:
        raise BadInputError(f"{path} cannot be read: {error}; mend or remove it") from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, without what would steer transformers.

    Raises:
        BadInputError: there is none, it is not a JSON object, or the model is quantized already.
        UnsupportedModelError: layers of different shapes.
    """
    path = folder / "config.json"
    if not path.exists():
        raise BadInputError(
            f"{folder} holds no config.json: not a Hugging Face model folder; give the one that holds it"
        )
    try:
        config = parse_json_object(_read(path))
    except ValueError as error:
        raise BadInputError(f"{path} is not usable JSON: {error}; download it again") from error
    if any(key in config for key in QUANTIZED_KEYS):
        raise BadInputError(f"{folder} is quantized already; start from the original model")
    if "per_layer_config" in config:
        raise UnsupportedModelError(
            f"{path}: per_layer_config is not supported; supported: one set of sizes for all layers"
        )
    return without_steering(config)


def without_steering(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what says how transformers is to work."""
    return {key: value for key, value in config.items() if key not in STEERING_KEYS and not key.startswith("_")}


def check_small_files(folder: Path) -> None:
    """Refuse tokenizer files and generation settings that cannot be read; those that are absent are not missed.

    Raises:
        BadInputError: the first of them.
    """
    for name in SMALL_FILES:
        if (folder / name).exists():
            read_json(folder / name)
    template = folder / "chat_template.jinja"
    if template.exists():
        try:
            _read(template).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInputError(f"{template} cannot be read: {error}; mend or remove it") from error
