"""The tokenizer's files in a package."""

import json
from pathlib import Path
from typing import Any

import pytest

from mgptq_export.targets.onnx.tokenizer_files import write_tokenizer

NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


def written(root: Path, config: dict[str, Any] | None, template: str | None = None) -> dict[str, Any]:
    source, target = root / "source", root / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").write_text("{}")
    if config is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    write_tokenizer(source, target, 256)
    return json.loads((target / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({}, "J", "J"),
        ({"chat_template": "C"}, None, "C"),
        ({"chat_template": "C"}, "J", "J"),
        ({"chat_template": NAMED}, None, "D"),
        ({"chat_template": NAMED[:1]}, None, None),
        ({"chat_template": None}, None, None),
        (None, "J", "J"),
    ],
)
def test_chat_template_is_one_text_and_the_files_own_comes_first(tmp_path, config, template, expected) -> None:
    assert written(tmp_path, config, template).get("chat_template") == expected


@pytest.mark.parametrize(("length", "expected"), [(1e30, 256), (10**30, 256), (128, 128), (None, 256)])
def test_longest_text_is_an_integer_within_the_context(tmp_path, length, expected) -> None:
    found = written(tmp_path, {"model_max_length": length})["model_max_length"]
    assert found == expected and type(found) is int


def test_class_is_named_and_a_given_one_kept(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert written(tmp_path / "a", {})["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written(tmp_path / "b", {"tokenizer_class": "GemmaTokenizer"})["tokenizer_class"] == "GemmaTokenizer"


def test_model_without_tokenizer_gets_no_files(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    write_tokenizer(tmp_path / "source", tmp_path / "target", 256)
    assert list((tmp_path / "target").iterdir()) == []
