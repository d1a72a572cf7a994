"""Recovery: codes stay, scales, norms and biases bring the original's predictions back."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_models
import torch
from small_runs import RECIPE

from mgptq_export.layouts import LAYOUTS
from mgptq_export.models import SourceModel, load_quantized_weights, load_source
from mgptq_export.quantize import quantize
from mgptq_export.recovery import recover, training
from mgptq_export.recovery.divergence import divergence
from mgptq_export.recovery.matrix import BlockMatrix
from mgptq_export.recovery.modules import BlockEmbedding, BlockLinear, RootMeanSquareNorm
from mgptq_export.recovery.optimizer import cosine
from mgptq_export.recovery.student import trainable
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.formats import FORMATS, GGML_FORMATS, BlockParameters
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel, Segment

pytestmark = pytest.mark.slow

SINGLE = torch.float32
LENGTH = 48


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Case:
    """A quantized tiny model; ``folder`` holds the original."""

    folder: Path
    source: SourceModel
    model: QuantizedModel
    tokens: torch.Tensor
    unseen: torch.Tensor

    def original(self) -> SourceModel:
        return load_source(str(self.folder))

    def recover(self, *, steps: int = 24, **options: object) -> tuple[SourceModel, QuantizedModel]:
        """The model with its recovered weights, and the recovered quantized model."""
        settings = {"batch_tokens": 192, "learning_rate": 0.02, "seed": 3, "dtype": SINGLE, **options}
        source = self.source.copy()
        recovered = recover(source, self.original(), self.model, self.tokens, steps=steps, **settings)  # type: ignore[arg-type]
        return source, recovered.model


def _disturbed(model: QuantizedModel, generator: torch.Generator) -> QuantizedModel:
    """With scales off by a quarter: random weights leave little that better scales could recover."""

    def worse(linear: QuantizedLinear) -> QuantizedLinear:
        matrix = BlockMatrix(linear, torch.device("cpu"))
        with torch.no_grad():
            matrix.d.mul_(1 + 0.25 * torch.randn(matrix.d.shape, generator=generator))
        matrix.round()
        return matrix.quantized()

    groups = tuple(replace(group, linears=tuple(map(worse, group.linears))) for group in model.groups)
    head = None if model.head is None else worse(model.head)
    return replace(model, groups=groups, embedding=worse(model.embedding), head=head)


SIZES: dict[str, dict[str, int]] = {
    "columns": {},
    "tensors": {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 12, "num_hidden_layers": 4},
}


def _case(folder: Path, family: str, layout: str) -> Case:
    path = tiny_models.write_model(folder, family, **SIZES[layout])
    source = load_source(str(path))
    recipe = replace(RECIPE, bits=3.0, allocator="hessian", embedding_format="b4")
    generator = torch.Generator().manual_seed(5)
    model = _disturbed(quantize(source, recipe, LAYOUTS[layout]).model, generator)
    load_quantized_weights(source, model)
    tokens = torch.randint(source.model.config.vocab_size, (40, LENGTH), generator=generator)
    return Case(path, source, model, tokens[:36], tokens[36:])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    made: dict[tuple[str, str], Case] = {}

    def get(family: str, layout: str) -> Case:
        if (family, layout) not in made:
            made[family, layout] = _case(tmp_path_factory.mktemp("recovery"), family, layout)
        return made[family, layout]

    return get


def _random_linear(
    fmt: str, rows: int, columns: int, permuted: bool, seed: int = 0, size: float = 0.05
) -> QuantizedLinear:
    """A linear of random codes and, around ``size``, scales in one format."""
    random = np.random.default_rng(seed)
    known = FORMATS.get(fmt) or GGML_FORMATS[fmt]
    width = -(-columns // known.block_columns) * known.block_columns
    codes = random.integers(0, known.levels, (rows, width)).astype(np.uint8)

    def halves() -> np.ndarray:
        return (random.normal(size=(rows, width // known.block_columns)) * size).astype(np.float16)

    if fmt in FORMATS:
        data = FORMATS[fmt].pack(codes, halves())
    else:
        ggml = GGML_FORMATS[fmt]
        sub_blocks = (rows, width // ggml.sub_columns)
        low, high = ggml.scale_range or (0, 0)
        data = ggml.pack(
            codes,
            BlockParameters(
                halves(),
                random.integers(low, high + 1, sub_blocks).astype(np.int16) if ggml.scale_range else None,
                halves() if ggml.largest_min else None,
                random.integers(0, ggml.largest_min + 1, sub_blocks).astype(np.int16) if ggml.largest_min else None,
            ),
        )
    permutation = random.permutation(columns).astype(np.int32) if permuted else None
    return QuantizedLinear("blk.0.ffn_down", rows, columns, (Segment(fmt, data),), permutation)


ALL_FORMATS = [(fmt, columns, permuted) for fmt in FORMATS for columns in (200, 256) for permuted in (True, False)]
ALL_FORMATS += [(fmt, 256, False) for fmt in GGML_FORMATS]


def _dense(matrix: BlockMatrix) -> torch.Tensor:
    """The weights as plain differentiable arithmetic on whole stored blocks, in the model's own column order."""
    factors, linear = matrix.factors(), matrix.linear
    order = torch.arange(linear.columns) if linear.permutation is None else torch.from_numpy(linear.permutation).long()
    padding = sum(segment.columns for segment in linear.segments) - linear.columns
    stored = torch.nn.functional.pad(matrix.values[:, order].float(), (0, padding))
    weight = stored.view(*factors.scales.shape, -1) * factors.scales.unsqueeze(-1)
    if factors.minima is not None:
        weight = weight - factors.minima.unsqueeze(-1)
    return weight.flatten(1)[:, order.argsort()]


def _assert_close_gradients(matrix: BlockMatrix, ours: torch.Tensor, dense: torch.Tensor, x: torch.Tensor) -> None:
    inputs = [x, *matrix.parameters()]
    for found, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("fmt", "columns", "permuted"), ALL_FORMATS)
def test_a_matrix_holds_the_weights_of_its_linear(fmt: str, columns: int, permuted: bool) -> None:
    """Trusted: the runtime's dequantization."""
    linear = _random_linear(fmt, 7, columns, permuted)
    matrix = BlockMatrix(linear, torch.device("cpu"))
    weight = matrix.weight(matrix.factors(), SINGLE).detach()
    np.testing.assert_array_equal(weight.numpy(), linear.dequantize())
    matrix.round()
    same = matrix.quantized()
    np.testing.assert_array_equal(same.segments[0].data, linear.segments[0].data)


@pytest.mark.parametrize("fmt", GGML_FORMATS)
def test_scales_of_ggml_types_may_be_subnormal(fmt: str) -> None:
    """As q6_k's are, and q4_k's of small weights. Trusted: rounding to float16."""
    linear = _random_linear(fmt, 7, 256, permuted=False, size=2e-6)
    matrix = BlockMatrix(linear, torch.device("cpu"))
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.mul_(1.01)
    expected = [parameter.detach().half().float() for parameter in matrix.parameters()]
    matrix.round()
    for parameter, wanted in zip(matrix.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "columns", "permuted"), ALL_FORMATS)
def test_gradients_of_a_linear_are_those_of_a_dense_one(
    fmt: str, columns: int, permuted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that do not divide the whole. Trusted: autograd on plain arithmetic."""
    monkeypatch.setattr("mgptq_export.compute.CACHED_NUMBERS", 3 * columns)
    monkeypatch.setattr("mgptq_export.recovery.modules.TRANSPOSED_ROWS", 4)
    matrix = BlockMatrix(_random_linear(fmt, 7, columns, permuted), torch.device("cpu"))
    x = torch.randn(2, 5, columns, requires_grad=True)
    target = torch.randn(2, 5, 7)
    ours, dense = BlockLinear(matrix, None, SINGLE)(x), x @ _dense(matrix).T
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    _assert_close_gradients(matrix, (ours * target).sum(), (dense * target).sum(), x)


@pytest.mark.parametrize(("fmt", "columns"), [("b4", 200), ("b4", 256), ("q8_0", 256), ("q4_k", 256)])
def test_gradients_of_an_embedding_are_those_of_a_dense_one(fmt: str, columns: int) -> None:
    matrix = BlockMatrix(_random_linear(fmt, 40, columns, False), torch.device("cpu"))
    tokens = torch.randint(40, (3, 20))
    target = torch.randn(3, 20, columns)
    ours, dense = BlockEmbedding(matrix, 1.5)(tokens), _dense(matrix)[tokens] * 1.5
    torch.testing.assert_close(ours, dense)
    inputs = matrix.parameters()
    found, wanted = (torch.autograd.grad((rows * target).sum(), inputs) for rows in (ours, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_of_a_norm_are_those_of_plain_arithmetic(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that do not divide the whole."""
    monkeypatch.setattr("mgptq_export.compute.CACHED_NUMBERS", 4 * 24)
    x, weight = torch.randn(2, 5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    target = torch.randn(2, 5, 24)
    ours = RootMeanSquareNorm(weight, offset, 0.01, SINGLE)(x)
    plain = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * (weight + offset)
    torch.testing.assert_close(ours, plain)
    found, wanted = (torch.autograd.grad((y * target).sum(), [x, weight]) for y in (ours, plain))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("fmt", "columns"), [("b2", 200), ("b4", 256), ("q4_k", 256)])
def test_gradients_of_the_divergence_are_those_of_all_logits(
    fmt: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, none of which divides the whole."""
    monkeypatch.setattr("mgptq_export.recovery.divergence.POSITIONS", 8)
    monkeypatch.setattr("mgptq_export.recovery.divergence.CACHED_LOGITS", 3 * 50)
    monkeypatch.setattr("mgptq_export.recovery.divergence.VOCABULARY_PIECE", 16)
    matrix = BlockMatrix(_random_linear(fmt, 50, columns, False), torch.device("cpu"))
    x = torch.randn(21, columns, requires_grad=True)
    states, head = torch.randn(21, 30), torch.randn(50, 30)
    ours = divergence(x, matrix, states, head)
    predicted = torch.log_softmax(x @ _dense(matrix).T, -1)
    dense = torch.nn.functional.kl_div(
        predicted, torch.log_softmax(states @ head.T, -1), None, None, "batchmean", log_target=True
    )
    torch.testing.assert_close(ours, dense)
    _assert_close_gradients(matrix, 3.0 * ours, 3.0 * dense, x)


FAMILIES = [("llama", "columns"), ("gemma3", "columns"), ("phi3", "columns"), ("qwen2", "columns")]
FAMILIES += [("llama", "tensors"), ("gemma3", "tensors"), ("phi3", "tensors")]


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_the_trainable_model_computes_what_the_quantized_one_does(
    cases: Callable[[str, str], Case], family: str, layout: str
) -> None:
    """Trusted: transformers on the dequantized weights."""
    case = cases(family, layout)
    source = case.source.copy()
    modules = dict(source.model.named_modules())
    with torch.no_grad():
        wanted = source.model.model(case.tokens).last_hidden_state
        with trainable(source, case.model, SINGLE):
            found = source.model.model(case.tokens).last_hidden_state
            assert found.grad_fn is None and dict(source.model.named_modules()) != modules
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert dict(source.model.named_modules()) == modules
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def _kl(original: SourceModel, other: SourceModel, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        wanted, found = (torch.log_softmax(one.model(tokens).logits.double(), -1) for one in (original, other))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_recovery_brings_predictions_on_unseen_text_closer(
    cases: Callable[[str, str], Case], family: str, layout: str
) -> None:
    case = cases(family, layout)
    source, _ = case.recover()
    original = case.original()
    assert _kl(original, source, case.unseen) < 0.75 * _kl(original, case.source, case.unseen)


def _codes(model: QuantizedModel) -> list[np.ndarray]:
    tables = [model.embedding, *([] if model.head is None else [model.head])]
    segments = [segment for linear in (*model.linears(), *tables) for segment in linear.segments]
    return [(FORMATS.get(s.format) or GGML_FORMATS[s.format]).unpack(s.data)[0] for s in segments]


def _shape(model: QuantizedModel) -> list[object]:
    """All that is to stay, besides codes."""
    tables = [model.embedding, *([] if model.head is None else [model.head])]
    linears = [*model.linears(), *tables]
    parts: list[object] = [model.family, model.hyperparameters, sorted(model.tensors)]
    for linear in linears:
        order = None if linear.permutation is None else linear.permutation.tolist()
        parts.append((linear.name, linear.rows, linear.columns, [s.format for s in linear.segments], order))
    return parts


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_only_scales_norms_and_biases_change(cases: Callable[[str, str], Case], family: str, layout: str) -> None:
    case = cases(family, layout)
    _, model = case.recover(steps=2)
    assert _shape(model) == _shape(case.model)
    for found, wanted in zip(_codes(model), _codes(case.model), strict=True):
        np.testing.assert_array_equal(found, wanted)
    changed = {name for name, value in model.tensors.items() if not np.array_equal(value, case.model.tensors[name])}
    fixed = {name for name in model.tensors if "rope" in name}
    assert changed == set(model.tensors) - fixed
    assert family != "qwen2" or "blk.0.attn_q_bias" in changed
    for found, wanted in zip(model.linears(), case.model.linears(), strict=True):
        assert all((a.data != b.data).any() for a, b in zip(found.segments, wanted.segments, strict=True))


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_the_model_holds_what_the_files_will(cases: Callable[[str, str], Case], family: str, layout: str) -> None:
    case = cases(family, layout)
    source, model = case.recover(steps=2)
    modules = {name: module for group in source.groups() for name, module in group.modules.items()}
    for linear in model.linears():
        np.testing.assert_array_equal(modules[linear.name].weight.numpy(), linear.dequantize())
    np.testing.assert_array_equal(source.model.model.embed_tokens.weight.numpy(), model.embedding.dequantize())
    head = model.head or model.embedding
    np.testing.assert_array_equal(source.model.lm_head.weight.numpy(), head.dequantize())
    assert source.tied == (model.head is None)
    for name, value in source.family.other_tensors(source.model).items():
        np.testing.assert_allclose(value, model.tensors[name], rtol=1e-6, atol=1e-7)


def _same(one: QuantizedModel, other: QuantizedModel) -> bool:
    linears = zip((*one.linears(), one.embedding), (*other.linears(), other.embedding), strict=True)
    pairs = [(s.data, t.data) for a, b in linears for s, t in zip(a.segments, b.segments, strict=True)]
    pairs += [(one.tensors[name], other.tensors[name]) for name in one.tensors]
    return all(np.array_equal(a, b) for a, b in pairs)


def _parameters_equal(one: SourceModel, other: SourceModel) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_model(cases: Callable[[str, str], Case]) -> None:
    case = cases("llama", "columns")
    models = [case.recover(steps=3, seed=seed)[1] for seed in (1, 1, 2)]
    assert _same(models[0], models[1]) and not _same(models[0], models[2])


def test_no_steps_change_nothing(cases: Callable[[str, str], Case]) -> None:
    case = cases("llama", "columns")
    source, model = case.recover(steps=0)
    assert model is case.model
    assert _parameters_equal(source, case.source)


def test_a_model_that_got_worse_is_dropped(cases: Callable[[str, str], Case], caplog: pytest.LogCaptureFixture) -> None:
    case = cases("gemma3", "columns")
    source, model = case.recover(steps=3, learning_rate=30.0)
    assert model is case.model and "recovery did not lower the loss" in caplog.text
    assert _parameters_equal(source, case.source)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_loss_that_is_no_number_is_an_error(cases: Callable[[str, str], Case]) -> None:
    case = cases("llama", "columns")
    broken = case.original()
    broken.model.lm_head.weight.data[5] = float("nan")
    source = case.source.copy()
    with pytest.raises(NumericalError, match="the loss of recovery is nan"):
        recover(source, broken, case.model, case.tokens, steps=1, seed=0, dtype=SINGLE)
    assert _parameters_equal(source, case.source)


def test_minutes_become_steps_that_give_the_same_model_again(cases: Callable[[str, str], Case]) -> None:
    case = cases("llama", "columns")
    options = {"batch_tokens": 192, "learning_rate": 0.02, "dtype": SINGLE}
    timed = recover(case.source.copy(), case.original(), case.model, case.tokens, minutes=0.01, **options)  # type: ignore[arg-type]
    assert timed.steps >= 1
    again = recover(case.source.copy(), case.original(), case.model, case.tokens, steps=timed.steps, **options)  # type: ignore[arg-type]
    for one, other in zip(timed.model.linears(), again.model.linears(), strict=True):
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())
    assert recover(case.source.copy(), case.original(), case.model, case.tokens, minutes=1e-9, **options).steps == 1  # type: ignore[arg-type]


def test_minutes_become_as_many_steps_as_they_have_room_for(
    cases: Callable[[str, str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes two seconds."""
    monkeypatch.setattr(training, "time", Mock(monotonic=itertools.count(0, 2).__next__))
    case = cases("llama", "columns")
    assert recover(case.source.copy(), case.original(), case.model, case.tokens, minutes=1, dtype=SINGLE).steps == 30


def test_bfloat16_recovers_as_well(cases: Callable[[str, str], Case]) -> None:
    case = cases("llama", "columns")
    source, _ = case.recover(dtype=torch.bfloat16)
    original = case.original()
    assert _kl(original, source, case.unseen) < 0.75 * _kl(original, case.source, case.unseen)


def test_all_text_is_used_before_any_comes_again() -> None:
    chosen, batches = training._draw(7, 5, 2, seed=0)
    assert chosen.tolist() == list(range(7)) and [len(batch) for batch in batches] == [2] * 5
    order = torch.cat(batches).tolist()
    assert sorted(order[:7]) == list(range(7)) and len(set(order[7:])) == 3
    few, _ = training._draw(1000, 2, 3, seed=0)
    assert len(few) == 6


def test_steps_are_shorter_where_little_is_lost() -> None:
    assert [training._share_of_rate(loss) for loss in (-1e-9, 0.0, 0.125, 0.5, 3.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [cosine(step, 20, 2) for step in range(20)]
    assert rates.index(max(rates)) == 2 and rates[0] == pytest.approx(1 / 3) and 0 < rates[-1] < 0.01
