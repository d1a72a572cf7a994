"""The command mgptq-export: exit codes, JSON, messages and interrupts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from mgptq_export import cli as command
from mgptq_export.recipe import FAST, Recipe
from mgptq_runtime.check import DEFAULT_BOUNDS, Bounds, check_backend
from mgptq_runtime.package import open_package

QUICK = ("--samples", 2, "--sequence-length", 32, "--allocator", "hessian", "--recovery-steps", 0, "--threads", 1)
COMMANDS = ("run", "sweep", "quantize", "export", "eval", "inspect", "compare", "push", "plan")


def invoke(*arguments: object) -> Result:
    """The command group without its entry point: errors come out as exceptions."""
    return CliRunner().invoke(command.cli, [str(argument) for argument in arguments])


def invoke_json(*arguments: object) -> dict:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.endswith("}\n") and result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(even_model, tmp_path_factory) -> Path:
    """A package that the command made. Tests only read it."""
    out = tmp_path_factory.mktemp("command") / "out"
    manifest = invoke_json("run", even_model, "-o", out, "--targets", "container", *QUICK)
    assert manifest == json.loads((out / "manifest.json").read_text())
    return out


# What each command says


def test_run_makes_a_package_that_checks(made):
    opened = open_package(made)
    backend = opened.backend("numpy")
    assert check_backend(backend, opened.golden(backend), opened.bounds("numpy", 4)).passed


def test_run_prints_files_and_stored_bits(even_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Words and more words. " * 60)
    options = ("--evaluate", text, "--window", 32, "--windows", 1)
    result = invoke("run", even_model, "-o", tmp_path / "out", "--targets", "container", *options, *QUICK)
    assert result.exit_code == 0, result.output
    assert "model.mgptq.gguf" in result.stdout
    assert "stored bits per weight, columns layout: 2." in result.stdout and "(asked 2.5)" in result.stdout
    assert "perplexity" in result.stdout and "checkpoint" in result.stdout


def test_options_reach_the_recipe(even_model, tmp_path, text_file):
    options = ("--bits", 3, "--allocator", "uniform", "--seed", 7, "--calibration", text_file)
    options += ("--samples", 3, "--own-samples", 2, "--sequence-length", 16, "--embedding-format", "b8")
    options += ("--recovery-steps", 0)
    recipe = invoke_json("quantize", even_model, "-o", tmp_path / "out", *options)["recipe"]
    wanted = {"bits": 3.0, "allocator": "uniform", "seed": 7, "calibration": text_file.name, "samples": 3}
    wanted |= {"own_samples": 2, "sequence_length": 16, "embedding_format": "b8"}
    assert {key: recipe[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--fast"], FAST | {"bits": 2.5}),
        (["--fast", "--trials", 7, "--samples", Recipe.samples], FAST | {"trials": 7, "samples": Recipe.samples}),
        (["--recover", 2.5], {"recovery_minutes": 2.5, "samples": Recipe.samples}),
        (["--recovery-steps", 9, "--trials", 1], {"recovery_steps": 9, "trials": 1}),
        (["--drift-correction", 0, "--descent-sweeps", 3], {"drift_correction": 0.0, "descent_sweeps": 3}),
    ],
)
def test_how_long_it_may_take_reaches_the_recipe(monkeypatch, options, wanted):
    asked = []
    checked = {"check": {"results": {}}}
    monkeypatch.setattr("mgptq_export.pipeline.run", lambda *given, **rest: asked.append(given[2]) or checked)
    monkeypatch.setattr(command, "_print_manifest", lambda *arguments: None)
    assert invoke("run", "model", "-o", "out", *options).exit_code == 0
    assert {key: getattr(asked[0], key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ([], []),
        (["--own-samples", 8], ["own-samples"]),
        (["--own-samples", 8, "--calibration", "text.txt"], []),
        (["--trials", 3, "--allocator", "hessian"], ["trials"]),
        (["--ggml-types", "q2_0"], ["ggml-types"]),
        (["--ggml-types", "q2_0", "--targets", "onnx,llama.cpp"], []),
    ],
)
def test_options_without_effect_are_told(monkeypatch, caplog, options, warned):
    monkeypatch.setattr("mgptq_export.pipeline.run", lambda *given, **rest: {})
    assert invoke("run", "model", "-o", "out", *options).exit_code == 0
    assert re.findall(r"--(\S+) has no effect", caplog.text) == warned


def test_recovery_for_minutes_records_its_steps(even_model, tmp_path):
    quick = ("--samples", 2, "--sequence-length", 32, "--allocator", "hessian", "--threads", 1)
    recipe = invoke_json("quantize", even_model, "-o", tmp_path / "out", *quick, "--recover", 0.001)["recipe"]
    assert recipe["recovery_steps"] >= 1 and recipe["recovery_minutes"] is None


def test_quantize_then_export(even_model, tmp_path):
    out = tmp_path / "out"
    assert invoke_json("quantize", even_model, "-o", out, *QUICK)["targets"] == []
    assert invoke_json("export", out, "--targets", "container")["targets"] == ["container"]
    elsewhere = invoke_json("export", out, "--targets", "container", "-o", tmp_path / "elsewhere")
    assert elsewhere["files"] == json.loads((out / "manifest.json").read_text())["files"]


def test_what_weights_were_made_with_stays_when_more_is_exported(even_model, text_file, tmp_path):
    out = tmp_path / "out"
    short = ("--samples", 9999, "--sequence-length", 64, "--own-samples", 1, "--calibration", text_file)
    made = invoke_json("quantize", even_model, "-o", out, *QUICK, *short)
    assert made["threads"] == 1 and made["recipe"]["samples"] == 9999
    assert 1 < made["calibration_sequences"] < 9999
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        exported = invoke_json("export", out, "--targets", "container")
    finally:
        torch.set_num_threads(threads)
    assert {key: exported[key] for key in ("threads", "calibration_sequences")} == {
        key: made[key] for key in ("threads", "calibration_sequences")
    }


def test_everybody_may_read_a_package_who_may_read_what_one_writes(made, tmp_path):
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.name: oct(path.stat().st_mode) for path in made.rglob("*") if path.is_file()} == {
        path.name: oct(usual) for path in made.rglob("*") if path.is_file()
    }


def test_inspect_shows_every_kind_of_linear(made):
    found = invoke_json("inspect", made)
    assert found["manifest"]["bits"]["requested"] == 2.5
    shown = invoke("inspect", made).stdout
    for kind in found["layouts"]["columns"]["kinds"]:
        assert kind in shown


def test_plan_shows_what_can_be_reached(even_model):
    assert invoke_json("plan", even_model)["targets"]["container"]["reachable"] is True
    assert " MB " in invoke("plan", even_model).stdout
    assert "not reachable" in invoke("plan", even_model, "--bits", 1).stdout


def test_eval_compares_with_the_original(made, even_model, text_file):
    options = ("--model", even_model, "--text", text_file, "--window", 32, "--windows", 1)
    assert list(invoke_json("eval", made, *options)["results"]) == ["original", "checkpoint", "numpy"]
    assert "KL divergence" in invoke("eval", made, *options).stdout


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(name, flag):
    result = invoke(name, flag)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ") and name in result.stdout.splitlines()[0]


def test_help_lists_the_commands():
    listed = invoke("-h").stdout
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_target_names_are_those_of_the_exporters():
    """The command spells them out, so that its help needs no heavy import."""
    from mgptq_export.targets import TARGETS

    assert tuple(TARGETS) == command.TARGET_NAMES


def test_help_and_wrong_usage_import_no_torch():
    script = (
        "import sys\n"
        "import click\n"
        "from mgptq_export.cli import cli\n"
        "cli(['run', '-h'], standalone_mode=False)\n"
        "try:\n    cli(['run', 'model', '-o', 'out', '--targets', 'tpu'], standalone_mode=False)\n"
        "except click.UsageError:\n    print('refused')\n"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n" and done.stdout.endswith("refused\n")


# What goes wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "model"],
        ["run", "model", "-o", "out", "--targets", "tpu"],
        ["run", "model", "-o", "out", "--targets", ","],
        ["run", "model", "-o", "out", "--bits", "few"],
        ["plan", "model", "--bits", "nan"],
        ["sweep", "model", "-o", "out", "--evaluate", "x.txt", "--bits", "2.5,inf"],
        ["run", "model", "-o", "out", "--recover", "5", "--recovery-steps", "60"],
        ["run", "model", "-o", "out", "--samples", "0"],
        ["run", "model", "-o", "out", "--allocator", "best"],
        ["run", "model", "-o", "out", "--window", "1"],
        ["quantize", "model", "-o", "out", "--targets", "tpu"],
        ["eval", "package", "--text", "x.txt"],
        ["plan", "model", "--embedding-format", "b1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(main, arguments):
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err and "Traceback" not in err


def test_an_unknown_target_is_named_with_those_that_exist(main):
    _, _, err = main("run", "model", "-o", "out", "--targets", "container,tpu")
    assert "tpu" in err and "container, onnx" in err


def test_failures_exit_with_1_and_one_message(main, even_model, made, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    out = tmp_path / "out"
    cases = {
        "is no model": ("run", tmp_path / "no/such/model", "-o", out),
        "cannot be reached": ("run", even_model, "-o", out, "--bits", 1, *QUICK),
        "reach 1.25 to": ("quantize", even_model, "-o", out, "--bits", 0.5, *QUICK),
        "Give more text": ("run", even_model, "-o", out, "--calibration", short, *QUICK),
        "cannot be read": ("run", even_model, "-o", out, "--calibration", tmp_path / "missing.txt", *QUICK),
        "fewer than one window": ("run", even_model, "-o", out, "--evaluate", short, "--window", 256, *QUICK),
        "beyond the model's context": ("run", even_model, "-o", out, "--sequence-length", 1000),
        "--overwrite": ("run", even_model, "-o", made, *QUICK),
        "device 'abacus'": ("run", even_model, "-o", out, "--device", "abacus", *QUICK),
        "is no package": ("export", tmp_path),
        "no config.json": ("plan", tmp_path),
    }
    for message, arguments in cases.items():
        for json_flag in ((), ("--json",)):
            code, stdout, err = main(*arguments, *json_flag)
            assert (code, stdout) == (1, ""), (message, err)
            assert err.count("error: ") == 1 and message in err and "Traceback" not in err
        assert list(tmp_path.iterdir()) == [short]


def test_a_limit_of_memory_where_there_is_none_is_told(main, even_model, tmp_path, caplog):
    code, _, err = main("run", even_model, "-o", tmp_path / "out", "--device", "abacus", "--max-memory", "8GB", *QUICK)
    assert code == 1 and "device 'abacus'" in err
    assert "--max-memory has no effect with --device abacus" in caplog.text


ANY_LOCALE = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="mgptq_(export|runtime)")
from mgptq_export.cli import main
main()
"""


def test_what_files_hold_does_not_depend_on_the_locale(even_model, text_file, tmp_path):
    """Reports have characters that few encodings but UTF-8 have."""
    program = [sys.executable, "-X", "warn_default_encoding", "-c", ANY_LOCALE]
    scored = ("--evaluate", text_file, "--window", 32, "--windows", 1)
    for arguments in (
        ("run", even_model, "-o", tmp_path / "out", *QUICK, *scored, "--targets", "container,onnx,llama.cpp"),
        ("sweep", even_model, "-o", tmp_path / "swept", *QUICK, *scored, "--bits", 2.5, "--targets", "container"),
        ("export", tmp_path / "out", "--targets", "onnx"),
    ):
        done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_an_error_is_told_with_the_name_that_the_documentation_has_it_under(main, tmp_path):
    assert main("plan", tmp_path)[2].endswith(" [BadInputError]\n")


def test_a_package_that_fails_its_own_check_stays_and_ends_with_1(main, even_model, tmp_path, monkeypatch, caplog):
    wrong = {name: Bounds(max_abs_difference=0.0) for name in DEFAULT_BOUNDS}
    monkeypatch.setattr("mgptq_export.packaging.DEFAULT_BOUNDS", wrong)
    out = tmp_path / "out"
    code, stdout, err = main("run", even_model, "-o", out, "--targets", "container", *QUICK, "--json")
    assert code == 1 and not json.loads(stdout)["check"]["results"]["numpy"]["passed"]
    assert "the check on numpy failed" in caplog.text and "Traceback" not in err
    assert main("verify", out)[0] == 0
    assert main("export", out, "--targets", "container")[0] == 1


@pytest.mark.parametrize("command", [["-v", "quantize", "-v"], ["quantize", "-v"], ["quantize"]])
def test_details_go_to_stderr_where_they_are_asked_for(main, even_model, tmp_path, command):
    code, out, err = main(*command, even_model, "-o", tmp_path / "out", *QUICK, "--json")
    assert (code, json.loads(out)["targets"]) == (0, [])
    assert err.count("DEBUG: kept ") == ("-v" in command)


def test_verify_passes_or_fails_by_the_files(package, tmp_path):
    assert invoke_json("verify", package.folder) == {"passed": True, "differences": []}
    copied = Path(shutil.copytree(package.folder, tmp_path / "copied"))
    (copied / "quantized/config.json").unlink()
    result = invoke("verify", copied)
    assert result.exit_code == 1
    assert result.stdout == "quantized/config.json is missing\n1 difference\n"


def test_errors_that_are_no_users_fault_keep_their_traceback(main, monkeypatch):
    def bug(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mgptq_export.inspection.inspect_package", bug)
    with pytest.raises(ZeroDivisionError):
        main("inspect", "x")


# Real processes


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mgptq_export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def test_exit_codes_of_the_real_process(tmp_path):
    with process("plan", tmp_path / "no/such/model", "--json") as failing, process("run", "--bits", "x") as wrong:
        out, err = failing.communicate(timeout=120)
        assert (failing.returncode, out) == (1, "")
        assert err.startswith("error: ") and "Traceback" not in err and err.count("\n") == 1
        out, err = wrong.communicate(timeout=120)
        assert (wrong.returncode, out) == (2, "")


@pytest.mark.slow
def test_a_run_that_is_ended_before_it_has_anything_to_keep_leaves_nothing_behind(even_model, tmp_path):
    """Interrupted once its temporary folder is there; sampling this much text would take hours."""
    out = tmp_path / "out"
    endless = ("--samples", 100_000, "--sequence-length", 256, "--threads", 1)
    with process("run", even_model, "-o", out, *endless) as running:
        try:
            deadline = time.monotonic() + 300
            while not list(tmp_path.iterdir()) and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert list(tmp_path.iterdir()) and running.poll() is None
            running.terminate()
            _, err = running.communicate(timeout=300)
        finally:
            running.kill()
    # Python may end by the signal itself, which a shell reports as the same code.
    assert running.returncode in (143, -signal.SIGTERM), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
