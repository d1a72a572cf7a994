"""Plans: what is said before anything runs, against what a run then delivers. The run is trusted."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from click.testing import CliRunner
from gguf_model import write_gguf
from small_runs import EVEN, RECIPE, Package
from transformers import AutoConfig, AutoModelForCausalLM

from mgptq_export import cli, pipeline
from mgptq_export.checkpoint import read_checkpoint
from mgptq_export.layouts import LAYOUTS
from mgptq_export.planning import plan_model
from mgptq_export.targets import TARGETS
from mgptq_runtime.errors import BadInputError, BudgetError

BOTH = ["container", "onnx"]
ALL = list(TARGETS)
QUICK = replace(RECIPE, allocator="hessian")

# Whole blocks of all ggml types; heads of 16, as the rotary factors of the tiny Phi-3 want.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}

# What a segment that a container could have but has not would have taken: its entry in the header, and padding.
SEGMENT_BYTES = 96
# Sums of types in the header of a GGUF file, which are not as long as they could be, and alignment.
HEADER_BYTES = 400


SLOW_FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "gemma3", "phi3")]


@pytest.fixture(scope="module", params=["llama", *SLOW_FAMILIES])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package of a family with all targets. Tests only read it."""
    folder = tmp_path_factory.mktemp("planned")
    model = tiny_models.write_model(folder / "model", request.param, **WIDE)
    manifest = pipeline.run(str(model), folder / "out", QUICK, ALL)
    return Package(folder / "out", manifest, model, pipeline.EvaluationText(folder))


def undelivered(package: Package, target: str) -> float:
    """Bytes of the bits that were asked for and not delivered."""
    bits = package.manifest["layouts"][TARGETS[target].layout.name]["bits"]
    return (bits["requested"] - bits["stored"]) * bits["linear_weights"] / 8


def sizes(package: Package) -> dict[str, int]:
    return {file["path"]: file["bytes"] for file in package.manifest["files"]}


def check_sizes(package: Package, planned: dict[str, Any], target: str, tolerance: float) -> None:
    """Exact sizes are met but for undelivered bits; estimates are near."""
    found = sizes(package)
    for file in planned["files"]:
        excess = file["bytes"] - found[file["path"]]
        if file["exact"]:
            assert 0 <= excess <= undelivered(package, target) + tolerance, file
        else:
            assert abs(excess) <= 0.35 * found[file["path"]], file
        assert found[file["path"]] <= file["most"], file
    assert planned["file_bytes"] == sum(file["bytes"] for file in planned["files"])


def missing_segments(package: Package) -> int:
    """How many more segments the linears of the column layout could have."""
    linears = list(read_checkpoint(package.folder / "quantized").model.linears())
    possible = sum(min(len(QUICK.formats), -(-linear.columns // 64)) for linear in linears)
    return possible - sum(len(linear.segments) for linear in linears)


def test_files_are_as_large_as_planned_less_the_bits_that_fit_no_block(ran):
    planned = plan_model(str(ran.model), QUICK, ALL)["targets"]
    for target in ALL:
        spare = HEADER_BYTES + (missing_segments(ran) * SEGMENT_BYTES if target == "container" else 0)
        check_sizes(ran, planned[target], target, spare)
    # All that is large is planned.
    paths = {file["path"] for target in planned.values() for file in target["files"]}
    others = (
        "golden.npz",
        "tokenizer.json",
        "report.html",
        *(f"{layout.folder}/model.safetensors" for layout in LAYOUTS.values()),
    )
    assert {path for path, size in sizes(ran).items() if size > 20_000 and not path.endswith(others)} == paths


@pytest.mark.parametrize("target", BOTH)
def test_a_model_of_partial_blocks_is_planned_too(package, target):
    """Where rows are no multiples of 16 or 32 the padding between tensors is not known, but its most is."""
    planned = plan_model(str(package.model), RECIPE, [target])["targets"][target]
    segments = 2 * sum(len(linear.segments) for linear in read_checkpoint(package.folder / "quantized").model.linears())
    spare = HEADER_BYTES + missing_segments(package) * SEGMENT_BYTES + segments * 64
    check_sizes(package, planned, target, spare)


def test_weights_are_as_large_as_planned(package):
    planned = plan_model(str(package.model), RECIPE, BOTH)
    assert (planned["name"], planned["family"]) == (package.model.name, "llama")
    assert planned["linear_weights"] == package.manifest["bits"]["linear_weights"]
    model = read_checkpoint(package.folder / "quantized").model
    matrices = [*model.linears(), model.embedding, *([model.head] if model.head else [])]
    stored = sum(linear.stored_bytes for linear in matrices) + sum(group.permutation_bytes for group in model.groups)
    stored += sum(tensor.nbytes for tensor in model.tensors.values())
    for target in BOTH:
        found = planned["targets"][target]
        assert found["reachable"] and found["lowest_bits"] < RECIPE.bits < found["highest_bits"]
        assert 0 <= found["weight_bytes"] - stored <= undelivered(package, target) + 1


@pytest.mark.parametrize("bits, reachable", [(1.2, False), (1.3, True), (8.3, True), (8.5, False)])
def test_plan_and_run_agree_on_what_is_reachable(even_model, tmp_path, bits, reachable):
    recipe = replace(QUICK, bits=bits)
    found = plan_model(str(even_model), recipe, ["container"])["targets"]["container"]
    assert found["reachable"] is reachable
    if reachable:
        manifest = pipeline.run(str(even_model), tmp_path / "out", recipe, ["container"])
        assert bits - 0.05 < manifest["bits"]["stored"] <= bits
        assert (tmp_path / "out/model.mgptq.gguf").stat().st_size <= found["file_bytes"]
    else:
        with pytest.raises(BudgetError):
            pipeline.run(str(even_model), tmp_path / "out", recipe, BOTH, export_targets=False)


def test_plan_reads_no_weights(even_model, tmp_path):
    shutil.copytree(even_model, tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    planned = plan_model(str(tmp_path / "shape"), RECIPE, BOTH)
    assert planned["targets"].keys() == set(BOTH)
    for target, found in plan_model(str(even_model), RECIPE, BOTH)["targets"].items():
        # The name of the model is in the container.
        for total in ("file_bytes", "model_bytes"):
            assert abs(found.pop(total) - planned["targets"][target].pop(total)) <= 32
        assert found.pop("files")[0]["path"] == planned["targets"][target].pop("files")[0]["path"]
        assert found == planned["targets"][target]


def test_a_gguf_file_and_its_folder_give_the_same_plan(tmp_path):
    folder = tiny_models.write_model(tmp_path / "tiny", "llama", **WIDE)
    write_gguf(tmp_path / "tiny.gguf", AutoModelForCausalLM.from_pretrained(folder), folder)
    from_folder, from_file = (plan_model(str(path), QUICK, ALL) for path in (folder, tmp_path / "tiny.gguf"))
    for target in ALL:
        one, other = from_folder["targets"][target], from_file["targets"][target]
        # Tokenizer files tell the same in other words.
        for left, right in zip(one.pop("files"), other.pop("files"), strict=True):
            assert left["path"] == right["path"]
            assert left["bytes"] == pytest.approx(right["bytes"], abs=8192 if target == "container" else 512)
        for total in ("file_bytes", "model_bytes"):
            del one[total], other[total]
    assert from_folder == from_file


def reason(model: Path, target: str) -> str:
    found = plan_model(str(model), QUICK, [target])["targets"][target]
    assert found["reachable"] is False and "files" not in found
    return found["reason"]


def test_targets_out_of_reach_are_planned_with_their_reasons(tmp_path):
    narrow = {"hidden_size": 96, "intermediate_size": 160}
    model = tiny_models.write_llama(tmp_path / "narrow", **narrow)
    assert "4.5000 to 8.5000 bits" in reason(model, "llama.cpp")
    model = tiny_models.write_llama(tmp_path / "uneven", **narrow | {"intermediate_size": 200})
    assert "rows of 200 weights are not whole blocks" in reason(model, "llama.cpp")
    model = tiny_models.write_llama(tmp_path / "heads", hidden_size=96, head_dim=12)
    assert "head size that is a multiple of 8" in reason(model, "onnx")


def test_a_model_whose_tokenizer_the_target_cannot_write_is_out_of_its_reach(tmp_path):
    model = tiny_models.write_llama(tmp_path / "model", **WIDE)
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in reason(model, "llama.cpp")
    assert plan_model(str(model), QUICK, ["container"])["targets"]["container"]["reachable"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer_files_are_refused(tmp_path, name):
    model = tiny_models.write_llama(tmp_path / "model", **WIDE)
    (model / name).write_text("{")
    with pytest.raises(BadInputError, match=name):
        plan_model(str(model), QUICK, ALL)


def test_a_large_model_is_planned_in_seconds(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", vocab_size=32_000, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    tiny_models.write_tokenizer(tmp_path, 2000)
    started = time.process_time()
    planned = plan_model(str(tmp_path), QUICK, ALL)
    assert time.process_time() - started < 10
    for target in ALL:
        found = planned["targets"][target]
        assert 1.0 < found["file_bytes"] / found["weight_bytes"] < 1.005


# The command


def plan_lines(model: Path, *arguments: object) -> list[str]:
    found = CliRunner().invoke(cli.cli, ["plan", str(model), *map(str, arguments)])
    assert found.exit_code == 0, found.output
    return found.stdout.splitlines()


def test_the_command_says_sizes_and_what_each_row_length_allows(tmp_path):
    model = tiny_models.write_llama(tmp_path / "model", **EVEN | {"intermediate_size": 512})
    planned = plan_model(str(model), replace(RECIPE, bits=3.0), ALL)["targets"]
    lines = plan_lines(model, "--bits", "3")
    assert max(map(len, lines)) <= 80
    for target, about in (("container", ""), ("onnx", "about "), ("llama.cpp", "")):
        (row,) = [line for line in lines if f"│ {target} " in line]
        assert f"│ {about}{planned[target]['file_bytes'] / 1e6:.1f} MB" in row
    start = lines.index("llama.cpp: rows of 128 (attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up)")
    assert lines[start + 1 :] == [
        "  take q1_0, q2_0, q4_0, q8_0",
        "  not q2_k, q3_k, q4_k, q6_k: rows of 128 are not whole blocks of 256",
        "llama.cpp: rows of 512 (ffn_down)",
        "  take q1_0, q2_0, q4_0, q8_0",
        "  not q2_k, q3_k, q4_k, q6_k: do not fit every linear; --ggml-types lets them in",
    ]


def test_the_command_says_why_a_target_cannot_be_reached(tmp_path):
    model = tiny_models.write_llama(tmp_path / "model", hidden_size=96, intermediate_size=160)
    text = " ".join(" ".join(plan_lines(model)).replace("│", " ").split())
    assert "not reachable: formats of this target give 4.5000 to 8.5000" in text


@pytest.mark.parametrize(
    "asked, told",
    [
        (("--bits", 1), "reach 1 stored bits with this model: container, onnx: formats of this target give 1.25"),
        (("--size", 5000, "--targets", "onnx"), "5000 bytes are too few for target onnx"),
    ],
)
@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_what_no_target_can_reach_is_planned_and_then_refused(main, even_model, asked, told, json_flag):
    options = ("--targets", "container,onnx", *asked)
    code, out, err = main("plan", even_model, *options, *json_flag)
    assert code == 1 and err.count("error: ") == 1 and told in err and err.endswith(" [BudgetError]\n")
    if json_flag:
        assert not any(target["reachable"] for target in json.loads(out)["targets"].values())
    else:
        assert "not reachable" in out


@pytest.mark.parametrize(
    "bits, targets", [(("--bits", 3), "container,llama.cpp"), ((), "llama.cpp")], ids=["one can", "nothing asked"]
)
def test_a_plan_that_answers_what_was_asked_ends_well(main, tmp_path, bits, targets):
    model = tiny_models.write_llama(tmp_path / "model", hidden_size=96, intermediate_size=160)
    code, out, err = main("plan", model, *bits, "--targets", targets)
    assert (code, err) == (0, "") and "not reachable" in out
