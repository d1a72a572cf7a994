"""What docs/guide.md and the README tell a reader to type is typed, in their order, for a tiny model."""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import tiny_models
from click.testing import CliRunner
from pages import ROOT, anchors, blocks, links, page, section
from small_runs import RECIPE, nothing_there

from mgptq_export import cli as export_command
from mgptq_export import hub, pipeline
from mgptq_export.targets import TARGETS
from mgptq_runtime import cli as run_command
from mgptq_runtime.check import DEFAULT_BOUNDS

GUIDE = page("docs/guide.md")
README = page("README.md")
PAGES = (
    "README.md",
    "runtime/README.md",
    "docs/guide.md",
    "docs/troubleshooting.md",
    "docs/targets.md",
    "docs/distributed.md",
    "docs/memory.md",
)
MARKDOWN = sorted(
    str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "runtime", ROOT / "docs") for path in folder.glob("*.md")
)
GROUPS = {"mgptq-export": export_command.cli, "mgptq-run": run_command.cli}

# K-quants need rows of 256, and a budget below 3 bits needs types that fit.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
QUANTIZING = "--samples 4 --own-samples 1 --sequence-length 64 --allocator hessian"
SCORING = "--window 32 --windows 2"
# Appended to what the pages say, by command; of an option that is given twice the last one counts.
SMALL = {
    "run": f"{QUANTIZING} {SCORING}",
    "sweep": f"{QUANTIZING} {SCORING}",
    "quantize": QUANTIZING,
    "eval": SCORING,
    "compare": f"{SCORING} --tokens 2",
    "generate": "--max-tokens 4",
    "perplexity": SCORING,
    "bench": "--prompt-tokens 4 --decode-tokens 2",
}

RECOVERING = [name for name, options in SMALL.items() if options.startswith(QUANTIZING)]


def lines(text: str) -> list[list[str]]:
    """The commands of a page, split as a shell does; comments are left out."""
    split = [shlex.split(line, comments=True) for block in blocks(text) for line in block.splitlines()]
    return [words for words in split if words]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages take for granted; the hub takes everything."""
    tiny_models.write_llama(tmp_path / "MODEL", max_position_embeddings=512, **SIZES)
    (tmp_path / "calibration.txt").write_text(tiny_models.text(20_000))
    (tmp_path / "held-out.txt").write_text(tiny_models.text()[20_000:30_000])
    monkeypatch.chdir(tmp_path)
    # The first places of a random model's logits are too close for 8-bit activations; the divergence still counts.
    monkeypatch.setitem(DEFAULT_BOUNDS, "onnx_fast", replace(DEFAULT_BOUNDS["onnx_fast"], top1_agreement=0.8))
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(hub.HfApi, "hf_hub_download", nothing_there)
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, *, repo_id, **options: f"https://hub/{repo_id}")
    return tmp_path


def type_in(words: Sequence[str], exit_code: int = 0) -> None:
    """Run a command of ours, which is to end with an exit code."""
    program, name, *rest = words
    small = shlex.split(SMALL.get(name, ""))
    if name in RECOVERING:
        small += ["--recover", "0.001"] if "--recover" in rest else ["--recovery-steps", "0"]
    result = CliRunner().invoke(GROUPS[program], [name, *rest, *small])
    said = f"{shlex.join(words)}\nexit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    assert result.exit_code == exit_code, said


def output(words: Sequence[str]) -> str | None:
    """Where a command writes, if it says so."""
    return words[words.index("-o") + 1] if "-o" in words else None


def stop(words: Sequence[str]) -> None:
    """Run a command that is stopped when it exports; its package is taken away before."""
    out = Path(str(output(words)))
    shutil.rmtree(out, ignore_errors=True)

    def interrupted(*arguments: object) -> NoReturn:
        raise SystemExit(130)

    with pytest.MonkeyPatch.context() as patch:
        for name, target in TARGETS.items():
            patch.setitem(TARGETS, name, replace(target, write=interrupted))
        type_in(words, exit_code=130)
    assert not out.exists() and out.with_name(f"{out.name}.unfinished").is_dir()


def follow(words: Sequence[str], started: Sequence[str] | None = None) -> None:
    """Do what a line says; what --resume goes on with is ``started``, or the same without --resume, stopped."""
    if words[0] in GROUPS:
        if "--resume" in words:
            stop(started or [word for word in words if word != "--resume"])
        type_in(words)
    elif words[0] == "torchrun":  # several processes have tests of their own
        follow(["mgptq-export", *words[words.index("mgptq_export") + 1 :]])
    elif words[0] == "make":
        assert all(f"\n{target}: " in page("Makefile") for target in words[1:]), words
    elif words[:2] == ["hf", "download"]:  # what was pushed comes back
        shutil.copytree("FULL", words[words.index("--local-dir") + 1])
    elif words[:2] == ["pip", "install"]:
        assert all((ROOT / folder / "pyproject.toml").is_file() for folder in words[2:]), words
    else:
        assert words == [".", ".venv/bin/activate"] and "BIN := .venv/bin\n" in page("Makefile"), words


def test_the_guide_can_be_followed_from_its_first_line_to_its_last(desk):
    made: dict[str | None, Sequence[str]] = {}
    for words in lines(GUIDE):
        follow(words, started=made.get(output(words)))
        made[output(words)] = words


@pytest.mark.slow
def test_every_command_of_the_readmes_tour_works(desk):
    (desk / "text.jsonl").write_text(json.dumps({"text": tiny_models.text(20_000)}) + "\n")
    pipeline.run("MODEL", Path("OTHER"), RECIPE, ["container", "onnx"])
    shutil.copytree("OTHER", "PACKAGE")
    for words in lines(section(README, "On the workstation")):
        follow([*words, "--overwrite"] if "-o" in words else words)  # the tour is a list, with one OUT for all
    for words in lines(section(README, "On the device")):
        follow(words)


def test_every_command_has_its_place_in_the_guide():
    told = {words[1] for words in lines(GUIDE) if words[0] in GROUPS}
    known = {name for group in GROUPS.values() for name in group.commands}
    assert told == known - {"quantize", "export", "info"}  # the steps of run, one by one; and inspect for the device


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_of_a_page_lead_somewhere(name):
    for link in links(page(name)):
        path, _, anchor = link.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), link
        assert not anchor or anchor in anchors(found.read_text()), link
