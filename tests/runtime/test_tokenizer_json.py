"""tokenizer.json without the lists of a GGUF file, and put together again. Trusted: the JSON that it was."""

import json
from typing import Any

import pytest

from mgptq_runtime.tokenizer_json import MAX_CHARACTERS, restore_tokenizer, shorten_tokenizer

TOKENS = ["<|end|>", "a", "b", "ab", "[PAD4]"]
MERGES = ["a b"]


def tokenizer(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"<|end|>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}
    return {"version": "1.0", "added_tokens": [{"id": 0, "content": "<|end|>"}], "model": {**model, **changes}}


@pytest.mark.parametrize("merges", [[["a", "b"]], ["a b"]])
def test_lists_that_the_file_holds_are_left_out_and_put_back(merges):
    short = shorten_tokenizer(tokenizer(merges=merges), TOKENS, MERGES)
    assert short is not None
    assert json.loads(short) == tokenizer(vocab=4, merges=1)
    assert json.loads(restore_tokenizer(short, TOKENS, MERGES)) == tokenizer()


@pytest.mark.parametrize("merges", [[], [["b", "a"]], [["a", "b"], ["ab", "a"]]])
def test_merges_that_are_not_the_files_stay(merges):
    short = shorten_tokenizer(tokenizer(merges=merges), TOKENS, MERGES)
    assert short is not None
    assert json.loads(short) == tokenizer(vocab=4, merges=merges)
    assert json.loads(restore_tokenizer(short, TOKENS, MERGES)) == tokenizer(merges=merges)


def test_a_merge_of_a_token_with_a_space_stays():
    merges = [["a b", "c"]]
    short = shorten_tokenizer(tokenizer(merges=merges), TOKENS, ["a b c"])
    assert short is not None
    assert json.loads(short)["model"]["merges"] == merges


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"a": 1, "b": 2},  # with a hole
        {"<|end|>": 0, "a": 1, "b": 2, "ba": 3},  # other tokens
        {"<|end|>": 0, "a": 2, "b": 1},  # in another order
        {token: i for i, token in enumerate([*TOKENS, "c"])},  # more of them
        [["a", -1.0]],  # another kind of tokenizer
    ],
)
def test_another_vocabulary_than_the_files_is_not_left_out(vocabulary):
    assert shorten_tokenizer(tokenizer(vocab=vocabulary), TOKENS, MERGES) is None


@pytest.mark.parametrize("limit", ["MAX_JSON_BYTES", "MAX_ENTRIES", "MAX_CHARACTERS"])
def test_what_a_reader_would_refuse_is_not_shortened(monkeypatch, limit):
    monkeypatch.setattr(f"mgptq_runtime.tokenizer_json.{limit}", 3)
    assert shorten_tokenizer(tokenizer(), TOKENS, MERGES) is None


@pytest.mark.parametrize(
    ("model", "tokens", "merges", "message"),
    [
        ({"vocab": 2}, ["a", "a"], [], "two of the first 2 tokens are the same"),
        ({"vocab": 1, "merges": 1}, ["a"], ["a b c"], "a merge is not two tokens"),
        ({"vocab": 1, "merges": 1}, ["a"], ["ab"], "a merge is not two tokens"),
        ({"vocab": "x" * 1000}, ["a"], [], r'model.vocab is "x{39}, it must be'),
        ({"vocab": 1}, ["a" * (MAX_CHARACTERS + 1)], [], "stands for 4194305 characters"),
        ({"vocab": 0, "merges": 1}, [], [" " * (MAX_CHARACTERS + 1)], "stands for 4194305 characters"),
    ],
)
def test_lists_that_cannot_be_put_back_are_refused(model, tokens, merges, message):
    with pytest.raises(ValueError, match=message):
        restore_tokenizer(json.dumps({"model": model}), tokens, merges)
