"""Models that are larger than what memory there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgptq_export import memory as memory_module
from mgptq_export import pipeline
from mgptq_export.calibration import DriftFlow, LayerFlow
from mgptq_export.compute import batches
from mgptq_export.memory import IN_MEMORY, Memory, memory_for
from mgptq_export.memory_errors import typed_memory_errors
from mgptq_export.memory_needs import LIBRARIES, Needs, needs_of
from mgptq_export.models import count_model_weights, load_source
from mgptq_export.recipe import Recipe
from mgptq_runtime.errors import BadInputError, OutOfMemoryError, UnsupportedModelError

RECIPE = Recipe(samples=8, sequence_length=32, sensitivity_samples=4, trials=2, training_steps=5, recovery_steps=2)
# Too little for the least model in memory, and enough for as many tokens at once as are quick.
ROOMY = 900_000_000
NEEDS = Needs(layer=100_000_000, factor=200_000_000, token=400_000, length=512)


@pytest.fixture
def paged(tmp_path: Path) -> Memory:
    return Memory(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_kept_in_a_file_is_what_was_given(paged, dtype, monkeypatch):
    monkeypatch.setattr(memory_module, "PIECE", 7)
    tensor = (100 * torch.randn(5, 3, 2)).to(dtype)
    kept = paged.keep(tensor)
    assert torch.equal(kept, tensor) and kept.dtype == dtype and kept.data_ptr() != tensor.data_ptr()
    kept += 1
    paged.release(kept)
    assert torch.equal(kept, tensor + 1)


@pytest.mark.parametrize(("length", "expected"), [(512, [4, 3]), (2048, [1] * 7), (3000, [1] * 7), (100, [7])])
def test_longer_sequences_go_through_the_model_fewer_at_a_time(length, expected):
    assert [len(batch) for batch in batches(torch.zeros(7, length, dtype=torch.int64), 2048)] == expected


def test_sums_begin_with_zeros_and_lie_where_weights_do(paged, tmp_path):
    mapped = Path("/proc/self/maps").read_text
    for memory in (IN_MEMORY, paged):
        total = memory.zeros(3, 5, device=torch.device("cpu"))
        assert (str(tmp_path) in mapped()) == memory.is_paged
        assert torch.equal(total.addmm_(torch.ones(3, 2), torch.ones(2, 5)), torch.full((3, 5), 2.0))
        memory.release(total)
        assert torch.equal(total, torch.full((3, 5), 2.0))


@pytest.mark.parametrize("is_paged", [False, True])
def test_hessians_and_drift_lie_in_files_where_weights_do(even_model, tmp_path, is_paged):
    source = load_source(str(even_model), memory=Memory(tmp_path) if is_paged else IN_MEMORY)
    flow = DriftFlow(source, source.copy(), torch.arange(64).view(2, 32))
    flow.enter(0, measuring=True)
    mapped = Path("/proc/self/maps").read_text
    measured = [flow.measure(0, group) for group in source.layer_groups(0)]
    files = 2 * len(measured) if is_paged else 0
    before = mapped().count(str(tmp_path))
    measured.clear()
    assert before - mapped().count(str(tmp_path)) == files


def test_what_a_layer_remembers_lies_in_files_until_it_is_left(even_model, tmp_path):
    source = load_source(str(even_model), memory=Memory(tmp_path))
    flow = DriftFlow(source, None, torch.arange(64).view(2, 32))
    flow.enter(0, measuring=True)
    mapped = Path("/proc/self/maps").read_text
    before = mapped().count(str(tmp_path))
    for group in source.layer_groups(0):
        flow.measure(0, group)
    assert mapped().count(str(tmp_path)) - before == 2  # what attn_output and ffn_down read
    flow.leave(0)
    assert mapped().count(str(tmp_path)) == before


def test_files_have_no_names_and_go_with_the_tensor(paged, tmp_path):
    kept = paged.keep(torch.ones(1000))
    assert not list(tmp_path.iterdir())
    mapped = Path("/proc/self/maps").read_text
    assert str(tmp_path) in mapped()
    del kept
    assert str(tmp_path) not in mapped()


def test_other_types_are_made_on_the_way(paged):
    tensor = torch.randn(4, 4).bfloat16()
    for memory in (paged, IN_MEMORY):
        kept = memory.keep(tensor, torch.float32)
        assert kept.dtype == torch.float32 and torch.equal(kept, tensor.float())
    same = torch.ones(3)
    assert IN_MEMORY.keep(same) is same and IN_MEMORY.keep(same, torch.float32) is not same


def test_a_transposed_tensor_is_kept_as_it_is(paged):
    tensor = torch.randn(6, 4).t()
    assert torch.equal(paged.keep(tensor), tensor)


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_copy_of_a_model_has_weights_of_its_own(even_model, tmp_path, is_paged):
    source = load_source(str(even_model), memory=Memory(tmp_path) if is_paged else IN_MEMORY)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    copied = source.copy()
    assert copied.tied == source.tied
    for parameter in copied.model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert not torch.equal(source.model(tokens).logits, copied.model(tokens).logits)


def test_a_model_in_files_is_the_same_model(even_model, tmp_path):
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            load_source(str(even_model), memory=memory).model(tokens).logits for memory in (IN_MEMORY, Memory(tmp_path))
        ]
    assert torch.equal(*logits)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_in_files_gives_the_same_bytes(even_model, tmp_path):
    assert memory_for(count_model_weights(str(even_model)), tmp_path, ROOMY).is_paged
    for name, most in (("in-memory", None), ("in-files", ROOMY)):
        pipeline.run(str(even_model), tmp_path / name, RECIPE, ["container", "llama.cpp"], max_memory=most)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-files", "in-memory"]
    assert contents(tmp_path / "in-files") == contents(tmp_path / "in-memory")


def test_a_low_limit_takes_fewer_tokens_at_once_which_the_manifest_says_and_a_rerun_repeats(even_model, tmp_path):
    for name in ("once", "again"):
        manifest = pipeline.run(str(even_model), tmp_path / name, RECIPE, ["container"], max_memory=1)
        assert manifest["tokens_at_once"] == RECIPE.sequence_length
    assert contents(tmp_path / "once") == contents(tmp_path / "again")


@pytest.mark.parametrize(("most", "sequences"), [(None, [8]), (ROOMY, [8]), (1, [1] * 8)])
def test_a_limit_says_how_many_tokens_go_through_the_model_at_once(even_model, tmp_path, most, sequences):
    source = pipeline.load_original(str(even_model), [], tmp_path, "cpu", most, False, 32)
    states = LayerFlow(source.copy(), torch.zeros(8, 32, dtype=torch.int64)).states
    assert [len(state) for state in states] == sequences


@pytest.mark.parametrize(
    ("most", "tokens"),
    [(NEEDS.full, None), (NEEDS.full - 1, 1536), (NEEDS.least, 512), (NEEDS.least - 1, 512), (1, 512)],
)
def test_tokens_at_once_are_whole_sequences_that_fit_one_at_least(most, tokens):
    assert NEEDS.tokens_within(most) == tokens


def test_a_limit_that_is_too_low_is_told_with_one_that_is_not(even_model, tmp_path, caplog):
    pipeline.load_original(str(even_model), [], tmp_path, "cpu", 10_000_000, False, 32)
    assert "--max-memory 10.00 MB is less than a run takes: about 6" in caplog.text
    caplog.clear()
    pipeline.load_original(str(even_model), [], tmp_path, "cpu", ROOMY, False, 32)
    assert not caplog.text


def test_what_a_model_takes_is_said_where_memory_ran_out(even_model):
    needs = needs_of(load_source(str(even_model)), 32)
    assert needs.least == needs.full > needs.layer + needs.factor + LIBRARIES  # so narrow that tokens do not count
    said = r"--max-memory \d+MB weights lie.* start anew.* --max-memory \d+MB"
    with pytest.raises(OutOfMemoryError, match=said), typed_memory_errors(needs):
        raise MemoryError
    said = "--max-memory 900MB, which takes one sequence of 512 tokens"
    with pytest.raises(OutOfMemoryError, match=said), typed_memory_errors(), typed_memory_errors(NEEDS):
        raise MemoryError


def test_a_full_disk_is_an_error_and_no_crash(even_model, tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"], max_memory=1)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_once_sums_are_made_is_an_error_and_what_was_finished_stays(
    even_model, tmp_path, monkeypatch
):
    def full(memory: Memory, *shape: int, device: torch.device) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Memory, "zeros", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"], max_memory=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


def test_a_package_is_evaluated_in_files_as_it_is_in_memory(even_model, text_file, tmp_path):
    pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"])
    text = pipeline.EvaluationText(text_file, 32, 2)
    expected = pipeline.evaluate_package(tmp_path / "out", str(even_model), text)
    assert pipeline.evaluate_package(tmp_path / "out", str(even_model), text, max_memory=1) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_used_where_memory_is_short(tmp_path):
    assert memory_for(10**6, tmp_path, 2**31) is IN_MEMORY
    assert memory_for(10**9, tmp_path, 2**31).is_paged
    assert memory_for(10**14, tmp_path, None).is_paged


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_too_little_memory_is_typed_and_says_what_would_fit(error):
    with pytest.raises(OutOfMemoryError, match="--max-memory"), typed_memory_errors():
        raise error


def test_commands_that_cannot_be_resumed_are_not_told_to_be():
    with pytest.raises(OutOfMemoryError, match="too little memory") as told, typed_memory_errors(resumable=False):
        raise MemoryError
    assert "--" not in str(told.value)


def test_too_little_memory_is_seen_behind_what_was_made_of_it():
    with pytest.raises(OutOfMemoryError), typed_memory_errors():
        try:
            raise MemoryError("Unable to allocate 64.0 GiB")
        except MemoryError as error:
            raise UnsupportedModelError("the graph cannot be built") from error


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory_module, "CONTROL_GROUP_FILES", ((limit, used),))
    used.write_text("1000000\n")
    limit.write_text("2000000\n")
    assert memory_for(1, tmp_path, None).is_paged
    limit.write_text("max\n")
    assert memory_for(1, tmp_path, None) is IN_MEMORY


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), typed_memory_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_process_without_memory_ends_with_one_message(even_model, tmp_path):
    script = (
        "import sys, torch\n"
        "from mgptq_export import pipeline\n"
        "from mgptq_export.cli import main\n"
        "torch.set_num_threads(1)\n"
        "pipeline.calibrate = lambda *_: torch.empty(1 << 45)\n"
        f"sys.argv = ['mgptq-export', 'run', {str(even_model)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert "error: there is too little memory" in done.stderr and "Traceback" not in done.stderr


def test_the_measuring_tool_measures(tmp_path):
    command = [sys.executable, "tools/measure_memory.py", "--hidden", "512", "--intermediate", "768"]
    options = ["--vocabulary", "256", "--", "--samples", "2", "--sequence-length", "16", "--allocator", "hessian"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    found = json.loads(done.stdout)
    assert found["layer_float32"] == pytest.approx(
        (512 * 512 * 2 + 2 * 64 * 512 + 3 * 512 * 768 + 1024) * 4e-6, abs=0.1
    )
    assert found["peak"] >= found["peak_anonymous"] > 0
