"""Chat templates of strangers: what they may do, and that nothing else gets through."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mgptq_runtime import chat_template
from mgptq_runtime.chat_template import render_chat_template
from mgptq_runtime.errors import PackageError

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LARGE = "{{ 'x' * 10**10 }}"
SECONDS = 2.0
MEBIBYTES = 300


def test_a_template_sees_what_hugging_face_templates_use() -> None:
    template = "{{ messages | tojson }} {%- for m in messages %}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    assert json.loads(render_chat_template(template, MESSAGES, {})) == MESSAGES


def test_no_tools_and_documents_are_none() -> None:
    template = "{% if tools is not none or documents is not none %}tools{% endif %}{{ messages[0].content }}"
    assert render_chat_template(template, MESSAGES, {}) == "Hi"


def test_what_a_template_marks_for_training_is_text() -> None:
    template = "{% for m in messages %}a{% generation %}{{ m.content }}{% endgeneration %}b{% endfor %}"
    assert render_chat_template(template, MESSAGES, {}) == "aHib"


def test_json_is_written_as_a_template_asks() -> None:
    template = "{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"
    assert render_chat_template(template, MESSAGES, {}) == '"é""\\u00e9"{"a": 2, "b": 1}'


def test_a_template_that_reads_the_clock_and_special_tokens_renders() -> None:
    text = render_chat_template("{{ bos_token }}{{ strftime_now('%Y') }}é", MESSAGES, {"bos_token": "<s>"})
    assert text == f"<s>{time.strftime('%Y')}é"


def test_a_template_longer_than_a_pipe_renders() -> None:
    template = "{# " + "x" * 300_000 + " #}{{ messages[0].content }}"
    assert render_chat_template(template, MESSAGES, {}) == "Hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + " }}", "TemplateSyntaxError|RecursionError"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "9000000 bytes, at most 4194304"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        (LARGE, "192 MiB of memory"),
        (GROWING, "192 MiB of memory"),
        ("{{ '%0999999999d' | format(1) }}", "192 MiB of memory"),
        ("{{ '{:999999999}'.format(1) }}", "192 MiB of memory"),
        ("{{ messages | tojson(indent=1000000000) }}", "192 MiB of memory"),
        ("{{ raise_exception('x' * 100000000) }}", "192 MiB of memory|cannot be rendered: TemplateError: x{400}"),
        (LOOP, "more than 1 second"),
        ("{{ 7 ** (10 ** 9) }}", "more than 1 second"),
    ],
)
def test_a_hostile_template_is_a_typed_error(template: str, message: str) -> None:
    with pytest.raises(PackageError, match=rf"the chat template .*({message}).*; generate without --chat"):
        render_chat_template(template, MESSAGES, {})


def test_a_refusal_cannot_steer_the_terminal() -> None:
    with pytest.raises(PackageError) as caught:
        render_chat_template("{{ raise_exception('\x1b]0;title\x07\x1b[2J' ~ '\n' ~ 'é') }}", MESSAGES, {})
    assert str(caught.value).isprintable() and "é" in str(caught.value)


@pytest.mark.parametrize("template", [LOOP, LARGE, GROWING])
def test_time_and_memory_stay_within_limits(template: str) -> None:
    """In a process of its own, whose children have no other peak of memory."""
    script = (
        "import resource, sys, time\n"
        "from mgptq_runtime.chat_template import render_chat_template\n"
        "from mgptq_runtime.errors import PackageError\n"
        "start = time.monotonic()\n"
        "try:\n    render_chat_template(sys.argv[1], [], {})\n"
        "except PackageError:\n"
        "    print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, template], capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, done.stdout.split())
    assert seconds < SECONDS
    assert mebibytes < MEBIBYTES


def test_templates_are_bounded_from_threads_too() -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda template: _outcome(template), [LOOP, "{{ messages[0].content }}", LARGE]))
    assert "1 second" in outcomes[0] and outcomes[1] == "Hi" and "memory" in outcomes[2]


def _outcome(template: str) -> str:
    try:
        return render_chat_template(template, MESSAGES, {})
    except PackageError as error:
        return str(error)


def test_memory_is_watched_where_the_kernel_does_not_bound_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "KERNEL_LIMITS_MEMORY", False)
    assert render_chat_template("{{ messages[0].content }}", MESSAGES, {}) == "Hi"
    for template in (LARGE, GROWING):
        with pytest.raises(PackageError, match="192 MiB of memory"):
            render_chat_template(template, MESSAGES, {})


def test_a_process_that_never_starts_rendering_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "PROCESS_SECONDS", 0.01)
    with pytest.raises(PackageError, match=r"process takes more than 0\.01 seconds"):
        render_chat_template("{{ 1 }}", MESSAGES, {})
