"""The NumPy forward pass. Trusted: torch, Hugging Face's LlamaForCausalLM with the dequantized weights."""

import numpy as np
import pytest
import torch
from llama_oracle import torch_llama
from synthetic import random_llama

from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.golden import hidden_digest
from mgptq_runtime.quantized_model import QuantizedModel

ODD = {"hidden": 90, "intermediate": 100, "heads": 9, "kv_heads": 3, "vocabulary": 403, "tied": False}
SHAPES = [{}, ODD, {"heads": 4, "kv_heads": 4, "hidden": 64, "vocabulary": 5000}]


@pytest.fixture(params=SHAPES, ids=["even", "odd", "no groups"])
def model(request) -> QuantizedModel:
    return random_llama(3, **request.param)


def random_ids(model: QuantizedModel, batch: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(5).integers(0, model.embedding.rows, (batch, length))


def test_logits_agree_with_torch(model):
    ids = random_ids(model)
    with torch.no_grad():
        expected = torch_llama(model)(torch.tensor(ids)).logits.numpy()
    backend = NumpyBackend(model)
    logits = backend.forward(ids, backend.new_cache(2))
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-3
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


def test_digests_agree_with_torch_after_every_layer(model):
    ids = random_ids(model)
    with torch.no_grad():
        states = torch_llama(model)(torch.tensor(ids), output_hidden_states=True).hidden_states
    _, digests = NumpyBackend(model).forward_with_digests(ids)
    # torch's last hidden state is after the final norm, ours before it.
    for digest, state in zip(digests[:-1], states[:-1], strict=True):
        assert np.abs(digest - hidden_digest(state[:, -1].numpy())).max() <= 1e-3
    assert len(digests) == len(states)


def test_biases_are_added(model):
    rng = np.random.default_rng(0)
    biases = {
        f"{linear.name}_bias": rng.standard_normal(linear.rows).astype(np.float32)
        for linear in model.linears()
        if "attn" in linear.name
    }
    model = QuantizedModel(**(vars(model) | {"tensors": {**model.tensors, **biases}}))
    ids = random_ids(model)
    with torch.no_grad():
        expected = torch_llama(model)(torch.tensor(ids)).logits.numpy()
    backend = NumpyBackend(model)
    assert np.abs(backend.forward(ids, backend.new_cache(2)) - expected).max() <= 1e-3


@pytest.mark.parametrize("steps", [[1] * 40, [5, 1, 30, 4], [39, 1]])
def test_cached_steps_equal_the_whole(model, steps):
    ids = random_ids(model)
    backend = NumpyBackend(model)
    whole = backend.forward(ids, backend.new_cache(2))
    cache = backend.new_cache(2)
    parts = [backend.forward(part, cache) for part in np.split(ids, np.cumsum(steps)[:-1], axis=1)]
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= 1e-4


def test_long_prompts_are_attended_in_chunks_with_the_same_result():
    model = random_llama(1, layers=1, hidden=64, intermediate=64)
    hyperparameters = {**model.hyperparameters, "context_length": 1024}
    model = QuantizedModel(**(vars(model) | {"hyperparameters": hyperparameters}))
    ids = random_ids(model, batch=1, length=600)
    with torch.no_grad():
        expected = torch_llama(model)(torch.tensor(ids)).logits.numpy()
    backend = NumpyBackend(model)
    assert np.abs(backend.forward(ids, backend.new_cache()) - expected).max() <= 1e-3


@pytest.mark.parametrize("first_logit", [0, 7, 39, -1, -7, -40])
def test_logits_are_computed_from_the_first_that_is_asked_for(model, first_logit, monkeypatch):
    ids = random_ids(model)
    backend = NumpyBackend(model)
    whole = backend.forward(ids, backend.new_cache(2))
    head, computed = backend.head, []
    monkeypatch.setattr(backend, "head", lambda hidden: computed.append(hidden.shape[1]) or head(hidden))
    logits = backend.forward(ids, backend.new_cache(2), first_logit=first_logit)
    assert np.abs(logits - whole[:, first_logit:]).max() <= 1e-4
    assert computed == [logits.shape[1]]


@pytest.mark.parametrize("first_logit", [40, -41])
def test_logits_of_positions_that_are_not_new_are_refused(model, first_logit):
    backend = NumpyBackend(model)
    cache = backend.new_cache(2)
    with pytest.raises(BadInputError, match=f"first_logit is {first_logit}, of 40 new tokens it may be -40 to 39"):
        backend.forward(random_ids(model), cache, first_logit=first_logit)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[512]]), "the vocabulary is 0 to 511"),
        (np.array([[-1]]), "the vocabulary is 0 to 511"),
        (np.zeros((1, 257), np.int64), "context of 256"),
        (np.zeros((2, 1), np.int64), "a cache of 1 sequences"),
        (np.zeros((1, 0), np.int64), "a cache of 1 sequences"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(ids, message):
    backend = NumpyBackend(random_llama())
    with pytest.raises(BadInputError, match=message):
        backend.forward(ids, backend.new_cache())


def test_an_unknown_family_is_refused():
    model = QuantizedModel(**(vars(random_llama()) | {"family": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="supported are: llama"):
        NumpyBackend(model)
