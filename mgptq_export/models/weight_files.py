"""The safetensors files of a model folder, checked before anything is loaded from them."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mgptq_export.memory import Memory
from mgptq_export.models.folder import read_json
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.progress import track
from mgptq_runtime.strict_json import parse_json_object

__all__ = ["count_weights", "read_weights"]

# What transformers reads, in its order.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TYPES = ("F32", "F16", "BF16", "F64")


def count_weights(folder: Path) -> int:
    """How many numbers the weight files of a model folder hold.

    Raises:
        BadInputError: no weights in safetensors; an index that names files outside the folder, or tensors that its
            files do not hold; a broken file; integers, or floats of 8 bits, whose scales no model here would apply.
    """
    single = folder / SINGLE
    if single.exists():
        return sum(_tensors(single).values())
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    total = 0
    for name, listed in _shards(folder / INDEX).items():
        found = _tensors(folder / name)
        if found.keys() != listed:
            odd = min(found.keys() ^ listed)
            way = "is in" if odd in found else "is not in"
            raise BadInputError(
                f"{folder / INDEX}: tensor {odd!r} {way} {name}, the index says otherwise; download the model again"
            )
        total += sum(found.values())
    return total


def read_weights(folder: Path, memory: Memory) -> dict[str, torch.Tensor]:
    """All weights of a folder that :func:`count_weights` accepted, by name, float32, kept in ``memory``."""
    single = folder / SINGLE
    paths = [single] if single.exists() else [folder / name for name in _shards(folder / INDEX)]
    places = [(path, name) for path in paths for name in sorted(_tensors(path))]
    state = {}
    with track("Reading weights", len(places)) as advance:
        for path, name in places:
            with safe_open(path, "pt") as file:  # anew, as it keeps in memory what has been read
                state[name] = memory.keep(file.get_tensor(name), torch.float32)
            advance()
    return state


def _no_weights(folder: Path) -> BadInputError:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return BadInputError(
            f"{folder} holds no .safetensors weights, only {pickled[0]}: loading pickled weights runs code that they "
            "bring. Convert them where that does no harm: load the model in transformers, then model.save_pretrained"
        )
    return BadInputError(f"{folder} holds no .safetensors weights: neither {SINGLE} nor {INDEX}; download them")


def _shards(index: Path) -> dict[str, set[str]]:
    """Names of tensors by the file that holds them."""
    content = read_json(index)
    table = content.get("weight_map")
    if not (isinstance(table, dict) and table and all(isinstance(name, str) for name in table.values())):
        raise BadInputError(f"{index} has no weight_map of file names by tensor; download it again")
    if not isinstance(content.get("metadata"), dict):
        raise BadInputError(f"{index} has no object metadata; download it again")
    shards: dict[str, set[str]] = {}
    for tensor, name in table.items():
        if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
            raise BadInputError(f"{index} names the file {name!r}; only names of files beside it are allowed")
        shards.setdefault(name, set()).add(tensor)
    missing = [name for name in sorted(shards) if not (index.parent / name).is_file()]
    if missing:
        raise BadInputError(f"{index} names {', '.join(missing[:5])}, not there; download what is missing")
    return shards


def _tensors(path: Path) -> dict[str, int]:
    """Number of elements of every tensor of a file."""
    if not path.is_file():
        raise BadInputError(f"{path} is not a file; download the model again")
    try:
        with safe_open(path, "pt"):  # the library finds gaps, overlaps, and tensors beyond the end
            header = _header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; download it again") from error
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise BadInputError(
                f"{path}: tensor {name!r} is stored as {entry['dtype']}, supported: {', '.join(TYPES)}; "
                "start from the original model"
            )
    return {name: math.prod(entry["shape"]) for name, entry in header.items()}


def _header(path: Path) -> Mapping[str, Any]:
    """The table of tensors, of a file that the library has opened; it lets the last of two equal names win."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = parse_json_object(file.read(size))
    header.pop("__metadata__", None)
    return header
