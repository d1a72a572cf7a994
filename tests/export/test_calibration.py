"""What calibration measures, against plain NumPy and plain autograd, which are trusted."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from small_runs import RECIPE
from transformers import DynamicCache

from mgptq_export import pipeline
from mgptq_export.calibration import (
    FIRST_TOKEN_WEIGHT,
    LARGEST_WEIGHT,
    HessianAccumulator,
    attribute,
    calibration_tokens,
    collect_statistics,
    file_tokens,
    recovery_tokens,
)
from mgptq_export.calibration.head import backward_through_head
from mgptq_export.calibration.text import cache_for, drawn, skip_drawing
from mgptq_export.compute import compute_dtype, computing_in
from mgptq_export.hooks import hooked
from mgptq_export.models import SourceModel, load_source
from mgptq_runtime.errors import BadInputError, CalibrationError, NumericalError

EOS = 2


@pytest.fixture(scope="module")
def source(odd_model) -> SourceModel:
    return load_source(str(odd_model))


@pytest.fixture(scope="module")
def tokens(source) -> torch.Tensor:
    return torch.randint(331, (3, 24), generator=torch.Generator().manual_seed(5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(source: SourceModel, module: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """All activations that a module reads: float64 [sequences, tokens, columns]."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        source.model(tokens)
    handle.remove()
    return torch.cat(seen)


def hessian_of(x: torch.Tensor, first_token_weight: int) -> torch.Tensor:
    """Twice the mean outer product of activations [sequences, tokens, columns], first tokens written out."""
    repeated = torch.cat([x[:, :1]] * first_token_weight + [x[:, 1:]], 1).flatten(0, 1)
    return 2 / len(repeated) * repeated.t() @ repeated


@pytest.mark.parametrize("weight", [1, FIRST_TOKEN_WEIGHT])
def test_hessian_is_twice_the_mean_outer_product(weight):
    activations = torch.randn(5, 7, 12, generator=generator())
    accumulator = HessianAccumulator(12, torch.device("cpu"), first_token_weight=weight)
    for batch in activations.split(2):
        accumulator.add(batch)
    assert torch.allclose(accumulator.take().double(), hessian_of(activations.double(), weight), atol=1e-5)


def test_a_huge_token_counts_for_many_of_median_size_and_no_more():
    x = torch.randn(2, 20, 12, generator=generator())
    x[0, 0] *= 1000
    x[1, 7] *= 3000
    accumulator = HessianAccumulator(12, torch.device("cpu"))
    weights = accumulator.add(x).double()
    sizes = x.double().square().sum(-1)
    most = LARGEST_WEIGHT * sizes.flatten().sort().values[(sizes.numel() - 1) // 2]
    expected = torch.ones_like(sizes)
    expected[:, 0] = FIRST_TOKEN_WEIGHT
    for place in ((0, 0), (1, 7)):
        assert expected[place] * sizes[place] > 10 * most
        expected[place] = most / sizes[place]
    assert torch.allclose(weights, expected)
    products = (x.double() * expected.unsqueeze(-1)).flatten(0, 1).t() @ x.double().flatten(0, 1)
    assert torch.allclose(accumulator.take().double(), 2 / expected.sum() * products, rtol=1e-4, atol=1e-3)


def test_where_most_tokens_read_nothing_all_others_count():
    x = torch.zeros(1, 9, 4)
    x[0, :3] = torch.randn(3, 4, generator=generator())
    weights = HessianAccumulator(4, torch.device("cpu")).add(x)
    assert weights.tolist() == [[FIRST_TOKEN_WEIGHT, *[1] * 8]]


@pytest.mark.parametrize("layer", [0, 1])
def test_every_input_group_gets_the_hessian_of_its_input(source, tokens, layer):
    statistics = collect_statistics(source, tokens, 1, generator())
    block = source.model.model.layers[layer]
    modules = {
        "attn_qkv": block.self_attn.v_proj,
        "attn_output": block.self_attn.o_proj,
        "ffn_gate_up": block.mlp.up_proj,
        "ffn_down": block.mlp.down_proj,
    }
    for name, module in modules.items():
        x = inputs_of(source, module, tokens)
        found = statistics.groups[f"blk.{layer}.{name}"].hessian.double()
        expected = hessian_of(x, FIRST_TOKEN_WEIGHT)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    x = inputs_of(source, source.model.lm_head, tokens)
    assert torch.allclose(statistics.head.hessian.double(), hessian_of(x, 1), rtol=1e-4, atol=1e-4)


def test_sensitivity_is_the_mean_squared_gradient_of_the_sampled_loss(odd_model, tokens):
    """The oracle adds a zero to every linear's output, and asks autograd for the gradient of that zero."""
    source = load_source(str(odd_model))
    statistics = collect_statistics(source, tokens, 2, generator(3))
    names = {name: module for group in source.groups() for name, module in group.modules.items()}
    labels = generator(3)
    expected = {name: torch.zeros(module.out_features) for name, module in names.items()}
    for sequence in tokens[:2]:
        zeros, handles = {}, []
        for name, module in names.items():
            zeros[name] = torch.zeros(1, len(sequence), module.out_features, requires_grad=True)
            handles.append(module.register_forward_hook(lambda module, inputs, output, z=zeros[name]: output + z))
        logits = source.model(sequence[None]).logits[0]
        chosen = drawn(logits.detach().softmax(-1), labels)
        loss = -logits.log_softmax(-1).gather(1, chosen).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, [zeros[name] for name in names]), strict=True):
            expected[name] += gradient[0].square().sum(0) / (2 * tokens.shape[1])
        for handle in handles:
            handle.remove()
    for group in statistics.groups.values():
        for name, found in group.sensitivity.items():
            assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embedding_and_head_have_statistics_of_their_own(tmp_path, family):
    """The oracle adds a zero to what the embedding puts out, which Gemma multiplies, and asks for its gradient."""
    source = load_source(str(tiny_models.write_model(tmp_path / "model", family)))
    embedding, vocabulary = source.model.get_input_embeddings(), source.model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (3, 16), generator=generator(1))
    statistics = collect_statistics(source, tokens, 2, generator(3))
    labels, multiplier = generator(3), 1.0 if family == "llama" else source.model.config.hidden_size**0.5
    variance, squares = torch.zeros(vocabulary), torch.zeros(source.model.config.hidden_size)
    for sequence in tokens[:2]:
        zeros = torch.zeros(1, len(sequence), len(squares), requires_grad=True)
        with hooked([embedding.register_forward_hook(lambda module, inputs, output, z=zeros: output + z)]):
            logits = source.model(sequence[None]).logits[0]
        p = logits.detach().softmax(-1)
        loss = -logits.log_softmax(-1).gather(1, drawn(p, labels)).sum()
        squares += (multiplier * torch.autograd.grad(loss, zeros)[0][0]).square().sum(0) / 32
        variance += (p - p.square()).sum(0) / 32
    assert torch.allclose(statistics.head.sensitivity["output"], variance, rtol=1e-4, atol=1e-8)
    assert torch.allclose(statistics.embedding.sensitivity, squares, rtol=1e-3, atol=1e-9)
    assert statistics.embedding.frequency.tolist() == [(tokens == i).float().mean().item() for i in range(vocabulary)]


def test_measuring_leaves_no_hooks_and_no_gradients(source, tokens):
    collect_statistics(source, tokens, 1, generator())
    assert all(parameter.grad is None for parameter in source.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in source.model.modules())


def test_activations_that_overflow_are_an_error(odd_model, tokens):
    source = load_source(str(odd_model))
    source.model.model.layers[1].mlp.down_proj.weight.data.fill_(1e38)
    with pytest.raises(NumericalError, match="NaN or infin"):
        collect_statistics(source, tokens, 1, generator())


def test_self_calibration_is_full_sequences_without_end_of_text(source):
    recipe = replace(RECIPE, samples=6, sequence_length=40)
    tokens = calibration_tokens(source, recipe)
    assert tokens.shape == (6, 40) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 331
    assert EOS not in tokens[:, 1:]
    assert torch.equal(tokens, calibration_tokens(source, recipe))
    assert not torch.equal(tokens, calibration_tokens(source, replace(recipe, seed=1)))


def test_self_calibration_never_writes_an_end_of_text_that_the_model_insists_on(odd_model):
    source = load_source(str(odd_model))
    # A head that answers every state with end-of-text, whichever sign its one feature has.
    source.model.lm_head.weight.data.zero_()
    source.model.lm_head.weight.data[EOS] = 100.0
    source.model.lm_head.weight.data[7] = -100.0
    source.model.config.eos_token_id = [EOS, 7]
    tokens = calibration_tokens(source, replace(RECIPE, samples=8, sequence_length=30))
    assert not {EOS, 7} & set(tokens[:, 1:].flatten().tolist())


def chunks_of(text_file: Path, source: SourceModel, length: int) -> set[tuple[int, ...]]:
    """All that a text is cut into, in tokens."""
    whole = file_tokens(text_file, source)
    return {tuple(whole[i : i + length]) for i in range(0, len(whole) - length + 1, length)}


def test_text_calibration_is_cut_from_the_text(source, text_file):
    recipe = replace(RECIPE, calibration=str(text_file), samples=5, own_samples=0, sequence_length=32)
    tokens = calibration_tokens(source, recipe)
    chunks = chunks_of(text_file, source, 32)
    assert tokens.shape == (5, 32)
    assert {tuple(sample.tolist()) for sample in tokens} <= chunks
    assert torch.equal(tokens, calibration_tokens(source, recipe))
    assert not torch.equal(tokens, calibration_tokens(source, replace(recipe, seed=1)))


def test_what_the_model_writes_goes_with_a_text_to_calibration_and_recovery(source, text_file):
    recipe = replace(RECIPE, calibration=str(text_file), samples=5, own_samples=3, sequence_length=32)
    tokens = calibration_tokens(source, recipe)
    chunks = chunks_of(text_file, source, 32)
    own = {tuple(sample.tolist()) for sample in tokens} - chunks
    assert tokens.shape == (8, 32) and len(own) == 3
    assert [tuple(sample.tolist()) in own for sample in tokens] != [False] * 5 + [True] * 3
    recovery = [tuple(sample.tolist()) for sample in recovery_tokens(source, recipe, tokens)]
    assert len(recovery) == len(chunks) + 3 and set(recovery) == chunks | own


def test_a_run_recovers_on_all_of_the_text(even_model, text_file, tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def recover(working, source, model, tokens, **options):
        raise ReachedError(tokens)

    monkeypatch.setattr(pipeline, "recover", recover)
    recipe = replace(RECIPE, calibration=str(text_file), own_samples=3, recovery_steps=1, allocator="uniform")
    with pytest.raises(ReachedError) as reached:
        pipeline.run(str(even_model), tmp_path / "out", recipe, ["container"])
    chunks = chunks_of(text_file, load_source(str(even_model)), recipe.sequence_length)
    trained = {tuple(sample.tolist()) for sample in reached.value.args[0]}
    assert len(chunks) > recipe.samples and chunks <= trained and len(trained - chunks) == 3


def test_what_is_sampled_at_once_is_bounded(source, monkeypatch):
    config, recipe = source.model.config, replace(RECIPE, samples=5, sequence_length=12)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    sequence = 2 * config.num_hidden_layers * heads * size * 12 * compute_dtype(source.model.device).itemsize
    monkeypatch.setattr("mgptq_export.calibration.text.CACHE_BYTES", 2 * sequence)
    sizes = []
    forward = type(source.model).forward
    monkeypatch.setattr(
        type(source.model), "forward", lambda self, ids, **rest: sizes.append(len(ids)) or forward(self, ids, **rest)
    )
    assert calibration_tokens(source, recipe).shape == (5, 12)
    assert sizes == [2] * 11 + [2] * 11 + [1] * 11


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_and_values_are_those_of_the_models_own_cache(family):
    model = tiny_models.make_model(family, attn_implementation="sdpa")
    roomy, own = cache_for(model, 24), DynamicCache(config=model.config)
    for step in torch.arange(72).view(3, 24).split([5, *[1] * 19], dim=1):
        with torch.no_grad():
            found, expected = (model(step, cache=cache).logits for cache in (roomy, own))
        assert torch.equal(found, expected)
    pairs = list(zip(roomy.layers, own.layers, strict=True))
    assert any(type(a) is not type(b) for a, b in pairs)
    assert all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def test_sampling_draws_by_probability():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).repeat(4000, 1)
    places = drawn(probabilities, generator())
    counts = torch.bincount(places[:, 0], minlength=6) / 4000
    assert places.shape == (4000, 1)
    assert (counts[[0, 2, 5]] == 0).all() and (counts - probabilities[0]).abs().max() < 0.03


def test_drawing_for_some_rows_at_a_time_draws_the_same(monkeypatch):
    probabilities = torch.rand(40, 30, generator=generator()).softmax(-1)
    whole = drawn(probabilities, generator(1))
    monkeypatch.setattr("mgptq_export.compute.CACHED_NUMBERS", 7 * 30)
    assert torch.equal(drawn(probabilities, generator(1)), whole)


def test_what_another_rank_draws_is_skipped_and_what_follows_is_the_same():
    drawing, skipping = generator(1), generator(1)
    drawn(torch.full((40, 30), 1 / 30), drawing)
    skip_drawing(40, skipping)
    assert torch.equal(drawing.get_state(), skipping.get_state())


def test_text_that_is_short_is_used_up_with_a_warning(source, tmp_path, caplog):
    path = tmp_path / "short.txt"
    path.write_text(tiny_models.text())
    recipe = replace(RECIPE, calibration=str(path), samples=1000, own_samples=0, sequence_length=250)
    tokens = calibration_tokens(source, recipe)
    assert len(tokens) == len(file_tokens(path, source)) // 250
    assert f"only {len(tokens)} calibration sequences, 1000 were asked for; more text would help" in caplog.text


def test_text_too_short_says_how_much_there_is_and_how_much_is_needed(source, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words only.")
    available = len(file_tokens(path, source))
    recipe = replace(RECIPE, calibration=str(path), samples=3, sequence_length=50)
    with pytest.raises(CalibrationError, match=rf"gives {available} tokens, one sequence needs 50\b"):
        calibration_tokens(source, recipe)


def test_a_sequence_beyond_the_context_is_refused(source):
    with pytest.raises(BadInputError, match=r"257 .* context of 256"):
        calibration_tokens(source, replace(RECIPE, sequence_length=257))


def test_text_without_a_tokenizer_is_refused(odd_model, text_file):
    source = load_source(str(odd_model))
    source.tokenizer = None
    with pytest.raises(BadInputError, match="no tokenizer"):
        calibration_tokens(source, replace(RECIPE, calibration=str(text_file)))


def test_tokens_of_a_file_are_those_of_its_joined_documents_without_special_ones(source, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "First é."}) + "\n\n" + json.dumps({"text": "Second."}) + "\n")
    expected = source.tokenizer.encode("First é.\n\nSecond.", add_special_tokens=False).ids
    assert file_tokens(path, source) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "field 'text'"),
        ("a.jsonl", b'{"words": "x"}\n', "field 'text'"),
        ("a.jsonl", b"[1]\n", "field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_unusable_text_files_are_refused(source, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        file_tokens(path, source)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = tiny_models.write_llama(tmp_path / "model")
    tiny_models.write_tokenizer(folder, 400)
    (tmp_path / "text.txt").write_text(tiny_models.text(20_000))
    with pytest.raises(BadInputError, match="the model's vocabulary is 0 to 330"):
        file_tokens(tmp_path / "text.txt", load_source(str(folder)))


# What each linear costs a quantized model


def disturbed(source: SourceModel, share: float, only: str = "") -> SourceModel:
    """A copy whose linears, or the one named, are off by a share of their size."""
    random, copy = generator(3), source.copy()
    for group in copy.groups():
        for name, module in group.modules.items():
            noise = torch.randn(module.weight.shape, generator=random)
            if only in ("", name):
                module.weight.data += share * module.weight.std() * noise
    return copy


def test_the_losses_of_all_linears_come_to_the_divergence_while_errors_are_small(source, tokens):
    """Trusted: the divergence, computed from the logits of both models."""
    quantized = disturbed(source, 0.02)
    found = attribute(source, quantized, tokens)
    with torch.no_grad():
        p, q = (torch.log_softmax(one.model(tokens).logits.double(), -1) for one in (source, quantized))
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert sum(float(losses.mean()) for losses in found.losses.values()) == pytest.approx(found.divergence, rel=0.05)


@pytest.mark.parametrize("name", ["blk.0.attn_v", "blk.1.ffn_down"])
def test_the_loss_is_that_of_the_linear_with_the_error(source, tokens, name):
    found = attribute(source, disturbed(source, 0.02, only=name), tokens)
    assert float(found.losses[name].mean()) == pytest.approx(found.divergence, rel=0.1)
    assert all(not losses.any() for other, losses in found.losses.items() if other != name)
    assert all(len(losses) == len(tokens) for losses in found.losses.values())


def test_only_what_was_lost_by_rounding_counts_where_weights_had_been_changed_before(source, tokens):
    """A quarter of each linear's error was there before it was rounded, of one linear all of it."""
    quantized = disturbed(source, 0.02)
    pairs = zip(source.groups(), quantized.groups(), strict=True)
    weights = {
        name: (module.weight, after.modules[name].weight)
        for before, after in pairs
        for name, module in before.modules.items()
    }
    targets = {name: 0.75 * before + 0.25 * after for name, (before, after) in weights.items()}
    targets["blk.0.attn_v"] = weights["blk.0.attn_v"][1].half()
    whole, rounding = attribute(source, quantized, tokens), attribute(source, quantized, tokens, targets)
    assert rounding.divergence == whole.divergence
    for name, losses in rounding.losses.items():
        wanted = (0.0 if name == "blk.0.attn_v" else 0.75) * whole.losses[name]
        assert torch.allclose(losses, wanted, rtol=1e-3, atol=1e-3 * whole.divergence), name


def test_a_model_that_was_quantized_to_no_numbers_is_an_error(source, tokens):
    broken = source.copy()
    broken.groups()[0].modules["blk.0.attn_v"].weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match="quantized model's logits are NaN"):
        attribute(source, broken, tokens)


def test_logits_are_in_float32_for_a_few_positions_at_a_time_which_changes_no_gradient(monkeypatch):
    head = torch.nn.Linear(6, 50, bias=False).requires_grad_(False)
    found = []
    for at_once in (1 << 18, 7 * 50):
        monkeypatch.setattr("mgptq_export.compute.CACHED_NUMBERS", at_once)
        hidden, sizes = torch.randn(20, 6, generator=generator()).requires_grad_(True), []

        def loss_of(logits: torch.Tensor, others: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(logits))
            assert logits.dtype == torch.float32
            return (logits.log_softmax(-1) * others).sum()

        with computing_in(torch.bfloat16, hidden.device):
            loss = backward_through_head(hidden * 1, head, loss_of, (hidden.detach(), head))
        found.append((loss, hidden.grad, sizes))
    assert found[0][2] == [20] and found[1][2] == [7, 7, 6]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert torch.equal(found[1][1], found[0][1])


def test_logits_are_gone_before_the_way_back_through_the_layers():
    head = torch.nn.Linear(6, 50, bias=False).requires_grad_(False)
    made, left = [], []
    head.register_forward_hook(lambda module, inputs, logits: made.append(weakref.ref(logits)))
    hidden = torch.randn(20, 6, generator=generator()).requires_grad_(True)
    hidden.register_hook(lambda gradient: left.append([logits() for logits in made]))
    backward_through_head(hidden * 1, head, lambda logits: logits.square().sum())
    assert left == [[None]]


def test_logits_are_held_for_a_few_positions_at_a_time_which_changes_nothing(source, tokens, monkeypatch):
    quantized, rows = disturbed(source, 0.3), []
    handles = [
        one.model.lm_head.register_forward_hook(lambda *call: rows.append(len(call[2]))) for one in (source, quantized)
    ]
    whole = attribute(source, quantized, tokens), collect_statistics(source, tokens, 1, generator())
    rows.clear()
    monkeypatch.setattr("mgptq_export.calibration.head.LOGITS_AT_ONCE", 7 * 331)
    parts = attribute(source, quantized, tokens), collect_statistics(source, tokens, 1, generator())
    for handle in handles:
        handle.remove()
    assert max(rows) == 7 and sum(rows) == (2 * 3 + 1) * 24
    assert parts[0].divergence == pytest.approx(whole[0].divergence, rel=1e-4)
    for name, losses in whole[0].losses.items():
        assert torch.allclose(parts[0].losses[name], losses, rtol=1e-3, atol=1e-7), name
    for name, group in whole[1].groups.items():
        for linear, values in group.sensitivity.items():
            assert torch.allclose(parts[1].groups[name].sensitivity[linear], values, rtol=1e-3, atol=1e-9), linear


def test_bfloat16_measures_nearly_the_same(source, tokens, monkeypatch):
    quantized = disturbed(source, 0.3)
    exact, hessian = attribute(source, quantized, tokens), collect_statistics(source, tokens, 1, generator())
    monkeypatch.setattr("mgptq_export.compute._multiplies_bfloat16", lambda device: True)
    rounded, other = attribute(source, quantized, tokens), collect_statistics(source, tokens, 1, generator())
    assert rounded.divergence == pytest.approx(exact.divergence, rel=0.05)
    assert rounded.divergence != exact.divergence
    for name, group in hessian.groups.items():
        scale = float(group.hessian.abs().max())
        assert torch.allclose(other.groups[name].hessian, group.hessian, atol=0.03 * scale)
