"""What linears of a half quantized model read, against both models run as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from small_runs import RECIPE

from mgptq_export.calibration import FIRST_TOKEN_WEIGHT, LARGEST_WEIGHT, DriftFlow
from mgptq_export.compute import compute_dtype, computing_in
from mgptq_export.hooks import hooked
from mgptq_export.models import SourceModel, load_source
from mgptq_export.quantize import calibrate, quantize

TOKENS = torch.randint(3, 331, (6, 24), generator=torch.Generator().manual_seed(3))
LAYER = 1


@pytest.fixture(scope="module", params=["llama", "gemma3", "phi3", "qwen3"])
def models(request, tmp_path_factory) -> tuple[SourceModel, SourceModel]:
    """A model, and one whose embedding and first layer are not quite the same."""
    original = load_source(str(tiny_models.write_model(tmp_path_factory.mktemp(request.param), request.param)))
    changed = original.copy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (changed.model.model.embed_tokens.weight, *changed.layers[0].parameters()):
            weight *= 1 + 0.1 * torch.randn(weight.shape, generator=generator)
    return original, changed


def seen(source: SourceModel, *modules: torch.nn.Module) -> list[torch.Tensor]:
    """What modules read and put out while the whole model computes: float32 [tokens, columns]."""
    found = {}

    def record(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        found[module] = [one.flatten(0, 1).float() for one in (inputs[0], output)]

    handles = [module.register_forward_hook(record) for module in modules]
    dtype, device = compute_dtype(source.model.device), source.model.device
    with hooked(handles), torch.no_grad(), computing_in(dtype, device):
        source.model.model(TOKENS, use_cache=False)
    return [one for module in modules for one in found[module]]


def moment(left: torch.Tensor, right: torch.Tensor, largest: float) -> torch.Tensor:
    """Of what is read, on the right; no token counts for more than so many of median size."""
    weights = torch.ones_like(TOKENS, dtype=torch.float32)
    weights[:, 0] = FIRST_TOKEN_WEIGHT
    sizes = right.square().sum(-1)
    weights = torch.minimum(weights.flatten(), largest * sizes.median() / sizes)
    return 2.0 / weights.sum() * (left * weights[:, None]).t() @ right


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= 0.02 * expected.norm())


@pytest.mark.parametrize("largest", [LARGEST_WEIGHT, 2])
@pytest.mark.parametrize("place", range(4), ids=["qkv", "output", "gate_up", "down"])
def test_hessian_and_drift_are_those_of_the_two_models(models, place, largest, monkeypatch):
    monkeypatch.setattr("mgptq_export.calibration.flow.LARGEST_WEIGHT", largest)
    original, changed = models
    flow = DriftFlow(changed, original, TOKENS)
    flow.enter(0, measuring=False)
    flow.leave(0)
    flow.enter(LAYER, measuring=True)
    group = changed.layer_groups(LAYER)[place]
    measured = flow.measure(LAYER, group)

    norm = original.family.norms["ffn_norm"]
    ends = []
    for source in (original, changed):
        layer = source.layers[LAYER]
        linear = source.layer_groups(LAYER)[place].first
        read, _, middle, _, _, end = seen(source, linear, layer.get_submodule(norm), layer)
        ends.append((read, middle, end))
    (before, *streams_before), (now, *streams_now) = ends
    assert close(measured.hessian, moment(now, now, largest))
    weight = group.first.weight.detach()
    if original.family.name != "gemma3" and place in (1, 3):
        expected = moment(streams_before[place // 2] - streams_now[place // 2], now, largest)
    else:
        expected = weight @ moment(before - now, now, largest)
    assert expected.norm() > 0
    assert close(measured.behind(weight), expected)


def test_without_an_original_there_is_no_drift(models):
    flow = DriftFlow(models[1], None, TOKENS)
    flow.enter(0, measuring=True)
    assert flow.measure(0, models[1].layer_groups(0)[0]).drift is None


def test_a_layer_changed_group_by_group_ends_where_the_whole_layer_does(models):
    """What has its final weights is computed once, and gives the very same bits."""
    original, changed = models[0], models[1].copy()
    flow = DriftFlow(changed, original, TOKENS)
    flow.enter(0, measuring=True)
    groups = changed.layer_groups(0)
    for group in groups:
        alone = DriftFlow(changed, original, TOKENS)
        alone.enter(0, measuring=True)
        expected = alone.measure(0, group)
        with counted(groups[0].first) as projections:
            found = flow.measure(0, group)
        assert torch.equal(found.hessian, expected.hessian) and torch.equal(found.drift, expected.drift)
        assert bool(projections) == group.name.endswith(("attn_qkv", "attn_output"))
        for module in group.modules.values():
            module.weight.data.mul_(1.1)
    with counted(groups[0].first) as projections:
        flow.leave(0)
    assert not projections
    whole = DriftFlow(changed, original, TOKENS)
    whole.enter(0, measuring=False)
    whole.leave(0)
    following = changed.layer_groups(1)[0]
    for one in (flow, whole):
        one.enter(1, measuring=True)
    assert torch.equal(*(one.measure(1, following).hessian for one in (flow, whole)))


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """An entry for every time that a module computes, or is about to."""
    times: list[int] = []
    with hooked([module.register_forward_pre_hook(lambda *_: times.append(1))]):
        yield times


def error_of_quantized(model: Path, **changes: Any) -> float:
    """How far the hidden states of the calibration text lie from the original's."""
    recipe = replace(RECIPE, bits=2.25, allocator="uniform", **changes)
    source = load_source(str(model))
    calibration = calibrate(source, recipe)
    original = source.copy()
    quantize(source, recipe, calibration=calibration)
    with torch.no_grad():
        states = [one.model.model(calibration.tokens).last_hidden_state for one in (original, source)]
    return float((states[0] - states[1]).square().mean())


def test_making_up_for_drift_comes_closer_to_the_original(even_model):
    corrected, plain = (error_of_quantized(even_model, samples=80, drift_correction=share) for share in (0.5, 0.0))
    assert corrected < 0.95 * plain


def test_little_text_makes_up_for_little(even_model, monkeypatch):
    little = error_of_quantized(even_model, samples=2)
    monkeypatch.setattr("mgptq_export.quantize.DRIFT_TOKENS", 0.01)
    assert error_of_quantized(even_model, samples=2) < 0.95 * little  # of a text that is learnt by heart
