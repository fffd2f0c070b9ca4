"""Imported first where a command is run as a script: Ctrl-C ends it quietly from then on.

Importing torch takes seconds, in which Ctrl-C would print a traceback of whatever is being
imported. From `command.command` on, Ctrl-C is an exception again.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
