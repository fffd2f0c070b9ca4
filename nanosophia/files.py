"""Files that are on the disk as a whole or not at all, and are what their name says.

Nothing is written through a link and nothing is read that is not a regular file: a name in a folder
that others can write to may be a link, a pipe or a device.
"""

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST_TEXT = 256 << 20  # bytes of a description; beyond it a file is something else


def write_text(path: Path, text: str) -> None:
    """Replaces a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file atomically: after a kill or a power cut it is the old one or the new.

    Makes missing folders. Raises OSError where the disk refuses; the old file is untouched then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with create(partial) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync(path.parent)


def create(path: Path) -> BinaryIO:
    """Opens a new file to write and read, in place of a file or link of that name."""
    path.unlink(missing_ok=True)
    return open(path, "x+b")


def reopen(path: Path, flags: int = os.O_RDWR) -> BinaryIO:
    """Opens a file to go on writing it; raises OSError where it is a link or no regular file."""
    mode = {os.O_RDWR: "r+b", os.O_WRONLY | os.O_APPEND | os.O_CREAT: "ab"}[flags]
    return open(_regular(path, flags | os.O_NOFOLLOW), mode)


def append_text(path: Path, text: str) -> None:
    """Appends to a text file, which is made if it is missing."""
    with reopen(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
        file.write(text.encode())


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read; raises OSError where it is no regular file, instead of waiting."""
    return open(_regular(path, os.O_RDONLY), "rb")


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file that describes something; raises OSError on a huge one."""
    with open_file(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """Returns what the system says of an error."""
    return error.strerror or str(error)


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # else a pipe would be waited for
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor
