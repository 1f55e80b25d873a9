"""Submit runs to SLURM, requeue them after a preemption, list and cancel their jobs.

    submit.py     checks runs, writes their folders and hands them to the scheduler
    sweep.py      the product of the values of --sweep, one run folder per combination
    snapshot.py   copies tapct into the run folder, so that a job runs the code that was submitted
    resources.py  what a job requests: time limit, nodes, GPUs, memory
    task.py       what each task of a job does: it trains and leaves a mark for the batch script
    jobs.py       finds submitted runs, reads their progress, cancels their jobs
    slurm.py      SLURM's time and memory formats, its queue, cancelling
    script.py     the SLURM batch script, and handing it to sbatch (through submitit)

Adding another scheduler, PBS for example, takes two files beside `slurm.py` and `script.py`. They
offer the same functions, and nothing else here runs a command of the scheduler:

    function                     called by           what it does
    slurm.time_limit_minutes     tapct submit        reads --time
    slurm.memory_size            tapct submit        reads --mem
    slurm.require_commands       submit.submit_runs  UserError where jobs cannot be submitted
    slurm.read_queue             submit, jobs        jobs of the user: state, restarts, reason
    slurm.cancel_ids             jobs.cancel_jobs    cancels jobs
    script.make_batch_script     submit --dry-run    makes the text of the batch script
    script.submit_tasks          submit.submit_runs  submits one job or one array, returns ids

The batch script must start `task.run_task` once per rank, export TAPCT_MARK, and requeue the job
when that file says `stopped`. `base/ranks.py` must know the scheduler's variables for rank and
world size, and `engine/stop.py` the one that says when the job's time ends.

Two files outside of this folder run commands of SLURM. `doctor/machine.py` asks sinfo and squeue
whether the cluster responds. `run/background_eval.py` calls sbatch from inside a job, to evaluate
beside training; it lies below this folder in the order of imports, and needs none of these
functions.
"""
