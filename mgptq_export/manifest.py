"""``manifest.json`` of a package: what it is, and the hash of every file in it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mgptq_export.layouts import LAYOUTS
from mgptq_export.output import MANIFEST_KEYS
from mgptq_runtime.errors import PackageError
from mgptq_runtime.package import MANIFEST_FILE, MANIFEST_VERSION, file_sha256, is_hidden, read_file_entry
from mgptq_runtime.strict_json import MAX_JSON_BYTES, parse_json_object

__all__ = ["check_no_links", "listed_files", "read_manifest", "verify", "verify_files"]


def read_manifest(package: Path) -> dict[str, Any]:
    """``manifest.json`` of a package.

    Raises:
        PackageError: there is none that can be read.
    """
    try:
        manifest = parse_json_object((package / MANIFEST_FILE).read_bytes(), MAX_JSON_BYTES)
        if manifest["format_version"] != MANIFEST_VERSION:
            raise PackageError(f"{package}: manifest version {manifest['format_version']} is not {MANIFEST_VERSION}")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise PackageError(f"{package}: the manifest lacks {', '.join(sorted(missing))}; quantize the model again")
        bits, files, targets = manifest["bits"], manifest["files"], manifest["targets"]
        if not (isinstance(bits["stored"], float) and "requested" in bits and isinstance(targets, list)):
            raise TypeError("bits or targets are not what this program writes")
        if not all(isinstance(target, str) for target in targets):
            raise TypeError("targets are not what this program writes")
        results = manifest.get("check", {}).get("results", {}).values()
        if not all(isinstance(result["passed"], bool) for result in results):
            raise TypeError("results of the check are not what this program writes")
        if not (isinstance(manifest["layouts"], dict) and len(manifest["layouts"].keys() & LAYOUTS.keys()) > 0):
            raise TypeError("layouts are not what this program writes")
        for file in files:
            read_file_entry(file)
    except OSError as error:
        found = f"holds no {MANIFEST_FILE}" if package.is_dir() else "is no folder"
        raise PackageError(
            f"{package} is no package: it {found}; make one with: mgptq-export run MODEL -o OUT"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(
            f"{package / MANIFEST_FILE} cannot be read ({error}); copy the package again, or make it again"
        ) from error
    return manifest


def verify(package: Path) -> list[dict[str, str]]:
    """What of a package is not as its manifest says: ``path`` and ``problem`` of every such file.

    Hidden files that others put there, such as the hub's, are no difference.

    Raises:
        PackageError: there is no manifest.
    """
    listed = {file["path"]: file for file in read_manifest(package)["files"]}
    present = {path.relative_to(package).as_posix() for path in _shown(package) if path.is_file()} - {MANIFEST_FILE}
    problems = {path: _problem(package, file) for path, file in listed.items()}
    problems |= dict.fromkeys(present - listed.keys(), "is not in the manifest")
    return [{"path": path, "problem": problem} for path, problem in sorted(problems.items()) if problem]


def _problem(package: Path, file: dict[str, Any]) -> str:
    """What is wrong with a file that the manifest lists; empty where nothing is."""
    path = package / file["path"]
    if not path.resolve().is_relative_to(package.resolve()):
        return "lies outside the package"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != file["bytes"]:
        return f"has {path.stat().st_size} bytes, the manifest says {file['bytes']}"
    found = file_sha256(path)
    return "" if found == file["sha256"] else f"has SHA-256 {found}, the manifest says {file['sha256']}"


def verify_files(package: Path, files: Sequence[dict[str, Any]]) -> None:
    """Check some of the files that a package's manifest lists.

    Raises:
        PackageError: one is missing, or not what the manifest says.
    """
    for file in files:
        if problem := _problem(package, file):
            raise PackageError(
                f"{package / file['path']} {problem}; copy the package again, or make that part of it again"
            )


def listed_files(folder: Path) -> list[dict[str, Any]]:
    """Path, size and hash of every file of a package but its manifest, and hidden ones that others put there."""
    return [
        {
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(_shown(folder))
        if path.is_file() and path != folder / MANIFEST_FILE
    ]


def check_no_links(package: Path) -> None:
    """Refuse links: what they lead to would end in what is made of the package.

    Raises:
        PackageError: one of the package's files or folders is a link.
    """
    for path in _shown(package):
        if path.is_symlink():
            raise PackageError(f"{path} is a link; a package holds its files themselves, so copy it with them")


def _shown(package: Path) -> Iterator[Path]:
    """What lies in a package, hidden files left out: the hub's and version control's own."""
    return (path for path in package.rglob("*") if not is_hidden(path.relative_to(package)))
