"""One runtime decoding with one model file, measured; bench_decode.py runs it in a fresh process each time.

    python tools/decode_contender.py KIND PATH --threads 1

Prints a JSON object: load seconds, prefill and decode in tokens per second, CPU seconds per decoded token, and the most
memory beyond that of the interpreter and its imports, in bytes. Needs Linux.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import click
import numpy as np

__all__ = ["KINDS"]

CONTEXT = 512


class Decoder(Protocol):
    """A loaded model: ``start`` empties its cache and feeds a prompt, ``step`` decodes one token; greedily, both."""

    def start(self, prompt: np.ndarray) -> int: ...

    def step(self, token: int) -> int: ...


class Mgptq:
    """Our runtime, as ``mgptq-run generate`` uses it."""

    def __init__(self, path: Path, threads: int) -> None:
        from mgptq_runtime.package import open_package

        self.backend = open_package(path).backend("onnx", threads=threads)

    def start(self, prompt: np.ndarray) -> int:
        self.cache = self.backend.new_cache()
        return self._append(prompt)

    def step(self, token: int) -> int:
        return self._append(np.array([token]))

    def _append(self, tokens: np.ndarray) -> int:
        return int(self.backend.forward(tokens[None], self.cache, first_logit=-1)[0, -1].argmax())


class Genai:
    """onnxruntime-genai, its threads set by an overlay of the package's configuration."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.library, self.model = og, og.Model(config)

    def start(self, prompt: np.ndarray) -> int:
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self.generator = self.library.Generator(self.model, parameters)
        self.generator.append_tokens(prompt[None].astype(np.int32))
        return -1

    def step(self, token: int) -> int:
        # The generator takes the token that it chose itself.
        self.generator.generate_next_token()
        return token


class LlamaCpp:
    """llama.cpp with its defaults for everything but the size of the context."""

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import LlamaContext, LlamaModel

        with ExitStack() as stack:
            self.model = stack.enter_context(LlamaModel(path))
            self.context = stack.enter_context(LlamaContext(self.model, CONTEXT, threads))
            self.open = stack.pop_all()

    def start(self, prompt: np.ndarray) -> int:
        self.context.clear()
        return self._append(prompt)

    def step(self, token: int) -> int:
        return self._append(np.array([token]))

    def _append(self, tokens: np.ndarray) -> int:
        return int(self.context.append(tokens).argmax())


def _import_genai() -> None:
    import onnxruntime_genai  # noqa: F401


def _import_runtime() -> None:
    import mgptq_runtime.backends.onnx_backend
    import mgptq_runtime.package  # noqa: F401


def _import_llama_cpp() -> None:
    from llama_cpp import library

    library()


KINDS: dict[str, tuple[Callable[[], None], Callable[[Path, int], Decoder]]] = {
    "mgptq": (_import_runtime, Mgptq),
    "genai": (_import_genai, Genai),
    "llama.cpp": (_import_llama_cpp, LlamaCpp),
}


def resident_bytes(field: str) -> int:
    """``VmRSS``, what the process holds now, or ``VmHWM``, the most that it held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def measure(kind: str, path: Path, threads: int, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """All figures of one run; the prompt is fed once before it is timed."""
    imports, load = KINDS[kind]
    imports()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    decoder = load(path, threads)
    load_seconds = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(1000, 20000, prompt_tokens)
    decoder.step(decoder.start(prompt))
    start = time.perf_counter()
    token = decoder.start(prompt)
    prefill_seconds = time.perf_counter() - start
    token = decoder.step(token)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(decode_tokens):
        token = decoder.step(token)
    decode_seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": prompt_tokens / prefill_seconds,
        "decode_tokens_per_second": decode_tokens / decode_seconds,
        "cpu_seconds_per_token": cpu_seconds / decode_tokens,
        "memory_bytes": resident_bytes("VmHWM") - before,
    }


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1, CONTEXT // 2), default=128, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(1, CONTEXT // 2 - 2), default=64, show_default=True)
def main(kind: str, path: Path, threads: int, prompt_tokens: int, decode_tokens: int) -> None:
    """Measure one contender."""
    print(json.dumps(measure(kind, path, threads, prompt_tokens, decode_tokens)))


if __name__ == "__main__":
    main()
