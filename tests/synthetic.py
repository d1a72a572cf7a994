"""Small models that the tests make."""

import numpy as np

from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment


def random_linear(
    rng: np.random.Generator, name: str, rows: int, columns: int, formats: list[str], permutation: np.ndarray | None
) -> QuantizedLinear:
    """A linear with random codes; one block of 64 columns per entry of ``formats``."""
    assert len(formats) * BLOCK_COLUMNS == padded_columns(columns)
    segments = []
    start = 0
    for i in range(1, len(formats) + 1):
        if i == len(formats) or formats[i] != formats[start]:
            fmt = FORMATS[formats[start]]
            codes = rng.integers(0, fmt.levels, (rows, (i - start) * BLOCK_COLUMNS)).astype(np.uint8)
            spread = np.std(fmt.values()) * np.sqrt(columns)
            scales = rng.choice([-1.0, 1.0], (rows, i - start)) * rng.uniform(0.5, 1.5, (rows, i - start)) / spread
            segments.append(Segment(fmt.name, fmt.pack(codes, scales.astype(np.float16))))
            start = i
    return QuantizedLinear(name, rows, columns, tuple(segments), permutation)


def random_llama(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 128,
    intermediate: int = 192,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 512,
    tied: bool = True,
) -> QuantizedModel:
    """A Llama with random quantized weights, random formats and random column orders."""
    rng = np.random.default_rng(seed)
    head_size = hidden // heads
    names = list(FORMATS)

    def group(name: str, columns: int, outputs: dict[str, int]) -> InputGroup:
        permutation = rng.permutation(columns).astype(np.int32)
        blocks = padded_columns(columns) // BLOCK_COLUMNS
        linears = []
        for linear, rows in outputs.items():
            formats = sorted(rng.choice(names, blocks), key=names.index, reverse=True)
            linears.append(random_linear(rng, linear, rows, columns, formats, permutation))
        return InputGroup(name, permutation, tuple(linears))

    groups, tensors = [], {}
    for i in range(layers):
        blk = f"blk.{i}"
        kv = kv_heads * head_size
        groups += [
            group(f"{blk}.attn_qkv", hidden, {f"{blk}.attn_q": hidden, f"{blk}.attn_k": kv, f"{blk}.attn_v": kv}),
            group(f"{blk}.attn_output", hidden, {f"{blk}.attn_output": hidden}),
            group(f"{blk}.ffn_gate_up", hidden, {f"{blk}.ffn_gate": intermediate, f"{blk}.ffn_up": intermediate}),
            group(f"{blk}.ffn_down", intermediate, {f"{blk}.ffn_down": hidden}),
        ]
        tensors[f"{blk}.attn_norm"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        tensors[f"{blk}.ffn_norm"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    tensors["output_norm"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    theta = 10000.0 ** (-np.arange(0, head_size, 2) / head_size)
    tensors["rope_inverse_frequencies"] = theta.astype(np.float32)
    blocks = padded_columns(hidden) // BLOCK_COLUMNS
    return QuantizedModel(
        family="llama",
        hyperparameters={
            "block_count": layers,
            "context_length": 256,
            "embedding_length": hidden,
            "feed_forward_length": intermediate,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": head_size,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.attention_factor": 1.0,
            "vocab_size": vocabulary,
        },
        groups=tuple(groups),
        embedding=random_linear(rng, "token_embd", vocabulary, hidden, ["b4"] * blocks, None),
        head=None if tied else random_linear(rng, "output", vocabulary, hidden, ["b4"] * blocks, None),
        tensors=tensors,
    )
