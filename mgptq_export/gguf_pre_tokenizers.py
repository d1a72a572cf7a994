"""How texts become words before BPE: what a GGUF file names, and the same in the form of ``tokenizer.json``.

For byte-level BPE, GGUF's ``tokenizer.ggml.pre`` is a name, and ``tokenizer.json`` spells the way out. For
SentencePiece's BPE, GGUF only says whether a text gets a space before it.
"""

from dataclasses import dataclass
from typing import Any

__all__ = [
    "PRE_TOKENIZERS",
    "SPACE",
    "PreTokenizer",
    "find_pre_tokenizer",
    "find_space_prefix",
    "known_names",
    "pre_tokenizer_named",
    "sentence_piece_normalizers",
    "steps_of",
]

Step = dict[str, Any]


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split words.

    Attributes:
        names: values of ``tokenizer.ggml.pre`` that mean this way; files are written with the first.
        steps: the sequence of pre-tokenizers as ``tokenizer.json`` holds it.
        ignore_merges: a word that is a token is taken whole, as ``model.ignore_merges`` says.
        adds_bos: llama.cpp begins texts with a BOS token where the file says nothing about it.
    """

    names: tuple[str, ...]
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


def _split(regex: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS: Step = {"type": "Digits", "individual_digits": True}
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CL100K = (_split(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"), _byte_level(use_regex=False))
_O200K = "|".join(
    (*(f"{word}{_CONTRACTION}?" for word in _CASED_WORDS), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES)
)
_TEKKEN = "|".join((*_CASED_WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))
_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_HAN_AND_KANA = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

PRE_TOKENIZERS = (
    PreTokenizer(
        ("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "gigachat", "mellum", "modern-bert", "a.x-4.0", "trillion"),
        (_byte_level(use_regex=True),),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (_DIGITS, _byte_level(use_regex=True)),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0"),
        _CL100K,
        ignore_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _CL100K),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "solar-open", "grok-2"),
        (_split(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"), _byte_level(use_regex=False)),
    ),
    PreTokenizer(
        ("qwen35",),
        (
            _split(rf"{_CONTRACTION}|{_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"),
            _byte_level(use_regex=False),
        ),
    ),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "minimax-m2"), (_split(_O200K), _byte_level(use_regex=False))),
    PreTokenizer(("tekken",), (_split(_TEKKEN), _byte_level(use_regex=False)), ignore_merges=True, adds_bos=True),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        (_split(r"\p{N}{1,3}"), _split(_HAN_AND_KANA), _split(_DEEPSEEK), _byte_level(use_regex=False)),
    ),
)

SPACE = "▁"
_REPLACE: Step = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND: Step = {"type": "Prepend", "prepend": SPACE}
_SPLIT_SPACES: Step = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

# SentencePiece's BPE: normalizers, pre-tokenizers, and whether a text gets a space before it.
_SENTENCE_PIECE: tuple[tuple[list[Step], list[Step], bool], ...] = (
    ([_PREPEND, _REPLACE], [], True),
    ([_REPLACE], [], False),
    ([_REPLACE], [_SPLIT_SPACES], False),
    *(
        ([], [{"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}], scheme != "never")
        for scheme in ("always", "first", "never")
        for split in (False, True)
    ),
)


def steps_of(part: Step | None) -> list[Step]:
    """The steps of a normalizer or pre-tokenizer of ``tokenizer.json``, spelled as in the tables."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
        return [step for one in inner for step in steps_of(one)]
    if part["type"] == "ByteLevel":
        return [part | {"trim_offsets": True}]  # moves offsets, not tokens
    return [_split_step(part) if part["type"] == "Split" else part]


def _split_step(step: Step) -> Step:
    if "Regex" in step["pattern"]:
        step = step | {"pattern": {"Regex": step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")}}
    if (step["behavior"], step["invert"]) == ("Removed", True):
        # What the expression does not match would be lost, but those of the table match every character.
        return step | {"behavior": "Isolated", "invert": False}
    return step


def find_pre_tokenizer(pre_tokenizer: Step | None, *, ignore_merges: bool) -> PreTokenizer | None:
    """The entry that splits as ``tokenizer.json`` says, or None.

    Args:
        pre_tokenizer: the ``pre_tokenizer`` of a ``tokenizer.json`` that the tokenizers library wrote.
        ignore_merges: its ``model.ignore_merges``.
    """
    steps = steps_of(pre_tokenizer)
    return next((e for e in PRE_TOKENIZERS if list(e.steps) == steps and e.ignore_merges == ignore_merges), None)


def find_space_prefix(normalizer: Step | None, pre_tokenizer: Step | None) -> bool | None:
    """Whether a SentencePiece BPE puts a space before a text; None where it is no SentencePiece BPE."""
    found = (steps_of(normalizer), steps_of(pre_tokenizer))
    return next((prefix for *steps, prefix in _SENTENCE_PIECE if tuple(steps) == found), None)


def sentence_piece_normalizers(*, space_prefix: bool) -> list[Step]:
    """What a SentencePiece BPE does to a text before its merges."""
    return [_PREPEND, _REPLACE] if space_prefix else [_REPLACE]


def pre_tokenizer_named(name: str | None) -> PreTokenizer | None:
    """The entry that a ``tokenizer.ggml.pre`` names, or None."""
    return next((entry for entry in PRE_TOKENIZERS if name in entry.names), None)


def known_names() -> str:
    """All names, for messages."""
    return ", ".join(name for entry in PRE_TOKENIZERS for name in entry.names)
