"""Our llama.cpp files against llama.cpp's own quantizer at equal size, on a model whose rows K-quants can hold.

    python tools/compare_llama_quantizer.py --calibration c4-calibration.jsonl --text WikiText-2=wikitext2-test.txt

The model is SmolLM2-135M widened from 576 to 768 channels and from 9 to 12 heads by zeros: it computes the same, and
its rows divide by 256. The peer is llama.cpp's quantizer (ggml_quantize_chunk) with an importance matrix from the same
calibration text, tensor types as llama-quantize chooses them: one type throughout (``--pure``), and its Q2_K mixture.
Ours gets the stored bits of the peer's file as its budget. Both files are scored by llama.cpp itself.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from ablation import named_files
from demo import smollm2_file
from llama_cpp import LlamaModel, logits, quantize_rows

from mgptq_export.calibration import ModelStatistics, calibration_tokens, collect_statistics, file_tokens
from mgptq_export.checkpoint import write_checkpoint
from mgptq_export.evaluation import evaluation_windows
from mgptq_export.golden import make_golden
from mgptq_export.layouts import TENSORS
from mgptq_export.models import SourceModel, load_source
from mgptq_export.quantize import quantize
from mgptq_export.recipe import Recipe
from mgptq_export.targets.llama_cpp import write_llama_cpp
from mgptq_runtime.formats import GGML_FORMATS
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

HIDDEN, HEADS, KV_HEADS = 768, 12, 4
TABLE_TYPE = "q4_k"
WINDOW = 512

PEERS: dict[str, Callable[[str], str]] = {
    "pure Q2_K": lambda kind: "q2_k",
    # What llama-quantize makes of Q2_K where fewer than four query heads share a key.
    "Q2_K": lambda kind: "q3_k" if kind in ("attn_v", "attn_output", "ffn_down") else "q2_k",
}


def widened(source: SourceModel, folder: Path) -> Path:
    """The same function with more channels and heads, which are zero: an RMS norm over more channels has a smaller
    mean, which its weight and its epsilon make up for.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    old = source.model.config
    ratio = old.hidden_size / HIDDEN
    settings = {**old.to_dict(), "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    settings |= {"head_dim": old.hidden_size // old.num_attention_heads, "rms_norm_eps": old.rms_norm_eps * ratio}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    state = source.model.state_dict()
    for name, wide in model.state_dict().items():
        narrow = state[name] * (math.sqrt(ratio) if name.endswith("norm.weight") else 1.0)
        wide.zero_()
        wide[tuple(slice(size) for size in narrow.shape)] = narrow
    model.save_pretrained(folder)
    for path in source.tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def peer_model(source: SourceModel, statistics: ModelStatistics, type_of: Callable[[str], str]) -> QuantizedModel:
    """The model as llama.cpp's quantizer rounds it; its importance matrix is the Hessian's diagonal."""

    def rounded(name: str, weight: Any, hessian: torch.Tensor, fmt: str) -> QuantizedLinear:
        values = weight.detach().numpy()
        row_bytes = values.shape[1] // GGML_FORMATS[fmt].block_columns * GGML_FORMATS[fmt].block_bytes
        data = quantize_rows(GGML_FORMATS[fmt].ggml_type, values, row_bytes, hessian.diagonal().numpy())
        return QuantizedLinear(name, *values.shape, (Segment(fmt, data),))

    groups = []
    for group in source.groups():
        hessian = statistics.groups[group.name].hessian
        linears = [rounded(name, m.weight, hessian, type_of(name.split(".")[-1])) for name, m in group.modules.items()]
        groups.append(InputGroup(group.name, None, tuple(linears)))
    table = rounded("token_embd", source.model.lm_head.weight, statistics.head.hessian, TABLE_TYPE)
    family = source.family
    tensors = family.other_tensors(source.model)
    return QuantizedModel(family.name, family.hyperparameters(source.model), tuple(groups), table, None, tensors)


def write_file(model: QuantizedModel, source: SourceModel, recipe: Recipe, folder: Path) -> Path:
    """A stock GGUF file of the model."""
    checkpoint = write_checkpoint(
        folder / "quantized",
        model,
        name=source.name,
        config=source.config,
        recipe=recipe.to_json(),
        tokenizer_folder=source.tokenizer_folder,
    )
    write_llama_cpp(checkpoint, make_golden(source.model, torch.zeros(1, 4, dtype=torch.int64)), folder / "out")
    return next((folder / "out").glob("*.gguf"))


def perplexity(path: Path, windows: torch.Tensor, title: str) -> float:
    """As llama.cpp computes it, over the second half of every window, given the first."""
    half, total = WINDOW // 2, 0.0
    with LlamaModel(path) as model, track(title, len(windows)) as advance:
        for window in windows:
            found = logits(model, window.tolist(), threads=torch.get_num_threads())[half - 1 : -1].astype(np.float64)
            shifted = found - found.max(-1, keepdims=True)
            chosen = np.take_along_axis(shifted, window[half:, None].numpy(), -1)
            total -= float((chosen - np.log(np.exp(shifted).sum(-1, keepdims=True))).sum())
            advance()
    return math.exp(total / (len(windows) * half))


def theirs(source: SourceModel, calibration: str, type_of: Callable[[str], str]) -> QuantizedModel:
    """What llama.cpp's quantizer makes of the model."""
    recipe = Recipe(calibration=calibration)
    generator = torch.Generator().manual_seed(recipe.seed)
    return peer_model(source, collect_statistics(source, calibration_tokens(source, recipe), 1, generator), type_of)


def measure(
    label: str, path: Path, model: QuantizedModel, source: SourceModel, texts: Mapping[str, Path], windows: int
) -> dict[str, Any]:
    """A row of the table."""
    scored = {}
    for name, text in texts.items():
        cut = evaluation_windows(file_tokens(text, source), WINDOW, windows)
        scored[name] = perplexity(path, cut, f"{label}, {name}")
    row = {"file": label, "bits": model.bits_stored, "bytes": path.stat().st_size, "perplexity": scored}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def compare(
    folder: Path, calibration: str, texts: Mapping[str, Path], windows: int, allocator: str
) -> Iterator[dict[str, Any]]:
    """Both files for every peer, and their figures."""
    wide = str(widened(load_source(str(smollm2_file())), folder / "widened"))
    for number, (name, type_of) in enumerate(PEERS.items()):
        source = load_source(wide)
        peer = theirs(source, calibration, type_of)
        recipe = Recipe(bits=math.ceil(peer.bits_stored * 1e4) / 1e4, calibration=calibration, allocator=allocator)
        path = write_file(peer, source, recipe, folder / f"theirs-{number}")
        yield measure(f"llama.cpp {name}", path, peer, source, texts, windows)
        ours = quantize(source, recipe, TENSORS).model
        path = write_file(ours, source, recipe, folder / f"ours-{number}")
        yield measure(f"mgptq-export at {recipe.bits:.3f} bits", path, ours, source, texts, windows)


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--text", "texts", multiple=True, required=True, callback=named_files, help="NAME=FILE, may be repeated.")
@click.option("--windows", default=30, show_default=True)
@click.option("--allocator", default="gnn", show_default=True)
def main(calibration: str, texts: dict[str, Path], windows: int, allocator: str) -> None:
    """Measure and print one table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(compare(Path(folder), calibration, texts, windows, allocator))
    print("| file | stored bits | MB | " + " | ".join(texts) + " |")
    print("|---|---|---|" + "---|" * len(texts))
    for row in rows:
        scores = " | ".join(f"{row['perplexity'][text]:.1f}" for text in texts)
        print(f"| {row['file']} | {row['bits']:.3f} | {row['bytes'] / 1e6:.1f} | {scores} |")


if __name__ == "__main__":
    main()
