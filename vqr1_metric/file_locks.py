"""Files that one process writes at a time."""

from __future__ import annotations

import errno
import io
import os
import warnings
from pathlib import Path


class FileInUse(OSError):
    """Another process has the file."""


def open_locked(path: Path) -> io.FileIO:
    """The file for appending, created where it is missing, locked against other processes.

    The lock ends when the file is closed or the process ends, however that happens. A file that is removed or replaced
    while we wait is opened anew, so that nobody writes into what has no name any more.

    Raises:
        FileInUse: at once, if another process has it.
    """
    while True:
        file = path.open("ab", buffering=0)
        try:
            _lock(file.fileno())
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: a byte far behind the end, since a locked byte cannot be read by others
        import msvcrt

        os.lseek(descriptor, 1 << 40, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            raise FileInUse() from None
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileInUse() from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn("This file system has no locks: let no two runs write one file.", UserWarning, stacklevel=4)
