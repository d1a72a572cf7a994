"""A package is used only when its files are what the manifest says."""

import json
import shutil
from types import SimpleNamespace

import pytest
from golden_package import make_container, make_golden, make_tokenizer_folder, write_manifest
from synthetic import random_llama

from mgptq_runtime.check import DEFAULT_BOUNDS
from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.golden import read_golden, write_golden
from mgptq_runtime.info import describe
from mgptq_runtime.package import open_package

CONTAINER = "model.mgptq.gguf"


@pytest.fixture
def folder(tmp_path):
    make_container(tmp_path, random_llama(), tokenizer_folder=make_tokenizer_folder(tmp_path / "tokenizer"))
    write_manifest(tmp_path, [CONTAINER])
    return tmp_path


@pytest.fixture
def onnx_folder(folder):
    """A package with an ONNX folder; its model is none, which only the backend would notice."""
    onnx = folder / "onnx"
    shutil.copytree(folder / "tokenizer", onnx)
    (onnx / "model.onnx").write_bytes(b"model")
    (onnx / "model.onnx.data").write_bytes(b"weights")
    (onnx / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [1, 7]}}))
    write_golden(onnx / "golden.npz", make_golden(random_llama()))
    write_manifest(folder, [f"onnx/{path.name}" for path in onnx.iterdir()])
    return folder


def test_a_folder_and_a_container_alone_hold_the_same_model(folder):
    package, alone = open_package(folder), open_package(folder / CONTAINER)
    assert (package.name, package.backends) == (alone.name, alone.backends) == ("tiny", ("numpy",))
    assert package.container.sha256 == alone.container.sha256
    assert package.backend().name == "numpy"


def test_a_changed_file_is_refused_with_both_hashes(folder):
    path = folder / CONTAINER
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        PackageError, match=r"model\.mgptq\.gguf has SHA-256 [0-9a-f]{64}, the manifest says [0-9a-f]{64}"
    ):
        open_package(folder).backend("numpy")


def test_a_file_of_another_size_is_refused(folder):
    with (folder / CONTAINER).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(PackageError, match="bytes, the manifest says"):
        open_package(folder).backend("numpy")


def test_a_missing_file_is_named(folder):
    (folder / CONTAINER).unlink()
    with pytest.raises(PackageError, match="is missing"):
        open_package(folder).backend("numpy")


def test_a_link_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.gguf"
    shutil.move(folder / CONTAINER, outside)
    (folder / CONTAINER).symlink_to(outside)
    with pytest.raises(PackageError, match="is a link; a package holds its files themselves"):
        open_package(folder).backend("numpy")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", ".", "a//b", "a\\b", "a\0"])
def test_paths_out_of_the_package_are_refused(folder, path):
    entry = {"path": path, "bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "name": "x", "files": [entry]}))
    with pytest.raises(PackageError, match="must be relative, inside the package"):
        open_package(folder)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "format_version is None"),
        ('{"format_version": 2}', "format_version is 2"),
        ('{"format_version": 1, "name": "x"}', "needs a name, a list of files"),
        ('{"format_version": 1, "format_version": 1, "name": "x", "files": []}', "cannot be read: .*format_version"),
        ('{"format_version": 1, "name": "x", "files": []}', "so nothing runs here"),
        ('{"format_version": 1, "name": "x", "files": [1]}', "is 1, it must be an object"),
        (
            '{"format_version": 1, "name": "x", "files": [{"path": "a", "bytes": true, "sha256": ""}]}',
            "needs path, bytes and sha256",
        ),
        ('{"format_version": 1, "name": "x", "files": [], "check": 1}', "objects check and check.bounds"),
        (
            '{"format_version": 1, "name": "x", "files": [], "check": {"bounds": {"tpu": {}}}}',
            r"check\.bounds\.tpu is not known",
        ),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_broken_manifest_is_a_typed_error(folder, text, told):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(PackageError, match=told):
        open_package(folder)


def test_a_path_that_is_no_package_is_a_typed_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PackageError, match="give the exported folder"):
            open_package(path)


def test_a_backend_that_the_package_has_nothing_for_lists_what_it_has(folder):
    with pytest.raises(BadInputError, match="it has: numpy"):
        open_package(folder).backend("onnx")


def test_bounds_of_the_manifest_replace_the_defaults(folder):
    write_manifest(folder, [CONTAINER], check={"bounds": {"numpy": {"max_abs_difference": 0.5}}})
    package = open_package(folder)
    assert package.bounds("numpy", 4).max_abs_difference == 0.5
    assert package.bounds("onnx", 0) == DEFAULT_BOUNDS["onnx_exact"]


def test_an_onnx_package_alone_has_golden_vectors_and_text(onnx_folder):
    package = open_package(onnx_folder)
    assert package.backends == ("onnx",)
    tokenizer = package.tokenizer(SimpleNamespace(name="onnx", vocabulary_size=512))
    assert tokenizer.eos_token_ids == {1, 7}
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "Hi"}])).startswith("user: Hi")


def test_no_end_of_text_in_a_file_leaves_that_of_genais_configuration(onnx_folder):
    (onnx_folder / "onnx" / "generation_config.json").write_text('{"eos_token_id": null}')
    write_manifest(onnx_folder, [f"onnx/{path.name}" for path in (onnx_folder / "onnx").iterdir()])
    tokenizer = open_package(onnx_folder).tokenizer(SimpleNamespace(name="onnx", vocabulary_size=512))
    assert tokenizer.eos_token_ids == {1, 7}


def test_golden_vectors_of_their_whole_allowance_are_read(onnx_folder):
    """More than any other file of text size; these are refused for what they hold, and not for their length."""
    (onnx_folder / "onnx" / "golden.npz").write_bytes(bytes(50 << 20))
    write_manifest(onnx_folder, [f"onnx/{path.name}" for path in (onnx_folder / "onnx").iterdir()])
    with pytest.raises(PackageError, match="not a file of golden vectors"):
        open_package(onnx_folder).golden(SimpleNamespace(name="onnx", vocabulary_size=512))


def test_without_its_container_a_package_says_how_to_go_on(onnx_folder):
    """As on a device that was given the ONNX part of both."""
    onnx = [f"onnx/{path.name}" for path in (onnx_folder / "onnx").iterdir()]
    write_manifest(onnx_folder, [CONTAINER, *onnx])
    assert describe(open_package(onnx_folder))["family"] == "llama"
    (onnx_folder / CONTAINER).unlink()
    package = open_package(onnx_folder)
    with pytest.raises(PackageError, match=r"model\.mgptq\.gguf is missing; .* --backend onnx"):
        package.backend("numpy")
    assert package.tokenizer(SimpleNamespace(name="onnx", vocabulary_size=512)).eos_token_ids == {1, 7}
    facts = describe(package)
    assert facts["backends"] == ["numpy", "onnx"]
    assert "family" not in facts


def test_a_file_that_the_manifest_does_not_list_keeps_the_onnx_folder_from_loading(onnx_folder):
    (onnx_folder / "onnx" / "extra.data").write_bytes(b"x")
    with pytest.raises(PackageError, match=r"extra\.data is not listed in manifest\.json"):
        open_package(onnx_folder).backend("onnx")


def test_a_changed_onnx_file_is_refused_before_onnx_runtime_sees_it(onnx_folder):
    (onnx_folder / "onnx" / "model.onnx").write_bytes(b"moDel")
    with pytest.raises(PackageError, match=r"model\.onnx has SHA-256"):
        open_package(onnx_folder).backend("onnx")


def test_broken_golden_files_are_typed_errors(tmp_path):
    for name, content in {"a.npz": b"", "b.npz": b"PK\x05\x06" + bytes(18), "c.npz": b"x" * 100}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PackageError, match="golden"):
            read_golden(tmp_path / name)


def test_info_says_what_is_inside(folder):
    facts = describe(open_package(folder))
    assert facts["family"] == "llama" and facts["tied_head"] and facts["has_chat_template"]
    assert facts["bits_stored"] == pytest.approx(random_llama().bits_stored)
    assert sum(facts["format_shares"].values()) == pytest.approx(1)
    assert json.loads(json.dumps(facts)) == facts
