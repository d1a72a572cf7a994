"""Tiny models and packages that the workstation's tests share; each is made once."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import tiny_models
from reproducible import _exact_products, _one_thread  # noqa: F401
from small_runs import EVEN, RECIPE, Package, Quantized

from mgptq_export import cli as command
from mgptq_export import pipeline
from mgptq_export.models import load_source
from mgptq_export.quantize import quantize


@pytest.fixture(scope="session")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama whose layers fill whole blocks."""
    return tiny_models.write_llama(tmp_path_factory.mktemp("models") / "even", **EVEN)


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama none of whose sizes is a multiple of 64."""
    return tiny_models.write_llama(tmp_path_factory.mktemp("models") / "odd", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def even_quantized(even_model: Path) -> Quantized:
    source = load_source(str(even_model))
    return Quantized(source, quantize(source, RECIPE))


@pytest.fixture(scope="session")
def odd_quantized(odd_model: Path) -> Quantized:
    source = load_source(str(odd_model))
    return Quantized(source, quantize(source, RECIPE))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(tiny_models.text(20_000))
    return path


@pytest.fixture(scope="session", params=["even", "odd"])
def package(request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A complete package, with evaluation. Tests only read it."""
    model = request.getfixturevalue(f"{request.param}_model")
    text = pipeline.EvaluationText(text_file, window=64, windows=3)
    folder = tmp_path_factory.mktemp("packages") / request.param
    manifest = pipeline.run(str(model), folder, RECIPE, ["container", "onnx"], text=text)
    return Package(folder, manifest, model, text)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The entry point in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mgptq-export", *map(str, arguments)])
        capsys.readouterr()
        try:
            command.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def folder(odd_model: Path, tmp_path: Path) -> Path:
    """A model folder to break, alone in its parent folder."""
    (tmp_path / "models").mkdir()
    return Path(shutil.copytree(odd_model, tmp_path / "models" / "model"))
