"""The scripts of tpu/ and scripts/: what they would run, in which order, and that a dry run runs nothing."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("tpu/*.sh"), *ROOT.glob("scripts/*.sh")])
POD = {
    "PROJECT": "my-project", "ZONE": "us-east5-a", "NAME": "pod1", "ACCELERATOR": "v5p-8",
    "RUNTIME_VERSION": "v2-alpha-tpuv5",
}  # fmt: skip
WHERE = "--project=my-project --zone=us-east5-a"
CREATE = "--accelerator-type=v5p-8"
CONFIG = "configs/example_pipeline.yaml"
HARD = """reward.prompt="it's $HOME; a\\b & `c`" """  # quotes of both kinds, blanks, and what a shell would expand


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for the front of PATH, where what talks to other machines leaves a note and fails."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("gcloud", "kubectl", "ssh", "scp", "srun", "scancel", "scontrol", "sudo", "systemctl", "curl"):
        program(tools, name, f'echo {name} "$@" >> {tmp_path}/ran; exit 99')
    return tools


def program(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def call(tools: Path, *words: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL_", "XLA_", "SLURM_"))}
    env = clean | {"PATH": f"{tools}:{os.environ['PATH']}"} | environment
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def settings(path: Path, values: dict[str, str]) -> Path:
    path.write_text("# made up\n\n" + "".join(f"{name}={value}\n" for name, value in values.items()))
    return path


def pod(tools: Path, command: str, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    env_file = settings(tools.parent / "pod.env", POD | values)
    return call(tools, "tpu/pod.sh", "--env", env_file, "--dry-run", *command.split(), *words)


def dry(tools: Path, command: str, *words: str, **values: str) -> list[str]:
    """The gcloud commands of a dry run, unquoted again, and nothing may have run."""
    done = pod(tools, command, *words, **values)
    assert done.returncode == 0, done.stderr
    assert not (tools.parent / "ran").exists()
    return [" ".join(line[1:]) for line in commands(done.stdout) if line[0] == "gcloud"]


def commands(text: str) -> list[list[str]]:
    """The words of every printed command, as a shell reads them; a quoted word may run over lines."""
    found, lines = [], ""
    for line in text.splitlines():
        lines += line + "\n"
        try:
            words = shlex.split(lines, comments=True)
        except ValueError:
            continue
        lines = ""
        if words:
            found.append(words)
    assert not lines
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_clean(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; the test extra brings it")
    done = subprocess.run([shellcheck, "-x", "--shell=bash", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu/pod.sh", "tpu/jobset.sh", "scripts/slurm.sh", "scripts/gpu_nodes.sh"])
def test_help_says_what_was_never_tried(tools: Path, script: str):
    done = call(tools, script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert any(words in done.stdout for words in ("Nothing here has run on", "has not run on", "Not tried on"))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, f"tpu-vm create pod1 {WHERE} {CREATE} --version=v2-alpha-tpuv5"),
        ({"SPOT": "yes"}, f"tpu-vm create pod1 {WHERE} {CREATE} --version=v2-alpha-tpuv5 --spot"),
        (
            {"QUEUED": "yes"},
            f"queued-resources create pod1 {WHERE} --node-id=pod1 {CREATE} --runtime-version=v2-alpha-tpuv5",
        ),
        (
            {"QUEUED": "yes", "SPOT": "yes", "NUM_SLICES": "2"},
            f"queued-resources create pod1 {WHERE} --node-count=2 --node-prefix=pod1 {CREATE} "
            "--runtime-version=v2-alpha-tpuv5 --spot",
        ),
    ],
)
def test_create(tools: Path, values: dict[str, str], wanted: str):
    """tpu-vm calls the software --version and queued-resources --runtime-version; slices are a count and a prefix."""
    found = dry(tools, "create", **values)
    assert found[0] == f"compute tpus {wanted}"
    listing = f"compute tpus queued-resources list {WHERE} --filter=name~/pod1$ --format=value(state.state)"
    assert found[1:] == ([listing] if values.get("QUEUED") else [])


def test_options_are_as_settings_before_and_behind_the_command(tools: Path):
    env_file = settings(tools.parent / "pod.env", POD)
    for words in (["--spot", "--queued", "--dry-run", "create"], ["create", "--spot", "--queued", "--dry-run"]):
        done = call(tools, "tpu/pod.sh", "--env", env_file, *words)
        assert "queued-resources create pod1" in done.stdout and done.stdout.splitlines()[0].endswith("--spot")
        assert "set BUCKET" in done.stderr
    assert not (tools.parent / "ran").exists()


@pytest.mark.parametrize(
    ("slices", "copy", "everywhere", "first"),
    [
        ("1", f"tpu-vm scp ARCHIVE pod1:rethinker_jax.tar.gz {WHERE} --worker=all",
         f"tpu-vm ssh pod1 {WHERE} --worker=all", f"tpu-vm ssh pod1 {WHERE} --worker=0"),
        ("2", f"queued-resources scp ARCHIVE pod1:rethinker_jax.tar.gz {WHERE} --node=all --worker=all",
         f"queued-resources ssh pod1 {WHERE} --node=all --worker=all",
         f"queued-resources ssh pod1 {WHERE} --node=0 --worker=0"),
    ],
)  # fmt: skip
def test_setup_run_and_watch(tools: Path, slices: str, copy: str, everywhere: str, first: str):
    """Every worker of every slice is set up and started; a slice that is left out would let the others wait for it."""
    values = {"QUEUED": "yes", "SPOT": "yes", "NUM_SLICES": slices, "BUCKET": "gs://my-bucket"}
    worker = "bash rethinker_jax/tpu/worker.sh"
    archive = f"{os.environ.get('TMPDIR', '/tmp')}/rethinker_jax.pod1.tar.gz"
    copied = [
        "compute tpus " + copy.replace("ARCHIVE", archive),
        f"compute tpus {everywhere} --command=mkdir -p rethinker_jax && tar -xzf rethinker_jax.tar.gz -C rethinker_jax",
    ]
    setup = [*copied, f"compute tpus {everywhere} --command={worker} setup my-bucket"]
    start = f"compute tpus {everywhere} --command={worker} start {CONFIG} --mesh fsdp=4 "
    start += "run.dir=/mnt/bucket/runs/example_pipeline"
    assert dry(tools, "setup", **values) == setup
    assert dry(tools, "run", CONFIG, "--mesh", "fsdp=4", **values) == [*copied, start]

    state = f"compute tpus queued-resources list {WHERE} --filter=name~/pod1$ --format=value(state.state)"
    create = dry(tools, "create", **values)
    watched = dry(tools, "watch", CONFIG, "--mesh", "fsdp=4", **values)
    asked = f"compute tpus {first} --command={worker} state"
    deleted = f"compute tpus queued-resources delete pod1 {WHERE} --force --quiet"
    assert watched == [state, asked, deleted, *create, *setup, start]


def test_the_other_commands(tools: Path):
    ssh = f"compute tpus tpu-vm ssh pod1 {WHERE} --worker"
    worker = "bash rethinker_jax/tpu/worker.sh"
    assert dry(tools, "status") == [
        f"compute tpus tpu-vm list {WHERE} --filter=name~/pod1$ --format=value(state)",
        f"{ssh}=all --command={worker} state",
    ]
    assert dry(tools, "logs", "20") == [f"{ssh}=all --command={worker} logs 20"]
    assert dry(tools, "stop") == [f"{ssh}=all --command={worker} stop"]
    assert dry(tools, "delete") == [f"compute tpus tpu-vm delete pod1 {WHERE} --quiet"]
    assert dry(tools, "fetch", "mine", "/there", BUCKET="gs://my-bucket") == [
        "storage rsync --recursive --exclude=^checkpoints/ gs://my-bucket/runs/mine /there"
    ]
    assert [line.split()[2:4] for line in dry(tools, "fetch", "mine")] == [["tpu-vm", "ssh"], ["tpu-vm", "scp"]]


def test_a_run_directory_of_ones_own_is_left_alone(tools: Path):
    found = dry(tools, "run train", CONFIG, "run.dir=/mnt/bucket/mine", BUCKET="gs://my-bucket")
    assert found[-1].endswith(f"worker.sh start train {CONFIG} run.dir=/mnt/bucket/mine")


def test_delete_asks(tools: Path):
    """Without an answer nothing is deleted; --yes deletes (here: calls the gcloud that fails)."""
    env_file = settings(tools.parent / "pod.env", POD)
    done = call(tools, "tpu/pod.sh", "--env", env_file, "delete")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("error: nothing was deleted")
    assert not (tools.parent / "ran").exists()
    assert call(tools, "tpu/pod.sh", "--env", env_file, "delete", "--yes").returncode == 99
    assert (tools.parent / "ran").read_text() == f"gcloud compute tpus tpu-vm delete pod1 {WHERE} --quiet\n"


@pytest.mark.parametrize(
    ("values", "words", "wanted"),
    [
        ({"ZONE": ""}, "create", "ZONE is missing"),
        ({"ZONE": "us-east5"}, "create", "ZONE=us-east5: wanted something like us-east5-a"),
        ({"ZONES": "x"}, "create", "no setting is called 'ZONES'"),
        ({"NAME": "my pod"}, "create", "NAME=my pod"),
        ({"SPOT": "maybe"}, "create", "SPOT=maybe"),
        ({"NUM_SLICES": "0"}, "create", "NUM_SLICES=0"),
        ({"NUM_SLICES": "2"}, "create", "NUM_SLICES=2 wants QUEUED=yes"),
        ({"BUCKET": "my-bucket"}, "create", "gs://my-bucket"),
        ({}, "frobnicate", "frobnicate: no such command"),
        ({}, "create --fast", "--fast: create has no such option"),
        ({}, "run", "wanted the CONFIG.yaml"),
        ({}, "run nothing.yaml", "nothing.yaml: no such file"),
        ({}, "watch ../mine.yaml", "a file of this repository"),
        ({}, "logs all", "wanted a number"),
        ({}, "fetch", "wanted the name of the run"),
    ],
)
def test_bad_input_is_one_sentence(tools: Path, values: dict[str, str], words: str, wanted: str):
    done = pod(tools, words, **values)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and wanted in done.stderr and done.stderr.count("\n") == 1


def test_settings_are_read_and_not_executed(tools: Path):
    note = tools.parent / "note"
    done = pod(tools, "create", PROJECT=f"$(touch {note})")
    assert done.returncode == 2 and not note.exists()
    done = call(tools, "tpu/pod.sh", "--env", tools.parent / "none.env", "create")
    assert done.returncode == 2 and "no such file; copy" in done.stderr


def test_the_examples_are_valid(tools: Path):
    assert call(tools, "tpu/pod.sh", "--env", "tpu/pod.env.example", "--dry-run", "create").returncode == 0
    assert call(tools, "tpu/jobset.sh", "--env", "tpu/jobset.env.example", CONFIG).returncode == 0


# In the place of the program's python: who asks how often a run was started gets the true answer.
STARTS = f'[ "$2" != rethinker_jax.starts ] || PYTHONPATH={ROOT} exec {sys.executable} "$@"'
SHOW = """printf '%s\\0' "${JAX_COORDINATOR_ADDRESS:-}" "${JAX_NUM_PROCESSES:-}" "${JAX_PROCESS_ID:-}" "$@" > "$OUT" """


def worker(tools: Path, metadata: dict[str, str], *words: str) -> tuple[list[str], dict[str, str]]:
    """A run on a made-up worker: coordinator, processes, process and the program's words; and the unit files."""
    here = tools.parent
    home, units = here / "home", here / "units"
    for directory in (home / "rethinker_jax/tpu", home / "rethinker_jax/.venv/bin", units, here / "metadata"):
        directory.mkdir(parents=True)
    shutil.copy(ROOT / "tpu/worker.sh", home / "rethinker_jax/tpu")
    program(home / "rethinker_jax/.venv/bin", "python", f"{STARTS}; {SHOW}")
    program(tools, "sudo", f'[ "$1" != tee ] || cat > {units}/"$(basename "$2")"')
    program(tools, "systemctl", "exit 3")
    program(tools, "curl", f'url=${{!#}}; cat "{here}/metadata/${{url##*/}}"')
    for name, value in metadata.items():
        (here / "metadata" / name).write_text(value)
    # The command as gcloud would hand it to the shell of the worker.
    sent = next(word for word in commands(pod(tools, "run", *words).stdout)[-1] if word.startswith("--command="))
    out = here / "out"
    names = {"HOME": str(home), "USER": "me", "OUT": str(out)}
    done = call(tools, "-c", sent.removeprefix("--command="), cwd=home, **names)
    assert done.returncode == 0, done.stderr
    done = call(tools, "rethinker_jax/tpu/worker.sh", "launch", cwd=home, **names)
    assert done.returncode == 0, done.stderr
    return out.read_text().split("\0")[:-1], {path.name: path.read_text() for path in units.iterdir()}


ONE_HOST = {"worker-network-endpoints": "10.0.0.1", "agent-worker-number": "0", "tpu-env": "ZONE: 'a'\n"}


def test_words_survive_two_shells_and_a_file(tools: Path):
    words, units = worker(tools, ONE_HOST, CONFIG, "--mesh", "fsdp=4", HARD, "model.path=/a b")
    assert words == ["", "", "", "-m", "rethinker_jax.main", CONFIG, "--mesh", "fsdp=4", HARD, "model.path=/a b"]
    assert "RestartForceExitStatus=75 SIGKILL SIGABRT SIGALRM\n" in units["rethinker.service"]
    assert "\nUser=me\n" in units["rethinker.service"]


@pytest.mark.parametrize(
    ("endpoints", "number", "tpu_env", "wanted"),
    [
        # Old form of the list: name:id:ip. Host 2 of 4.
        ("a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3,d:3:10.0.0.4", "2", "", ["10.0.0.1:8482", "4", "2"]),
        # Host 1 of 2 in slice 1 of 3: process 1 * 2 + 1 of 6; the coordinator is in slice 0.
        (
            "h2,h3",
            "1",
            "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1:8080'\n",
            ["10.1.0.1:8482", "6", "3"],
        ),
    ],
)
def test_a_worker_knows_its_place_in_the_job(tools: Path, endpoints: str, number: str, tpu_env: str, wanted: list[str]):
    """Two processes with one number, or a coordinator each, would wait for the others until they time out."""
    metadata = {"worker-network-endpoints": endpoints, "agent-worker-number": number, "tpu-env": tpu_env}
    assert worker(tools, metadata, CONFIG)[0][:3] == wanted


PROPERTIES = ("LoadState", "ActiveState", "ExecMainStatus", "ExecMainStartTimestampMonotonic", "UnitFileState")


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ("not-found inactive 0 0 -", "none"),
        ("loaded active 0 5 enabled", "running"),
        ("loaded activating 75 5 enabled", "running"),  # waits for its restart
        ("loaded inactive 0 0 enabled", "none"),  # after a reboot: 0 is no exit code
        ("loaded inactive 0 5 enabled", "exited 0"),
        ("loaded failed 2 5 enabled", "exited 2"),
        ("loaded failed 75 5 disabled", "stopped"),  # by hand, so that watch does not start it again
    ],
)
def test_the_state_of_a_run(tools: Path, shown: str, wanted: str):
    pairs = zip(PROPERTIES, shown.split(), strict=True)
    cases = " ".join(f"--property={name}) echo {name}={value} ;;" for name, value in pairs)
    program(tools, "systemctl", f'case "$3" in {cases} *) exit 1 ;; esac')
    done = call(tools, "tpu/worker.sh", "state")
    assert done.stdout == f"state: {wanted}\n"


GCLOUD = """case "$*" in
*" list "*) sed -n 1p LOOKS | cut -d: -f1; sed -n '1s/.*://p' LOOKS > LOOKS.run; sed -i 1d LOOKS ;;
*"worker.sh state"*) echo "state: $(cat LOOKS.run)" ;;
*) echo "$*" >> RAN ;;
esac"""


@pytest.mark.parametrize(
    ("looks", "code", "wanted"),
    [
        # A preempted pod is given back, rented again, set up and started; the run is done at the next look.
        (
            "SUSPENDED:;:;WAITING_FOR_RESOURCES:;ACTIVE:;ACTIVE:none;ACTIVE:exited 0",
            0,
            ["delete", "create", "scp", "setup", "start"],
        ),
        # Twice: while it runs, and before.
        (
            "PREEMPTED:;:;ACTIVE:;ACTIVE:none;ACTIVE:running;TERMINATED:;:;ACTIVE:;ACTIVE:none;ACTIVE:exited 0",
            0,
            ["delete", "create", "scp", "setup", "start"] * 2,
        ),
        ("ACTIVE:running;ACTIVE:exited 75;ACTIVE:exited 0", 0, ["start"]),
        ("ACTIVE:stopped", 75, []),
        ("ACTIVE:exited 2", 2, ["logs"]),
        ("FAILED:", 1, []),
    ],
)
def test_watch(tools: Path, looks: str, code: int, wanted: list[str]):
    """`looks` are what gcloud answers, look for look: the state of the pod, and of the run."""
    answers, note = tools.parent / "looks", tools.parent / "ran"
    answers.write_text(looks.replace(";", "\n") + "\n")
    program(tools, "sleep", "true")
    program(tools, "gcloud", GCLOUD.replace("LOOKS", str(answers)).replace("RAN", str(note)))
    env_file = settings(tools.parent / "pod.env", POD | {"QUEUED": "yes", "SPOT": "yes", "BUCKET": "gs://b"})
    done = call(tools, "tpu/pod.sh", "--env", env_file, "watch", CONFIG, TMPDIR=str(tools.parent))
    assert done.returncode == code, done.stderr
    ran = note.read_text().splitlines() if note.exists() else []
    verbs = ("delete", "create", "scp", "worker.sh setup", "worker.sh start", "worker.sh logs")
    assert [verb.split()[-1] for line in ran for verb in verbs if f"{verb} " in line] == wanted


JOBSET = {
    "NAME": "job1", "IMAGE": "us-docker.pkg.dev/p/r/i:1", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x4",
    "NODES": "4", "CHIPS": "4", "NUM_SLICES": "2", "SPOT": "yes", "BUCKET": "gs://my-bucket", "SERVICE_ACCOUNT": "sa",
}  # fmt: skip


def manifest(tools: Path, *words: str, **values: str) -> dict[str, Any]:
    env_file = settings(tools.parent / "jobset.env", JOBSET | values)
    done = call(tools, "tpu/jobset.sh", "--env", env_file, *words)
    assert done.returncode == 0, done.stderr
    assert "$" + "{" not in done.stdout and not (tools.parent / "ran").exists()
    return yaml.safe_load(done.stdout)


def test_jobset_holds_the_required_fields(tools: Path):
    """The part of JobSet v1alpha2 and batch/v1 that this manifest uses, by their published types."""
    found = manifest(tools, CONFIG)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "job1"
    spec = found["spec"]
    assert set(spec) == {"failurePolicy", "replicatedJobs"}
    policy = spec["failurePolicy"]
    assert isinstance(policy["maxRestarts"], int) and policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = spec["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 and job["backoffLimit"] == 0
    assert job["completionMode"] == "Indexed"
    pod_spec = job["template"]["spec"]
    # Kubernetes takes a podFailurePolicy only with restartPolicy Never, and a status is a string.
    assert pod_spec["restartPolicy"] == "Never"
    exits, conditions = job["podFailurePolicy"]["rules"]
    (container,) = pod_spec["containers"]
    wanted = {"containerName": container["name"], "operator": "In", "values": [75]}
    assert exits == {"action": "FailJob", "onExitCodes": wanted}
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == JOBSET["IMAGE"]
    assert pod_spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod_spec["volumes"]} == {"bucket"}
    attributes = pod_spec["volumes"][0]["csi"]["volumeAttributes"]
    assert attributes == {"bucketName": "my-bucket", "hostNetworkPodKSA": "true"}


def test_jobset_of_one_slice(tools: Path):
    """One slice needs no network of the node; with the label `spot` its pods would wait for nodes that never come."""
    found = manifest(tools, CONFIG, NUM_SLICES="1", SPOT="no")
    pod_spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod_spec["hostNetwork"] is False and pod_spec["dnsPolicy"] == "ClusterFirst"
    assert "cloud.google.com/gke-spot" not in pod_spec["nodeSelector"]


def test_jobset_words_survive_yaml(tools: Path):
    """The list is JSON, which is YAML: no word may become a map, a comment or a number."""
    found = manifest(tools, CONFIG, "--mesh", "fsdp=4", HARD, "a=- {b: c} # d", "7")
    args = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[:-1] == [CONFIG, "--mesh", "fsdp=4", HARD, "a=- {b: c} # d", "7"]
    assert args[-1] == "run.dir=/mnt/bucket/runs/example_pipeline"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"TOPOLOGY": "4x8"}, "are not the chips of TOPOLOGY=4x8"),  # 4 nodes of 4 chips are 16, not 32
        ({"NODES": "1", "CHIPS": "16"}, "GKE wants slices of several nodes"),
        ({"IMAGE": ""}, "IMAGE is missing"),
        ({"CHIPS": "four"}, "CHIPS=four"),
    ],
)
def test_jobset_bad_settings(tools: Path, values: dict[str, str], wanted: str):
    done = call(tools, "tpu/jobset.sh", "--env", settings(tools.parent / "jobset.env", JOBSET | values), CONFIG)
    assert done.returncode == 2 and done.stdout == ""
    assert wanted in done.stderr and done.stderr.count("\n") == 1


def test_slurm_dry_run(tools: Path):
    done = call(tools, "scripts/slurm.sh", "--dry-run", "mine.yaml", "--mesh", HARD)
    words = shlex.split(done.stdout)
    assert words[0] == "srun" and words[-5:] == ["-m", "rethinker_jax.main", "mine.yaml", "--mesh", HARD]
    assert not (tools.parent / "ran").exists()
    for words in (["--dry-run"], [], ["--mesh"]):
        done = call(tools, "scripts/slurm.sh", *words)
        assert done.returncode == 2 and "wanted the CONFIG.yaml" in done.stderr


def test_slurm_directives_come_first():
    """sbatch stops reading directives at the first command."""
    lines = (ROOT / "scripts/slurm.sh").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(directives)] == directives
    assert {"#SBATCH --requeue", "#SBATCH --ntasks-per-node=1", "#SBATCH --signal=B:USR1@600"} <= set(directives)


@pytest.mark.parametrize(
    ("srun", "code", "wanted"),
    [
        ("exit 75", 75, ["scontrol requeue 7"]),
        ("exit 137", 137, ["scontrol requeue 7"]),  # killed; the others left with 75
        ("exit 2", 2, []),
        ("exit 0", 0, []),
        # The time is up: USR1 comes to the script, SIGTERM goes to the steps, and they save for a moment.
        ("kill -USR1 $PPID; sleep 0.3; exit 75", 75, ["scancel --signal=TERM 7", "scontrol requeue 7"]),
    ],
)
def test_slurm_requeues_what_can_go_on(tools: Path, tmp_path: Path, srun: str, code: int, wanted: list[str]):
    program(tools, "srun", f'echo "$JAX_LOCAL_DEVICE_IDS" > {tmp_path}/ids; {srun}')
    for name in ("scancel", "scontrol"):
        program(tools, name, f'echo {name} "$@" >> {tmp_path}/ran')
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program(tmp_path / ".venv/bin", "python", STARTS)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    done = call(tools, ROOT / "scripts/slurm.sh", "mine.yaml", cwd=tmp_path, **slurm)
    assert done.returncode == code, done.stderr
    ran = tmp_path / "ran"
    assert (ran.read_text().splitlines() if ran.exists() else []) == wanted
    # One process a node takes all its GPUs; jax alone would give it the first.
    assert (tmp_path / "ids").read_text() == "0,1,2,3\n"


def test_gpu_nodes_dry_run(tools: Path):
    words = ["--dry-run", "--hosts", "me@a,b", "--dir", "/my code", "--interface", "eth1", "start", "mine.yaml", HARD]
    done = call(tools, "scripts/gpu_nodes.sh", *words, NCCL_DEBUG="INFO")
    assert done.returncode == 0, done.stderr
    assert not (tools.parent / "ran").exists()
    for number, (host, line) in enumerate(zip(("me@a", "b"), commands(done.stdout), strict=True)):
        assert line[:5] == ["ssh", "-n", "-o", "BatchMode=yes", host]
        remote = shlex.split(line[5])
        assert remote[:2] == ["cd", "/my code"]
        job = {"JAX_COORDINATOR_ADDRESS=a:8476", "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={number}"}
        assert job | {"NCCL_SOCKET_IFNAME=eth1", "NCCL_DEBUG=INFO"} <= set(remote)
        assert remote[remote.index("loop") :][1:3] == ["mine.yaml", HARD]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["start", "mine.yaml"], "wanted --hosts"),
        (["--hosts", "a b", "start", "mine.yaml"], "'a b'"),
        (["--hosts", "a", "start"], "wanted the CONFIG.yaml"),
        (["--hosts", "a", "--port", "x", "status"], "--port x"),
        (["--hosts", "a", "go"], "go: no such command"),
    ],
)
def test_gpu_nodes_bad_input(tools: Path, words: list[str], wanted: str):
    done = call(tools, "scripts/gpu_nodes.sh", *words)
    assert done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1


def gpu_node(tools: Path, python: str) -> list[str | Path]:
    """A repository whose program is `python`, on a host that ssh reaches; returns the start of the command."""
    home = tools.parent / "home"
    for directory in ("scripts", "tpu", ".venv/bin"):
        (home / directory).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/gpu_nodes.sh", home / "scripts")
    shutil.copy(ROOT / "tpu/settings.sh", home / "tpu")
    program(home / ".venv/bin", "python", f"{STARTS}; {python}")
    program(tools, "ssh", 'exec bash -c "${!#}"')
    return ["scripts/gpu_nodes.sh", "--hosts", "a", "--dir", home]


def until(tools: Path, command: list[str | Path], wanted: str) -> str:
    """What `command` prints, once it is `wanted` or half a minute is over."""
    deadline = time.monotonic() + 30
    while (found := call(tools, *command).stdout) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_gpu_nodes_start_returns_and_the_run_starts_again_after_75(tools: Path):
    """The ssh session ends while the run goes on: one that waits would end the run with the network."""
    home = tools.parent / "home"
    # First 75, then 0; each time the words are kept. Nothing is written before the gate is there.
    python = 'until [ -e gate ]; do sleep 0.05; done; echo "$4" >> words; [ "$(wc -l < words)" -gt 1 ] || exit 75'
    command = gpu_node(tools, python)
    done = call(tools, *command, "start", "mine.yaml", HARD, RESTART_SECONDS="0")
    assert done.returncode == 0, done.stderr
    (home / "gate").touch()
    assert until(tools, [*command, "status"], "ended with 0\n") == "ended with 0\n"
    assert (home / "words").read_text() == f"{HARD}\n" * 2


def test_gpu_nodes_stop_is_not_undone(tools: Path):
    """The run answers SIGTERM with 75; a loop that knows no more would start it again."""
    command = gpu_node(tools, "trap 'exit 75' TERM; echo up >> ups; while :; do sleep 0.05; done")
    assert call(tools, *command, "start", "mine.yaml", RESTART_SECONDS="0").returncode == 0
    ups = tools.parent / "home/ups"
    assert until(tools, ["-c", f"cat {ups}"], "up\n") == "up\n"
    assert call(tools, *command, "status").stdout == "running\n"
    assert call(tools, *command, "stop").returncode == 0
    assert until(tools, [*command, "status"], "ended with 75\n") == "ended with 75\n"
    assert ups.read_text() == "up\n"


KILLED = "echo up >> ups; exit 137"  # each time before its first step, as for want of memory


def test_gpu_nodes_do_not_restart_for_ever(tools: Path):
    """Six starts, five of them again. A loop without a limit keeps the machine, and its price, until somebody looks."""
    command = gpu_node(tools, KILLED)
    assert call(tools, *command, "start", "mine.yaml", RESTART_SECONDS="0").returncode == 0
    assert until(tools, [*command, "status"], "ended with 2\n") == "ended with 2\n"
    home = tools.parent / "home"
    assert (home / "ups").read_text() == "up\n" * 6
    assert "started 6 times without a step made in runs/mine" in (home / "runs/gpu_node.log").read_text()


def test_gpu_nodes_that_make_steps_restart_as_often_as_needed(tools: Path):
    """Nine times killed, a step made each time: nothing is wrong with the run."""
    step = "mkdir -p runs/mine; cd runs/mine; echo {} >> metrics.jsonl; [ $(wc -l < metrics.jsonl) -gt 9 ] || exit 137"
    command = gpu_node(tools, step)
    assert call(tools, *command, "start", "mine.yaml", RESTART_SECONDS="0").returncode == 0
    assert until(tools, [*command, "status"], "ended with 0\n") == "ended with 0\n"


def test_slurm_does_not_requeue_for_ever(tools: Path, tmp_path: Path):
    """The seventh start of one job ends with 2, which is not put into the queue; another job begins its own count."""
    for name in ("srun", "scontrol"):
        program(tools, name, f"echo {name} >> {tmp_path}/ran; {'exit 137' if name == 'srun' else 'true'}")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program(tmp_path / ".venv/bin", "python", STARTS)
    codes = [
        call(tools, ROOT / "scripts/slurm.sh", "mine.yaml", cwd=tmp_path, SLURM_JOB_ID=job).returncode
        for job in ["7"] * 7 + ["8"]
    ]
    assert codes == [137] * 6 + [2, 137]
    assert (tmp_path / "ran").read_text() == "srun\nscontrol\n" * 7


def test_a_worker_does_not_restart_for_ever(tools: Path):
    """systemd starts again after 137, not after 2; a start by hand begins a new count."""
    worker(tools, ONE_HOST, CONFIG)  # started, and launched once
    home = tools.parent / "home"
    names = {"HOME": str(home), "USER": "me", "OUT": str(tools.parent / "out")}

    def run(*words: str) -> int:
        return call(tools, "rethinker_jax/tpu/worker.sh", *words, cwd=home, **names).returncode

    assert [run("launch") for _ in range(6)] == [0] * 5 + [2]
    assert [run("start", CONFIG), run("launch")] == [0, 0]
