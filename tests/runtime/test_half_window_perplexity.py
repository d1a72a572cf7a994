"""Perplexity over the second half of each window. Trusted: torch's cross entropy on the same model."""

import numpy as np
import pytest
import torch
from synthetic import random_llama
from test_numpy_backend import torch_llama

from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.errors import BadInputError, NumericalError
from mgptq_runtime.perplexity import measure_perplexity, read_text


def test_it_agrees_with_torch_over_the_second_halves():
    model = random_llama()
    ids = np.random.default_rng(0).integers(0, 512, 200)
    llama, losses = torch_llama(model), []
    for window in torch.tensor(ids[:192]).reshape(3, 64):
        with torch.no_grad():
            logits = llama(window[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[31:63], window[32:], reduction="sum"))
    result = measure_perplexity(NumpyBackend(model), ids.tolist(), window=64, windows=30)
    assert result.perplexity == pytest.approx(float(torch.exp(sum(losses) / 96)), rel=1e-4)
    assert (result.tokens, result.windows, result.backend) == (96, 3, "numpy")


def test_only_the_first_windows_asked_for_are_scored():
    calls = []
    ids = np.random.default_rng(0).integers(0, 512, 200).tolist()
    backend = NumpyBackend(random_llama())
    result = measure_perplexity(backend, ids, window=64, windows=2, advance=lambda: calls.append(1))
    assert (result.tokens, result.windows, len(calls)) == (64, 2, 2)
    assert result == measure_perplexity(backend, ids[:128], window=64)


@pytest.mark.parametrize(
    ("tokens", "window", "windows", "message"),
    [(63, 64, 1, "must have 64 or more"), (99, 63, 1, "even"), (999, 258, 1, "2 to 256"), (99, 64, 0, "at least one")],
)
def test_what_cannot_be_scored_is_refused(tokens, window, windows, message):
    with pytest.raises(BadInputError, match=message):
        measure_perplexity(NumpyBackend(random_llama()), [1] * tokens, window=window, windows=windows)


@pytest.mark.parametrize("size", [1e5, np.nan])
def test_a_model_that_is_lost_is_an_error(size):
    """No logarithm of its perplexity is a number, or its perplexity is none."""
    backend = NumpyBackend(random_llama())
    forward = backend.forward
    backend.forward = lambda *arguments, **named: forward(*arguments, **named) * np.float32(size)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        measure_perplexity(backend, list(range(64)), window=64)


def test_documents_are_joined_with_a_blank_line(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\u2028"}\n{"text": "two"}\n\n')
    assert read_text(path) == "one\u2028\n\ntwo"


@pytest.mark.parametrize("content", ["a\r\nö\r\n", "a\nö\n", "a\rö\r", "\ufeffa\nö\n"])
def test_plain_text_is_the_same_with_line_ends_and_byte_order_mark_of_any_system(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    assert read_text(path) == "a\nö\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"{"),
        ("a.jsonl", b'{"txt": 1}'),
        ("a.jsonl", b'{"text": 1}'),
        ("a.jsonl", b"[]"),
        ("a.txt", b"\xff"),
    ],
)
def test_an_unusable_text_is_a_typed_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError):
        read_text(tmp_path / name)
    with pytest.raises(BadInputError):
        read_text(tmp_path / "missing.txt")
