"""Calibration sequences: sampled from the model itself, or cut from text."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from mgptq_export.compute import compute_dtype, pieces
from mgptq_export.families.base import head_size
from mgptq_export.models import SourceModel
from mgptq_export.recipe import Recipe
from mgptq_export.texts import text_sha256
from mgptq_runtime.errors import BadInputError, CalibrationError, NumericalError
from mgptq_runtime.perplexity import read_text
from mgptq_runtime.progress import Advance, track
from mgptq_runtime.tokenizer import encode_text

__all__ = [
    "cache_for",
    "calibration_sha256",
    "calibration_tokens",
    "drawn",
    "file_tokens",
    "recovery_tokens",
    "skip_drawing",
]

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl")
TEXT_FILES = "give a .txt file in UTF-8, or a .jsonl file with an object on every line, its field 'text' a string"
CACHE_BYTES = 1 << 30


def file_tokens(path: Path, source: SourceModel) -> list[int]:
    """Tokens of a text file as the runtime reads it: documents joined by a blank line, tokenized once, none special.

    Raises:
        BadInputError: a file that cannot be read, or holds no text; a model without a tokenizer, or with another's.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file, and has to be read more than once"
        raise BadInputError(f"{path} is {kind}; {TEXT_FILES}")
    text = read_text(path)
    if "\0" in text:
        raise BadInputError(f"{path} holds zero bytes, so it is no text; {TEXT_FILES}")
    if not text.strip():
        raise BadInputError(f"{path} holds no text; {TEXT_FILES}")
    return _tokens(text, source)


def _tokens(text: str, source: SourceModel) -> list[int]:
    if source.tokenizer is None:
        raise BadInputError(f"{source.source} has no tokenizer, so it cannot read text")
    ids = encode_text(source.tokenizer, text)
    vocabulary = source.model.config.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise BadInputError(
            f"the tokenizer of {source.source} gives token {max(ids)}, "
            f"the model's vocabulary is 0 to {vocabulary - 1}; take the tokenizer of this model"
        )
    return ids


def calibration_tokens(source: SourceModel, recipe: Recipe) -> torch.Tensor:
    """The calibration set that the recipe asks for, in random order: int64 [sequences, sequence_length].

    Of a text as many sequences as it has, up to ``samples``, and ``own_samples`` that the model writes.

    Raises:
        CalibrationError: the text is shorter than a sequence.
        BadInputError: it cannot be read, or the model has no tokenizer.
    """
    limit = source.model.config.max_position_embeddings
    if recipe.sequence_length > limit:
        raise BadInputError(f"sequence length {recipe.sequence_length} is beyond the model's context of {limit} tokens")
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.calibration == "self":
        return sample_from_model(source, recipe.samples, recipe.sequence_length, generator)
    if source.tokenizer is None:
        raise BadInputError(f"{source.source} has no tokenizer to calibrate with text; use --calibration self")
    tokens = _text_tokens(source, recipe)
    sequences = _whole_sequences(tokens, recipe.sequence_length)
    if not len(sequences):
        raise CalibrationError(
            f"{recipe.calibration} gives {tokens.numel()} tokens, one sequence needs {recipe.sequence_length}. "
            "Give more text, a lower --sequence-length, or --calibration self"
        )
    if len(sequences) < recipe.samples:
        logger.warning(
            "%s gives only %d calibration sequences, %d were asked for; more text would help",
            recipe.calibration,
            len(sequences),
            recipe.samples,
        )
    chosen = sequences[torch.randperm(len(sequences), generator=generator)[: recipe.samples]]
    if not recipe.own_samples:
        return chosen
    own = sample_from_model(source, recipe.own_samples, recipe.sequence_length, generator)
    together = torch.cat([chosen, own])
    return together[torch.randperm(len(together), generator=generator)]


def calibration_sha256(recipe: Recipe) -> str | None:
    """SHA-256 of the text file that the recipe names; None where it names no file.

    Raises:
        BadInputError: it cannot be read.
    """
    path = Path(recipe.calibration)
    return text_sha256(path) if path.is_file() else None


def recovery_tokens(source: SourceModel, recipe: Recipe, calibration: torch.Tensor) -> torch.Tensor:
    """The calibration set and all the rest of the text: int64 [sequences, sequence_length], none twice."""
    if recipe.calibration == "self":
        return calibration
    text = _whole_sequences(_text_tokens(source, recipe), recipe.sequence_length)
    return torch.cat([calibration, text]).unique(dim=0)


def _text_tokens(source: SourceModel, recipe: Recipe) -> torch.Tensor:
    """All tokens of the text that the recipe names: int64 [tokens]."""
    path = Path(recipe.calibration)
    if path.exists() or path.suffix in TEXT_SUFFIXES:
        return torch.tensor(file_tokens(path, source), dtype=torch.int64)
    return torch.tensor(_tokens("\n\n".join(_hub_documents(recipe.calibration)), source), dtype=torch.int64)


def _whole_sequences(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [tokens] to int64 [sequences, length]; what is left over is dropped."""
    return tokens[: tokens.numel() // length * length].view(-1, length)


@cache
def _hub_documents(name: str, documents: int = 1000) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInputError(
            f"calibration {name!r} is no file; to take it as a hub data set: pip install 'mgptq-export[hub]'"
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(documents), strict=False)]
    except Exception as error:  # the library raises many kinds, all of which mean the same to a user
        raise BadInputError(f"calibration {name!r} is neither a file nor a readable data set: {error}") from error
    if not all(isinstance(text, str) for text in texts):
        raise BadInputError(f"calibration {name!r}: the data set's column 'text' does not hold strings; {TEXT_FILES}")
    return texts


@torch.no_grad()
def sample_from_model(source: SourceModel, samples: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences that the model itself writes, each from a random first token: int64 [samples, length].

    Tokens are sampled at temperature 1. The end-of-sequence token is never sampled, so every sequence is full.
    """
    model = _for_sampling(source)
    starts = torch.randint(model.config.vocab_size, (samples, 1), generator=generator)
    parts = starts.split(_sequences_at_once(model, length))
    with track("Sampling calibration text", len(parts) * (length - 1)) as advance:
        return torch.cat([_continued(model, part, length, generator, advance) for part in parts])


def _continued(
    model: Any, tokens: torch.Tensor, length: int, generator: torch.Generator, advance: Advance
) -> torch.Tensor:
    """Sequences that start with ``tokens``: int64 [sequences, 1] to [sequences, length]."""
    ended = model.config.eos_token_id
    ended = [] if ended is None else [ended] if isinstance(ended, int) else list(ended)
    # Some configurations keep a larger model's.
    ended = [token for token in ended if 0 <= token < model.config.vocab_size]
    cache = cache_for(model, length)
    for _ in range(length - 1):
        output = model(tokens[:, -1:].to(model.device), cache=cache, use_cache=True)
        logits = output.logits[:, -1].float().cpu()
        if not torch.isfinite(logits).all():
            raise NumericalError("the model's logits are NaN or infinite on text of its own; check the model")
        logits[:, ended] = float("-inf")
        tokens = torch.cat([tokens, drawn(torch.softmax(logits, -1), generator)], 1)
        advance()
    return tokens


def _sequences_at_once(model: Any, length: int) -> int:
    """As many as have their keys and values in :data:`CACHE_BYTES`."""
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * length
    return max(1, CACHE_BYTES // (values * model.dtype.itemsize))


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for all that is to come: what is there need not be copied for a token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of some tokens, [batch, heads, tokens, size]; all so far, parts of the room."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not start:
            self.lazy_initialization(key_states, value_states)
            both = (key_states, value_states)
            self._room = [one.new_empty(*one.shape[:2], self._length, one.shape[3]) for one in both]
        for room, one in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = one
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values


def cache_for(model: Any, length: int) -> DynamicCache:
    """The model's own kind of cache; layers that see all of a sequence have room for ``length`` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _for_sampling(source: SourceModel) -> Any:
    """The model, or a copy in the type that it is computed in: every token reads all weights."""
    dtype = compute_dtype(source.model.device)
    if dtype == torch.float32:
        return source.model
    return source.memory.copy_of(source.model, dtype)


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One place of every row by its probability: int64 [rows, 1]. ``torch.multinomial`` takes three times as long.

    Args:
        probabilities: float32 [rows, places], on the CPU.
    """
    rows, places = probabilities.shape
    heights = _heights(rows, generator)
    chosen = torch.empty(rows, 1, dtype=torch.int64)
    for piece in pieces(probabilities):
        sums = probabilities[piece].cumsum(-1, dtype=torch.float64)
        chosen[piece] = torch.searchsorted(sums, heights[piece] * sums[:, -1:], right=True)
    return chosen.clamp_max_(places - 1)


def skip_drawing(rows: int, generator: torch.Generator) -> None:
    """Leave a generator as :func:`drawn` leaves it, without drawing."""
    _heights(rows, generator)


def _heights(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Where in the cumulative probability each row's place is: float64 [rows, 1], 0 to 1."""
    return torch.rand(rows, 1, generator=generator, dtype=torch.float64)
