"""The command ``mgptq-run``. Thin shells over importable functions."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mgptq_runtime.errors import MgptqError
from mgptq_runtime.messages import error_line, error_message, printable, replace_unprintable_output
from mgptq_runtime.signals import exit_on_signals

if TYPE_CHECKING:
    from mgptq_runtime.check import CheckResult
    from mgptq_runtime.package import Package, Way
    from mgptq_runtime.tokenizer import TextTokenizer

__all__ = ["cli", "main"]


def _fail(ctx: click.Context, line: str) -> NoReturn:
    click.echo(line, err=True)
    ctx.exit(1)


class ErrorReportingGroup(click.Group):
    """Turns the typed errors into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MgptqError as error:
            _fail(ctx, error_line(error))
        except MemoryError as error:
            _fail(
                ctx,
                f"error: this machine has too little memory for that ({error_message(error) or 'no details'}); "
                "free some, use a shorter text, or run a smaller model",
            )
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _fail(ctx, error_line(error))


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mgptq-runtime")
def cli() -> None:
    """Run and verify a quantized model: PACKAGE is an exported folder, or one .gguf container."""


def _with_package(command: Callable[..., None]) -> Callable[..., None]:
    return click.argument("package", type=click.Path(path_type=Path))(command)


def _with_backend(command: Callable[..., None]) -> Callable[..., None]:
    return _backend_options(command, "4")


def _with_backends(command: Callable[..., None]) -> Callable[..., None]:
    """As :func:`_with_backend`, of a command that takes all where none is given."""
    return _backend_options(command, None)


def _backend_options(command: Callable[..., None], level: str | None) -> Callable[..., None]:
    options = (
        click.option(
            "--backend",
            type=click.Choice(["numpy", "onnx"]),
            help=f"Default: {'onnx where the package has it, else numpy' if level else 'all that the package has'}.",
        ),
        click.option(
            "--accuracy-level",
            type=click.Choice(["0", "4"]),
            default=level,
            show_default=level is not None,
            callback=lambda ctx, parameter, value: None if value is None else int(value),
            help="ONNX only: 4 computes b1 and b2 weights with int8 activations (fast), 0 all with float32 (exact)."
            + ("" if level else " Default: both."),
        ),
        click.option("--threads", type=click.IntRange(1, 256), help="Default: all cores."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _with_json(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def _with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The option of commands that show progress; it goes next to the function."""

    @click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but warnings and errors.")
    @wraps(command)
    def quietly(*arguments: Any, quiet: bool, **options: Any) -> None:
        if quiet:
            from mgptq_runtime import progress

            click.get_current_context().with_resource(progress.quiet())
        command(*arguments, **options)

    return quietly


def _limit_threads(threads: int | None) -> None:
    """NumPy's BLAS reads its thread count when it loads, so this comes before the first import of NumPy."""
    if threads is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)


def _open(path: Path) -> "Package":
    from mgptq_runtime.package import open_package

    return open_package(path)


def _print_json(values: dict[str, Any]) -> None:
    click.echo(json.dumps(values, allow_nan=False))


def _check_one(package: "Package", way: "Way", threads: int | None) -> "CheckResult":
    from mgptq_runtime.check import check_backend
    from mgptq_runtime.progress import track

    backend = package.backend(way.backend, accuracy_level=way.accuracy_level, threads=threads)
    golden = package.golden(backend)
    with track(f"check on {way.name}", len(golden.token_ids)) as advance:
        return check_backend(backend, golden, package.bounds(way.backend, way.accuracy_level), advance)


def _print_check(result: "CheckResult") -> None:
    level = "" if result.accuracy_level is None else f", accuracy level {result.accuracy_level}"
    verdict = "PASSED" if result.passed else "FAILED"
    click.echo(f"{verdict}  {result.backend}{level}: {result.positions} positions compared")
    click.echo(f"  largest difference of logits  {result.max_abs_difference:.3g}")
    click.echo(f"  same most likely token        {result.top1_agreement:.2%} ({result.top1_ties} ties besides)")
    click.echo(f"  KL divergence                 {result.kl_divergence:.3g} nats")
    if result.hidden_relative_difference is not None:
        click.echo(
            f"  largest difference of layers  {result.hidden_relative_difference:.3g} relative, "
            f"after layer {result.hidden_layer}"
        )
    for failure in result.failures:
        click.echo(f"  {failure}")


@cli.command()
@_with_package
@_with_backends
@_with_json
@_with_quiet
def check(package: Path, backend: str | None, accuracy_level: int | None, threads: int | None, as_json: bool) -> None:
    """Replay the golden vectors on every backend that the package has, on ONNX at both levels. Exit code 1: failed."""
    _limit_threads(threads)
    opened = _open(package)
    results = [_check_one(opened, way, threads) for way in opened.ways(backend, accuracy_level)]
    passed = all(result.passed for result in results)
    worst = max(results, key=lambda result: (not result.passed, result.kl_divergence))
    if as_json:
        _print_json(worst.to_json() | {"passed": passed, "backends": [result.to_json() for result in results]})
    else:
        for result in results:
            _print_check(result)
    if not passed:
        sys.exit(1)


@cli.command()
@_with_package
@_with_backend
@_with_json
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message, through the chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="To add, at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Draw among the k most likely; 0 for all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw within this probability.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of drawing, where the temperature is above 0.",
)
def generate(
    package: Path,
    backend: str | None,
    accuracy_level: int,
    threads: int | None,
    as_json: bool,
    prompt: str,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    """Continue a text; streams to stdout."""
    _limit_threads(threads)
    from mgptq_runtime.generate import Sampling, generate_tokens, stop_reason

    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = _open(package)
    loaded = opened.backend(backend, accuracy_level=accuracy_level, threads=threads)
    tokenizer = opened.tokenizer(loaded)
    if chat:
        ids, before = tokenizer.encode_chat([{"role": "user", "content": prompt}]), []
    else:
        ids = before = tokenizer.encode(prompt, special_tokens=True)
    tokens = generate_tokens(
        loaded, ids, max_tokens=max_tokens, eos_token_ids=tokenizer.eos_token_ids, sampling=sampling
    )
    generated = list(tokens) if as_json else _streamed(tokens, tokenizer, before)
    reason = stop_reason(len(ids), len(generated), max_tokens=max_tokens, context_length=loaded.context_length)
    if as_json:
        _print_json(
            {
                "text": tokenizer.decode_after(before, generated),
                "tokens": generated,
                "prompt_tokens": len(ids),
                "stop_reason": reason,
                "backend": loaded.name,
            }
        )
    if reason == "context_full":
        click.echo(f"the context of {loaded.context_length} tokens is full", err=True)


def _streamed(tokens: Iterable[int], tokenizer: "TextTokenizer", before: Sequence[int]) -> list[int]:
    """Print the text of tokens as they arrive, behind those before them; all of them."""
    generated = []
    on_terminal = sys.stdout is not None and sys.stdout.isatty()

    def kept() -> Iterator[int]:
        for token in tokens:
            generated.append(token)
            yield token

    for piece in tokenizer.decode_stream(kept(), before):
        click.echo(printable(piece) if on_terminal else piece, nl=False)
    click.echo()
    return generated


@cli.command()
@_with_package
@_with_backend
@_with_json
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A .txt, or .jsonl with a field 'text'.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window, even.")
@click.option(
    "--windows", type=click.IntRange(1), default=30, show_default=True, help="How many windows, from the start."
)
@_with_quiet
def perplexity(
    package: Path,
    backend: str | None,
    accuracy_level: int,
    threads: int | None,
    as_json: bool,
    text: Path,
    window: int,
    windows: int,
) -> None:
    """Score the second half of each window of a text, given the first half."""
    _limit_threads(threads)
    from mgptq_runtime.perplexity import measure_perplexity, read_text
    from mgptq_runtime.progress import track

    content = read_text(text)
    opened = _open(package)
    loaded = opened.backend(backend, accuracy_level=accuracy_level, threads=threads)
    ids = opened.tokenizer(loaded).encode_start(content, window * windows)
    with track("perplexity", max(1, min(windows, len(ids) // window))) as advance:
        result = measure_perplexity(loaded, ids, window=window, windows=windows, advance=advance)
    if as_json:
        _print_json(result.to_json())
    else:
        click.echo(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens ({result.backend})")


@cli.command()
@_with_package
@_with_backend
@_with_json
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of the prompt.")
@click.option(
    "--decode-tokens", type=click.IntRange(1), default=32, show_default=True, help="How many are decoded after it."
)
@_with_quiet
def bench(
    package: Path,
    backend: str | None,
    accuracy_level: int,
    threads: int | None,
    as_json: bool,
    prompt_tokens: int,
    decode_tokens: int,
) -> None:
    """Measure loading, speed and memory on this machine."""
    _limit_threads(threads)
    from mgptq_runtime.bench import measure_speed
    from mgptq_runtime.progress import track

    with track("bench", decode_tokens) as advance:
        result = measure_speed(
            lambda: _open(package).backend(backend, accuracy_level=accuracy_level, threads=threads),
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            threads=threads,
            advance=advance,
        )
    if as_json:
        _print_json(result.to_json())
        return
    click.echo(f"backend  {result.backend}")
    click.echo(f"load     {result.load_seconds:.2f} s")
    click.echo(f"prefill  {result.prefill_tokens_per_second:.1f} tokens/s ({result.prompt_tokens} tokens)")
    click.echo(f"decode   {result.decode_tokens_per_second:.1f} tokens/s ({result.decode_tokens} tokens)")
    click.echo(f"memory   {result.peak_rss_bytes / 1e6:.0f} MB at most")


@cli.command()
@_with_package
@_with_json
def info(package: Path, as_json: bool) -> None:
    """Say what a package holds."""
    from mgptq_runtime.info import describe

    facts = describe(_open(package))
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        if key == "files":
            for entry in value:
                click.echo(f"{entry['bytes']:>14,} bytes  {printable(entry['path'])}")
        else:
            click.echo(f"{key}: {printable(value) if isinstance(value, str) else json.dumps(value)}")


def main() -> None:
    """The entry point: exit code 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    exit_on_signals()
    replace_unprintable_output()
    cli(prog_name="mgptq-run")
