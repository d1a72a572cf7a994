"""Containers and packages of small models, for the tests of the runtime."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mgptq_export.checkpoint import write_checkpoint
from mgptq_export.targets.container import write_container
from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.container import ARCHITECTURE, content_sha256, signature_offset
from mgptq_runtime.gguf_file import read_gguf
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.quantized_model import QuantizedModel

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve café, 日本語, 🙂 and more of the same text. " * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def make_golden(model: QuantizedModel, *, prompts: int = 2, length: int = 12, k: int = 8) -> GoldenVectors:
    """Golden vectors as the NumPy backend computes them."""
    backend = NumpyBackend(model)
    ids = np.random.default_rng(7).integers(0, backend.vocabulary_size, (prompts, length))
    logits, digests = backend.forward_with_digests(ids)
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    partition = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    return GoldenVectors(
        token_ids=ids.astype(np.int32),
        top_ids=order.astype(np.int32),
        top_logits=np.take_along_axis(logits, order, axis=-1),
        log_partition=partition.astype(np.float32),
        hidden_digests=digests,
    )


def make_tokenizer_folder(folder: Path, vocabulary: int = 400) -> Path:
    """A byte-level BPE tokenizer with a chat template, as Hugging Face writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def make_container(
    folder: Path,
    model: QuantizedModel,
    *,
    golden: GoldenVectors | None = None,
    tokenizer_folder: Path | None = None,
) -> Path:
    """Write ``folder/model.mgptq.gguf`` through a checkpoint."""
    checkpoint_folder = folder / "quantized"
    shutil.rmtree(checkpoint_folder, ignore_errors=True)
    checkpoint = write_checkpoint(
        checkpoint_folder,
        model,
        name="tiny",
        config={"eos_token_id": [1]},
        recipe={"bits": 2.5},
        tokenizer_folder=tokenizer_folder or folder / "none",
    )
    path = folder / "model.mgptq.gguf"
    write_container(checkpoint, golden or make_golden(model), path)
    return path


def write_manifest(folder: Path, paths: list[str], **values: object) -> None:
    """A manifest that lists ``paths`` as they are now."""
    files = [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path in paths
        for data in [(folder / path).read_bytes()]
    ]
    manifest = {"format_version": 1, "name": "tiny", "files": files} | values
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sign(path: Path) -> None:
    """Make the content hash of a changed container right again."""
    file = read_gguf(path, ARCHITECTURE)
    offset = signature_offset(file)
    data = bytearray(path.read_bytes())
    data[offset : offset + 64] = content_sha256(bytes(data), offset).encode()
    path.write_bytes(data)
