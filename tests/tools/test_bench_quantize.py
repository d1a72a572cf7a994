"""The benchmark says what stages took, divides ours by the peer's, and measures nothing twice."""

import json
import sys
from pathlib import Path

import bench_quantize
import pytest
from bench_quantize import (
    SIZES,
    Cost,
    Sample,
    Task,
    costs,
    exponents,
    main,
    prepare,
    ratio_table,
    size_name,
    size_plot,
    stages_of_log,
)
from click.testing import CliRunner, Result
from tiny_models import text, write_llama, write_model

from mgptq_export.models import load_source

STAGES = ["load", "calibrate", "allocate", "solve", "recover", "export", "check"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    write_llama(made / "model", hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1)
    (made / "text.txt").write_text(text())
    return made


def bench(folder: Path, *options: str) -> Result:
    small = ["--model", str(folder / "model"), "--calibration", str(folder / "text.txt"), "--recipe=--fast"]
    size = ["--samples", "2", "--sequence-length", "32", "--layers", "1", "-o", str(folder / "out")]
    return CliRunner().invoke(main, [*small, *size, *options])


def test_every_stage_of_a_run_is_measured_and_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = bench(folder)
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "out.json").read_text())["rows"]
    assert list(rows["--fast"]) == [*STAGES, "process", "quantizing"]
    for cost in rows["--fast"].values():
        assert cost["seconds"] > 0 and cost["cpu_seconds"] >= 0 and cost["peak_bytes"] > 10_000_000
    whole = rows["--fast"]["process"]
    assert sum(rows["--fast"][name]["seconds"] for name in STAGES) < whole["seconds"]
    assert "model, the first 1 layers; 2 sequences of 32 tokens." in (folder / "out.md").read_text()
    assert "pip install torch transformers accelerate auto-round" in done.stderr
    monkeypatch.setattr(bench_quantize, "watched", None)
    assert bench(folder).exit_code == 0


def test_figures_of_other_settings_are_not_mixed_in(folder: Path) -> None:
    (folder / "out.json").write_text(json.dumps({"settings": {"samples": 3}, "rows": {}}))
    done = bench(folder)
    assert done.exit_code == 1 and "was measured otherwise" in done.output
    (folder / "out.json").unlink()


def test_a_peer_that_is_named_must_be_there(folder: Path) -> None:
    for python, said in ((sys.executable, "has no auto-round"), (str(folder / "none"), "No such file")):
        done = bench(folder, "--peer-python", python)
        assert done.exit_code == 1 and said in done.output and "pip install" in done.output


def test_a_model_is_cut_to_layers_that_it_has(folder: Path) -> None:
    done = bench(folder, "--layers", "3")
    assert done.exit_code == 1 and "has 2, give 1 to as many" in done.output


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_models_whose_layers_have_types_are_cut(family: str, folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / family, family)
    task = Task(str(tmp_path / family), 1, str(folder / "text.txt"), 2, 32)
    assert len(prepare(task, tmp_path / "cut")) == 2
    assert len(load_source(str(tmp_path / "cut")).layers) == 1


def test_a_model_that_cannot_be_written_is_an_error_in_a_line(folder: Path, tmp_path: Path) -> None:
    done = bench(folder, "--model", str(write_model(tmp_path / "phi3", "phi3")))
    assert done.exit_code == 1 and "another family" in done.output


def test_a_model_that_is_not_there_is_an_error_in_a_line(folder: Path) -> None:
    done = bench(folder, "--model", str(folder / "none"))
    assert done.exit_code == 1 and str(folder / "none") in done.output and done.exception.args == (1,)


def test_a_failed_command_is_an_error_that_shows_it(folder: Path) -> None:
    done = bench(folder, "--evaluate", str(folder / "none.txt"))
    assert done.exit_code == 1 and "exit code 1 of" in done.output and "none.txt" in done.output


def test_a_stage_gets_the_memory_and_cpu_time_of_its_span() -> None:
    samples = [Sample(float(t), memory, 2.0 * t) for t, memory in enumerate([10, 20, 90, 30, 40])]
    found = costs({"solve": (1.5, 2.5), "export": (3.0, 4.0), "check": (3.1, 3.2)}, samples)
    assert found["solve"] == Cost(1.0, 2.0, 90)
    assert found["export"] == Cost(1.0, 2.0, 40)
    assert found["check"].peak_bytes == 40
    assert found["process"] == Cost(4.0, 8.0, 90)


def test_stages_are_read_to_the_millisecond(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "2026-01-01 10:00:00,000 INFO mgptq_runtime.progress: solve begins\n"
        "2026-01-01 10:00:01,000 DEBUG mgptq_runtime.progress: Quantizing: 3/3 in 1.0 s\n"
        "2026-01-01 10:00:01,250 INFO mgptq_runtime.progress: solve: 1 s, 2.4999 stored bits per weight\n"
        "2026-01-01 10:00:02,000 INFO mgptq_runtime.progress: export begins\n"
    )
    ((name, (start, stop)),) = stages_of_log(log).items()
    assert name == "solve" and stop - start == pytest.approx(1.25, abs=1e-4)


def test_ratios_are_ours_by_the_peers() -> None:
    rows = {
        "--fast": {"quantizing": Cost(10.0, 15.0, 3)},
        "auto-round, 50 iterations": {"quantizing": Cost(40.0, 60.0, 6)},
        "default": {"quantizing": Cost(1.0, 1.0, 1)},
    }
    assert ratio_table(rows).splitlines()[2:] == ["| --fast / 50 iterations | 0.25 | 0.25 | 0.50 |"]


def test_exponents_are_those_of_a_power_law() -> None:
    rows = {
        size_name(layers, width): dict.fromkeys(
            ("calibrate", "allocate", "solve", "recover", "quantizing"), Cost(1.0, 3.0 * layers * width**1.5, 1)
        )
        for layers, width in SIZES
    }
    for found in exponents(rows).values():
        assert found == pytest.approx({"layers": 1.0, "width": 1.5})
    assert size_plot(rows).startswith("<svg")
