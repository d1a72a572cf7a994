"""Two packages side by side: mgptq-export compare."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from click.testing import CliRunner, Result
from small_runs import EVEN, RECIPE

from mgptq_export import cli as command
from mgptq_export import comparison, pipeline
from mgptq_export.comparison import PROMPTS, compare_packages
from mgptq_export.inspection import inspect_package
from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.generate import generate_tokens
from mgptq_runtime.package import open_package
from mgptq_runtime.perplexity import measure_perplexity, read_text

QUICK = replace(RECIPE, allocator="hessian", own_samples=0)
QUICKEST = replace(QUICK, samples=2, sequence_length=32)


@pytest.fixture(scope="module")
def text(text_file) -> pipeline.EvaluationText:
    return pipeline.EvaluationText(text_file, window=64, windows=2)


@pytest.fixture(scope="module")
def packages(even_model, text, tmp_path_factory) -> tuple[Path, Path]:
    """One model at 2.5 and at 3 bits, evaluated on the same text. Tests only read them."""
    folder = tmp_path_factory.mktemp("compared")
    pipeline.run(str(even_model), folder / "a", QUICK, ["container", "onnx"], text=text)
    pipeline.run(str(even_model), folder / "b", replace(QUICK, bits=3.0), ["container", "onnx"], text=text)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def found(packages, text) -> dict[str, Any]:
    return compare_packages(*packages, text=text, tokens=12)


@pytest.fixture(scope="module")
def container_only(even_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("container-only") / "out"
    pipeline.run(str(even_model), out, QUICKEST, ["container"])
    return out


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    """A package of a model of other shapes with another vocabulary, for llama.cpp, too."""
    folder = tmp_path_factory.mktemp("other")
    sizes = {**EVEN, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
    model = tiny_models.write_llama(folder / "model", **sizes)
    pipeline.run(str(model), folder / "out", replace(QUICKEST, bits=4.5), ["onnx", "llama.cpp"])
    return folder / "out"


def edited(package: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a package with another manifest."""
    shutil.copytree(package, out)
    manifest = json.loads((out / "manifest.json").read_text())
    edit(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def rewritten(package: Path, out: Path, path: str, content: bytes) -> Path:
    """A copy of a package with another file, which its manifest lists."""

    def vouch(manifest: dict[str, Any]) -> None:
        entry = next(file for file in manifest["files"] if file["path"] == path)
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edited(package, out, vouch)
    (out / path).write_bytes(content)
    return out


# What the packages are


def test_a_package_differs_from_itself_in_nothing(packages, text):
    found = compare_packages(packages[0], packages[0], text=text, tokens=4)
    assert found["recipe"] == found["versions"] == {}
    assert all(one["a"] == one["b"] for one in found["layouts"]["columns"]["allocation"]["linears"])
    assert all(one["a"] == one["b"] for one in found["evaluation"]["results"].values())
    assert found["perplexity"]["a"] == found["perplexity"]["b"]
    assert [one["first_divergent_token"] for one in found["generation"]["prompts"]] == [None] * len(PROMPTS)


def test_sizes_are_those_of_the_files(packages, found):
    for side, folder in zip("ab", packages, strict=True):
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.*")}
        assert found["sizes"]["targets"]["container"][side] == files["model.mgptq.gguf"]
        assert found["sizes"]["targets"]["onnx"][side] == files["onnx/model.onnx"] + files["onnx/model.onnx.data"]
        assert found["sizes"]["files"][side] == sum(files.values()) - files["manifest.json"]


def test_of_recipes_and_versions_only_what_differs_is_told(packages, found, tmp_path):
    assert found["recipe"] == {"bits": {"a": 2.5, "b": 3.0}}
    assert found["versions"] == {}
    older = edited(packages[0], tmp_path / "older", lambda manifest: manifest["versions"].update(torch="1.0"))
    versions = compare_packages(older, packages[0], tokens=0)["versions"]
    assert list(versions) == ["torch"] and versions["torch"]["a"] == "1.0"


def test_bits_are_those_that_inspect_counts(packages, found):
    layout = found["layouts"]["columns"]
    for side, folder in zip("ab", packages, strict=True):
        inspected = inspect_package(folder)
        bits = inspected["manifest"]["bits"]
        assert (layout["requested"][side], layout["stored"][side]) == (bits["requested"], bits["stored"])
        kinds = {kind: row["bits_stored"] for kind, row in inspected["layouts"]["columns"]["kinds"].items()}
        assert {kind: row[side] for kind, row in layout["allocation"]["kinds"].items()} == pytest.approx(kinds)


def test_all_linears_are_told_and_those_that_differ_most_come_first(packages, found):
    linears = found["layouts"]["columns"]["allocation"]["linears"]
    assert {one["name"] for one in linears} >= {"blk.0.attn_q", "blk.1.ffn_down", "token_embd"}
    distances = [abs(one["a"] - one["b"]) for one in linears]
    assert distances == sorted(distances, reverse=True) and distances[0] > 0
    back = compare_packages(packages[1], packages[0], tokens=0)["layouts"]["columns"]["allocation"]["linears"]
    assert [(one["name"], one["b"], one["a"]) for one in back] == [(one["name"], one["a"], one["b"]) for one in linears]


def test_models_of_other_shapes_have_no_common_allocation(packages, other_model):
    found = compare_packages(packages[0], other_model, tokens=0)
    allocation = found["layouts"]["columns"]["allocation"]
    assert allocation["comparable"] is False
    assert "blk.0.attn_q is [128, 128] in A, [256, 256] in B" in allocation["reason"]


def test_what_only_one_package_has_is_none_in_the_other(packages, other_model):
    found = compare_packages(packages[0], other_model, tokens=0)
    tensors = found["layouts"]["tensors"]
    assert tensors["requested"] == {"a": None, "b": 4.5} and "allocation" not in tensors
    assert found["sizes"]["targets"]["llama.cpp"]["a"] is None
    assert found["sizes"]["targets"]["container"]["b"] is None


def test_recorded_quality_is_told_where_the_text_was_the_same(packages, found):
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in packages]
    assert found["evaluation"]["comparable"]
    assert set(found["evaluation"]["results"]) == {"original", "checkpoint", "numpy", "onnx", "onnx_exact"}
    for name, row in found["evaluation"]["results"].items():
        for side, manifest in zip("ab", manifests, strict=True):
            assert row[side].items() <= manifest["evaluation"]["results"][name].items()


@pytest.mark.parametrize(("key", "value"), [("text_sha256", "0" * 64), ("window", 62), ("windows", 1)])
def test_quality_on_another_text_or_other_windows_is_not_comparable(packages, tmp_path, key, value):
    other = edited(packages[1], tmp_path / "other", lambda manifest: manifest["evaluation"].update({key: value}))
    evaluation = compare_packages(packages[0], other, tokens=0)["evaluation"]
    assert evaluation["comparable"] is False and "results" not in evaluation
    assert f"{key} " in evaluation["reason"] and str(value) in evaluation["reason"]


def test_a_package_that_was_not_evaluated_has_no_recorded_quality(packages, container_only):
    evaluation = compare_packages(packages[0], container_only, tokens=0)["evaluation"]
    assert evaluation["comparable"] is False
    assert f"{container_only} was not evaluated" in evaluation["reason"] and "--text" in evaluation["reason"]


# What the packages compute


def test_perplexity_is_what_the_runtime_measures(packages, found, text):
    assert (found["perplexity"]["backend"], found["perplexity"]["windows"]) == ("onnx", text.windows)
    for side, folder in zip("ab", packages, strict=True):
        package = open_package(folder)
        backend = package.backend("onnx")
        ids = package.tokenizer(backend).encode(read_text(text.path))
        measured = measure_perplexity(backend, ids, window=text.window, windows=text.windows)
        assert found["perplexity"][side] == pytest.approx(measured.perplexity, rel=1e-5)


def test_the_first_divergent_token_is_that_of_whole_texts(packages, found):
    whole: dict[str, list[list[int]]] = {prompt: [] for prompt in PROMPTS}
    for folder in packages:
        package = open_package(folder)
        backend = package.backend("onnx", threads=1)
        tokenizer = package.tokenizer(backend)
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt, special_tokens=True)
            eos = tokenizer.eos_token_ids
            whole[prompt].append(list(generate_tokens(backend, ids, max_tokens=12, eos_token_ids=eos)))
    assert [one["prompt"] for one in found["generation"]["prompts"]] == list(PROMPTS)
    assert any(a != b for a, b in whole.values())
    for one in found["generation"]["prompts"]:
        a, b = whole[one["prompt"]]
        index = one["first_divergent_token"]
        if index is None:
            assert a == b and one["same_tokens"] == len(a)
        else:
            assert a[:index] == b[:index] and a[index : index + 1] != b[index : index + 1]
            assert one["a"] == tokenizer.decode(a[: index + 1]) and one["b"] == tokenizer.decode(b[: index + 1])


@pytest.mark.parametrize(
    ("a", "b", "divergent", "same"),
    [
        ([70, 71, 72], [70, 71, 73], 2, 2),
        ([70, 71], [70, 71], None, 2),
        ([70, 71], [70], 1, 1),
        ([], [70], 0, 0),
        ([], [], None, 0),
    ],
)
def test_a_text_that_ends_first_differs_where_it_ends(packages, monkeypatch, a, b, divergent, same):
    texts = iter([a, b])

    def generate(*arguments: Any, eos_token_ids: frozenset[int], max_tokens: int) -> Iterator[int]:
        assert (eos_token_ids, max_tokens) == ({2}, 3)
        return iter(next(texts))

    monkeypatch.setattr(comparison, "generate_tokens", generate)
    one = compare_packages(*packages, prompts=["Words"], tokens=3)["generation"]["prompts"][0]
    assert (one["first_divergent_token"], one["same_tokens"]) == (divergent, same)


def test_onnx_is_taken_where_both_have_it_and_otherwise_numpy(packages, container_only):
    def backend(*pair: Path) -> str:
        return compare_packages(*pair, tokens=1)["generation"]["backend"]

    assert backend(*packages) == "onnx"
    assert backend(packages[0], container_only) == "numpy"


def test_without_a_common_backend_the_rest_is_compared(packages, container_only, text, tmp_path):
    onnx_only = edited(packages[0], tmp_path / "onnx", lambda manifest: manifest.update(targets=["onnx"]))
    found = compare_packages(onnx_only, container_only, text=text)
    for part in ("generation", "perplexity"):
        assert found[part]["comparable"] is False and "no backend runs both" in found[part]["reason"]
    assert found["layouts"]["columns"]["allocation"]["comparable"]


def test_other_vocabularies_make_texts_incomparable(packages, other_model, text):
    found = compare_packages(packages[0], other_model, text=text)
    for part in ("evaluation", "generation", "perplexity"):
        assert found[part]["comparable"] is False
        assert "331 tokens in A, 300 in B" in found[part]["reason"]


def test_tokenizers_that_split_a_prompt_otherwise_make_texts_incomparable(packages, tmp_path):
    path = "quantized/tokenizer.json"
    tokenizer = json.loads((packages[0] / path).read_text())
    tokenizer["model"]["merges"] = []
    other = rewritten(packages[0], tmp_path / "other", path, json.dumps(tokenizer).encode())
    generation = compare_packages(packages[0], other)["generation"]
    assert generation["comparable"] is False and "other tokens of the same text" in generation["reason"]


def test_zero_tokens_leave_texts_out(packages):
    found = compare_packages(*packages, tokens=0)
    assert found["generation"] is None and found["perplexity"] is None


# The command


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command.cli, ["compare", *map(str, arguments)])


def test_json_is_what_the_function_finds(packages, text):
    options = ("--text", text.path, "--window", 64, "--windows", 2, "--prompt", "Once", "--prompt", "Twice")
    result = invoke(*packages, *options, "--tokens", 5, "--json")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == compare_packages(*packages, text=text, prompts=["Once", "Twice"], tokens=5)


def test_people_see_every_part(packages, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke(
        *packages, "--text", text.path, "--window", 64, "--windows", 2, "--tokens", 5, "--prompt", "[b]x[/]\x1b"
    )
    assert result.exit_code == 0, result.output
    for seen in (
        "onnx model file",
        "recipe bits",
        "attn_q",
        "blk.",
        "onnx_exact",
        "perplexity",
        "same tokens",
        r"[b]x[/]\x1b",
    ):
        assert seen in result.stdout


def test_people_see_ten_linears_at_most(container_only, even_model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    packages = container_only, tmp_path / "out"
    pipeline.run(str(even_model), packages[1], replace(QUICKEST, bits=6.0), ["container"])
    linears = compare_packages(*packages, tokens=0)["layouts"]["columns"]["allocation"]["linears"]
    assert sum(one["a"] != one["b"] for one in linears) > 10
    assert invoke(*packages, "--tokens", 0).stdout.count("blk.") == 10


def test_people_see_texts_that_are_the_same_once(packages, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert invoke(packages[0], packages[0], "--tokens", 2).stdout.count("│ the same") == len(PROMPTS)


def test_people_see_why_something_is_not_comparable(packages, other_model, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke(packages[0], other_model, "--text", text.path)
    assert result.exit_code == 0, result.output
    for what in ("Allocations of the columns layout", "Recorded quality", "Perplexity", "Generated texts"):
        assert f"{what} cannot be compared: " in result.stdout


def test_failures_exit_with_1_and_one_message(main, packages, text, tmp_path):
    a, b = packages
    damaged = Path(shutil.copytree(a, tmp_path / "damaged"))
    (damaged / "onnx/model.onnx.data").write_bytes(b"")
    cases = {
        "nothing is no package": (a, "nothing"),
        "model.mgptq.gguf is no package": (a / "model.mgptq.gguf", b),
        "model.onnx.data has 0 bytes": (a, damaged),
        "missing.txt cannot be read": (a, b, "--text", "missing.txt"),
        "it must be even": (a, b, "--text", text.path, "--window", 63),
        "2 to 256": (a, b, "--text", text.path, "--window", 512),
        "the prompt has 0 tokens": (a, b, "--prompt", ""),
        "the prompt has ": (a, b, "--prompt", "word " * 300),
    }
    for message, arguments in cases.items():
        code, out, err = main("compare", *arguments, "--json")
        assert (code, out) == (1, ""), (message, err)
        assert err.count("error: ") == 1 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"versions": []}, "versions"),
        ({"evaluation": {"results": {}}}, "evaluation"),
        ({"evaluation": "good"}, "evaluation"),
        (
            {"evaluation": {"text": "", "text_sha256": "", "window": 2, "windows": 1, "results": {"numpy": 1}}},
            "evaluation",
        ),
        ({"targets": [{}, 1, "tpu"]}, "targets"),
    ],
)
def test_a_manifest_that_this_program_did_not_write_is_a_typed_error(packages, tmp_path, values, named):
    broken = edited(packages[0], tmp_path / "broken", lambda manifest: manifest.update(values))
    with pytest.raises(PackageError, match=named):
        compare_packages(broken, packages[0], tokens=0)


def test_targets_that_no_backend_runs_are_not_compared(packages, tmp_path):
    strange = edited(packages[0], tmp_path / "strange", lambda manifest: manifest.update(targets=["tpu"]))
    assert compare_packages(strange, packages[0])["generation"]["comparable"] is False


def test_a_text_shorter_than_a_window_is_refused(packages, tmp_path):
    (tmp_path / "short.txt").write_text("Short.")
    with pytest.raises(BadInputError, match="one window"):
        compare_packages(*packages, text=pipeline.EvaluationText(tmp_path / "short.txt", 64), tokens=0)
