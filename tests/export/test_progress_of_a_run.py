"""What a run tells while it works: on standard error, in a log file, and never on standard output."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from small_runs import RECIPE
from terminal import HIDE_CURSOR, SHOW_CURSOR, open_terminal

from mgptq_export import pipeline
from mgptq_export.cli import cli
from mgptq_export.targets import TARGETS
from mgptq_runtime.errors import BadInputError

QUICK = ("--samples", 4, "--sequence-length", 32, "--allocator", "hessian", "--recovery-steps", 0, "--threads", 1)
LONG_WORKING = ("run", "sweep", "quantize", "export", "eval", "compare", "plan")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def shown(text: str) -> list[str]:
    """Lines without figures that differ from machine to machine."""
    return [re.sub(r"\b\d+ s\b", "# s", re.sub(r"\d\.\d{4}|(?<=trial of )\d", "#", line)) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def _however_slow_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgptq_runtime.progress.LIVE_AFTER_SECONDS", 1e9)
    monkeypatch.setattr("mgptq_runtime.progress.PLAIN_INTERVAL_SECONDS", 1e9)


def test_a_run_tells_its_stages_and_what_they_came_to(even_model, text_file, tmp_path, capsys):
    recipe = replace(RECIPE, recovery_steps=2)
    text = pipeline.EvaluationText(text_file, window=32, windows=1)
    pipeline.run(str(even_model), tmp_path / "out", recipe, ["container", "llama.cpp"], text=text)
    out, err = capsys.readouterr()
    assert out == ""
    of_a_layout = [
        ("allocate {}", ", KL divergence # in the best trial of #"),
        ("solve {}", ", # stored bits per weight"),
        ("recover {}", ", KL divergence # before, # after"),
    ]
    wanted = [("calibrate", "")]
    wanted += [(name.format(layout), figure) for layout in ("columns", "tensors") for name, figure in of_a_layout]
    wanted += [("export", ""), ("check", ", 1 of 1 passed"), ("evaluate", ", KL divergence of checkpoint #")]
    assert [line for line in shown(err) if not line.startswith("WARNING")] == [
        line
        for number, (name, figure) in enumerate(wanted, 1)
        for line in (f"stage {number} of {len(wanted)}: {name}", f"{name}: # s{figure}")
    ]


def test_stages_that_a_stopped_run_has_finished_are_not_announced_again(even_model, tmp_path, capsys, monkeypatch):
    def fail(checkpoint, golden, path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(BadInputError):
        patched.setitem(TARGETS, "container", replace(TARGETS["container"], write=fail))
        pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"])
    capsys.readouterr()
    pipeline.run(str(even_model), tmp_path / "out", RECIPE, ["container"], resume=True)
    assert shown(capsys.readouterr().err) == [
        "stage 1 of 3: calibrate",
        "calibrate: # s",
        "stage 2 of 3: export",
        "export: # s",
        "stage 3 of 3: check",
        "check: # s, 1 of 1 passed",
    ]


def test_loading_is_a_stage_of_every_command_that_does_it_where_it_takes_its_time(
    even_model, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("mgptq_runtime.progress.LIVE_AFTER_SECONDS", 0.0)
    out, log = tmp_path / "out", tmp_path / "log"
    text = ("--window", 32, "--windows", 1)
    commands = {
        ("run", even_model, "-o", out, "--targets", "container", *QUICK): 6,
        ("sweep", even_model, "-o", tmp_path / "swept", "--bits", 3, "--evaluate", text_file, *text, *QUICK): 8,
        ("eval", out, "--model", even_model, "--text", text_file, *text): 2,
        ("compare", out, out, "--tokens", 0): 1,
    }
    for command, stages in commands.items():
        result = invoke(*command, "--log-file", log)
        assert result.exit_code == 0, result.output
        begun = [f"stage 1 of {stages}: load", "load: # s"]
        assert shown(result.stderr)[:2] == begun, (command[0], result.stderr)
    assert log.read_text().count("load begins") == len(commands)


@pytest.mark.parametrize("before", [(), ("--quiet",)], ids=["after the command", "before the command"])
def test_a_quiet_run_says_nothing_and_its_json_is_the_same(even_model, tmp_path, before):
    after = () if before else ("-q",)
    loud = invoke("run", even_model, "-o", tmp_path / "loud", *QUICK, "--json")
    quiet = invoke(*before, "run", even_model, "-o", tmp_path / "quiet", *QUICK, "--json", *after)
    assert (loud.exit_code, quiet.exit_code) == (0, 0)
    assert "stage 1 of 5: calibrate" in loud.stderr and quiet.stderr == ""
    assert json.loads(loud.stdout) == json.loads(quiet.stdout)
    assert loud.stdout.count("\n") == quiet.stdout.count("\n") == 1


@pytest.mark.parametrize("name", LONG_WORKING)
def test_every_command_that_works_long_can_be_quiet_and_logged(name):
    shown = invoke(name, "--help").stdout
    assert "-q, --quiet" in shown and "--log-file" in shown


def test_the_log_has_everything_of_a_quiet_run_and_grows(even_model, tmp_path):
    log = tmp_path / "log"
    levels = [logging.getLogger(name).level for name in ("mgptq_export", "mgptq_runtime")]
    options = ("--samples", 4, "--sequence-length", 32, "--recovery-steps", 0, "--trials", 2, "--threads", 1)
    made = invoke("quantize", even_model, "-o", tmp_path / "out", *options, "-q", "--log-file", log)
    assert (made.exit_code, made.stderr) == (0, "")
    lines = log.read_text().splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ mgptq_(export|runtime)\.", line) for line in lines
    )
    messages = "\n".join(line.split(": ", 1)[1] for line in lines)
    for wanted in (
        "calibrate begins",
        "Measuring activations: 2/2 in ",
        "trial 1: KL divergence ",
        "stored bits so far",
        "stored bits per weight",
        "MB for --resume in ",
        "done",
    ):
        assert wanted in messages
    assert invoke("--log-file", log, "export", tmp_path / "out", "--targets", "container", "-q").exit_code == 0
    both = log.read_text().splitlines()
    assert both[: len(lines)] == lines and "export begins" in "\n".join(both[len(lines) :])
    assert [logging.getLogger(name).level for name in ("mgptq_export", "mgptq_runtime")] == levels


def test_the_log_says_how_a_run_ended(tmp_path):
    log = tmp_path / "log"
    assert invoke("run", tmp_path / "nowhere", "-o", tmp_path / "out", "--log-file", log).exit_code == 1
    assert re.search(r"ended by BadInputError: .*nowhere", log.read_text())


@pytest.mark.parametrize("name", ["missing/log", "", "/proc/nothing/log"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_a_log_that_cannot_be_written_ends_a_run_before_it_begins(even_model, tmp_path, main, name, position):
    option = ("--log-file", tmp_path / name)
    before, after = (option, ()) if position == "before" else ((), option)
    code, out, err = main(*before, "run", even_model, "-o", tmp_path / "out", *after)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: log file .* cannot be written: .*; name a file in .*\n", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_log_in_the_package_is_refused(even_model, tmp_path, main, position):
    (tmp_path / "out").mkdir()
    option = ("--log-file", tmp_path / "out" / "log")
    before, after = (option, ()) if position == "before" else ((), option)
    code, _, err = main(*before, "run", even_model, "-o", tmp_path / "out", "--overwrite", *after)
    assert code == 2 and "which is a package; put it elsewhere" in err


def test_a_full_disk_costs_the_log_and_not_the_run(even_model, tmp_path):
    result = invoke("run", even_model, "-o", tmp_path / "out", *QUICK, "-q", "--log-file", "/dev/full", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)
    assert re.fullmatch(r"WARNING: log file /dev/full takes no more: .*No space left on device\n", result.stderr)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_warning_comes_above_the_view(locale):
    script = (
        "import logging\n"
        "from mgptq_export.reporting import log_to_stderr\n"
        "from mgptq_runtime.progress import stage, track\n"
        "log_to_stderr()\n"
        "with stage('calibrate'), track('Measuring', 2):\n"
        "    logging.getLogger('mgptq_export.calibration').warning('few sequences')\n"
        "    logging.getLogger('mgptq_export.calibration').debug('a detail')\n"
    )
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LC_ALL": locale}
    with open_terminal() as terminal:
        subprocess.run([sys.executable, "-c", script], stderr=terminal.descriptor, env=environment, check=True)
    assert re.search(r"\nWARNING: few sequences *\ncalibrate", terminal.text) and "a detail" not in terminal.text


@pytest.mark.slow
def test_an_interrupted_run_leaves_the_terminal_in_order(even_model, tmp_path):
    command = [sys.executable, "-m", "mgptq_export", "run", even_model, "-o", tmp_path / "out"]
    command += ["--samples", "4", "--sequence-length", "64", "--threads", "1"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    with (
        open_terminal() as terminal,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=terminal.descriptor, text=True, env=environment
        ) as running,
    ):
        terminal.waits_for(r"allocate +0:00:\d\d")
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=300)
    # Python may end by the signal itself, which a shell reports as the same code.
    assert 130 in (running.returncode, 128 - running.returncode) and out == ""
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR) == 1
    after = terminal.written.partition(SHOW_CURSOR)[2]
    assert after.startswith("interrupted\r\nwhat was finished is in ")
