"""An ONNX model from a stranger, validated before ONNX Runtime sees it.

What is checked: tensors are as long as their shapes say and lie in the one file of weights; operators are those that
packages are made of, none of which loops, branches or opens files; matrices of low-bit codes have the shapes that their
nodes state. ONNX Runtime checks the rest when it loads the graph. Field numbers are those of ``onnx.proto``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mgptq_runtime.formats import FORMATS, padded_columns
from mgptq_runtime.protobuf import Message, parse_message

__all__ = ["MAX_MODEL_BYTES", "validate_onnx"]

MAX_MODEL_BYTES = 1 << 23
# Equal initializers share bytes, such as those of the embedding and a tied head; norms that are all equal do, too.
MAX_SHARING, SMALL_TENSORS_BYTES = 3, 1 << 24

MAX_HEADS = 512
MAX_DIMENSIONS = 8
# ONNX Runtime narrows attributes to 32 bits.
MAX_INTEGER = (1 << 31) - 1

OWN_DOMAIN = "ai.mgptq"
MICROSOFT = "com.microsoft"
OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        (
            *("Add", "Cast", "Concat", "Constant", "Cos", "Gather", "Gelu", "GreaterOrEqual", "Mul"),
            *("RMSNormalization", "ReduceMax", "ReduceSum", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid"),
            *("Sin", "Slice", "Split", "Sub", "Sum", "Unsqueeze", "Where"),
        )
    ),
    MICROSOFT: frozenset(("GroupQueryAttention", "SkipSimplifiedLayerNormalization")),
}
FUNCTION_OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        (
            *("Abs", "Add", "BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Concat", "Constant", "Div", "Gather"),
            *("Max", "Mod", "Mul", "Neg", "Pad", "ReduceMax", "ReduceSum", "Reshape", "Round"),
            *("Slice", "Split", "Sub", "Sum", "Unsqueeze"),
        )
    ),
    MICROSOFT: frozenset(("GatherBlockQuantized", "MatMulNBits")),
}
MATMUL, HEAD, EMBEDDING, PERMUTE = "MatMul", "Head", "Embedding", "PermuteColumns"
KERNELS = {MATMUL: "MatMulNBits", HEAD: "MatMulNBits", EMBEDDING: "GatherBlockQuantized"}
# An embedding of other formats is widened by plain operators, row by row.
GATHERED_FORMATS = ("b4", "b8")
KERNEL_BITS = {"b1": 2, "b2": 2, "b3": 4, "b4": 4, "b8": 8}
# Two formats, side by side, where a kernel reads the codes of both in the same width.
PAIRS = [(a, b) for a in FORMATS for b in FORMATS if a != b and KERNEL_BITS[a] == KERNEL_BITS[b]]
LOW_BIT_OPERATORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{f"{kind}{fmt.upper()}": (kind, (fmt,)) for kind in KERNELS for fmt in FORMATS},
    **{f"{MATMUL}{''.join(pair).upper()}": (MATMUL, pair) for pair in PAIRS},
}
KERNEL_BLOCK = 64

FLOAT, UINT8, FLOAT16 = 1, 2, 10
ELEMENT_BYTES = {FLOAT: 4, UINT8: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, FLOAT16: 2, 11: 8, 12: 4, 13: 8}
EXTERNAL = 1
RAW_DATA, TYPED_DATA = 9, (4, 5, 7, 10, 11)
SUBGRAPHS_AND_SPARSE_TENSORS = (6, 10, 11, 22, 23)


@dataclass(frozen=True)
class _Tensor:
    """What an initializer says of itself.

    Attributes:
        name: not empty.
        type: ONNX's number of the element type.
        shape: as many numbers of 0 or more.
        external_bytes: bytes in the file of weights; 0 where they lie in the model.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    external_bytes: int


def _external_bytes(tensor: Message, name: str, size: int, weights_name: str, weights_bytes: int) -> int:
    """The length of an external tensor, its place compared with the file of weights."""
    pairs = [(entry.text(1), entry.text(2)) for entry in tensor.messages(13)]
    entries = dict(pairs)
    unknown = entries.keys() - {"location", "offset", "length", "checksum"}
    if len(entries) != len(pairs) or unknown:
        raise ValueError(f"tensor {name!r}: its external data have keys twice or of another kind: {sorted(unknown)}")
    if entries.get("location") != weights_name:
        raise ValueError(
            f"tensor {name!r} lies in {entries.get('location')!r}; all weights must lie in {weights_name!r}"
        )
    place = [entries.get("offset", "0"), entries.get("length", str(size))]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in place):
        raise ValueError(f"tensor {name!r} has offset and length {place}, they must be numbers of 0 or more")
    offset, length = map(int, place)
    if length != size:
        raise ValueError(f"tensor {name!r} has {length} bytes, its shape and type need {size}")
    if offset + length > weights_bytes:
        raise ValueError(
            f"tensor {name!r} ends at byte {offset + length} of {weights_name}, which has {weights_bytes} bytes"
        )
    return length


def _read_tensor(tensor: Message, name: str, weights_name: str | None, weights_bytes: int) -> _Tensor:
    """An initializer; or a tensor in an attribute, which must not be external: ``weights_name`` is None."""
    element = tensor.integer(2) or 0
    shape = tuple(tensor.integers(1))
    if element not in ELEMENT_BYTES:
        raise ValueError(f"tensor {name!r} has element type {element}, allowed are {sorted(ELEMENT_BYTES)}")
    if len(shape) > MAX_DIMENSIONS:  # the time of their product grows with their square
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    count = math.prod(shape)
    size = count * ELEMENT_BYTES[element]
    if (tensor.integer(14) or 0) == EXTERNAL or tensor.has(13):
        if weights_name is None or tensor.has(RAW_DATA):
            raise ValueError(f"tensor {name!r} lies in another file; only weights without a copy in the graph may")
        return _Tensor(name, element, shape, _external_bytes(tensor, name, size, weights_name, weights_bytes))
    raw = len(tensor.content(RAW_DATA))
    typed = [number for number in TYPED_DATA if tensor.has(number)]
    # A typed value takes a byte or more; ONNX Runtime compares the exact number.
    fits_typed = len(typed) == 1 and not raw and tensor.size(typed[0]) >= count
    if not (fits_typed if typed else raw == size):
        raise ValueError(f"tensor {name!r} holds {raw} bytes, its shape {list(shape)} and type need {size}")
    return _Tensor(name, element, shape, 0)


def _read_initializers(graph: Message, weights_name: str, weights_bytes: int) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    total = 0
    for message in graph.messages(5):
        name = message.text(8)
        if not name or name in tensors:
            raise ValueError(f"a tensor's name is {'empty' if not name else f'a second {name!r}'}")
        tensors[name] = _read_tensor(message, name, weights_name, weights_bytes)
        total += tensors[name].external_bytes
    allowed = MAX_SHARING * weights_bytes + SMALL_TENSORS_BYTES
    if total > allowed:
        raise ValueError(f"tensors of {total} bytes share {weights_bytes} bytes of weights, at most {allowed} may")
    return tensors


def _attributes(node: Message, what: str) -> dict[str, Message]:
    attributes: dict[str, Message] = {}
    for attribute in node.messages(5):
        name = attribute.text(1)
        if name in attributes or any(attribute.has(number) for number in SUBGRAPHS_AND_SPARSE_TENSORS):
            raise ValueError(f"{what}: attribute {name!r} is there twice, or holds a graph or a list of tensors")
        if attribute.has(5):
            _read_tensor(attribute.message(5), name, None, 0)
        number = attribute.integer(3) or 0
        if not -MAX_INTEGER <= number <= MAX_INTEGER:
            raise ValueError(f"{what}: attribute {name!r} is {number}, allowed is at most {MAX_INTEGER}")
        attributes[name] = attribute
    _check_arguments(node, attributes, what)
    return attributes


def _check_arguments(node: Message, attributes: Mapping[str, Message], what: str) -> None:
    """What ONNX Runtime divides by, counts or follows without a look at it."""
    operator = node.text(4)
    for name in ("num_heads", "kv_num_heads") if operator == "GroupQueryAttention" else ():
        heads = attributes[name].integer(3) if name in attributes else None
        if heads is None or not 1 <= heads <= MAX_HEADS:
            raise ValueError(f"{what}: attribute {name!r} is {heads}, allowed are 1 to {MAX_HEADS}")
    if operator != "GroupQueryAttention" and "" in node.texts(1):
        raise ValueError(f"{what} lacks an input, which only GroupQueryAttention may")
    outputs = len(node.texts(2))
    if operator == "Split" and "num_outputs" in attributes and attributes["num_outputs"].integer(3) != outputs:
        raise ValueError(f"{what} has {outputs} outputs, attribute 'num_outputs' must say so")


def _check_operator(node: Message, allowed: Mapping[str, frozenset[str]]) -> tuple[str, str]:
    """A node's domain and operator, which must be known."""
    domain, operator = node.text(7), node.text(4)
    if operator not in allowed.get(domain, ()):
        known = ", ".join(sorted(name for names in allowed.values() for name in names))
        raise ValueError(f"operator {operator!r} of domain {domain!r} is no part of a package; known are: {known}")
    return domain, operator


def _check_function(function: Message) -> str:
    """A model-local function must be one of ours: known by name, its kernel that of its format."""
    name = function.text(1)
    if function.text(10) != OWN_DOMAIN or not (name in LOW_BIT_OPERATORS or name == PERMUTE):
        raise ValueError(f"function {name!r} of domain {function.text(10)!r} is no part of a package")
    kernels: list[tuple[str, int | None, int | None]] = []
    for node in function.messages(7):
        domain, operator = _check_operator(node, FUNCTION_OPERATORS)
        attributes = _attributes(node, f"{name}: {operator}")
        if domain == MICROSOFT:
            bits, block = (attributes[key].integer(3) if key in attributes else None for key in ("bits", "block_size"))
            kernels.append((operator, bits, block))
    if name == PERMUTE:
        wanted = []
    else:
        kind, formats = LOW_BIT_OPERATORS[name]
        is_plain = kind == EMBEDDING and formats[0] not in GATHERED_FORMATS
        wanted = [] if is_plain else [(KERNELS[kind], KERNEL_BITS[formats[0]], KERNEL_BLOCK)]
    if kernels != wanted:
        raise ValueError(f"function {name!r} computes with {kernels} (kernel, bits, block size), it must be {wanted}")
    return name


def _check_low_bit_node(node: Message, operator: str, tensors: Mapping[str, _Tensor]) -> None:
    """Per format codes uint8 [N, blocks, code bytes] and scales float16 [N, blocks], as attributes K and N say."""
    kind, formats = LOW_BIT_OPERATORS[operator]
    what = f"node {node.text(3)!r} ({operator})"
    attributes = _attributes(node, what)
    sizes = {key: attributes[key].integer(3) or 0 if key in attributes else 0 for key in ("K", "N")}
    inputs = node.texts(1)
    if len(inputs) != 1 + 2 * len(formats) or not all(tensor in tensors for tensor in inputs[1:]):
        raise ValueError(f"{what} has inputs {inputs}; {2 * len(formats)} behind the first must be tensors of the file")
    stored = [tensors[tensor] for tensor in inputs[1:]]
    rows = sizes["N"] if kind != EMBEDDING else (stored[0].shape or (0,))[0]
    left = padded_columns(sizes["K"]) // KERNEL_BLOCK
    for i, (fmt, codes, scales) in enumerate(zip(formats, stored[::2], stored[1::2], strict=True)):
        is_last = i == len(formats) - 1
        blocks = left if is_last or len(codes.shape) != 3 else codes.shape[1]
        left -= blocks
        wanted = (rows, blocks, FORMATS[fmt].code_bytes)
        is_right = (codes.type, codes.shape, scales.type, scales.shape) == (UINT8, wanted, FLOAT16, wanted[:2])
        if min(rows, sizes["K"], blocks) < 1 or not is_right:
            raise ValueError(
                f"{what} has codes {list(codes.shape)} and scales {list(scales.shape)}; its attributes {sizes} need "
                f"uint8 {list(wanted)} and float16 {list(wanted[:2])}"
            )


def validate_onnx(model: bytes, weights_name: str, weights_bytes: int) -> None:
    """Validate a model of a package.

    Args:
        model: the content of the ``.onnx`` file.
        weights_name: the one file, beside the model, that tensors may lie in.
        weights_bytes: its size.

    Raises:
        ValueError: a rule is broken; the text names the tensor, node or operator, what was found and what is allowed.
    """
    if len(model) > MAX_MODEL_BYTES:
        raise ValueError(f"{len(model)} bytes, at most {MAX_MODEL_BYTES} are allowed")
    root = parse_message(memoryview(model))
    graph = root.message(7)
    if not graph.has(1):
        raise ValueError("it holds no graph with nodes")
    if root.has(20) or graph.has(15):
        raise ValueError("it holds training graphs or sparse tensors, which are no part of a package")
    tensors = _read_initializers(graph, weights_name, weights_bytes)
    names = [_check_function(function) for function in root.messages(25)]
    if len(set(names)) != len(names):
        raise ValueError(f"a function is there twice: {sorted(names)}")
    allowed = {**OPERATORS, OWN_DOMAIN: frozenset(names)}
    for node in graph.messages(1):
        domain, operator = _check_operator(node, allowed)
        if domain == OWN_DOMAIN and operator != PERMUTE:
            _check_low_bit_node(node, operator, tensors)
        else:
            _attributes(node, f"node {node.text(3)!r} ({operator})")
