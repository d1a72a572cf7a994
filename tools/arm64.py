"""A 64-bit Arm Linux with Python 3.11 and the device runtime, in a folder, run by QEMU's user-mode emulation.

Nothing is installed on the machine, and root is not needed. apt, with a configuration of its own, downloads and
verifies Debian's packages; they are unpacked. The system is that of Debian 12, which Raspberry Pi OS builds on; QEMU
is a static program of Debian 13, since older ones show the host's /proc/cpuinfo, with which ONNX Runtime crashes.
Of everything that pip installs, Arm gets the version that is installed here, so that results can be compared.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["Machine", "Unpacked", "install_machine"]

ROOT = Path(__file__).resolve().parent.parent
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28)] + ["manylinux2014_aarch64"]
# Called by the script's path, Python can start itself, too: chat templates are rendered in a process of their own.
SCRIPT = """#!/bin/sh
export PYTHONHOME=/usr PYTHONPATH="{site}" QEMU_CPU="${{QEMU_CPU:-cortex-a76}}"
exec "{emulator}" -L "{system}" -0 "$0" "{system}/usr/bin/python3.11" "$@"
"""


@dataclass(frozen=True)
class Machine:
    """Something that runs Python.

    Attributes:
        name: what tables call it.
        python: the program.
        environment: added to this process's variables.
        emulator: what runs the program; None for this machine.
    """

    name: str
    python: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    emulator: Path | None = None

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments; its output is captured."""
        environment = os.environ | dict(self.environment)
        return subprocess.run([self.python, *arguments], env=environment, text=True, capture_output=True)


@dataclass(frozen=True)
class Unpacked:
    """Debian packages that make a folder.

    Attributes:
        folder: below that of the machine.
        release, architecture: of Debian.
        packages: with everything that they depend on.
        only: of their files; all by default.
    """

    folder: str
    release: str
    architecture: str
    packages: tuple[str, ...]
    only: tuple[str, ...] = ()


EMULATOR = Unpacked("qemu", "trixie", "amd64", ("qemu-user",), ("./usr/bin/qemu-aarch64",))
SYSTEM = Unpacked("system", "bookworm", "arm64", ("python3.11", "libstdc++6"))


def apt_options(scratch: Path, architecture: str) -> list[str]:
    """Options with which apt knows one architecture and one list of sources, and writes into a folder alone."""
    values = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",  # its other user cannot write here
        "APT::Install-Recommends": "false",
        "Dir::State": scratch / "state",
        "Dir::State::status": scratch / "status",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "-",
    }
    return [word for name, value in values.items() for word in ("-o", f"{name}={value}")]


def _tell(*command: object) -> None:
    """Run a program; what it says goes to stderr, and its failure ends this one."""
    words = [str(word) for word in command]
    code = subprocess.run(words, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"{words[0]} ended with exit code {code}; what it said is above, and the same command tries again")


def _unpack(wanted: Unpacked, parent: Path, mirror: str) -> Path:
    """The folder with its packages, downloaded where it is not there."""
    folder = parent / wanted.folder
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=parent) as name:
        scratch = Path(name)
        for needed in ("state/lists/partial", "cache/archives/partial", "unpacked"):
            (scratch / needed).mkdir(parents=True)
        (scratch / "status").touch()
        signed = f"arch={wanted.architecture} signed-by={KEYRING}"
        (scratch / "sources.list").write_text(f"deb [{signed}] {mirror} {wanted.release} main\n", encoding="utf-8")
        apt = ["apt-get", "-q", *apt_options(scratch, wanted.architecture)]
        _tell(*apt, "update")
        _tell(*apt, "install", "-y", "--download-only", *wanted.packages)
        for package in sorted((scratch / "cache" / "archives").glob("*.deb")):
            _extract(package, scratch / "unpacked", wanted.only)
        (scratch / "unpacked").rename(folder)
    return folder


def _extract(package: Path, folder: Path, only: Sequence[str]) -> None:
    archive = package.with_suffix(".tar")
    with archive.open("wb") as stream:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=stream, check=True)
    _tell("tar", "-x", "-C", folder, "-f", archive, *only)
    archive.unlink()


def _install_runtime(site: Path) -> None:
    """The wheel that a device gets and everything that it needs, of Arm, in the versions of this environment."""
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        constraints = scratch / "constraints.txt"
        constraints.write_text("".join(f"{d.name}=={d.version}\n" for d in distributions()), encoding="utf-8")
        # Setuptools leaves a build folder beside the sources, and takes over what it finds in an old one.
        left_behind = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        source = shutil.copytree(ROOT / "runtime", scratch / "runtime", ignore=left_behind)
        _tell(*pip, "wheel", "--quiet", "--no-deps", "-w", scratch, source)
        (wheel,) = scratch.glob("*.whl")
        target = ["--target", site, "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
        tags = [word for name in PLATFORMS for word in ("--platform", name)]
        _tell(*pip, "install", "--quiet", *target, *tags, "--constraint", constraints, wheel)


def _refuse_without_tools() -> None:
    """Stop where this cannot work, and say what would help."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit("the emulator is a program for x86-64 Linux; on 64-bit Arm itself, run: mgptq-run check PACKAGE")
    missing = [name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)]
    if missing:
        sys.exit(f"{' and '.join(missing)} must be on the PATH; use Debian or Ubuntu, as a container for example")
    if not KEYRING.exists() and os.geteuid() == 0:
        for arguments in (["update"], ["install", "-y", KEYRING.stem]):
            _tell("apt-get", "-q", *arguments)
    if not KEYRING.exists():
        sys.exit(f"{KEYRING} is missing, by which Debian's packages are verified; run: apt-get install {KEYRING.stem}")


def install_machine(folder: Path, cpus: Sequence[str], mirror: str = MIRROR) -> list[Machine]:
    """Emulated machines with the runtime of this checkout, one for every processor.

    Args:
        folder: where everything goes; Debian's packages are kept for the next time.
        cpus: names that QEMU knows, such as ``cortex-a76``.
        mirror: of Debian.

    Raises:
        SystemExit: this machine cannot emulate, a download failed, or QEMU does not know a processor; with what helps.
    """
    _refuse_without_tools()
    folder.mkdir(parents=True, exist_ok=True)
    system = _unpack(SYSTEM, folder, mirror)
    emulator = _unpack(EMULATOR, folder, mirror) / "usr" / "bin" / "qemu-aarch64"
    _install_runtime(folder / "site")
    python = folder / "python"
    python.write_text(SCRIPT.format(emulator=emulator, system=system, site=folder / "site"), encoding="utf-8")
    python.chmod(0o755)
    machines = [Machine(cpu, python, {"QEMU_CPU": cpu}, emulator) for cpu in cpus]
    for machine in machines:
        tried = machine.run(["-c", ""])
        if tried.returncode:
            sys.exit(f"no Python on {machine.name}: {tried.stderr.strip()}; {emulator} -cpu help lists what it knows")
    return machines
