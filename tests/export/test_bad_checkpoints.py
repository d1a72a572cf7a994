"""Checkpoints whose parts are not those of a model: a package is a stranger's, too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_files import (
    WEIGHTS,
    Break,
    Case,
    check_refused,
    cut_weights,
    replace_text,
    write,
)
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from synthetic import random_llama

from mgptq_export.checkpoint import read_checkpoint, write_checkpoint
from mgptq_runtime.errors import PackageError, UnsupportedModelError


def quantization(**values: Any) -> Break:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] |= values
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def layout(change: Callable[[dict[str, Any]], object]) -> Break:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content["quantization_config"]["layout"])
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    def edit(folder: Path) -> None:
        content = load_arrays(folder / WEIGHTS)
        change(content)
        save_arrays(content, folder / WEIGHTS)

    return edit


def first_linear(table: dict[str, Any]) -> dict[str, Any]:
    return table["groups"][0]["linears"][0]


CHECKPOINT_CASES: dict[str, Case] = {
    "a name that leads up": (quantization(name="../../x"), PackageError, "no name that files can have"),
    "a name that leads elsewhere": (quantization(name="/tmp/x"), PackageError, "no name that files can have"),
    "a name of two lines": (quantization(name="x\nSYSTEM obey"), PackageError, "no name that files can have"),
    "a name too long": (quantization(name="x" * 201), PackageError, "no name that files can have"),
    "an empty name": (quantization(name=""), PackageError, "no name that files can have"),
    "nested without end": (write("config.json", "[" * 100_000), PackageError, "nested too deeply"),
    "duplicate key": (replace_text("config.json", "{", '{"quantization_config": {},'), PackageError, "duplicate key"),
    "no name": (quantization(name=["x"]), PackageError, "not a complete quantized checkpoint"),
    "size of another kind": (quantization(recipe={"bits": 2.5, "size": {}}), PackageError, "the recipe's size"),
    "recipe without bits": (quantization(recipe={}), PackageError, "KeyError: 'bits'"),
    "family of another kind": (quantization(family=[1]), PackageError, "not a complete quantized checkpoint"),
    "unknown hyper-parameters": (
        quantization(hyperparameters={"x": 1}),
        UnsupportedModelError,
        r"llama\.x is not known",
    ),
    "rows of another kind": (
        layout(lambda table: first_linear(table).update(rows=[])),
        PackageError,
        "its layers are not those of a llama model",
    ),
    "billions of rows": (
        layout(lambda table: table["embedding"].update(rows=10**12)),
        PackageError,
        "token_embd has another shape",
    ),
    "format unknown": (layout(lambda table: first_linear(table).update(segments=["b9"])), PackageError, "b9"),
    "permutation with a double": (
        tensors(lambda arrays: arrays["blk.0.attn_qkv.permutation"].fill(0)),
        PackageError,
        r"blk\.0\.attn_qkv\.permutation is not one of",
    ),
    "norm that is NaN": (
        tensors(lambda arrays: arrays["output_norm"].fill(np.nan)),
        PackageError,
        "output_norm must be float32, and finite",
    ),
    "norm of another size": (
        tensors(lambda arrays: arrays.update(output_norm=np.ones(3, np.float32))),
        PackageError,
        "output_norm is missing, of another shape",
    ),
    "weights cut short": (cut_weights(1000), PackageError, "not a complete quantized checkpoint"),
}


@pytest.fixture(scope="module")
def sound_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "quantized"
    write_checkpoint(folder, random_llama(), name="x", config={}, recipe={"bits": 2.5}, tokenizer_folder=folder.parent)
    return folder


@pytest.mark.parametrize("name", CHECKPOINT_CASES)
def test_bad_checkpoints_are_refused(name: str, sound_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound_checkpoint, tmp_path / "copy"))
    check_refused(CHECKPOINT_CASES, name, folder, lambda path: read_checkpoint(Path(path)))
