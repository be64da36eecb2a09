#!/usr/bin/env bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu/settings.sh
source "$root/tpu/settings.sh"

usage() {
    cat <<'END'
usage: tpu/pod.sh [options] COMMAND

  create                  rent the pod, and wait until it is there
  setup                   copy this repository to every worker and install it; may be repeated
  run CONFIG [WORD ...]   start `python -m rethinker_jax.main CONFIG WORD ...` on every worker; it outlives this session.
                          sft CONFIG and pipeline CONFIG go too
  watch CONFIG [WORD ...] create, setup and run as needed, until the run ends; again after a preemption
  status                  the state of the pod, and of the run on every worker
  logs [LINES]            the last lines of every worker's log (default: 50)
  stop                    ask the run to save and stop
  fetch RUN [DIR]         copy runs/RUN without its checkpoints to DIR (default: runs/RUN)
  delete [--yes]          give the pod back, with its disks

  --env FILE              settings (default: tpu/pod.env; tpu/pod.env.example explains them)
  --spot, --queued        as SPOT=yes and QUEUED=yes in the settings; keep them there, every command reads them
  --dry-run               print the gcloud commands instead of running them

CONFIG is a file of this repository; WORDs are those of the program: --mesh fsdp=4, section.key=value.
All hosts of a slice, and of several slices, join one job: give them a BUCKET, because they share the run's directory.
Nothing here has run on Google Cloud. docs/pods.md goes from an empty project to a 7B run.
Exit codes: 0 done, 2 bad input, else that of the command that failed; watch ends with the exit code of the run (75: stopped by hand).
END
}

SETTINGS="PROJECT ZONE NAME ACCELERATOR RUNTIME_VERSION NUM_SLICES QUEUED SPOT BUCKET"
PROJECT="" ZONE="" NAME="" ACCELERATOR="" RUNTIME_VERSION="" NUM_SLICES=1 QUEUED=no SPOT=no BUCKET=""
POLL_SECONDS=60
WORKER="bash rethinker_jax/tpu/worker.sh"

read_env() {
    # shellcheck disable=SC2086 # the names are words
    read_settings "$env_file" $SETTINGS
    QUEUED=${queued_option:-$QUEUED} SPOT=${spot_option:-$SPOT}
    check_setting "$env_file" PROJECT '[a-z][a-z0-9:.-]*[a-z0-9]' my-project
    check_setting "$env_file" ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
    check_setting "$env_file" NAME '[a-z]([a-z0-9-]{0,50}[a-z0-9])?' rethinker
    check_setting "$env_file" ACCELERATOR '[a-z0-9]+-[1-9][0-9]*' v5p-8
    check_setting "$env_file" RUNTIME_VERSION '[a-z0-9][a-z0-9.-]*' v2-alpha-tpuv5
    check_setting "$env_file" NUM_SLICES '[1-9][0-9]*' 1
    check_setting "$env_file" QUEUED 'yes|no' yes
    check_setting "$env_file" SPOT 'yes|no' yes
    [ -z "$BUCKET" ] || check_setting "$env_file" BUCKET 'gs://[a-z0-9][a-z0-9._-]*' gs://my-bucket
    [ "$NUM_SLICES" = 1 ] || [ "$QUEUED" = yes ] || die "$env_file: NUM_SLICES=$NUM_SLICES wants QUEUED=yes"
    where=("--project=$PROJECT" "--zone=$ZONE")
    if [ "$QUEUED" = yes ]; then kind=queued-resources; else kind=tpu-vm; fi
}

create() {
    local spot=()
    [ "$SPOT" = no ] || spot=(--spot)
    if [ "$QUEUED" = no ]; then
        run gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" \
            "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME_VERSION" ${spot[@]+"${spot[@]}"}
        return
    fi
    local nodes=("--node-id=$NAME")
    [ "$NUM_SLICES" = 1 ] || nodes=("--node-count=$NUM_SLICES" "--node-prefix=$NAME")
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${nodes[@]}" \
        "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME_VERSION" ${spot[@]+"${spot[@]}"}
    wait_until_active
}

# ACTIVE or READY, a state on the way there or away from there, or nothing where there is no such pod.
pod_state() {
    local field=state
    [ "$QUEUED" = no ] || field=state.state
    run gcloud compute tpus "$kind" list "${where[@]}" "--filter=name~/$NAME\$" "--format=value($field)"
}

wait_until_active() {
    local state
    if [ -n "$DRY_RUN" ]; then
        echo "# every $POLL_SECONDS seconds, until it prints ACTIVE:"
        pod_state
        return
    fi
    while :; do
        state=$(pod_state) || state=unknown # gcloud has said why; the network comes back
        echo "$(date '+%F %T') $NAME: ${state:-gone}" >&2
        case $state in
            ACTIVE) return ;;
            "" | FAILED | SUSPEND*)
                echo "error: the request for $NAME came to nothing; gcloud compute tpus $kind describe says more" >&2
                return 1
                ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

# on_workers all|0 COMMAND : the command in a shell on every worker of every slice, or on the first of the first.
on_workers() {
    if [ "$NUM_SLICES" = 1 ]; then
        run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" "--worker=$1" "--command=$2"
    else
        run gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" "--node=$1" "--worker=$1" "--command=$2"
    fi
}

# Copies what git knows of this repository, and new files that it does not ignore, to ~/rethinker_jax of every worker.
push() {
    local archive=${TMPDIR:-/tmp}/rethinker_jax.$NAME.tar.gz to=$NAME:rethinker_jax.tar.gz
    # shellcheck disable=SC2016 # for the shell that is called
    run bash -c 'set -o pipefail; cd "$1" && git ls-files --cached --others --exclude-standard |
        while IFS= read -r file; do [ ! -e "$file" ] || echo "$file"; done | tar -czf "$2" -T -' pack "$root" "$archive" &&
        if [ "$NUM_SLICES" = 1 ]; then
            run gcloud compute tpus tpu-vm scp "$archive" "$to" "${where[@]}" --worker=all
        else
            run gcloud compute tpus queued-resources scp "$archive" "$to" "${where[@]}" --node=all --worker=all
        fi &&
        on_workers all "mkdir -p rethinker_jax && tar -xzf rethinker_jax.tar.gz -C rethinker_jax"
}

setup() {
    push && on_workers all "$WORKER setup${BUCKET:+ $(quote "${BUCKET#gs://}")}"
}

# The run goes to the bucket, unless the words name another place: there it survives the machines.
start() {
    local words=("$@")
    if [ -n "$BUCKET" ] && [[ " $*" != *" run.dir="* ]]; then
        words+=("run.dir=/mnt/bucket/runs/$(basename "$config" .yaml)")
    fi
    on_workers all "$WORKER start $(quote "${words[@]}")"
}

check_config() {
    config=${1:-}
    case $config in
        train | sft | pipeline) config=${2:-} ;;
    esac
    [ -n "$config" ] || die "wanted the CONFIG.yaml to run; tpu/pod.sh --help"
    [[ $config != /* && $config != *..* ]] || die "$config: wanted a file of this repository, as a path from its root"
    [ -f "$root/$config" ] || die "$config: no such file in $root"
}

watch() {
    local state report
    if [ -n "$DRY_RUN" ]; then
        echo "# every $POLL_SECONDS seconds, until the run has ended:"
        pod_state
        on_workers 0 "$WORKER state"
        echo "# if it is SUSPENDED or PREEMPTED:"
        delete
        echo "# if it is not there:"
        create
        echo "# if nothing was started on it:"
        setup
        echo "# if nothing was started on it, or the run has ended with 75:"
        start "$@"
        return
    fi
    while :; do
        state=$(pod_state) || state=unknown # gcloud has said why; the network comes back
        echo "$(date '+%F %T') $NAME: ${state:-gone}" >&2
        case $state in
            "") create || return ;;
            ACTIVE | READY)
                report=$(on_workers 0 "$WORKER state || echo state: none" | sed -n 's/^state: //p' | tail -n 1) || report=""
                echo "$(date '+%F %T') run: ${report:-not reached}" >&2
                case $report in
                    none) setup && start "$@" || echo "that failed; again in $POLL_SECONDS seconds" >&2 ;;
                    "exited 75") start "$@" || true ;;
                    stopped) return 75 ;;
                    "exited "*)
                        [ "$report" = "exited 0" ] || on_workers all "$WORKER logs 50" || true
                        return "${report#exited }"
                        ;;
                esac
                ;;
            PREEMPTED | TERMINATED | STOPPED | SUSPENDED) delete || true ;;
            FAILED)
                echo "error: the request for $NAME failed; gcloud compute tpus $kind describe says more" >&2
                return 1
                ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

fetch() {
    [ $# -gt 0 ] || die "wanted the name of the run to fetch: that of its folder in runs/"
    local to=${2:-$root/runs/$1}
    run mkdir -p "$to"
    if [ -n "$BUCKET" ]; then
        run gcloud storage rsync --recursive "--exclude=^checkpoints/" "$BUCKET/runs/$1" "$to"
        return
    fi
    local archive=${TMPDIR:-/tmp}/rethinker_run.$NAME.tar.gz first=$NAME
    [ "$NUM_SLICES" = 1 ] || first=$NAME-0
    on_workers 0 "tar -czf rethinker_run.tar.gz -C rethinker_jax/runs/$(quote "$1") --exclude=./checkpoints ."
    run gcloud compute tpus tpu-vm scp "$first:rethinker_run.tar.gz" "$archive" "${where[@]}" --worker=0
    run tar -xzf "$archive" -C "$to"
}

delete() {
    if [ "$QUEUED" = yes ]; then
        run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
    fi
}

confirm_delete() {
    local answer=""
    if [ -z "$yes" ] && [ -z "$DRY_RUN" ]; then
        [ -n "$BUCKET" ] || echo "Runs lie on the disks of $NAME and go with it." >&2
        read -r -p "Delete $NAME in $ZONE of $PROJECT? Type its name: " answer || true
        [ "$answer" = "$NAME" ] || die "nothing was deleted"
    fi
    delete
}

env_file=$root/tpu/pod.env config="" queued_option="" spot_option="" yes=""
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --env)
            [ $# -gt 1 ] || die "--env: wanted a file"
            env_file=$2
            shift
            ;;
        --spot) spot_option=yes ;;
        --queued) queued_option=yes ;;
        --dry-run) DRY_RUN=yes ;;
        -*) die "$1: no such option; tpu/pod.sh --help" ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || die "wanted a command; tpu/pod.sh --help"
command=$1
shift
# The options of a command may stand behind it, but the words of the program are its own.
while [[ $command != run && $command != watch && $# -gt 0 && $1 == --* ]]; do
    case $1 in
        --spot) spot_option=yes ;;
        --queued) queued_option=yes ;;
        --dry-run) DRY_RUN=yes ;;
        --yes) yes=yes ;;
        *) die "$1: $command has no such option; tpu/pod.sh --help" ;;
    esac
    shift
done
case $command in
    create | setup | run | watch | status | logs | stop | fetch | delete) ;;
    *) die "$command: no such command; tpu/pod.sh --help" ;;
esac
read_env
case $command in
    create)
        [ "$SPOT" = no ] || [ -n "$BUCKET" ] || echo "warning: spot machines take their disks with them; set BUCKET" >&2
        create
        ;;
    setup) setup ;;
    run)
        check_config "$@"
        push && start "$@"
        ;;
    watch)
        check_config "$@"
        watch "$@"
        ;;
    status)
        pod_state
        on_workers all "$WORKER state"
        ;;
    logs)
        [[ ${1:-50} =~ ^[0-9]+$ ]] || die "logs $1: wanted a number of lines"
        on_workers all "$WORKER logs ${1:-50}"
        ;;
    stop) on_workers all "$WORKER stop" ;;
    fetch) fetch "$@" ;;
    delete) confirm_delete ;;
esac
