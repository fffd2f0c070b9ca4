"""The lock of a run's folder: two processes must not train in it at once."""

import fcntl
import os
import socket
from pathlib import Path

from nanosophia.checkpoint import CheckpointError


class RunLock:
    """Lets one process at a time train in a run's folder; a context, released on exit.

    The operating system releases the lock with the process that holds it, however that ends.
    """

    def __init__(self, out_dir: Path):
        self._folder, self._file = out_dir, None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Makes the folder and takes the lock, unless this process holds it already.

        Raises CheckpointError when another process holds it, or the folder is not writable.
        """
        if self._file is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = open(self._folder / "lock", "a+")  # noqa: SIM115 (held to the end)
        except OSError as error:
            raise CheckpointError(f"cannot write to --out_dir={self._folder}: {error.strerror}; "
                                  "give another one") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise CheckpointError(f"{self._folder} is in use by {holder}; wait for it, stop it, or "
                                  "give another --out_dir") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
