"""Nothing is written through a link, and nothing is read that is no regular file."""

import os

import pytest

from nanosophia.files import append_text, create, open_file, reopen, write_text


@pytest.fixture
def link(tmp_path):
    """A link to a file that must stay as it is."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    yield tmp_path / "link"
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("write", [reopen, lambda path: append_text(path, "x")])
def test_a_link_is_not_opened_for_writing(link, write):
    with pytest.raises(OSError):
        write(link)


@pytest.mark.parametrize("write", [lambda path: create(path).close(),
                                   lambda path: write_text(path, "x")])
def test_a_new_file_replaces_a_link(link, write):
    write(link)
    assert not link.is_symlink() and link.is_file()


def test_a_pipe_and_a_device_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_file(path)
