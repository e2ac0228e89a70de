"""launchers/k8s: every overlay renders and is valid, settings are applied, exit codes have their meaning.

test_k8s_runs.py runs the rendered manifests; test_images.py tests the images.
"""

import re
import shutil

import kubernetes_validate
import pods
import pytest
import yaml
from manifests import K8S, OVERLAYS, container, decide, decide_set, job_spec, only, render

from megamm.common import exit_codes
from megamm.config import load_config
from megamm.elastic.launcher import Nodes, admissible_nodes

VERSIONS = ("1.29", kubernetes_validate.latest_version())
"""Kubernetes versions: the oldest in launchers/k8s/README.md, and the newest with schemas."""
CUSTOM = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
"""Custom resources, and their models in kubeflow_trainer_api."""
KILLED, OTHER = 137, 1


@pytest.fixture(scope="module")
def rendered():
    return {name: render(K8S / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def jobs(rendered):
    return {name: job_spec(manifests) for name, manifests in rendered.items()}


def settings_of(name):
    folder = K8S / "overlays" / name
    if not (path := folder / "settings.yaml").exists():
        path = K8S / "overlays" / "h100" / "settings.yaml"
    return yaml.safe_load(path.read_text())["data"]


def as_job(spec):
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}


def holds(read, given):
    """Return whether all of a manifest was parsed: its model drops unknown fields and adds defaults."""
    if isinstance(given, dict):
        return given.keys() <= read.keys() and all(holds(read[key], value) for key, value in given.items())
    if isinstance(given, list):
        return len(read) == len(given) and all(map(holds, read, given))
    return (read["actual_instance"] if isinstance(read, dict) else read) == given


def invalid(manifest):
    """Return schema errors of a manifest, including unknown fields; empty if it is valid."""
    if (name := CUSTOM.get(manifest["kind"])) is not None:
        from kubeflow_trainer_api import models  # here, as it takes seconds to import

        read = getattr(models, name).from_dict(manifest).model_dump(mode="json", by_alias=True, exclude_none=True)
        return "" if holds(read, manifest) else f"fields that {manifest['kind']} does not know"
    try:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def test_every_overlay_is_there():
    assert OVERLAYS == ["h100", "jobset", "kueue", "local-cpu", "trainjob"]
    assert all(f"| `{name}` |" in (K8S / "README.md").read_text() for name in OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_manifests_are_valid(rendered, jobs, name):
    for manifest in rendered[name]:
        assert not invalid(manifest), manifest["kind"]
    assert not invalid(as_job(jobs[name]))  # also a Job inside another kind
    kinds = {"jobset": {"JobSet"}, "trainjob": {"TrainJob", "TrainingRuntime"}}.get(name, {"Job", "Service"})
    assert {manifest["kind"] for manifest in rendered[name]} == kinds | {"ConfigMap"}  # not a volume: it is kept


def test_an_invalid_manifest_is_found(rendered, jobs):
    for where in (jobs["h100"], jobs["h100"]["template"]["spec"], container(jobs["h100"])):
        where["restrtPolicy"] = "Never"
        assert "restrtPolicy" in invalid(as_job(jobs["h100"]))
        del where["restrtPolicy"]
    job_set = only(rendered["jobset"], "JobSet")
    job_set["spec"]["failurePolicy"]["maxRestart"] = 1
    assert invalid(job_set)
    del job_set["spec"]["failurePolicy"]["maxRestart"]
    assert not invalid(job_set)
    assert not invalid(render(K8S / "volume")[0])


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_no_schema_says(rendered, jobs, name):
    """Check rules of the API server that its schemas lack, and consistency between fields."""
    job, pod, node = jobs[name], jobs[name]["template"]["spec"], container(jobs[name])
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert pod["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"  # for a pod failure policy
    assert job.get("backoffLimit") == (0 if name in ("jobset", "trainjob") else None)
    mounts, volumes = ([v["name"] for v in of] for of in (node["volumeMounts"], pod["volumes"]))
    assert sorted(mounts) == sorted(volumes)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    rights = node["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"] and "privileged" not in rights
    assert rights["capabilities"] == {"drop": ["ALL"]}
    (run,) = (m for m in rendered[name] if m["kind"] == "ConfigMap" and "run.yaml" in m["data"])
    config = next(v for v in pod["volumes"] if v["name"] == "config")["configMap"]["name"]
    assert config == run["metadata"]["name"] and re.search("-[0-9a-z]{10}$", config) and run["immutable"]
    if "Service" in (kinds := {m["kind"]: m for m in rendered[name]}):
        service = kinds["Service"]
        assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
        assert service["spec"]["ports"][0]["port"] == node["ports"][0]["containerPort"]
    assert node["args"][-1].endswith(f":{node['ports'][0]['containerPort']}")


def local_bytes(config, nodes):
    """Return a node's bytes: images and replicas (docs/checkpoints.md) of bf16 and float32 weights, Adam's moments.

    Counted are the matrices of decoder layers, and an embedding of 2^17 tokens.
    """
    m = config.model
    attention = (2 * m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim
    layers = m.num_layers * m.hidden_size * (attention + 3 * m.ffn_hidden_size)
    # As many nodes as stages: one has the first stage alone.
    share = layers / nodes + 2**17 * m.hidden_size * config.parallel.pipeline / nodes
    return (4 + 3) * (2 + 4 + 8) * share


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_config_suits_the_nodes(rendered, jobs, name, tmp_path):
    given = settings_of(name)
    (run,) = (m for m in rendered[name] if m["kind"] == "ConfigMap" and "run.yaml" in m["data"])
    (tmp_path / "run.yaml").write_text(run["data"]["run.yaml"])
    config = load_config(tmp_path / "run.yaml", [])
    nodes = Nodes(int(given["nodesLeast"]), int(given["nodes"]), "host:1")
    assert nodes.most in admissible_nodes(config, int(given["processes"]), nodes)
    assert int(given["nodesFailed"]) == nodes.most - nodes.least
    assert jobs[name]["template"]["spec"]["terminationGracePeriodSeconds"] >= config.resilience.grace_seconds + 30
    if config.checkpoint.local is not None:
        volumes = {m["mountPath"]: m["name"] for m in container(jobs[name])["volumeMounts"]}
        kept = next(
            v for v in jobs[name]["template"]["spec"]["volumes"] if v["name"] == volumes[config.checkpoint.local]
        )
        limit = float(re.fullmatch("([0-9]+)Gi", kept["emptyDir"]["sizeLimit"])[1]) * 2**30
        assert kept["emptyDir"]["medium"] == "Memory"
        assert 1.1 * local_bytes(config, nodes.least) < limit < float(given["memory"].removesuffix("Gi")) * 2**29
    paths = [config.output, *config.tokenizers.values(), *(source.path for source in config.data.sources)]
    assert all(path.is_relative_to("/mnt/work") for path in paths)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Return the overlays with another value in every setting -> (settings, text)."""
    folder = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(K8S, folder)
    values = {}
    for path in sorted(folder.glob("overlays/*/settings.yaml")):
        manifest = yaml.safe_load(path.read_text())
        for number, (key, value) in enumerate(sorted(manifest["data"].items())):
            unit = re.search("[KMGT]i$", value)
            is_number = value.isdecimal() or unit is not None
            manifest["data"][key] = f"{7001 + number}{unit[0] if unit else ''}" if is_number else f"mark-{key.lower()}"
        path.write_text(yaml.safe_dump(manifest))
        values[path.parent.name] = manifest["data"]
    return {
        name: (values.get(name, values["h100"]), yaml.safe_dump_all(render(folder / "overlays" / name)))
        for name in OVERLAYS
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_setting_arrives_and_nothing_else_stays(marked, name):
    settings, text = marked[name]
    in_sets = {"nodesFailed"} if name in ("jobset", "trainjob") else set()
    missing = {key for key, value in settings.items() if not re.search(rf"(?<!\w){value}(?!\w)", text)}
    assert missing == in_sets
    assert not re.search(r"(?<![-\w])(?!70[0-9]{2})[0-9]+[KMGT]i\b", text)
    images = re.findall(r"image: (\S+)", text)
    assert images == [settings["image"]]
    names = [m["metadata"]["name"] for m in yaml.safe_load_all(text) if m["kind"] != "ConfigMap"]
    assert set(names) == {settings["name"]}
    assert not invalid(as_job(job_spec(list(yaml.safe_load_all(text)))))


POLICY = {
    # exit code, whether the pod was disrupted: what the Job does, what a JobSet does
    (exit_codes.USER_ERROR, False): ("FailJob", "FailJobSet"),
    (exit_codes.USER_ERROR, True): ("FailJob", "FailJobSet"),
    (exit_codes.GAVE_UP, False): ("FailJob", "FailJobSet"),
    (exit_codes.GAVE_UP, True): ("FailJob", "FailJobSet"),
    (exit_codes.REQUEUE, False): ("Ignore", None),
    (exit_codes.REQUEUE, True): ("Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
    (exit_codes.CRASHED, False): ("Count", "RestartJobSet"),
    (exit_codes.CRASHED, True): ("Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
    (exit_codes.EVICTED, False): ("Count", "RestartJobSet"),
    (KILLED, False): ("Count", "RestartJobSet"),
    (KILLED, True): ("Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
}


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("case", POLICY)
def test_what_exit_codes_lead_to(rendered, jobs, name, case):
    wanted, of_set = POLICY[case]
    verdict = decide(jobs[name], *case)
    if name not in ("jobset", "trainjob"):
        assert verdict.action == wanted
        return
    if verdict.action == "Ignore":  # the Job itself creates a new pod
        assert of_set is None
        return
    reason = "PodFailurePolicy" if verdict.action == "FailJob" else "BackoffLimitExceeded"
    set_of = {"jobset": "JobSet", "trainjob": "TrainingRuntime"}[name]
    spec = only(rendered[name], set_of)["spec"]
    assert decide_set(spec if name == "jobset" else spec["template"]["spec"], reason, verdict.message) == of_set


@pytest.mark.parametrize("name", OVERLAYS)
def test_commands_of_pods(jobs, name):
    """The kubelet expands them; Trainer adds its variables after those of the runtime."""
    given = settings_of(name)
    in_set = name in ("jobset", "trainjob")
    labels = {"batch.kubernetes.io/job-name": "megamm-node-0" if in_set else "megamm"}
    node = container(jobs[name])
    known = pods.environment(node, labels | {"jobset.sigs.k8s.io/jobset-name": "megamm"}, 1, {})
    if name == "trainjob":
        known |= {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "5"}
    nodes, processes = ("3", "5") if name == "trainjob" else (given["nodes"], given["processes"])
    host = f"{'megamm-node-0' if in_set else 'megamm'}-0.megamm.default.svc.cluster.local:29400"
    expected = f"megamm train /mnt/config/run.yaml --nproc {processes} --nnodes {given['nodesLeast']}:{nodes}"
    command = [pods.expand(text, known) for text in [*node["command"], *node["args"]]]
    assert command == [*expected.split(), "--rendezvous", host]
    assert known["JOB_COMPLETION_INDEX"] == "1"


def test_a_trainjob_has_the_sizes(rendered):
    given = settings_of("trainjob")
    spec = only(rendered["trainjob"], "TrainJob")["spec"]
    assert spec["trainer"] == {"numNodes": int(given["nodes"]), "numProcPerNode": int(given["processes"])}
    runtime = only(rendered["trainjob"], "TrainingRuntime")
    assert spec["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # What Trainer looks for before it passes the sizes on.
    assert replicated["name"] == container(replicated["template"]["spec"])["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
