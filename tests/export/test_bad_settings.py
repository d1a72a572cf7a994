"""Small files of a model folder that are not what they should be, and code that comes with them."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from bad_files import (
    WEIGHTS,
    Case,
    check_refused,
    config,
    link_out,
    replace_text,
    write,
)
from small_runs import Package

from mgptq_export.models import load_shape, load_source
from mgptq_export.models.folder import check_folder
from mgptq_runtime.errors import BadInputError, UnsupportedModelError

Main = Callable[..., tuple[int, str, str]]

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
SETTINGS_CASES: dict[str, Case] = {
    "negative size": (config(hidden_size=-96), BadInputError, "hidden_size is -96, it must be .* from 1 to 65536"),
    "text for a number": (config(num_hidden_layers="two"), BadInputError, "num_hidden_layers is 'two'"),
    "fraction": (config(hidden_size=96.5), BadInputError, r"hidden_size is 96\.5"),
    "truth for a number": (config(num_hidden_layers=True), BadInputError, "num_hidden_layers is True"),
    "list for a number": (config(vocab_size=[1]), BadInputError, r"vocab_size is \[1\]"),
    "null size": (config(hidden_size=None), BadInputError, "hidden_size"),
    "millions of layers": (config(num_hidden_layers=10**7), BadInputError, "num_hidden_layers is 10000000"),
    "billions of columns": (config(intermediate_size=10**10), BadInputError, "intermediate_size is 10000000000"),
    "number of 4000 digits": (config(vocab_size=10**4000), BadInputError, r"vocab_size is 1000+\.\.\.0+, it"),
    "endless context": (config(max_position_embeddings=10**15), BadInputError, "max_position_embeddings is 10+,"),
    "endless window": (config(sliding_window=10**400), BadInputError, r"sliding_window is 1000+\.\.\."),
    "no heads": (config(num_attention_heads=0), BadInputError, "num_attention_heads is 0"),
    "heads that do not divide": (
        config(num_attention_heads=5, num_key_value_heads=5, head_dim=None),
        BadInputError,
        "hidden_size 96 is no multiple of num_attention_heads 5",
    ),
    "key heads that do not divide": (config(num_key_value_heads=4), BadInputError, "6 is no multiple of .* 4"),
    "odd head size": (config(head_dim=17), BadInputError, "even rotary dimension"),
    "epsilon below zero": (config(rms_norm_eps=-1e-5), BadInputError, "rms_norm_eps is -1e-05, .* above 0"),
    "rotary base of zero": (config(rope_parameters=ROPE | {"rope_theta": 0}), BadInputError, "rope_theta is 0"),
    "rotary base beyond floats": (config(rope_parameters=ROPE | {"rope_theta": 10**400}), BadInputError, "rope_theta"),
    "rotary part above one": (config(partial_rotary_factor=1e9), BadInputError, "partial_rotary_factor is 1000000000"),
    "llama3 without its factors": (
        config(rope_parameters=ROPE | {"rope_type": "llama3"}),
        BadInputError,
        "Missing required keys",
    ),
    "layer types of another kind": (config(layer_types=[{}, {}]), UnsupportedModelError, "layer_types"),
    "sizes by layer": (config(per_layer_config=[{}]), UnsupportedModelError, "per_layer_config is not supported"),
    "family unknown": (config(model_type="evil"), UnsupportedModelError, "model type 'evil' is not supported"),
    "quantized": (config(compression_config={}), BadInputError, "quantized already; start from the original"),
    "duplicate key": (replace_text("config.json", "{", '{"hidden_size": 5,'), BadInputError, "duplicate key 'hidden"),
    "infinity": (replace_text("config.json", "{", '{"x": 1e999,'), BadInputError, "1e999 is beyond float64"),
    "half a character": (config(x="\ud800"), BadInputError, "half a surrogate pair"),
    "nested without end": (write("config.json", '{"a":' * 100_000), BadInputError, "nested too deeply"),
    "no UTF-8": (write("config.json", b'{"a": "\xff"}'), BadInputError, r"config\.json is not usable JSON: .utf-8"),
    "adapter": (write("adapter_config.json", "{}"), BadInputError, "holds an adapter.*merge it"),
    "duplicate key of the tokenizer": (
        replace_text("tokenizer.json", "{", '{"version": "9",'),
        BadInputError,
        r"tokenizer\.json cannot be read: duplicate key 'version'",
    ),
    "tokenizer nested without end": (write("tokenizer.json", "[" * 100_000), BadInputError, "nested too deeply"),
    "tokenizer that makes the library panic": (
        write("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}}}'),
        BadInputError,
        r"tokenizer\.json cannot be read",
    ),
    "token of an enormous id": (
        replace_text("tokenizer.json", '"!": ', '"!": 1000000'),
        BadInputError,
        r"token id 100000\d+, ids end at 4194303",
    ),
    "settings that are a list": (write("generation_config.json", "[]"), BadInputError, "expected a JSON object"),
    "settings with half a character": (
        write("tokenizer_config.json", '{"eos_token": "\\ud800"}'),
        BadInputError,
        r"tokenizer_config\.json cannot be read: .*surrogate",
    ),
    "template that is no UTF-8": (write("chat_template.jinja", b"\xff"), BadInputError, "chat_template.jinja cannot"),
    "template linked from elsewhere": (link_out("chat_template.jinja"), BadInputError, "chat_template.jinja is a link"),
    "model card linked from elsewhere": (
        lambda folder: (folder / "README.md").symlink_to("/etc/passwd"),
        BadInputError,
        "README.md is a link",
    ),
    "link to itself": (
        lambda folder: (folder / "x.json").symlink_to(folder / "x.json"),
        BadInputError,
        "cannot be read: Symlink loop|x.json",
    ),
}


@pytest.mark.parametrize("name", SETTINGS_CASES)
def test_bad_settings_are_refused_before_weights_are_read(name: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    check_refused(SETTINGS_CASES, name, folder, load_source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadInputError, match="it is not a file"):
        load_shape(str(folder))


@pytest.mark.parametrize(("key", "count"), [("short_factor", 5), ("long_factor", 7)])
def test_rotary_factors_of_another_number_than_frequencies_are_refused(key: str, count: int, tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "phi3", "phi3")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    config(rope_parameters=rope | {key: [1.0] * count})(folder)
    with pytest.raises(BadInputError, match=f"{key} has {count} numbers, it must have 6"):
        load_shape(str(folder))


def test_links_within_the_hubs_cache_are_followed(folder: Path) -> None:
    cache = folder.parent / "models--a--b"
    snapshot, blobs, shared = cache / "snapshots" / "abc", cache / "blobs", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shared.mkdir()
    for file in folder.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    shutil.move(blobs / WEIGHTS, shared / WEIGHTS)
    (blobs / WEIGHTS).symlink_to(Path("../../blobs") / WEIGHTS)
    assert load_source(str(snapshot)).family.name == "llama"
    (snapshot / "x.json").symlink_to("/etc/passwd")
    with pytest.raises(BadInputError, match="link out of the folder"):
        check_folder(snapshot)


@pytest.mark.parametrize(
    "values",
    [{"attn_implementation": "evil/kernel"}, {"_attn_implementation": "evil/kernel"}, {"num_labels": 10**9}],
    ids=str,
)
def test_a_configuration_cannot_steer_transformers(values: dict[str, Any], folder: Path) -> None:
    config(**values)(folder)
    source = load_source(str(folder))
    assert not values.keys() & source.config.keys()
    assert source.model.config._attn_implementation != "evil/kernel"


# Code that a model brings

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path(__file__).parent.joinpath("ran").touch()
class Evil(LlamaForCausalLM):
    brought = True
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (folder / "evil.py").write_text(CODE)
    config(auto_map={"AutoModelForCausalLM": "evil.Evil"})(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("load", [load_source, load_shape])
def test_code_is_run_only_when_it_is_trusted(load: Callable[..., Any], with_code: Path, tmp_path: Path) -> None:
    assert not hasattr(load(str(with_code)).model, "brought")
    assert not list(tmp_path.rglob("ran"))
    assert load(str(with_code), trust_remote_code=True).model.brought
    assert list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("command", ["plan", "quantize", "run", "sweep", "eval"])
def test_commands_run_code_only_where_they_are_told_to(
    command: str, trusted: bool, with_code: Path, package: Package, text_file: Path, tmp_path: Path, main: Main
) -> None:
    quick = ("--samples", 2, "--sequence-length", 32, "--allocator", "uniform", "--recovery-steps", 0, "--bits", 3)
    scored = ("--window", 32, "--windows", 1)
    arguments = {
        "plan": (with_code,),
        "quantize": (with_code, "-o", tmp_path / "out", *quick),
        "run": (with_code, "-o", tmp_path / "out", *quick),
        "sweep": (with_code, "-o", tmp_path / "out", *quick, "--evaluate", text_file, *scored),
        "eval": (package.folder, "--model", with_code, "--text", text_file, *scored),
    }[command]
    main(command, *arguments, *(["--trust-remote-code"] if trusted else []))
    assert bool(list(tmp_path.rglob("ran"))) is trusted


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_only_when_it_is_trusted(trusted: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_shape("someone/model", trust_remote_code=trusted)
    assert ("*.py" in asked) is trusted
    assert not {"*.bin", "*.pt"} & set(asked)
