"""Chat templates of strangers: rendered in a sandbox, in a process of its own with limits.

The sandbox keeps a template from reaching Python's objects; the process bounds what no sandbox can, loops
without end and strings without bounds.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from mgptq_runtime.errors import PackageError

__all__ = ["render_chat_template"]

CPU_LIMIT_SECONDS = 2
WALL_LIMIT_SECONDS = 10
MEMORY_LIMIT_BYTES = 1 << 29
OUTPUT_LIMIT_BYTES = 1 << 22
WAY_OUT = "generate without --chat"


def render_chat_template(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
    """Render a template for messages, with the prompt for the model's answer at the end.

    Args:
        template: Jinja source.
        messages: each with ``role`` and ``content``.
        tokens: further variables, such as ``bos_token``.

    Raises:
        PackageError: the template is broken, refuses the messages, or takes more than 2 seconds of CPU
            time, 512 MiB of memory or 4 MiB of output.
    """
    request = json.dumps({"template": template, "messages": list(messages), "tokens": dict(tokens)})
    command = [sys.executable, "-P", "-m", "mgptq_runtime.chat_template"]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=WALL_LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"the chat template takes more than {WALL_LIMIT_SECONDS} seconds; {WAY_OUT}") from error
    if done.returncode < 0:
        raise PackageError(f"the chat template exceeds its limits (stopped by signal {-done.returncode}); {WAY_OUT}")
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise PackageError(f"the chat template cannot be rendered: {reason[-1][:500]}; {WAY_OUT}")
    return done.stdout.decode()


def _render(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


def _limited_main() -> None:
    """Render the request on standard input to standard output, under limits."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_SECONDS, CPU_LIMIT_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    request = json.load(sys.stdin.buffer)
    text = _render(request["template"], request["messages"], request["tokens"]).encode()
    if len(text) > OUTPUT_LIMIT_BYTES:
        sys.exit(f"its output has {len(text)} bytes, at most {OUTPUT_LIMIT_BYTES} are allowed")
    sys.stdout.buffer.write(text)


if __name__ == "__main__":
    _limited_main()
