"""A run that was stopped goes on, and ends with the same bytes. The run that nothing stopped is trusted."""

import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from small_runs import RECIPE
from tiny_models import text, write_llama

from mgptq_export import pipeline
from mgptq_export.calibration import text as calibration_text
from mgptq_export.cli import main
from mgptq_export.journal import Journal, Record
from mgptq_export.manifest import read_manifest, verify
from mgptq_export.output import unfinished_run
from mgptq_export.recovery import training
from mgptq_export.sweep import sweep
from mgptq_export.targets import TARGETS
from mgptq_runtime.errors import BadInputError, OutputExistsError
from mgptq_runtime.signals import exit_on_signals

TARGETS_OF_BOTH_LAYOUTS = ["container", "llama.cpp"]
LONG = replace(RECIPE, trials=3, recovery_steps=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_llama(folder, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text())
    return path


@pytest.fixture(scope="module")
def uninterrupted(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "KEPT_EVERY", 1)
        pipeline.run(str(model), out, replace(LONG, calibration=str(text_file)), TARGETS_OF_BOTH_LAYOUTS)
    return out


class Killed(BaseException):
    """Nothing that the code could expect."""


def stop_where(strikes: Callable[[Journal, str], bool], patched: pytest.MonkeyPatch) -> None:
    """Let the process die once a record is kept that this says."""
    put = Journal.put

    def put_some(self: Journal, name: str, record: Record) -> None:
        put(self, name, record)
        if name in self and strikes(self, name):
            raise Killed

    patched.setattr(Journal, "put", put_some)


def stop_after(count: int, patched: pytest.MonkeyPatch) -> None:
    """Let the process die once so many records are kept."""
    kept = itertools.count(1)
    stop_where(lambda journal, name: next(kept) == count, patched)


def kind_of(journal: Journal, name: str) -> str:
    """What a record is, wherever in the model, and the part of the job that it belongs to: ``columns/trial/group``."""
    kind = journal._path(name).with_suffix("").as_posix().partition("/journal/")[2]
    for pattern, what in ((r"trial-\w+", "trial"), (r"blk\..*", "group"), (r"\d+", "#")):
        kind = re.sub(pattern, what, kind)
    return kind


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_kind_of_record_ends_with_the_same_bytes(
    model, text_file, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "KEPT_EVERY", 1)
    recipe, known = replace(LONG, calibration=str(text_file)), set()

    def is_new(journal: Journal, name: str) -> bool:
        before = len(known)
        known.add(kind_of(journal, name))
        return len(known) > before

    while not (tmp_path / "out").exists():
        with monkeypatch.context() as patched, suppress(Killed):
            stop_where(is_new, patched)
            pipeline.run(str(model), tmp_path / "out", recipe, TARGETS_OF_BOTH_LAYOUTS, resume=True)
    assert contents(tmp_path / "out") == contents(uninterrupted)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    of_a_layout = ("tables", "trial/group", "trial", "allocation", "recovery", "model")
    assert {"text", "statistics/hessians-#", "statistics/sensitivity"} <= known
    assert {f"{layout}/{kind}" for layout in ("columns", "tensors") for kind in of_a_layout} <= known


def test_a_run_for_a_size_is_resumed_to_the_same_bytes(model, tmp_path, monkeypatch):
    """Which formats the embedding has, and so how many bits linears have, is decided on the way."""
    recipe = replace(RECIPE, allocator="hessian", recovery_steps=1, size=250_000, embedding_format="mixed")
    whole = pipeline.run(str(model), tmp_path / "whole", recipe, ["container"])
    while not (tmp_path / "out").exists():
        with monkeypatch.context() as patched, suppress(Killed):
            stop_after(5, patched)
            pipeline.run(str(model), tmp_path / "out", recipe, ["container"], resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert whole["bits"]["requested"] == whole["recipe"]["bits"]


def test_what_is_finished_is_not_done_again(model, text_file, uninterrupted, tmp_path, monkeypatch):
    recipe = replace(LONG, calibration=str(text_file))
    write = TARGETS["container"].write

    def fail(checkpoint, golden, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "KEPT_EVERY", 1)
    monkeypatch.setitem(TARGETS, "container", replace(TARGETS["container"], write=fail))
    with pytest.raises(BadInputError, match="No space left on device"):
        pipeline.run(str(model), tmp_path / "out", recipe, TARGETS_OF_BOTH_LAYOUTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    assert not list(tmp_path.rglob("*.mgptq.gguf")) and not list(tmp_path.rglob("*.partial"))
    monkeypatch.setitem(TARGETS, "container", replace(TARGETS["container"], write=write))
    for stage in ("quantize", "recover"):
        monkeypatch.setattr(pipeline, stage, lambda *_, **__: pytest.fail("done again"))
    pipeline.run(str(model), tmp_path / "out", recipe, TARGETS_OF_BOTH_LAYOUTS, resume=True)
    assert contents(tmp_path / "out") == contents(uninterrupted)


@pytest.fixture
def stopped(model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was stopped in the middle."""
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(5, patched)
        pipeline.run(str(model), tmp_path / "out", replace(LONG, calibration=str(text_file)), ["container"])
    return tmp_path / "out"


def test_resuming_nothing_is_told(model, text_file, tmp_path, caplog):
    recipe = replace(RECIPE, allocator="uniform", calibration=str(text_file))
    pipeline.run(str(model), tmp_path / "out", recipe, ["container"], resume=True)
    assert "there is nothing to resume" in caplog.text


def test_a_stopped_run_is_not_thrown_away_unasked(model, text_file, stopped):
    before = contents(stopped.parent)
    recipe = replace(LONG, calibration=str(text_file))
    with pytest.raises(OutputExistsError, match="go on with --resume, or start anew with --overwrite"):
        pipeline.run(str(model), stopped, recipe, ["container"])
    assert contents(stopped.parent) == before


def test_overwrite_starts_anew(model, text_file, stopped):
    recipe = replace(RECIPE, allocator="uniform", calibration=str(text_file))
    pipeline.run(str(model), stopped, recipe, ["container"], overwrite=True)
    assert list(stopped.parent.iterdir()) == [stopped]
    assert read_manifest(stopped)["recipe"]["allocator"] == "uniform"


def test_a_resumed_run_must_be_the_same_and_the_difference_is_named(model, text_file, stopped, monkeypatch):
    before = contents(stopped.parent)
    recipe = replace(LONG, calibration=str(text_file))

    def refused(what: str, model: Path = model, recipe=recipe, targets=("container",), most: int | None = None) -> None:
        with pytest.raises(OutputExistsError, match=what):
            pipeline.run(str(model), stopped, recipe, list(targets), resume=True, max_memory=most)
        assert contents(stopped.parent) == before

    refused(
        r"recipe\.bits was 2\.5 and is 2\.75; recipe\.seed was 0 and is 3\.", recipe=replace(recipe, bits=2.75, seed=3)
    )
    refused(r"targets was \['container'\] and is \['container', 'onnx'\]", targets=("container", "onnx"))
    other = model.parent / "other"
    write_llama(other, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, seed=5)
    refused(r"model\.weights was", model=other)
    refused(rf"max_memory\.tokens_at_once was None and is {recipe.sequence_length}\.", most=1)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "versions", lambda: {"torch": "9.9"})
        refused(r"versions\.torch was '2.* and is '9\.9'")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "compute_dtype", lambda device: torch.float64)
        refused(r"computed_in was .* and is 'torch\.float64'")
    text_file.write_text(text() + " More.")
    try:
        refused("text was")
    finally:
        text_file.write_text(text())


def test_a_wrong_input_costs_a_resumed_run_nothing(model, stopped):
    before = contents(stopped.parent)
    with pytest.raises(BadInputError):
        pipeline.run(str(model / "nowhere"), stopped, LONG, ["container"], resume=True)
    assert contents(stopped.parent) == before


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("wrong, told", [("nowhere", "is no model"), ("", "no config.json")])
def test_a_model_that_is_not_there_is_told_before_the_run_that_was_stopped(stopped, text_file, command, wrong, told):
    before = contents(stopped.parent)
    model = str(stopped.parent / wrong)
    with pytest.raises(BadInputError, match=told):
        if command == "run":
            pipeline.run(model, stopped, LONG, ["container"])
        else:
            sweep(model, stopped, LONG, [2.5], ["container"], pipeline.EvaluationText(text_file))
    assert contents(stopped.parent) == before


def test_nothing_is_fetched_of_a_model_before_the_run_that_was_stopped_is_told(stopped, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(OutputExistsError, match="--resume"):
        pipeline.run("owner/model", stopped, LONG, ["container"])


def test_a_data_set_of_the_hub_is_read_once(model, tmp_path, monkeypatch):
    """It may change, or be out of reach, before recovery needs it."""
    recipe = replace(LONG, calibration="someone/texts")
    documents = Mock(side_effect=lambda name: [text()])
    monkeypatch.setattr(calibration_text, "_hub_documents", documents)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(5, patched)
        pipeline.run(str(model), tmp_path / "out", recipe, ["container"])
    documents.side_effect = BadInputError("no network")
    pipeline.run(str(model), tmp_path / "out", recipe, ["container"], resume=True)


def test_a_damaged_record_is_named(model, text_file, stopped):
    record = stopped.parent / "out.unfinished/journal/statistics/hessians-0.safetensors"
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(BadInputError, match=r"hessians-0\.safetensors is damaged .* start anew with --overwrite"):
        pipeline.run(str(model), stopped, replace(LONG, calibration=str(text_file)), ["container"], resume=True)


def test_a_second_process_is_refused(tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys; from pathlib import Path\n"
        "from mgptq_export.output import unfinished_run\n"
        "from mgptq_runtime.errors import OutputExistsError\n"
        "try:\n"
        "    with unfinished_run(Path(sys.argv[1]), overwrite=True, resume=False): pass\n"
        "except OutputExistsError as error: print(error)\n"
    )
    with unfinished_run(out, overwrite=False, resume=False) as first:
        done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=120)
        assert "another process is at work on" in done.stdout, done.stderr
        assert first.folder.is_dir()
    assert out.is_dir() and list(tmp_path.iterdir()) == [out]


def test_records_come_back_as_they_were(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1], "empty": np.zeros((0, 4), np.float32)}
    journal = Journal(tmp_path).within("part")
    assert journal.get("x") is None and journal.empty
    record = journal.once("x", lambda: Record(arrays, {"steps": [1, 2.5, None]}))
    found = journal.once("x", lambda: pytest.fail("it is known"))
    assert record.facts == found.facts
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found.arrays[name], array) and found.arrays[name].dtype == array.dtype
    assert not journal.empty and "x" in journal and "x" not in Journal(tmp_path)


def test_a_journal_counts_what_it_wrote_in_all_parts_of_the_job(tmp_path):
    journal = Journal(tmp_path)
    journal.put("x", Record({"a": np.zeros(1000)}))
    journal.within("part").put("y", Record(facts="y"))
    assert journal.kept.records == 2
    assert journal.kept.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > 8000
    assert journal.kept.seconds > 0


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.put("x", Record(facts="old"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.put("x", Record(facts="new"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert journal.get("x") == Record({}, "old")


def long_run(model: Path, text_file: Path, out: Path, *options: str) -> list[str]:
    """What is typed behind the command."""
    recipe = ["--samples", "4", "--own-samples", "1", "--sequence-length", "64", "--trials", "3"]
    recipe += ["--recovery-steps", "40", "--threads", "1", "--targets", "container,llama.cpp"]
    return ["run", str(model), "-o", str(out), *recipe, "--calibration", str(text_file), *options]


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(model, text_file, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "mgptq_export", *long_run(model, text_file, tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as running:
        while running.poll() is None and not records(tmp_path / "out"):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
    # Python may end by the signal itself, which a shell reports as the same code.
    assert running.returncode in (130, -signal.SIGINT), err
    assert "the same command with --resume goes on" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    assert not (tmp_path / "out.unfinished/package").exists()


def test_a_run_that_is_ended_before_it_begins_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("mgptq_export.output._discard", Mock(side_effect=SystemExit(143)))
    with pytest.raises(SystemExit), unfinished_run(tmp_path / "out", overwrite=False, resume=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_a_folder_is_claimed_leaves_nothing_behind(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    acquire = FileLock.acquire

    def interrupted(self: FileLock, **options: object) -> object:
        claim = acquire(self, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return claim

    monkeypatch.setattr(FileLock, "acquire", interrupted)
    try:
        exit_on_signals()
        with pytest.raises(SystemExit), unfinished_run(tmp_path / "out", overwrite=False, resume=False):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


class SmallDisk:
    """A file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    @property
    def used(self) -> int:
        return shutil.disk_usage(self.folder).used


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk(folder)
    if not disk.mount("size=8M"):
        pytest.skip("a file system cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_package_and_costs_nothing_that_was_finished(
    model, text_file, uninterrupted, small_disk
):
    """Wherever it gets full: in a record, in the checkpoint, in the container."""
    out = small_disk.folder / "out"
    old = replace(RECIPE, allocator="uniform", calibration=str(text_file))
    pipeline.run(str(model), out, old, ["container"])
    before, recipe = contents(out), replace(LONG, calibration=str(text_file))
    filled, failures = small_disk.used, 0
    for room in range(100_000, 8_000_000, 300_000):
        small_disk.change(f"size={filled + room}")
        try:
            pipeline.run(
                str(model), out, recipe, TARGETS_OF_BOTH_LAYOUTS, overwrite=True, resume=True, max_memory=1 << 40
            )
            break
        except BadInputError as error:
            failures += 1
            assert "No space left on device" in str(error)
            assert contents(out) == before
            left = contents(small_disk.folder)
            finished = [name for name in left if name.startswith("out.unfinished/") and name.endswith(".safetensors")]
            assert left.keys() - {f"out/{name}" for name in before} - {"out.unfinished/lock"} == set(finished)
    assert failures > 3
    assert contents(small_disk.folder) == {f"out/{name}": data for name, data in contents(uninterrupted).items()}


def test_a_folder_that_cannot_be_written_is_named(model, text_file, small_disk):
    small_disk.change("ro")
    recipe = replace(RECIPE, calibration=str(text_file))
    with pytest.raises(BadInputError, match="out cannot be written: Read-only file system"):
        pipeline.run(str(model), small_disk.folder / "out", recipe, ["container"])


def run_command(arguments: list[str]) -> None:
    """What a process of its own does, forked from one that has the modules already."""
    sys.argv = ["mgptq-export", *arguments]
    main()


@pytest.mark.slow
def test_twenty_kills_and_twenty_resumes(model, text_file, tmp_path, monkeypatch):
    """Each kill strikes a random time after the first record that is new since the last one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["mgptq_export.pipeline"])
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def start(out: Path, *options: str) -> BaseProcess:
        running = forking.Process(target=run_command, args=(long_run(model, text_file, out, *options),))
        running.start()
        return running

    def complete(running: BaseProcess) -> None:
        running.join(timeout=600)
        assert running.exitcode == 0

    def going_on() -> BaseProcess:
        return start(out, "--resume", *(["--overwrite"] if out.exists() else []))

    complete(start(whole))
    moments, kills = random.Random(0), 0
    while kills < 20:
        before, running = set(records(out)), going_on()
        while running.is_alive() and set(records(out)) <= before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.7))
        running.kill()
        running.join(timeout=300)
        assert running.exitcode in (0, -signal.SIGKILL)
        kills += 1
        if out.exists():  # it was quicker than the signal
            assert contents(out) == contents(whole)
    complete(going_on())
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def records(out: Path) -> list[tuple[str, int]]:
    """Names of all records of a run and when each was written."""
    found = []
    with suppress(FileNotFoundError):  # the run has ended, and its folders are gone
        for path in (out.parent / f"{out.name}.unfinished" / "journal").rglob("*.safetensors"):
            with suppress(FileNotFoundError):  # replaced or removed meanwhile
                found.append((path.as_posix(), path.stat().st_mtime_ns))
    return found


def test_there_is_nothing_to_resume_of_a_complete_package(even_model, tmp_path):
    pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"])
    with pytest.raises(OutputExistsError, match="is complete, there is nothing to resume"):
        pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"], resume=True)
    assert verify(tmp_path / "out") == []
    with pytest.raises(BadInputError, match="is a package, its model is quantized already"):
        pipeline.run(str(tmp_path / "out"), tmp_path / "again", RECIPE, ["container"])
    with pytest.raises(BadInputError, match="is quantized already; start from the original"):
        pipeline.run(str(tmp_path / "out/quantized"), tmp_path / "again", RECIPE, ["container"])
