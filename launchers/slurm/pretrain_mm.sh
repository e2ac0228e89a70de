#!/usr/bin/env bash
#SBATCH --job-name=megamm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#
# A run of megamm on the nodes of a Slurm job:
#
#     sbatch [options] launchers/slurm/pretrain_mm.sh CONFIG [key=value ...]
#
# The allocation gives the number of nodes and of ranks per node: --nodes, and --gpus-per-node (on a CPU
# --ntasks-per-node). All site-specific settings are in cluster.env, beside this file. README.md there has examples:
# time limits, spare nodes, arrays, chains of jobs, one task per GPU.
#
# `megamm doctor` checks every node first, alone and then together with the others; nodes that fail are excluded. Then
# each good node runs `megamm train`, which watches its ranks and restarts them in place. Its exit code says what the
# job does next (megamm/common/exit_codes.py): 0 end, 2 and 3 fail, 75 (stopped by a signal, checkpoint written)
# requeue. A crash is requeued too, up to MEGAMM_MAX_RESTARTS times. A node that was evicted from the run (4) is
# excluded from then on.
set -uo pipefail

readonly DONE=0 USER_ERROR=2 GAVE_UP=3 EVICTED=4 REQUEUE=75
# Killed by a signal before `megamm train` handled it: there was nothing to save yet.
readonly BY_USR1=138 BY_TERM=143
# Run by the shell of each task: Slurm's own GPU binding could hide a task's GPU from the other tasks of the node.
# shellcheck disable=SC2016
readonly OWN_GPU='IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
CUDA_VISIBLE_DEVICES=${all[SLURM_LOCALID]-$SLURM_LOCALID} exec "$@"'

step=""     # process id of the running srun
signal=""   # the signal that this job received

main() {
    check_arguments "$@"
    read_site
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    arguments=("${@//%a/${SLURM_ARRAY_TASK_ID:-}}")
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ranks=${MEGAMM_NPROC:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
    set_tasks
    least=${MEGAMM_NNODES_MIN:-${#nodes[@]}}
    # Below the ports that Linux gives to clients; a different port after a requeue, as the old one may still be in use.
    port=$((12000 + 2 * ((SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0} % 16) % 10000)))
    say "job $job ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, on ${nodes[*]}"
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    [ "$MEGAMM_PREFLIGHT" = 0 ] || preflight
    train
}

refuse() {
    echo "error: $1" >&2
    exit $USER_ERROR
}

usage() {
    refuse "$1"$'\n'"usage: sbatch [options] launchers/slurm/pretrain_mm.sh CONFIG [key=value ...]"
}

say() { echo "$(date +%FT%T) pretrain_mm: $*"; }

check_arguments() {
    [ $# -ge 1 ] || usage "no CONFIG given"
    local config=${1//%a/${SLURM_ARRAY_TASK_ID:-}} override
    [ -f "$config" ] || usage "config $config not found (in $PWD)"
    for override in "${@:2}"; do
        [[ $override == [a-z]*=* ]] || usage "$override is not key=value; put options of sbatch before the script"
    done
    [ -n "${SLURM_JOB_ID:-}" ] || usage "not running in a Slurm job; start it with sbatch"
}

# sbatch runs a copy of this script; the path of the original is in the job's record.
read_site() {
    local beside
    beside=$(dirname "${BASH_SOURCE[0]}")
    [ -f "$beside/cluster.env" ] || beside=$(dirname "$(job_script "$SLURM_JOB_ID")")
    local file=${MEGAMM_CLUSTER_ENV:-$beside/cluster.env}
    [ -f "$file" ] || usage "$file not found; set MEGAMM_CLUSTER_ENV to the file of this site"
    # shellcheck source=launchers/slurm/cluster.env
    . "$file"
}

# job_path JOB KEY: a path may have spaces, but it is the rest of its line.
job_path() { scontrol show job "$1" | sed -n "s/^ *$2=//p" | head -n 1; }

# job_script JOB: its record has the script's arguments too, separated by spaces: the longest part that is a file.
job_script() {
    local command
    command=$(job_path "$1" Command)
    while [ ! -f "$command" ] && [[ $command == *" "* ]]; do command=${command% *}; done
    echo "$command"
}

job_field() { scontrol show job -o "$1" | sed -n "s/.* $2=\([^ ]*\).*/\1/p" | head -n 1; }

# --- nodes ---

# Set $tasks, the number of Slurm tasks per node. Each task is a `megamm train`, which watches its ranks and restarts
# them. A task that is a bare rank could not be restarted: its exit would end the whole step.
set_tasks() {
    local per=${MEGAMM_TASK_PER:-node} gpus=${SLURM_GPUS_ON_NODE:-$ranks} each=${SLURM_GPUS_PER_TASK:-1}
    [ -n "$MEGAMM_TASK_PER" ] || [ -z "${SLURM_GPUS_PER_TASK:-}" ] || per=rank
    [ "$ranks" -le "$gpus" ] || refuse "MEGAMM_NPROC=$ranks, but the job has $gpus GPUs per node: a rank needs its own"
    case $per in
    node) tasks=1 && return ;;
    rank) tasks=$ranks cpus=$((${SLURM_CPUS_ON_NODE:-$ranks} / ranks)) ;;
    *) refuse "MEGAMM_TASK_PER=$per is neither node nor rank" ;;
    esac
    [ "${each##*:}" = 1 ] || refuse "--gpus-per-task=$each, but a rank uses one GPU: set 1, or MEGAMM_TASK_PER=node"
    [ "$cpus" -gt 0 ] || refuse "$ranks tasks on a node with ${SLURM_CPUS_ON_NODE:-} CPUs: add --ntasks-per-node=$ranks"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
}

# on_nodes TASKS COMMAND ...: run TASKS copies of a command on each of $nodes, in the background, as $step.
on_nodes() {
    local list options=(--cpu-bind=none) all=${#nodes[@]} each=$1
    shift
    [ "$each" = 1 ] || options=(--cpus-per-task="$cpus")  # each task's part of the node's CPUs
    # Otherwise srun derives the GPUs from --gpus-per-task, and some of several tasks would see no GPU.
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || options+=(--gpus-per-node="$SLURM_GPUS_ON_NODE")
    list=$(IFS=,; echo "${nodes[*]}")
    [ -z "$MEGAMM_CONTAINER_IMAGE" ] || [ "$MEGAMM_CONTAINER_RUNTIME" != pyxis ] || options+=(
        --container-image="$MEGAMM_CONTAINER_IMAGE" --container-mounts="$MEGAMM_CONTAINER_MOUNTS"
        --container-workdir="$PWD")
    # A single task gets all CPUs and GPUs of its node, whatever was requested from sbatch.
    env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK \
        -u SLURM_NTASKS_PER_NODE srun --nodes="$all" --ntasks=$((all * each)) --ntasks-per-node="$each" \
        --nodelist="$list" --overlap --kill-on-bad-exit=0 "${step_options[@]}" "${options[@]}" "$@" &
    step=$!
}

# Set $megamm, the command line of megamm on a node.
set_megamm() {
    megamm=(python3 -m megamm)
    [ -z "$MEGAMM_CONTAINER_IMAGE" ] || [ "$MEGAMM_CONTAINER_RUNTIME" != apptainer ] || megamm=(
        apptainer exec --nv --bind "$MEGAMM_CONTAINER_MOUNTS" --pwd "$PWD" "$MEGAMM_CONTAINER_IMAGE" "${megamm[@]}")
}

# Wait for $step and set $code to its exit code. A trap interrupts `wait`, so wait in a loop.
wait_for_step() {
    local late
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    wait "$step" 2>/dev/null
    late=$?
    [ $late = 127 ] || code=$late
    step=""
}

preflight() {
    # shellcheck disable=SC2206  # a list
    local options=($MEGAMM_PREFLIGHT_OPTIONS)
    options+=("${arguments[@]:1}" --preflight --config "${arguments[0]}")
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || options+=(--gpus "$SLURM_GPUS_ON_NODE")
    leave_out_bad_nodes "${options[@]}"
    # Compare only nodes that passed alone: a node that cannot even start would delay the others.
    [ ${#nodes[@]} = 1 ] || leave_out_bad_nodes "${options[@]}" --nnodes "1:${#nodes[@]}" \
        --rendezvous "${nodes[0]}:$((port + 1))" --join $((MEGAMM_PREFLIGHT_SECONDS / 2))
}

# leave_out_bad_nodes OPTION ...: remove the nodes on which `megamm doctor` with these options fails from $nodes.
leave_out_bad_nodes() {
    local verdicts node good=() bad=()
    verdicts=$(mktemp -p /dev/shm)  # in memory: this node's disks may be faulty
    set_megamm
    step_options=(--no-kill --wait=0)
    # shellcheck disable=SC2016  # expanded by the shell on the node
    on_nodes 1 timeout -k 5 "$MEGAMM_PREFLIGHT_SECONDS" bash -c '"$@" >/dev/null; echo "$SLURMD_NODENAME $?"' _ \
        "${megamm[@]}" doctor "$@" >"$verdicts"
    wait_for_step
    for node in "${nodes[@]}"; do
        if grep -qx "$node 0" "$verdicts"; then good+=("$node"); else bad+=("$node"); fi
    done
    [ -z "$signal" ] || requeue "stopped by $signal in the preflight"
    [ -s "$verdicts" ] || try_again "$code" "no node answered the preflight"
    rm -f "$verdicts"
    [ ${#bad[@]} -gt 0 ] || return
    if [ ${#good[@]} = 0 ]; then
        say "no node passed the preflight: check the setup (environment, cluster.env), not the nodes; not requeued"
        exit $USER_ERROR
    fi
    say "excluded for the faults listed above: ${bad[*]}"
    [ "$MEGAMM_DRAIN" = 0 ] || drain "${bad[@]}"
    [ ${#good[@]} -ge "$least" ] || requeue "${#good[@]} good nodes, $least needed" "${bad[@]}"
    nodes=("${good[@]}")
}

drain() {
    local list
    list=$(IFS=,; echo "$*")
    scontrol update NodeName="$list" State=DRAIN Reason="failed a check of megamm, job $job" ||
        say "could not drain (needs operator rights in Slurm): $list"
}

# --- the run ---

train() {
    local most=${MEGAMM_NNODES_MAX:-${#nodes[@]}} place=() own=()
    [ "$most" -le "${#nodes[@]}" ] || most=${#nodes[@]}
    # megamm counts every task as a node.
    [ $((${#nodes[@]} * tasks)) = 1 ] || place=(
        --nnodes "$((least * tasks)):$((most * tasks))" --rendezvous "${nodes[0]}:$port")
    if [ "$least" -lt "${#nodes[@]}" ]; then
        step_options=(--no-kill --wait=0)  # the others continue without a lost node
    else
        step_options=(--wait="$MEGAMM_WAIT_SECONDS")  # when one task ends, all must end
    fi
    set_megamm
    [ "$tasks" = 1 ] || [ -z "${SLURM_GPUS_ON_NODE:-}" ] || own=(bash -c "$OWN_GPU" _)
    say "training with $ranks ranks on each of ${#nodes[@]} nodes, $tasks tasks per node, at least $least; ${place[*]}"
    [ -z "$signal" ] || requeue "stopped by $signal before the start"
    on_nodes "$tasks" "${own[@]}" "${megamm[@]}" train "${arguments[@]}" --nproc $((ranks / tasks)) "${place[@]}"
    [ "$signal" != USR1 ] || kill -USR1 "$step"  # it arrived while srun was starting
    wait_for_step
    conclude "$code"
}

# shellcheck disable=SC2317  # called by traps
on_signal() {
    say "got $1"
    # Slurm sends USR1 only to this script (--signal=B:), and srun forwards it to every node. Slurm sends TERM to all
    # processes of a job. Do not forward a second signal: it would kill the ranks before the checkpoint is written.
    [ "$1" != USR1 ] || [ -n "$signal" ] || [ -z "$step" ] || kill -USR1 "$step"
    signal=$1
}

# conclude CODE: end or requeue the job; CODE is the largest exit code of megamm train on all nodes.
conclude() {
    local evicted=()
    mapfile -t evicted < <(evicted_nodes)
    [ ${#evicted[@]} = 0 ] || [ "$MEGAMM_DRAIN" = 0 ] || drain "${evicted[@]}"
    case $1 in
    "$DONE") say "the run is done" && exit ;;
    "$USER_ERROR") say "wrong input, fix it first (see above): not requeued" && exit "$1" ;;
    "$GAVE_UP") say "the run gave up (see above): not requeued" && exit "$1" ;;
    "$REQUEUE") requeue "stopped${signal:+ by $signal}, with a checkpoint" "${evicted[@]}" ;;
    "$BY_USR1" | "$BY_TERM") requeue "stopped${signal:+ by $signal}, with nothing to save yet" "${evicted[@]}" ;;
    esac
    [ -z "$signal" ] || requeue "stopped by $signal, exit code $1" "${evicted[@]}"
    try_again "$1" "failed with exit code $1" "${evicted[@]}"
}

# Print the nodes that were evicted in this start of the job: srun logs their exit code.
evicted_nodes() {
    local log list
    log=$(job_path "$job" StdOut)
    [ -f "$log" ] || return
    list=$(tac "$log" | sed '/pretrain_mm: training with/q' |
        sed -n "s/^srun[^:]*: error: \\([^:]*\\): tasks\\{0,1\\} .*: Exited with exit code $EVICTED\$/\\1/p")
    [ -z "$list" ] || scontrol show hostnames "${list//$'\n'/,}"
}

# try_again CODE WHY [NODE ...]: requeue without those nodes, at most MEGAMM_MAX_RESTARTS times.
try_again() {
    [ "${SLURM_RESTART_COUNT:-0}" -ge "$MEGAMM_MAX_RESTARTS" ] || requeue "${@:2}"
    say "$2; not requeued: this job was already requeued MEGAMM_MAX_RESTARTS=$MEGAMM_MAX_RESTARTS times"
    exit "$1"
}

# requeue WHY [NODE ...]: run this job again without those nodes.
requeue() {
    local why=$1 state reason excluded=""
    shift
    if [ $# -gt 0 ]; then
        excluded=$(job_field "$job" ExcNodeList)
        excluded=${excluded#(null)}
        excluded=$(IFS=,; echo "$*")${excluded:+,$excluded}
    fi
    if [ "$MEGAMM_REQUEUE" = 0 ]; then
        say "$why; MEGAMM_REQUEUE=0: the caller must run it again${excluded:+, without $excluded}"
        [ -z "${MEGAMM_EXCLUDE_FILE:-}" ] || echo "$excluded" >"$MEGAMM_EXCLUDE_FILE"
        exit $REQUEUE
    fi
    state=$(job_field "$job" JobState) reason=$(job_field "$job" Reason)
    if [ "$state" = COMPLETING ] && [ "$reason" != TimeLimit ]; then
        say "$why; Slurm has ended this job and requeues it unless it was cancelled"
        exit $REQUEUE
    fi
    say "$why: requeueing"
    trap '' TERM USR1  # the requeue ends this script
    scontrol requeue "$job" || {
        say "requeueing is not allowed: submit the next job by hand, or chain jobs with --dependency=singleton"
        exit $REQUEUE
    }
    [ -z "$excluded" ] || scontrol update JobId="$job" ExcNodeList="$excluded"
    exit 0
}

main "$@"
