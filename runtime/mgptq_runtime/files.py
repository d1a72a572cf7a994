"""Files of strangers: opened once, and used as what was opened, whatever their path names later."""

import errno
import mmap
import os
import stat
from io import BufferedReader
from pathlib import Path

from mgptq_runtime.errors import PackageError

__all__ = ["Buffer", "compare_sha256", "identity", "map_whole", "open_in_folder", "open_regular"]

Buffer = bytes | mmap.mmap


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device is refused without waiting for it.

    Args:
        follow_links: whether ``path`` may be a symbolic link.

    Raises:
        OSError: it cannot be opened, is a link (``ELOOP``), or is no regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def open_in_folder(folder: Path, relative: str) -> BufferedReader:
    """Open a file of a package, which must lie in the package itself.

    Args:
        relative: its path in ``folder``, with slashes and without ``..``.

    Raises:
        PackageError: it is missing or unreadable, is or lies behind a symbolic link, or has a second name.
    """
    path = folder / relative
    try:
        for link in (path, *path.parents[: relative.count("/")]):
            if link.is_symlink():
                raise PackageError(
                    f"{link} is a link; a package holds its files themselves: copy the file in its place"
                )
        stream = open_regular(path, follow_links=False)
    except FileNotFoundError as error:
        raise PackageError(f"{path} is missing; copy or export the package again") from error
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror or error}; copy the package again") from error
    names = os.fstat(stream.fileno()).st_nlink
    if names > 1:
        stream.close()
        raise PackageError(
            f"{path} is a hard link, {names} names of one file that may lie outside the package; "
            "put a copy in its place"
        )
    return stream


def map_whole(stream: BufferedReader) -> Buffer:
    """The content of an open file, mapped read-only; empty bytes for an empty file.

    Raises:
        OSError: it cannot be mapped.
    """
    if not os.fstat(stream.fileno()).st_size:
        return b""
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def compare_sha256(path: Path, actual: str, stated: str) -> None:
    """Compare two SHA-256 in hexadecimal: a file's, and what the manifest says of it.

    Raises:
        PackageError: they differ.
    """
    if actual != stated:
        raise PackageError(f"{path} has SHA-256 {actual}, the manifest says {stated}; copy or export it again")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What differs as soon as a path names another file, or its file was changed or renamed."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
