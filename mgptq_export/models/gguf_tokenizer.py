"""Hugging Face's tokenizer files out of the metadata of a GGUF file."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from mgptq_export.gguf_pre_tokenizers import (
    SPACE,
    PreTokenizer,
    known_names,
    pre_tokenizer_named,
    sentence_piece_normalizers,
)
from mgptq_export.models.gguf_file import GgufModel
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.tokenizer import parse_tokenizer

__all__ = ["write_gguf_tokenizer"]

SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's, where the file gives none
MAX_TOKEN_CHARACTERS = 1024  # every split of a token is tried for merges
PADDING = re.compile(r"\[PAD\d+\]")
# Special tokens that swallow the white space after them in Phi-3; llama.cpp knows the family by its name only.
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def write_gguf_tokenizer(file: GgufModel, folder: Path) -> None:
    """Write the tokenizer and chat template that the file carries as Hugging Face's files into ``folder``.

    Raises:
        BadInputError: the file carries no tokenizer, or a broken one.
        UnsupportedModelError: a kind of tokenizer, or a way to split words, that is not known here.
    """
    path, meta = file.path, file.metadata
    if not isinstance(meta.get("tokenizer.ggml.tokens"), list):
        raise BadInputError(f"{path} carries no tokenizer; use the model's Hugging Face folder instead")
    kind = meta.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"the tokenizer of {path} is of kind {kind!r}; supported: gpt2, llama. "
            "Use the model's Hugging Face folder instead"
        )
    pre = _pre_tokenizer(path, meta) if kind == "gpt2" else None
    try:
        model = _byte_level(meta, pre) if pre is not None else _sentence_piece(meta)
        tokenizer = parse_tokenizer(json.dumps(model))
        ids = _special_ids(meta, kind)
        _add_tokens(tokenizer, meta)
        flags = _flags(meta, pre, ids)
        _add_post_processor(tokenizer, meta, flags, ids)
        settings = _settings(meta, ids, flags)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInputError(f"the tokenizer of {path} is broken: {error}; download the file again") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in settings.items():
        (folder / name).write_bytes(content)


def _pre_tokenizer(path: Path, meta: Mapping[str, Any]) -> PreTokenizer:
    name = meta.get("tokenizer.ggml.pre")
    found = pre_tokenizer_named(name)
    if found is None:
        raise UnsupportedModelError(
            f"{path} splits words in a way that is not known here: tokenizer.ggml.pre is {name!r}; "
            f"known: {known_names()}. Use the model's Hugging Face folder instead"
        )
    return found


def _pieces(meta: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Text and type of every token."""
    tokens = meta["tokenizer.ggml.tokens"]
    longest = max(tokens, key=len, default="")
    if len(longest) > MAX_TOKEN_CHARACTERS:
        raise ValueError(f"a token has {len(longest)} characters, at most {MAX_TOKEN_CHARACTERS} are allowed")
    return list(zip(tokens, meta.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens)), strict=True))


def _vocabulary(meta: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text, without the rows that stand for no token."""
    return {
        text: token
        for token, (text, token_type) in enumerate(_pieces(meta))
        if token_type != TokenType.UNUSED or not PADDING.fullmatch(text)
    }


def _sequence(kind: str, steps: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def _tokenizer_json(**parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": []} | empty | parts


def _byte_level(meta: Mapping[str, Any], pre: PreTokenizer) -> dict[str, Any]:
    merges = [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "vocab": _vocabulary(meta), "merges": merges, "ignore_merges": pre.ignore_merges}
    return _tokenizer_json(
        pre_tokenizer=_sequence("pretokenizers", pre.steps),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=model,
    )


def _sentence_piece(meta: Mapping[str, Any]) -> dict[str, Any]:
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    tokens = meta["tokenizer.ggml.tokens"]
    unknown = meta.get("tokenizer.ggml.unknown_token_id", SENTENCE_PIECE_IDS["unknown"])
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE",
        "unk_token": tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": _vocabulary(meta),
        "merges": _merges(_pieces(meta), meta["tokenizer.ggml.scores"]),
    }
    return _tokenizer_json(
        normalizer=_sequence("normalizers", sentence_piece_normalizers(space_prefix=prefix)),
        decoder=_sequence("decoders", steps),
        model=model,
    )


def _merges(pieces: Sequence[tuple[str, int]], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a third, the highest score first: what llama.cpp does with scores."""
    normal = {
        text: score
        for (text, token_type), score in zip(pieces, scores, strict=True)
        if token_type in (TokenType.NORMAL, TokenType.UNUSED)
    }
    ranked = sorted(normal, key=lambda text: -normal[text])  # stable, so that ties keep the order of ids
    return [
        (text[:i], text[i:])
        for text in ranked
        for i in range(1, len(text))
        if text[:i] in normal and text[i:] in normal
    ]


def _add_tokens(tokenizer: Tokenizer, meta: Mapping[str, Any]) -> None:
    """Tell the tokens that are found in a text before it is split."""
    name = meta.get("general.name", "").lower()
    swallows = "phi-3" in name or "phi3" in name
    pieces = _pieces(meta)
    special = [text for text, token_type in pieces if token_type in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True, rstrip=swallows and text not in _KEEP_SPACE)
            for text in special
        ]
    )
    defined = [text for text, token_type in pieces if token_type == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])


def _special_ids(meta: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Ids by GGUF's names."""
    ids = dict(SENTENCE_PIECE_IDS) if kind == "llama" else {}
    for name in (*SPECIAL_TOKENS.values(), "eot"):
        if (token := meta.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            ids[name] = int(token)
    size = len(meta["tokenizer.ggml.tokens"])
    return {name: token for name, token in ids.items() if 0 <= token < size}


def _flags(meta: Mapping[str, Any], pre: PreTokenizer | None, ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether texts begin with ``bos`` and end with ``eos``, with llama.cpp's defaults."""
    defaults = {"bos": pre is None or pre.adds_bos, "eos": False}
    return {
        name: name in ids and bool(meta.get(f"tokenizer.ggml.add_{name}_token", default))
        for name, default in defaults.items()
    }


def _add_post_processor(
    tokenizer: Tokenizer, meta: Mapping[str, Any], flags: Mapping[str, bool], ids: Mapping[str, int]
) -> None:
    added = {name: meta["tokenizer.ggml.tokens"][ids[name]] for name, wanted in flags.items() if wanted}
    if added:
        single = [*([added["bos"]] if "bos" in added else []), "$A", *([added["eos"]] if "eos" in added else [])]
        special = [(text, ids[name]) for name, text in added.items()]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _settings(meta: Mapping[str, Any], ids: Mapping[str, int], flags: Mapping[str, bool]) -> dict[str, bytes]:
    """Files beside ``tokenizer.json``: contents by name."""
    tokens = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, gguf_name in SPECIAL_TOKENS.items():
        if gguf_name in ids:
            config[f"{name}_token"] = tokens[ids[gguf_name]]
    config |= {f"add_{name}_token": wanted for name, wanted in flags.items()}
    ends = [ids[name] for name in ("eos", "eot") if name in ids] + list(meta.get("tokenizer.ggml.eos_token_ids", []))
    ends = list(dict.fromkeys(ends))
    generation: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if "bos" in ids:
        generation["bos_token_id"] = ids["bos"]
    files = {"tokenizer_config.json": _json(config), "generation_config.json": _json(generation)}
    template = meta.get("tokenizer.chat_template")
    return files if template is None else files | {"chat_template.jinja": template.encode()}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
