"""Quantize a model with auto-round, for tools/bench_quantize.py; where it runs, mgptq-export need not be.

    python tools/bench_peer.py MODEL TOKENS ITERATIONS BITS GROUP_SIZE

TOKENS is a JSON file of equally long lists of token ids. Prints a JSON object: versions, and of every stage when it
began and ended, in seconds since the epoch. The model is quantized in memory and not written. Nothing is compiled: that
takes a C compiler and, however many layers there are, minutes.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main(model: str, tokens: str, iterations: str, bits: str, group_size: str) -> None:
    stages = {}
    begun = time.time()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sequences = torch.tensor(json.loads(Path(tokens).read_text(encoding="utf-8")))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    stages["load"] = (begun, time.time())
    begun = time.time()
    AutoRound(
        loaded,
        tokenizer,
        bits=int(bits),
        group_size=int(group_size),
        sym=True,
        iters=int(iterations),
        nsamples=len(sequences),
        seqlen=sequences.shape[1],
        batch_size=min(8, len(sequences)),
        dataset=list(sequences.split(1)),
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    stages["quantize"] = (begun, time.time())
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    print(json.dumps({"stages": stages, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
