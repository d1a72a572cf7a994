"""From a model to a package. The checkpoint is trusted: every export must hold, and compute, what it says."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from small_runs import EVEN, RECIPE, Package
from tiny_models import write_llama, write_tokenizer
from transformers import LlamaForCausalLM

from mgptq_export import pipeline
from mgptq_export.checkpoint import read_checkpoint
from mgptq_export.evaluation import evaluate, evaluation_windows, torch_scorer
from mgptq_export.inspection import inspect_package
from mgptq_export.layouts import COLUMNS
from mgptq_export.manifest import read_manifest, verify
from mgptq_export.models import load_source
from mgptq_export.targets import TARGETS, Target
from mgptq_export.targets.onnx import read_onnx_weights
from mgptq_runtime.check import check_backend
from mgptq_runtime.container import read_container
from mgptq_runtime.errors import BadInputError, BudgetError, MgptqError, OutputExistsError, PackageError
from mgptq_runtime.formats import padded_columns
from mgptq_runtime.package import open_package
from mgptq_runtime.perplexity import measure_perplexity, read_text

BOTH = ["container", "onnx"]


# What tells of a package as a whole.
TOLD = dict.fromkeys(("manifest.json", "README.md", "report.html"), b"")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(package: Package, tmp_path: Path) -> Path:
    """A copy of the package to change, alone in its folder."""
    return Path(shutil.copytree(package.folder, tmp_path / "alone" / "package"))


# What a package is


def test_the_manifest_tells_the_files_as_they_are(package):
    manifest = json.loads((package.folder / "manifest.json").read_text())
    assert manifest == package.manifest
    listed = {file["path"]: file for file in manifest["files"]}
    found = contents(package.folder)
    assert listed.keys() == found.keys() - {"manifest.json"}
    for path, file in listed.items():
        assert file["bytes"] == len(found[path])
        assert file["sha256"] == hashlib.sha256(found[path]).hexdigest()


def test_the_manifest_tells_bits_targets_and_recipe(package):
    model = read_checkpoint(package.folder / "quantized").model
    bits = package.manifest["bits"]
    assert bits["requested"] == RECIPE.bits and bits["stored"] == model.bits_stored
    assert RECIPE.bits - 0.05 < bits["stored"] <= RECIPE.bits
    assert bits["linear_weights"] == sum(linear.rows * linear.columns for linear in model.linears())
    padded = padded_columns(model.embedding.columns)
    assert bits["tables"] == {table.name: {"b4": table.rows * padded} for table in model.tables()}
    assert package.manifest["targets"] == BOTH
    assert package.manifest["recipe"] == RECIPE.to_json()


def test_weights_of_checkpoint_container_and_onnx_are_identical(package):
    model = read_checkpoint(package.folder / "quantized").model
    container = read_container(package.folder / "model.mgptq.gguf").model
    onnx = read_onnx_weights(package.folder / "onnx")
    linears = {linear.name: linear for linear in [*model.linears(), model.embedding]}
    if model.head is not None:
        linears["output"] = model.head
    packed = {linear.name: linear for linear in [*container.linears(), container.embedding]}
    if container.head is not None:
        packed["output"] = container.head
    assert packed.keys() == linears.keys()
    for name, linear in linears.items():
        weight = linear.dequantize()
        assert np.array_equal(packed[name].dequantize(), weight), name
        assert np.array_equal(onnx[name], weight), name
    assert np.array_equal(onnx["output"], (model.head or model.embedding).dequantize())


@pytest.mark.parametrize("backend, level", [("numpy", 4), ("onnx", 0)])
def test_golden_vectors_pass_on_every_backend(package, backend, level):
    opened = open_package(package.folder)
    loaded = opened.backend(backend, accuracy_level=level)
    result = check_backend(loaded, opened.golden(loaded), opened.bounds(backend, level))
    assert result.passed, result.failures
    assert result.positions == 4 * 64


def test_the_fast_level_diverges_hardly_from_the_golden_vectors(package):
    """Only the divergence: the first places of a random model's logits are too close for 8-bit activations."""
    opened = open_package(package.folder)
    loaded = opened.backend("onnx", accuracy_level=4)
    result = check_backend(loaded, opened.golden(loaded), opened.bounds("onnx", 4))
    assert 0 < result.kl_divergence <= 0.02


def test_what_was_evaluated_is_what_was_exported(package):
    """The workstation's figures against the device's own command, tokenizer included."""
    results = package.manifest["evaluation"]["results"]
    assert list(results) == ["original", "checkpoint", "numpy", "onnx", "onnx_exact"]
    opened = open_package(package.folder)
    for name, backend, level in [("numpy", "numpy", 4), ("onnx", "onnx", 4), ("onnx_exact", "onnx", 0)]:
        loaded = opened.backend(backend, accuracy_level=level)
        ids = opened.tokenizer(loaded).encode(read_text(package.text.path))
        measured = measure_perplexity(loaded, ids, window=64, windows=3)
        assert measured.tokens == results[name]["tokens"] == 3 * 32
        assert measured.perplexity == pytest.approx(results[name]["perplexity"], rel=1e-6)
    checkpoint = results["checkpoint"]["perplexity"]
    assert results["numpy"]["perplexity"] == pytest.approx(checkpoint, rel=1e-3)
    assert results["onnx_exact"]["perplexity"] == pytest.approx(checkpoint, rel=1e-3)
    assert results["onnx"]["perplexity"] == pytest.approx(checkpoint, rel=0.05)
    assert results["checkpoint"]["kl_divergence"] > 0


@pytest.mark.parametrize("package", ["even"], indirect=True)
def test_the_same_seed_gives_the_same_bytes_in_every_file(package, tmp_path):
    again = pipeline.run(str(package.model), tmp_path / "again", RECIPE, BOTH, text=package.text)
    assert again == package.manifest
    assert contents(tmp_path / "again") == contents(package.folder)


def test_another_number_of_threads_gives_a_package_as_good_and_is_told(even_model, text_file, tmp_path):
    perplexities, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out, text = tmp_path / str(count), pipeline.EvaluationText(text_file, window=64, windows=4)
            manifest = pipeline.run(str(even_model), out, RECIPE, ["container"], text=text)
            assert manifest["threads"] == count
            perplexities.append(manifest["evaluation"]["results"]["checkpoint"]["perplexity"])
    finally:
        torch.set_num_threads(threads)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)


def test_two_targets_come_from_one_solve(even_model, tmp_path, monkeypatch):
    calls = []
    solve = pipeline.quantize
    monkeypatch.setattr(pipeline, "quantize", lambda *arguments: calls.append(1) or solve(*arguments))
    pipeline.run(str(even_model), tmp_path / "out", replace(RECIPE, allocator="uniform"), BOTH)
    assert len(calls) == 1


# Nothing half-done


def failing(error: Exception) -> Target:
    def write(checkpoint, golden, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    return Target(COLUMNS, "model.mgptq.gguf", write)


QUICK = replace(RECIPE, allocator="uniform", samples=1, sequence_length=16, sensitivity_samples=1)


def test_what_would_fail_again_leaves_nothing_behind(even_model, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "container", failing(PackageError("broken")))
    with pytest.raises(PackageError):
        pipeline.run(str(even_model), tmp_path / "out", QUICK, ["container"])
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_nothing_behind(even_model, tmp_path):
    for model, recipe in [(str(tmp_path / "no/model/x"), QUICK), (str(even_model), replace(QUICK, bits=0.5))]:
        with pytest.raises((BadInputError, BudgetError)):
            pipeline.run(model, tmp_path / "out", recipe, ["container"])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "damage"), [("llama.cpp", "remove"), ("container", "enlarge")])
def test_a_tokenizer_that_a_target_cannot_hold_is_refused_before_anything_runs(
    even_model, tmp_path, monkeypatch, target, damage
):
    model = Path(shutil.copytree(even_model, tmp_path / "model"))
    if damage == "remove":
        (model / "tokenizer.json").unlink()
    else:
        write_tokenizer(model, 5000)
    monkeypatch.setattr(pipeline, "calibrate", lambda *_: pytest.fail("it ran"))
    with pytest.raises(BadInputError, match=r"tokenizer\.json"):
        pipeline.run(str(model), tmp_path / "out", RECIPE, [target])


def test_an_output_that_exists_is_refused(even_model, copied):
    before = contents(copied)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        pipeline.run(str(even_model), copied, QUICK, ["container"])
    assert contents(copied) == before


def test_overwrite_keeps_the_old_package_when_the_new_one_fails(even_model, copied, monkeypatch):
    before = contents(copied)
    monkeypatch.setitem(TARGETS, "container", failing(PackageError("broken")))
    with pytest.raises(PackageError, match="broken"):
        pipeline.run(str(even_model), copied, QUICK, ["container"], overwrite=True)
    assert contents(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


def test_overwrite_replaces_the_whole_package(even_model, copied):
    manifest = pipeline.run(str(even_model), copied, QUICK, ["container"], overwrite=True)
    assert json.loads((copied / "manifest.json").read_text()) == manifest
    assert manifest["targets"] == ["container"] and not (copied / "onnx").exists()
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), KeyboardInterrupt()])
def test_the_old_package_returns_when_the_new_one_cannot_take_its_place(copied, monkeypatch, error):
    before = contents(copied)
    rename = Path.rename

    def rename_unless_last(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_unless_last)
    with pytest.raises((MgptqError, KeyboardInterrupt)):
        pipeline.export(copied, ["onnx"])
    assert contents(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.parametrize("name", ["notes.txt", "onnx/notes.txt", ".git/HEAD"])
def test_what_others_put_into_a_package_is_never_deleted(even_model, copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("mine")
    before = contents(copied)
    with pytest.raises(OutputExistsError, match=f"{name} is not what this program wrote"):
        pipeline.run(str(even_model), copied, QUICK, ["container"], overwrite=True)
    assert contents(copied) == before
    if name.startswith("onnx"):
        with pytest.raises(OutputExistsError, match=f"{name} is not what this program wrote"):
            pipeline.export(copied, ["onnx"])
    pipeline.export(copied, ["container"])
    assert (copied / name).read_text() == "mine"


def test_two_commands_do_not_make_one_package(even_model, copied, monkeypatch):
    """The second would replace what the first had made meanwhile."""
    write, refused = pipeline.write_targets, []

    def and_another(*arguments):
        monkeypatch.setattr(pipeline, "write_targets", write)
        for command in (
            lambda: pipeline.export(copied, ["container"]),
            lambda: pipeline.run(str(even_model), copied, QUICK, ["container"], overwrite=True),
        ):
            with pytest.raises(OutputExistsError, match="another process is at work on"):
                command()
            refused.append(command)
        return write(*arguments)

    monkeypatch.setattr(pipeline, "write_targets", and_another)
    pipeline.export(copied, ["onnx"])
    assert len(refused) == 2
    assert not verify(copied)
    assert list(copied.parent.iterdir()) == [copied]


def test_a_folder_that_is_no_package_is_never_replaced(even_model, tmp_path):
    folder, file = tmp_path / "photos", tmp_path / "notes"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    file.write_text("notes")
    for out in (folder, file):
        with pytest.raises(OutputExistsError, match="not a folder that this program wrote"):
            pipeline.run(str(even_model), out, QUICK, ["container"], overwrite=True)
    assert contents(tmp_path) == {"photos/photo.jpg": b"x", "notes": b"notes"}


def test_a_folder_with_another_programs_manifest_is_never_replaced(even_model, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/manifest.json").write_text('{"name": "app", "version": 1}')
    with pytest.raises(OutputExistsError, match="not a folder that this program wrote"):
        pipeline.run(str(even_model), tmp_path / "app", QUICK, ["container"], overwrite=True)


def test_what_appears_meanwhile_is_not_replaced_unasked(even_model, tmp_path, monkeypatch):
    write = pipeline.complete

    def write_late(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/precious").write_text("x")
        return write(*arguments)

    monkeypatch.setattr(pipeline, "complete", write_late)
    with pytest.raises(BadInputError, match="failed"):
        pipeline.run(str(even_model), tmp_path / "out", QUICK, BOTH, export_targets=False)
    assert contents(tmp_path / "out") == {"precious": b"x"}
    assert not (tmp_path / "out.unfinished/package").exists()


def test_an_empty_folder_may_be_filled(even_model, tmp_path):
    (tmp_path / "out").mkdir()
    pipeline.run(str(even_model), tmp_path / "out", QUICK, BOTH, export_targets=False, overwrite=True)
    assert (tmp_path / "out/manifest.json").is_file()


def test_a_place_that_cannot_be_written_is_a_typed_error(even_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot be written"):
        pipeline.run(str(even_model), tmp_path / "file" / "out", QUICK, ["container"])


def test_an_unknown_target_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(BadInputError, match="'tpu' is unknown; choose from container, onnx"):
        pipeline.run("nothing/to/load", tmp_path / "out", QUICK, ["tpu"])
    assert list(tmp_path.iterdir()) == []


# Export


@pytest.fixture(scope="module")
def bare(even_model, tmp_path_factory) -> Path:
    """A package without targets. Tests only read it."""
    folder = tmp_path_factory.mktemp("bare") / "package"
    pipeline.run(str(even_model), folder, RECIPE, BOTH, export_targets=False)
    return folder


@pytest.mark.parametrize("package", ["even"], indirect=True)
def test_quantize_then_export_is_run(bare, package, tmp_path):
    manifest = pipeline.export(bare, BOTH, tmp_path / "out")
    exported, whole = contents(tmp_path / "out"), contents(package.folder)
    assert {**exported, **TOLD} == {**whole, **TOLD}
    written = {key: value for key, value in manifest.items() if key not in ("evaluation", "files")}
    assert written == {key: package.manifest[key] for key in written}


def test_export_adds_a_target_and_keeps_the_rest(bare, tmp_path):
    folder = Path(shutil.copytree(bare, tmp_path / "package"))
    pipeline.export(folder, ["onnx"])
    first = contents(folder)
    manifest = pipeline.export(folder, ["container"])
    assert manifest["targets"] == BOTH
    second = contents(folder)
    assert second.keys() - first.keys() == {"model.mgptq.gguf"}
    assert all(second[path] == data for path, data in first.items() if path not in TOLD)
    assert {file["path"] for file in manifest["files"]} == second.keys() - {"manifest.json"}
    assert list(tmp_path.iterdir()) == [folder]


def test_export_again_gives_the_same_bytes(package, copied):
    pipeline.export(copied, BOTH)
    assert contents(copied) == contents(package.folder)


def test_a_failing_export_leaves_the_package_as_it_was(copied, monkeypatch):
    before = contents(copied)
    monkeypatch.setitem(TARGETS, "container", failing(PackageError("broken")))
    with pytest.raises(PackageError, match="broken"):
        pipeline.export(copied, ["container"])
    assert contents(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


def test_export_to_another_folder_leaves_the_package_as_it_was(bare, tmp_path):
    before = contents(bare)
    pipeline.export(bare, ["container"], tmp_path / "out")
    assert contents(bare) == before
    with pytest.raises(OutputExistsError):
        pipeline.export(bare, ["container"], tmp_path / "out")


def test_export_of_no_package_is_refused(tmp_path):
    with pytest.raises(PackageError, match="is no package"):
        pipeline.export(tmp_path, ["container"])


def test_export_to_a_target_that_takes_other_weights_is_refused(bare):
    with pytest.raises(BadInputError, match=r"not quantized for target llama\.cpp.*--targets llama\.cpp"):
        pipeline.export(bare, ["llama.cpp"])


@pytest.fixture
def changed(bare, tmp_path) -> Path:
    """A package one byte of whose checkpoint is not what the manifest says."""
    folder = Path(shutil.copytree(bare, tmp_path / "package"))
    path = folder / "quantized/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(data)
    return folder


def test_a_checkpoint_that_differs_from_the_manifest_is_not_exported(changed):
    before = contents(changed)
    with pytest.raises(PackageError, match=r"model\.safetensors has SHA-256"):
        pipeline.export(changed, ["container"])
    assert contents(changed) == before


def test_a_checkpoint_that_differs_from_the_manifest_is_not_evaluated(changed, even_model, text_file):
    with pytest.raises(PackageError, match=r"model\.safetensors has SHA-256"):
        pipeline.evaluate_package(changed, str(even_model), pipeline.EvaluationText(text_file, 32, 1))


def test_a_checkpoint_that_differs_from_the_manifest_is_not_inspected(changed):
    with pytest.raises(PackageError, match=r"model\.safetensors has SHA-256"):
        inspect_package(changed)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 2}'])
def test_a_broken_manifest_is_refused(bare, tmp_path, content):
    folder = Path(shutil.copytree(bare, tmp_path / "package"))
    (folder / "manifest.json").write_text(content)
    for use in (inspect_package, lambda package: pipeline.export(package, ["container"])):
        with pytest.raises(PackageError, match=r"manifest|no package"):
            use(folder)


# Evaluation


def test_eval_finds_what_run_found(package):
    found = pipeline.evaluate_package(package.folder, str(package.model), package.text)
    assert found == package.manifest["evaluation"]


def test_eval_of_a_package_without_targets_compares_its_checkpoint(bare, even_model, text_file):
    found = pipeline.evaluate_package(bare, str(even_model), pipeline.EvaluationText(text_file, 32, 2))
    assert list(found["results"]) == ["original", "checkpoint"]


def test_eval_against_another_model_is_refused(package, even_model, odd_model):
    other = odd_model if package.model == even_model else even_model
    with pytest.raises(BadInputError, match="not the model that was quantized"):
        pipeline.evaluate_package(package.folder, str(other), package.text)


@pytest.mark.parametrize(("window", "scored"), [(2, 4), (9, 20), (100, 200)])
def test_evaluation_is_that_of_the_definition(window, scored):
    """KL(original || other), perplexity and agreement over the second half of each window, from the formulas."""
    generator = torch.Generator().manual_seed(0)
    table, noise = torch.randn(2, 11, 11, generator=generator).double()
    windows = torch.randint(11, (4, window), generator=generator)

    def original(tokens: torch.Tensor, positions: int) -> torch.Tensor:
        return table[tokens[0, -positions:]].float()

    def other(tokens: torch.Tensor, positions: int) -> torch.Tensor:
        return (table + 0.5 * noise)[tokens[0, -positions:]].float()

    found = evaluate(windows, original, {"other": other, "same": original})
    p, q = torch.log_softmax(table, -1), torch.log_softmax(table + 0.5 * noise, -1)
    loss = divergence = agreed = count = 0.0
    for tokens in windows.tolist():
        for position in range(window // 2, window):
            before, token = tokens[position - 1], tokens[position]
            loss -= float(q[before, token])
            divergence += float((p[before].exp() * (p[before] - q[before])).sum())
            agreed += float(p[before].argmax() == q[before].argmax())
            count += 1
    assert found["other"].tokens == count == scored
    assert found["other"].perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert found["other"].kl_divergence == pytest.approx(divergence / count, rel=1e-5)
    assert found["other"].top1_agreement == agreed / count
    assert found["same"].kl_divergence == 0 and found["same"].top1_agreement == 1
    assert found["same"] == found["original"]


@pytest.mark.parametrize("knows", [True, False])
def test_a_model_is_scored_at_its_last_positions_whether_or_not_it_can_keep_them_alone(even_model, knows, monkeypatch):
    model = load_source(str(even_model)).model
    tokens = torch.arange(3, 23)[None]
    whole = model(tokens).logits[0].detach()
    computed = []
    model.lm_head.register_forward_hook(lambda module, given, logits: computed.append(logits.shape[1]))
    if not knows:
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    found = torch_scorer(model)(tokens, 7)
    torch.testing.assert_close(found, whole[-7:])
    assert computed == [7 if knows else 20]


def test_windows_are_cut_one_after_another_and_a_rest_is_left_out():
    assert evaluation_windows(list(range(11)), 4, 30).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluation_windows(list(range(11)), 4, 1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(BadInputError, match="3 tokens, fewer than one window of 4"):
        evaluation_windows([1, 2, 3], 4, 1)


def test_a_window_beyond_the_context_is_refused(even_model, tmp_path, text_file):
    with pytest.raises(BadInputError, match="a window of 300 tokens is beyond"):
        pipeline.run(
            str(even_model), tmp_path / "out", QUICK, BOTH, text=pipeline.EvaluationText(text_file, window=300)
        )
    assert list(tmp_path.iterdir()) == []


# Inspect


def test_inspect_counts_every_weight_once(package):
    found = inspect_package(package.folder)
    assert found["manifest"] == package.manifest
    model = read_checkpoint(package.folder / "quantized").model
    layout = found["layouts"]["columns"]
    kinds = layout["kinds"]
    linear_kinds = set(kinds) - {"token_embd", "output"}
    assert linear_kinds == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert sum(kinds[kind]["weights"] for kind in linear_kinds) == model.linear_weights
    stored = sum(kinds[kind]["weights"] * kinds[kind]["bits_stored"] for kind in linear_kinds)
    permutations = sum(group.permutation_bytes * 8 for group in model.groups)
    assert (stored + permutations) / model.linear_weights == pytest.approx(model.bits_stored, rel=1e-12)
    assert ("output" in kinds) == (model.head is not None)
    assert set(kinds["token_embd"]["weights_by_format"]) == {"b4"}
    for kind in linear_kinds:
        assert set(kinds[kind]["weights_by_format"]) <= set(layout["formats"])


def test_a_model_without_a_tokenizer_can_be_packed_and_checked(even_model, tmp_path):
    model = Path(shutil.copytree(even_model, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    pipeline.run(str(model), tmp_path / "out", QUICK, BOTH)
    opened = open_package(tmp_path / "out")
    for name in ("numpy", "onnx"):
        backend = opened.backend(name, accuracy_level=0)
        assert check_backend(backend, opened.golden(backend), opened.bounds(name, 0)).passed


def test_the_original_is_measured_unquantized(package):
    """Perplexity of the original in the manifest against transformers on the untouched model."""
    source = load_source(str(package.model))
    assert source.tokenizer is not None
    ids = source.tokenizer.encode(package.text.path.read_text(), add_special_tokens=False).ids[: 3 * 64]
    windows = torch.tensor(ids).view(3, 64)
    with torch.no_grad():
        logits = source.model(windows).logits[:, 31:-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 32:].flatten())
    assert package.manifest["evaluation"]["results"]["original"]["perplexity"] == pytest.approx(
        float(loss.exp()), rel=1e-5
    )


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory) -> Path:
    """A Llama with biases everywhere, none of them zero."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "biased", **EVEN, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_biases_go_with_the_model_everywhere(biased_model, text_file, tmp_path):
    text = pipeline.EvaluationText(text_file, window=64, windows=1000)
    ran = pipeline.run(str(biased_model), tmp_path / "out", replace(QUICK, bits=4.5), BOTH, text=text)["evaluation"]
    assert pipeline.evaluate_package(tmp_path / "out", str(biased_model), text) == ran
    results = ran["results"]
    for name in ("numpy", "onnx_exact"):
        assert results[name]["kl_divergence"] == pytest.approx(results["checkpoint"]["kl_divergence"], rel=1e-3)
    assert ran["windows"] * text.window == 2 * results["original"]["tokens"]


@pytest.mark.slow
def test_recovery_brings_every_target_closer_to_the_original(text_file, tmp_path):
    model = tiny_models.write_llama(tmp_path / "model", **EVEN, initializer_range=0.15)
    text = pipeline.EvaluationText(text_file, window=64, windows=6)
    recipe = replace(RECIPE, bits=2.5, allocator="uniform", calibration=str(text_file), ggml_types=("q2_0", "q4_0"))
    targets = ["container", "onnx", "llama.cpp"]
    results = {}
    for steps in (0, 30):
        out = tmp_path / str(steps)
        manifest = pipeline.run(str(model), out, replace(recipe, recovery_steps=steps), targets, text=text)
        assert manifest["bits"]["stored"] == read_manifest(tmp_path / "0")["bits"]["stored"]
        results[steps] = {name: row["kl_divergence"] for name, row in manifest["evaluation"]["results"].items()}
    for name in ("checkpoint", "numpy", "onnx_exact", "onnx", "llama.cpp_checkpoint"):
        assert results[30][name] < 0.9 * results[0][name], name


# Verify


def test_verify_finds_nothing_in_a_package_as_written(package):
    assert verify(package.folder) == []


def test_verify_names_every_file_that_differs(copied):
    container, config = copied / "model.mgptq.gguf", copied / "onnx/genai_config.json"
    data = bytearray(container.read_bytes())
    data[len(data) // 2] ^= 1
    container.write_bytes(data)
    config.write_text("{}")
    (copied / "onnx/model.onnx.data").unlink()
    (copied / "notes.txt").write_text("mine")
    found = {one["path"]: one["problem"] for one in verify(copied)}
    assert found.keys() == {"model.mgptq.gguf", "onnx/genai_config.json", "onnx/model.onnx.data", "notes.txt"}
    assert found["model.mgptq.gguf"].startswith("has SHA-256 ")
    assert found["onnx/genai_config.json"].startswith("has 2 bytes, the manifest says ")
    assert found["onnx/model.onnx.data"] == "is missing" and found["notes.txt"] == "is not in the manifest"


def test_hidden_files_of_others_are_no_difference(copied):
    """What the hub, git and systems leave in a folder."""
    for name in (".gitattributes", ".cache/huggingface/x.lock", "onnx/.DS_Store", "onnx/._model.onnx"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("theirs")
    assert verify(copied) == []
    assert open_package(copied).backend("onnx").name == "onnx"


def test_a_path_that_no_package_has_is_a_typed_error(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][0]["path"] = "a\0b"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="must be relative, inside the package"):
        verify(copied)


def test_a_strangers_paths_do_not_command_the_terminal(copied, main):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["name"] = "[/x]\x1b[2J"
    manifest["files"][0]["path"] = "\x1b[2J\x1b[31m"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = main("verify", copied)
    assert code == 1 and "\x1b" not in out and r"\x1b[2J\x1b[31m is missing" in out


# Numerical trouble


def test_what_had_to_be_mended_is_in_the_manifest(tmp_path):
    model = write_llama(tmp_path / "model", **EVEN)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"][:3] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"][:5] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][7] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = pipeline.run(str(model), tmp_path / "out", QUICK, ["container"])
    repairs = manifest["layouts"]["columns"]["repairs"]
    assert repairs["blk.1.attn_qkv"] == {"dead_columns": 3}
    assert repairs["blk.0.attn_qkv"] == {"scales_at_limit": 5 * 2}
    assert repairs["blk.0.ffn_down"]["scales_at_limit"] >= 6
    assert "blk.0.ffn_gate_up" not in repairs
    again = pipeline.export(tmp_path / "out", ["onnx"])
    assert again["layouts"] == manifest["layouts"]
