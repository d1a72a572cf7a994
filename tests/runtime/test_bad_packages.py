"""From the command line: one message and exit code 1, whatever is wrong with a package."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from golden_package import TEXT, make_container, make_golden, make_tokenizer_folder, write_manifest
from synthetic import random_llama

from mgptq_runtime.cli import cli
from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.golden import parse_golden, write_golden
from mgptq_runtime.package import open_package
from mgptq_runtime.tokenizer import TextTokenizer, TokenizerData

CONTAINER = "model.mgptq.gguf"
COMMANDS = {
    "info": [],
    "check": [],
    "generate": ["--prompt", "The quick", "--max-tokens", "2"],
    "perplexity": ["--window", "8", "--windows", "1"],
    "bench": ["--prompt-tokens", "2", "--decode-tokens", "1"],
}
TINY = {"layers": 1, "hidden": 32, "intermediate": 32, "heads": 1, "kv_heads": 1, "vocabulary": 420}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    """The files of a sound package, by path."""
    folder = tmp_path_factory.mktemp("sound")
    tokenizer = make_tokenizer_folder(folder / "tokenizer")
    make_container(folder, random_llama(**TINY), tokenizer_folder=tokenizer)
    write_manifest(folder, [CONTAINER])
    return {name: (folder / name).read_bytes() for name in (CONTAINER, "manifest.json")}


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(command: str, package: Path, *options: str) -> Result:
    text = ["--text", str(package / "text.txt")] if command == "perplexity" else []
    return CliRunner().invoke(cli, [command, str(package), *COMMANDS[command], *text, *options])


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def list_file(folder: Path, **values: object) -> None:
    change_manifest(folder, files=[json.loads((folder / "manifest.json").read_text())["files"][0] | values])


def cut_container(folder: Path) -> None:
    data = (folder / CONTAINER).read_bytes()
    (folder / CONTAINER).write_bytes(data[: len(data) // 2])
    write_manifest(folder, [CONTAINER])


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / CONTAINER).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / CONTAINER).write_bytes(data)
    write_manifest(folder, [CONTAINER])


def link_container(folder: Path) -> None:
    (folder / CONTAINER).rename(folder / "elsewhere")
    (folder / CONTAINER).symlink_to(folder / "elsewhere")


BAD_PACKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json; give"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "cannot be read"),
    "linked manifest": (
        lambda folder: (
            (folder / "manifest.json").rename(folder / "m"),
            (folder / "manifest.json").symlink_to(folder / "m"),
        ),
        "is a link",
    ),
    "huge manifest": (
        lambda folder: (folder / "manifest.json").write_bytes(b" " * (1 << 23) + b"{}"),
        "at most 8388608 are allowed",
    ),
    "terminal codes": (lambda folder: list_file(folder, path="\x1b]0;x\x07/../x"), r"\\x1b]0;x\\x07"),
    "endless path": (lambda folder: list_file(folder, path="../" + "x" * 1_000_000), "must be relative"),
    "infinite bound": (
        lambda folder: (folder / "manifest.json").write_text(
            '{"format_version": 1, "name": "x", "files": [], "check": {"bounds": {"numpy": {"kl_divergence": 1e999}}}}'
        ),
        "beyond float64",
    ),
    "bound beyond floats": (
        lambda folder: change_manifest(folder, check={"bounds": {"numpy": {"top1_agreement": 10**400}}}),
        "check bound 'top1_agreement' is 1000",
    ),
    "half a character": (lambda folder: change_manifest(folder, name="\ud800"), "half a surrogate pair"),
    "size of another file": (lambda folder: list_file(folder, bytes=10**30), "bytes, the manifest says"),
    "cut container": (cut_container, "it is cut or corrupt"),
    "flipped weight": (flip_weight, "the file was damaged or changed: copy or export it again"),
    "linked container": (link_container, "a package holds its files themselves"),
    "missing container": (lambda folder: (folder / CONTAINER).unlink(), "is missing; copy or export"),
    "container that is a folder": (
        lambda folder: ((folder / CONTAINER).unlink(), (folder / CONTAINER).mkdir()),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("bad", BAD_PACKAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_package_is_one_message_and_exit_code_1(folder, command, bad):
    break_it, message = BAD_PACKAGES[bad]
    break_it(folder)
    result = run(command, folder, "--json")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exc_info
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert len(result.stderr) < 5000 and "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03" + bytes(60), b"\x7fELF" * 100, None],
    ids=["empty", "magic", "zeros", "program", "pipe"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_container_alone_is_one_message_and_exit_code_1(tmp_path, command, content):
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "bad.gguf"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    text = ["--text", str(tmp_path / "text.txt")] if command == "perplexity" else []
    result = CliRunner().invoke(cli, [command, str(path), *COMMANDS[command], *text, "--json"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exc_info
    assert result.stdout == "" and result.stderr.startswith(f"error: {path}")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_sound_package_passes(folder, command):
    assert run(command, folder).exit_code == 0


def test_too_little_memory_is_one_message(folder, monkeypatch):
    from mgptq_runtime.backends.numpy_backend import NumpyBackend

    def forward(*arguments, **options):
        raise MemoryError("Unable to allocate 64.0 GiB")

    monkeypatch.setattr(NumpyBackend, "forward", forward)
    result = run("generate", folder)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this machine has too little memory for that (Unable to allocate 64.0 GiB)")


def test_a_name_cannot_command_the_terminal(folder):
    change_manifest(folder, name="\x1b[2Jname\x9b5n")
    result = run("info", folder)
    assert r"\x1b[2Jname\x9b5n" in result.stdout and "\x1b" not in result.stdout and "\x9b" not in result.stdout


def test_a_container_swapped_after_it_was_hashed_is_not_used(folder, monkeypatch):
    from mgptq_runtime import package

    parse = package.parse_container
    expected = open_package(folder).container.sha256

    def swap_and_parse(path, content):
        (folder / "other").write_bytes(b"another file")
        (folder / "other").rename(path)
        return parse(path, content)

    monkeypatch.setattr(package, "parse_container", swap_and_parse)
    assert open_package(folder).container.sha256 == expected


def make_zip(golden: bytes, **changes: bytes | None) -> bytes:
    """Golden vectors with members replaced, or left out where None."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(golden)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = changes.get(entry.filename.removesuffix(".npy"), old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return buffer.getvalue()


def npy(header: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode()


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    write_golden(path, make_golden(random_llama(**TINY), prompts=1, length=2, k=2))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "golden vectors"),
        (b"", "golden vectors"),
        (npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }\n"), "in 0 bytes"),
        (npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }\n"), "golden vectors"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + bytes(8), "golden vectors"),
        (npy("{'descr': '<i4', 'fortran_order': True, 'shape': (1,), }\n") + bytes(4), "golden vectors"),
        (npy("(" * 9000), "golden vectors"),
        (
            npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }\n", b"\x03\x00") + bytes(4),
            "it must be that of",
        ),
    ],
)
def test_golden_vectors_that_are_none_are_refused(golden, content, message):
    with pytest.raises(PackageError, match=message):
        parse_golden(make_zip(golden, token_ids=content), Path("golden.npz"))


def test_golden_vectors_that_expand_are_refused(golden):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("token_ids.npy", bytes(1 << 20))
    with pytest.raises(PackageError, match="is compressed"):
        parse_golden(buffer.getvalue(), Path("golden.npz"))


@pytest.mark.filterwarnings("ignore")
def test_golden_vectors_cut_or_changed_anywhere_are_a_package_error_or_arrays(golden):
    rng = np.random.default_rng(0)
    accepted = 0
    for position in range(len(golden)):
        changed = bytearray(golden)
        changed[position] ^= int(rng.integers(1, 256))
        for data in (golden[:position], bytes(changed)):
            try:
                parse_golden(data, Path("golden.npz"))
                accepted += 1
            except PackageError:
                continue
    assert accepted < len(golden) / 2


def tokenizer_with(folder: Path, **parts: object) -> TextTokenizer:
    values = json.loads((make_tokenizer_folder(folder / "tokenizer") / "tokenizer.json").read_text())
    return TextTokenizer(TokenizerData(json.dumps(values | parts), {}, {}, None), 512)


def replacing(content: str, times: int) -> dict:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times, "decoders": [step] * times}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_of_any_length_is_refused(tmp_path, part):
    message = f"the tokenizer cannot be used: its {part} can make a text 1000000000 times as long"
    with pytest.raises(PackageError, match=message):
        tokenizer_with(tmp_path, **{part: replacing("a" * 10, 100)})


def test_a_tokenizer_that_lengthens_texts_a_little_is_used(tmp_path):
    assert tokenizer_with(tmp_path, normalizer=replacing("▁", 2)).encode("b") == tokenizer_with(
        tmp_path / "plain"
    ).encode("b")


def test_a_pattern_without_end_gives_up(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = tokenizer_with(tmp_path, pre_tokenizer=split)
    with pytest.raises(BadInputError, match=r"the tokenizer cannot read the text: .*retry-limit"):
        tokenizer.encode("x" * 60)
