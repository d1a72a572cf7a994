"""The ``Modelfile`` with which Ollama takes a GGUF file in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgptq_runtime.chat_template import render_chat_template
from mgptq_runtime.errors import PackageError

__all__ = ["modelfile"]

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]


@dataclass(frozen=True)
class ChatFormat:
    """How a family of models writes a conversation.

    Attributes:
        ending: what a model's own template makes of the last three of :data:`MESSAGES`.
        stop: the token that ends a turn.
        template: the same in Ollama's language, Go's.
    """

    ending: str
    stop: str
    template: str


CHATML = ChatFormat(
    "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
)
LLAMA3 = ChatFormat(
    "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
    "{{- end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
)
GEMMA = ChatFormat(
    "A<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n<start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>",
    '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
    "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
)
PHI3 = ChatFormat(
    "<|user|>\nA<|end|>\n<|assistant|>\nB<|end|>\n<|user|>\nC<|end|>\n<|assistant|>\n",
    "<|end|>",
    "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
)
PHI4 = ChatFormat(
    "<|user|>A<|end|><|assistant|>B<|end|><|user|>C<|end|><|assistant|>",
    "<|end|>",
    "{{- range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>",
)


def modelfile(file_name: str, chat_template: str | None, tokens: Mapping[str, str]) -> str:
    """The text of a Modelfile.

    Args:
        file_name: of the GGUF file beside it.
        chat_template: the model's own, Jinja.
        tokens: texts of special tokens that it may ask for, such as ``bos_token``.
    """
    lines = [f"FROM ./{file_name}"]
    found = None if chat_template is None else _find(chat_template, tokens)
    if found is not None:
        # Ollama compares a GGUF file's template with those it knows, nearly letter by letter, and where none is near
        # it feeds the bare prompt to the model: so the format that the template really produces is named here.
        lines += [f'TEMPLATE """{found.template}"""', f'PARAMETER stop "{found.stop}"']
    elif chat_template is not None:
        lines.append("# Ollama may not know this model's chat template; if answers are poor, add a TEMPLATE here.")
    return "\n".join(lines) + "\n"


def _find(chat_template: str, tokens: Mapping[str, str]) -> ChatFormat | None:
    """The format that a template produces, whatever it makes of the system's message."""
    for messages in (MESSAGES, MESSAGES[1:]):
        text = _render(chat_template, messages, tokens)
        for known in (CHATML, LLAMA3, GEMMA, PHI3, PHI4):
            if text.endswith(known.ending):
                return known
    return None


def _render(chat_template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
    try:
        return render_chat_template(chat_template, messages, tokens)
    except PackageError:  # a template may refuse a system's message
        return ""
