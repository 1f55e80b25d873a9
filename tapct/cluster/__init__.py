"""Submit runs to SLURM, requeue them after a preemption, list and cancel their jobs.

    submit.py          checks runs, writes their folders and hands them to the scheduler
    sweep.py           the product of the values of --sweep, one run folder per combination
    local_sweep.py     trains a sweep on this machine, for `tapct sweep`
    snapshot.py        copies tapct into the run folder: a job runs the code that was submitted
    resources.py       what a job requests: time limit, nodes, GPUs, memory
    sbatch_options.py  options of sbatch that are passed on
    site.py            defaults of a cluster, from a file
    mounts.py          folders that a job needs in a container
    arrays.py          index, pack, embed and eval as arrays of jobs, each of which does one part
    task.py            what each task of a job does: it trains, and leaves how it ended
    jobs.py            finds submitted runs, reads their progress, cancels their jobs
    slurm.py           SLURM's time and memory formats, its queue, cancelling
    script.py          the SLURM batch script, and handing it to sbatch (through submitit)
    restarts.py        when a job is started again: lines of the batch script

Three files contain the commands and formats of SLURM: `slurm.py`, `script.py` and `restarts.py`,
which holds shell lines for `script.py`. Another scheduler, PBS for example, needs three files with
the same functions and types:

    function                     called by           what it does
    slurm.time_limit_minutes     tapct submit        reads --time
    slurm.memory_size            tapct submit        reads --mem
    slurm.require_commands       submit.submit_runs  UserError where jobs cannot be submitted
    slurm.read_queue             submit, jobs        jobs of the user: state, restarts, reason
    slurm.cancel_ids             jobs.cancel_jobs    cancels jobs
    script.training_lines        submit.submit_runs  shell lines around the ranks of a job
    script.element_lines         arrays.py           shell lines around an element of an array
    script.make_batch_script     submit --dry-run    makes the text of the batch script
    script.submit_tasks          submit, arrays      submits one job or one array, returns ids
    restarts.lines_before        script.py           shell lines before the ranks start
    restarts.lines_after         script.py           shell lines after the ranks have ended

`jobs.py` also imports the type `slurm.QueuedJob` (one job in the queue), and `submit.py` and
`arrays.py` the type `script.JobFolders` (the folders of a job). `cli/submitted_resources.py` reads
time limit and memory with `slurm`. `cli/cluster.py` calls read_queue too, for `tapct jobs`.
`script.py` uses submitit's SlurmExecutor, which knows no other scheduler.

The batch script must start `task.run_task` once per rank, export TAPCT_MARK, and decide by that
file and the exit code of the ranks whether the job is requeued. docs/extending.md lists everything
that it does.

These other places depend on SLURM as well, and have to be changed:

- Nothing selects a scheduler. `submit.py` and `arrays.py` import `slurm` and `script` by name,
  `jobs.py`, `cli/cluster.py` and `cli/submitted_resources.py` import `slurm`.
- `jobs.py` recognises only job IDs such as `12` and `12_3`; PBS has IDs such as `123.server`.
- `task.py` reads SLURM_RESTART_COUNT and SLURM_JOB_NODELIST.
- `resources.py` and `sbatch_options.py` hold the options of sbatch. `site.py` reads two keys with
  such options, `sbatch` and `srun-args`.
- `base/ranks.py` reads variables of SLURM for rank and world size (LAUNCHERS), restarts
  (`restarts`), ranks per node (`per_node`) and the address at which the ranks meet (`rendezvous`,
  `first_host`). PLACE_VARIABLES lists the variables that a child process must not inherit.
- `base/lease.py` reads SLURM_JOB_ID, so that a requeued job takes over its run folder at once.
- `base/launcher.py` reads the number of tasks of the job, to notice that srun was forgotten.
- `base/ending.py` reads the name of the node, and `run/provenance.py` job and nodes, for run.json.
- `engine/stop.py` reads SLURM_JOB_END_TIME, the time at which the job ends.
- `run/background_eval.py` calls sbatch from inside a job to evaluate during
  training. It lies below this folder in the order of imports, so it uses none of these functions.
- `eval/runner.py` has the settings eval.during.how and eval.during.sbatch, `run/rules.py` the rules
  about them, and `cli/submit_options.py` the help texts of the options of sbatch.
- `doctor/machine.py` asks sinfo and squeue whether the cluster responds, and `doctor/verdicts.py`
  names SLURM in its lines.
"""
