"""Bad input on the command line: exit code 1, one message, nothing left behind."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_files import WEIGHTS, Break, config, cut_weights, link_out, write

MODEL_CASES: dict[str, tuple[Break, str]] = {
    "weights cut short": (cut_weights(50_000), "not fully covered"),
    "weights linked from elsewhere": (link_out(WEIGHTS), "link out of the folder"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "odd head size": (config(head_dim=17), "even rotary dimension"),
    "nested without end": (write("config.json", "[" * 100_000), "nested too deeply"),
    "tokenizer that is no JSON": (write("tokenizer.json", "{"), r"tokenizer\.json cannot be read"),
}


def check_refused_on_the_command_line(main: Any, folder: Path, message: str, *arguments: object) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = main("run", *arguments, "-o", folder / "out", "--json")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", err)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_bad_model_gets_one_message_and_leaves_nothing(name: str, folder: Path, main: Any) -> None:
    break_it, message = MODEL_CASES[name]
    break_it(folder)
    check_refused_on_the_command_line(main, folder.parent, message, folder)


def test_a_bad_gguf_file_gets_one_message_and_leaves_nothing(tmp_path: Path, main: Any) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    check_refused_on_the_command_line(main, tmp_path, "not a readable GGUF file", tmp_path / "a.gguf")


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "UTF-8"), (b"", "holds no text"), (b"\0", "zero bytes")])
@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
def test_a_bad_text_gets_one_message_and_leaves_nothing(
    option: str, content: bytes, message: str, folder: Path, main: Any
) -> None:
    text = folder.parent / "text.txt"
    text.write_bytes(content)
    lengths = ("--sequence-length", 32, "--window", 64)
    check_refused_on_the_command_line(main, folder.parent, message, folder, option, text, *lengths)


@pytest.mark.parametrize("module", ["click", "mgptq_export.recipe", "torch", "transformers"])
def test_an_interrupt_while_modules_are_imported_ends_with_130(module: str) -> None:
    script = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "from mgptq_export.__main__ import main\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = ['mgptq-export', 'plan', 'no/such/model/here']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
