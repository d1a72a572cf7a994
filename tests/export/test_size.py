"""A size for the whole model file instead of bits. The written files are trusted."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from gguf_model import write_gguf
from small_runs import EVEN, RECIPE
from transformers import AutoModelForCausalLM

from mgptq_export import cli, pipeline
from mgptq_export.checkpoint import read_checkpoint, tokenizer_files
from mgptq_export.layouts import COLUMNS
from mgptq_export.models import load_shape, load_source
from mgptq_export.planning import plan_model
from mgptq_export.recipe import Recipe
from mgptq_export.sizes import format_size, parse_size
from mgptq_export.targets import TARGETS
from mgptq_export.targets.onnx import size as onnx_size
from mgptq_export.targets.skeleton import Skeleton, make_skeleton
from mgptq_runtime.container import read_container
from mgptq_runtime.errors import BadInputError, BudgetError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, GGML_FORMATS, padded_columns
from mgptq_runtime.quantized_model import QuantizedLinear, Segment

ALL = list(TARGETS)
# The types of llama.cpp that are solved fast.
QUICK = replace(RECIPE, allocator="hessian", samples=2, sequence_length=32, ggml_types=("q2_0", "q4_0", "q8_0"))
# Tables that are large beside the graphs of ONNX, as in a real model.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with a large vocabulary."""
    return tiny_models.write_llama(tmp_path_factory.mktemp("models") / "wide", **WIDE, vocab_size=8192)


def planned_at(model: Path, targets: list[str], **fields: Any) -> dict[str, Any]:
    return plan_model(str(model), replace(QUICK, **fields), targets)["targets"]


def size_for(model: Path, target: str, bits: float) -> int:
    """What the model file of a target takes at most."""
    return planned_at(model, [target], bits=bits)[target]["model_bytes"]


def written(package: Path, target: str) -> int:
    """Bytes of the model file, its parts listed once more."""
    files = {
        "container": ["model.mgptq.gguf"],
        "onnx": ["onnx/model.onnx", "onnx/model.onnx.data"],
        "llama.cpp": [str(path.relative_to(package)) for path in package.glob("llama.cpp/*.gguf")],
    }[target]
    assert files
    return sum((package / file).stat().st_size for file in files)


def room_for_a_larger_type(package: Path) -> int:
    """The least bytes that would give one more tensor of llama.cpp's file more bits."""
    linears = read_checkpoint(package / "quantized-tensors").model.linears()
    found = []
    for linear in linears:
        weights, now = linear.rows * linear.columns, GGML_FORMATS[linear.segments[0].format].bits_per_weight
        possible = [GGML_FORMATS[name].bits_per_weight for name in QUICK.ggml_types]
        more = [bits for bits in possible if bits > now]
        found += [(min(more) - now) * weights / 8] if more else []
    return int(min(found))


def room_for_more_segments(model: Path, package: Path) -> int:
    """Bytes that the graph would take if every linear had all formats, and does not."""
    files = planned_at(model, ["onnx"], bits=3.0)["onnx"]["files"]
    most = next(file["most"] for file in files if file["path"] == "onnx/model.onnx")
    return most - (package / "onnx/model.onnx").stat().st_size


# What a size is


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50MB", 50_000_000),
        ("50 MB", 50_000_000),
        ("48MiB", 48 * 1024**2),
        ("50000000", 50_000_000),
        ("1.5gb", 1_500_000_000),
        ("0.5GiB", 1 << 29),
        ("47.25 mib", 49_545_216),
        ("12kb", 12_000),
        (" 12 KiB ", 12_288),
        ("1.0009KB", 1000),
        ("1", 1),
    ],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "50M", "50 bytes", "-5MB", "0", "0.2", "0MB", "1e6", "1,5MB", "50MBB", "nan", ".5MB", "٣MB"]
)
def test_another_size_is_refused_with_those_that_are_allowed(text):
    with pytest.raises(ValueError, match=r"KB, MB, GB .* KiB, MiB, GiB .*no unit, such as 50MB"):
        parse_size(text)


def test_a_size_is_shown_in_megabytes_and_never_smaller():
    assert [format_size(size) for size in (50_000_000, 50_000_001, 48 * 1024**2, 1)] == [
        "50.00 MB",
        "50.01 MB",
        "50.34 MB",
        "0.01 MB",
    ]


def test_a_recipe_of_no_bytes_is_refused():
    with pytest.raises(BadInputError, match="size is 0 bytes"):
        replace(QUICK, size=0)


@pytest.mark.parametrize("command", ["run", "quantize", "plan"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "2.5", "--size", "50MB"), "--bits and --size exclude each other"),
        (("--size", "large"), "'large' is no size; give a number with KB, MB, GB"),
    ],
)
def test_wrong_sizes_are_wrong_usage(tmp_path, command, options, message):
    out = () if command == "plan" else ("-o", str(tmp_path / "out"))
    found = CliRunner().invoke(cli.cli, [command, "model", *out, *options])
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())


# What is delivered


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("even_model", ["container"]),
        ("model", ["onnx"]),
        ("even_model", ["llama.cpp"]),
        pytest.param("model", ALL, marks=pytest.mark.slow),
    ],
    ids=["container", "onnx", "llama.cpp", "all"],
)
def test_model_files_fit_in_the_size_and_use_it(request, tmp_path, name, targets):
    model = request.getfixturevalue(name)
    size = max(size_for(model, target, 3.0) for target in targets)
    manifest = pipeline.run(str(model), tmp_path / "out", replace(QUICK, size=size), targets)
    delivered = {target: written(tmp_path / "out", target) for target in targets}
    assert all(found <= size for found in delivered.values())
    for layout in {TARGETS[target].layout.name for target in targets}:
        sharing = [delivered[target] for target in targets if TARGETS[target].layout.name == layout]
        room = 0
        if layout == "tensors":
            room = room_for_a_larger_type(tmp_path / "out")
        elif targets == ["onnx"]:
            room = room_for_more_segments(model, tmp_path / "out")
        assert max(sharing) + room >= size * (0.99 if targets == ["onnx"] else 0.97)
        bits = manifest["layouts"][layout]["bits"]
        assert bits["stored"] <= bits["requested"]
    assert manifest["size"] == {"requested": size}
    assert manifest["bits"]["requested"] == manifest["recipe"]["bits"]
    assert manifest["recipe"]["size"] == size


@pytest.mark.parametrize(
    ("name", "share", "target"),
    [
        ("model", 0.0, "container"),
        ("model", 0.1, "container"),
        ("model", 0.3, "onnx"),
        ("odd_model", 0.6, "container"),
        ("odd_model", 0.6, "onnx"),
    ],
)
def test_a_size_is_shared_with_a_mixed_embedding(request, tmp_path, name, share, target):
    """Of what lies between the fewest bits and the most."""
    model = request.getfixturevalue(name)
    reason = planned_at(model, [target], size=1, embedding_format="mixed")[target]["reason"]
    least = int(reason.split("this model takes ")[1].split()[0])
    most = planned_at(model, [target], size=10**12, embedding_format="mixed")[target]["model_bytes"]
    size = int(least + share * (most - least))
    recipe = replace(QUICK, size=size, embedding_format="mixed", recovery_steps=2)
    planned = planned_at(model, [target], size=recipe.size, embedding_format="mixed")[target]
    assert planned["reachable"] and planned["embedding_format"] == "mixed"
    manifest = pipeline.run(str(model), tmp_path / "out", recipe, [target])
    # A tiny model's graphs are most of an ONNX package, and of them the operators that other allocations need.
    assert recipe.size * (0.8 if target == "onnx" else 0.96) <= written(tmp_path / "out", target) <= recipe.size
    assert all(result["passed"] for result in manifest["check"]["results"].values())
    assert written(tmp_path / "out", target) <= planned["model_bytes"]
    assert manifest["bits"]["stored"] <= manifest["bits"]["requested"] == manifest["recipe"]["bits"]
    assert manifest["recipe"]["embedding_format"] == "mixed"
    model = read_checkpoint(tmp_path / "out/quantized").model
    by_format = manifest["bits"]["tables"]["token_embd"]
    assert list(by_format) == [segment.format for segment in model.embedding.segments]
    told = ", ".join(f"{count // model.embedding.rows} in {fmt}" for fmt, count in by_format.items())
    assert told in (tmp_path / "out/report.html").read_text()


def test_a_mixed_embedding_fits_where_one_of_four_bits_does_not(model):
    smallest = {}
    for fmt in ("mixed", "b3", "b4", "b8"):
        reason = planned_at(model, ["onnx"], size=20_000, embedding_format=fmt)["onnx"]["reason"]
        smallest[fmt] = int(reason.split("this model takes ")[1].split()[0])
        assert ("take --embedding-format mixed" in reason) == (fmt != "mixed")
    assert sorted(smallest, key=lambda fmt: smallest[fmt]) == ["mixed", "b3", "b4", "b8"]


def test_llama_cpp_takes_a_mixed_embedding_as_one_of_four_bits(even_model):
    size = size_for(even_model, "llama.cpp", 3.0)
    planned = [planned_at(even_model, ["llama.cpp"], size=size, embedding_format=fmt) for fmt in ("mixed", "b4")]
    # The word itself is longer, in the file's metadata.
    assert planned[0]["llama.cpp"]["bits"] == pytest.approx(planned[1]["llama.cpp"]["bits"], abs=0.01)
    assert planned[0]["llama.cpp"]["embedding_format"] == "q4_0"


def test_a_size_is_for_a_mixed_embedding_unless_told_otherwise(even_model):
    def planned(*options: str) -> str:
        found = CliRunner().invoke(cli.cli, ["plan", str(even_model), "--targets", "onnx", "--json", *options])
        return json.loads(found.stdout)["targets"]["onnx"]["embedding_format"]

    assert planned("--size", "1MB") == "mixed"
    shown = CliRunner().invoke(cli.cli, ["plan", str(even_model), "--targets", "onnx", "--size", "1MB"]).stdout
    assert "bits with the embedding, at most" in shown
    assert planned("--size", "1MB", "--embedding-format", "b4") == planned() == planned("--bits", "3") == "b4"
    refused = CliRunner().invoke(cli.cli, ["plan", str(even_model), "--embedding-format", "mixed"])
    assert refused.exit_code == 1 and "ask for a size" in f"{refused.output}{refused.exception}"


@pytest.mark.parametrize("allocator", ["gnn", "uniform"])
def test_every_allocator_keeps_the_size(even_model, tmp_path, allocator):
    size = size_for(even_model, "container", 2.2)
    pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, allocator=allocator, size=size), ["container"])
    assert size * 0.97 <= written(tmp_path / "out", "container") <= size


def test_a_model_of_partial_blocks_keeps_the_size(odd_model, tmp_path):
    size = max(size_for(odd_model, target, 3.0) for target in ("container", "onnx"))
    pipeline.run(str(odd_model), tmp_path / "out", replace(QUICK, size=size), ["container", "onnx"])
    assert all(written(tmp_path / "out", target) <= size for target in ("container", "onnx"))


def test_a_run_resolves_a_size_to_the_bits_that_were_planned(even_model, tmp_path):
    size = size_for(even_model, "llama.cpp", 3.0)
    planned = planned_at(even_model, ALL, size=size)
    assert planned["container"]["bits"] == planned["onnx"]["bits"] != planned["llama.cpp"]["bits"]
    manifest = pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, size=size), ALL, export_targets=False)
    for target in ALL:
        bits = manifest["layouts"][TARGETS[target].layout.name]["bits"]
        assert bits["requested"] == planned[target]["bits"]
        assert planned[target]["model_bytes"] <= size
    # The next step of bits would not have fitted.
    assert max(planned[target]["model_bytes"] for target in ("container", "onnx")) > size - 64


@pytest.mark.parametrize("kind", ["folder", "GGUF file"])
@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_a_loaded_model_is_sized_like_its_plan(tmp_path, family, kind):
    """A run has the weights, a plan only the configuration."""
    path = tiny_models.write_model(tmp_path / "tiny", family, **WIDE | {"num_attention_heads": 16})
    if kind == "GGUF file":
        write_gguf(tmp_path / "tiny.gguf", AutoModelForCausalLM.from_pretrained(path), path)
        path = tmp_path / "tiny.gguf"
    recipe = replace(QUICK, size=max(size_for(path, target, 3.0) for target in ALL))
    planned = planned_at(path, ALL, size=recipe.size)
    recipes = pipeline._layout_recipes(load_source(str(path)), recipe, ALL)
    for target in ALL:
        assert recipes[TARGETS[target].layout.name].bits == planned[target]["bits"]


def test_the_largest_target_of_a_layout_decides_its_bits(model):
    size = size_for(model, "container", 2.7)
    alone = {target: planned_at(model, [target], size=size)[target]["bits"] for target in ("container", "onnx")}
    both = planned_at(model, ["container", "onnx"], size=size)
    assert alone["container"] != alone["onnx"]
    assert {target["bits"] for target in both.values()} == {min(alone.values())}


def test_more_than_a_model_can_use_gives_it_the_most_bits(even_model, tmp_path):
    targets = ["container", "llama.cpp"]
    manifest = pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, size=10**12), targets)
    for target in targets:
        bits = manifest["layouts"][TARGETS[target].layout.name]["bits"]
        highest = planned_at(even_model, [target])[target]["highest_bits"]
        assert bits["stored"] == pytest.approx(highest)
        assert bits["stored"] <= bits["requested"] < highest + 1e-3


def test_tensors_too_coarse_for_bits_are_no_obstacle_to_a_size(tmp_path):
    """Seven tensors, each in one type: what fits best is far below what the size has room for."""
    model = tiny_models.write_llama(tmp_path / "model", **EVEN, num_hidden_layers=1)
    recipe = replace(QUICK, ggml_types=("q4_0", "q8_0"))
    bits = 4.75
    with pytest.raises(BudgetError, match="cannot be met closely"):
        pipeline.run(str(model), tmp_path / "bits", replace(recipe, bits=bits), ["llama.cpp"])
    size = plan_model(str(model), replace(recipe, bits=bits), ["llama.cpp"])["targets"]["llama.cpp"]["model_bytes"]
    manifest = pipeline.run(str(model), tmp_path / "out", replace(recipe, size=size), ["llama.cpp"])
    assert manifest["bits"]["stored"] < bits - 0.05
    assert written(tmp_path / "out", "llama.cpp") <= size


def test_few_samples_beside_own_text_are_no_surprise(even_model, text_file, tmp_path):
    """Golden vectors are taken of both."""
    recipe = replace(QUICK, calibration=str(text_file), samples=1, own_samples=4)
    size = plan_model(str(even_model), replace(recipe, bits=2.5), ["container"])["targets"]["container"]["model_bytes"]
    manifest = pipeline.run(str(even_model), tmp_path / "out", replace(recipe, size=size), ["container"])
    assert written(tmp_path / "out", "container") <= size and manifest["calibration_sequences"] == 5


def test_the_size_travels_with_the_container(even_model, tmp_path):
    size = size_for(even_model, "container", 2.5)
    pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, size=size), ["container"])
    recipe = read_container(tmp_path / "out/model.mgptq.gguf").recipe
    assert recipe["size"] == size and recipe["bits"] == pytest.approx(2.5, abs=0.01)


# What cannot be delivered


@pytest.mark.parametrize("target", ALL)
def test_a_size_that_is_too_small_is_refused_before_anything_runs(even_model, tmp_path, monkeypatch, target):
    monkeypatch.setattr(pipeline, "calibrate", lambda *_: pytest.fail("it ran"))
    recipe, smaller = replace(QUICK, size=20_000, embedding_format="b8"), "b4" if target == "llama.cpp" else "mixed"
    with pytest.raises(
        BudgetError, match=f"20000 bytes are too few for target {target}.*--embedding-format {smaller}"
    ) as told:
        pipeline.run(str(even_model), tmp_path / "out", recipe, [target])
    assert list(tmp_path.iterdir()) == []
    smallest = int(str(told.value).split("this model takes ")[1].split()[0])
    enough = parse_size(str(told.value).split("ask for ")[1].split(" or more")[0])
    assert smallest <= enough <= smallest + 20_000
    assert planned_at(even_model, [target], size=enough, embedding_format="b8")[target]["reachable"]
    assert not planned_at(even_model, [target], size=smallest - 64, embedding_format="b8")[target]["reachable"]


def test_a_plan_says_which_targets_a_size_is_too_small_for(model):
    """Those that fit are planned without the others, which a run for all would refuse."""
    smallest = {}
    for target in ("container", "onnx"):
        reason = planned_at(model, [target], size=20_000)[target]["reason"]
        smallest[target] = int(reason.split("this model takes ")[1].split()[0])
    least = min(smallest, key=lambda target: smallest[target])
    planned = planned_at(model, list(smallest), size=max(smallest.values()) - 64)
    assert [name for name, target in planned.items() if target["reachable"]] == [least]


def oversized(path: Path, target: str) -> Any:
    """A target that writes one byte too many."""
    genuine = TARGETS[target]

    def write(checkpoint, golden, written: Path) -> None:
        genuine.write(checkpoint, golden, written)
        size = checkpoint.config["quantization_config"]["recipe"]["size"]
        with written.open("ab") as file:
            file.write(bytes(size + 1 - written.stat().st_size))

    return replace(genuine, write=write)


def test_a_file_that_is_too_large_nevertheless_is_not_delivered(even_model, tmp_path, monkeypatch):
    size = size_for(even_model, "container", 2.5)
    monkeypatch.setitem(TARGETS, "container", oversized(tmp_path, "container"))
    with pytest.raises(BudgetError, match=f"takes {size + 1} bytes, more than the {size}"):
        pipeline.run(str(even_model), tmp_path / "out", replace(QUICK, size=size), ["container"])
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_the_size_was_not_meant_for_is_not_exported_larger(even_model, tmp_path):
    larger, smaller = sorted(("container", "onnx"), key=lambda target: -size_for(even_model, target, 2.5))
    size = size_for(even_model, smaller, 2.5)
    out = tmp_path / "out"
    before = pipeline.run(str(even_model), out, replace(QUICK, size=size), [smaller])
    with pytest.raises(BudgetError, match=f"{larger} among the --targets"):
        pipeline.export(out, [larger])
    assert json.loads((out / "manifest.json").read_text()) == before
    assert list(tmp_path.iterdir()) == [out]


def test_quantize_then_export_keeps_the_size(even_model, tmp_path):
    size = size_for(even_model, "container", 2.5)
    recipe = replace(QUICK, size=size)
    pipeline.run(str(even_model), tmp_path / "out", recipe, ["container"], export_targets=False)
    manifest = pipeline.export(tmp_path / "out", ["container"])
    assert manifest["size"] == {"requested": size}
    assert size * 0.97 <= written(tmp_path / "out", "container") <= size


# The most that a graph takes


def randomly_allocated(skeleton: Skeleton, choose: random.Random) -> Skeleton:
    """A skeleton whose matrices have blocks of formats drawn at random, as an allocator could choose them."""

    def linear(old: QuantizedLinear) -> QuantizedLinear:
        formats = choose.sample(list(FORMATS), choose.randint(1, len(FORMATS)))
        blocks = choose.choices(formats, k=padded_columns(old.columns) // BLOCK_COLUMNS)
        counts = {fmt: blocks.count(fmt) for fmt in reversed(FORMATS) if fmt in blocks}
        segments = tuple(
            Segment(fmt, np.zeros((old.rows, count * FORMATS[fmt].block_bytes), np.uint8))
            for fmt, count in counts.items()
        )
        return replace(old, segments=segments)

    groups = [replace(group, linears=tuple(map(linear, group.linears))) for group in skeleton.model.groups]
    embedding, head = skeleton.model.embedding, skeleton.model.head
    if skeleton.mixed:
        embedding, head = linear(embedding), None if head is None else linear(head)
    allocated = replace(skeleton.model, groups=tuple(groups), embedding=embedding, head=head)
    return replace(skeleton, checkpoint=replace(skeleton.checkpoint, model=allocated))


@pytest.mark.parametrize("recipe", [QUICK, replace(QUICK, size=1, embedding_format="mixed")], ids=["b4", "mixed"])
@pytest.mark.parametrize(
    "sizes",
    [EVEN, EVEN | {"tie_word_embeddings": False}, {"hidden_size": 512, "intermediate_size": 1408}],
    ids=["even", "untied", "large"],
)
def test_no_allocation_makes_a_graph_larger_than_its_most(tmp_path, sizes, recipe):
    model = tiny_models.write_llama(tmp_path / "model", **{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    source = load_shape(str(model))
    with tokenizer_files(source.tokenizer_folder, 331) as folder:
        skeleton = make_skeleton(source, recipe, COLUMNS.reach(source, recipe), folder)
        most = {file.path: file.most for file in onnx_size.onnx_files(skeleton)}["onnx/model.onnx"]
        found = []
        for seed in range(6):
            allocated = randomly_allocated(skeleton, random.Random(seed))
            graph, _ = onnx_size._sized_graph(allocated, tmp_path / f"scratch{seed}")
            found.append(onnx_size._graph_size(graph, 4, tmp_path / "graph"))
    assert max(found) <= most


# The command


def test_the_commands_take_a_size(even_model, tmp_path):
    size = plan_model(str(even_model), Recipe(), ["container"])["targets"]["container"]["model_bytes"]
    options = ["--targets", "container", "--size", f"{size / 1000} KB", "--embedding-format", "b4"]
    planned = CliRunner().invoke(cli.cli, ["plan", str(even_model), *options])
    assert planned.exit_code == 0 and f"bits, at most {format_size(size)}" in planned.stdout
    told = json.loads(CliRunner().invoke(cli.cli, ["plan", str(even_model), *options, "--json"]).stdout)
    assert (told["bits"], told["size"]) == (None, size)
    assert told["targets"]["container"]["bits"] == pytest.approx(2.5, abs=0.01)
    quick = ["--samples", "2", "--sequence-length", "32", "--allocator", "hessian", "--recovery-steps", "0"]
    for name in ("run", "quantize"):
        found = CliRunner().invoke(cli.cli, [name, str(even_model), "-o", str(tmp_path / name), *options, *quick])
        assert found.exit_code == 0, found.output
        assert f"fit in {format_size(size)})" in found.stdout


def test_without_a_budget_the_commands_take_the_default_bits(even_model):
    told = json.loads(CliRunner().invoke(cli.cli, ["plan", str(even_model), "--json"]).stdout)
    assert (told["bits"], told["size"]) == (2.5, None)
