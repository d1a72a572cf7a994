"""What every backend checks before it computes."""

import numpy as np

from mgptq_runtime.errors import BadInputError

__all__ = ["check_tokens"]


def check_tokens(
    token_ids: np.ndarray,
    cache_batch: int,
    cache_length: int,
    vocabulary_size: int,
    context_length: int,
    first_logit: int = 0,
) -> None:
    """Refuse tokens that a model cannot append to a cache, and logits of positions that are not among them.

    Args:
        token_ids: int64 [batch, sequence], the new tokens.
        cache_batch, cache_length: sequences of the cache, and tokens that each has.

    Raises:
        BadInputError: shapes that do not fit, a token id or a position out of range, or more tokens than the context
            holds.
    """
    if token_ids.ndim != 2 or len(token_ids) != cache_batch or not token_ids.size:
        raise BadInputError(f"tokens of shape {token_ids.shape} do not fit a cache of {cache_batch} sequences")
    if token_ids.min() < 0 or token_ids.max() >= vocabulary_size:
        raise BadInputError(
            f"token ids {token_ids.min()} to {token_ids.max()}, the vocabulary is 0 to {vocabulary_size - 1}"
        )
    count = token_ids.shape[1]
    total = cache_length + count
    if total > context_length:
        raise BadInputError(f"{total} tokens are more than the model's context of {context_length}")
    if not -count <= first_logit < count:
        raise BadInputError(f"first_logit is {first_logit}, of {count} new tokens it may be {-count} to {count - 1}")
