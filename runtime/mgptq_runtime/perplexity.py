"""Perplexity over the second half of each window of a text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import BadInputError, NumericalError
from mgptq_runtime.progress import Advance, no_progress
from mgptq_runtime.strict_json import parse_json_object

__all__ = ["Perplexity", "measure_perplexity", "read_text"]


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    perplexity: exp of the mean negative log-likelihood, natural logarithm.
    tokens: how many tokens were scored.
    windows: how many windows they came from.
    backend: ``numpy`` or ``onnx``.
    """

    perplexity: float
    tokens: int
    windows: int
    backend: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _document(path: Path, number: int, line: str) -> str:
    try:
        text = parse_json_object(line)["text"]
    except (ValueError, KeyError) as error:
        raise BadInputError(f"{path}, line {number}: not a JSON object with a field 'text' ({error})") from error
    if not isinstance(text, str):
        raise BadInputError(f"{path}, line {number}: the field 'text' is {type(text).__name__}, it must be a string")
    return text


def read_text(path: Path) -> str:
    """Read a text to score: a ``.jsonl`` file's documents joined by a blank line, or any other file's text.

    Line ends of any system count as ``\\n``, and a byte order mark at the start does not count: a text scores the same
    however it was copied.

    Raises:
        BadInputError: a file that cannot be read, or a line that is not a JSON object with a field ``text``.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}; give a text file") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} cannot be read as UTF-8 text: {error}; give a text file in UTF-8") from error
    if path.suffix.lower() != ".jsonl":
        return content.replace("\r\n", "\n").replace("\r", "\n")
    lines = enumerate(content.split("\n"), start=1)
    return "\n\n".join(_document(path, number, line) for number, line in lines if line.strip())


@np.errstate(all="ignore")
def _log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of log softmax at the targets: float32 [n, vocabulary], int64 [n], in float64."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        shifted = row.astype(np.float64) - row.max()
        total += shifted[target] - np.log(np.exp(shifted).sum())
    return total


def measure_perplexity(
    backend: Backend, token_ids: Sequence[int], *, window: int = 512, windows: int = 30, advance: Advance = no_progress
) -> Perplexity:
    """Cut tokens into windows and score positions ``window / 2`` to ``window - 1`` of each, given all before them.

    Args:
        token_ids: of the whole text, without special tokens.
        window: tokens per window, even, at most the model's context.
        windows: score the first so many windows, or as many as the text has.
        advance: called after each window.

    Raises:
        BadInputError: a window that does not fit, or a text shorter than one window.
        NumericalError: logits that are not finite.
    """
    if window < 2 or window % 2 or window > backend.context_length:
        raise BadInputError(f"the window is {window}, it must be even and 2 to {backend.context_length}")
    if windows < 1:
        raise BadInputError(f"{windows} windows, there must be at least one")
    count = min(windows, len(token_ids) // window)
    if not count:
        raise BadInputError(f"the text has {len(token_ids)} tokens, it must have {window} or more (one window)")
    total, half = 0.0, window // 2
    for ids in np.array(token_ids[: count * window], np.int64).reshape(count, 1, window):
        # The last token is predicted, and predicts nothing that is scored.
        logits = backend.forward(ids[:, :-1], backend.new_cache(), first_logit=half - 1)
        total += _log_likelihood(logits[0], ids[0, half:])
        advance()
    scored = count * half
    with np.errstate(over="ignore"):
        result = float(np.exp(-total / scored))
    if not np.isfinite(result):
        raise NumericalError("the model computed NaN or infinity; run: mgptq-run check PACKAGE")
    return Perplexity(result, scored, count, backend.name)
