"""How every command starts and ends: with one line for whatever its user can cause."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from nanosophia.configurator import UserError

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Unable to allocate")


def command(*, cleanup: Callable[[], None] | None = None) -> Callable:
    """Decorates a command's main(argv), so that all commands end alike; always calls `cleanup`.

    A UserError is printed as one line, with the rank where it is not the first. Ctrl-C exits with
    130, a lack of memory with 1, a file that cannot be read or written with 2, and a reader of the
    output that has gone, such as head, ends it as SIGPIPE does. A traceback is left to what no user
    can cause.
    """
    def decorate(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        @functools.wraps(main)
        def run(argv: list[str]) -> None:
            with _interrupts():
                try:
                    _prepare_streams()
                    main(argv)
                    sys.stdout.flush()  # so that a full disk or a closed pipe is noticed here
                except SystemExit:
                    raise
                except BaseException as error:
                    _exit(*_ending(error))
                finally:
                    if cleanup is not None:
                        cleanup()

        return run

    return decorate


def _ending(error: BaseException) -> tuple[int, str, str]:
    """Returns exit code, prefix and line of an error; raises it again where it is not a user's."""
    words = " ".join(str(error).split())
    if isinstance(error, UserError):
        if error.everywhere and os.environ.get("LOCAL_RANK", "0").strip("0"):
            time.sleep(5)  # where the first rank says the same, torchrun ends this one meanwhile
        return error.exit_code, error.prefix, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "", "interrupted"
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, "", ""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename is not None else "standard output or a file"
        return 2, "error: ", f"{where}: {error.strerror}"
    if isinstance(error, UnicodeError):
        return 2, "error: ", f"text that is not valid Unicode: {words}"
    if type(error).__name__ == "PanicException":  # of a library in Rust; no subclass of Exception
        return 2, "error: ", f"a library refused its input: {words}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or \
            (isinstance(error, RuntimeError) and any(text in words for text in OUT_OF_MEMORY)):
        return 1, "error: ", "out of memory; lower the batch size, the number of "\
            "texts or the model's size"
    raise error


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Makes Ctrl-C an exception within it, where `startup` has made it end the process.

    One that hits where Python drops exceptions, such as a finaliser, comes again.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        yield
        return
    report, reporting = sys.unraisablehook, threading.Lock()

    def send() -> None:
        with reporting:  # within the hook it would be dropped again
            pass
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def repeat_interrupt(dropped) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        with reporting:
            threading.Thread(target=send, daemon=True).start()

    sys.unraisablehook = repeat_interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.unraisablehook = report


def _prepare_streams() -> None:
    """Opens closed standard streams, and lets those that are not UTF-8 show any text escaped."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: int, prefix: str, message: str) -> NoReturn:
    rank, message = os.environ.get("RANK", ""), message.replace("\n", "\\n")
    with contextlib.suppress(OSError):
        if message:
            where = f"rank {rank}: " if rank.strip("0").isdigit() else ""  # of several
            print(prefix + where + message, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would report it once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code) from None
