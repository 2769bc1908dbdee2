"""python tether.py PARENT COMMAND...: become COMMAND, and be sent SIGTERM by the kernel when process PARENT dies.

However the parent ends, kill -9 included, no training is left running that nobody watches. PARENT 0 stands for
whichever process started this one. The standard library alone, and started by path: it costs a few milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]) or os.getppid(), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):  # outlives exec
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit(f"error: process {parent}, which started this one, is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
