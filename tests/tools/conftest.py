"""A bench of a tiny model, for the tools that measure the method."""

from dataclasses import replace
from pathlib import Path

import pytest
from ablation import Bench
from reproducible import _exact_products, _one_thread  # noqa: F401
from tiny_models import text, write_llama


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("ablation")
    write_llama(folder / "model", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    (folder / "text.txt").write_text(text())
    made = Bench(str(folder / "model"), str(folder / "text.txt"), {"text": Path(folder / "text.txt")}, 1)
    made.recipe = replace(made.recipe, samples=4, sequence_length=64, trials=2, training_steps=2, recovery_steps=2)
    made.windows = {"text": made.windows["text"][:, :128]}
    return made
