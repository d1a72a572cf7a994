"""Generation on the NumPy backend. Trusted: whole-sequence forward passes."""

import numpy as np
import pytest
from synthetic import random_llama

from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.errors import BadInputError, NumericalError
from mgptq_runtime.generate import Sampling, generate_tokens, stop_reason


@pytest.fixture(scope="module")
def backend() -> NumpyBackend:
    return NumpyBackend(random_llama())


def whole_logits(backend: NumpyBackend, ids: list[int]) -> np.ndarray:
    return backend.forward(np.array([ids]), backend.new_cache())[0]


def test_greedy_text_takes_the_most_likely_token_each_time(backend):
    prompt = [5, 6, 7]
    tokens = list(generate_tokens(backend, prompt, max_tokens=10))
    logits = whole_logits(backend, prompt + tokens)
    assert tokens == list(logits[2:-1].argmax(-1))


def test_generation_stops_before_an_eos_token(backend):
    tokens = list(generate_tokens(backend, [5], max_tokens=10))
    assert (
        list(generate_tokens(backend, [5], max_tokens=10, eos_token_ids={tokens[4]}))
        == tokens[: tokens.index(tokens[4])]
    )


def test_generation_stops_when_the_context_is_full(backend):
    prompt = list(range(250))
    assert len(list(generate_tokens(backend, prompt, max_tokens=100))) == 256 - 250


@pytest.mark.parametrize("length, wanted", [(250, 5), (250, 6), (250, 7), (5, 10)])
@pytest.mark.parametrize("ends", [False, True])
def test_why_generation_stopped_can_be_told_from_its_length(backend, length, wanted, ends):
    prompt = list(range(length))
    tokens = list(generate_tokens(backend, prompt, max_tokens=wanted))
    eos = set(tokens[-1:]) if ends else set()
    found = list(generate_tokens(backend, prompt, max_tokens=wanted, eos_token_ids=eos))
    reason = stop_reason(length, len(found), max_tokens=wanted, context_length=256)
    assert reason == ("end_of_text" if ends else "context_full" if wanted == 7 else "max_tokens")


@pytest.mark.parametrize("length", [0, 256])
def test_a_prompt_that_does_not_fit_is_refused(backend, length):
    with pytest.raises(BadInputError, match="1 to 255"):
        list(generate_tokens(backend, [1] * length, max_tokens=1))


def test_equal_seeds_give_equal_texts_and_others_do_not(backend):
    def sample(seed: int) -> list[int]:
        return list(generate_tokens(backend, [5], max_tokens=20, sampling=Sampling(temperature=2.0, seed=seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.3}])
def test_samples_stay_among_the_allowed_tokens(backend, sampling):
    logits = whole_logits(backend, [9])[0].astype(np.float64)
    order = np.argsort(-logits)
    probabilities = np.sort(np.exp(logits - logits.max()))[::-1]
    probabilities /= probabilities.sum()
    kept = sampling.get("top_k") or int(np.searchsorted(np.cumsum(probabilities), sampling["top_p"])) + 1
    drawn = {
        next(generate_tokens(backend, [9], max_tokens=1, sampling=Sampling(temperature=1.0, seed=seed, **sampling)))
        for seed in range(60)
    }
    assert drawn <= set(order[:kept].tolist())
    assert len(drawn) > 1


def test_samples_follow_the_softmax(backend):
    logits = whole_logits(backend, [9])[0].astype(np.float64)
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    draws = [
        next(generate_tokens(backend, [9], max_tokens=1, sampling=Sampling(temperature=1.0, seed=seed)))
        for seed in range(400)
    ]
    share = draws.count(int(logits.argmax())) / 400
    assert share == pytest.approx(expected.max(), abs=0.1)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}, {"seed": -1}],
)
def test_unusable_sampling_values_are_refused(values):
    with pytest.raises(BadInputError):
        Sampling(**values)


def test_logits_that_are_not_finite_stop_generation(backend, monkeypatch):
    monkeypatch.setattr(backend, "forward", lambda ids, cache, first_logit: np.full((1, 1, 512), np.nan, np.float32))
    with pytest.raises(NumericalError, match="mgptq-run check"):
        list(generate_tokens(backend, [1], max_tokens=1))
