"""Coverage-guided fuzzing of the container reader: `make fuzz`.

Starts from small sound containers and lets libFuzzer, through atheris, change their bytes. A changed file is signed
again before it is read, where its syntax still allows it: else its hash, which covers every byte, would end each run
before the rules behind it are reached. Whatever is no typed error, or takes long, is a finding; libFuzzer stops at the
first, writes the input beside the corpus and exits with a code other than 0.

Run: python tools/fuzz_container.py [--seconds 600] [--corpus build/fuzz]
"""

import argparse
import sys
import tempfile
from pathlib import Path

__all__ = ["fuzz_one", "main", "resign", "write_seeds"]

TESTS = Path(__file__).parent.parent / "tests"
NAME = Path("fuzzed.gguf")
LONGEST_BYTES = 1 << 15
SLOWEST_SECONDS, MEMORY_MB = 5, 2048


def resign(data: bytes) -> bytes:
    """The bytes with the content hash that they should have; as they are where there is no place for it."""
    from mgptq_runtime.container import ARCHITECTURE, content_sha256, signature_offset
    from mgptq_runtime.errors import ContainerError
    from mgptq_runtime.gguf_file import parse_gguf

    try:
        offset = signature_offset(parse_gguf(NAME, data, ARCHITECTURE))
    except ContainerError:
        return data
    digest = content_sha256(data, offset).encode()
    return data[:offset] + digest + data[offset + len(digest) :]


def fuzz_one(data: bytes) -> None:
    """Read one input as a container; where it is sound, compute what it must compute.

    Raises:
        Exception: a finding, whatever is no :class:`mgptq_runtime.errors.MgptqError`.
    """
    from mgptq_runtime.backends.numpy_backend import NumpyBackend
    from mgptq_runtime.check import Bounds, check_backend
    from mgptq_runtime.container import parse_container
    from mgptq_runtime.errors import MgptqError

    try:
        container = parse_container(NAME, resign(data))
        check_backend(NumpyBackend(container.model), container.golden, Bounds()).to_json()
    except MgptqError:
        return


def write_seeds(folder: Path) -> None:
    """Small sound containers of the shapes that a container can take: `*.gguf` in ``folder``, and nothing else."""
    sys.path[:0] = [str(TESTS), str(TESTS / "runtime")]
    from golden_package import make_container, make_golden, make_tokenizer_folder
    from synthetic import random_llama

    tiny = {"layers": 1, "hidden": 8, "intermediate": 8, "heads": 1, "kv_heads": 1}
    shapes = {
        "tied": {"vocabulary": 8},
        "untied": {"vocabulary": 8, "tied": False},
        "text": {"vocabulary": 300},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        tokenizer = make_tokenizer_folder(scratch / "tokenizer", vocabulary=260)
        for name, shape in shapes.items():
            model = random_llama(**tiny, **shape)
            golden = make_golden(model, prompts=1, length=2, k=2)
            container = make_container(
                scratch, model, golden=golden, tokenizer_folder=tokenizer if name == "text" else None
            )
            (folder / f"{name}.gguf").write_bytes(container.read_bytes())


def main() -> None:
    """Run the fuzzer; exits with 0 when nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="how long; default 600")
    parser.add_argument(
        "--corpus", type=Path, default=Path("build/fuzz"), help="inputs are kept here; default build/fuzz"
    )
    options = parser.parse_args()

    import atheris

    with atheris.instrument_imports(include=["mgptq_runtime"]):
        import mgptq_runtime.backends.numpy_backend
        import mgptq_runtime.check
        import mgptq_runtime.container  # noqa: F401
    corpus = options.corpus / "corpus"
    write_seeds(corpus)
    limits = [
        f"-max_total_time={options.seconds}",
        f"-max_len={LONGEST_BYTES}",
        f"-timeout={SLOWEST_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={options.corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], fuzz_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
