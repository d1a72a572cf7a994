"""Tokens, streaming and conversations."""

import pytest
from golden_package import TEXT, make_tokenizer_folder
from tokenizers import Tokenizer, decoders, models, normalizers

from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.tokenizer import TextTokenizer, TokenizerData

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> str:
    return (make_tokenizer_folder(tmp_path_factory.mktemp("t") / "tokenizer") / "tokenizer.json").read_text()


def tokenizer(tokenizer_json: str, **changes) -> TextTokenizer:
    values = {
        "tokenizer_json": tokenizer_json,
        "tokenizer_config": {"eos_token": {"content": "<|end|>"}},
        "generation_config": {},
        "chat_template": None,
    }
    return TextTokenizer(TokenizerData(**(values | changes)), 512)


def test_text_survives_encoding(tokenizer_json):
    text = tokenizer(tokenizer_json)
    assert text.decode(text.encode(TEXT)) == TEXT


def test_a_batchs_truncation_and_padding_do_not_stay(tokenizer_json):
    """Saved by whoever fine-tuned the model. Trusted: the tokenizer without them."""
    saved = Tokenizer.from_str(tokenizer_json)
    saved.enable_truncation(4)
    saved.enable_padding(length=8, pad_id=3)
    for text in (TEXT, "a"):
        assert tokenizer(saved.to_str()).encode(text) == tokenizer(tokenizer_json).encode(text)


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer_json):
    text = tokenizer(tokenizer_json)
    unseen = "🐢 ünïcödé Ω 漢字\n  two  spaces"
    pieces = list(text.decode_stream(text.encode(unseen)))
    assert "".join(pieces) == unseen
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) > 5


def test_a_stream_that_ends_inside_a_character_ends(tokenizer_json):
    text = tokenizer(tokenizer_json)
    assert "".join(text.decode_stream(text.encode("🐢")[:2])).strip("�") == ""


def test_a_continuation_keeps_the_space_before_its_first_word():
    """As Llama 2 writes text: spaces are a character, and the first one of a whole text is nobody's."""
    vocabulary = {"▁Once": 0, "▁upon": 1, "▁a": 2, "▁time": 3, "ly": 4, "▁": 5}
    llama = Tokenizer(models.BPE(vocabulary, []))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = tokenizer(llama.to_str())
    assert text.decode([0, 1]) == "Once upon"
    assert text.decode_after([0, 1], [2, 3]) == " a time"
    assert text.decode_after([0, 1], [4, 3]) == "ly time"
    assert text.decode_after([], [2, 3]) == text.decode([2, 3]) == "a time"
    assert list(text.decode_stream([2, 3, 4], [0, 1] * 9)) == [" a", " time", "ly"]


@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_the_start_of_a_text_has_the_tokens_of_the_whole(tokenizer_json, monkeypatch, count):
    text, whole = tokenizer(tokenizer_json), TEXT * 40
    expected = text.encode(whole)[:count]
    read, encode = [], text.encode
    monkeypatch.setattr(text, "encode", lambda part: read.append(len(part)) or encode(part))
    assert text.encode_start(whole, count) == expected
    assert (read[-1] < len(whole)) == (count < 10_000)


@pytest.mark.parametrize(("listed", "expected"), [(None, {1}), (5, {1, 5}), ([5, 6], {1, 5, 6})])
def test_eos_tokens_come_from_both_configurations(tokenizer_json, listed, expected):
    assert tokenizer(tokenizer_json, generation_config={"eos_token_id": listed}).eos_token_ids == expected


@pytest.mark.parametrize("broken", ["{}", "null", "not json", '{"model": {"type": "BPE", "vocab": {"a": -1}}}'])
def test_a_broken_tokenizer_is_a_typed_error(broken):
    with pytest.raises(PackageError, match="tokenizer cannot be used"):
        tokenizer(broken)


def test_a_tokenizer_of_another_model_is_refused(tokenizer_json):
    data = TokenizerData(tokenizer_json, {}, {}, None)
    with pytest.raises(PackageError, match="the model's vocabulary ends at 99"):
        TextTokenizer(data, 100)


def test_chat_without_a_template_says_the_way_out(tokenizer_json):
    with pytest.raises(BadInputError, match="without --chat"):
        tokenizer(tokenizer_json).encode_chat(MESSAGES)


def test_chat_applies_the_template_and_its_special_tokens(tokenizer_json):
    text = tokenizer(
        tokenizer_json, chat_template="{% for m in messages %}<|start|>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    ids = text.encode_chat(MESSAGES)
    assert (ids[0], ids[-1]) == (0, 1)
    assert text.decode(ids) == "Hi"
