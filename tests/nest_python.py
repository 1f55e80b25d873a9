"""Stands for `python` where a test cannot choose how a process is started: the nest runs it.

`python -I -S nest_python.py ARGUMENTS`. It passes signals on and ends as the process ends; when it
is killed, the nest kills the process. It imports little, since it is started often.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Ask the nest for the process, and wait for its end."""
    nest = socket.socket(socket.AF_UNIX)
    nest.connect(os.environ["TAPCT_TEST_NEST"])
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    socket.send_fds(nest, [b"{"], [1, 2])
    nest.sendall(json.dumps(request).encode()[1:] + b"\n")
    answers = nest.makefile()
    process = int(answers.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = int(answers.readline())
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
