#!/usr/bin/env bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu/settings.sh
source "$root/tpu/settings.sh"

usage() {
    cat <<'END'
usage: tpu/jobset.sh [--env FILE] CONFIG [WORD ...]

Prints the manifest of a run on GKE; nothing is sent. Send it with
  tpu/jobset.sh configs/mine.yaml --mesh fsdp=4 | kubectl apply -f -

CONFIG is a path inside the image (tpu/Dockerfile copies configs/); WORDs are those of the program.
--env FILE: settings (default: tpu/jobset.env; tpu/jobset.env.example explains them).
All nodes and slices join one job. Nothing here has run on GKE.
END
}

SETTINGS="NAME IMAGE ACCELERATOR TOPOLOGY NODES CHIPS NUM_SLICES SPOT BUCKET SERVICE_ACCOUNT"
# shellcheck disable=SC2034 # read by name
NAME="" IMAGE="" ACCELERATOR="" TOPOLOGY="" NODES="" CHIPS="" NUM_SLICES=1 SPOT=no BUCKET="" SERVICE_ACCOUNT=""

read_env() {
    # shellcheck disable=SC2086 # the names are words
    read_settings "$env_file" $SETTINGS
    check_setting "$env_file" NAME '[a-z]([a-z0-9-]{0,30}[a-z0-9])?' rethinker
    check_setting "$env_file" IMAGE '[A-Za-z0-9][A-Za-z0-9./:@_-]*' us-docker.pkg.dev/my-project/rethinker/rethinker:1
    check_setting "$env_file" ACCELERATOR '[a-z0-9]+(-[a-z0-9]+)*' tpu-v5p-slice
    check_setting "$env_file" TOPOLOGY '[0-9]+x[0-9]+(x[0-9]+)?' 2x2x1
    check_setting "$env_file" NODES '[1-9][0-9]*' 1
    check_setting "$env_file" CHIPS '[1-9][0-9]*' 4
    check_setting "$env_file" NUM_SLICES '[1-9][0-9]*' 1
    check_setting "$env_file" SPOT 'yes|no' yes
    check_setting "$env_file" BUCKET 'gs://[a-z0-9][a-z0-9._-]*' gs://my-bucket
    check_setting "$env_file" SERVICE_ACCOUNT '[a-z0-9]([a-z0-9-]*[a-z0-9])?' rethinker
    [ $((NODES * CHIPS)) = $((${TOPOLOGY//x/ * })) ] ||
        die "$env_file: NODES=$NODES of CHIPS=$CHIPS are not the chips of TOPOLOGY=$TOPOLOGY"
    [ "$NUM_SLICES" = 1 ] || [ "$NODES" != 1 ] || die "$env_file: NUM_SLICES=$NUM_SLICES: GKE wants slices of several nodes"
}

# The words as a JSON list, which is YAML.
json() {
    local word between="" backslash=\\ mark=\"
    printf '['
    for word in "$@"; do
        [[ $word != *[[:cntrl:]]* ]] || die "wanted words without line breaks and control characters"
        word=${word//"$backslash"/"$backslash$backslash"}
        word=${word//"$mark"/"$backslash$mark"}
        printf '%s"%s"' "$between" "$word"
        between=", "
    done
    printf ']'
}

# Replaces every ${NAME} of the text by the variable of that name.
fill() {
    local text=$1 name begin="\${" end="}"
    while [[ $text == *"$begin"* ]]; do
        printf '%s' "${text%%"$begin"*}"
        text=${text#*"$begin"}
        name=${text%%"$end"*}
        printf '%s' "${!name}"
        text=${text#*"$end"}
    done
    printf '%s\n' "$text"
}

env_file=$root/tpu/jobset.env
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --env)
            [ $# -gt 1 ] || die "--env: wanted a file"
            env_file=$2
            shift
            ;;
        -*) die "$1: no such option; tpu/jobset.sh --help" ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || die "wanted the CONFIG.yaml to run; tpu/jobset.sh --help"
read_env
config=$1
case $config in
    train | sft | pipeline) config=${2:-run} ;;
esac
[[ " $*" == *" run.dir="* ]] || set -- "$@" "run.dir=/mnt/bucket/runs/$(basename "$config" .yaml)"
# shellcheck disable=SC2034 # read by name
{
    WORDS=$(json "$@") BUCKET_NAME=${BUCKET#gs://}
    SPOT_LABEL="# any node, spot or not" HOST_NETWORK=false DNS_POLICY=ClusterFirst
    [ "$SPOT" = no ] || SPOT_LABEL='cloud.google.com/gke-spot: "true"'
    [ "$NUM_SLICES" = 1 ] || HOST_NETWORK=true DNS_POLICY=ClusterFirstWithHostNet
}
fill "$(sed '/^# /d' "$root/tpu/jobset.yaml")"
