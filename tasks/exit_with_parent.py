"""python exit_with_parent.py PID COMMAND...: exec COMMAND; the kernel sends it SIGTERM when its parent PID dies.

No training outlives its flow, even after kill -9. PID 0 stands for the current parent. Imports the standard library
only and is started by path, which takes a few milliseconds.
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
    if os.getppid() != parent:  # it died before prctl
        sys.exit(f"error: parent process {parent} has exited")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
