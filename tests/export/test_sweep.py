"""Several budgets in one go. What a run at one budget makes is trusted, and so is the runtime."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf_model import write_gguf
from small_runs import EVEN, RECIPE
from tiny_models import write_llama
from transformers import AutoModelForCausalLM

from mgptq_export import cli as command
from mgptq_export import pipeline
from mgptq_export import sweep as module
from mgptq_export.history import History
from mgptq_export.journal import Journal, Record
from mgptq_export.manifest import read_manifest, verify
from mgptq_export.sweep import sweep
from mgptq_runtime.check import DEFAULT_BOUNDS, Bounds, check_backend
from mgptq_runtime.errors import BadInputError, BudgetError, NumericalError, OutputExistsError
from mgptq_runtime.package import open_package

BUDGETS = (2.25, 3.0)
QUICK = replace(RECIPE, recovery_steps=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_this_budget(folder: Path) -> dict[str, bytes]:
    """What of a package says nothing of the other budgets, nor of how the backends scored."""
    of_sweep = {"quantized/history.json", "report.html", "README.md", "manifest.json"}
    return {path: content for path, content in contents(folder).items() if path not in of_sweep}


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"seconds": None} for row in rows]


def gguf_of(model: Path, path: Path, matrix_type: GGMLQuantizationType) -> Path:
    write_gguf(path, AutoModelForCausalLM.from_pretrained(model), model, matrix_type)
    return path


@pytest.fixture(scope="module")
def text(text_file: Path) -> pipeline.EvaluationText:
    return pipeline.EvaluationText(text_file, window=32, windows=3)


@pytest.fixture(scope="module")
def same(even_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model itself, as a GGUF file that lost nothing."""
    return gguf_of(even_model, tmp_path_factory.mktemp("same") / "same.gguf", GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def rounded(even_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(even_model, tmp_path_factory.mktemp("rounded") / "rounded.Q8_0.gguf", GGMLQuantizationType.Q8_0)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


@pytest.fixture(scope="module")
def calls() -> dict[str, Counted]:
    return {"calibrate": Counted(module.calibrate), "original": Counted(None)}


@pytest.fixture(scope="module")
def swept(even_model, text, same, rounded, calls, tmp_path_factory) -> Path:
    """A sweep with two files to compare with. Tests only read it."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    scored_once = module._scored_once

    def counting(scorer: Any, journal: Journal) -> Any:
        calls["original"].function = scorer
        return scored_once(calls["original"], journal)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "calibrate", calls["calibrate"])
        patched.setattr(module, "_scored_once", counting)
        sweep(str(even_model), out, QUICK, BUDGETS, ["container"], text, against=[same, rounded])
    return out


def rows_of(swept: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((swept / "sweep.json").read_text())["rows"]}


# What comes out


def test_the_model_is_calibrated_and_the_original_scored_once(swept, calls, text):
    assert calls["calibrate"].calls == 1
    assert calls["original"].calls == text.windows


@pytest.mark.parametrize("bits", BUDGETS)
def test_every_budget_gives_the_package_that_a_run_gives_byte_for_byte(even_model, swept, text, tmp_path, bits):
    pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, bits=bits), ["container"], text=text)
    assert of_this_budget(swept / f"{bits:g}") == of_this_budget(tmp_path / "out")
    of_sweep, of_run = (read_manifest(folder) | {"files": []} for folder in (swept / f"{bits:g}", tmp_path / "out"))
    assert of_run["evaluation"]["results"].pop("numpy")
    assert of_sweep == of_run


@pytest.mark.parametrize("bits", BUDGETS)
def test_every_package_reports_where_it_stands_among_all(swept, bits, tmp_path):
    package = swept / f"{bits:g}"
    rows = timeless(list(rows_of(swept).values()))
    assert list(History.read(package / "quantized").sweep) == rows
    assert "What bytes buy" in (package / "report.html").read_text()
    pipeline.export(package, ["onnx"], tmp_path / "more")
    assert "What bytes buy" in (tmp_path / "more/report.html").read_text()


@pytest.mark.parametrize("bits", BUDGETS)
def test_every_package_passes_the_check_of_the_device(swept, bits):
    opened = open_package(swept / f"{bits:g}")
    backend = opened.backend("numpy")
    assert check_backend(backend, opened.golden(backend), opened.bounds("numpy", 4)).passed
    assert verify(swept / f"{bits:g}") == []


def test_rows_say_what_packages_and_files_say(swept, same, rounded):
    rows = rows_of(swept)
    assert rows.keys() == {"original", "2.25", "3", same.name, rounded.name}
    for name, bits in (("2.25", 2.25), ("3", 3.0)):
        manifest, row = read_manifest(swept / name), rows[name]
        assert (row["kind"], row["layout"], row["requested_bits"]) == ("quantized", "columns", bits)
        assert row["stored_bits"] == manifest["bits"]["stored"] <= bits
        assert row["file_bytes"] == {"container": (swept / name / "model.mgptq.gguf").stat().st_size}
        checkpoint = manifest["evaluation"]["results"]["checkpoint"]
        assert {key: row[key] for key in checkpoint.keys() - {"tokens"}} == {
            key: checkpoint[key] for key in checkpoint.keys() - {"tokens"}
        }
        assert row["seconds"] > 0
    assert rows[rounded.name]["file_bytes"] == {"gguf": rounded.stat().st_size}
    assert rows[rounded.name]["stored_bits"] == 8.5 and rows[same.name]["stored_bits"] == 32
    assert all(row["bytes"] == max(row["file_bytes"].values()) for row in rows.values())


def test_the_original_has_its_size_in_float16(swept, even_model):
    model = AutoModelForCausalLM.from_pretrained(even_model)
    original = rows_of(swept)["original"]
    assert original["file_bytes"] == {"float16": 2 * model.num_parameters()}
    assert (original["kl_divergence"], original["top1_agreement"], original["stored_bits"]) == (0.0, 1.0, 16.0)


def test_files_to_compare_with_are_scored_like_the_original(swept, same, rounded):
    rows = rows_of(swept)
    assert rows[same.name]["perplexity"] == pytest.approx(rows["original"]["perplexity"], rel=1e-6)
    assert rows[same.name]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert 0 < rows[rounded.name]["kl_divergence"] < rows["2.25"]["kl_divergence"]


def test_the_front_is_what_nothing_else_beats(monkeypatch):
    points = {"large": (90, 5.0), "beaten": (50, 7.0), "good": (40, 6.0), "twin": (40, 6.0), "small": (10, 9.0)}
    rows = [{"name": name, "bytes": size, "perplexity": perplexity} for name, (size, perplexity) in points.items()]
    rows.append({"name": "as small and worse", "bytes": 10, "perplexity": 9.5})
    marked = {row["name"]: row["pareto"] for row in module._with_front(rows[::-1])}
    assert {name for name, on_front in marked.items() if on_front} == {"large", "good", "twin", "small"}
    assert next(iter(marked)) == "large"


def test_a_budget_has_a_row_for_each_layout(even_model, text, tmp_path):
    targets = ["container", "onnx", "llama.cpp"]
    recipe = replace(RECIPE, allocator="uniform")
    rows = sweep(str(even_model), tmp_path / "out", recipe, [3.0], targets, text)["rows"]
    assert {row["layout"]: set(row["file_bytes"]) for row in rows} == {
        None: {"float16"},
        "columns": {"container", "onnx"},
        "tensors": {"llama.cpp"},
    }


# What is refused, and when


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work may start."""
    for name in ("calibrate", "calibration_set"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was started"))
    monkeypatch.setattr(pipeline, "measure", lambda *_, **__: pytest.fail("work was started"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("budgets", [(3.0, 1.0), (float("nan"),), (99.0, 2.5)])
def test_an_impossible_budget_is_refused_before_anything_is_written(even_model, text, tmp_path, budgets):
    with pytest.raises(BudgetError, match="cannot be reached"):
        sweep(str(even_model), tmp_path / "out", RECIPE, budgets, ["container"], text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("untouched")
def test_a_file_with_another_vocabulary_is_refused_before_anything_is_written(even_model, rounded, text, tmp_path):
    larger = write_llama(tmp_path / "larger", vocab_size=340, **EVEN)
    renamed = Path(shutil.copytree(even_model, tmp_path / "renamed"))
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = {
        "has a vocabulary of 340 tokens, .* one of 331; give a GGUF file of even": larger,
        rf"token {vocabulary['b']} is 'b' there and 'a' in": renamed,
    }
    for message, folder in cases.items():
        other = gguf_of(folder, tmp_path / "other.gguf", GGMLQuantizationType.F32)
        with pytest.raises(BadInputError, match=message):
            sweep(str(even_model), tmp_path / "out", RECIPE, [2.5], ["container"], text, against=[rounded, other])
    assert {path.name for path in tmp_path.iterdir()} == {"larger", "renamed", "other.gguf"}


@pytest.mark.usefixtures("untouched")
def test_what_is_no_gguf_file_is_refused_before_anything_is_written(even_model, text, text_file, tmp_path):
    cases = {tmp_path / "missing.gguf": "is no file", even_model: "is no file", text_file: "not a readable GGUF file"}
    for path, message in cases.items():
        with pytest.raises(BadInputError, match=message):
            sweep(str(even_model), tmp_path / "out", RECIPE, [2.5], ["container"], text, against=[path])
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_calibration_text_leaves_nothing_behind(even_model, text, tmp_path):
    recipe = replace(RECIPE, calibration=str(tmp_path / "missing.txt"))
    with pytest.raises(BadInputError, match=r"missing\.txt"):
        sweep(str(even_model), tmp_path / "out", recipe, [2.5], ["container"], text)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_budget_is_refused(even_model, text, tmp_path):
    with pytest.raises(BadInputError, match="without a budget"):
        sweep(str(even_model), tmp_path / "out", RECIPE, [], ["container"], text)


# Going on, and starting anew


class Killed(BaseException):
    """Nothing that the code could expect."""


def stop_at(name: str, count: int, patched: pytest.MonkeyPatch) -> None:
    """Let the process die once so many records of this kind are kept."""
    put, kept = Journal.put, []

    def put_some(self: Journal, record_name: str, record: Record) -> None:
        put(self, record_name, record)
        if record_name.split("-")[0] == name and self._folder is not None:
            kept.append(record_name)
            if len(kept) == count:
                raise Killed

    patched.setattr(Journal, "put", put_some)


@pytest.mark.parametrize("record, count", [("model", 1), ("model", 2), ("trial", 3), ("evaluation", 1)])
def test_a_sweep_that_was_stopped_goes_on_and_gives_the_same(
    even_model, swept, text, same, rounded, tmp_path, monkeypatch, record, count
):
    out, options = tmp_path / "out", {"against": [same, rounded]}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_at(record, count, patched)
        sweep(str(even_model), out, QUICK, BUDGETS, ["container"], text, **options)
    with pytest.raises(OutputExistsError, match="go on with --resume"):
        sweep(str(even_model), out, QUICK, BUDGETS, ["container"], text, **options)
    scorings = Counted(module.torch_scorer)
    monkeypatch.setattr(module, "torch_scorer", scorings)
    resumed = sweep(str(even_model), out, QUICK, BUDGETS, ["container"], text, **options, resume=True)
    assert timeless(resumed["rows"]) == timeless(list(rows_of(swept).values()))
    for name in ("2.25", "3"):
        assert contents(out / name) == contents(swept / name)
    assert scorings.calls == 1  # the original's, which nothing is asked of; the files were scored before
    assert list(tmp_path.iterdir()) == [out]


def test_a_stopped_sweep_goes_on_with_one_more_budget_but_not_with_another_text(
    even_model, swept, text, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_at("evaluation", 1, patched)
        sweep(str(even_model), out, QUICK, BUDGETS[:1], ["container"], text)
    with pytest.raises(OutputExistsError, match=r"evaluation\.windows was 3 and is 2"):
        sweep(str(even_model), out, QUICK, BUDGETS, ["container"], replace(text, windows=2), resume=True)
    sweep(str(even_model), out, QUICK, BUDGETS, ["container"], text, resume=True)
    for name in ("2.25", "3"):
        assert of_this_budget(out / name) == of_this_budget(swept / name)


def test_a_budget_that_fails_can_be_left_out(even_model, swept, text, tmp_path, monkeypatch, capsys):
    """What was finished before it stays, whatever it failed by."""
    out, make = tmp_path / "out", pipeline.make_package

    def fail_at_3(folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if folder.name == "3":
            raise NumericalError("logits are NaN")
        return make(folder, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(NumericalError):
        patched.setattr(pipeline, "make_package", fail_at_3)
        sweep(str(even_model), out, QUICK, [2.25, 3.0], ["container"], text)
    assert "with --resume goes on" in capsys.readouterr().err
    sweep(str(even_model), out, QUICK, [2.25], ["container"], text, resume=True)
    assert of_this_budget(out / "2.25") == of_this_budget(swept / "2.25")


def test_a_sweep_is_replaced_only_when_asked(even_model, swept, text, tmp_path):
    out = Path(shutil.copytree(swept, tmp_path / "out"))
    recipe = replace(RECIPE, allocator="uniform")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        sweep(str(even_model), out, recipe, [3.0], ["container"], text)
    (out / "2.25/notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt is not what this program wrote"):
        sweep(str(even_model), out, recipe, [3.0], ["container"], text, overwrite=True)
    (out / "2.25/notes.txt").unlink()
    sweep(str(even_model), out, recipe, [3.0], ["container"], text, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"3", "sweep.html", "sweep.json"}
    (out / "sweep.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="not a folder that this program wrote"):
        sweep(str(even_model), out, recipe, [3.0], ["container"], text, overwrite=True)


# The command


COMMAND = ("--bits", "2.5,3", "--window", 32, "--windows", 2, "--samples", 2, "--sequence-length", 32)
COMMAND += ("--allocator", "uniform", "--recovery-steps", 0, "--threads", 1)


def test_the_command_prints_the_file_or_a_table(main, even_model, text_file, rounded, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    asked = ("sweep", even_model, "--evaluate", text_file, "--against", rounded, *COMMAND)
    code, out, err = main(*asked, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    assert out.count("\n") == 1 and json.loads(out) == json.loads((tmp_path / "out/sweep.json").read_text())
    assert "stays lost" not in err
    code, out, err = main(*asked, "-o", tmp_path / "out", "--overwrite")
    assert code == 0, err
    named = {line.split("│")[2].strip() for line in out.splitlines() if line.startswith("│")}
    assert named == {"original", rounded.name, "3", "2.5"} and "Pareto" in out


def test_a_package_that_fails_its_check_is_marked_and_ends_with_1(main, even_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    wrong = {name: Bounds(max_abs_difference=0.0) for name in DEFAULT_BOUNDS}
    monkeypatch.setattr("mgptq_export.packaging.DEFAULT_BOUNDS", wrong)
    code, out, _ = main("sweep", even_model, "--evaluate", text_file, *COMMAND, "-o", tmp_path / "out")
    assert code == 1 and "3, check FAILED" in out
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    assert {row["name"]: row["check"] for row in rows} == {"original": None, "3": "failed", "2.5": "failed"}


@pytest.mark.parametrize("bits", ["", ",", "2.5,few"])
def test_budgets_that_are_no_numbers_are_wrong_usage(main, bits):
    code, out, err = main("sweep", "model", "-o", "out", "--evaluate", "text", "--bits", bits)
    assert (code, out) == (2, "") and "give numbers such as" in err


def test_every_option_of_a_run_but_its_budget_reaches_the_recipe(monkeypatch):
    asked: list[Any] = []

    def ask(*arguments: Any, **options: Any) -> dict[str, Any]:
        asked.append((arguments, options))
        return {"rows": []}

    monkeypatch.setattr(module, "sweep", ask)
    monkeypatch.setattr(command, "_print_sweep", lambda swept: None)
    options = ["--bits", "3,2.5", "--fast", "--trials", "7", "--against", "a.gguf", "--against", "b.gguf", "--resume"]
    command.cli(["sweep", "model", "-o", "out", "--evaluate", "text", *options], standalone_mode=False)
    (_, _, recipe, budgets, targets, _), given = asked[0]
    assert (budgets, targets, recipe.trials, recipe.samples) == ([3.0, 2.5], ["container"], 7, 16)
    assert given["against"] == (Path("a.gguf"), Path("b.gguf")) and given["resume"]


def test_a_failure_of_the_command_exits_with_1(main, even_model, tmp_path):
    code, out, err = main("sweep", even_model, "-o", tmp_path / "out", "--evaluate", tmp_path / "no.txt", *COMMAND)
    assert (code, out) == (1, "") and err.count("error: ") == 1 and "no.txt" in err
    assert list(tmp_path.iterdir()) == []
