#!/usr/bin/env bash
# Starts a real SLURM on this machine, for tests: controller, virtual nodes and munge, without
# systemd and cgroups.
#   scripts/slurm_up.sh                     scripts/slurm_down.sh [--purge]
# Needs root, and apt if SLURM is not installed. A second call changes nothing. The last line of the
# output is the line to source.
# Partitions: debug (the default) and urgent, whose jobs preempt those of debug after 20 s of grace.
# Settings: SLURM_TEST_DIR, SLURM_TEST_NODES, SLURM_TEST_CPUS (per node; may exceed those that
# exist), SLURM_TEST_GPUS (per node; they need not exist), SLURM_TEST_PORT. Several clusters at a
# time need folders of their own, and ports 1000 apart, after which their jobs are numbered too.
set -euo pipefail

dir="${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/tapct-slurm}"
num_nodes="${SLURM_TEST_NODES:-2}"
cpus="${SLURM_TEST_CPUS:-4}"
gpus="${SLURM_TEST_GPUS:-2}"
port="${SLURM_TEST_PORT:-16817}"
nodes="node[0-$((num_nodes - 1))]"
export SLURM_CONF="$dir/slurm.conf"

fail() {
    echo "error: $*" >&2
    exit 1
}

install_slurm() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
    command -v apt-get >/dev/null ||
        fail "SLURM is not installed, and there is no apt-get to install slurm-wlm and munge"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurm-wlm munge >/dev/null
}

write_config() {
    local host ports cores resources
    host="$(hostname -s)"
    ports="[$((port + 1))-$((port + num_nodes))]" # one per node
    cores="CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1"
    resources="RealMemory=8000 Gres=gpu:$gpus"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=tapct
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$port
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log

# A requeued job waits until its old credential has expired: 5 s here, by default 120 s.
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge/munge.socket,cred_expire=5

# No cgroups, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log

# Nodes may declare more cores than there are, and GPUs that do not exist.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu

# Short times to schedule, end and requeue jobs; jobs stay visible for ten minutes.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
ReturnToService=2
MinJobAge=600
InactiveLimit=0
KillWait=5
OverTimeLimit=0
SlurmdTimeout=60

JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

NodeName=$nodes NodeHostname=$host NodeAddr=127.0.0.1 Port=$ports $cores $resources State=UNKNOWN
PartitionName=debug Nodes=$nodes Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=20 State=UP
PartitionName=urgent Nodes=$nodes MaxTime=INFINITE PriorityTier=100 State=UP
CONF
    local gpu
    for gpu in $(seq 0 $((gpus - 1))); do : >"$dir/gpu$gpu"; done # they only have to exist
    echo "NodeName=$nodes Name=gpu File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
}

is_running() { # pid file, name of the program
    [ -s "$1" ] && [ "$(cat "/proc/$(cat "$1")/comm" 2>/dev/null)" = "$2" ]
}

start_all() {
    local number
    is_running "$dir/run/munged.pid" munged ||
        munged --force --key-file="$dir/munge/key" --seed-file="$dir/munge/seed" \
            --log-file="$dir/log/munged.log" --socket="$dir/run/munge/munge.socket" \
            --pid-file="$dir/run/munged.pid"
    is_running "$dir/run/slurmctld.pid" slurmctld || slurmctld
    for number in $(seq 0 $((num_nodes - 1))); do
        mkdir -p "$dir/spool-node$number"
        # ranks meet at the name of the first node, so names must resolve
        # each cluster has its own line, which it removes when it ends
        grep -qF "node$number # tapct $dir" /etc/hosts ||
            echo "127.0.0.1 node$number # tapct $dir" >>/etc/hosts
        is_running "$dir/run/slurmd-node$number.pid" slurmd || slurmd -N "node$number"
    done
}

wait_for_nodes() {
    local ready
    for _ in $(seq 120); do
        ready="$(sinfo --noheader --Node --partition=debug --format=%T 2>/dev/null |
            grep -cE '^(idle|mixed|allocated)$' || true)"
        if [ "$ready" -ge "$num_nodes" ]; then return; fi
        sleep 0.5
    done
    tail -n 20 "$dir"/log/*.log >&2
    fail "$ready of $num_nodes nodes came up in a minute; logs are in $dir/log"
}

[ "$(id -u)" = 0 ] || fail "SLURM's daemons must be started by root"
install_slurm
(umask 022 && mkdir -p "$dir"/{state,log,run/munge,munge})
chmod 755 "$dir" "$dir/run" "$dir/run/munge"
chmod 700 "$dir/munge"
[ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
[ -s "$dir/slurm.conf" ] || write_config
start_all
wait_for_nodes
echo "export SLURM_CONF=$SLURM_CONF"
