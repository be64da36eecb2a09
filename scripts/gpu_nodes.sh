#!/usr/bin/env bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu/settings.sh
source "$root/tpu/settings.sh"

usage() {
    cat <<'END'
usage: scripts/gpu_nodes.sh [options] --hosts HOST[,HOST ...] COMMAND

  start CONFIG [WORD ...] start `python -m rethinker_jax.main CONFIG WORD ...` on every host; it outlives this session
  status                  whether it runs, and with what it ended
  logs [LINES]            the last lines of every host's log (default: 50)
  stop                    ask the run to save and stop

  --dir DIR               the repository with its .venv, on every host (default: this one's path). The run directory
                          must lie on a disk that all hosts share
  --port PORT             of the coordinator, on the first host (default: 8476)
  --interface NAME        the network interface for NCCL (NCCL_SOCKET_IFNAME); without it NCCL chooses
  --dry-run               print the ssh commands instead of running them

Hosts are reached by ssh without a password. First, on each: python -m venv .venv && .venv/bin/pip install '.[gpu]'.
NCCL_* and XLA_* of this shell are passed on. Exit code 75 starts the run again on its host, other codes do not.
The hosts join one job. Not tried on GPUs.
END
}

# What NCCL and jax are told, and why.
job_environment() { # NUMBER: this host's, from 0
    local name
    if [ "${#hosts[@]}" -gt 1 ]; then
        echo "JAX_COORDINATOR_ADDRESS=${hosts[0]#*@}:$port"
        echo "JAX_NUM_PROCESSES=${#hosts[@]}"
        echo "JAX_PROCESS_ID=$1"
    fi
    # One program has the GPUs: let jax take more than three quarters of their memory.
    [ -n "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] || echo "XLA_CLIENT_MEM_FRACTION=0.92"
    # A host with several interfaces may offer NCCL one that the others cannot reach, and the job hangs at its start.
    [ -z "$interface" ] || echo "NCCL_SOCKET_IFNAME=$interface"
    for name in ${!NCCL_@} ${!XLA_@}; do
        [ "$name" = NCCL_SOCKET_IFNAME ] && [ -n "$interface" ] || echo "$name=${!name}"
    done
}

on_host() { # HOST COMMAND
    run ssh -n -o BatchMode=yes "$1" "$2"
}

start() {
    [ $# -gt 0 ] && [[ $1 != -* ]] || die "start: wanted the CONFIG.yaml to run; scripts/gpu_nodes.sh --help"
    local number line environment
    for number in "${!hosts[@]}"; do
        environment=()
        while IFS= read -r line; do
            environment+=("$line")
        done < <(job_environment "$number")
        on_host "${hosts[$number]}" "cd $(quote "$directory") && mkdir -p runs && { \
nohup env $(quote "${environment[@]}") bash scripts/gpu_nodes.sh loop $(quote "$@") >>runs/gpu_node.log 2>&1 </dev/null & }"
    done
}

# On a host: the run, again after 75, until SIGTERM asks it to stop. No two at once.
loop() {
    local code child=""
    stopped=""
    if [ -f runs/gpu_node.pid ] && kill -0 "$(cat runs/gpu_node.pid)" 2>/dev/null; then
        die "a run is there already: process $(cat runs/gpu_node.pid)"
    fi
    echo $$ >runs/gpu_node.pid
    rm -f runs/gpu_node.starts
    trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    while :; do
        if ! .venv/bin/python -m rethinker_jax.starts runs/gpu_node.starts "$@"; then
            echo 2 >runs/gpu_node.code
            exit 2
        fi
        [ -z "$stopped" ] || exit 75
        .venv/bin/python -m rethinker_jax.main "$@" &
        child=$!
        code=0
        wait "$child" || code=$?
        while kill -0 "$child" 2>/dev/null; do # a signal that is caught ends `wait`, not the run
            code=0
            wait "$child" || code=$?
        done
        echo "$code" >runs/gpu_node.code
        # Killed and aborted (137, 134, 142): the processes beside it wait for it to come back.
        case $code in 75 | 134 | 137 | 142) ;; *) exit "$code" ;; esac
        [ -z "$stopped" ] || exit "$code"
        sleep "${RESTART_SECONDS:-10}" &
        wait $! || true
        [ -z "$stopped" ] || exit "$code"
    done
}

# shellcheck disable=SC2016 # for the shell of the host
STATUS='if kill -0 "$(cat runs/gpu_node.pid)" 2>/dev/null; then echo running; else echo "ended with $(cat runs/gpu_node.code)"; fi'

hosts=() directory=$root port=8476 interface=""
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --dry-run) DRY_RUN=yes ;;
        --hosts | --dir | --port | --interface)
            [ $# -gt 1 ] || die "$1: wanted a value"
            case $1 in
                --hosts) IFS=, read -r -a hosts <<<"$2" ;;
                --dir) directory=$2 ;;
                --port) port=$2 ;;
                --interface) interface=$2 ;;
            esac
            shift
            ;;
        -*) die "$1: no such option; scripts/gpu_nodes.sh --help" ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || die "wanted a command; scripts/gpu_nodes.sh --help"
command=$1
shift
if [ "$command" = loop ]; then
    loop "$@"
fi
case $command in
    start | status | logs | stop) ;;
    *) die "$command: no such command; scripts/gpu_nodes.sh --help" ;;
esac
[ "${#hosts[@]}" -gt 0 ] || die "wanted --hosts HOST[,HOST ...]"
for host in "${hosts[@]}"; do
    [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9@._-]*$ ]] || die "--hosts: '$host': wanted the name of a host, or user@host"
done
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || die "--port $port: wanted a number"
case $command in
    start) start "$@" ;;
    status) for host in "${hosts[@]}"; do on_host "$host" "cd $(quote "$directory") && $STATUS"; done ;;
    logs)
        [[ ${1:-50} =~ ^[0-9]+$ ]] || die "logs $1: wanted a number of lines"
        for host in "${hosts[@]}"; do
            on_host "$host" "tail -n ${1:-50} $(quote "$directory/runs/gpu_node.log") | sed s/^/$host:\ /"
        done
        ;;
    stop) for host in "${hosts[@]}"; do on_host "$host" "cd $(quote "$directory") && kill -TERM \"\$(cat runs/gpu_node.pid)\""; done ;;
esac
