"""Several processes make the package that one makes, and end together. What one process makes is trusted."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from pages import page
from small_runs import EVEN

from mgptq_export import cli as command
from mgptq_export import pipeline
from mgptq_export.allocation.linear import NEIGHBOURS
from mgptq_export.checkpoint import read_checkpoint
from mgptq_export.distributed import World, _pack
from mgptq_export.launch import Launch
from mgptq_export.layouts import LAYOUTS, stacked_rows
from mgptq_export.manifest import read_manifest, verify
from mgptq_export.models import load_shape, load_source
from mgptq_export.quantize import _rows_of, calibrate, round_to_nearest
from mgptq_export.recipe import Recipe
from mgptq_export.recovery.student import trainable
from mgptq_export.recovery.teacher import Teacher
from mgptq_export.recovery.training import _draw, _Losses, _sum_gradients
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.quantized_model import QuantizedModel
from mgptq_runtime.tokenizer import encode_text

# What a rank does differently; FAULT names it.
SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from mgptq_export import compute, distributed, quantize
from mgptq_runtime.errors import NumericalError

compute._multiplies_bfloat16 = lambda device: False
solve, calls = quantize._solve_group, []

def at_fault(*arguments):
    calls.append(1)
    if len(calls) == 4:
        if os.environ["FAULT"] == "error":
            raise NumericalError("a matrix on fire")
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return solve(*arguments)

if os.environ.get("FAULT") == "hang":
    distributed.TIMEOUT = timedelta(seconds=15)
if os.environ.get("FAULT") and os.environ["RANK"] == "1":
    quantize._solve_group = at_fault
from mgptq_export.__main__ import main
main()
"""
TARGETS = ["container", "llama.cpp"]
LONG = Recipe(samples=24, own_samples=3, sequence_length=64, trials=3, recovery_steps=3)
OPTIONS = "--samples 24 --own-samples 3 --sequence-length 64 --trials 3 --recovery-steps 3 --threads 1"
QUICK = ("--allocator", "hessian", "--recovery-steps", "0", "--targets", ",".join(TARGETS))
EXCHANGED = re.compile(r"2 ranks exchanged (\d+) bytes summed, (\d+) bytes gathered, (\d+) bytes from the first")
# torch's archive around every object.
OBJECT_BYTES = 6000


@dataclass(frozen=True)
class Desk:
    """A folder with a model and texts, in which processes are started."""

    folder: Path

    def start(self, out: str, *options: str, ranks: int = 2, fault: str = "") -> subprocess.Popen[str]:
        """Ranks that quantize the model, under torchrun."""
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "script.py"]
        words += ["run", "model", "-o", out, *OPTIONS.split(), "--calibration", "text.txt", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, out: str, *options: str, ranks: int = 2, fault: str = "") -> tuple[int, str, str]:
        """The same, ended: exit code of torchrun, stdout and stderr of all."""
        with self.start(out, *options, ranks=ranks, fault=fault) as running:
            printed, told = running.communicate(timeout=300)
        return running.returncode, printed, told


def train(folder: Path, text: str, steps: int) -> None:
    """Teach a model a text: what a random one makes of another order of sums says nothing about perplexity."""
    source = load_source(str(folder))
    tokens, model = torch.tensor(encode_text(source.tokenizer, text)), source.model.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (16,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(64)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun gives every rank: with another number one process, too, sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    tiny_models.write_llama(folder / "model", **EVEN, initializer_range=0.02)
    train(folder / "model", tiny_models.text(90_000)[24_000:], steps=80)
    (folder / "text.txt").write_text(tiny_models.text(20_000))
    (folder / "held-out.txt").write_text(tiny_models.text()[20_000:24_000])
    (folder / "script.py").write_text(SCRIPT)
    return Desk(folder)


@pytest.fixture(scope="module")
def alone(desk: Desk) -> Path:
    """What one process makes."""
    text = pipeline.EvaluationText(desk.folder / "held-out.txt", window=64, windows=8)
    recipe = replace(LONG, calibration=str(desk.folder / "text.txt"))
    pipeline.run(str(desk.folder / "model"), desk.folder / "alone", recipe, TARGETS, text=text)
    return desk.folder / "alone"


@pytest.fixture(scope="module")
def together(desk: Desk) -> tuple[Path, str, str]:
    """What two make, and what they said."""
    options = ("--targets", ",".join(TARGETS), "--evaluate", "held-out.txt", "--window", "64", "--windows", "8")
    code, printed, told = desk.run("together", *options, "--json", "--quiet")
    assert code == 0, told
    return desk.folder / "together", printed, told


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What they make


@pytest.fixture(scope="module")
def counted(desk: Desk) -> Path:
    """What two make without learning from trials, and without recovery."""
    code, _, told = desk.run("counted", *QUICK, "--log-file", "counted.log")
    assert code == 0, told
    return desk.folder / "counted"


def decided(folder: Path) -> list[object]:
    """Who got which format, and in which order columns lie."""
    linears = read_checkpoint(folder).model.linears()
    formats: list[object] = [part.format for one in linears for part in one.segments for _ in range(part.columns // 64)]
    return formats + [place for one in linears if one.permutation is not None for place in one.permutation.tolist()]


def test_ranks_decide_nearly_what_one_process_decides(desk, counted):
    recipe = replace(LONG, allocator="hessian", recovery_steps=0, calibration=str(desk.folder / "text.txt"))
    manifest = pipeline.run(str(desk.folder / "model"), desk.folder / "uncounted", recipe, TARGETS)
    for name, layout in LAYOUTS.items():
        one, two = (decided(folder / layout.folder) for folder in (desk.folder / "uncounted", counted))
        assert sum(a == b for a, b in zip(one, two, strict=True)) > 0.7 * len(one)
        bits = [found["layouts"][name]["bits"]["stored"] for found in (manifest, read_manifest(counted))]
        assert bits[1] == pytest.approx(bits[0], abs=0.03)


def test_ranks_deliver_the_quality_of_one_process(alone, together):
    one, two = (read_manifest(out)["evaluation"]["results"] for out in (alone, together[0]))
    assert one.keys() == two.keys()
    for name, quality in one.items():
        assert two[name]["perplexity"] == pytest.approx(quality["perplexity"], rel=1e-2)


def test_only_the_first_rank_prints_and_writes(together):
    out, printed, told = together
    assert json.loads(printed) == read_manifest(out)
    assert told == ""
    assert verify(out) == []
    assert not out.with_name("together.unfinished").exists()


def test_rows_that_ranks_share_are_solved_as_one_process_solves_them(desk):
    source = load_source(str(desk.folder / "model"))
    recipe = replace(LONG, allocator="hessian", calibration=str(desk.folder / "text.txt"))
    calibration = calibrate(source, recipe)
    for layout in LAYOUTS.values():
        allocated = layout.allocate(source, calibration, recipe, lambda _: pytest.fail("no trial"))
        for group in source.groups():
            hessian = calibration.statistics.groups[group.name].hessian
            parts = [
                layout.solve_group(_rows_of(group, world), hessian, allocated, recipe).group.linears
                for world in (Rank(0, 2), Rank(1, 2))
            ]
            whole = layout.solve_group(group, hessian, allocated, recipe).group.linears
            for linear, shares in zip(whole, zip(*parts, strict=True), strict=True):
                found = stacked_rows(shares)
                assert found.rows == linear.rows
                assert all(np.array_equal(a.data, b.data) for a, b in zip(found.segments, linear.segments, strict=True))


# What they exchange


def summed_bytes(hidden: int, keys: int, intermediate: int, layouts: int = 1) -> int:
    """Of a Llama block, see the page: when it is calibrated, and when it is solved in each layout."""
    hessians = 4 * (3 * hidden**2 + intermediate**2) + 4 * 8
    sensitivities = 4 * (3 * hidden + 2 * keys + 2 * intermediate)
    drift = 4 * (3 * hidden**2 + hidden * intermediate)
    return hessians + sensitivities + layouts * (hessians + drift)


def test_ranks_exchange_what_the_formula_says(desk, counted):
    log = (desk.folder / "counted.log").read_text()
    summed, gathered, _ = map(int, EXCHANGED.search(log).groups())
    assert log.count("mgptq-export run") == 1
    shape = load_shape(str(desk.folder / "model"))
    layers, hidden = len(shape.layers), EVEN["hidden_size"]
    keys = hidden // EVEN["num_attention_heads"] * EVEN["num_key_value_heads"]
    vocabulary = shape.model.config.vocab_size
    head = 4 * hidden**2 + 8 + 4 * (vocabulary + hidden)
    assert summed == layers * summed_bytes(hidden, keys, EVEN["intermediate_size"], len(LAYOUTS)) + head
    least = sum(map(gathered_bytes, (read_checkpoint(counted / layout.folder).model for layout in LAYOUTS.values())))
    exchanges = 1 + len(shape.groups()) + layers + math.ceil(len(shape.linear_kinds()) * layers / 2)
    assert least <= gathered <= least + len(LAYOUTS) * exchanges * 2 * OBJECT_BYTES


def test_what_is_sent_is_hardly_more_than_its_bytes():
    sent = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8)
    packed = _pack({"data": sent})
    assert len(packed) <= sent.nbytes + OBJECT_BYTES


def gathered_bytes(model: QuantizedModel) -> int:
    """What is solved, and of the columns what the allocator knows."""
    linears = [*model.linears(), model.embedding]
    columns = sum(group.linears[0].columns for group in model.groups)
    return sum(x.data.nbytes for linear in linears for x in linear.segments) + columns * (12 + 20 * NEIGHBOURS)


SHAPES = {"7B": (4096, 4096, 11008, 32), "70B": (8192, 1024, 28672, 80), "405B": (16384, 1024, 53248, 126)}


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_page_tells_what_the_formula_gives(name):
    hidden, keys, intermediate, layers = SHAPES[name]
    weights = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * intermediate
    summed, packed = summed_bytes(hidden, keys, intermediate) / 1e9, weights * 2.5 / 8 / 1e9
    seconds = 2 * summed / 1.25  # a large ring, 10 Gbit/s
    cells = f"{summed:.2f}", f"{packed:.2f}", f"{summed * layers:.0f}", f"{seconds:.1f}"
    row = f"| Llama {name} | {hidden} | {intermediate} | {layers} | {' | '.join(cells)} |"
    assert row in page("docs/distributed.md").splitlines(), row


# How they end


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("error", "error on rank 1: a matrix on fire"),
        pytest.param("kill", "SIGKILL", marks=pytest.mark.slow),
        pytest.param("hang", "error: another rank has ended or cannot be reached", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_all_and_costs_nothing_that_was_finished(desk, counted, fault, told):
    code, printed, said = desk.run(fault, *QUICK, fault=fault)
    assert (code, printed) == (1, "")
    assert told in said and "the same command with --resume goes on" in said
    assert not (desk.folder / fault).exists()
    code, _, said = desk.run(fault, *QUICK, "--resume")
    assert code == 0, said
    assert contents(desk.folder / fault) == contents(counted)


@pytest.mark.slow
def test_an_interrupt_ends_all_ranks_and_keeps_what_was_finished(desk):
    journal = desk.folder / "interrupted.unfinished" / "journal"
    with desk.start("interrupted") as running:
        while running.poll() is None and not list(journal.glob("*.safetensors")):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=300)
    assert running.returncode != 0
    assert "the same command with --resume goes on" in told
    assert list(journal.glob("*.safetensors")) and not (desk.folder / "interrupted").exists()


# Who they are


class Rank(World):
    """One of several, which are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_and_every_row_is_one_ranks(size):
    ranks = [Rank(rank, size) for rank in range(size)]
    assert sorted(one for world in ranks for one in world.share(list(range(10)))) == list(range(10))
    assert [one for world in ranks for one in range(10)[world.rows(10)]] == list(range(10))


def test_ranks_without_a_sequence_of_a_step_still_have_one_to_read():
    shares = [_draw(10, 2, 3, 0, Rank(rank, 4)) for rank in range(4)]
    assert [[len(batch) for batch in batches] for _, batches in shares] == [[1, 1]] * 3 + [[0, 0]]
    assert all(len(chosen) for chosen, _ in shares)
    together = torch.cat([chosen[torch.cat(batches)] for chosen, batches in shares])
    chosen, batches = _draw(10, 2, 3, 0)
    assert sorted(together.tolist()) == sorted(chosen[torch.cat(batches)].tolist())


class Echo(Rank):
    """The first of two ranks that find the same."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def sum_(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def test_what_ranks_learn_in_a_step_adds_up_to_what_one_process_learns(desk):
    source = load_source(str(desk.folder / "model"))
    original, quantized = source.copy(), round_to_nearest(source, "b3", LONG)
    tokens = torch.arange(4 * 16).view(4, 16)
    with trainable(source, quantized, torch.float32) as student:
        losses, trained = _Losses(student, Teacher(original, tokens, torch.float32), tokens, 4), student.trained()

        def gradients(world: World) -> list[torch.Tensor]:
            for one in trained:
                one.values.grad = None
            losses.on(world.share(torch.arange(4)))[0].backward()
            return [torch.zeros_like(x.values) if x.values.grad is None else x.values.grad for x in trained]

        parts = [gradients(Rank(rank, 3)) for rank in range(3)]
        for whole, *shares in zip(gradients(World()), *parts, strict=True):
            torch.testing.assert_close(sum(shares), whole)
        found = gradients(Rank(4, 5))  # of a rank without a sequence
        assert not any(one.any() for one in found) and all(one.values.grad is None for one in trained)
        found = [one.clone() for one in gradients(World())]
        _sum_gradients(trained, Echo())
        for one, before in zip(trained, found, strict=True):
            assert torch.equal(one.values.grad, 2 * before)


def test_more_ranks_than_sequences_are_refused(desk):
    source = load_source(str(desk.folder / "model"))
    source.world = Rank(0, 6)
    with pytest.raises(BadInputError, match=r"6 processes are too many for 5 calibration sequences.*start at most 5"):
        calibrate(source, replace(LONG, samples=5, own_samples=0, calibration=str(desk.folder / "text.txt")))


LAUNCHED = {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def launched(*arguments: str) -> Any:
    return CliRunner().invoke(command.cli, list(arguments), env=LAUNCHED)


def test_commands_for_one_process_say_so():
    found = launched("verify", "package")
    assert found.exit_code == 2
    assert "torchrun started 2 processes, verify is for one" in " ".join(found.output.replace("│", " ").split())


def test_every_rank_takes_a_gpu_of_its_own_and_none_shares_one():
    assert Launch(3, 4, 1, 2).device("cuda") == "cuda:1"
    assert Launch(1, 2, 0, 1).device("cpu") == "cpu"
    assert Launch().device("cuda") == "cuda"
    with pytest.raises(BadInputError, match=r"'cuda:1' is for one process.*give --device cpu, or --device cuda"):
        Launch(1, 2, 1, 2).device("cuda:1")
