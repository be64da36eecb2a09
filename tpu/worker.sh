#!/usr/bin/env bash
# Runs on the workers of a pod, called by pod.sh: setup [BUCKET] | start WORD... | launch | state | logs LINES | stop.
#
# A run is the systemd unit `rethinker`, so it outlives the ssh session, starts again after a reboot and after exit code
# 75 (stopped with a checkpoint saved), unless it makes no step between restarts, and gets SIGTERM when the machine is
# told to go. The bucket is a unit of its own, which systemd stops after the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STATE=$HOME/.rethinker
LOG=$STATE/log
PORT=8482 # as jax's own; one of the ports that a slice leaves free
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes

die() {
    echo "error: $*" >&2
    exit 2
}

# The unit file comes on standard input.
write_unit() {
    sudo tee "/etc/systemd/system/$1.service" >/dev/null
    sudo systemctl daemon-reload
    sudo systemctl enable --quiet "$1"
}

setup() {
    mkdir -p "$STATE"
    install_python
    # shellcheck source=scripts/venv.sh
    source scripts/venv.sh
    make_venv ".[tpu]"
    # jax asks for it on v5e and newer: the runtime starts and stops faster.
    echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
    [ -z "${1:-}" ] || mount_bucket "$1"
    echo "$(hostname): ready"
}

# Ubuntu 22.04 has Python 3.10; uv brings a newer one without touching it.
install_python() {
    local candidate
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return
        fi
    done
    python3 -m pip install --user --quiet uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
    export PYTHON
}

mount_bucket() {
    if ! command -v gcsfuse >/dev/null; then
        local key=/usr/share/keyrings/cloud.google.asc
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update -qq
        sudo apt-get install -y -qq gcsfuse
    fi
    sudo mkdir -p /mnt/bucket
    mountpoint -q /mnt/bucket || sudo chown "$USER" /mnt/bucket
    write_unit rethinker-bucket <<UNIT
[Unit]
Description=The bucket of rethinker_jax
After=network-online.target
Wants=network-online.target
[Service]
Type=forking
User=$USER
ExecStart=/usr/bin/env gcsfuse $1 /mnt/bucket
ExecStop=/usr/bin/env fusermount -u /mnt/bucket
[Install]
WantedBy=multi-user.target
UNIT
    sudo systemctl start rethinker-bucket
}

start() {
    [ -x .venv/bin/python ] || die "$(hostname): not set up; run tpu/pod.sh setup"
    if systemctl is-active --quiet rethinker; then
        die "$(hostname): a run is there already; tpu/pod.sh stop asks it to save and stop"
    fi
    local needs=network-online.target
    [ ! -e /etc/systemd/system/rethinker-bucket.service ] || needs+=" rethinker-bucket.service"
    mkdir -p "$STATE"
    printf '%s\0' "$@" >"$STATE/words"
    rm -f "$STATE/starts"
    # KillMode=mixed: SIGTERM goes to the program alone, and what it started goes when it has saved.
    write_unit rethinker <<UNIT
[Unit]
Description=A run of rethinker_jax
After=$needs
Wants=$needs
StartLimitIntervalSec=0
[Service]
User=$USER
WorkingDirectory=$PWD
ExecStart=/usr/bin/env bash $PWD/tpu/worker.sh launch
Restart=no
RestartForceExitStatus=75 SIGKILL SIGABRT SIGALRM
RestartSec=10
KillMode=mixed
TimeoutStopSec=900
StandardOutput=append:$LOG
StandardError=append:$LOG
[Install]
WantedBy=multi-user.target
UNIT
    sudo systemctl start rethinker
    echo "$(hostname): started"
}

metadata() {
    curl -fsS -H 'Metadata-Flavor: Google' "$METADATA/$1"
}

# tpu_env NAME : a value of the metadata's list of lines NAME: 'value', or nothing.
tpu_env() {
    metadata tpu-env | sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\} *\$/\1/p"
}

# Names the job to jax, by the rules of jax's own detection of TPU VMs: one process a host, slice after slice.
join_job() {
    local endpoints hosts slices first
    endpoints=$(metadata worker-network-endpoints) # host,host,... or name:id:ip,...
    hosts=$(tr ',' '\n' <<<"$endpoints" | grep -c .)
    slices=$(tpu_env MEGASCALE_NUM_SLICES)
    slices=${slices:-1}
    [ $((hosts * slices)) -gt 1 ] || return 0
    first=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS)
    if [ -n "$first" ]; then
        first=${first%%:*}
    else
        first=${endpoints%%,*}
        first=${first##*:}
    fi
    local slice
    slice=$(tpu_env MEGASCALE_SLICE_ID)
    export JAX_COORDINATOR_ADDRESS=$first:$PORT
    export JAX_NUM_PROCESSES=$((hosts * slices))
    export JAX_PROCESS_ID=$((${slice:-0} * hosts + $(metadata agent-worker-number)))
    echo "$(hostname): process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES, coordinator $JAX_COORDINATOR_ADDRESS" >&2
}

launch() {
    join_job
    if [ -f "$STATE/secrets" ]; then # NAME=value lines, such as HF_TOKEN; never printed
        set -a
        # shellcheck source=/dev/null
        source "$STATE/secrets"
        set +a
    fi
    local word words=()
    while IFS= read -r -d '' word; do
        words+=("$word")
    done <"$STATE/words"
    .venv/bin/python -m rethinker_jax.starts "$STATE/starts" "${words[@]}"
    exec .venv/bin/python -m rethinker_jax.main "${words[@]}"
}

property() {
    systemctl show rethinker --property="$1" | cut -d= -f2-
}

# One line: none (nothing was started), running, stopped (by hand), or exited CODE.
state() {
    local active began code
    active=$(property ActiveState)
    began=$(property ExecMainStartTimestampMonotonic) # 0: not since the machine started
    code=$(property ExecMainStatus)
    if [ "$(property LoadState)" != loaded ]; then
        echo "state: none"
    elif [ "$active" != inactive ] && [ "$active" != failed ]; then
        echo "state: running"
    elif [ "$(property UnitFileState)" = disabled ]; then
        echo "state: stopped"
    elif [ "$began" = 0 ]; then
        echo "state: none"
    else
        echo "state: exited $code"
    fi
}

case ${1:-} in
    setup | start | launch | state) "$@" ;;
    logs) tail -n "${2:-50}" "$LOG" | sed "s/^/$(hostname): /" ;;
    stop) sudo systemctl disable --quiet --now rethinker ;; # or it would be back after a reboot
    *) die "${1:-}: wanted setup, start, launch, state, logs or stop" ;;
esac
