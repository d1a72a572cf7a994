"""The custom operators: model-local functions in our own domain, so that a stock ONNX Runtime needs nothing registered.

The stored codes and scales are initializers, so everything in a body but the kernel folds once, when a session loads,
and what runs is ``MatMulNBits`` or ``GatherBlockQuantized``; never float weights. Embeddings of fewer than four bits
have no kernel: the rows of a text are widened as they are gathered, since to fold the whole matrix would cost a session
several times its memory.
"""

from dataclasses import dataclass

import onnx
import onnx_ir as ir

__all__ = ["DOMAIN", "EMBEDDING", "HEAD", "MATMUL", "OPSET", "PERMUTE", "VERSION", "operators"]

DOMAIN = "ai.mgptq"
VERSION = 1
# The first with RMSNormalization; older ones have the builder's other operators too.
OPSET = 23
PERMUTE = "PermuteColumns"
SINGLE = [(f"b{bits}",) for bits in (1, 2, 3, 4, 8)]
# Neighbours whose codes a kernel reads in the same width are one node: what a node costs beside its weights is most of
# what a segment of a few blocks takes.
PAIRS = [("b1", "b2"), ("b2", "b1"), ("b3", "b4"), ("b4", "b3")]
MATMUL = {formats: f"MatMul{''.join(formats).upper()}" for formats in (*SINGLE, *PAIRS)}
HEAD = {formats: f"Head{formats[0].upper()}" for formats in SINGLE}
EMBEDDING = {formats: f"Embedding{formats[0].upper()}" for formats in SINGLE}

# Formats whose fast graph computes with int8 activations. More bits are bought for columns where errors hurt, by large
# activations above all, so those keep float32 ones: their kernels are as fast for a prompt, or their columns few. The
# head is large, and of single tokens: it computes with two int8 parts, in half of what float32 takes.
INT8_FORMATS = ("b1", "b2")
FLOAT, INT8, TWO_INT8 = "float", "int8", "two int8"
# Formats that ``GatherBlockQuantized`` reads as they are stored.
GATHERED_FORMATS = ("b4", "b8")

HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>'


@dataclass(frozen=True)
class _Widening:
    """From stored codes to those that a kernel reads; see :mod:`mgptq_export.targets.onnx.storage`.

    Attributes:
        nodes: text of the nodes that make ``result`` from ``codes``; every name ends in ``$``, which stands for the
            segment.
        result: name of what the kernel reads.
        bits: of a code in ``result``. The code that means zero is the kernel's default, ``1 << (bits - 1)``.
    """

    nodes: str
    result: str
    bits: int


B1 = """
    one$ = Constant <value = uint8[1] {1}> ()
    even_bits$ = Constant <value = uint8[1] {85}> ()
    shifted$ = BitShift <direction = "LEFT"> (codes$, one$)
    both$ = Concat <axis = -1> (codes$, shifted$)
    q$ = BitwiseOr (both$, even_bits$)"""
B3 = f"""
    low_bits$ = Constant <value = uint8[1] {{{0x77}}}> ()
    shifts$ = Constant <value = uint8[24] {{{", ".join(["3"] * 8 + ["2"] * 8 + ["1"] * 8)}}}> ()
    masks$ = Constant <value = uint8[24] {{{", ".join([str(0x11)] * 8 + [str(0x22)] * 8 + [str(0x44)] * 8)}}}> ()
    offset$ = Constant <value = uint8[1] {{{0x55}}}> ()
    first$ = BitwiseAnd (codes$, low_bits$)
    shifted$ = BitShift <direction = "RIGHT"> (codes$, shifts$)
    free$ = BitwiseAnd (shifted$, masks$)
    bit0$, bit1$, bit2$ = Split <axis = -1, num_outputs = 3> (free$)
    bits01$ = BitwiseOr (bit0$, bit1$)
    fourth$ = BitwiseOr (bits01$, bit2$)
    wide$ = Concat <axis = -1> (first$, fourth$)
    q$ = Add (wide$, offset$)"""

WIDENINGS = {
    "b1": _Widening(B1, "q$", bits=2),
    "b2": _Widening("", "codes$", bits=2),
    "b3": _Widening(B3, "q$", bits=4),
    "b4": _Widening("", "codes$", bits=4),
    "b8": _Widening("", "codes$", bits=8),
}

# Of activations [batch, sequence, K]: what int8 with one scale per block of 64 columns holds of them, and behind it, as
# further positions, what that leaves over. A kernel rounds both again, the first without a change, so that its results
# on both, added up, are as if of 15 bits.
TWO_PARTS = """
    zero_float = Constant <value = float {0.0}> ()
    zero = Constant <value = int64[1] {0}> ()
    last = Constant <value = int64[1] {-1}> ()
    in_blocks = Constant <value = int64[4] {0, 0, -1, 64}> ()
    whole = Constant <value = int64[3] {0, 0, -1}> ()
    block = Constant <value = int64[1] {64}> ()
    inverse_most = Constant <value = float {0.007874015748}> ()
    least = Constant <value = float {1e-30}> ()
    column_count = Constant <value_int: int = @K> ()
    columns = Unsqueeze (column_count, zero)
    negative = Neg (columns)
    padding = Mod (negative, block)
    pads = Concat <axis = 0> (zero, padding)
    padded = Pad (a, pads, zero_float, last)
    blocks = Reshape (padded, in_blocks)
    sizes = Abs (blocks)
    largest = ReduceMax (sizes, last)
    wanted_step = Mul (largest, inverse_most)
    step = Max (wanted_step, least)
    quotient = Div (blocks, step)
    rounded = Round (quotient)
    coarse = Mul (rounded, step)
    rest = Sub (blocks, coarse)
    parts = Concat <axis = 1> (coarse, rest)
    flat = Reshape (parts, whole)
    activations = Slice (flat, zero, columns, last)"""
# A kernel may round NaN to a number; NaN times zero is NaN.
ADDED_PARTS = """
    y0, y1 = Split <axis = 1, num_outputs = 2> (products)
    zeros = Mul (a, zero_float)
    zero_or_nan = ReduceSum (zeros, last)
    y = Sum (y0, y1, zero_or_nan)"""


# Of an embedding's blocks [batch, sequence, blocks, 64]: their columns in a row, K of them.
WITHOUT_PADDING = """
    flat = Constant <value = int64[3] {0, 0, -1}> ()
    padded = Reshape (blocks, flat)
    zero = Constant <value = int64[1] {0}> ()
    columns = Constant <value_int: int = @K> ()
    end = Unsqueeze (columns, zero)
    y = Slice (padded, zero, end, last)"""


def _stored(formats: tuple[str, ...]) -> tuple[str, str, str]:
    """Parameters of one or two segments; nodes that make ``weight`` and ``s``, which a kernel reads, and its name.

    A kernel takes float32 scales; they must be constant when it packs the weights.
    """
    segments = [("", formats[0]), *(("2", fmt) for fmt in formats[1:])]
    parameters = ", ".join(f"codes{i}, scales{i}" for i, _ in segments)
    nodes = "".join(WIDENINGS[fmt].nodes.replace("$", i) for i, fmt in segments)
    results = [WIDENINGS[fmt].result.replace("$", i) for i, fmt in segments]
    if len(segments) == 1:
        return parameters, f"{nodes}\n    s = Cast <to = 1> (scales)", results[0]
    joined = f"""
    weight = Concat <axis = 1> ({", ".join(results)})
    all_scales = Concat <axis = 1> (scales, scales2)
    s = Cast <to = 1> (all_scales)"""
    return parameters, nodes + joined, "weight"


def _matmul(name: str, formats: tuple[str, ...], activations: str) -> str:
    parameters, nodes, weight = _stored(formats)
    a, y = ("activations", "products") if activations == TWO_INT8 else ("a", "y")
    before, behind = (TWO_PARTS, ADDED_PARTS) if activations == TWO_INT8 else ("", "")
    return f"""{HEADER}
{name} <K, N> (a, {parameters}) => (y) {{{nodes}{before}
    {y} = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits = {WIDENINGS[formats[0]].bits}, block_size = 64,
        accuracy_level = {0 if activations == FLOAT else 4}> ({a}, {weight}, s){behind}
}}"""


def _embedding(name: str, formats: tuple[str, ...]) -> str:
    if formats[0] not in GATHERED_FORMATS:
        return _widened_embedding(name, WIDENINGS[formats[0]])
    parameters, nodes, weight = _stored(formats)
    return f"""{HEADER}
{name} <K> (ids, {parameters}) => (y) {{{nodes}
    last = Constant <value = int64[1] {{-1}}> ()
    block_scales = Unsqueeze (s, last)
    blocks = com.microsoft.GatherBlockQuantized <bits = {WIDENINGS[formats[0]].bits}, block_size = 64, gather_axis = 0,
        quantize_axis = 2> ({weight}, ids, block_scales){WITHOUT_PADDING}
}}"""


def _widened_embedding(name: str, widening: _Widening) -> str:
    """Rows are gathered as they are stored; the kernel's codes ``q`` are made of them, and ``(q - zero) * scale``."""
    nodes = widening.nodes.replace("codes$", "rows").replace("$", "")
    result = widening.result.replace("codes$", "rows").replace("$", "")
    shifts = ", ".join(str(shift) for shift in range(0, 8, widening.bits))
    return f"""{HEADER}
{name} <K> (ids, codes, scales) => (y) {{
    rows = Gather <axis = 0> (codes, ids){nodes}
    last = Constant <value = int64[1] {{-1}}> ()
    places = Constant <value = uint8[{8 // widening.bits}] {{{shifts}}}> ()
    mask = Constant <value = uint8[1] {{{(1 << widening.bits) - 1}}}> ()
    bytes = Unsqueeze ({result}, last)
    lowered = BitShift <direction = "RIGHT"> (bytes, places)
    separate = BitwiseAnd (lowered, mask)
    in_blocks = Constant <value = int64[4] {{0, 0, -1, 64}}> ()
    in_order = Reshape (separate, in_blocks)
    numbers = Cast <to = 1> (in_order)
    middle = Constant <value = float {{{float(1 << (widening.bits - 1))}}}> ()
    centred = Sub (numbers, middle)
    row_scales = Gather <axis = 0> (scales, ids)
    wide_scales = Cast <to = 1> (row_scales)
    block_scales = Unsqueeze (wide_scales, last)
    blocks = Mul (centred, block_scales){WITHOUT_PADDING}
}}"""


def _permute() -> str:
    return f"""{HEADER}
{PERMUTE} (x, permutation) => (y) {{
    indices = Cast <to = 6> (permutation)
    y = Gather <axis = -1> (x, indices)
}}"""


def _activations(formats: tuple[str, ...], accuracy_level: int, is_head: bool) -> str:
    """What the graph of an accuracy level has for activations."""
    if accuracy_level == 0:
        return FLOAT
    if is_head:
        return TWO_INT8
    return INT8 if formats[0] in INT8_FORMATS else FLOAT


def operators(accuracy_level: int) -> list[ir.Function]:
    """All operators of our domain.

    ``MatMulB1`` .. ``MatMulB8`` (attributes ``K``, ``N``): float32 [batch, sequence, K], uint8 [N, blocks, code_bytes]
    and float16 [N, blocks] to float32 [batch, sequence, N]; those of two formats, as ``MatMulB4B3``, take codes and
    scales of both, the columns of the first before those of the second. ``HeadB1`` .. ``HeadB8``: the same for the
    head. ``EmbeddingB1`` .. ``EmbeddingB8`` (attribute ``K``): int64 [batch, sequence], and the same storage with the
    vocabulary for N, to float32 [batch, sequence, K]. ``PermuteColumns``: float32 [..., K] and uint16 or int32 [K] to
    float32 [..., K]. K may be short of ``blocks * 64``; the rest is padding, of any codes.

    Args:
        accuracy_level: 4 for int8 activations where they cost little, 0 for float32 ones.
    """
    texts = [_matmul(name, f, _activations(f, accuracy_level, is_head=False)) for f, name in MATMUL.items()]
    texts += [_matmul(name, f, _activations(f, accuracy_level, is_head=True)) for f, name in HEAD.items()]
    texts += [_embedding(name, formats) for formats, name in EMBEDDING.items()]
    texts.append(_permute())
    return [ir.serde.deserialize_function(onnx.parser.parse_function(text)) for text in texts]
