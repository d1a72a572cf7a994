"""Texts to calibrate and evaluate with that are no texts."""

import json
import os
import shutil
from codecs import BOM_UTF8
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_files import (
    config,
)
from small_runs import RECIPE

from mgptq_export import pipeline
from mgptq_export.calibration.text import calibration_tokens, file_tokens
from mgptq_export.manifest import verify
from mgptq_export.models import load_source
from mgptq_export.targets import TARGETS
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.package import file_sha256


@pytest.fixture(scope="module")
def source(odd_model: Path) -> Any:
    return load_source(str(odd_model))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text; give a .txt file in UTF-8, or a .jsonl file"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.txt", b"\x7fELF\x02\xff", "cannot be read as UTF-8 text.*give a text file in UTF-8"),
        ("a.txt", "text".encode("utf-16"), "cannot be read as UTF-8 text"),
        ("a.txt", b"\0" * 100, "holds zero bytes, so it is no text; give"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "b"}\n', r"line 2: not a JSON object with a field 'text'"),
        ("a.JSONL", b'{"text": 5}\n', "line 1: the field 'text' is int, it must be a string"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1: .*duplicate key 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*half a surrogate pair"),
        ("a.jsonl", b'{"text":' * 100_000, "line 1: .*nested too deeply"),
        ("missing.txt", None, "missing.txt cannot be read"),
    ],
)
def test_bad_texts_are_refused(source: Any, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (
        lambda: file_tokens(tmp_path / name, source),
        lambda: calibration_tokens(source, replace(RECIPE, calibration=str(tmp_path / name))),
    ):
        with pytest.raises(BadInputError, match=message):
            read()


def test_a_folder_is_no_text(source: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"is a folder; give a \.txt file"):
        calibration_tokens(source, replace(RECIPE, calibration=str(tmp_path)))


def test_a_pipe_is_no_text(source: Any, tmp_path: Path) -> None:
    """As a shell gives it; what is read of it once is gone."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInputError, match=r"is no regular file.*; give a \.txt file"):
        calibration_tokens(source, replace(RECIPE, calibration=str(tmp_path / "pipe")))


def test_texts_that_change_and_go_while_a_run_lasts_are_told_as_they_were_read(
    even_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names, too, which need not be UTF-8."""
    calibration, held_out = (tmp_path / os.fsdecode(name) for name in (b"Stra\xdfe.txt", b"held\xdf.txt"))
    for path in (calibration, held_out):
        shutil.copyfile(text_file, path)
    held_out.write_text(text_file.read_text()[5_000:])
    expected, quantize = [file_sha256(path) for path in (calibration, held_out)], pipeline.quantize

    def when_the_texts_are_gone(*arguments: Any) -> Any:
        calibration.write_text("another text")
        held_out.unlink(missing_ok=True)
        return quantize(*arguments)

    monkeypatch.setattr(pipeline, "quantize", when_the_texts_are_gone)
    recipe = replace(RECIPE, calibration=str(calibration))
    text = pipeline.EvaluationText(held_out, window=32, windows=1)
    manifest = pipeline.run(str(even_model), tmp_path / "out", recipe, ["container"], text=text)
    assert [manifest["calibration_sha256"], manifest["evaluation"]["text_sha256"]] == expected
    assert (manifest["recipe"]["calibration"], manifest["evaluation"]["text"]) == ("Stra_e.txt", "held_.txt")
    assert not verify(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_calibration_text_that_may_not_be_read_is_named(even_model: Path, text_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(text_file, tmp_path / "text.txt"))
    path.chmod(0)
    with pytest.raises(BadInputError, match=r"text\.txt cannot be read"):
        pipeline.run(str(even_model), tmp_path / "out", replace(RECIPE, calibration=str(path)), ["container"])


def test_a_tokenizer_without_tokens_for_a_text_is_refused(folder: Path, text_file: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(BadInputError, match=r"the tokenizer cannot read the text: .*UNK"):
        file_tokens(text_file, load_source(str(folder)))


def test_an_end_of_text_beyond_the_vocabulary_is_no_obstacle(folder: Path) -> None:
    config(eos_token_id=[2, 10**9, -1])(folder)
    recipe = replace(RECIPE, samples=1, sequence_length=8)
    tokens = calibration_tokens(load_source(str(folder)), recipe)
    assert tokens.shape == (1, 8) and 2 not in tokens[0, 1:]


def test_byte_order_marks_of_settings_are_no_obstacle(even_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(even_model, tmp_path / "model"))
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    for path in (*model.glob("*.json"), model / "chat_template.jinja"):
        content = path.read_bytes() if path.exists() else b"{{ messages[0].content }}"
        path.write_bytes(BOM_UTF8 + content)
    pipeline.run(str(model), tmp_path / "out", RECIPE, list(TARGETS))
    for path in (tmp_path / "out").rglob("*.j*"):
        assert not path.read_bytes().startswith(BOM_UTF8), path
