"""Where a process finds its place in a job: every launcher's variables, set by hand, and what they have to give.

The names of the variables are those that jax's detection reads (jax/_src/clusters of jax 0.10.2).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import free_port

from rethinker_jax.devices import find_job, tpu_flags
from rethinker_jax.errors import UserError
from rethinker_jax.job_options import take_job_options

REPOSITORY = Path(__file__).parent.parent
LAUNCHERS = ("JAX_COORDINATOR", "JAX_NUM_P", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
# As srun sets them. The port: 70000 mod 4096 = 368 above 61440.
SLURM = {
    "SLURM_JOB_ID": "70000", "SLURM_STEP_NODELIST": "node[007-009,012],other1", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0",
}  # fmt: skip
# mpirun of Open MPI 4. The port: 1531576320 / 4096 = 373920, mod 4096 = 1184 above 61440.
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One in which no launcher has left anything."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        (EXPLICIT, ("10.0.0.9:1234", 3, 2)),
        (SLURM, ("node007:61808", 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "a1,b2"}, ("a1:61808", 4, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, ("10.96.0.1:62624", 2, 1)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234"}, ("10.0.0.9:1234", 4, 3)),
        # What is said by hand goes before a launcher: all three, or the address alone.
        (SLURM | EXPLICIT, ("10.0.0.9:1234", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234"}, ("10.0.0.9:1234", 4, 3)),
    ],
)
def test_a_launcher_gives_address_count_and_number(
    environment: pytest.MonkeyPatch, variables: dict[str, str], wanted: tuple[str, int, int] | None
):
    """A process that overlooks its launcher is a run of its own, beside the others and in the same files."""
    for name, value in variables.items():
        environment.setenv(name, value)
    assert find_job() == wanted


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE=4: this is one of several processes"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: this is one of several"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "TPU_WORKER_HOSTNAMES=a,b: this is one of several"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS=two: wanted a whole number"),
        (EXPLICIT | {"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3, JAX_NUM_PROCESSES=3"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
    ],
)
def test_one_of_several_that_finds_no_meeting_place_is_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], wanted: str
):
    """It would train alone, once for each process, until somebody looks."""
    environment.delenv("JAX_PLATFORMS", raising=False)  # on a CPU that was asked for, a slice's names are no launcher
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=wanted):
        find_job()


# The library with which jax asks a TPU VM's metadata server, which answers from METADATA.
REQUESTS = """
import json, os, types
def get(url, **_):
    text = json.loads(os.environ["METADATA"]).get(url.rsplit("/", 1)[1])
    return types.SimpleNamespace(status_code=404 if text is None else 200, text=text or "")
"""
ON_TPU = """
import json, os, sys, time
from rethinker_jax.devices import find_job
time.sleep = lambda seconds: None  # between questions that nobody answers
del os.environ["TPU_SKIP_MDS_QUERY"]  # set where there is no chip
for case in json.loads(sys.argv[1]):
    os.environ.update(case)
    print(json.dumps(find_job()))
    for name in case:
        del os.environ[name]
"""
VM = {"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2", "agent-worker-number": "1", "tpu-env": "ZONE: 'z'\n"}
SLICES = "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1:8080'\n"
POD = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}
MEGASCALE = {"MEGASCALE_COORDINATOR_ADDRESS": "10.1.0.1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
TPU_CASES: list[tuple[dict[str, str], dict[str, str], list[str | int] | None]] = [
    # (variables, metadata, wanted). A TPU VM: host 1 of 2; then host 1 of 2 in slice 2 of 3: 2 * 2 + 1.
    ({}, VM, ["10.0.0.1:8482", 2, 1]),
    ({}, VM | {"worker-network-endpoints": "10.0.0.1,10.0.0.2"}, ["10.0.0.1:8482", 2, 1]),
    ({}, VM | {"tpu-env": SLICES}, ["10.1.0.1:8482", 6, 5]),
    ({}, VM | {"worker-network-endpoints": "10.0.0.1", "agent-worker-number": "0"}, None),
    # GKE, whose controller puts these into the pods of a JobSet: host 1 of 2; then host 1 of 2 in slice 1 of 2.
    (POD, {}, ["10.0.0.1:8482", 2, 1]),
    (POD | MEGASCALE, {}, ["10.1.0.1:8482", 4, 3]),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
]


def test_tpu_hosts_and_slices(tmp_path: Path):
    """In a process of its own, in which jax believes that it is on a TPU host: it looks when it is imported."""
    (tmp_path / "requests.py").write_text(REQUESTS)
    clean = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "JAX_PLATFORMS"))}
    path = f"{tmp_path}:{REPOSITORY}"
    cases = [variables | {"METADATA": json.dumps(metadata)} for variables, metadata, _ in TPU_CASES]
    done = subprocess.run(
        [sys.executable, "-c", ON_TPU, json.dumps(cases)],
        env=clean | {"PYTHONPATH": path, "JAX_FORCE_TPU_INIT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [wanted for _, _, wanted in TPU_CASES]


def test_job_options_are_variables_and_not_part_of_the_command():
    """The rest is compared between the processes of a job: with a number of its own in it, each would be a stranger."""
    words = ["--processes", "3", "train", "--process=2", "c.yaml", "--mesh", "--coordinator", "10.0.0.9:1234", "a.b=1"]
    assert take_job_options(words) == (["train", "c.yaml", "--mesh", "a.b=1"], EXPLICIT)
    assert take_job_options(["train", "--mesh"]) == (["train", "--mesh"], {})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--process 1", "--coordinator, --processes: wanted all of"),
        ("--coordinator a:1 --processes 2 --process", "--process: wanted all of"),
        ("--coordinator a:1 --processes 2 --process 2", "--processes 2 --process 2: wanted the number"),
        ("--coordinator a:1 --processes two --process 0", "--processes two"),
        ("--process 0 --process 1", "--process is given twice"),
    ],
)
def test_job_options_that_are_no_place(words: str, wanted: str):
    with pytest.raises(UserError, match=wanted):
        take_job_options(words.split())


def test_a_peer_that_is_missing_is_named_in_time():
    """By options, from the command line: 75, as it may be on its way. Without a limit it would wait for ever."""
    address = f"127.0.0.1:{free_port()}"
    words = ["--coordinator", address, "--processes", "2", "--process", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "rethinker_jax.main", "train", "--mesh", *words],
        env=os.environ | {"RETHINKER_JOIN_TIMEOUT_S": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 75, done.stderr
    assert f"process 1 waited 1 s for process 0 at {address}" in done.stderr


def test_flags_for_tpus_keep_what_was_given():
    disabled = "--xla_disable_hlo_passes=while-loop-all-reduce-code-motion"
    assert tpu_flags("") == disabled
    assert tpu_flags("--xla_dump_to=/tmp/x") == f"--xla_dump_to=/tmp/x {disabled}"
    assert tpu_flags("--xla_disable_hlo_passes=other") == "--xla_disable_hlo_passes=other"  # somebody knows better
