"""The check passes on what was packed and fails on anything else."""

import numpy as np
import pytest
from golden_package import make_golden
from synthetic import random_llama

from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.check import DEFAULT_BOUNDS, Bounds, bounds_key, check_backend, read_bounds
from mgptq_runtime.errors import CheckError, PackageError
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

NUMPY = DEFAULT_BOUNDS["numpy"]


class Shifted:
    """Another backend than NumPy, whose logits are NumPy's, changed."""

    name = "onnx"

    def __init__(self, model: QuantizedModel, change) -> None:
        self._backend = NumpyBackend(model)
        self._change = change
        self.vocabulary_size = self._backend.vocabulary_size
        self.context_length = self._backend.context_length
        self.short_context = self._backend.short_context

    def new_cache(self, batch: int = 1):
        return self._backend.new_cache(batch)

    def forward(self, token_ids, cache, *, first_logit=0):
        return self._change(self._backend.forward(token_ids, cache, first_logit=first_logit))


def changed(golden: GoldenVectors, **arrays: np.ndarray) -> GoldenVectors:
    return GoldenVectors(**(vars(golden) | arrays))


def with_changed_byte(model: QuantizedModel, offset: int) -> QuantizedModel:
    """One byte of one block of the last layer's attn_v different."""
    index = next(i for i, group in enumerate(model.groups) if group.name == "blk.1.attn_qkv")
    group = model.groups[index]
    *others, linear = group.linears
    data = linear.segments[0].data.copy()
    data[0, offset] ^= 0x10
    segments = (Segment(linear.segments[0].format, data), *linear.segments[1:])
    replaced = QuantizedLinear(linear.name, linear.rows, linear.columns, segments, linear.permutation)
    groups = list(model.groups)
    groups[index] = InputGroup(group.name, group.permutation, (*others, replaced))
    return QuantizedModel(**(vars(model) | {"groups": tuple(groups)}))


def test_what_was_packed_passes():
    model = random_llama()
    result = check_backend(NumpyBackend(model), make_golden(model), NUMPY)
    assert result.passed and result.top1_agreement == 1.0 and result.max_abs_difference <= 1e-3
    assert result.positions == 24 and abs(result.kl_divergence) <= 1e-6


@pytest.mark.parametrize("offset", [1, 5], ids=["a scale", "a code"])
def test_one_changed_byte_fails_and_names_the_layer(offset):
    model = random_llama()
    result = check_backend(NumpyBackend(with_changed_byte(model, offset)), make_golden(model), NUMPY)
    assert not result.passed
    assert result.hidden_layer == 2
    assert any("hidden_relative_difference" in failure for failure in result.failures)


def test_a_constant_shift_of_all_logits_is_a_difference_but_no_divergence():
    model = random_llama()
    result = check_backend(
        Shifted(model, lambda logits: logits + 0.5), make_golden(model), DEFAULT_BOUNDS["onnx_exact"]
    )
    assert not result.passed
    assert result.max_abs_difference == pytest.approx(0.5, abs=1e-5)
    assert result.kl_divergence == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_the_whole_distributions_when_all_tokens_are_golden():
    model = random_llama(vocabulary=40)
    golden = make_golden(model, k=40)
    backend = NumpyBackend(model)
    result = check_backend(Shifted(model, lambda logits: logits * np.float32(0.7)), golden, DEFAULT_BOUNDS["onnx_fast"])
    logits = backend.forward(golden.token_ids.astype(np.int64), backend.new_cache(2)).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_q = 0.7 * logits - np.log(np.exp(0.7 * logits).sum(-1, keepdims=True))
    assert result.kl_divergence == pytest.approx(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1)), abs=1e-5)


def swap_first_two(golden: GoldenVectors, model: QuantizedModel):
    """A change of logits that puts the second golden token of the first position first."""

    def change(logits):
        row = logits[0, 0]
        first, second = np.argsort(-row, kind="stable")[:2]
        row[first], row[second] = row[second], row[first]
        return logits

    return Shifted(model, change)


def test_a_tie_within_the_bound_is_reported_and_passes():
    model = random_llama()
    golden = make_golden(model)
    gap = np.max(golden.top_logits[:, 0, 0] - golden.top_logits[:, 0, 1])
    bounds = Bounds(max_abs_difference=float(gap) + 1e-3, top1_agreement=1.0)
    result = check_backend(swap_first_two(golden, model), golden, bounds)
    assert result.passed and result.top1_ties == 2
    assert result.top1_agreement == pytest.approx(22 / 24)


def test_another_first_token_beyond_the_bound_fails():
    model = random_llama()
    golden = make_golden(model)
    result = check_backend(swap_first_two(golden, model), golden, Bounds(max_abs_difference=1e-6, top1_agreement=1.0))
    assert not result.passed and result.top1_ties == 0


@pytest.mark.parametrize(("beyond", "ties"), [(-1e-3, 0), (1e-3, 2)])
def test_a_tie_gap_says_what_a_tie_is_however_far_logits_may_differ(beyond, ties):
    model = random_llama()
    golden = make_golden(model)
    gaps = golden.top_logits[:, 0, 0] - golden.top_logits[:, 0, 1]
    gap = (gaps.min() if beyond < 0 else gaps.max()) + beyond
    bounds = Bounds(max_abs_difference=float(gaps.max()) + 1, top1_agreement=1.0, tie_gap=float(gap))
    result = check_backend(swap_first_two(golden, model), golden, bounds)
    assert result.top1_ties == ties
    assert result.passed == bool(ties)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(value):
    model = random_llama()

    def poison(logits):
        logits[0, 3] = value
        return logits

    with np.errstate(invalid="ignore"):
        result = check_backend(Shifted(model, poison), make_golden(model), DEFAULT_BOUNDS["onnx_fast"])
    assert not result.passed
    assert "NaN or infinity" in result.failures[0]
    assert result.to_json()["max_abs_difference"] is None


def test_golden_vectors_of_another_model_are_refused():
    golden = make_golden(random_llama(vocabulary=512))
    with pytest.raises(CheckError, match="the model has 300"):
        check_backend(NumpyBackend(random_llama(vocabulary=300)), golden, NUMPY)


def test_each_accuracy_level_has_its_bounds():
    assert [bounds_key("numpy", 4), bounds_key("onnx", 0), bounds_key("onnx", 4)] == list(DEFAULT_BOUNDS)


@pytest.mark.parametrize(
    "values", [{"perplexity": 1}, {"kl_divergence": "low"}, {"kl_divergence": -1}, {"kl_divergence": True}]
)
def test_unusable_bounds_are_refused(values):
    with pytest.raises(PackageError, match="check bound"):
        read_bounds(values)
