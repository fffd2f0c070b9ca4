"""Imported first where a command is run as a script: Ctrl-C ends it quietly from then on.

Importing torch takes seconds, in which Ctrl-C would print a traceback of whatever is being
imported. From `command.command` on, Ctrl-C is an exception again.
"""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_arguments() -> None:
    """Answers --help, and mistakes in train.py's arguments, at once: torch is imported later."""
    from nanosophia.command import command
    from nanosophia.configurator import load
    from nanosophia.options import USAGE, Config
    command()(lambda argv: load(Config, argv, USAGE))(sys.argv[1:])
