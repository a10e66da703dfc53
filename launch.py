"""How a script starts and ends. A script that runs imports it before torch, which takes seconds:
from then on Ctrl-C is one line. A script that is imported does not, since this has an effect.
"""

import errno
import os
import signal
import sys


def end(*signal_and_frame):
    """At once: an exception would come out of torch's half-done import as another one."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


# What a shell starts with & ignores Ctrl-C, and goes on ignoring it.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)


def start(main):
    """Runs a script's main. Ctrl-C is one line and code 130; of a standard output that nobody takes
    (`| head`) no word and code 1; that does not fit on the disk one line and code 2.
    """
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename:
            raise
        # What is left in its buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
