"""Stands for `python` where a test cannot choose how a process is started: the nest runs it.

`python -I -S nest_python.py ARGUMENTS`. It passes signals on and ends as the process ends; when it
is killed, the nest kills the process. It imports little, since it is started often.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Ask the nest for the process, and wait for its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a process to pass them to
    nest = socket.socket(socket.AF_UNIX)
    nest.connect(os.environ["TAPCT_TEST_NEST"])
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    socket.send_fds(nest, [b"{"], [1, 2])
    nest.sendall(json.dumps(request).encode()[1:] + b"\n")
    answers = nest.makefile("rb", buffering=0)  # a line that is read ahead would not be waited for
    process = int(answers.readline())
    # a signal just before a read would wait for the end of the read: the pipe ends the wait
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(process, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while nest not in select.select([nest, woken], [], [])[0]:
        woken.recv(4096)  # the handler runs now
    code = int(answers.readline())
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
