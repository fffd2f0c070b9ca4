"""The lock of a folder: two processes must not train in it, or prepare it, at once."""

import contextlib
import fcntl
import os
import re
import socket
from pathlib import Path
from typing import BinaryIO

from nanosophia.configurator import UserError
from nanosophia.files import read_bytes, reason, reopen

_held = set()  # lock files of this process


class LockError(UserError):
    """A folder is in use by another process, or cannot be written to."""


class FolderLock:
    """Lets one process at a time write to a folder; a context, released on exit.

    The operating system releases the lock with the process that holds it, however that ends.
    """

    def __init__(self, folder: Path):
        self._folder, self._file = folder, None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            _held.discard(self._file)
            self._file.close()

    def take(self) -> None:
        """Makes the folder and takes the lock, unless this process holds it already.

        Raises LockError when another process holds it, or the folder is not writable.
        """
        if self._file is not None:
            return
        try:
            self._file = self._open(self._folder / "lock")
        except BlockingIOError as error:
            raise LockError(f"{self._folder} is in use by {self._holder()}; wait for it, stop it, "
                            "or give another --out_dir") from error
        except OSError as error:
            raise LockError(f"cannot write to --out_dir={self._folder}: {reason(error)} "
                            f"({error.filename or 'lock'}); mend that, or give another one") \
                from error
        _held.add(self._file)

    def _open(self, path: Path) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and (path.stat().st_nlink > 1 or not self._holder()):
            raise LockError(f"{path} is a file that no lock of ours wrote; rename it, or give "
                            "another --out_dir")
        file = reopen(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            raise
        return file

    def _holder(self) -> str:
        """Returns which process the file names, "" where it is not of a lock."""
        text = read_bytes(self._folder / "lock").decode(errors="replace")
        return (text or "another process") if re.fullmatch(r"(process \d+ on \S+)?", text) else ""


def _release_in_child() -> None:
    """Closes a child's copies of the locks, with which it would hold them after its parent."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_release_in_child)
