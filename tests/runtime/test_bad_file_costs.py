"""A bad file costs 300 MB beyond the imports at most, and no more time than to count to 80 million in Python.

On one core that is some 2 to 4 seconds; a file may claim what it likes.
"""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_container import resign, write_seeds
from golden_package import write_manifest

MILLIONS_COUNTED, BYTES = 80, 300_000_000
UINT32, STRING, ARRAY, UINT8 = 4, 8, 9, 0

# Opens each package in a process of its own, forked after the imports; prints its name, the time in units of what
# counting to a million takes just then, the bytes of memory beyond the imports, and the error.
PROBE = """
import json, os, resource, sys, time
from pathlib import Path
import mgptq_runtime.backends.numpy_backend, mgptq_runtime.backends.onnx_backend
from mgptq_runtime.errors import MgptqError
from mgptq_runtime.package import open_package

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def counting():
    start = time.process_time()
    sum(i & 1 for i in range(1_000_000))
    return time.process_time() - start

def measure(path):
    before, counted, start, error = peak(), counting(), time.process_time(), None
    try:
        package = open_package(path)
        package.golden(package.backend())
    except MgptqError as found:
        error = f"{type(found).__name__}: {found}"
    taken, memory = time.process_time() - start, peak() - before
    print(json.dumps([path.name, 2 * taken / (counted + counting()), memory, error]), flush=True)

for argument in sys.argv[1:]:
    child = os.fork()
    if not child:
        measure(Path(argument))
        os._exit(0)
    os.waitpid(child, 0)
"""


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


IDENTITY = key(b"general.architecture", STRING, text(b"mgptq"))


def gguf(tensors: int, *entries: bytes, keys: int | None = None) -> bytes:
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries) if keys is None else keys) + b"".join(entries)
    return data + bytes(-len(data) % 32)


def strings(path: Path) -> None:
    """As many strings as are allowed, each of wide characters, whose text Python holds in four times their bytes."""
    count = (1 << 20) - 1
    entry = text("🙂".encode() + bytes(28))
    path.write_bytes(gguf(0, IDENTITY, key(b"a", ARRAY, struct.pack("<IQ", STRING, count) + entry * count)))


def one_string(path: Path) -> None:
    path.write_bytes(gguf(0, IDENTITY, key(b"a", STRING, text("🙂".encode() + bytes((40 << 20) - 32)))))


def empty_strings(path: Path) -> None:
    count = 1 << 20
    path.write_bytes(gguf(0, IDENTITY, key(b"a", ARRAY, struct.pack("<IQ", STRING, count) + text(b"") * count)))


def many_keys(path: Path) -> None:
    keys = [key(str(i).encode(), UINT8, b"\0") for i in range(4095)]
    path.write_bytes(gguf(0, IDENTITY, *keys))


def many_tensors(path: Path) -> None:
    count = 1 << 16
    entries = [text(str(i).encode()) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(count)]
    path.write_bytes(gguf(count, IDENTITY, *entries, keys=1) + bytes(32 * count))


def sparse(start: bytes) -> Callable[[Path], None]:
    """A file of 64 GiB that takes no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            stream.write(start)
            stream.truncate(1 << 36)

    return write


def many_merges(path: Path) -> None:
    """A sound container whose tokenizer stands for as many merges as are allowed, and which lacks what comes next."""
    count = 1 << 19
    entries = [
        key(b"tokenizer.ggml.merges", ARRAY, struct.pack("<IQ", STRING, count) + text(b"\x01 \x01") * count),
        key(b"mgptq.tokenizer_json", STRING, text(b'{"model":{"vocab":0,"merges":%d}}' % count)),
    ]
    seeds = path.with_name("seeds")
    write_seeds(seeds)
    sound = (seeds / "tied.gguf").read_bytes()
    shutil.rmtree(seeds)
    added = b"".join(entries)
    added += key(b"fill", STRING, text(bytes(-(len(added) + len(key(b"fill", STRING, text(b"")))) % 32)))
    keys = struct.unpack_from("<Q", sound, 16)[0] + len(entries) + 1
    path.write_bytes(resign(sound[:16] + struct.pack("<Q", keys) + added + sound[24:]))


def huge_tensor(path: Path) -> None:
    entry = text(b"t") + struct.pack("<IQQIQ", 2, 1 << 30, 1 << 30, 0, 0)
    path.write_bytes(gguf(1, IDENTITY, entry, keys=1))


def folder(path: Path, **files: bytes) -> None:
    """A package with an ONNX folder of these files; ``_`` stands for a dot."""
    (path / "onnx").mkdir(parents=True)
    for name, content in files.items():
        (path / "onnx" / name.replace("_", ".")).write_bytes(content)
    (path / "onnx" / "genai_config.json").write_bytes(
        files.get("config", json.dumps({"model": {"vocab_size": 8, "context_length": 8, "decoder": DECODER}}).encode())
    )
    write_manifest(path, sorted(f"onnx/{file.name}" for file in (path / "onnx").iterdir()))


DECODER = {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_size": 2}


def manifest(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "manifest.json").write_bytes(content)

    return write


def onnx(model: bytes, **files: bytes) -> Callable[[Path], None]:
    return lambda path: folder(path, model_onnx=model, model_onnx_data=bytes(64), **files)


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer; the content is long."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


NODE = field(1, field(4, b"Mul") + field(3, b"n"))


def tensor(dimensions: int) -> bytes:
    """Its dimensions are as large as they can be."""
    return field(5, field(8, b"t") + field(1, varint(2**62) * dimensions) + varint(2 << 3) + varint(1))


MANY_NODES = field(7, NODE * 131_000)
MANY_FIELDS = field(7, NODE + b"\x48\x00" * (1 << 21))

BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million strings": (strings, "ContainerError: .*mgptq.format_version"),
    "a million empty strings": (empty_strings, "ContainerError: .*mgptq.format_version"),
    "one endless string": (one_string, "ContainerError: .*mgptq.format_version"),
    "many keys": (many_keys, "ContainerError: .*mgptq.format_version"),
    "many tensors": (many_tensors, "ContainerError: .*mgptq.format_version"),
    "half a million merges of a tokenizer": (many_merges, "ContainerError: .*'mgptq.tokenizer_config' is missing"),
    "sparse garbage": (sparse(b"garbage"), "ContainerError: .*starts with"),
    "sparse container": (sparse(gguf(0, IDENTITY)), "ContainerError: .*bytes follow the last tensor"),
    "a tensor larger than the world": (huge_tensor, "ContainerError: .*each dimension must be"),
    "endless keys": (sparse(gguf(0, IDENTITY, keys=4096)), "ContainerError: "),
    "manifest of empty lists": (manifest(b'{"a": [' + b"[]," * 2_796_000 + b"[]]}"), "PackageError: .*format_version"),
    "manifest with a key twice": (
        manifest(b"{" + b"".join(b'"%d":0,' % i for i in range(600_000)) + b'"599999":0}'),
        "PackageError: .*duplicate key",
    ),
    "deep manifest": (manifest(b"[" * 8_000_000), "PackageError: .*nested too deeply"),
    "model of many nodes": (onnx(MANY_NODES), "PackageError: .*fields|PackageError: .*cannot load"),
    "model of many fields": (onnx(MANY_FIELDS), "PackageError: .*fields"),
    "model of a huge tensor": (onnx(field(7, NODE + tensor(8))), "PackageError: .*its shape"),
    "model of a tensor of many dimensions": (
        onnx(field(7, NODE + tensor(800_000))),
        "PackageError: .*at most 8 are allowed",
    ),
    "configuration of a billion layers": (
        onnx(
            field(7, NODE),
            config=json.dumps(
                {"model": {"vocab_size": 8, "context_length": 8, "decoder": DECODER | {"num_hidden_layers": 10**9}}}
            ).encode(),
        ),
        "PackageError: .*layers must be an integer",
    ),
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[str, tuple[float, int, str | None]]:
    """Time in millions counted, bytes and error, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name, (write, _) in BAD_FILES.items():
        write(root / name)
    paths = [str(root / name) for name in BAD_FILES]
    done = subprocess.run([sys.executable, "-c", PROBE, *paths], capture_output=True, text=True, timeout=120)
    shutil.rmtree(root)
    return {name: tuple(cost) for name, *cost in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_costs_little(costs, bad):
    millions, memory, error = costs[bad]
    assert error and re.match(BAD_FILES[bad][1], error), error
    assert millions <= MILLIONS_COUNTED and memory <= BYTES
