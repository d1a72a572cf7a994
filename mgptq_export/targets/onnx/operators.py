"""The custom operators: model-local functions in our own domain, so that a stock ONNX Runtime needs nothing registered.

The stored codes and scales are initializers, so everything in a body but the kernel folds once, when a session loads,
and what runs is ``MatMulNBits`` or ``GatherBlockQuantized``; never float weights.
"""

from dataclasses import dataclass

import onnx
import onnx_ir as ir

__all__ = ["DOMAIN", "EMBEDDING", "MATMUL", "OPSET", "PERMUTE", "VERSION", "operators"]

DOMAIN = "ai.mgptq"
VERSION = 1
# The first with RMSNormalization; older ones have the builder's other operators too.
OPSET = 23
PERMUTE = "PermuteColumns"
MATMUL = {f"b{bits}": f"MatMulB{bits}" for bits in (1, 2, 3, 4, 8)}
EMBEDDING = {f"b{bits}": f"EmbeddingB{bits}" for bits in (1, 2, 3, 4, 8)}

# Formats whose fast graph computes with int8 activations. More bits are bought for columns where errors hurt, by large
# activations above all, so those keep float32 ones: their kernels are as fast, or their columns few.
INT8_FORMATS = ("b1", "b2")

HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>'


@dataclass(frozen=True)
class _Widening:
    """From stored codes to those that a kernel reads; see :mod:`mgptq_export.targets.onnx.storage`.

    Attributes:
        nodes: text of the nodes that make ``result`` from ``codes``.
        result: name of what the kernel reads.
        bits: of a code in ``result``. The code that means zero is the kernel's default, ``1 << (bits - 1)``.
    """

    nodes: str
    result: str
    bits: int


B1 = """
    one = Constant <value = uint8[1] {1}> ()
    even_bits = Constant <value = uint8[1] {85}> ()
    shifted = BitShift <direction = "LEFT"> (codes, one)
    both = Concat <axis = -1> (codes, shifted)
    q = BitwiseOr (both, even_bits)"""
B3 = f"""
    low_bits = Constant <value = uint8[1] {{{0x77}}}> ()
    shifts = Constant <value = uint8[24] {{{", ".join(["3"] * 8 + ["2"] * 8 + ["1"] * 8)}}}> ()
    masks = Constant <value = uint8[24] {{{", ".join([str(0x11)] * 8 + [str(0x22)] * 8 + [str(0x44)] * 8)}}}> ()
    offset = Constant <value = uint8[1] {{{0x55}}}> ()
    first = BitwiseAnd (codes, low_bits)
    shifted = BitShift <direction = "RIGHT"> (codes, shifts)
    free = BitwiseAnd (shifted, masks)
    bit0, bit1, bit2 = Split <axis = -1, num_outputs = 3> (free)
    bits01 = BitwiseOr (bit0, bit1)
    fourth = BitwiseOr (bits01, bit2)
    wide = Concat <axis = -1> (first, fourth)
    q = Add (wide, offset)"""

WIDENINGS = {
    "b1": _Widening(B1, "q", bits=2),
    "b2": _Widening("", "codes", bits=2),
    "b3": _Widening(B3, "q", bits=4),
    "b4": _Widening("", "codes", bits=4),
    "b8": _Widening("", "codes", bits=8),
}

# A kernel takes float32 scales; they must be constant when it packs the weights.
SCALES = """
    s = Cast <to = 1> (scales)"""


def _matmul(name: str, widening: _Widening, accuracy_level: int) -> str:
    return f"""{HEADER}
{name} <K, N> (a, codes, scales) => (y) {{{widening.nodes}{SCALES}
    y = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits = {widening.bits}, block_size = 64,
        accuracy_level = {accuracy_level}> (a, {widening.result}, s)
}}"""


def _embedding(name: str, widening: _Widening) -> str:
    return f"""{HEADER}
{name} <K> (ids, codes, scales) => (y) {{{widening.nodes}{SCALES}
    last = Constant <value = int64[1] {{-1}}> ()
    block_scales = Unsqueeze (s, last)
    blocks = com.microsoft.GatherBlockQuantized <bits = {widening.bits}, block_size = 64, gather_axis = 0,
        quantize_axis = 2> ({widening.result}, ids, block_scales)
    flat = Constant <value = int64[3] {{0, 0, -1}}> ()
    padded = Reshape (blocks, flat)
    zero = Constant <value = int64[1] {{0}}> ()
    columns = Constant <value_int: int = @K> ()
    end = Unsqueeze (columns, zero)
    y = Slice (padded, zero, end, last)
}}"""


def _permute() -> str:
    return f"""{HEADER}
{PERMUTE} (x, permutation) => (y) {{
    indices = Cast <to = 6> (permutation)
    y = Gather <axis = -1> (x, indices)
}}"""


def operators(accuracy_level: int) -> list[ir.Function]:
    """All operators of our domain.

    ``MatMulB1`` .. ``MatMulB8`` (attributes ``K``, ``N``): float32 [..., K], uint8 [N, blocks, code_bytes] and float16
    [N, blocks] to float32 [..., N]. ``EmbeddingB1`` .. ``EmbeddingB8`` (attribute ``K``): int64 [batch, sequence], and
    the same storage with the vocabulary for N, to float32 [batch, sequence, K]. ``PermuteColumns``: float32 [..., K]
    and uint16 or int32 [K] to float32 [..., K]. K may be short of ``blocks * 64``; the rest is padding, of any codes.

    Args:
        accuracy_level: of ``MatMulNBits``: 4 for int8 activations where they cost little, 0 for float32 ones.
    """
    levels = {fmt: accuracy_level if fmt in INT8_FORMATS else 0 for fmt in MATMUL}
    texts = [_matmul(name, WIDENINGS[fmt], levels[fmt]) for fmt, name in MATMUL.items()]
    texts += [_embedding(name, WIDENINGS[fmt]) for fmt, name in EMBEDDING.items()]
    texts.append(_permute())
    return [ir.serde.deserialize_function(onnx.parser.parse_function(text)) for text in texts]
