"""What counts as a proof on 64-bit Arm. Another Python of this machine takes the emulated one's place."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import arm64
import check_arm64
import pytest
from arm64 import Machine, Unpacked, apt_options
from check_arm64 import WAYS, Replay, compare, first_difference, make_package
from click.testing import CliRunner, Result

HERE = Machine("here", Path(sys.executable))
SOUND = Replay("here", "numpy", {"failures": []}, [5, 6, 7], "abc", 1.0)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("arm64"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Says that every text begins with another token than it does."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh\n"{sys.executable}" "$@" | sed 's/"tokens": \\[/"tokens": [0, /'\n""")
    python.chmod(0o755)
    return Machine("there", python)


def run(monkeypatch: pytest.MonkeyPatch, machine: Machine, *arguments: object) -> Result:
    monkeypatch.setattr(check_arm64, "install_machine", lambda *others: [machine])
    return CliRunner().invoke(check_arm64.main, [*map(str, arguments), "--max-tokens", "3"])


def test_the_same_results_in_every_way_are_a_proof(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, replace(HERE, name="there"), package, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["passed"] and not values["failures"]
    assert [(found["machine"], found["way"]) for found in values["replays"]] == [
        (name, way) for name in ("x86-64", "there") for way in WAYS
    ]
    assert all(found["check"]["passed"] and len(found["tokens"]) == 3 for found in values["replays"])
    assert values["versions"]["there"] == values["versions"]["x86-64"]


def test_another_text_from_the_same_arithmetic_is_none(
    package: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(monkeypatch, machine, package, "--way", "numpy", "--way", "onnx_fast")
    assert result.exit_code == 1
    assert "there, numpy: the text is not that of x86-64 from token 0" in " ".join(result.stdout.split())
    assert "there, onnx_fast:" not in result.stdout


def test_a_failed_check_is_no_proof_in_any_way() -> None:
    for way in WAYS:
        failed = replace(SOUND, machine="there", way=way, check={"failures": ["top1_agreement is 0.5"]})
        assert compare(replace(SOUND, way=way), failed) == [f"there, {way}: top1_agreement is 0.5"]


def test_texts_part_at_the_first_other_token() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1], []) == 0


def test_what_the_runtime_refuses_is_said_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, HERE, tmp_path)
    assert result.exit_code == 1
    assert f"x86-64: mgptq-run check {tmp_path}" in result.output and "manifest.json" in result.output


@pytest.mark.skipif(not shutil.which("apt-config"), reason="no apt")
def test_apt_keeps_to_its_folder(tmp_path: Path) -> None:
    command = ["apt-config", *apt_options(tmp_path, "arm64"), "shell"]
    for setting in ("Dir::State::lists/f", "Dir::State::status/f", "Dir::Cache::archives/f", "Dir::Etc::sourcelist/f"):
        found = subprocess.run([*command, "found", setting], text=True, capture_output=True, check=True).stdout
        assert str(tmp_path) in found, setting
    found = subprocess.run([*command, "found", "APT::Architecture"], text=True, capture_output=True, check=True).stdout
    assert "arm64" in found


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg")
def test_of_a_package_only_what_is_asked_for_is_unpacked(tmp_path: Path) -> None:
    for name in ("tree/DEBIAN/control", "tree/usr/bin/wanted", "tree/usr/bin/other"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Package: some\nVersion: 1\nArchitecture: all\nMaintainer: some\nDescription: some\n")
    subprocess.run(["dpkg-deb", "-b", tmp_path / "tree", tmp_path / "some.deb"], check=True, capture_output=True)
    for only, expected in ((["./usr/bin/wanted"], ["wanted"]), ([], ["other", "wanted"])):
        folder = tmp_path / f"unpacked-{len(expected)}"
        folder.mkdir()
        arm64._extract(tmp_path / "some.deb", folder, only)
        assert sorted(path.name for path in (folder / "usr" / "bin").iterdir()) == expected


def test_what_was_unpacked_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "some").mkdir()
    wanted = Unpacked("some", "bookworm", "arm64", ("python3.11",))
    assert arm64._unpack(wanted, tmp_path, "http://127.0.0.1:9") == tmp_path / "some"


def test_a_failed_download_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = tmp_path / "arm64"
    folder.mkdir()
    with pytest.raises(SystemExit, match="apt-get ended with exit code 100"):
        arm64._unpack(arm64.SYSTEM, folder, "http://127.0.0.1:9")
    assert not list(folder.iterdir())


def test_a_machine_that_cannot_emulate_says_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get and dpkg-deb must be on the PATH"):
        arm64.install_machine(tmp_path / "arm64", [])
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="run: mgptq-run check PACKAGE"):
        arm64.install_machine(tmp_path / "arm64", [])
    assert not (tmp_path / "arm64").exists()
