#!/usr/bin/env bash
# Ends the SLURM that scripts/slurm_up.sh has started: first its jobs, then its daemons, and nothing
# else. --purge also removes its folder.
set -euo pipefail

dir="${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/tapct-slurm}"
export SLURM_CONF="$dir/slurm.conf"
if [ ! -d "$dir/run" ]; then
    echo "no SLURM from slurm_up.sh in $dir"
    exit 0
fi

end_jobs() {
    local queue="timeout 10 squeue --noheader --format=%A"
    if ! $queue >/dev/null 2>&1; then return 0; fi
    $queue | sort -u | xargs -r timeout 10 scancel || true
    for _ in $(seq 40); do
        if [ -z "$($queue 2>/dev/null)" ]; then return 0; fi
        sleep 0.5
    done
}

# Arguments: pid file, name of the program. A pid that now belongs to another program is left alone.
end_daemon() {
    local pid
    pid="$(cat "$1" 2>/dev/null || true)"
    rm -f "$1"
    if [ -z "$pid" ] || [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != "$2" ]; then return 0; fi
    kill "$pid"
    for _ in $(seq 50); do
        if ! kill -0 "$pid" 2>/dev/null; then
            echo "ended $2 ($pid)"
            return 0
        fi
        sleep 0.2
    done
    kill -9 "$pid" 2>/dev/null || true
    echo "killed $2 ($pid)"
}

end_jobs
for file in "$dir"/run/slurmd-*.pid; do end_daemon "$file" slurmd; done
end_daemon "$dir/run/slurmctld.pid" slurmctld
end_daemon "$dir/run/munged.pid" munged
if grep -qF "# tapct $dir" /etc/hosts; then
    kept="$(grep -vF "# tapct $dir" /etc/hosts || true)"
    printf '%s\n' "$kept" >/etc/hosts # in place: it may be a mount
fi
if [ "${1:-}" = "--purge" ]; then rm -rf "$dir"; fi
