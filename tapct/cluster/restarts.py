"""When a job is started again, and when it gives up: shell lines of the batch script.

The batch script decides this and not a task, since it outlives all tasks: it sees every way in
which they can end, and no rank is cut off. It needs no Python, so that it also works where Python
exists only in a container.

    how the ranks ended                                  what the batch script does
    all steps are done                                   ends with exit code 0
    stopped by a signal or the time limit, and saved     requeues the job
    lost: a rank was killed or hangs, a node is gone,    records the cause and requeues the job;
        a GPU does not work                              a node that was lost twice is excluded
    failed: an error that a new start would repeat       ends with the exit code of the ranks

Files beside the batch script, for a job with the id JOB:

    JOB.end      how the first rank ended, see `base/ending.py`
    JOB.starts   one line per start: the newest checkpoint when it began
    JOB.lost     one line per start that was lost: that checkpoint, the nodes, the cause
    JOB.avoided  nodes that a start has left because they had lost too many starts
    JOB.srun     messages of srun
    JOB.running  exists while the batch script runs: when it began, then its nodes, the first on top

If the first node of a job fails, its batch script ends too, and SLURM starts the job again. The new
start then finds JOB.running, and asks SLURM which of these nodes is down or was booted since then.
"""

from __future__ import annotations

from pathlib import Path

from tapct.base import ending
from tapct.cluster.resources import Resources
from tapct.run_folder import JobFolder, RunFolder

LOSSES_UNTIL_EXCLUDED = 2  # starts that a node may lose before the job avoids it

# The bounds are checked before srun too, because SLURM may requeue a job by itself, for example
# after its first node has failed, without asking this script. `latest` names the newest checkpoint;
# a start was idle if it left that file as it was. A start that was lost counts for --max-failures
# and not for --max-idle-restarts.
# JOB.avoided keeps a job from leaving a node in every start if SLURM does not accept the exclusion.
BOUNDS = """\
newest() { cat "$TAPCT_PLACE/LATEST" 2>/dev/null || echo none; }
at_the_end() { # lines at the end of a file that begin with the newest checkpoint
    awk -v now="$(newest)" '{ n = $1 == now ? n + 1 : 0 } END { print n + 0 }' "$1"
}
record() { # event, why, nodes
    printf '{"event": "%s", "time": %s, "why": "%s", "nodes": "%s"}\\n' "$1" "$(date +%s)" \\
        "$2" "${3:-}" >> "$TAPCT_PLACE/EVENTS"
}
give_up() {
    echo "tapct: $1"
    record "gave up" "$1"
    rm -f "$TAPCT_FILES.running"
    exit 1
}
check_bounds() { # number of restarts, including the one in question
    if [ "$1" -gt MAX_RESTARTS ]; then
        give_up "restarted MAX_RESTARTS times (--max-restarts); submit again to resume"
    fi
    set -- "$(at_the_end "$TAPCT_FILES.starts")" "$(at_the_end "$TAPCT_FILES.lost")"
    if [ "$2" -gt MAX_FAILURES ]; then
        give_up "$2 starts in a row were lost without a new checkpoint (--max-failures \\
MAX_FAILURES), the last one by: $(tail -n 1 "$TAPCT_FILES.lost" | cut -d ' ' -f 3-)"
    fi
    if [ "$(($1 - $2))" -gt MAX_IDLE ]; then
        give_up "$(($1 - $2)) starts in a row saved nothing new (--max-idle-restarts MAX_IDLE); \\
see the logs, then submit again"
    fi
}
record_loss() { # why, nodes
    local why
    why="$(printf '%s' "$1" | tr -d '"\\\\' | tr '\\n\\t' '  ' | cut -c -MOST_CHARACTERS)"
    echo "tapct: lost: $why"
    record lost "$why" "$2"
    echo "$(tail -n 1 "$TAPCT_FILES.starts") $2 $why" >> "$TAPCT_FILES.lost"
}
own_nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }
fallen_nodes() { # nodes of the previous start that are down, or were started again since it began
    local began nodes line at
    began="$(sed -n 1p "$TAPCT_FILES.running")"
    case "$began" in '' | *[!0-9]*) return ;; esac
    nodes="$(sed 1d "$TAPCT_FILES.running" | grep . | paste -sd,)"
    scontrol show node -o "$nodes" 2>/dev/null | while read -r line; do
        case "$(echo "$line" | sed -nE 's/.* State=([^ ]*).*/\\1/p')" in
            DOWN* | FAIL* | *NOT_RESPONDING* | *'*'*) echo "$line" ;;
            *) for at in $(echo "$line" | grep -oE '(BootTime|SlurmdStartTime)=[0-9][^ ]*'); do
                at="$(date -d "${at#*=}" +%s 2>/dev/null)"
                if [ "${at:-0}" -gt "$began" ]; then echo "$line"; break; fi
            done ;;
        esac
    done | sed -nE 's/^NodeName=([^ ]+).*/\\1/p'
}
excluded_nodes() {
    local names
    names="$(scontrol show job -o "$TAPCT_JOB" | sed -nE 's/.* ExcNodeList=([^ ]*).*/\\1/p')"
    if [ -n "$names" ] && [ "$names" != "(null)" ]; then scontrol show hostnames "$names"; fi
}
bad_nodes() { # nodes that lost LOSSES starts, if enough others are left
    local bad all left
    bad="$(awk '{ k = split($2, names, ","); for (i = 1; i <= k; i++)
        if (names[i] != "UNKNOWN" && ++n[names[i]] == LOSSES) print names[i] }' \\
        "$TAPCT_FILES.lost" | sort)"
    if [ -z "$bad" ]; then return; fi
    all="$(sinfo --noheader --Node --format=%N --partition="$SLURM_JOB_PARTITION" | sort -u)"
    left="$(comm -23 <(echo "$all") <({ echo "$bad"; excluded_nodes; } | sort -u) | grep -c .)"
    if [ "$left" -lt "${SLURM_JOB_NUM_NODES:-1}" ]; then
        echo "tapct: $(echo $bad) lost LOSSES starts, but too few other nodes are left" >&2
        return
    fi
    echo "$bad"
}
exclude() { # nodes; only a job that waits can be changed, so this follows the requeue
    local all
    all="$({ echo "$1"; excluded_nodes; } | sort -u | paste -sd,)"
    scontrol update JobId="$TAPCT_JOB" ExcNodeList="$all" &&
        echo "tapct: excluded $(echo $1), which lost LOSSES starts"
}
requeue() {
    local bad
    bad="$(bad_nodes)"
    trap '' TERM # SLURM ends all that runs here while it requeues the job
    for attempt in 1 2 3; do
        if scontrol requeue "$TAPCT_JOB"; then
            echo "tapct: requeued"
            if [ -n "$bad" ]; then exclude "$bad"; fi
            exit 0
        fi
        sleep 2
    done
    give_up "could not requeue; submit again to resume"
}
leave_bad_nodes() { # a start that SLURM has begun by itself may lie on a node to be excluded
    local bad
    bad="$(comm -12 <(bad_nodes) <(own_nodes | sort))"
    bad="$(comm -23 <(echo "$bad") <(sort "$TAPCT_FILES.avoided"))"
    if [ -n "$bad" ]; then
        echo "$bad" >> "$TAPCT_FILES.avoided"
        echo "tapct: $(echo $bad) lost LOSSES starts, so the job leaves it"
        rm -f "$TAPCT_FILES.running"
        requeue
    fi
}
touch "$TAPCT_FILES.starts" "$TAPCT_FILES.lost" "$TAPCT_FILES.avoided"
if [ -e "$TAPCT_FILES.running" ]; then # SLURM has ended the batch script itself
    fallen="$(fallen_nodes | sort | paste -sd,)"
    if [ -n "$fallen" ]; then
        record_loss "SLURM has ended the start: $fallen failed" "$fallen"
    else
        record "cut off" "SLURM has started the job again: it was preempted and had no time to \\
save, or its first node failed" "$(sed -n 2p "$TAPCT_FILES.running")"
    fi
fi
{
    date +%s
    echo "${SLURMD_NODENAME:-}"
    own_nodes | grep -vxF "${SLURMD_NODENAME:-}"
} > "$TAPCT_FILES.running"
check_bounds "${SLURM_RESTART_COUNT:-0}"
leave_bad_nodes
newest >> "$TAPCT_FILES.starts"
srun() { # its messages name the node of a rank that was killed
    command srun "$@" 2> "$TAPCT_FILES.srun"
    set -- $?
    cat "$TAPCT_FILES.srun" >&2
    return "$1"
}
"""

# These lines follow srun. An exit code of 128 + a signal number means that the signal ended a rank:
# by SLURM while its Python was still starting, before it could leave a mark; or by the kernel, for
# want of memory or in a crash. srun reports the rank that ended first in its first message.
REQUEUE = """\
code=$?
end="$(sed -n 1p "$TAPCT_MARK" 2>/dev/null)"
nodes="$(sed -n 2p "$TAPCT_MARK" 2>/dev/null)"
why="$(sed -n 3p "$TAPCT_MARK" 2>/dev/null)"
srun_line() { grep -m 1 -E "$1" "$TAPCT_FILES.srun" | sed 's/^srun: error: //'; }
killed="Killed|Out Of Memory|Bus error|Segmentation fault|Aborted|Illegal instruction"
first="$(srun_line 'srun: error: .*: tasks? [0-9,-]+: ' | grep -E ": ($killed)")"
failures='Node failure on|[Ll]aunch .* failed|Unable to create step|Communication connection'
gone="$(srun_line "$failures")"
if [ -n "$first" ]; then # the others ended because of this rank
    end=lost why="${first}${why:+; $why}" nodes="${first%%:*}"
elif [ -n "$gone" ] && [ "$end" != stopped ]; then
    found="$(echo "$gone" | sed -nE 's/.*(Node failure|failed) on (node )?([^ :]+).*/\\3/p')"
    end=lost why="${gone}${why:+; $why}" nodes="${found:-$nodes}"
fi
case "$end:$code" in
    lost:*) ;;
    stopped:13[245679] | :13[245679]) end=lost why="a rank was ended by signal $((code - 128))" ;;
    :3) end=lost why="a rank was lost; see the logs" ;;
    stopped:* | :138 | :140 | :143) end=stopped ;;
    *) rm -f "$TAPCT_FILES.running"; exit "$code" ;;
esac
rm -f "$TAPCT_FILES.running"
case "$nodes" in *[[,]*|'') nodes=UNKNOWN ;; esac # several: any of them may be at fault
state="$(scontrol show job -o "$TAPCT_JOB" | grep -o 'JobState=[A-Z_]*')"
# another state: the job was cancelled, or SLURM itself has requeued it
if [ "${state:-JobState=RUNNING}" != JobState=RUNNING ]; then
    if [ -n "$gone" ]; then record_loss "$why" "$nodes"; fi
    echo "tapct: $state, so not requeued from here"
    exit 0
fi
if [ "$end" = lost ]; then record_loss "$why" "$nodes"; fi
check_bounds "$((${SLURM_RESTART_COUNT:-0} + 1))"
requeue
"""


def lines_before(resources: Resources) -> list[str]:
    """Shell lines before srun; $TAPCT_PLACE is RUN/jobs/<time> of the run that the job works on,
    $TAPCT_FILES the beginning of the names of the files above.

    Args:
        resources: bounds on requeues.
    """
    text = BOUNDS.replace("MAX_RESTARTS", str(resources.max_restarts))
    text = text.replace("MAX_FAILURES", str(resources.max_failures))
    text = text.replace("MAX_IDLE", str(resources.max_idle_restarts))
    text = text.replace("MOST_CHARACTERS", str(ending.MOST_CHARACTERS))
    # both are relative to RUN/jobs/<time>
    text = text.replace("LATEST", str(RunFolder(Path("..", "..")).checkpoints.latest))
    text = text.replace("EVENTS", str(JobFolder(Path()).events))
    return _with_words(text)


def lines_after() -> list[str]:
    """Shell lines after srun."""
    return _with_words(REQUEUE)


def _with_words(text: str) -> list[str]:
    text = text.replace("UNKNOWN", ending.UNKNOWN)
    return text.replace("LOSSES", str(LOSSES_UNTIL_EXCLUDED)).splitlines()
