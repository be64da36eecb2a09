"""What the launchers hand to others, against what those know: JobSet and Kubernetes, sbatch, gcloud.

tests/data/jobset_fields.json holds the part of the types that the manifest uses, and says where it is from.
"""

import copy
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((Path(__file__).parent / "data" / "jobset_fields.json").read_text(encoding="utf-8"))
PYTHON = {"str": str, "int": int, "bool": bool}
SETTINGS = {
    "NAME": "job1", "IMAGE": "us-docker.pkg.dev/p/r/i:1", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "2x2x2",
    "NODES": "2", "CHIPS": "4", "BUCKET": "gs://my-bucket", "SERVICE_ACCOUNT": "sa",
}  # fmt: skip


def problems(value: Any, kind: str = SCHEMA["root"], where: str = "") -> list[str]:
    """Everything about `value` that an object of this kind has not: fields, their types, what is required."""
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{where}: wanted a list"]
        return [said for n, one in enumerate(value) for said in problems(one, kind[1:-1], f"{where}[{n}]")]
    if kind.startswith("{"):
        if not isinstance(value, dict):
            return [f"{where}: wanted a map"]
        return [said for key, one in value.items() for said in problems(one, kind[1:-1], f"{where}.{key}")]
    if kind in PYTHON:
        # A bool is an int to Python, not to Kubernetes.
        return [] if type(value) is PYTHON[kind] else [f"{where}: wanted {kind}, came {value!r}"]
    if kind.endswith("Quantity"):
        return [] if type(value) in (int, str) else [f"{where}: wanted a quantity, came {value!r}"]
    if kind not in SCHEMA["types"]:
        return [f"{where}: the table has no {kind}; run scripts/jobset_fields.py"]
    if not isinstance(value, dict):
        return [f"{where}: wanted a {kind}, came {value!r}"]
    return of_fields(value, kind, where)


def of_fields(value: dict[str, Any], kind: str, where: str) -> list[str]:
    fields, required = SCHEMA["types"][kind]["fields"], SCHEMA["types"][kind]["required"]
    found = [f"{where}.{key}: missing" for key in required if key not in value]
    for key, one in value.items():
        if key not in fields:
            found.append(f"{where}.{key}: no such field")
            continue
        found += problems(one, fields[key], f"{where}.{key}")
        allowed = SCHEMA["values"].get(f"{kind}.{key}", [one])
        found += [] if one in allowed else [f"{where}.{key}: wanted one of {', '.join(allowed)}, came {one}"]
    return found


def manifest(folder: Path, **values: str) -> dict[str, Any]:
    env_file = folder / "jobset.env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in (SETTINGS | values).items()), encoding="utf-8")
    words = [
        "bash",
        "tpu/jobset.sh",
        "--env",
        str(env_file),
        "configs/example_pipeline.yaml",
        "--mesh",
        "data=2,fsdp=8",
    ]
    return yaml.safe_load(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("slices", ["1", "2"])
@pytest.mark.parametrize("spot", ["no", "yes"])
def test_the_manifest_is_of_the_published_types(tmp_path: Path, slices: str, spot: str):
    found = manifest(tmp_path, NUM_SLICES=slices, SPOT=spot)
    assert problems(found) == []
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["spec"]["replicatedJobs"][0]["replicas"] == int(slices)


POD = "spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        # A misspelt field beside the right one: the server would drop it, or refuse the whole.
        ("spec.replicatedJob", [], ".spec.replicatedJob: no such field"),
        (f"{POD}.nodeSelectr", {}, "spec.nodeSelectr: no such field"),
        (f"{POD}.containers.0.resources.limit", {}, "resources.limit: no such field"),
        ("spec.failurePolicy.rules.0.onJobFailureReason", [], "rules[0].onJobFailureReason: no such field"),
        # Values of another type, as YAML makes them of words without quotes.
        (f"{POD}.nodeSelector.a", True, "nodeSelector.a: wanted str, came True"),
        (f"{POD}.hostNetwork", "false", "hostNetwork: wanted bool"),
        (f"{POD}.containers.0.ports.0.containerPort", "8471", "containerPort: wanted int"),
        (f"{POD}.containers.0.args", "train", "args: wanted a list"),
        ("spec.failurePolicy.maxRestarts", True, "maxRestarts: wanted int"),
        # Values that there are not.
        ("spec.failurePolicy.restartStrategy", "Restart", "wanted one of Recreate, BlockingRecreate, came Restart"),
        (f"{POD}.restartPolicy", "never", "wanted one of Always, OnFailure, Never, came never"),
        # What this table does not know has to be looked up, not waved through.
        (f"{POD}.affinity", {"nodeAffinity": {}}, "the table has no IoK8sApiCoreV1Affinity"),
    ],
)
def test_a_slip_is_found(tmp_path: Path, path: str, value: Any, said: str):
    found = manifest(tmp_path)
    *parents, last = path.split(".")
    place: Any = found
    for name in parents:
        place = place[int(name) if name.isdecimal() else name]
    place[last] = value
    (problem,) = problems(found)
    assert said in problem


def test_what_is_required_is_missed(tmp_path: Path):
    found = manifest(tmp_path)
    less = copy.deepcopy(found)
    container = less["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    del (
        container["name"],
        container["volumeMounts"][0]["mountPath"],
        less["spec"]["failurePolicy"]["rules"][0]["action"],
    )
    assert sorted(said.rpartition(".")[2] for said in problems(less)) == [
        "action: missing", "mountPath: missing", "name: missing",
    ]  # fmt: skip


# The long options of sbatch that there are in Slurm 23 to 25, of those a batch file of one component may use.
SBATCH = """account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus
gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep
licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation
resv-ports segment signal sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time
time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap"""


def test_sbatch_knows_every_option_of_the_batch_file():
    """It refuses the whole file for one that it does not know."""
    lines = (ROOT / "scripts/slurm.sh").read_text(encoding="utf-8").splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    assert len(options) >= 9
    assert {option.removeprefix("--").partition("=")[0] for option in options} <= set(SBATCH.split())
    assert all(option.startswith("--") for option in options)


# From the SYNOPSIS of docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/..., and of gcloud's own flags --project.
GCLOUD = {
    "tpu-vm create": """zone version async boot-disk data-disk description internal-ips labels metadata
        metadata-from-file network preemptible queue-count range reserved scopes service-account shielded-secure-boot
        spot subnetwork tags accelerator-type topology type""",
    "queued-resources create": """zone runtime-version accelerator-type topology type node-id node-count node-prefix
        async boot-disk data-disk description guaranteed internal-ips labels metadata metadata-from-file network range
        reserved scopes service-account shielded-secure-boot spot subnetwork tags valid-after-duration valid-after-time
        valid-until-duration valid-until-time reservation-host-folder reservation-host-organization
        reservation-host-project""",
    "tpu-vm ssh": """dry-run force-key-file-overwrite internal-ip plain ssh-flag ssh-key-file strict-host-key-checking
        worker zone command output-directory ssh-key-expiration ssh-key-expire-after""",
}
POD_SETTINGS = {
    "PROJECT": "my-project", "ZONE": "us-east5-a", "NAME": "pod1", "ACCELERATOR": "v5p-8", "SPOT": "yes",
    "RUNTIME_VERSION": "v2-alpha-tpuv5", "BUCKET": "gs://my-bucket",
}  # fmt: skip


@pytest.mark.parametrize("queued, slices", [("no", "1"), ("yes", "1"), ("yes", "2")])
def test_gcloud_knows_every_flag(tmp_path: Path, queued: str, slices: str):
    env_file = tmp_path / "pod.env"
    values = POD_SETTINGS | {"QUEUED": queued, "NUM_SLICES": slices}
    env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")
    seen = set()
    for command in ("create", "status"):
        words = ["bash", "tpu/pod.sh", "--env", str(env_file), "--dry-run", command]
        printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for line in printed.splitlines():
            said = shlex.split(line, comments=True)
            called = " ".join(said[3:5])
            if called in GCLOUD:
                seen.add(called)
                flags = {word[2:].partition("=")[0] for word in said if word.startswith("--")}
                assert flags <= {"project", *GCLOUD[called].split()}
    assert f"{'tpu-vm' if queued == 'no' else 'queued-resources'} create" in seen
