"""``mgptq-run check`` on whole packages: what it covers, and what narrows it. The manifest's own bounds are trusted."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from small_runs import Package

from mgptq_export import cli as workstation
from mgptq_runtime.check import DEFAULT_BOUNDS
from mgptq_runtime.cli import cli

NUMPY, FAST, EXACT = ("numpy", None), ("onnx", 4), ("onnx", 0)


def check(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, arguments), "--threads", "1"])


def covered(*arguments: object) -> list[tuple[str, int | None]]:
    result = check(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [(row["backend"], row["accuracy_level"]) for row in json.loads(result.stdout)["backends"]]


@pytest.fixture
def copied(package: Package, tmp_path: Path) -> Path:
    """A package to change."""
    return Path(shutil.copytree(package.folder, tmp_path / "copied"))


def rewrite_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_onnx_is_checked_at_both_levels(package):
    assert covered(package.folder) == [NUMPY, FAST, EXACT]
    shown = check(package.folder).stdout
    assert "PASSED  numpy: " in shown
    assert "PASSED  onnx, accuracy level 4: " in shown and "PASSED  onnx, accuracy level 0: " in shown


@pytest.mark.parametrize(
    "options, rows",
    [
        (("--backend", "numpy"), [NUMPY]),
        (("--backend", "onnx"), [FAST, EXACT]),
        (("--accuracy-level", 0), [NUMPY, EXACT]),
        (("--backend", "onnx", "--accuracy-level", 4), [FAST]),
    ],
)
def test_options_narrow_the_check(package, options, rows):
    assert covered(package.folder, *options) == rows


def test_a_run_records_the_exact_level_which_differs_by_the_order_of_sums_alone(package):
    results = package.manifest["check"]["results"]
    assert list(results) == ["numpy", "onnx", "onnx_exact"] and results["onnx_exact"]["accuracy_level"] == 0
    assert results["onnx_exact"]["bounds"]["max_abs_difference"] == DEFAULT_BOUNDS["onnx_exact"].max_abs_difference
    assert results["onnx_exact"]["max_abs_difference"] <= DEFAULT_BOUNDS["numpy"].max_abs_difference / 5
    assert results["onnx_exact"]["top1_agreement"] == 1.0


def test_an_exact_graph_that_rounds_activations_fails_the_check(copied):
    content = (copied / "onnx/model.onnx").read_bytes()
    (copied / "onnx/model.exact.onnx").write_bytes(content)

    def sign(manifest: dict) -> None:
        (entry,) = (file for file in manifest["files"] if file["path"] == "onnx/model.exact.onnx")
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    rewrite_manifest(copied, sign)
    result = check(copied)
    assert result.exit_code == 1
    assert "PASSED  onnx, accuracy level 4" in result.stdout and "FAILED  onnx, accuracy level 0" in result.stdout


def test_a_package_of_one_graph_and_its_manifest_are_still_read(copied):
    (copied / "onnx/model.exact.onnx").unlink()

    def age(manifest: dict) -> None:
        manifest["files"] = [file for file in manifest["files"] if file["path"] != "onnx/model.exact.onnx"]
        del manifest["check"]["results"]["onnx_exact"]
        for row in manifest["check"]["results"].values():
            del row["accuracy_level"]

    rewrite_manifest(copied, age)
    assert covered(copied) == [NUMPY, FAST]
    asked = check(copied, "--accuracy-level", 0)
    assert asked.exit_code == 1 and "model.exact.onnx is not listed in manifest.json" in asked.stderr
    for command in (["inspect", copied], ["compare", copied, copied, "--tokens", 0]):
        assert CliRunner().invoke(workstation.cli, list(map(str, command))).exit_code == 0
