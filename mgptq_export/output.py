"""Where packages are written: folders that appear whole or not at all, and the work of runs that were stopped."""

import json
import logging
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mgptq_export.journal import Journal, Record
from mgptq_runtime.errors import BadInputError, DistributedError, MgptqError, OutOfMemoryError, OutputExistsError
from mgptq_runtime.package import MANIFEST_FILE
from mgptq_runtime.signals import signals_held_back
from mgptq_runtime.strict_json import MAX_JSON_BYTES, parse_json_object

__all__ = [
    "MANIFEST_KEYS",
    "SWEEP_FILE",
    "SWEEP_PAGE",
    "UnfinishedRun",
    "new_folder",
    "reason",
    "unfinished_run",
]

logger = logging.getLogger(__name__)

MANIFEST_KEYS = {"name", "bits", "layouts", "targets", "files"}
LOCK_FILE = "lock"
SWEEP_FILE, SWEEP_PAGE = "sweep.json", "sweep.html"
# A folder with one of these files, with such keys, is what this program wrote.
MARKS = {MANIFEST_FILE: MANIFEST_KEYS, SWEEP_FILE: {"name", "recipe", "evaluation", "rows"}}


@dataclass(frozen=True)
class UnfinishedRun:
    """A package under way.

    Attributes:
        folder: becomes the package.
        journal: what has been finished.
        resumed: whether the journal is that of a run that was stopped.
    """

    folder: Path
    journal: Journal
    resumed: bool
    _identity: Journal

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say what the journal's records depend on, as JSON values.

        Raises:
            OutputExistsError: the run that was stopped depended on something else, which is named.
        """
        flat = dict(_flat(json.loads(json.dumps(identity))))
        known = self._identity.get("run")
        if known is None:
            self._identity.put("run", Record(facts=flat))
            return
        names = sorted(flat.keys() | known.facts.keys())
        changed = [name for name in names if flat.get(name) != known.facts.get(name)]
        if changed:
            lines = [f"{name} was {known.facts.get(name)!r} and is {flat.get(name)!r}" for name in changed]
            raise OutputExistsError(
                f"the run that was stopped was another one: {'; '.join(lines)}. Give --resume what it was started "
                "with, or start anew with --overwrite"
            )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


@contextmanager
def unfinished_run(out: Path, *, overwrite: bool, resume: bool, one_task: bool = True) -> Iterator[UnfinishedRun]:
    """What becomes ``out`` when the block ends well; when it does not, what its journal holds is kept for a next run.

    That is ``OUT.unfinished``, beside ``out``. It is not kept where there is nothing in it, nor where one task that was
    not resumed fails by its input: that would fail again.

    Args:
        overwrite: replace ``out`` in the end, and start anew where a run was stopped.
        resume: go on where a run was stopped.
        one_task: whether ``resume`` does what was asked at first and nothing else. Of several tasks, the one that fails
            can be left out.

    Raises:
        OutputExistsError: ``out`` exists and may not be replaced; a run that was stopped is there and nothing was said
            of it; or another process is at work on ``out``.
        BadInputError: nothing can be written there.
    """
    out = _real_path(out)
    work = _work_of(out)
    if resume and not overwrite and not work.exists() and any(_mark(out, name) for name in MARKS):
        raise OutputExistsError(
            f"{out} is complete, there is nothing to resume; for something else choose another folder"
        )
    _check_replaceable(out, overwrite)
    with _claimed(work, out):
        journal = Journal(work / "journal")
        resumed = resume and not journal.empty
        if resume and not resumed:
            logger.warning("there is nothing to resume of %s: starting from the beginning", out)
        if not resumed:
            _discard(work, journal, overwrite, out)
        package = work / "package"
        try:
            shutil.rmtree(package, ignore_errors=True)
            package.mkdir()
            yield UnfinishedRun(package, journal, resumed, Journal(work))
            kept = journal.kept
            logger.debug(
                "kept %d records of %.1f MB for --resume in %.1f s", kept.records, kept.bytes / 1e6, kept.seconds
            )
            _publish(package, out, overwrite, work / "old")
        except BaseException as error:
            keeps = not journal.empty and (resumed or not one_task or not _by_input(error))
            shutil.rmtree(package if keeps else work, ignore_errors=True)
            if keeps:
                print(f"what was finished is in {work}; the same command with --resume goes on", file=sys.stderr)
            if isinstance(error, OSError | SafetensorError):
                raise BadInputError(f"writing {out} failed: {reason(error)}") from error
            raise
        shutil.rmtree(work, ignore_errors=True)


def _work_of(out: Path) -> Path:
    """Where ``out`` is made, beside it."""
    return out.parent / f"{out.name}.unfinished"


@contextmanager
def _claimed(work: Path, out: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; it goes again where nothing has been put there."""
    claim = FileLock(work / LOCK_FILE)
    try:
        with signals_held_back():
            _claim(claim, work, out)
        yield
    finally:
        if claim.is_locked:
            with suppress(OSError):
                if [path.name for path in work.iterdir()] == [LOCK_FILE]:
                    shutil.rmtree(work)
            claim.release()


def _claim(claim: FileLock, work: Path, out: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
        claim.acquire(timeout=0)
    except Timeout as error:
        raise OutputExistsError(
            f"another process is at work on {out}; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise BadInputError(f"{out} cannot be written: {error.strerror}") from error


def _by_input(error: BaseException) -> bool:
    others = OutputExistsError | OutOfMemoryError | DistributedError
    is_known = isinstance(error, MgptqError) and not isinstance(error, others)
    return is_known and not isinstance(error.__cause__, OSError)


def _discard(work: Path, journal: Journal, overwrite: bool, out: Path) -> None:
    """Make room for a run that starts anew."""
    if not journal.empty and not overwrite:
        raise OutputExistsError(
            f"a run for {out} was stopped, what it finished is in {work}; go on with --resume, or start anew with "
            "--overwrite"
        )
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


@contextmanager
def new_folder(out: Path, *, overwrite: bool, parts: Collection[str] | None = None) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        overwrite: replace ``out`` in the end.
        parts: files and folders in ``out`` that are replaced, all else comes into the new folder as it is; None for
            all.

    Raises:
        OutputExistsError: ``out`` exists and may not be replaced, or another process is at work on it; an old one
            survives until the new one is complete.
        BadInputError: nothing can be written there.
    """
    out = _real_path(out)
    _check_replaceable(out, overwrite, parts)
    work = _work_of(out)
    with _claimed(work, out):
        partial, old = work / "new", work / "old"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            _publish(partial, out, overwrite, old, parts)
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"writing {out} failed: {reason(error)}") from error
        finally:
            for folder in (partial, old):
                shutil.rmtree(folder, ignore_errors=True)
            if Journal(work / "journal").empty:
                shutil.rmtree(work, ignore_errors=True)


def reason(error: Exception) -> str:
    """Why something could not be written. NumPy says of a full disk only how many items it wrote."""
    if isinstance(error, OSError):
        return error.strerror or f"{error}; No space left on device?"
    return str(error)


def _publish(folder: Path, out: Path, overwrite: bool, old: Path, parts: Collection[str] | None = None) -> None:
    """Let a complete folder take its place; what it replaces becomes ``old``, which may be deleted."""
    if overwrite:
        _check_replaceable(out, overwrite, parts)  # it may have appeared meanwhile
        _replace_folder(folder, out, old)
    else:
        folder.rename(out)  # fails where something has appeared in the meantime


def _real_path(out: Path) -> Path:
    """``out`` without links and dots, so that it can be renamed."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:
        raise BadInputError(f"{out} cannot be written: {error}") from error


def _check_replaceable(out: Path, overwrite: bool, parts: Collection[str] | None = None) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; choose another folder, or pass --overwrite to replace it")
    if out.is_mount():
        raise OutputExistsError(f"{out} is a mount point, which cannot be replaced; choose a folder inside it")
    if not _is_ours(out):
        raise OutputExistsError(f"{out} is not a folder that this program wrote; --overwrite will not replace it")
    _check_only_ours(out, parts)


def _check_only_ours(folder: Path, parts: Collection[str] | None) -> None:
    """Refuse to delete what others put into a folder of ours, or into these parts of it, hidden files included."""
    own = _own_files(folder)
    for path in sorted(folder.rglob("*")):
        deleted = parts is None or path.relative_to(folder).parts[0] in parts
        if deleted and path not in own and (path.is_symlink() or not path.is_dir()):
            raise OutputExistsError(
                f"{path} is not what this program wrote, and would be deleted; move it elsewhere, or choose another "
                "folder"
            )


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    return any(_mark(out, name) for name in MARKS) or not any(out.iterdir())


def _own_files(folder: Path) -> set[Path]:
    """What a package's manifest lists, or those of a sweep, and the files that say so."""
    own = set()
    if manifest := _mark(folder, MANIFEST_FILE):
        files = manifest["files"]
        listed = [file.get("path") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        own |= {folder / MANIFEST_FILE, *(folder / path for path in listed if isinstance(path, str))}
    if _mark(folder, SWEEP_FILE):
        packages = (path for path in folder.iterdir() if path.is_dir())
        own |= {folder / SWEEP_FILE, folder / SWEEP_PAGE}.union(*map(_own_files, packages))
    return own


def _mark(folder: Path, name: str) -> dict[str, Any]:
    """What a file of :data:`MARKS` holds; empty where the folder has none of ours."""
    try:
        values = parse_json_object((folder / name).read_bytes(), MAX_JSON_BYTES)
    except (OSError, ValueError):
        return {}
    return values if values.keys() >= MARKS[name] else {}


def _replace_folder(new: Path, out: Path, old: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:  # an interrupt, too
        old.rename(out)
        raise
