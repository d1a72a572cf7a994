"""The quantized checkpoint: the folder that the exporters read, and nothing else.

quantized/
  config.json         the model's own configuration, and quantization_config: method, recipe, layout
  model.safetensors   packed segments (uint8), permutations (int32), everything else in float32
  tokenizer files     tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
"""

import json
import logging
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mgptq_export.models.folder import without_steering
from mgptq_export.models.origin import is_name
from mgptq_runtime.errors import PackageError
from mgptq_runtime.families import make_family
from mgptq_runtime.families.layout import GroupShape, Layout
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment
from mgptq_runtime.strict_json import parse_json_object

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "copy_tokenizer",
    "drop_tokens_beyond",
    "pack_group",
    "pack_model",
    "read_checkpoint",
    "tokenizer_files",
    "unpack_group",
    "unpack_model",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model with all that an exporter needs.

    Attributes:
        folder: where it lies; holds the tokenizer files.
        model: the quantized weights.
        config: the model's own ``config.json``, ``quantization_config`` included.
    """

    folder: Path
    model: QuantizedModel
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The model's name, for file names and titles."""
        return self.config["quantization_config"]["name"]


def pack_group(group: InputGroup) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An input group as arrays by name, and as JSON values what these are."""
    arrays = {name: data for linear in group.linears for name, data in _linear_tensors(linear).items()}
    if group.permutation is not None:
        arrays[f"{group.name}.permutation"] = group.permutation.astype(np.int32)
    return arrays, {"name": group.name, "linears": [_linear_layout(linear) for linear in group.linears]}


def unpack_group(arrays: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> InputGroup:
    """What :func:`pack_group` packed."""
    permutation = arrays.get(f"{entry['name']}.permutation")
    linears = tuple(_read_linear(linear, arrays, permutation) for linear in entry["linears"])
    return InputGroup(entry["name"], permutation, linears)


def pack_model(model: QuantizedModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A quantized model as arrays by name, and as JSON values what these are."""
    arrays: dict[str, np.ndarray] = dict(model.tensors)
    groups = []
    for group in model.groups:
        of_group, entry = pack_group(group)
        arrays |= of_group
        groups.append(entry)
    layout: dict[str, Any] = {"groups": groups, "embedding": _linear_layout(model.embedding), "head": None}
    arrays |= _linear_tensors(model.embedding)
    if model.head is not None:
        layout["head"] = _linear_layout(model.head)
        arrays |= _linear_tensors(model.head)
    description = {
        "family": model.family,
        "hyperparameters": dict(model.hyperparameters),
        "tensors": sorted(model.tensors),
        "layout": layout,
    }
    return arrays, description


def unpack_model(arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> QuantizedModel:
    """What :func:`pack_model` packed."""
    layout = description["layout"]
    return QuantizedModel(
        family=description["family"],
        hyperparameters=description["hyperparameters"],
        groups=tuple(unpack_group(arrays, entry) for entry in layout["groups"]),
        embedding=_read_linear(layout["embedding"], arrays, None),
        head=_read_linear(layout["head"], arrays, None) if layout["head"] else None,
        tensors={key: arrays[key] for key in description["tensors"]},
    )


def _linear_layout(linear: QuantizedLinear) -> dict[str, Any]:
    return {
        "name": linear.name,
        "rows": linear.rows,
        "columns": linear.columns,
        "segments": [segment.format for segment in linear.segments],
    }


def _linear_tensors(linear: QuantizedLinear) -> dict[str, np.ndarray]:
    return {f"{linear.name}.{i}.{segment.format}": segment.data for i, segment in enumerate(linear.segments)}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy those of :data:`TOKENIZER_FILES` that a folder has into another, without byte order marks."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes().removeprefix(BOM_UTF8))


@contextmanager
def tokenizer_files(source: Path, vocabulary_size: int) -> Iterator[Path]:
    """A temporary folder with those tokenizer files that a checkpoint of a model would have."""
    with tempfile.TemporaryDirectory(prefix="mgptq-tokenizer-") as name:
        folder = Path(name)
        copy_tokenizer(source, folder)
        drop_tokens_beyond(folder / "tokenizer.json", vocabulary_size)
        yield folder


def write_checkpoint(
    folder: Path,
    model: QuantizedModel,
    *,
    name: str,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    tokenizer_folder: Path,
    repairs: Mapping[str, Any] | None = None,
    origin: Mapping[str, str] | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write ``model`` into ``folder`` (created; must not exist).

    Args:
        config: the original model's ``config.json`` as a dictionary.
        recipe: what the quantization was asked for, as JSON values.
        repairs: what had to be mended, by input group, as JSON values.
        origin: where the original comes from, and its license.
        made_with: ``threads``, ``calibration_sequences``, how many there really were, ``calibration_sha256``,
            ``tokens_at_once`` and ``processes``.
        tokenizer_folder: holds the files of :data:`TOKENIZER_FILES`, those that exist are copied.
    """
    folder.mkdir(parents=True)
    tensors, description = pack_model(model)
    quantization_config = {
        "quant_method": "mgptq",
        "format_version": FORMAT_VERSION,
        "name": name,
        "origin": dict(origin or {}),
        "bits_stored": model.bits_stored,
        "recipe": dict(recipe),
        "repairs": dict(repairs or {}),
        "made_with": dict(made_with or {}),
        **description,
    }
    full_config: dict[str, Any] = {**config, "quantization_config": quantization_config}
    weights, settings = folder / "model.safetensors", folder / "config.json"
    save_file({key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}, weights)
    settings.write_text(json.dumps(full_config, indent=2) + "\n", encoding="utf-8")
    weights.chmod(settings.stat().st_mode)  # safetensors lets nobody else read what it writes
    copy_tokenizer(tokenizer_folder, folder)
    drop_tokens_beyond(folder / "tokenizer.json", model.embedding.rows)
    return Checkpoint(folder, model, full_config)


def drop_tokens_beyond(path: Path, vocabulary_size: int) -> None:
    """Some tokenizers add tokens that their model has no embedding for (Gemma 3's image token in its text models)."""
    if not path.is_file():
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer.get("added_tokens") or []
    kept = [token for token in added if token["id"] < vocabulary_size]
    dropped = [token["content"] for token in added if token["id"] >= vocabulary_size]
    if dropped:
        logger.warning("dropped tokens that the model has no embedding for: %s", ", ".join(dropped))
        path.write_text(json.dumps({**tokenizer, "added_tokens": kept}, ensure_ascii=False), encoding="utf-8")


def _read_linear(
    layout: Mapping[str, Any], tensors: Mapping[str, np.ndarray], permutation: np.ndarray | None
) -> QuantizedLinear:
    name = layout["name"]
    segments = tuple(Segment(fmt, tensors[f"{name}.{i}.{fmt}"]) for i, fmt in enumerate(layout["segments"]))
    return QuantizedLinear(name, layout["rows"], layout["columns"], segments, permutation)


def _check_model(model: QuantizedModel) -> None:
    """Raise ValueError where a model's parts are not those of its family and hyper-parameters."""
    layout = make_family(model.family, model.hyperparameters).layout
    if _shapes(model.groups) != _shapes(layout.groups):
        raise ValueError(f"its layers are not those of a {model.family} model of its hyper-parameters")
    for group in model.groups:
        order, columns = group.permutation, group.linears[0].columns
        if order is not None and not np.array_equal(np.sort(order), np.arange(columns)):
            raise ValueError(f"{group.name}.permutation is not one of 0 to {columns - 1}")
    tables = model.tables()
    for table in tables:
        if (table.rows, table.columns) != (layout.embedding.rows, layout.embedding.columns):
            raise ValueError(f"{table.name} has another shape than its hyper-parameters say")
    for linear in (*model.linears(), *tables):
        if any(part.data.dtype != np.uint8 or part.data.shape[:-1] != (linear.rows,) for part in linear.segments):
            raise ValueError(f"{linear.name}: packed weights must be uint8 [{linear.rows}, bytes]")
    _check_tensors(model.tensors, layout)


def _shapes(groups: Iterable[InputGroup] | Iterable[GroupShape]) -> dict[str, list[tuple[str, int, int]]]:
    return {group.name: [(linear.name, linear.rows, linear.columns) for linear in group.linears] for group in groups}


def _check_tensors(tensors: Mapping[str, np.ndarray], layout: Layout) -> None:
    shapes = {name: values.shape for name, values in tensors.items()}
    known = {**layout.tensors, **layout.optional_tensors}
    wrong = layout.tensors.keys() - shapes.keys() | {name for name in shapes if known.get(name) != shapes[name]}
    if wrong:
        raise ValueError(f"{min(wrong)} is missing, of another shape, or no part of the model")
    for name, values in tensors.items():
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise ValueError(f"{name} must be float32, and finite")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        PackageError: the folder holds no checkpoint of this method, or not all of it.
        UnsupportedModelError: a family, or hyper-parameters of it, that this version does not know.
    """
    try:
        config = parse_json_object((folder / "config.json").read_bytes())
        quantization = config["quantization_config"]
        if quantization["quant_method"] != "mgptq" or quantization["format_version"] != FORMAT_VERSION:
            raise PackageError(
                f"{folder}: quant_method {quantization['quant_method']!r} version {quantization.get('format_version')}"
                f" is not 'mgptq' version {FORMAT_VERSION}; quantize the model with this version"
            )
        model = unpack_model(load_file(folder / "model.safetensors"), quantization)
        _check_model(model)
        recipe = quantization["recipe"]
        if not is_name(quantization["name"]):
            raise ValueError(f"{quantization['name']!r} is no name that files can have")
        if not isinstance(recipe["bits"], int | float):
            raise TypeError("bits of the recipe are not what this program writes")
        if not isinstance(recipe.get("size"), int | None):
            raise TypeError("the recipe's size is not what this program writes")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise PackageError(
            f"{folder} is not a complete quantized checkpoint ({type(error).__name__}: {error}); "
            "make one with: mgptq-export quantize MODEL -o FOLDER"
        ) from error
    return Checkpoint(folder, model, without_steering(config))
