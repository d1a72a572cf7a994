"""Text to token ids and back, and chat templates."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mgptq_runtime.chat_template import render_chat_template
from mgptq_runtime.errors import BadInputError, PackageError

__all__ = ["TextTokenizer", "TokenizerData", "encode_text", "parse_tokenizer"]

REPLACEMENT = "�"
WAY_OUT = "export the package again"
# How many times as long as its input a step's output may be; a Replace or Prepend has its content's length.
GROWTH_OF_STEPS = {"ByteLevel": 2, "Precompiled": 16}
MAX_GROWTH = 256
# Of the tokens before a text, as many as say how its first word is written.
CONTEXT_TOKENS = 8
# What a start of a text is cut to at first, and how many of its last tokens may be others than the whole text's.
CHARACTERS_PER_TOKEN, CUT_TOKENS = 8, 256


@dataclass(frozen=True)
class TokenizerData:
    """What a package carries about text, as Hugging Face writes it.

    Attributes:
        tokenizer_json: the text of ``tokenizer.json``.
        tokenizer_config: ``tokenizer_config.json``.
        generation_config: ``generation_config.json``; empty where there is none.
        chat_template: a Jinja template, or None for a model that does not chat.
    """

    tokenizer_json: str
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: str | None


def _special_token_text(config: Mapping[str, Any], key: str) -> str | None:
    """A special token of ``tokenizer_config.json``: a string, or an object with its content."""
    value = config.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def parse_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer of the text of ``tokenizer.json``, for texts of any length.

    Truncation and padding that the file asks for are left out, as transformers leaves them out: whoever fine-tuned the
    model may have saved the settings of a batch.

    Raises:
        ValueError: the library cannot use it, or its steps together make a text of any length out of a short one.
    """
    with _library_errors(ValueError, "{}"):
        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        growths = {"normalizer": _growth(tokenizer.normalizer), "decoder": _growth(tokenizer.decoder)}
    for name, growth in growths.items():
        if growth > MAX_GROWTH:
            raise ValueError(
                f"its {name} can make a text {min(growth, 10**9)} times as long or more, {MAX_GROWTH} times is allowed"
            )
    return tokenizer


@contextlib.contextmanager
def _library_errors(kind: type[Exception], message: str) -> Iterator[None]:
    """Whatever the library raises becomes an error of this kind; ``{}`` in the message stands for its text."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library's Rust code derives from BaseException
        raise kind(message.format(error)) from error


def _growth(part: Any) -> int:
    """At most how many times as long as its input a normalizer's or a decoder's output is; 1 where there is none."""
    return 1 if part is None else _growth_of_step(json.loads(part.__getstate__()))


def _growth_of_step(step: Mapping[str, Any]) -> int:
    growth = 1
    for inner in step.get("normalizers") or step.get("decoders") or ():
        growth *= _growth_of_step(inner)
    content = step.get("content") or step.get("prepend") or ""
    return growth * max(1, len(content.encode())) * GROWTH_OF_STEPS.get(step["type"], 1)


def encode_text(tokenizer: Tokenizer, text: str, *, special_tokens: bool = False) -> list[int]:
    """Token ids of a text.

    Args:
        special_tokens: add what the tokenizer puts around a text, such as a beginning-of-text token.

    Raises:
        BadInputError: the text is not Unicode, or the tokenizer has no tokens for it.
    """
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInputError("the text holds bytes that are not UTF-8; give UTF-8 text")
    with _library_errors(BadInputError, "the tokenizer cannot read the text: {}; take the model's own tokenizer"):
        return tokenizer.encode(text, add_special_tokens=special_tokens).ids


class TextTokenizer:
    """A package's tokenizer.

    Attributes:
        eos_token_ids: tokens that end a text.

    Raises:
        PackageError: the tokenizer is broken or does not fit the model's vocabulary.
    """

    def __init__(self, data: TokenizerData, vocabulary_size: int) -> None:
        try:
            self._tokenizer = parse_tokenizer(data.tokenizer_json)
        except ValueError as error:
            raise PackageError(f"the tokenizer cannot be used: {error}; {WAY_OUT}") from error
        self._data = data
        highest = max(self._tokenizer.get_vocab().values(), default=-1)
        if highest >= vocabulary_size:
            raise PackageError(
                f"the tokenizer has token id {highest}, the model's vocabulary ends at {vocabulary_size - 1}; "
                "they do not belong together"
            )
        self.eos_token_ids = self._find_eos()

    def _find_eos(self) -> frozenset[int]:
        listed = self._data.generation_config.get("eos_token_id")
        ids = {token for token in (listed if isinstance(listed, list) else [listed]) if isinstance(token, int)}
        eos = _special_token_text(self._data.tokenizer_config, "eos_token")
        if eos is not None:
            token = self._tokenizer.token_to_id(eos)
            ids |= set() if token is None else {token}
        return frozenset(ids)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            special_tokens: add what the tokenizer puts around a text, such as a beginning-of-text token.

        Raises:
            BadInputError: the text is not Unicode, or the tokenizer has no tokens for it.
        """
        return encode_text(self._tokenizer, text, special_tokens=special_tokens)

    def encode_start(self, text: str, count: int) -> list[int]:
        """The first ``count`` token ids of a text, all where it has fewer; of a long text little more is encoded.

        Raises:
            BadInputError: see :meth:`encode`.
        """
        length = CHARACTERS_PER_TOKEN * (count + CUT_TOKENS)
        while length < len(text):
            ids = self.encode(text[:length])
            if len(ids) >= count + CUT_TOKENS:
                return ids[:count]
            length *= 2
        return self.encode(text)[:count]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out.

        Raises:
            PackageError: a tokenizer that fails on them.
        """
        with _library_errors(PackageError, f"the tokenizer cannot be used: {{}}; {WAY_OUT}"):
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_after(self, before: Sequence[int], token_ids: Sequence[int]) -> str:
        """Text of token ids that continue others: its first word keeps the space before it.

        Raises:
            PackageError: see :meth:`decode`.
        """
        return "".join(self.decode_stream(token_ids, before))

    def decode_stream(self, token_ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Text piece by piece as tokens arrive; a character is held back until all its bytes are there.

        Args:
            before: the tokens that they continue, if any.
        """
        # Decoded together with the tokens before it, a token keeps its leading space.
        context = list(before[-CONTEXT_TOKENS:])
        pending: list[int] = []
        for token in token_ids:
            pending.append(token)
            known = self.decode(context)
            text = self.decode(context + pending)
            if len(text) > len(known) and not text.endswith(REPLACEMENT):
                yield text[len(known) :]
                context, pending = pending, []
        if pending:
            yield self.decode(context + pending)[len(self.decode(context)) :]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Args:
            messages: each with ``role`` and ``content``.

        Raises:
            BadInputError: the model has no chat template.
            PackageError: the template is broken or exceeds its limits of time and memory.
        """
        if self._data.chat_template is None:
            raise BadInputError("this model has no chat template; generate without --chat")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _special_token_text(self._data.tokenizer_config, name) or "" for name in names}
        return self.encode(render_chat_template(self._data.chat_template, messages, tokens))
