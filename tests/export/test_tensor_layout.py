"""The tensor layout: which types a model's tensors get, under one budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from small_runs import RECIPE

from mgptq_export.layouts import TENSORS
from mgptq_export.models import load_shape, load_source
from mgptq_export.quantize import quantize
from mgptq_export.recipe import Recipe
from mgptq_runtime.errors import BadInputError, BudgetError
from mgptq_runtime.formats import GGML_FORMATS

SIMPLE = ("q1_0", "q2_0", "q4_0", "q8_0")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
HESSIAN = replace(RECIPE, allocator="hessian")


@pytest.mark.parametrize(
    ("sizes", "types"),
    [(WIDE, tuple(GGML_FORMATS)), ({**WIDE, "hidden_size": 128}, SIMPLE), ({**WIDE, "intermediate_size": 384}, SIMPLE)],
)
def test_k_quants_take_part_where_they_fit_every_linear(tmp_path: Path, sizes: dict, types: tuple) -> None:
    source = load_shape(str(tiny_models.write_llama(tmp_path, **sizes)))
    reach = TENSORS.reach(source, Recipe())
    assert {name for formats in reach.formats.values() for name in formats} == set(types)


def test_types_that_are_asked_for_are_taken_where_they_fit(tmp_path: Path) -> None:
    source = load_shape(str(tiny_models.write_llama(tmp_path, **{**WIDE, "hidden_size": 128})))
    reach = TENSORS.reach(source, Recipe(ggml_types=("q2_0", "q2_k")))
    assert reach.formats["ffn_down"] == ("q2_0", "q2_k") and reach.formats["attn_q"] == ("q2_0",)
    assert reach.excluded["attn_q"] == {"q2_k": "rows of 128 are not whole blocks of 256"}


def test_unknown_types_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"\['q2_5'\] are unknown; choose from q1_0"):
        Recipe(ggml_types=("q2_0", "q2_5"))


def test_rows_that_no_type_holds_are_refused(tmp_path: Path) -> None:
    source = load_shape(str(tiny_models.write_llama(tmp_path, intermediate_size=200)))
    with pytest.raises(BudgetError, match="ffn_down: rows of 200 weights are not whole blocks of any ggml type"):
        TENSORS.reach(source, Recipe())


@pytest.mark.parametrize("allocator", ["hessian", "uniform", pytest.param("gnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [2.25, 3.0, pytest.param(4.5, marks=pytest.mark.slow), 8.5])
def test_the_budget_is_met_by_the_bytes_themselves(tmp_path: Path, allocator: str, bits: float) -> None:
    source = load_source(str(tiny_models.write_llama(tmp_path, **WIDE, num_hidden_layers=3)))
    model = quantize(source, replace(RECIPE, allocator=allocator, bits=bits), TENSORS).model
    stored = sum(segment.data.nbytes for linear in model.linears() for segment in linear.segments)
    assert bits - 0.05 < 8 * stored / model.linear_weights <= bits
    assert all(len(linear.segments) == 1 and linear.permutation is None for linear in model.linears())


def test_fused_matrices_share_a_type(tmp_path: Path) -> None:
    """llama.cpp's files hold q, k, v and gate, up of Phi-3 as one tensor each."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 12}
    source = load_source(str(tiny_models.write_model(tmp_path, "phi3", **sizes)))
    model = quantize(source, replace(HESSIAN, bits=3.0), TENSORS).model
    types = {linear.name: linear.segments[0].format for linear in model.linears()}
    for i in range(4):
        assert types[f"blk.{i}.attn_q"] == types[f"blk.{i}.attn_k"] == types[f"blk.{i}.attn_v"]
        assert types[f"blk.{i}.ffn_gate"] == types[f"blk.{i}.ffn_up"]
    assert len(set(types.values())) > 1


@pytest.mark.slow
def test_linears_of_one_tensor_are_told_what_the_tensor_loses(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 12}
    source = load_source(str(tiny_models.write_model(tmp_path, "phi3", **sizes)))
    losses = quantize(source, replace(RECIPE, bits=3.0), TENSORS).decision.losses
    for fused in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
        first, *others = (losses[f"blk.0.{kind}"] for kind in fused)
        assert first["measured"] != 0
        assert all(other == first for other in others)


def test_bits_that_whole_tensors_cannot_meet_are_refused(tmp_path: Path) -> None:
    source = load_source(str(tiny_models.write_llama(tmp_path, **WIDE, num_hidden_layers=1)))
    with pytest.raises(BudgetError, match="tensors of this model are so coarse"):
        quantize(source, replace(HESSIAN, bits=2.2, ggml_types=("q1_0", "q2_0", "q8_0")), TENSORS)
