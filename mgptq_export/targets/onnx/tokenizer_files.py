"""The tokenizer's files, as onnxruntime-genai reads them."""

import json
from pathlib import Path
from typing import Any

from mgptq_export.checkpoint import copy_tokenizer

__all__ = ["write_tokenizer"]

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
ANY_CLASS = "PreTrainedTokenizerFast"


def _default_template(template: Any) -> str | None:
    """A configuration has one template, or several by name."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def write_tokenizer(source: Path, folder: Path, context_length: int) -> None:
    """Copy the tokenizer's files, and complete ``tokenizer_config.json``, which genai reads more strictly than others.

    It needs the file, and a class in it, or finds no chat template; it takes one template as text, and prefers it to
    ``chat_template.jinja``, to which Hugging Face gives precedence; and it refuses Hugging Face's 1e30 for "no limit".
    """
    copy_tokenizer(source, folder)
    if not (folder / "tokenizer.json").is_file():
        return
    path, template = folder / CONFIG, folder / TEMPLATE
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config.setdefault("tokenizer_class", ANY_CLASS)
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    elif "chat_template" in config:
        config["chat_template"] = _default_template(config["chat_template"])
    if config.get("chat_template") is None:
        config.pop("chat_template", None)
    config["model_max_length"] = int(min(config.get("model_max_length") or context_length, context_length))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
