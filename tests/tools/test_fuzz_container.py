"""The fuzzer reaches the rules behind the content hash, and takes whatever is no typed error for a finding."""

from pathlib import Path

import fuzz_container
import pytest
from fuzz_container import fuzz_one, resign, write_seeds

from mgptq_runtime import container
from mgptq_runtime.errors import ContainerError


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["text.gguf", "tied.gguf", "untied.gguf"]
    return (folder / "tied.gguf").read_bytes()


def test_a_signed_input_passes_its_hash(seed: bytes) -> None:
    changed = bytearray(seed)
    changed[seed.index(b"tiny")] ^= 1
    with pytest.raises(ContainerError, match="damaged or changed"):
        container.parse_container(Path("x"), bytes(changed))
    assert container.parse_container(Path("x"), resign(bytes(changed))).name == "uiny"
    assert resign(b"no container") == b"no container"
    assert resign(seed) == seed


def test_typed_errors_are_no_findings(seed: bytes) -> None:
    for data in (seed, b"", seed[:-1], b"GGUF"):
        fuzz_one(data)


def test_other_errors_are_findings(seed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, data: bytes) -> None:
        raise IndexError

    monkeypatch.setattr(container, "parse_container", broken)
    with pytest.raises(IndexError):
        fuzz_container.fuzz_one(seed)
