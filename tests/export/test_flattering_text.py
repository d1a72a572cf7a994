"""Text that was calibrated on flatters what is quantized: whoever evaluates on it is told, at once and later."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from small_runs import RECIPE, Package

from mgptq_export import pipeline
from mgptq_export.sweep import sweep
from mgptq_runtime.package import file_sha256

WARNING = "is the text of the calibration, too"
ON_THE_PAGE = "evaluated on the text that it was calibrated on"
ON_THE_CARD = "The model was calibrated on this text"


@pytest.fixture(scope="module")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("Other text. " + tiny_models.text(8_000))
    return path


@pytest.fixture(scope="module")
def flattering(even_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package that was evaluated on a copy of the text that it was calibrated on. Tests only read it."""
    made = tmp_path_factory.mktemp("flattering")
    copy = Path(shutil.copy(text_file, made / "copy.txt"))
    text = pipeline.EvaluationText(copy, window=32, windows=1)
    recipe = replace(RECIPE, allocator="uniform", calibration=str(text_file))
    manifest = pipeline.run(str(even_model), made / "package", recipe, ["container"], text=text)
    return Package(made / "package", manifest, even_model, text)


def test_the_manifest_says_what_was_calibrated_on(flattering, package, text_file):
    assert flattering.manifest["calibration_sha256"] == file_sha256(text_file)
    assert package.manifest["calibration_sha256"] is None


def test_no_file_says_where_the_text_lay(flattering, text_file):
    assert flattering.manifest["recipe"]["calibration"] == text_file.name
    folder = str(text_file.parent).encode()
    assert [path for path in flattering.folder.rglob("*") if path.is_file() and folder in path.read_bytes()] == []


def test_a_package_keeps_saying_that_its_figures_flatter(flattering, package, tmp_path):
    pipeline.export(flattering.folder, ["container"], tmp_path / "again")
    for folder in (flattering.folder, tmp_path / "again"):
        assert ON_THE_PAGE in (folder / "report.html").read_text()
        assert ON_THE_CARD in (folder / "README.md").read_text()
    assert ON_THE_PAGE not in (package.folder / "report.html").read_text()
    assert ON_THE_CARD not in (package.folder / "README.md").read_text()


def evaluated_later(package: Package, text: pipeline.EvaluationText, out: Path) -> None:
    pipeline.evaluate_package(package.folder, str(package.model), text)


def evaluated_at_once(package: Package, text: pipeline.EvaluationText, out: Path) -> None:
    recipe = replace(RECIPE, allocator="uniform", calibration=str(package.text.path))
    pipeline.run(str(package.model), out, recipe, ["container"], text=text)


def swept(package: Package, text: pipeline.EvaluationText, out: Path) -> None:
    recipe = replace(RECIPE, allocator="uniform", calibration=str(package.text.path))
    sweep(str(package.model), out, recipe, [3.0], ["container"], text)


@pytest.mark.parametrize("evaluate", [evaluated_later, evaluated_at_once, swept])
def test_text_that_was_calibrated_on_is_warned_of_and_no_other_is(
    flattering: Package,
    other_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    evaluate: Callable[[Package, pipeline.EvaluationText, Path], None],
):
    evaluate(flattering, flattering.text, tmp_path / "seen")
    assert caplog.text.count(WARNING) == 1 and f"{flattering.text.path} {WARNING}" in caplog.text
    caplog.clear()
    evaluate(flattering, replace(flattering.text, path=other_file), tmp_path / "unseen")
    assert WARNING not in caplog.text


def test_a_checkpoint_that_does_not_say_what_it_was_calibrated_on_is_evaluated(flattering, tmp_path, caplog):
    folder = Path(shutil.copytree(flattering.folder, tmp_path / "old"))
    config, manifest = folder / "quantized/config.json", folder / "manifest.json"
    values = json.loads(config.read_text())
    del values["quantization_config"]["made_with"]["calibration_sha256"]
    config.write_text(json.dumps(values))
    listed = json.loads(manifest.read_text())
    del listed["calibration_sha256"]
    for file in listed["files"]:
        if file["path"] == "quantized/config.json":
            file |= {"bytes": config.stat().st_size, "sha256": file_sha256(config)}
    manifest.write_text(json.dumps(listed))
    pipeline.evaluate_package(folder, str(flattering.model), flattering.text)
    assert WARNING not in caplog.text
    pipeline.export(folder, ["container"])
    assert ON_THE_PAGE not in (folder / "report.html").read_text()
