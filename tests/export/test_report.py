"""report.html, opened in Chromium, and the model card. The manifest is trusted."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from install_browser import find_browser
from playwright.sync_api import Browser, Page, sync_playwright
from small_runs import RECIPE, Package, nothing_there

from mgptq_export import cli as command
from mgptq_export import hub, pipeline
from mgptq_export.history import History
from mgptq_export.recipe import FAST, Recipe
from mgptq_export.report import sweep_page
from mgptq_export.report.card import model_card, recipe_options
from mgptq_export.report.content import PackageContent
from mgptq_export.solved import read_solved
from mgptq_runtime.errors import BadInputError, PackageError

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
FULL = replace(RECIPE, recovery_steps=3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path, "no Chromium on the PATH; run tools/install_browser.py"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def full(even_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Every target, recovered and evaluated."""
    text = pipeline.EvaluationText(text_file, window=64, windows=2)
    folder = tmp_path_factory.mktemp("full") / "package"
    manifest = pipeline.run(str(even_model), folder, FULL, ["container", "onnx", "llama.cpp"], text=text)
    return Package(folder, manifest, even_model, text)


def opened(browser: Browser, package: Path, **options: object) -> tuple[Page, list[str]]:
    """The drawn page, and all that the browser complained about or wanted to load."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    noted: list[str] = []
    page.on("console", lambda message: noted.append(message.text))
    page.on("pageerror", lambda error: noted.append(str(error)))
    page.on("request", lambda request: noted.append(request.url))
    page.goto((package / "report.html").as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=30_000)
    return page, noted


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_report_opens_without_a_complaint_and_shows_all_charts(browser, full, width, theme):
    page, noted = opened(browser, full.folder, viewport={"width": width, "height": 900}, color_scheme=theme)
    assert noted == [(full.folder / "report.html").as_uri()]
    charts = page.locator(".chart").all()
    assert [chart.get_attribute("id") for chart in charts] == [
        "quality",
        *(f"{chart}-{name}" for name in ("columns", "tensors") for chart in CHARTS),
    ]
    for chart in charts:
        assert chart.locator(".role-mark path").count() > 0
        assert chart.locator("svg").bounding_box()["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{theme}.png", full_page=True)


CHARTS = ("allocation", "bytes", "layers", "trials", "recovery")


@pytest.mark.slow
def test_the_reports_numbers_are_the_manifests(browser, full):
    page, _ = opened(browser, full.folder)
    tiles = page.locator(".tiles li").all_inner_texts()
    sizes = {file["path"]: file["bytes"] for file in full.manifest["files"]}
    assert any(tile.startswith(f"{sizes['model.mgptq.gguf'] / 1e6:.1f} MB") for tile in tiles)
    results = full.manifest["evaluation"]["results"]
    rows = page.locator("[aria-label=Quality] tbody tr").all()
    for row, (name, quality) in zip(rows, results.items(), strict=True):
        cells = row.locator("td").all_inner_texts()
        assert cells[:3] == [name, f"{quality['perplexity']:.3f}", f"{quality['kl_divergence']:.4f}"]
    checks = page.locator("[aria-label='The checks'] tbody tr").all()
    assert [row.locator("td").all_inner_texts()[:2] for row in checks] == [
        [name, "passed"] for name in full.manifest["check"]["results"]
    ]
    assert f"{full.manifest['bits']['stored']:.4f} stored bits" in page.locator("header").inner_text()
    drawn = json.loads(page.locator("#charts").text_content())
    stored = {row["linear"]: row["bits"] for row in drawn["allocation-columns"]["data"]["values"]}
    weights = dict(linear_weights(full))
    assert stored.keys() == weights.keys()
    spent = sum(bits * weights[name] for name, bits in stored.items()) / sum(weights.values())
    assert spent == pytest.approx(full.manifest["bits"]["stored"], abs=0.1)


def linear_weights(package: Package) -> Iterator[tuple[str, int]]:
    config = json.loads((package.folder / "quantized" / "config.json").read_text())
    for group in config["quantization_config"]["layout"]["groups"]:
        for linear in group["linears"]:
            yield linear["name"], linear["rows"] * linear["columns"]


@pytest.mark.slow
def test_hovering_a_linear_shows_its_numbers(browser, full):
    page, _ = opened(browser, full.folder)
    page.locator("#allocation-columns .mark-rect path").first.hover()
    shown = page.locator("#vg-tooltip-element").inner_text()
    assert re.search(r"linear\s*blk\.0\.attn_q", shown) and "stored bits" in shown and "nats" in shown


@pytest.mark.slow
def test_every_chart_is_described_and_has_its_numbers_in_a_table(browser, full):
    page, _ = opened(browser, full.folder)
    for figure in page.locator("figure").all():
        for reference in ("aria-labelledby", "aria-describedby"):
            assert page.locator(f"#{figure.get_attribute(reference)}").inner_text()
        assert figure.locator("tbody tr").count() > 0
        assert figure.locator("svg[role=graphics-document], [role=graphics-document]").count() > 0


@pytest.mark.slow
def test_a_model_cannot_put_markup_into_the_report(browser, even_model, tmp_path):
    hostile = tmp_path / "</script><img src=x onerror=alert(1)>"
    hostile.parent.mkdir(parents=True, exist_ok=True)
    hostile.mkdir(parents=True)
    for path in even_model.iterdir():
        (hostile / path.name).write_bytes(path.read_bytes())
    pipeline.run(str(hostile), tmp_path / "out", RECIPE, ["container"])
    page, noted = opened(browser, tmp_path / "out")
    assert len(noted) == 1 and page.locator("img").count() == 0
    assert hostile.name in page.locator("h1").inner_text()


def sweep_row(
    name: str, kind: str, layout: str | None, size: int, perplexity: float, pareto: bool
) -> dict[str, object]:
    quality = {"perplexity": perplexity, "kl_divergence": 0.5, "top1_agreement": 0.6, "pareto": pareto}
    files = {"container" if layout else "gguf": size}
    return {
        "name": name,
        "kind": kind,
        "layout": layout,
        "stored_bits": 2.5,
        "file_bytes": files,
        "bytes": size,
        **quality,
    }


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_picture_of_a_sweep_has_a_point_for_every_row(browser, tmp_path, width):
    rows = [
        sweep_row("original", "original", None, 269_000_000, 21.1, True),
        sweep_row("3", "quantized", "columns", 58_000_000, 30.4, True),
        sweep_row("2.5", "quantized", "columns", 52_000_000, 41.1, True),
        sweep_row("2.5", "quantized", "tensors", 51_000_000, 46.1, True),
        sweep_row("<b>.gguf", "against", None, 91_000_000, 50.0, False),
    ]
    evaluation = {"text": "text.txt", "windows": 2, "window": 64}
    page_file = tmp_path / "report.html"
    page_file.write_text(sweep_page({"name": "model", "rows": rows, "evaluation": evaluation}))
    page, noted = opened(browser, tmp_path, viewport={"width": width, "height": 900})
    assert noted == [page_file.as_uri()]
    points = page.locator("#front .mark-symbol.role-mark path")
    labels = [point.get_attribute("aria-label") or "" for point in points.all()]
    assert len(labels) == len(rows)
    for row, label in zip(rows, labels, strict=True):
        assert f"perplexity: {row['perplexity']:g}" in label
    assert page.locator("[aria-label='The table'] tbody tr").count() == len(rows)
    assert page.locator("#front .role-mark text", has_text="<b>.gguf").count() == 1


def test_the_report_is_one_small_file_and_listed_in_the_manifest(package):
    page = package.folder / "report.html"
    assert page.stat().st_size < 3_000_000
    assert {"report.html", "README.md", "quantized/history.json"} <= {one["path"] for one in package.manifest["files"]}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(http|//)", page.read_text())


def test_history_tells_how_the_package_came_about(full):
    history = History.read(full.folder / "quantized")
    assert history.losses.keys() == dict(linear_weights(full)).keys()
    assert len(history.trials) == FULL.trials and len(history.recovery) == FULL.recovery_steps
    assert len(history.errors_solved) == len(history.errors_recovered) == 2
    assert all(0 < error < 2 for error in history.errors_solved)


def test_checks_of_all_backends_are_in_the_manifest(full, tmp_path):
    results = full.manifest["check"]["results"]
    assert list(results) == ["numpy", "onnx", "onnx_exact"] and all(result["passed"] for result in results.values())
    again = pipeline.export(full.folder, ["container"], tmp_path / "again")
    assert again["check"]["results"] == results


# The card


def test_the_card_has_the_hubs_metadata_and_the_numbers(full):
    card = ModelCard.load(full.folder / "README.md")
    assert card.data.library_name == "mgptq-export" and card.data.pipeline_tag == "text-generation"
    assert {"gguf", "onnx", "llama.cpp"} <= set(card.data.tags)
    assert card.data.to_dict()["quantization"]["bits_per_weight"] == round(full.manifest["bits"]["stored"], 4)
    for name, quality in full.manifest["evaluation"]["results"].items():
        assert f"| {name} | {quality['perplexity']:.3f} | {quality['kl_divergence']:.4f} |" in card.text


def test_license_and_base_model_are_carried_over(even_model, tmp_path):
    model = tmp_path / "licensed"
    model.mkdir()
    for path in even_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: house-rules\nbase_model: a/b\n---\n# A model\n"
    )
    pipeline.run(str(model), tmp_path / "out", RECIPE, ["container"])
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name) == ("other", "house-rules")


def test_a_model_of_the_hub_is_named_with_the_commit_that_was_fetched(even_model, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    fetched = shutil.copytree(even_model, tmp_path / "snapshots" / commit)
    asked = set()

    def snapshot_download(name, revision, allow_patterns):
        asked.add((name, revision))
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    manifest = pipeline.run("someone/small-model@v1.0", tmp_path / "out", RECIPE, ["container"])
    assert asked == {("someone/small-model", "v1.0")}
    assert manifest["name"] == "small-model"
    assert manifest["origin"] == {"source": f"someone/small-model@{commit}", "base_model": "someone/small-model"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"mgptq-export run someone/small-model@{commit} " in card and "\nbase_model: someone/small-model\n" in card


@pytest.mark.parametrize("card", ["", "---\n: :\n- [\n---\n", "---\nlicense: 7\n---\n", "no metadata"])
def test_a_broken_card_of_the_original_is_no_error(even_model, tmp_path, card):
    model = tmp_path / "model"
    model.mkdir()
    for path in even_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "README.md").write_text(card)
    manifest = pipeline.run(str(model), tmp_path / "out", RECIPE, ["container"])
    assert "license" not in manifest["origin"]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(bits=3.1, samples=9, seed=4, allocator="hessian", ggml_types=("q2_0", "q4_0")),
        Recipe(size=50_000_000, embedding_format="b8", recovery_steps=0, drift_correction=0.25, descent_sweeps=1),
        Recipe(**FAST),
        Recipe(**(FAST | {"samples": 20})),
        Recipe(calibration="our text; final.txt"),
    ],
)
def test_the_cards_command_gives_the_recipe_again(recipe, monkeypatch):
    seen, checked = [], {"check": {"results": {}}}
    monkeypatch.setattr(pipeline, "run", lambda *given, **others: seen.append(given[2]) or checked)
    monkeypatch.setattr(command, "_print_manifest", lambda *arguments: None)
    typed = shlex.split(" ".join(recipe_options(recipe.to_json())))
    command.cli.main(["run", "model", "-o", "out", *typed], standalone_mode=False)
    assert seen == [recipe]


def test_a_card_says_where_layouts_were_recovered_for_different_steps(full):
    contents, manifest = [], json.loads((full.folder / "manifest.json").read_text())
    (steps,) = {layout["recovery_steps"] for layout in manifest["layouts"].values()}
    for one in read_solved(full.folder, manifest):
        contents.append(PackageContent(one.layout, one.checkpoint, one.history))
    assert "Recovery took" not in model_card(manifest, contents)
    manifest["layouts"]["tensors"]["recovery_steps"] = steps + 2
    told = f"\n\nRecovery took {steps} steps for the columns layout and {steps + 2} steps for the tensors layout: make"
    assert told in model_card(manifest, contents)


# Push


def test_push_uploads_what_the_manifest_lists_to_a_repository_that_it_creates(package, tmp_path, monkeypatch, main):
    calls, folder = [], Path(shutil.copytree(package.folder, tmp_path / "copied"))
    (folder / ".env").write_text("TOKEN=secret")
    monkeypatch.setattr(hub.HfApi, "hf_hub_download", nothing_there)
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, **options: calls.append(options) or "the address")
    code, out, _ = main("push", folder, "me/model", "--private", "--json")
    assert code == 0 and json.loads(out) == {"url": "the address"}
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/model" and calls[1]["folder_path"] == folder
    assert set(calls[1]["allow_patterns"]) == {"manifest.json", *(file["path"] for file in package.manifest["files"])}
    assert calls[1]["delete_patterns"] == []


def test_push_deletes_what_an_earlier_package_left_and_nothing_else(package, tmp_path, monkeypatch):
    """The hub has a package with an ONNX model, beside files of others; what is pushed has none."""
    calls, less = [], tmp_path / "less"
    pipeline.export(package.folder, ["container"], less)
    shutil.rmtree(less / "onnx")
    manifest = json.loads((less / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if not file["path"].startswith("onnx/")]
    (less / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, **options: calls.append(options))
    for there in (package.folder / "manifest.json", tmp_path / "manifest.json"):
        monkeypatch.setattr(hub.HfApi, "hf_hub_download", lambda self, *_, there=there: str(there))
        (tmp_path / "manifest.json").write_text('{"name": "app", "files": ["app.js"]}')
        hub.push(less, "me/model")
    onnx = {file["path"] for file in package.manifest["files"] if file["path"].startswith("onnx/")}
    assert set(calls[0]["delete_patterns"]) == onnx
    assert calls[1]["delete_patterns"] == []


def test_a_damaged_package_is_not_uploaded(package, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *arguments, **options: pytest.fail("called"))
    broken = tmp_path / "broken"
    pipeline.export(package.folder, ["container"], broken)
    (broken / "README.md").write_text("changed")
    with pytest.raises(PackageError, match=r"README\.md has"):
        hub.push(broken, "me/model")


def test_a_hub_that_does_not_answer_or_a_bad_name_is_a_typed_error(package):
    with pytest.raises(BadInputError, match="cannot be reached"):
        hub.push(package.folder, "me/model", endpoint="http://127.0.0.1:9")
    with pytest.raises(BadInputError, match="OWNER/NAME"):
        hub.push(package.folder, "not//a name")


def test_the_hubs_refusal_is_a_typed_error(package, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        answer = httpx2.Response(401, request=httpx2.Request("POST", "http://127.0.0.1"))
        raise HfHubHTTPError("401 Unauthorized", response=answer)

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(BadInputError, match="hf auth login"):
        hub.push(package.folder, "me/model")
