"""Weight files that are no safetensors of the model; every one is made here and refused by name."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import (
    INDEX,
    NORM,
    SHARDS,
    UP,
    WEIGHTS,
    Break,
    Case,
    check_refused,
    config,
    cut_weights,
    link_out,
    replace_text,
    write,
)
from safetensors.torch import load_file, save_file

from mgptq_export.models import load_source
from mgptq_runtime.errors import BadInputError, NumericalError, UnsupportedModelError


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights in two files; returns the index."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, members in halves.items():
        save_file({name: state[name] for name in members}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def sharded(change: Callable[[dict[str, Any]], object]) -> Break:
    """Shards, and an index that ``change`` has changed; a copy of the first shard lies outside of the folder."""

    def edit(folder: Path) -> None:
        index = shard(folder)
        shutil.copy(folder / SHARDS[0], folder.parent / "outside.safetensors")
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def rename_first_shard(name: str) -> Break:
    def change(index: dict[str, Any]) -> None:
        table = index["weight_map"]
        index["weight_map"] = {tensor: name if file == SHARDS[0] else file for tensor, file in table.items()}

    return sharded(change)


def first_shard_at_its_absolute_path(folder: Path) -> None:
    rename_first_shard(str(folder.parent / "outside.safetensors"))(folder)


def without_second_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def swap_two_tensors(index: dict[str, Any]) -> None:
    table = index["weight_map"]
    first, second = (next(name for name, file in table.items() if file == shard) for shard in SHARDS)
    table[first], table[second] = table[second], table[first]


def unlisted_tensor(folder: Path) -> None:
    shard(folder)
    state = load_file(folder / SHARDS[0]) | {"model.extra": torch.zeros(3)}
    save_file(state, folder / SHARDS[0], metadata={"format": "pt"})


def duplicate_in_index(folder: Path) -> None:
    shard(folder)
    replace_text(INDEX, '"weight_map": {', f'"weight_map": {{"{NORM}": "{SHARDS[0]}", ')(folder)


def header(change: Callable[[dict[str, Any]], dict[str, Any] | str | None]) -> Break:
    """The weight file with another header over the same data."""

    def edit(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + size])
        changed = change(table) or table
        text = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return edit


def overlap(table: dict[str, Any]) -> None:
    one, other = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight")
    table[other]["data_offsets"] = table[one]["data_offsets"]


def duplicate_in_header(table: dict[str, Any]) -> str:
    return json.dumps(table)[:-1] + f', "{NORM}": {json.dumps(table[NORM])}}}'


def integers(table: dict[str, Any]) -> None:
    table[NORM]["dtype"] = "I32"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def edit(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def enormous_without_weights(folder: Path) -> None:
    """Sizes that are each allowed; transformers would take memory for all weights that are missing."""
    config(hidden_size=1 << 16, intermediate_size=1 << 18, num_attention_heads=512, num_key_value_heads=512)(folder)
    save_file({NORM: torch.ones(1 << 16)}, folder / WEIGHTS, metadata={"format": "pt"})


WEIGHT_CASES: dict[str, Case] = {
    "shard at an absolute path": (first_shard_at_its_absolute_path, BadInputError, r"names the file '/.*beside it"),
    "shard in the folder above": (
        rename_first_shard("../outside.safetensors"),
        BadInputError,
        r"'\.\./outside.*beside",
    ),
    "shard that is a folder above": (rename_first_shard(".."), BadInputError, r"names the file '\.\.'"),
    "shard on another drive": (rename_first_shard("C:\\outside.safetensors"), BadInputError, "names the file 'C:"),
    "link out of the folder": (link_out(WEIGHTS), BadInputError, "link out of the folder, to .*; copy the file"),
    "missing shard": (without_second_shard, BadInputError, rf"names {SHARDS[1]}, not there; download"),
    "shards with each other's tensors": (sharded(swap_two_tensors), BadInputError, "the index says otherwise"),
    "tensor that the index lacks": (unlisted_tensor, BadInputError, "'model.extra' is in .* the index says otherwise"),
    "index without files": (sharded(lambda index: index.pop("weight_map")), BadInputError, "has no weight_map"),
    "index with numbers": (sharded(lambda index: index["weight_map"].update(a=1)), BadInputError, "has no weight_map"),
    "index without metadata": (sharded(lambda index: index.pop("metadata")), BadInputError, "no object metadata"),
    "duplicate key in the index": (duplicate_in_index, BadInputError, f"duplicate key '{NORM}'"),
    "header longer than the file": (write(WEIGHTS, struct.pack("<Q", 1 << 62)), BadInputError, "header too large"),
    "header that is no JSON": (write(WEIGHTS, struct.pack("<Q", 9) + b"[" * 9), BadInputError, "cannot be read"),
    "overlapping tensors": (header(overlap), BadInputError, "invalid offset"),
    "duplicate tensor": (header(duplicate_in_header), BadInputError, f"duplicate key '{NORM}'"),
    "integers": (header(integers), BadInputError, f"'{NORM}' is stored as I32, supported: F32"),
    "empty file": (cut_weights(0), BadInputError, "header too small"),
    "cut header": (cut_weights(100), BadInputError, "cannot be read"),
    "cut data": (cut_weights(50_000), BadInputError, "not fully covered"),
    "NaN": (weights(lambda s: s[UP][3].fill_(torch.nan)), NumericalError, f"{UP} holds NaN or infinity"),
    "infinity": (weights(lambda s: s[NORM].fill_(torch.inf)), NumericalError, f"{NORM} holds NaN or infinity"),
    "float64 beyond float32": (
        weights(lambda s: s.update({NORM: s[NORM].double() * 1e300})),
        NumericalError,
        f"{NORM} holds NaN or infinity",
    ),
    "missing weight": (weights(lambda s: s.pop(UP)), BadInputError, f"lacks weights.*{UP}"),
    "weight of another shape": (weights(lambda s: s.update({NORM: torch.ones(5)})), BadInputError, NORM),
    "bias without a place": (
        weights(lambda s: s.update({"model.layers.1.mlp.up_proj.bias": torch.ones(200)})),
        UnsupportedModelError,
        r"does not have: model\.layers\.1\.mlp\.up_proj\.bias",
    ),
    "enormous sizes, no weights": (enormous_without_weights, BadInputError, r"describes \d{11,} weights.*hold 65536"),
    "pickled weights": (pickle_weights, BadInputError, r"only pytorch_model\.bin.*save_pretrained"),
    "weights under another name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
        BadInputError,
        rf"neither {WEIGHTS} nor {INDEX}",
    ),
}


@pytest.mark.parametrize("name", WEIGHT_CASES)
def test_bad_weight_files_are_refused(name: str, folder: Path) -> None:
    check_refused(WEIGHT_CASES, name, folder, load_source)


def test_sound_shards_give_the_same_model(folder: Path, odd_model: Path) -> None:
    shard(folder)
    expected, found = load_source(str(odd_model)).model.state_dict(), load_source(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
