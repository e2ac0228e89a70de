"""Manifests of launchers/k8s as kubectl renders them, and the decisions of Kubernetes about them.

`decide` is the Job controller's reading of a pod failure policy (KEP-3329), `decide_set` JobSet's of a failure policy:
which exit codes restart, and which end the job.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "launchers" / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))


def render(folder):
    """Return the manifests of a folder with a kustomization, rendered by the kubectl of this environment."""
    command = [Path(sys.prefix) / "bin" / "kubectl", "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(manifests, kind):
    found = [manifest for manifest in manifests if manifest["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def job_spec(manifests):
    """Return the spec of the one Job: top-level, in a JobSet, or in a TrainingRuntime."""
    kinds = {manifest["kind"] for manifest in manifests}
    if "Job" in kinds:
        return only(manifests, "Job")["spec"]
    job_set = only(manifests, "JobSet") if "JobSet" in kinds else only(manifests, "TrainingRuntime")["spec"]["template"]
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def container(job):
    (found,) = job["template"]["spec"]["containers"]
    return found


@dataclass(frozen=True)
class Verdict:
    """action: FailJob, Ignore (retry, uncounted) or Count (retry, up to a limit); message: of the failed Job."""

    action: str
    message: str = ""


def decide(job, exit_code, is_disrupted=False):
    """Return the reaction to a pod whose only container ended like this; is_disrupted: condition DisruptionTarget."""
    assert exit_code != 0, "no failure"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        said = _matches_code(rule.get("onExitCodes"), exit_code) or _matches_condition(rule, is_disrupted)
        if said:
            return Verdict(rule["action"], f"{said} matching {rule['action']} rule at index {index}")
    return Verdict("Count")


def _matches_code(requirement, code):
    if requirement is None or requirement.get("containerName", "node") != "node":
        return ""
    is_listed = code in requirement["values"]
    matches = {"In": is_listed, "NotIn": not is_listed}[requirement["operator"]]
    return f"Container node for pod default/megamm-0-x failed with exit code {code}" if matches else ""


def _matches_condition(rule, is_disrupted):
    for pattern in rule.get("onPodConditions", []):
        if is_disrupted and (pattern["type"], pattern.get("status", "True")) == ("DisruptionTarget", "True"):
            return "Pod default/megamm-0-x has condition DisruptionTarget"
    return ""


def decide_set(job_set, reason, message):
    """Return the action of a JobSet on a failed Job: reason and message of the Job's condition."""
    for rule in job_set["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
        if (not reasons or reason in reasons) and (not patterns or any(re.search(p, message) for p in patterns)):
            return rule["action"]
    return "RestartJobSet"
