"""Ways to break the files of strangers, and what is to come of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgptq_runtime.errors import MgptqError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"

Break = Callable[[Path], object]
Case = tuple[Break, type[MgptqError], str]


def check_refused(cases: dict[str, Case], name: str, folder: Path, load: Callable[[str], object]) -> None:
    break_it, error, message = cases[name]
    break_it(folder)
    with pytest.raises(error, match=message) as caught:
        load(str(folder))
    assert caught.type is error
    assert "\n" not in str(caught.value)


def edit_json(name: str, **values: Any) -> Break:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return edit


def config(**values: Any) -> Break:
    return edit_json("config.json", **values)


def write(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def replace_text(name: str, old: str, new: str) -> Break:
    def edit(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1))

    return edit


def link_out(name: str) -> Break:
    """Move a file out of the folder and leave a link to it."""

    def link(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return link


def cut_weights(size: int) -> Break:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
