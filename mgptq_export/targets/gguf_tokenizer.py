"""Hugging Face's tokenizer files as the GGUF metadata that llama.cpp and its relatives read.

Two kinds are written: byte-level BPE (``gpt2``) and SentencePiece's BPE (``llama``). Where llama.cpp cannot do what
``tokenizer.json`` says:

- It normalizes no text: with NFC, as in Qwen's tokenizer, a text in another form gets other tokens.
- Its ``llama`` kind puts a space before every text that follows a special token, even one that begins with a space.
- Of the added tokens that swallow the white space beside them, it only knows Phi-3's, by ``general.name``.
- Its ``gpt-4o`` and ``tekken`` split words that begin with an accented capital in other places.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from mgptq_export.gguf_pre_tokenizers import SPACE, find_pre_tokenizer, find_space_prefix, steps_of
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.strict_json import parse_json_object
from mgptq_runtime.tokenizer import parse_tokenizer

__all__ = ["add_chat_template", "add_tokenizer", "check_tokenizer"]

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|eot|>", "<EOT>", "[EOT]")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
WAY_OUT = "choose the onnx target, which carries tokenizer.json itself"


@dataclass(frozen=True)
class _Files:
    """What a folder says about text; ``data`` is ``tokenizer.json`` with every default spelled out."""

    tokenizer: Tokenizer
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    def listed_ids(self, name: str) -> list[int]:
        """``<name>_token_id`` of the generation settings, one or several; -1 means none."""
        value = self.generation.get(f"{name}_token_id")
        listed = value if isinstance(value, list) else [value]
        return [token for token in listed if isinstance(token, int) and token >= 0]


@dataclass(frozen=True)
class _Vocabulary:
    """The keys ``tokenizer.ggml.*`` of the same names; tokens are texts and types by id."""

    model: str
    pre: str
    tokens: list[tuple[str, TokenType]]
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool = False


def add_tokenizer(
    writer: GGUFWriter,
    folder: Path,
    vocabulary_size: int,
    config: Mapping[str, Any],
    *,
    unknown_pre: str | None = None,
) -> tuple[list[str], list[str]]:
    """Add vocabulary, special tokens and chat template; nothing where an error is raised.

    Args:
        folder: holds ``tokenizer.json``; ``tokenizer_config.json``, ``generation_config.json`` and
            ``chat_template.jinja`` where there are any.
        vocabulary_size: rows of the embedding; rows without a token become ``[PAD<id>]``.
        config: the model's ``config.json``, for token ids that ``generation_config.json`` does not give.
        unknown_pre: ``tokenizer.ggml.pre`` where the way to split words has no name; an error without.

    Returns:
        the tokens and merges that were added; of SentencePiece's BPE, for which llama.cpp reads scores, no merges.

    Raises:
        BadInputError: a file is absent or broken, or a token has no row in the embedding.
        UnsupportedModelError: a kind of tokenizer that GGUF has no name for.
    """
    files = _read_files(folder, config)
    _check_ids(files.tokenizer, vocabulary_size)
    vocabulary = _vocabulary(files, vocabulary_size, unknown_pre)
    ids = _special_token_ids(files, vocabulary_size)
    flags = _added_tokens(files, ids)
    _write_vocabulary(writer, vocabulary)
    for name, token in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    listed = [token for token in files.listed_ids("eos") if token < vocabulary_size]
    ends = list(dict.fromkeys([ids["eos"], *listed])) if "eos" in ids else []
    if len(ends) > 1:
        writer.add_array("tokenizer.ggml.eos_token_ids", ends)  # Ollama's
    for name, added in flags.items():
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", added)
    add_chat_template(writer, folder)
    return [text for text, _ in vocabulary.tokens], vocabulary.merges or []


def check_tokenizer(folder: Path, vocabulary_size: int, config: Mapping[str, Any]) -> None:
    """Raise what :func:`add_tokenizer` would raise; writes nothing."""
    add_tokenizer(GGUFWriter(None, ""), folder, vocabulary_size, config)


def add_chat_template(writer: GGUFWriter, folder: Path) -> None:
    """Add the chat template of a folder, if it has one; of several, the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            writer.add_chat_template(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInputError(f"{file.name} cannot be read: {error}; mend or remove it") from error
        return
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = template.get("default")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _write_vocabulary(writer: GGUFWriter, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([text for text, _ in vocabulary.tokens])
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([token_type for _, token_type in vocabulary.tokens])
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; mend or remove it") from error


def _read_files(folder: Path, config: Mapping[str, Any]) -> _Files:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInputError("the model has no tokenizer.json; save the model with its fast tokenizer")
    try:
        tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from error
    generation = _read_json(folder / "generation_config.json")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(key) is None:
            generation[key] = config.get(key)
    return _Files(tokenizer, json.loads(tokenizer.to_str()), _read_json(folder / "tokenizer_config.json"), generation)


def _check_ids(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    text, token = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if token >= vocabulary_size:
        raise BadInputError(
            f"tokenizer.json: token {text!r} has id {token}, the embedding has {vocabulary_size} rows; "
            "take the tokenizer of this model"
        )


def _vocabulary(files: _Files, vocabulary_size: int, unknown_pre: str | None) -> _Vocabulary:
    model = files.data["model"]
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UnsupportedModelError(f"a GGUF file cannot hold this {model['type']} tokenizer; {WAY_OUT}")
    if any(step["type"] == "ByteLevel" for step in steps_of(files.data["pre_tokenizer"])):
        return _byte_level_vocabulary(files.data, vocabulary_size, unknown_pre)
    return _sentence_piece_vocabulary(files.data, vocabulary_size)


def _rows(entries: Mapping[int, tuple[str, TokenType]], vocabulary_size: int) -> list[tuple[str, TokenType]]:
    return [entries.get(token, (f"[PAD{token}]", TokenType.UNUSED)) for token in range(vocabulary_size)]


def _added_type(added: Mapping[str, Any]) -> TokenType:
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _byte_level_vocabulary(data: Mapping[str, Any], vocabulary_size: int, unknown_pre: str | None) -> _Vocabulary:
    model = data["model"]
    known = find_pre_tokenizer(data["pre_tokenizer"], ignore_merges=model["ignore_merges"])
    supported = known is not None and all(step["type"] == "NFC" for step in steps_of(data["normalizer"]))
    if not supported and unknown_pre is None:
        found = {"normalizer": data["normalizer"], "pre_tokenizer": data["pre_tokenizer"]}
        raise UnsupportedModelError(
            f"llama.cpp has no name for the way in which this tokenizer splits words: {json.dumps(found)} "
            f"with ignore_merges = {model['ignore_merges']}; {WAY_OUT}"
        )
    entries = {token: (text, TokenType.NORMAL) for text, token in model["vocab"].items()}
    entries |= {added["id"]: (added["content"], _added_type(added)) for added in data["added_tokens"]}
    pre = known.names[0] if known is not None and supported else str(unknown_pre)
    return _Vocabulary("gpt2", pre, _rows(entries, vocabulary_size), merges=[" ".join(m) for m in model["merges"]])


def _sentence_piece_vocabulary(data: Mapping[str, Any], vocabulary_size: int) -> _Vocabulary:
    model = data["model"]
    prefix = find_space_prefix(data["normalizer"], data["pre_tokenizer"])
    if prefix is None or not model["byte_fallback"]:
        found = {key: data[key] for key in ("normalizer", "pre_tokenizer")}
        raise UnsupportedModelError(
            f"this tokenizer is neither byte-level BPE nor SentencePiece's BPE: {json.dumps(found)} "
            f"with byte_fallback = {model['byte_fallback']}; {WAY_OUT}"
        )
    _warn_of_missing_merges(model["vocab"], model["merges"])
    # llama.cpp merges the pair whose text has the highest score, where tokenizer.json has ranks of pairs.
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        scores.setdefault(left + right, -float(rank))
    lowest = -float(len(model["merges"]))
    entries = {token: (text, _piece_type(text, model["unk_token"])) for text, token in model["vocab"].items()}
    for added in data["added_tokens"]:
        entries[added["id"]] = _added_piece(added, model["unk_token"], scores)
    rows = _rows(entries, vocabulary_size)
    return _Vocabulary(
        "llama", "default", rows, scores=[scores.get(t, lowest) for t, _ in rows], add_space_prefix=prefix
    )


def _piece_type(text: str, unknown: str | None) -> TokenType:
    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL


def _added_piece(added: Mapping[str, Any], unknown: str | None, merged: Mapping[str, float]) -> tuple[str, TokenType]:
    """Text and type of an added token."""
    text = added["content"]
    if text == unknown:
        return text, TokenType.UNKNOWN
    if added["normalized"]:
        return text.replace(SPACE, " "), _added_type(added)  # it is found in texts after spaces were replaced
    if SPACE in text and text in merged and not added["special"]:
        return text, TokenType.NORMAL  # as such it is found in no text; merges of spaces make it
    return text, _added_type(added)


def _warn_of_missing_merges(vocabulary: Mapping[str, int], merges: list[list[str]]) -> None:
    """llama.cpp merges any two tokens that make a third; SentencePiece's merges, once converted, are all of these."""
    pairs = {(left, right) for left, right in merges}
    missing = sum(
        any(
            text[:i] in vocabulary and text[i:] in vocabulary and (text[:i], text[i:]) not in pairs
            for i in range(1, len(text))
        )
        for text in {left + right for left, right in pairs}
    )
    if missing > len(vocabulary) // 100:
        logger.warning(
            "the tokenizer lacks merges for %d of its %d tokens, which llama.cpp will do nevertheless: "
            "some texts will get other tokens there",
            missing,
            len(vocabulary),
        )


def _special_token_ids(files: _Files, vocabulary_size: int) -> dict[str, int]:
    """Ids by GGUF's names; what ``tokenizer_config.json`` names comes first, then the generation settings."""
    ids: dict[str, int] = {}
    for name, gguf_name in SPECIAL_TOKENS.items():
        token = files.config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if name == "unk" and content is None:
            content = files.data["model"].get("unk_token")
        found = files.tokenizer.token_to_id(content) if isinstance(content, str) else None
        candidates = [found] if found is not None else files.listed_ids(name)
        if name in ("unk", "pad"):  # configurations keep a large model's; no text needs these
            candidates = [token for token in candidates if token < vocabulary_size]
        if candidates:
            ids[gguf_name] = candidates[0]
    ends = [token for token in files.listed_ids("eos") if token != ids.get("eos") and token < vocabulary_size]
    turn = next((token for token in ends if files.tokenizer.id_to_token(token) in END_OF_TURN), None)
    if turn is not None:
        ids["eot"] = turn
    for name, token in ids.items():
        if token >= vocabulary_size:
            raise BadInputError(
                f"the {name} token has id {token}, the embedding has {vocabulary_size} rows; "
                "mend generation_config.json"
            )
    return ids


def _added_tokens(files: _Files, ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether texts begin with ``bos`` and end with ``eos``: what the configuration says, else what the tokenizer does.

    Both are always written: llama.cpp has other defaults.
    """
    encoding = files.tokenizer.encode("a")
    does = {"bos": False, "eos": False}
    if encoding.ids and encoding.special_tokens_mask[0]:
        does["bos"] = encoding.ids[0] == ids.get("bos")
    if len(encoding.ids) > 1 and encoding.special_tokens_mask[-1]:
        does["eos"] = encoding.ids[-1] == ids.get("eos")
    flags = {}
    for name, done in does.items():
        asked = files.config.get(f"add_{name}_token")
        flags[name] = name in ids and (asked if isinstance(asked, bool) else done)
    return flags
