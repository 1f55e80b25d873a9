"""The shell lines of a job's batch script before and after srun: what the ranks need, and whether
it begins again.

The batch script decides and not a task: it outlives them all, so it sees every way to end, and no
    rank is cut off.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from tapct.cluster import task

PLACES = "places"  # file in a job's folder: RUN/jobs/<time> of each run of the array, a line each

# Bounds are looked at before srun too: SLURM requeues by itself, after a node has died say, and
# asks nobody. `latest` names the newest checkpoint; a start that leaves it as it found it was in
# vain.
BOUNDS = """\
newest() { cat "$TAPCT_PLACE/../../checkpoints/latest" 2>/dev/null || echo none; }
in_vain() { awk -v now="$(newest)" '{ n = $0 == now ? n + 1 : 0 } END { print n + 0 }' "$TAPCT_STARTS"; }
give_up() {
    echo "tapct: $1"
    printf '{"event": "gave up", "time": %s, "why": "%s"}\\n' "$(date +%s)" "$1" >> "$TAPCT_PLACE/events.jsonl"
    exit 1
}
check_bounds() { # restarts, with the one in question
    if [ "$1" -gt MAX_RESTARTS ]; then
        give_up "restarted MAX_RESTARTS times (--max-restarts); submit again to go on"
    fi
    set -- "$(in_vain)"
    if [ "$1" -gt MAX_IDLE ]; then
        give_up "$1 starts in a row saved nothing new (--max-idle-restarts MAX_IDLE); see the logs, then submit again"
    fi
}
: >> "$TAPCT_STARTS"
check_bounds "${SLURM_RESTART_COUNT:-0}"
newest >> "$TAPCT_STARTS"
"""

# After srun. 128 + number: a signal killed a rank while its Python was still starting, before it
# could leave a mark. A rank that crashes leaves none either, and srun then stops the others: that
# is no reason to begin again.
REQUEUE = """\
code=$?
case "$(cat "$TAPCT_MARK" 2>/dev/null):$code" in
    stopped:13[245679]) exit "$code" ;;
    stopped:* | :138 | :140 | :143) ;;
    *) exit "$code" ;;
esac
state="$(scontrol show job -o "$TAPCT_JOB" | grep -o 'JobState=[A-Z_]*')"
if [ "${state:-JobState=RUNNING}" != JobState=RUNNING ]; then # cancelled, or requeued by SLURM itself
    echo "tapct: $state, so not requeued from here"
    exit 0
fi
check_bounds "$((${SLURM_RESTART_COUNT:-0} + 1))"
for attempt in 1 2 3; do
    scontrol requeue "$TAPCT_JOB" && echo "tapct: requeued" && exit 0
    sleep 2
done
give_up "could not requeue; submit again to go on"
"""


def setup_lines(folder: Path, code: Path, max_restarts: int, max_idle_restarts: int) -> list[str]:
    """Shell lines before srun: where the ranks meet, which tapct they import, and no start that is
    one too many.

    RANK and WORLD_SIZE of the submitting shell would win over SLURM's, so they go.

    Args:
        folder: RUN/jobs/<time>, with `PLACES`.
        code: folder of the tapct that the job runs.
        max_restarts: requeues after which it gives up.
        max_idle_restarts: those in a row since the last new checkpoint.
    """
    job = f'{shlex.quote(str(folder))}/"$TAPCT_JOB"'
    bounds = BOUNDS.replace("MAX_RESTARTS", str(max_restarts)).replace(
        "MAX_IDLE", str(max_idle_restarts)
    )
    return [
        'export TAPCT_JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'export TAPCT_JOB="${TAPCT_JOB:-$SLURM_JOB_ID}"',
        f"export {task.MARK}={job}.end",
        f'rm -f "${task.MARK}"',
        f'TAPCT_PLACE="$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" '
        f'{shlex.quote(str(folder / PLACES))})"',
        f"TAPCT_STARTS={job}.starts",
        *bounds.splitlines(),
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "unset RANK WORLD_SIZE LOCAL_RANK",
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"',
        "trap : TERM USR1 USR2  # the lines after srun must run when this shell is signalled too",
    ]


def requeue_lines() -> list[str]:
    """Shell lines after srun: requeue the job if a signal ended it, but not one that was cancelled,
    nor for ever.
    """
    return REQUEUE.splitlines()
