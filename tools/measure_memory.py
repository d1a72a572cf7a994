"""Measure what memory quantizing takes: of a model with random weights, Llama-shaped, by default like TinyLlama's 1.1
billion weights but of two layers.

    python tools/measure_memory.py                     # 1.1B-shaped, two layers
    python tools/measure_memory.py --layers 4 -- --allocator gnn --recovery-steps 0

What follows ``--`` goes to ``mgptq-export quantize``. Prints a JSON object; sizes are in MB (10^6 bytes). ``peak`` is
resident memory beyond that of a process that has only imported the program; ``peak_anonymous`` leaves out mapped
files, which the system may drop or write back at any time.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SAMPLING_SECONDS = 0.01
IMPORTED = (
    "import mgptq_export.pipeline, transformers.models.llama.modeling_llama, sys; print(flush=True); sys.stdin.read()"
)
DEFAULTS = ["--calibration", "self", "--samples", "8", "--recovery-steps", "0", "--max-memory", "1GB"]


def make_model(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> int:
    """Write a model in bfloat16; the weights of one decoder layer."""
    config = AutoConfig.for_model(
        "llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.02 * torch.randn(shape.shape, generator=generator)).bfloat16()
        if shape.ndim > 1
        else torch.ones(shape.shape).bfloat16()
        for name, shape in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of a process, by kind; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    kinds = {"peak": "VmRSS", "peak_anonymous": "RssAnon"}
    return {kind: int(fields[field][0]) * 1024 for kind, field in kinds.items() if field in fields}


def memory_of_imports() -> dict[str, int]:
    """Of a process that has imported the program."""
    with subprocess.Popen([sys.executable, "-c", IMPORTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_of(process.pid)
        process.kill()
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--layers", default=2, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=5632, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.argument("options", nargs=-1)
def main(layers: int, hidden: int, intermediate: int, vocabulary: int, options: tuple[str, ...]) -> None:
    """Measure the memory that quantizing a random model takes."""
    before = memory_of_imports()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        layer = make_model(folder / "model", layers, hidden, intermediate, vocabulary)
        command = [sys.executable, "-m", "mgptq_export", "quantize", str(folder / "model"), "-o", str(folder / "out")]
        start, most = time.monotonic(), dict.fromkeys(before, 0)
        with subprocess.Popen([*command, *DEFAULTS, *options], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                most |= {kind: max(most[kind], found) for kind, found in memory_of(process.pid).items()}
                time.sleep(SAMPLING_SECONDS)
        seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"quantizing failed with exit code {process.returncode}")
    beyond = {kind: round((most[kind] - before[kind]) / 1e6, 1) for kind in most}
    of_layer = layer * 4
    print(
        json.dumps(
            {
                **beyond,
                "imports": round(before["peak"] / 1e6, 1),
                "layer_float32": round(of_layer / 1e6, 1),
                "peak_in_layers": round(beyond["peak"] * 1e6 / of_layer, 2),
                "hessian_of_down_float32": round(intermediate**2 * 4 / 1e6, 1),
                "embedding_float32": round(vocabulary * hidden * 4 / 1e6, 1),
                "seconds": round(seconds, 1),
                "options": [*DEFAULTS, *options],
            }
        )
    )


if __name__ == "__main__":
    main()
