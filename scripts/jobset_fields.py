"""Write tests/data/jobset_fields.json: the types of JobSet and Kubernetes that tpu/jobset.yaml uses, with their fields.

    pip download --no-deps kubeflow-trainer-api==2.3.0
    python scripts/jobset_fields.py kubeflow_trainer_api-2.3.0-py3-none-any.whl

kubeflow-trainer-api (Apache-2.0) holds the OpenAPI types of JobSet v1alpha2 and of Kubernetes as classes. Its strings
know no lists of values: VALUES has those of our fields, from JobSet's CRD and from the descriptions of the fields.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent
OUTPUT = REPOSITORY / "tests" / "data" / "jobset_fields.json"
ROOT = "JobsetV1alpha2JobSet"
ORIGIN = (
    "kubeflow-trainer-api 2.3.0 (Apache-2.0; github.com/kubeflow/trainer), made from the OpenAPI types of JobSet "
    "v1alpha2 (github.com/kubernetes-sigs/jobset, Apache-2.0) and Kubernetes (Apache-2.0); values of failurePolicy "
    "from JobSet's config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml, commit 01078527"
)
VALUES = {
    "JobsetV1alpha2FailurePolicy.restartStrategy": ["Recreate", "BlockingRecreate"],
    "JobsetV1alpha2FailurePolicyRule.action": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"],
    "IoK8sApiBatchV1JobSpec.completionMode": ["NonIndexed", "Indexed"],
    "IoK8sApiBatchV1PodFailurePolicyRule.action": ["FailJob", "FailIndex", "Ignore", "Count"],
    "IoK8sApiBatchV1PodFailurePolicyOnExitCodesRequirement.operator": ["In", "NotIn"],
    "IoK8sApiCoreV1PodSpec.restartPolicy": ["Always", "OnFailure", "Never"],
    "IoK8sApiCoreV1PodSpec.dnsPolicy": ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"],
    "IoK8sApiCoreV1Toleration.operator": ["Exists", "Equal"],
    "IoK8sApiCoreV1Toleration.effect": ["NoSchedule", "PreferNoSchedule", "NoExecute"],
}


def type_word(annotation: Any) -> str:
    """A class by its name, [X] for a list of X, {X} for a map to X; strings, whole numbers and truths as in Python."""
    inner = [one for one in typing.get_args(annotation) if one is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is list:
        return f"[{type_word(inner[0])}]"
    if origin is dict:
        return f"{{{type_word(inner[1])}}}"
    return type_word(inner[0]) if inner else annotation.__name__


def fields_of(models: Any, name: str) -> dict[str, Any]:
    fields = getattr(models, name).model_fields
    return {
        "fields": {field.alias or key: type_word(field.annotation) for key, field in fields.items()},
        "required": [field.alias or key for key, field in fields.items() if field.is_required()],
    }


def reached(models: Any, name: str, value: Any, found: dict[str, Any]) -> None:
    """Adds every class that `value`, an object of class `name`, goes through."""
    if name.startswith(("[", "{")):
        for one in value if name[0] == "[" else value.values():
            reached(models, name[1:-1], one, found)
    elif isinstance(value, dict) and name not in ("object", "str"):
        found.setdefault(name, fields_of(models, name))
        for key, one in value.items():
            reached(models, found[name]["fields"][key], one, found)


def manifest() -> dict[str, Any]:
    words = ["bash", "tpu/jobset.sh", "--env", "tpu/jobset.env.example", "configs/example.yaml"]
    return yaml.safe_load(subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, folder], check=True)
        sys.path.insert(0, folder)
        models = importlib.import_module("kubeflow_trainer_api.models")
        found: dict[str, Any] = {}
        reached(models, ROOT, manifest(), found)
    values = {field: values for field, values in VALUES.items() if field.partition(".")[0] in found}
    text = json.dumps({"origin": ORIGIN, "root": ROOT, "values": values, "types": found}, indent=1, sort_keys=True)
    OUTPUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
