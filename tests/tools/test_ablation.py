"""The ablation measures what the commands deliver, and its table says how."""

import math
from dataclasses import replace
from pathlib import Path

import click
import pytest
from ablation import Bench, Row, perplexity_of, read_results, rows, settings_of, table, write_results

from mgptq_export.planning import plan_model
from mgptq_export.recipe import Recipe
from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.perplexity import measure_perplexity


def test_every_method_has_its_rows_and_seeds() -> None:
    keys = [row.key for row in rows(3)]
    assert len(keys) == len(set(keys))
    wanted = {
        "fp32/None/0",
        "rounding/3.25/0",
        "uniform + recovery/2.25/0",
        "hessian + recovery/3.0/2",
        "gnn + recovery/2.5/2",
    }
    wanted |= {"gnn, 16 samples/2.25/0", "gnn, mixed embedding + recovery/2.5/2"}
    assert wanted <= set(keys)


@pytest.mark.parametrize(
    "row",
    [
        Row("rounding", 2.25),
        Row("uniform", 3.25),
        Row("gnn", 2.6, 1),
        Row("hessian", 2.6, recovered=True),
        Row("gnn", 2.6, sampled=True),
    ],
)
def test_a_row_has_the_bits_that_it_names(bench: Bench, row: Row) -> None:
    measured = dict(bench.measure(row))
    assert list(measured) == [replace(row, recovered=False), row][: 1 + row.recovered]
    for result in measured.values():
        assert row.bits is not None
        assert row.bits - 0.05 < result["stored_bits"] <= row.bits
        assert math.isfinite(result["perplexity"]["text"])
    assert len({result["perplexity"]["text"] for result in measured.values()}) == len(measured)


def test_a_mixed_embedding_has_no_more_bytes(bench: Bench) -> None:
    (mixed,) = dict(bench.measure(Row("hessian", 2.6, mixed=True))).values()
    planned = plan_model(bench.model, replace(bench.recipe, bits=2.6), ["container"])["targets"]["container"]
    assert planned["model_bytes"] * 0.95 < mixed["bytes"] <= planned["model_bytes"]
    assert abs(mixed["stored_bits"] - 2.6) > 0.05


def test_perplexity_is_that_of_the_runtime(bench: Bench) -> None:
    """The NumPy backend is trusted."""
    from mgptq_export.quantize import round_to_nearest

    bench.calibration(bench.recipe)
    model = round_to_nearest(bench.source, "b3", bench.recipe)
    window = bench.windows["text"]
    found = measure_perplexity(NumpyBackend(model), window[0].tolist(), window=128, windows=1)
    assert perplexity_of(bench.source.model, window, "text") == pytest.approx(found.perplexity, rel=1e-4)


def test_the_table_gives_means_over_seeds_with_their_spread() -> None:
    results = [
        {
            "method": "gnn",
            "bits": 2.5,
            "stored_bits": 2.4999,
            "bytes": 5_000_000,
            "minutes": 2.0,
            "perplexity": {"A": p},
        }
        for p in (40.0, 42.0, 44.0)
    ]
    assert "| gnn | 2.4999 | 5.00 MB | 42.0 ± 2.0 | 3 | 2.0 |" in table(results, ["A"])


def test_rows_that_were_measured_otherwise_are_neither_mixed_in_nor_lost(tmp_path: Path, monkeypatch) -> None:
    path, measured = tmp_path / "ablation.json", {"gnn/2.5/0": {"method": "gnn"}}
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("one")
    other.write_text("other")
    settings = settings_of("folder/model", str(one), {"A": one}, 30)
    assert read_results(path, settings) == {}
    write_results(path, settings, measured)
    assert read_results(path, settings_of("elsewhere/model", str(one), {"A": one}, 30)) == measured
    for changed in (
        ("folder/model-2", str(one), {"A": one}, 30),
        ("folder/model", str(other), {"A": one}, 30),
        ("folder/model", str(one), {"A": other}, 30),
        ("folder/model", str(one), {"A": one, "B": one}, 30),
        ("folder/model", str(one), {"A": one}, 20),
    ):
        with pytest.raises(click.UsageError, match="measured otherwise"):
            read_results(path, settings_of(*changed))
    monkeypatch.setattr(Recipe, "to_json", lambda self: {"trials": 7})
    with pytest.raises(click.UsageError, match=rf"trials {Recipe.trials}, now 7.*; give another -o"):
        read_results(path, settings_of("folder/model", str(one), {"A": one}, 30))


def test_little_text_has_none_that_the_model_wrote(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(bench, "calibration", asked.append)
    monkeypatch.setattr(bench, "_quantize", None)
    for row in (Row("hessian", 2.5, samples=3), Row("hessian", 2.5)):
        with pytest.raises(TypeError):
            next(iter(bench.measure(row)))
    assert [recipe.own_samples for recipe in asked] == [0, Recipe.own_samples]
