"""The manifests of docs/launch are what Kubernetes and Kubeflow's MPI operator take, and they start the trainer.

A manifest for each, checked against the schemas. kubernetes-validate has those of Kubernetes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from commlab.trainer.config import Config

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"
MPI_REPLICA = {"replicas": int, "restartPolicy": str, "template": dict}
MPI_JOB = {
    "slotsPerWorker": int,
    "mpiImplementation": str,
    "sshAuthMountPath": str,
    "launcherCreationPolicy": str,
    "runPolicy": dict,
    "mpiReplicaSpecs": dict,
}
RUN_POLICY = {
    "cleanPodPolicy": str,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "schedulingPolicy": dict,
    "suspend": bool,
}


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def pods() -> dict[str, dict[str, Any]]:
    """The templates of all pods."""
    [job] = objects("mpijob.yaml")
    _, indexed = objects("torchrun-job.yaml")
    found = {role.lower(): replica["template"] for role, replica in job["spec"]["mpiReplicaSpecs"].items()}
    return {**found, "ranks": indexed["spec"]["template"]}


def words(pod: dict[str, Any]) -> list[str]:
    [container] = pod["spec"]["containers"]
    return [*container["command"], *container.get("args", [])]


@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="needs kubernetes-validate: make examples")
def test_kubernetes_takes_them() -> None:
    import kubernetes_validate

    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": pod}
        for name, pod in pods().items()
    ]
    service, job = objects("torchrun-job.yaml")
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    for item in (service, job, *templates):
        kubernetes_validate.validate(item, "1.37", strict=True)
    # The check sees something.
    for change in ({"completionMode": "Indexed", "completion": 2}, {"parallelism": "two"}, {"template": {"spec": {}}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**job, "spec": {**job["spec"], **change}}, "1.37", strict=True)


def test_the_operator_takes_the_mpi_job() -> None:
    """The fields of kubeflow.org/v2beta1, as its reference documents them."""
    [job] = objects("mpijob.yaml")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    for fields, known in ((spec, MPI_JOB), (spec["runPolicy"], RUN_POLICY)):
        assert {name for name, value in fields.items() if not isinstance(value, known[name])} == set()
    assert spec["mpiImplementation"] in ("OpenMPI", "Intel", "MPICH")
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert set(spec["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for replica in spec["mpiReplicaSpecs"].values():
        assert {name for name, value in replica.items() if not isinstance(value, MPI_REPLICA[name])} == set()
        assert replica["restartPolicy"] in ("Never", "OnFailure")
    assert spec["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1


def test_the_numbers_of_ranks_agree() -> None:
    [job] = objects("mpijob.yaml")
    launcher, slots = words(pods()["launcher"]), job["spec"]["slotsPerWorker"]
    assert launcher[:3] == ["mpirun", "-n", str(slots * job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"])]
    assert int(pods()["worker"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) == slots
    service, indexed = objects("torchrun-job.yaml")
    spec, pod = indexed["spec"], pods()["ranks"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert service["metadata"]["name"] == pod["spec"]["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()

    from torch.distributed.run import get_args_parser

    line = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words(pod)]
    assert line[1:3] == ["-m", "torch.distributed.run"] and line != words(pod)
    started = get_args_parser().parse_args(line[3:])
    assert (started.nnodes, started.nproc_per_node) == (str(spec["completions"]), "8")
    assert started.node_rank == 1
    assert started.master_addr == f"{indexed['metadata']['name']}-0.{service['metadata']['name']}"
    assert started.master_port == service["spec"]["ports"][0]["port"]


@pytest.mark.parametrize("pod", ["launcher", "ranks"])
def test_they_start_the_trainer_and_it_goes_on(pod: str) -> None:
    line = words(pods()[pod])
    at = line.index("commlab.train")
    assert line[at - 1] == "-m"
    config = Config.from_argv(line[at + 1 :])
    assert (config.resume, config.checkpoint_every, config.transport) == (
        True,
        100,
        "torch" if pod == "ranks" else "mpi",
    )
    for path in (config.output, config.metrics, config.checkpoint_folder, *(config.data or ())):
        assert path and Path(path).parts[:2] == ("/", "shared")
    [container] = pods()["worker" if pod == "launcher" else pod]["spec"]["containers"]
    assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
