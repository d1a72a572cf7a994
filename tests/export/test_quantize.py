"""Quantizing a model in memory. What is stored is recounted here from the packed bytes; transformers is trusted."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_model import write_gguf
from safetensors.torch import load_file, save_file
from small_runs import RECIPE, Quantized
from tiny_models import write_llama

from mgptq_export.allocation import Decision, training
from mgptq_export.allocation.problem import errors_of
from mgptq_export.calibration import FIRST_TOKEN_WEIGHT, attribute, collect_statistics
from mgptq_export.checkpoint import read_checkpoint, write_checkpoint
from mgptq_export.journal import FORGETFUL, Journal
from mgptq_export.layouts import COLUMNS, Allocated, columns
from mgptq_export.layouts.columns import ColumnLayout
from mgptq_export.models import SourceModel, load_quantized_weights, load_shape, load_source
from mgptq_export.quantize import calibrate, quantize, round_to_nearest, try_allocation
from mgptq_runtime.errors import BadInputError, BudgetError, NumericalError, PackageError, UnsupportedModelError
from mgptq_runtime.formats import FORMATS
from mgptq_runtime.quantized_model import QuantizedModel

TOKENS = torch.arange(40).view(2, 20)
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def logits_of(source: SourceModel) -> torch.Tensor:
    with torch.no_grad():
        return source.model(TOKENS).logits


def parameter(source: SourceModel, name: str) -> torch.Tensor:
    """The weight of ``blk.0.attn_q`` and the like."""
    _, layer, kind = name.split(".")
    return source.model.get_parameter(f"model.layers.{layer}.{MODULES[kind]}.weight")


def recounted_bits(model: QuantizedModel) -> float:
    """All that is stored for the linears, per weight of theirs: 16 bits per column of a permutation."""
    stored = weights = 0
    for group in model.groups:
        stored += 0 if group.permutation is None else 16 * group.linears[0].columns
        for linear in group.linears:
            stored += sum(8 * len(segment.data.tobytes()) for segment in linear.segments)
            weights += linear.rows * linear.columns
    return stored / weights


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_best_trial_is_the_solution(odd_model, tmp_path, monkeypatch, is_kept):
    """Where its groups are kept, they are not solved again. Measured anew on the text that was held out."""
    source, recipe = load_source(str(odd_model)), replace(RECIPE, samples=8, trials=3, bits=3.0)
    calibration = calibrate(source, recipe)
    original, solved, solve_group = source.copy(), [], ColumnLayout.solve_group

    def counted(layout, group, *arguments):
        solved.append(group.name)
        return solve_group(layout, group, *arguments)

    monkeypatch.setattr(ColumnLayout, "solve_group", counted)
    result = quantize(source, recipe, COLUMNS, calibration, Journal(tmp_path) if is_kept else FORGETFUL)
    divergences = result.decision.divergences
    assert len(divergences) > 1
    assert attribute(original, source, calibration.held_out).divergence == pytest.approx(min(divergences), rel=1e-6)
    assert len(solved) == (len(divergences) + (not is_kept)) * len(list(source.groups()))


def test_what_is_left_of_a_stopped_trial_serves_no_other_assignment(odd_model, tmp_path, monkeypatch):
    """Once a run goes on, the network may propose something else. A run that nothing stopped is trusted."""
    recipe = replace(RECIPE, samples=8, trials=2, bits=3.0)
    source = load_source(str(odd_model))
    calibration = calibrate(source, recipe)
    original, groups = source.copy(), len(list(source.groups()))

    def better_every_time(*arguments):
        return replace(attribute(*arguments), divergence=next(falling))

    monkeypatch.setattr("mgptq_export.quantize.attribute", better_every_time)
    solve_group, proposed = ColumnLayout.solve_group, training._propose
    solved = []

    def stopped_in_the_second_trial(*arguments):
        solved.append(arguments)
        if len(solved) == groups + groups // 2:
            raise KeyboardInterrupt
        return solve_group(*arguments)

    falling = iter([2.0, 1.0])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ColumnLayout, "solve_group", stopped_in_the_second_trial)
        quantize(original.copy(), recipe, COLUMNS, calibration, Journal(tmp_path))

    def proposed_otherwise(problem, sizes, costs, corrections, *rest):
        return proposed(problem, sizes, costs, -corrections, *rest)

    monkeypatch.setattr(training, "_propose", proposed_otherwise)
    falling = iter([1.0])
    resumed = quantize(original.copy(), recipe, COLUMNS, calibration, Journal(tmp_path))
    falling = iter([2.0, 1.0])
    whole = quantize(original.copy(), recipe, COLUMNS, calibration)
    assert len([path for path in tmp_path.glob("trial-*") if path.is_dir()]) == 3
    assert resumed.decision.formats == whole.decision.formats
    for one, other in zip(resumed.model.linears(), whole.model.linears(), strict=True):
        assert np.array_equal(one.dequantize(), other.dequantize()), one.name


def test_embedding_and_head_are_solved_once_however_many_trials_there_are(odd_model, monkeypatch):
    names, solve = [], type(COLUMNS).solve_table
    monkeypatch.setattr(
        type(COLUMNS), "solve_table", lambda self, name, *rest: names.append(name) or solve(self, name, *rest)
    )
    source = load_source(str(odd_model))
    result = quantize(source, replace(RECIPE, trials=3, bits=3.0))
    assert len(result.decision.divergences) > 1 and names == ["token_embd", "output"]
    for module, solved in (
        (source.model.model.embed_tokens, result.model.embedding),
        (source.model.lm_head, result.model.head),
    ):
        assert torch.equal(module.weight, torch.from_numpy(solved.dequantize()))


def test_a_trial_goes_through_the_layers_as_the_solution_will(even_model):
    """On text that it is not measured on. What the hessian allocator's assignment is solved to is trusted."""
    source = load_source(str(even_model))
    recipe = replace(RECIPE, samples=16, own_samples=0, drift_correction=0.5, descent_sweeps=0)
    calibration = calibrate(source, recipe)
    original, working = source.copy(), source.copy()
    first, *_ = quantize(source, recipe, calibration=calibration).decision.divergences
    assert len(calibration.held_out) == 2
    unseen = replace(calibration, tokens=calibration.tokens[2:])
    quantize(working, replace(recipe, allocator="hessian"), calibration=unseen)
    assert first == pytest.approx(attribute(original, working, calibration.held_out).divergence, rel=1e-6)


def test_a_trial_tells_rounding_from_what_makes_up_for_drift(even_model, tmp_path, monkeypatch):
    """With eight bits for all linears and two for the embedding, drift is more than they lose themselves."""
    source = load_source(str(even_model))
    recipe = replace(RECIPE, samples=16, own_samples=0, drift_correction=0.5, descent_sweeps=0)
    calibration = calibrate(source, recipe)
    seen = []

    def seeing(original, quantized, tokens, targets):
        seen.append({name: target.float() for name, target in targets.items()})
        return attribute(original, quantized, tokens, targets)

    monkeypatch.setattr("mgptq_export.quantize.attribute", seeing)
    formats = {name: ("b8",) * -(-group.columns // 64) for group in source.groups() for name in group.modules}
    allocated = Allocated(Decision(formats), calibration.orders, columns.tables_of_one_format(source, "b2"), 8.5)
    trial, working, _ = try_allocation(source, calibration, recipe, COLUMNS, allocated, journal=Journal(tmp_path))
    name = "blk.1.ffn_down"
    before, after = parameter(source, name), parameter(working, name)
    assert (after - seen[0][name]).norm() < 0.5 * (after - before).norm()
    again, _, _ = try_allocation(source, calibration, recipe, COLUMNS, allocated, journal=Journal(tmp_path))
    assert all(torch.equal(losses, again.losses[name]) for name, losses in trial.losses.items())
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in trial.losses)


# The budget


@pytest.mark.parametrize("bits", [1.35, 2.0, 2.25, 2.5, 3.0, 3.25, 4.7])
@pytest.mark.parametrize("allocator", ["uniform", "hessian", "gnn"])
def test_budget_is_met_with_all_overheads_counted(even_model, allocator, bits):
    result = quantize(load_source(str(even_model)), replace(RECIPE, allocator=allocator, bits=bits, training_steps=1))
    stored = recounted_bits(result.model)
    assert bits - 0.05 < stored <= bits
    assert result.model.bits_stored == stored


@pytest.mark.parametrize("bits", [2.3, 3.0])
def test_budget_counts_the_padding_of_odd_sizes(odd_model, bits):
    result = quantize(load_source(str(odd_model)), replace(RECIPE, bits=bits, allocator="hessian"))
    assert bits - 0.05 < recounted_bits(result.model) <= bits


@pytest.mark.parametrize("allocator", ["uniform", "hessian", "gnn"])
@pytest.mark.parametrize("model", ["even_model", "odd_model"], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [1.8, 2.5, 4.0])
def test_a_mixed_embedding_shares_the_bits(request, model, allocator, bits):
    recipe = replace(RECIPE, allocator=allocator, bits=bits, size=1, embedding_format="mixed", training_steps=1)
    source = load_source(str(request.getfixturevalue(model)))
    result = quantize(source, recipe)
    tables = [result.model.embedding, *([result.model.head] if result.model.head else [])]
    of_tables = sum(table.stored_bytes * 8 for table in tables)
    weights = sum(table.rows * table.columns for table in tables)
    linears = result.model.linear_weights
    spent = (recounted_bits(result.model) * linears + of_tables) / (linears + weights)
    assert bits - 0.1 < spent <= bits
    assert recounted_bits(result.model) <= result.bits
    for module, table in zip((source.model.model.embed_tokens, source.model.lm_head), tables, strict=False):
        order = [list(FORMATS).index(segment.format) for segment in table.segments]
        assert order == sorted(order, reverse=True)
        assert torch.equal(module.weight, torch.from_numpy(table.dequantize()))


def test_a_mixed_embedding_needs_a_size_to_share():
    with pytest.raises(BadInputError, match="there is none; ask for a size"):
        replace(RECIPE, embedding_format="mixed")


@pytest.mark.parametrize("bits", [0.9, 1.2, 8.5, 20.0, float("nan"), -1.0])
def test_unreachable_bits_are_refused_with_the_reachable_range(even_model, bits):
    with pytest.raises(BudgetError, match=r"reach 1\.25 to 8\.\d\d"):
        quantize(load_source(str(even_model)), replace(RECIPE, bits=bits))


def test_the_reachable_range_depends_on_formats_and_padding(even_model, odd_model):
    assert COLUMNS.reach(load_source(str(even_model)), replace(RECIPE, formats=("b2", "b3"))).lowest == 2.25
    reach = COLUMNS.reach(load_source(str(odd_model)), replace(RECIPE, formats=("b2",)))
    low, high = reach.lowest, reach.highest
    # 96 columns take 128, 200 take 256.
    assert 2.25 * 128 / 96 > low > 2.25 * 256 / 200 and high > low


def test_uniform_at_a_formats_own_bits_is_that_format_throughout(even_model):
    result = quantize(load_source(str(even_model)), replace(RECIPE, allocator="uniform", bits=3.25))
    assert {segment.format for linear in result.model.linears() for segment in linear.segments} == {"b3"}
    assert all(group.permutation is None for group in result.model.groups)


def test_only_the_recipes_formats_are_used(even_model):
    recipe = replace(RECIPE, formats=("b4", "b2"), embedding_format="b8", bits=3.0)
    model = quantize(load_source(str(even_model)), recipe).model
    assert {segment.format for linear in model.linears() for segment in linear.segments} <= {"b2", "b4"}
    assert {segment.format for segment in model.embedding.segments} == {"b8"}


# What becomes of the weights


@pytest.mark.parametrize("quantized", ["even_quantized", "odd_quantized"])
def test_the_source_model_holds_the_dequantized_weights(request, quantized):
    quantized: Quantized = request.getfixturevalue(quantized)
    model, source = quantized.result.model, quantized.source
    for linear in model.linears():
        assert np.array_equal(parameter(source, linear.name).numpy(), linear.dequantize()), linear.name
    assert np.array_equal(source.model.model.embed_tokens.weight.numpy(), model.embedding.dequantize())
    head = model.embedding if model.head is None else model.head
    assert np.array_equal(source.model.lm_head.weight.numpy(), head.dequantize())


def test_large_matrices_are_solved_some_rows_at_a_time_which_changes_nothing(even_model, monkeypatch):
    recipe = replace(RECIPE, allocator="hessian", drift_correction=0.0)
    whole = quantize(load_source(str(even_model)), recipe).model
    stacks = []
    solve = columns.solve_blockwise
    monkeypatch.setattr(columns, "NUMBERS_AT_ONCE", 1024)
    monkeypatch.setattr(columns, "solve_blockwise", lambda stack, *given: stacks.append(stack) or solve(stack, *given))
    parts = quantize(load_source(str(even_model)), recipe).model
    assert max(stack.numel() for stack in stacks) <= 1024 < max(one.rows * one.columns for one in whole.linears())
    assert parts.weights_by_format() == whole.weights_by_format()
    # What comes later reads what these put out, and any last digit of it may round a weight the other way.
    first = zip((*whole.groups[0].linears, whole.embedding), (*parts.groups[0].linears, parts.embedding), strict=True)
    for one, other in first:
        assert np.isclose(one.dequantize(), other.dequantize(), rtol=1e-3).mean() > 0.95, one.name


def test_a_tied_matrix_stays_tied_and_is_stored_once(even_quantized):
    assert even_quantized.result.model.head is None
    assert even_quantized.source.tied


def test_untied_matrices_are_both_stored(odd_quantized):
    model = odd_quantized.result.model
    assert model.head is not None
    assert not np.array_equal(model.head.dequantize(), model.embedding.dequantize())


def test_everything_that_is_not_quantized_is_kept_exactly(odd_model, odd_quantized):
    """All norms in one new order of the channels."""
    original, kept = load_source(str(odd_model)), odd_quantized.result.model.tensors
    last = original.model.model.norm.weight.numpy()
    assert len(set(last)) == len(last)
    order = np.array([np.flatnonzero(last == value)[0] for value in kept["output_norm"]])
    for i, layer in enumerate(original.layers):
        assert np.array_equal(kept[f"blk.{i}.attn_norm"], layer.input_layernorm.weight.numpy()[order])
        assert np.array_equal(kept[f"blk.{i}.ffn_norm"], layer.post_attention_layernorm.weight.numpy()[order])


@pytest.mark.parametrize("model", ["even_model", "odd_model"])
def test_renumbering_neurons_and_channels_does_not_change_the_model(request, model):
    source = load_source(str(request.getfixturevalue(model)))
    logits = logits_of(source)
    neurons, channels = source.layers[0].mlp.down_proj.weight[0].clone(), source.model.model.norm.weight.clone()
    calibrate(source, RECIPE)
    assert not torch.equal(source.layers[0].mlp.down_proj.weight[0], neurons)
    assert not torch.equal(source.model.model.norm.weight, channels)
    assert (logits_of(source) - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("samples, held_out", [(4, 0), (16, 2)])
def test_calibration_describes_the_renumbered_model_on_the_text_that_is_not_held_out(odd_model, samples, held_out):
    source = load_source(str(odd_model))
    calibration = calibrate(source, replace(RECIPE, samples=samples))
    layer, inputs = source.layers[1], {}
    modules = {
        "blk.1.attn_qkv": layer.self_attn.k_proj,
        "blk.1.attn_output": layer.self_attn.o_proj,
        "blk.1.ffn_gate_up": layer.mlp.up_proj,
        "blk.1.ffn_down": layer.mlp.down_proj,
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, x, name=name: inputs.update({name: x[0]}))
    with torch.no_grad():
        source.model(calibration.tokens[held_out:])
    assert torch.equal(calibration.held_out, calibration.tokens[: held_out or samples])
    for name, read in inputs.items():
        x = torch.cat([read[:, :1]] * FIRST_TOKEN_WEIGHT + [read[:, 1:]], 1).flatten(0, 1)
        hessian = 2 / len(x) * x.t() @ x
        found = calibration.statistics.groups[name].hessian
        assert torch.allclose(found, hessian, rtol=1e-3, atol=1e-4 * float(hessian.max())), name


def test_what_an_embedding_error_costs_is_told_in_the_renumbered_models_order(odd_model):
    source = load_source(str(odd_model))
    calibration = calibrate(source, RECIPE)
    generator = torch.Generator().manual_seed(RECIPE.seed)
    found = collect_statistics(source, calibration.tokens, RECIPE.sensitivity_samples, generator).embedding
    assert torch.equal(calibration.statistics.embedding.frequency, found.frequency)
    assert torch.allclose(calibration.statistics.embedding.sensitivity, found.sensitivity, rtol=1e-2)
    assert found.sensitivity.std() > 0.1 * found.sensitivity.mean()


def test_an_embeddings_error_costs_what_the_same_error_of_a_head_does(even_model):
    """A head that reads channels of just that mean square, each on its own, and whose outputs matter as much."""
    source = load_source(str(even_model))
    calibration = calibrate(source, RECIPE)
    head, embedding = calibration.statistics.head, calibration.statistics.embedding
    channels = torch.diag(2 * embedding.sensitivity)
    alike = replace(
        head, measured=channels, order=torch.arange(len(channels)), sensitivity={"output": embedding.frequency}
    )
    calibration = replace(calibration, statistics=replace(calibration.statistics, head=alike))
    (table,) = columns.table_problems(source, calibration, replace(RECIPE, damping=1e-6))
    as_head, as_embedding = (errors_of(use, ("b2", "b4")) for use in table.uses)
    assert as_head.min() > 0
    assert torch.allclose(as_head, as_embedding, rtol=1e-3)


def test_more_bits_come_closer_to_the_original(even_model):
    original = load_source(str(even_model))
    target = torch.log_softmax(logits_of(original), -1)
    divergences = []
    for bits in (1.4, 2.5, 4.2):
        source = load_source(str(even_model))
        quantize(source, replace(RECIPE, bits=bits, embedding_format="b8", allocator="hessian"))
        divergences.append(float((target.exp() * (target - torch.log_softmax(logits_of(source), -1))).sum(-1).mean()))
    assert divergences[0] > 1.5 * divergences[1] > 3 * divergences[2] > 0


def test_rounding_is_every_weight_on_its_own(even_model):
    """Rows and columns of a matrix do not influence one another beyond their block of 64."""
    source = load_source(str(even_model))
    changed = copy.deepcopy(source)
    changed.layers[0].mlp.up_proj.weight.data[:, :64] *= -1.7
    first, second = (round_to_nearest(s, "b3", RECIPE) for s in (source, changed))
    for a, b in zip(first.linears(), second.linears(), strict=True):
        same = slice(64, None) if a.name == "blk.0.ffn_up" else slice(None)
        assert np.array_equal(a.dequantize()[:, same], b.dequantize()[:, same])
    assert {segment.format for linear in first.linears() for segment in linear.segments} == {"b3"}


def test_load_quantized_weights_restores_a_quantized_model(odd_model, odd_quantized):
    source = load_source(str(odd_model))
    load_quantized_weights(source, odd_quantized.result.model)
    assert torch.equal(logits_of(source), logits_of(odd_quantized.source))


def test_weights_of_another_shape_are_refused(even_model, odd_quantized):
    with pytest.raises(BadInputError, match="not the model that was quantized"):
        load_quantized_weights(load_source(str(even_model)), odd_quantized.result.model)


# The checkpoint


def checkpoint_bytes(model: Path, folder: Path, **recipe: object) -> dict[str, bytes]:
    source = load_source(str(model))
    asked = replace(RECIPE, **recipe)
    result = quantize(source, asked)
    write_checkpoint(
        folder,
        result.model,
        name=source.name,
        config=source.config,
        recipe=asked.to_json(),
        tokenizer_folder=source.tokenizer_folder,
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(even_model, tmp_path):
    first = checkpoint_bytes(even_model, tmp_path / "first")
    assert first == checkpoint_bytes(even_model, tmp_path / "second")
    assert first != checkpoint_bytes(even_model, tmp_path / "third", seed=1)


@pytest.mark.parametrize("quantized", ["even_quantized", "odd_quantized"])
def test_a_checkpoint_reads_back_as_it_was_written(request, quantized, tmp_path):
    quantized: Quantized = request.getfixturevalue(quantized)
    model, source = quantized.result.model, quantized.source
    write_checkpoint(
        tmp_path / "quantized",
        model,
        name="tiny",
        config=source.config,
        recipe=RECIPE.to_json(),
        tokenizer_folder=source.tokenizer_folder,
    )
    read = read_checkpoint(tmp_path / "quantized")
    assert read.name == "tiny" and read.model.hyperparameters == model.hyperparameters
    assert read.model.bits_stored == model.bits_stored
    assert (read.model.head is None) == (model.head is None)
    for a, b in zip(read.model.linears(), model.linears(), strict=True):
        assert (a.name, a.rows, a.columns) == (b.name, b.rows, b.columns)
        assert np.array_equal(a.dequantize(), b.dequantize())
    assert read.model.tensors.keys() == model.tensors.keys()
    assert all(np.array_equal(read.model.tensors[key], value) for key, value in model.tensors.items())
    assert (tmp_path / "quantized/tokenizer.json").read_bytes() == (
        source.tokenizer_folder / "tokenizer.json"
    ).read_bytes()


@pytest.fixture
def checkpoint(odd_model, odd_quantized, tmp_path) -> Path:
    write_checkpoint(
        tmp_path / "quantized",
        odd_quantized.result.model,
        name="tiny",
        config=odd_quantized.source.config,
        recipe={"bits": 2.5},
        tokenizer_folder=odd_model,
    )
    return tmp_path / "quantized"


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_checkpoint_cut_short_is_refused(checkpoint, keep):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(PackageError, match="not a complete quantized checkpoint"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda quantization: quantization["layout"]["groups"][0]["linears"][0]["segments"].append("b2"),
        lambda quantization: quantization["layout"]["groups"][0]["linears"][0].update(columns=500),
        lambda quantization: quantization.pop("layout"),
        lambda quantization: quantization["tensors"].append("nothing"),
    ],
    ids=["segment", "columns", "layout", "tensor"],
)
def test_a_checkpoint_whose_layout_does_not_fit_is_refused(checkpoint, change):
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="not a complete quantized checkpoint"):
        read_checkpoint(checkpoint)


def test_a_checkpoint_of_another_version_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="version 99 is not 'mgptq' version 1"):
        read_checkpoint(checkpoint)


# Models that cannot be quantized


@pytest.fixture
def broken(odd_model, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(odd_model, tmp_path / "broken"))


def test_a_weight_with_nan_is_named(broken):
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_source(str(broken))


def with_config(folder: Path, **values: object) -> str:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_another_family_is_refused_and_the_supported_ones_are_listed(broken):
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported; supported: .*llama"):
        load_source(with_config(broken, model_type="mamba"))


def test_another_activation_is_refused(broken):
    with pytest.raises(UnsupportedModelError, match="'gelu' is not supported"):
        load_source(with_config(broken, hidden_act="gelu"))


def test_a_quantized_model_is_refused(broken):
    with pytest.raises(BadInputError, match="quantized already"):
        load_source(with_config(broken, quantization_config={"quant_method": "gptq"}))


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_broken_configuration_is_refused(broken, content):
    (broken / "config.json").write_text(content)
    with pytest.raises(BadInputError, match=r"config\.json is not"):
        load_source(str(broken))


def test_weights_of_another_shape_than_the_configurations_are_refused(broken):
    with pytest.raises(BadInputError, match="cannot be loaded"):
        load_source(with_config(broken, hidden_size=192))


def test_missing_weights_are_refused(broken):
    state = load_file(broken / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match="up_proj"):
        load_source(str(broken))


@pytest.mark.parametrize("keep", [0, 5, 3000, 100_000])
def test_weights_cut_short_are_refused(broken, keep):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BadInputError):
        load_source(str(broken))


def test_a_folder_without_safetensors_is_refused(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"no \.safetensors weights"):
        load_source(str(broken))


def test_a_path_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="is no model"):
        load_source(str(tmp_path / "nothing" / "here"))
    with pytest.raises(BadInputError, match=r"no config\.json"):
        load_source(str(tmp_path))


# GGUF files


@pytest.fixture(scope="module")
def gguf_source(tmp_path_factory) -> tuple[SourceModel, Path]:
    """The Hugging Face model, and its folder, that the GGUF files are made of."""
    folder = write_llama(tmp_path_factory.mktemp("gguf") / "model", hidden_size=96, intermediate_size=224)
    return load_source(str(folder)), folder


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf_source, tmp_path):
    original, folder = gguf_source
    write_gguf(tmp_path / "tiny.gguf", original.model, folder)
    loaded = load_source(str(tmp_path / "tiny.gguf"))
    assert loaded.name == "tiny" and loaded.tied and loaded.family.name == "llama"
    assert torch.allclose(logits_of(loaded), logits_of(original), atol=1e-6)
    assert loaded.tokenizer is not None and original.tokenizer is not None
    words = "The assert statement, 42 times: naïve — def f(x):\n    return x"
    assert loaded.tokenizer.encode(words).ids == original.tokenizer.encode(words).ids


@pytest.mark.parametrize(
    ("file", "name"),
    [("Llama-3.2-1B.gguf", "Llama-3.2-1B"), ("Llama-3.2-1B.Q4_K_M.gguf", "Llama-3.2-1B"), ("a.F16.gguf", "a")],
)
def test_a_gguf_files_name_loses_its_type_only(gguf_source, tmp_path, file, name):
    original, folder = gguf_source
    write_gguf(tmp_path / file, original.model, folder)
    assert load_shape(str(tmp_path / file)).name == name


def test_a_gguf_file_with_scaled_rotary_frequencies_is_refused(gguf_source, tmp_path):
    original, folder = gguf_source
    write_gguf(tmp_path / "long.gguf", original.model, folder, rope_scaling=gguf.RopeScalingType.LINEAR)
    with pytest.raises(UnsupportedModelError, match="scaled rotary frequencies"):
        load_source(str(tmp_path / "long.gguf"))


def test_an_untied_gguf_file_stays_untied(odd_model, tmp_path):
    original = load_source(str(odd_model))
    write_gguf(tmp_path / "odd.gguf", original.model, odd_model)
    loaded = load_source(str(tmp_path / "odd.gguf"))
    assert not loaded.tied
    assert torch.allclose(logits_of(loaded), logits_of(original), atol=1e-6)


def test_a_quantized_gguf_file_gives_its_dequantized_weights(gguf_source, tmp_path):
    original, folder = gguf_source
    write_gguf(tmp_path / "q8.gguf", original.model, folder, gguf.GGMLQuantizationType.Q8_0)
    loaded = load_source(str(tmp_path / "q8.gguf"))
    for name, weight in loaded.model.state_dict().items():
        wanted = original.model.state_dict()[name]
        if wanted.dim() == 2:
            # Rows are quantized on their own, so their order does not matter here.
            packed = gguf.quantize(wanted.numpy(), gguf.GGMLQuantizationType.Q8_0)
            wanted = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        assert torch.equal(weight, wanted), name


def test_a_gguf_file_can_be_quantized(gguf_source, tmp_path):
    original, folder = gguf_source
    write_gguf(tmp_path / "tiny.gguf", original.model, folder)
    from_gguf = quantize(load_source(str(tmp_path / "tiny.gguf")), RECIPE).model
    from_folder = quantize(load_source(str(folder)), RECIPE).model
    for a, b in zip(from_gguf.linears(), from_folder.linears(), strict=True):
        assert np.array_equal(a.dequantize(), b.dequantize())


def test_a_gguf_file_without_one_of_its_weights_is_refused(gguf_source, tmp_path):
    original, folder = gguf_source
    write_gguf(tmp_path / "tiny.gguf", original.model, folder, without="blk.1.ffn_up.weight")
    with pytest.raises(BadInputError, match=r"up_proj|ffn_up"):
        load_source(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("keep", [0, 3, 40, 5000, 300_000])
def test_a_gguf_file_cut_short_is_refused(gguf_source, tmp_path, keep):
    original, folder = gguf_source
    path = tmp_path / "cut.gguf"
    write_gguf(path, original.model, folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInputError):
        load_source(str(path))


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'falcon' is not supported; supported: llama"):
        load_source(str(tmp_path / "other.gguf"))
