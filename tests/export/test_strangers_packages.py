"""Packages that someone else made or changed, exported again and looked at; those of the fixtures are trusted."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import Package

from mgptq_export import pipeline
from mgptq_export.inspection import inspect_package
from mgptq_export.manifest import read_manifest, verify
from mgptq_runtime.errors import PackageError


@pytest.fixture
def copied(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.folder, tmp_path / "copied"))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file of a package."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def vouch(package: Path) -> None:
    """Let the manifest list what there is."""

    def list_again(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            content = (package / file["path"]).read_bytes()
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    change(package / "manifest.json", list_again)


def test_a_link_does_not_become_what_it_leads_to(copied, tmp_path):
    (tmp_path / "secret").write_text("private key")
    (copied / "NOTES.txt").symlink_to(tmp_path / "secret")
    for out in (None, tmp_path / "out"):
        with pytest.raises(PackageError, match=r"NOTES\.txt is a link"):
            pipeline.export(copied, ["container"], out)
    assert (copied / "NOTES.txt").is_symlink() and not (tmp_path / "out").exists()


def test_hidden_files_stay_and_are_no_part_of_the_package(copied, tmp_path):
    index = copied / ".git/index"
    index.parent.mkdir()
    index.write_text("1")
    (copied / ".git/link").symlink_to(tmp_path / "nowhere")
    pipeline.export(copied, ["container"])
    assert index.read_text() == "1" and (copied / ".git/link").is_symlink()
    assert not [file for file in read_manifest(copied)["files"] if file["path"].startswith(".")]
    index.write_text("22")
    assert verify(copied) == []
    pipeline.export(copied, ["container"])


@pytest.mark.parametrize("content", ["[]", "{}", "{", "[" * 100_000, '{"losses": {}, "trials": 3}'])
def test_a_history_that_cannot_be_read_is_a_typed_error(copied, tmp_path, content):
    (copied / "quantized/history.json").write_text(content)
    vouch(copied)
    with pytest.raises(PackageError, match=r"history\.json cannot be read"):
        pipeline.export(copied, ["container"], tmp_path / "out")


def test_a_recipe_of_an_older_version_is_completed_by_defaults(copied, tmp_path):
    change(copied / "quantized/config.json", lambda config: config["quantization_config"].update(recipe={"bits": 2.5}))
    vouch(copied)
    pipeline.export(copied, ["container"], tmp_path / "out")
    assert " --bits 2.5" in (tmp_path / "out/README.md").read_text()


def test_settings_that_steer_transformers_are_not_followed(copied, tmp_path):
    # Labels of which a table as large as this would be made.
    change(copied / "quantized/config.json", lambda config: config.update(num_labels=10**10))
    vouch(copied)
    pipeline.export(copied, ["container", "onnx"], tmp_path / "out")


def test_a_package_without_results_of_a_check_can_be_inspected(copied):
    change(copied / "manifest.json", lambda manifest: manifest.pop("check"))
    assert inspect_package(copied)["manifest"]["targets"] == ["container", "onnx"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.update(targets=[["container"]]),
        lambda manifest: manifest.update(check=[]),
        lambda manifest: manifest["check"].update(results={"numpy": "fine"}),
    ],
)
def test_a_manifest_that_this_program_did_not_write_is_refused(copied, edit):
    change(copied / "manifest.json", edit)
    with pytest.raises(PackageError, match=r"manifest\.json cannot be read"):
        pipeline.export(copied, ["container"])
