"""Prove the device runtime on 64-bit Arm, emulated, against this machine: `make test-arm64`.

    python tools/check_arm64.py                                    # a tiny package, which is made
    python tools/check_arm64.py build/demo --way onnx_fast         # a package of your own
    build/arm64/python -m mgptq_runtime info PACKAGE               # afterwards: the emulated runtime, by hand

Golden vectors are replayed and a text is continued, here and on every emulated processor, in every way that the
runtime computes. Arm must pass its check, and where weights meet float32 activations it must write the same tokens;
with 8-bit activations each kernel rounds in its own way, and near-ties go either way. Exit code 1 when it does not.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from arm64 import MIRROR, Machine, install_machine
from rich.console import Console
from rich.table import Table

from mgptq_runtime.progress import track

__all__ = ["WAYS", "Replay", "compare", "first_difference", "replay"]

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
FOLDER = ROOT / "build" / "arm64"
# By the names of a check's bounds.
WAYS: Mapping[str, Sequence[str]] = {
    "numpy": ("--backend", "numpy"),
    "onnx_exact": ("--backend", "onnx", "--accuracy-level", "0"),
    "onnx_fast": ("--backend", "onnx", "--accuracy-level", "4"),
}
SAME_TOKENS = ("numpy", "onnx_exact")
VERSIONS = """
import importlib.metadata, json, platform
names = ("numpy", "onnxruntime", "tokenizers", "mgptq-runtime")
versions = {name: importlib.metadata.version(name) for name in names}
print(json.dumps({"machine": platform.machine(), "python": platform.python_version()} | versions))
"""


@dataclass(frozen=True)
class Replay:
    """What one machine computed in one way.

    Attributes:
        machine: its name.
        way: a key of :data:`WAYS`.
        check: what ``mgptq-run check`` said, see :class:`mgptq_runtime.check.CheckResult`.
        tokens, text: how the prompt goes on.
        seconds: for both, each with a start of Python.
    """

    machine: str
    way: str
    check: Mapping[str, Any]
    tokens: Sequence[int]
    text: str
    seconds: float


def ask(machine: Machine, *arguments: str) -> Any:
    """What a command of the runtime prints as JSON.

    Raises:
        SystemExit: it printed none, with what it said instead.
    """
    done = machine.run(["-m", "mgptq_runtime", *arguments, "--json"])
    if not done.stdout:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        sys.exit(f"{machine.name}: mgptq-run {shlex.join(arguments)}: {said}")
    return json.loads(done.stdout)


def replay(machine: Machine, package: Path, way: str, prompt: str, max_tokens: int) -> Replay:
    """Replay the golden vectors of a package and continue a prompt on a machine."""
    start = time.monotonic()
    check = ask(machine, "check", str(package), *WAYS[way])
    options = ("--prompt", prompt, "--max-tokens", str(max_tokens))
    answer = ask(machine, "generate", str(package), *WAYS[way], *options)
    return Replay(machine.name, way, check, answer["tokens"], answer["text"], time.monotonic() - start)


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Where two texts part, counted from 0; None where they are the same."""
    if list(expected) == list(found):
        return None
    pairs = zip(expected, found, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))


def compare(here: Replay, there: Replay) -> list[str]:
    """Why what an emulated machine computed is no proof, in words; nothing where it is one."""
    failures = [f"{there.machine}, {there.way}: {failure}" for failure in there.check["failures"]]
    parting = first_difference(here.tokens, there.tokens)
    if there.way in SAME_TOKENS and parting is not None:
        failures.append(f"{there.machine}, {there.way}: the text is not that of {here.machine} from token {parting}")
    return failures


def make_package(folder: Path) -> Path:
    """A package of a tiny random model, whose logits lie as far apart as those of a trained one."""
    sys.path.insert(0, str(TESTS))
    from small_runs import EVEN, RECIPE
    from tiny_models import write_llama

    from mgptq_export import pipeline

    shutil.rmtree(folder, ignore_errors=True)
    write_llama(folder / "model", initializer_range=0.3, **EVEN)
    pipeline.run(str(folder / "model"), folder / "package", RECIPE, ["container", "onnx"])
    return folder / "package"


def table(here: Mapping[str, Replay], replays: Iterable[Replay]) -> Table:
    """One row for every machine and way; all but the text is compared with the golden vectors."""
    headings = ("", "", "check", "logits", "layers", "top-1", "KL", "same text", "s")
    made = Table(*headings, box=None, pad_edge=False)
    for found in replays:
        check, parting = found.check, first_difference(here[found.way].tokens, found.tokens)
        layers = check["hidden_relative_difference"]
        made.add_row(
            found.machine,
            found.way,
            "passed" if check["passed"] else "FAILED",
            f"{check['max_abs_difference']:.1e}",
            "" if layers is None else f"{layers:.1e}",
            f"{check['top1_agreement']:.1%}",
            f"{check['kl_divergence']:.1e}",
            "all" if parting is None else f"{parting} tokens",
            f"{found.seconds:.0f}",
        )
    return made


def versions(machine: Machine) -> dict[str, str]:
    """Of what a machine runs."""
    found = json.loads(machine.run(["-c", VERSIONS]).stdout)
    if machine.emulator is None:
        return found
    said = subprocess.run([machine.emulator, "--version"], text=True, capture_output=True).stdout
    return {"emulator": said.splitlines()[0]} | found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("package", type=click.Path(exists=True, path_type=Path), required=False)
@click.option(
    "--cpu", "cpus", multiple=True, default=["cortex-a76", "cortex-a53"], show_default=True, help="As QEMU names them."
)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), default=list(WAYS), help="By default all.")
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--mirror", default=MIRROR, show_default=True, help="Of Debian.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    package: Path | None,
    cpus: Sequence[str],
    ways: Sequence[str],
    prompt: str,
    max_tokens: int,
    mirror: str,
    as_json: bool,
) -> None:
    """Compare what the device runtime computes on 64-bit Arm, emulated, with what it computes here.

    PACKAGE is an exported folder, or a container with --way numpy; without it a tiny one is made. A golden prompt of a
    real model takes a minute or more for each processor and way.
    """
    package = (package or make_package(FOLDER / "tiny")).resolve()
    native = Machine("x86-64", Path(sys.executable))
    here = {way: replay(native, package, way, prompt, max_tokens) for way in ways}
    machines = install_machine(FOLDER, cpus, mirror)
    replays = list(here.values())
    with track("emulated", len(machines) * len(ways)) as advance:
        for machine in machines:
            for way in ways:
                replays.append(replay(machine, package, way, prompt, max_tokens))
                advance()
    failures = [failure for found in replays for failure in compare(here[found.way], found)]
    running = {machine.name: versions(machine) for machine in (native, *machines)}
    if as_json:
        values = {"passed": not failures, "failures": failures, "package": str(package), "versions": running}
        print(json.dumps(values | {"replays": [asdict(found) for found in replays]}))
    else:
        console = Console()
        console.print(table(here, replays))
        for name, found in running.items():
            console.print(f"{name}: {', '.join(map(' '.join, found.items()))}", highlight=False)
        for failure in failures:
            console.print(failure, markup=False, highlight=False)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
