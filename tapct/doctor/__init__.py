"""`tapct doctor`: is this machine ready to train?

    checkup.py    runs all checks and prints a line for each
    facts.py      what was measured: plain data, and the line of a check
    verdicts.py   facts -> ok, warn or fail, with a remedy; pure functions
    machine.py    facts that are read without torch: packages, CPUs, limits, SLURM
    probes.py     probes in processes of their own: how they are started, report and are ended
    device.py     probe of torch, GPUs, attention and collectives
    site.py       probe of a config and its store
    folders.py    probe of the room in a folder

    selftest.py        `--selftest`: short runs in several ways, compared; proofs, table and JSON
    selftest_ranks.py  ranks of a self-test in processes of their own
    short_run.py       some training steps on synthetic scans in memory
    host_waits.py      whether a step would make the host wait, on a fake GPU
    fake_cuda.py       a GPU that computes nothing: fake CUDA tensors on any machine

Without `--selftest`, the process of the command itself never loads torch or numpy: a probe that
hangs is ended, and all that it had reported before counts.
"""
