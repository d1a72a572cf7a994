"""Progress: one live view on a terminal, plain lines elsewhere, nothing where quiet was asked for."""

import io
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from terminal import HIDE_CURSOR, SHOW_CURSOR, Terminal, open_terminal

from mgptq_runtime import progress
from mgptq_runtime.progress import quiet, report, stage, stages, track


@contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Standard error is a terminal in this block; afterwards all of it has been read."""
    with (
        open_terminal() as terminal,
        open(terminal.descriptor, "w", closefd=False) as stderr,
        monkeypatch.context() as patched,
    ):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patched.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}.items():
            patched.setenv(name, value)
        patched.setattr(sys, "stderr", stderr)
        yield terminal
        assert sys.stderr is stderr, "standard error is not given back"


def last_list(terminal: Terminal) -> list[str]:
    """What stays on the terminal, without durations and memory."""
    lines = [re.sub(r"\d+:\d\d:\d\d|[\d.]+ MB", "#", line).split() for line in terminal.text.splitlines()]
    first = max(i for i, words in enumerate(lines) if words[:1] == ["calibrate"])
    return [" ".join(words) for words in lines[first:] if words]


def test_one_view_shows_all_stages_and_steps_within_steps(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        with stages(["calibrate", "allocate", "solve"]):
            with stage("calibrate"):
                pass
            with stage("allocate"), track("Trials", 8) as advance:
                advance()
                with track("Quantizing", 30) as advance_inner:
                    advance_inner()
                    found = terminal.waits_for(
                        r"calibrate +0:00:0\d *\nallocate +0:00:0\d *\n"
                        r"  Trials +\S+ +1/8  0:\d\d:\d\d left *\n"
                        r"    Quantizing +\S+ +1/30  0:\d\d:\d\d left *\n"
                        r"solve *\n"
                        r"0:00:0\d elapsed, [\d.]+ MB of memory"
                    )
        assert found
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR) == 1


def test_the_list_of_stages_stays_with_what_they_came_to(monkeypatch):
    with on_terminal(monkeypatch) as terminal, stages(["calibrate", "solve tensors"]):
        with stage("calibrate"):
            report("first")
            report("12 sequences [16 wanted]")
        with stage("solve"), track("Quantizing", 2):
            report("2.5000 stored bits")
    assert last_list(terminal) == [
        "calibrate # 12 sequences [16 wanted]",
        "solve tensors # 2.5000 stored bits",
        "# elapsed, # of memory",
    ]


def test_a_low_terminal_shows_what_is_being_done_and_in_the_end_everything(monkeypatch):
    names = ["calibrate", "allocate", "solve", "recover", "export"]
    with on_terminal(monkeypatch) as terminal:
        monkeypatch.setenv("LINES", "4")
        with stages(names):
            for name in names:
                with stage(name), track("Steps", 9):
                    if name == "solve":
                        terminal.waits_for(r"\nsolve +0:00:0\d *\n  Steps +\S+ +0/9 *\nrecover *\n0:00:0\d elapsed")
    assert [line.split()[0] for line in last_list(terminal)[:-1]] == names


def test_a_stage_that_fails_is_shown_as_stopped_and_the_terminal_is_left_in_order(monkeypatch):
    with (
        on_terminal(monkeypatch) as terminal,
        pytest.raises(ValueError),
        stages(["calibrate", "solve"]),
        stage("calibrate"),
        track("Measuring", 3),
    ):
        raise ValueError
    assert last_list(terminal) == ["calibrate # stopped", "solve", "# elapsed, # of memory"]
    assert terminal.written.rindex(SHOW_CURSOR) > terminal.written.rindex(HIDE_CURSOR)


@pytest.mark.parametrize("display", ["terminal", "lines"])
def test_an_input_that_a_stage_refuses_at_once_gets_its_message_alone(monkeypatch, capsys, display):
    def refuse() -> None:
        with pytest.raises(ValueError), stages(["calibrate", "solve"]), stage("calibrate"):
            raise ValueError

    if display == "lines":
        refuse()
        assert capsys.readouterr() == ("", "")
    else:
        with on_terminal(monkeypatch) as terminal:
            refuse()
        assert terminal.written == ""


def load_and_calibrate(monkeypatch: pytest.MonkeyPatch, instant: bool) -> None:
    """Two stages, the first of which is brief, and done in an instant or not."""
    monkeypatch.setattr(progress, "LIVE_AFTER_SECONDS", 60.0 if instant else 0.05)
    with stages(["load", "calibrate"]):
        with stage("load", brief=True), track("Reading", 2) as advance:
            time.sleep(0.1)
            advance()
            advance()
        with stage("calibrate"):
            pass


@pytest.mark.parametrize("instant", [True, False])
def test_a_brief_stage_is_announced_and_counted_where_it_takes_its_time(capsys, caplog, monkeypatch, instant):
    caplog.set_level(logging.INFO, logger="mgptq_runtime.progress")
    load_and_calibrate(monkeypatch, instant)
    announced = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stage ")]
    assert announced == (["stage 1 of 1: calibrate"] if instant else ["stage 1 of 2: load", "stage 2 of 2: calibrate"])
    assert caplog.messages[:2] == ["load begins", "load: 0 s"]


@pytest.mark.parametrize("instant", [True, False])
def test_the_list_of_stages_has_a_brief_one_where_it_took_its_time(monkeypatch, instant):
    with on_terminal(monkeypatch) as terminal:
        load_and_calibrate(monkeypatch, instant)
    assert last_list(terminal) == ["calibrate #", "# elapsed, # of memory"]
    assert bool(re.search(r"load +0:00:0\d *\ncalibrate +0:00:0\d *\n0:00", terminal.text)) is not instant


def test_only_the_outermost_steps_say_what_a_stage_has_come_to(monkeypatch):
    with on_terminal(monkeypatch) as terminal, stage("calibrate"), track("Trials", 2):
        report("KL divergence 0.9")
        with track("Quantizing", 2):
            report("2.5 stored bits")
    assert last_list(terminal)[0] == "calibrate # KL divergence 0.9"
    assert "stored bits" not in terminal.text


def test_a_warning_comes_above_the_view(monkeypatch):
    with on_terminal(monkeypatch) as terminal, stage("calibrate"), track("Measuring", 2):
        print("WARNING: few sequences", file=sys.stderr)
        terminal.waits_for(r"WARNING: few sequences *\ncalibrate")


def test_work_that_is_soon_done_shows_no_bar(monkeypatch):
    with on_terminal(monkeypatch) as terminal, track("check", 3) as advance:
        advance()
    assert terminal.written == ""


def test_a_bar_of_its_own_goes_when_the_work_is_done(monkeypatch):
    monkeypatch.setattr(progress, "LIVE_AFTER_SECONDS", 0.0)
    with on_terminal(monkeypatch) as terminal, track("check", 3) as advance:
        advance()
        terminal.waits_for("check +\\S+ +1/3")
    erased_line = "\x1b[1A\x1b[2K"
    assert terminal.written.partition(SHOW_CURSOR)[2] == f"\r{erased_line}"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        monkeypatch.setenv("TERM", "dumb")
        with stage("calibrate"):
            pass
    assert terminal.text == "stage 1 of 1: calibrate\ncalibrate: 0 s\n"


def test_elsewhere_there_are_lines(capsys):
    with stages(["calibrate", "solve tensors", "export"]):
        with stage("calibrate"):
            pass
        with stage("solve"):
            report("2.5000 stored bits")
    assert capsys.readouterr() == (
        "",
        "stage 1 of 3: calibrate\ncalibrate: 0 s\n"
        "stage 2 of 3: solve tensors\nsolve tensors: 0 s, 2.5000 stored bits\n",
    )


def test_stages_of_one_name_come_in_the_planned_order(capsys):
    with stages(["solve columns", "solve tensors"]):
        for _ in range(2):
            with stage("solve"):
                pass
    begun = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stage")]
    assert begun == ["stage 1 of 2: solve columns", "stage 2 of 2: solve tensors"]


def test_long_steps_are_counted_in_lines_from_the_outermost_inwards(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_SECONDS", 0.0)
    with track("Trials", 2) as advance:
        advance()
        with track("Quantizing", 3) as advance_inner:
            advance_inner()
        advance()
    assert capsys.readouterr() == (
        "",
        "Trials: 1/2, 0 s left\nTrials: 1/2, 0 s left; Quantizing: 1/3, 0 s left\n",
    )


def test_lines_come_only_every_quarter_of_a_minute(capsys, monkeypatch):
    clock = Mock(monotonic=Mock(return_value=0.0))
    monkeypatch.setattr(progress, "time", clock)
    with track("Trials", 4) as advance:
        for seconds in (10.0, 14.9, 15.1, 29.9):
            clock.monotonic.return_value = seconds
            advance()
    assert re.findall(r"Trials: ./4", capsys.readouterr().err) == ["Trials: 3/4"]


def test_quiet_work_is_logged_and_nothing_else(capsys, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, "mgptq_runtime")
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_SECONDS", 0.0)
    with quiet(), stages(["calibrate"]), stage("calibrate"), track("Measuring", 2) as advance:
        advance()
        report("12 sequences")
    assert capsys.readouterr() == ("", "")
    assert [re.sub(r"[\d.]+ s\b", "# s", message) for message in caplog.messages] == [
        "calibrate begins",
        "Measuring: 12 sequences",
        "Measuring: 1/2 in # s",
        "calibrate: # s, 12 sequences",
    ]
    with stage("solve"):
        pass
    assert capsys.readouterr().err, "quiet lasts longer than its block"


def test_nobody_has_to_read_it(monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as file:
        for stderr in (io.TextIOWrapper(file, write_through=True), None):
            monkeypatch.setattr(sys, "stderr", stderr)
            with stage("calibrate"), track("Measuring", 2) as advance:
                advance()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupt_says_so_below_the_view_and_gives_the_cursor_back(name, code):
    """A second one, while the terminal is being put in order, changes nothing."""
    script = (
        "import os, signal\n"
        "from rich.live import Live\n"
        "from mgptq_runtime.progress import stage, track\n"
        "from mgptq_runtime.signals import exit_on_signals\n"
        "stop = Live.stop\n"
        f"def stop_disturbed(self): os.kill(os.getpid(), signal.{name}); stop(self)\n"
        "Live.stop = stop_disturbed\n"
        "exit_on_signals()\n"
        "with stage('calibrate'), track('Measuring', 3) as advance:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    advance()\n"
    )
    with open_terminal() as terminal:
        done = subprocess.run([sys.executable, "-c", script], stderr=terminal.descriptor, timeout=300, check=False)
    assert done.returncode == code
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR) == 1
    after = terminal.written.partition(SHOW_CURSOR)[2]
    assert after == "interrupted\r\n"
    assert last_list(terminal) == ["calibrate # stopped", "# elapsed, # of memory", "interrupted"]
