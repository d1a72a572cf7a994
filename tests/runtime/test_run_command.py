"""The command mgptq-run: exit codes, JSON and messages."""

import io
import json
import subprocess
import sys
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result
from golden_package import TEXT, make_container, make_tokenizer_folder, sign, write_manifest
from synthetic import random_llama

from mgptq_runtime import generate
from mgptq_runtime.cli import cli
from mgptq_runtime.container import read_container
from mgptq_runtime.messages import replace_unprintable_output
from mgptq_runtime.package import Package


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    make_container(folder, random_llama(), tokenizer_folder=make_tokenizer_folder(folder / "tokenizer"))
    write_manifest(folder, ["model.mgptq.gguf"])
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_check_passes_and_prints_its_numbers(folder):
    values = run_json("check", folder)
    assert values["passed"] is True and values["backend"] == "numpy"
    assert values["max_abs_difference"] <= 1e-3 and values["top1_agreement"] == 1.0
    assert abs(values["kl_divergence"]) <= 1e-6
    assert [entry["backend"] for entry in values["backends"]] == ["numpy"]
    assert "PASSED" in run("check", folder / "model.mgptq.gguf").stdout


def test_check_of_other_weights_than_were_packed_exits_with_1(folder, tmp_path):
    path = tmp_path / "changed.gguf"
    path.write_bytes((folder / "model.mgptq.gguf").read_bytes())
    start = path.read_bytes().index(read_container(path).model.groups[0].linears[0].segments[0].data.tobytes())
    data = bytearray(path.read_bytes())
    data[start + 1] ^= 0x04
    path.write_bytes(data)
    result = run("check", path)
    assert result.exit_code == 1
    assert "damaged or changed" in result.stderr
    sign(path)
    result = run("check", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "FAILED" in run("check", path).stdout


def test_generate_streams_the_text_that_json_gives(folder):
    options = ("--prompt", "The quick", "--max-tokens", 12)
    values = run_json("generate", folder, *options)
    assert len(values["tokens"]) <= 12 and values["backend"] == "numpy"
    assert run("generate", folder, *options).stdout == values["text"] + "\n"


def test_a_text_that_fills_the_context_ends_with_a_note(folder):
    context = read_container(folder / "model.mgptq.gguf").model.hyperparameters["context_length"]
    options = ("generate", folder, "--prompt", "The quick")
    room = context - run_json(*options, "--max-tokens", 1)["prompt_tokens"]
    result = run(*options, "--max-tokens", room + 1)
    assert (result.exit_code, result.stderr) == (0, f"the context of {context} tokens is full\n")
    values = run_json(*options, "--max-tokens", room + 1)
    assert (values["stop_reason"], len(values["tokens"])) == ("context_full", room)
    assert run(*options, "--max-tokens", room).stderr == ""
    assert run_json(*options, "--max-tokens", room)["stop_reason"] == "max_tokens"


def test_progress_is_shown_unless_it_is_to_be_quiet(folder, monkeypatch):
    monkeypatch.setattr("mgptq_runtime.progress.PLAIN_INTERVAL_SECONDS", 0.0)
    commands = {
        "check": ("check", folder),
        "perplexity": ("perplexity", folder, "--text", folder / "text.txt", "--window", 32, "--windows", 3),
        "bench": ("bench", folder, "--prompt-tokens", 4, "--decode-tokens", 3),
    }
    for name, arguments in commands.items():
        assert name in run(*arguments).stderr
        for flag in ("-q", "--quiet"):
            result = run(*arguments, flag)
            assert (result.exit_code, result.stderr) == (0, "") and result.stdout
    assert run("check", folder / "missing", "--quiet").stderr.startswith("error: ")


def test_generate_applies_the_chat_template(folder):
    plain = run_json("generate", folder, "--prompt", "Hi", "--max-tokens", 1)
    assert (
        run_json("generate", folder, "--prompt", "Hi", "--max-tokens", 1, "--chat")["prompt_tokens"]
        > plain["prompt_tokens"]
    )


def test_perplexity_prints_its_numbers(folder):
    values = run_json("perplexity", folder, "--text", folder / "text.txt", "--window", 64, "--windows", 3)
    assert values["perplexity"] > 1 and values["tokens"] == 96 and values["backend"] == "numpy"


def test_bench_prints_its_numbers(folder):
    values = run_json("bench", folder, "--threads", 1, "--prompt-tokens", 8, "--decode-tokens", 4)
    for key in ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes"):
        assert values[key] > 0


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "Hi", "--max-tokens", 1),
        ("perplexity", "--text", "text.txt", "--window", 64, "--windows", 1),
        ("bench", "--prompt-tokens", 4, "--decode-tokens", 2),
    ],
    ids=lambda command: command[0],
)
def test_backend_accuracy_level_and_threads_reach_the_package(folder, command, monkeypatch):
    asked, backend, (name, *options) = [], Package.backend, command

    def asking(self: Package, *arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return backend(self, *arguments, **options)

    monkeypatch.setattr(Package, "backend", asking)
    monkeypatch.chdir(folder)
    run_json(name, folder, *options, "--backend", "numpy", "--accuracy-level", 0, "--threads", 1)
    assert asked and all(one == (("numpy",), {"accuracy_level": 0, "threads": 1}) for one in asked)


def test_generate_draws_as_it_is_told_to(folder, monkeypatch):
    generating = Mock(wraps=generate.generate_tokens)
    monkeypatch.setattr(generate, "generate_tokens", generating)
    drawing = ("--temperature", 0.5, "--top-k", 7, "--top-p", 0.9, "--seed", 3)
    run_json("generate", folder, "--prompt", "Hi", "--max-tokens", 2, *drawing)
    assert generating.call_args.kwargs["sampling"] == generate.Sampling(0.5, 7, 0.9, 3)


def test_bench_does_not_count_what_another_program_held():
    """The one that started it, here with 400 MB."""
    held = bytearray(400_000_000)
    program = "from mgptq_runtime.bench import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert 1_000_000 < int(done.stdout) < len(held)


def test_text_goes_to_an_output_that_lacks_its_characters(folder, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    replace_unprintable_output()
    print("ö 漢")
    narrow.flush()
    assert narrow.buffer.getvalue() == "ö ?\n".encode("latin-1")


def test_generate_needs_no_standard_output(folder):
    command = [sys.executable, "-m", "mgptq_runtime", "generate", str(folder), "--prompt", "Hi", "--max-tokens", "2"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_prints_one_object(folder):
    assert run_json("info", folder)["family"] == "llama"
    assert "bits_stored" in run("info", folder).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["nonsense"],
        ["check", "x", "--backend", "tpu"],
        ["check", "x", "--accuracy-level", "2"],
        ["generate", "x"],
        ["bench", "x", "--threads", "0"],
        ["bench", "x", "--prompt-tokens", "0"],
        ["bench", "x", "--decode-tokens", "0"],
        ["generate", "x", "--prompt", "x", "--temperature", "-1"],
        ["generate", "x", "--prompt", "x", "--top-k", "-1"],
        ["generate", "x", "--prompt", "x", "--top-p", "0"],
        ["generate", "x", "--prompt", "x", "--seed", "-1"],
        ["perplexity", "x", "--text", "x", "--window", "1"],
        ["perplexity", "x", "--text", "x", "--windows", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["check", "bench", "info"])
def test_a_failure_is_one_message_on_stderr_and_exit_code_1(tmp_path, command):
    result = run(command, tmp_path / "missing", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_text_needs_a_tokenizer(tmp_path):
    result = run("generate", make_container(tmp_path, random_llama()), "--prompt", "x")
    assert result.exit_code == 1
    assert "has no tokenizer" in result.stderr


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_command_with_its_code(folder, number, code):
    script = (
        "import os, signal, sys, mgptq_runtime.info\n"
        "from mgptq_runtime.cli import main\n"
        f"mgptq_runtime.info.describe = lambda package: os.kill(os.getpid(), signal.{number})\n"
        "sys.argv = ['mgptq-run', 'info', sys.argv[1]]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "interrupted\n")


def test_a_signal_waits_for_work_that_would_swallow_it():
    script = (
        "import os, signal\n"
        "from mgptq_runtime.signals import exit_on_signals, signals_held_back\n"
        "exit_on_signals()\n"
        "with signals_held_back():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('still here')\n"
        "    except BaseException:\n"
        "        print('swallowed')\n"
        "print('too far')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (143, "still here\n", "interrupted\n")


def test_a_hangup_that_is_ignored_already_stays_ignored():
    script = (
        "import os, signal\n"
        "from mgptq_runtime.signals import exit_on_signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "exit_on_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_the_installed_module_runs_and_imports_nothing_of_the_workstation(folder):
    """In a process of its own, since the tests themselves import torch."""
    script = (
        "import sys\n"
        "from mgptq_runtime.cli import cli\n"
        f"cli(['check', {str(folder)!r}, '--json'], standalone_mode=False)\n"
        "import mgptq_runtime.backends.onnx_backend, mgptq_runtime.bench, mgptq_runtime.generate\n"
        "import mgptq_runtime.info, mgptq_runtime.perplexity\n"
        "workstation = {'torch', 'transformers', 'mgptq_export', 'gguf', 'onnx'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & workstation))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert json.loads(first)["passed"] is True
    assert second == "[]"


def test_python_dash_m_runs_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "mgptq_runtime", "info", str(folder)], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
