"""Chat templates of strangers: rendered in a sandbox, in a process of its own with limits.

The sandbox keeps a template from reaching Python's objects. The process bounds what no sandbox can, loops without end
and strings without bounds: its time by a watchdog that runs beside Python's interpreter, on every system; its memory
by the kernel on Linux, and elsewhere, where a process cannot ask for that, by looking at it every few milliseconds.
"""

import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from mgptq_runtime.errors import PackageError
from mgptq_runtime.messages import printable

__all__ = ["render_chat_template"]

RENDER_SECONDS = 1
PROCESS_SECONDS = 10  # with Python's start, on a slow device or a busy machine
MEMORY_LIMIT_MIB = 192
OUTPUT_LIMIT_BYTES = 1 << 22
REASON_CHARACTERS = 500
KERNEL_LIMITS_MEMORY = sys.platform == "linux"
WATCH_SECONDS = 0.005
TIMED_OUT = "Timeout ("  # the first words of the watchdog's line
OUT_OF_MEMORY = "MemoryError"
WAY_OUT = "generate without --chat"


def render_chat_template(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
    """Render a template for messages, with the prompt for the model's answer at the end.

    Args:
        template: Jinja source.
        messages: each with ``role`` and ``content``.
        tokens: further variables, such as ``bos_token``.

    Raises:
        PackageError: the template is broken, refuses the messages, or takes more than 1 second, 192 MiB of memory or
            4 MiB of output.
    """
    request = {"template": template, "messages": list(messages), "tokens": dict(tokens)}
    code, output, errors = _run(json.dumps(request | {"limit_memory": KERNEL_LIMITS_MEMORY}).encode())
    if code == 0:
        return output.decode()
    lines = errors.decode(errors="replace").splitlines() or [f"its process ended with {code}"]
    # Both where the process had no memory left and took its time to end.
    if any(line.startswith(OUT_OF_MEMORY) for line in lines):
        raise _too_large()
    if any(line.startswith(TIMED_OUT) for line in lines):
        raise PackageError(f"the chat template takes more than {RENDER_SECONDS} second; {WAY_OUT}")
    raise PackageError(f"the chat template cannot be rendered: {printable(lines[-1][:REASON_CHARACTERS])}; {WAY_OUT}")


def _run(request: bytes) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a process that renders."""
    command = [sys.executable, "-P", "-m", "mgptq_runtime.chat_template"]
    deadline = time.monotonic() + PROCESS_SECONDS
    with tempfile.TemporaryFile() as file:  # not a pipe: communicate() forgets its input when it is called again
        file.write(request)
        file.seek(0)
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            while time.monotonic() < deadline:
                try:
                    output, errors = process.communicate(
                        timeout=PROCESS_SECONDS if KERNEL_LIMITS_MEMORY else WATCH_SECONDS
                    )
                    return process.returncode, output, errors
                except subprocess.TimeoutExpired:
                    if not KERNEL_LIMITS_MEMORY and _resident_bytes(process.pid) > MEMORY_LIMIT_MIB << 20:
                        raise _too_large() from None
        finally:
            process.kill()
    raise PackageError(f"the chat template's process takes more than {PROCESS_SECONDS} seconds; {WAY_OUT}")


def _too_large() -> PackageError:
    return PackageError(f"the chat template takes more than {MEMORY_LIMIT_MIB} MiB of memory; {WAY_OUT}")


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:  # it has ended
        return 0


def _render(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}`` marks, for training, what the model writes."""

        tags = {"generation"}  # noqa: RUF012  the base class declares it for instances

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    # No tools is not the same as tools that are not defined.
    return environment.from_string(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
    )


def _limit_memory() -> None:
    import resource

    limit = MEMORY_LIMIT_MIB << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _limited_main() -> None:
    """Render the request on standard input to standard output, under limits."""
    import jinja2.sandbox  # noqa: F401  what is imported now takes none of the template's time

    request = json.load(sys.stdin.buffer)
    if request["limit_memory"]:
        _limit_memory()
    faulthandler.dump_traceback_later(RENDER_SECONDS, exit=True)
    try:
        text = _render(request["template"], request["messages"], request["tokens"]).encode()
    except Exception as error:  # a template raises what it likes
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " ")[:REASON_CHARACTERS])
    if len(text) > OUTPUT_LIMIT_BYTES:
        sys.exit(f"its output has {len(text)} bytes, at most {OUTPUT_LIMIT_BYTES} are allowed")
    sys.stdout.buffer.write(text)


if __name__ == "__main__":
    _limited_main()
