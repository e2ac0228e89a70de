"""An Indexed Job on this machine: the work of Job controller, kubelet and DNS for its pods, with Linux namespaces.

A pod's container runs with the rendered command, environment, user and volumes, on a read-only root, in its own
process, mount and host-name namespace; the image is this environment. Pods share the machine's network: each has an
address in 127.0.0.0/8, and their names are in /etc/hosts, a pod's as soon as it has an address.
Root is required for namespaces and users: `why_not` reports what is missing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from manifests import ROOT, container, decide

NAMESPACE = "default"
HIDDEN = ("proc", "tmp", "root", "home", "mnt")
"""Folders of the machine that are hidden from a pod, except for this environment and this checkout."""


def why_not():
    """Return why pods cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "pods need root: mounts and users of their own"
    try_it = ["unshare", "--uts", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(try_it, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


def environment(spec, labels, index, given):
    """Return a container's environment: the image's, then spec.env in order, $(NAME) replaced; the index."""
    fields = {"metadata.namespace": NAMESPACE} | {f"metadata.labels['{k}']": v for k, v in labels.items()}
    known = dict(given)
    for entry in spec["env"]:
        reference = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        known[entry["name"]] = expand(entry["value"], known) if reference is None else fields[reference]
    return known | {"JOB_COMPLETION_INDEX": str(index)}


def expand(text, known):
    """Expand references; Kubernetes leaves unknown ones unchanged."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: known.get(found[1], found[0]), text)


class Pod:
    """One attempt of one index. volumes: name -> folder of the machine; others in the spec are empty and in memory."""

    def __init__(self, job, folder, name, fqdn, address, env, volumes):
        self.spec, self.container = job["template"]["spec"], container(job)
        self.folder, self.name, self.fqdn, self.address = folder, name, fqdn, address
        self.env, self.volumes = env, volumes
        self.hosts = folder / "hosts"
        self.is_disrupted, self.process = False, None

    def start(self):
        (self.folder / "root").mkdir(parents=True)
        script = "\n".join([*self._mounts(), self._exec()])
        command = ["unshare", "--uts", "--mount", "--pid", "--fork", "sh", "-euc", script, "pod"]
        arguments = [expand(text, self.env) for text in [*self.container["command"], *self.container["args"]]]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen([*command, *arguments], env=self.env, stdout=log, stderr=log)

    def _mounts(self):
        root = self.folder / "root"
        yield f"mount -t tmpfs -o mode=755 tmpfs {root}"
        for path in sorted(Path("/").iterdir()):
            if path.is_symlink():
                yield f"cp -P {path} {root}{path}"
            elif path.is_dir() and path.name not in HIDDEN:
                yield f"mkdir {root}{path}; mount --rbind {path} {root}{path}"
                if path.name not in ("dev", "sys"):
                    yield f"mount -o remount,bind,ro {root}{path}"
        yield f"mkdir {root}/proc {root}/tmp; mount -t proc proc {root}/proc"
        yield f"mount --bind {self.hosts} {root}/etc/hosts"
        for mount in self.container["volumeMounts"]:
            target = f"{root}{mount['mountPath']}"
            yield f"mkdir -p {target}"
            if (source := self.volumes.get(mount["name"])) is None:
                yield f"mount -t tmpfs -o mode=1777 tmpfs {target}"
            else:
                yield f"mount --bind {source} {target}"
                if mount.get("readOnly"):
                    yield f"mount -o remount,bind,ro {target}"
        for path in sorted({ROOT, Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix)}):
            yield f"[ -e {root}{path} ] || {{ mkdir -p {root}{path}; mount --rbind {path} {root}{path}; }}"
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            yield f"mount -o remount,ro {root}"
        yield f"hostname {self.name}"

    def _exec(self):
        """Drop all rights, and become the command, or its parent like the pause container."""
        context = self.spec["securityContext"]
        user = f"--reuid={context['runAsUser']} --regid={context['runAsGroup']} --groups={context['fsGroup']}"
        rights = "--no-new-privs --inh-caps=-all --bounding-set=-all"
        command = "sh -c '\"$@\"; exit $?' pause" if self.spec.get("shareProcessNamespace") else ""
        return f'exec chroot {self.folder}/root setpriv {user} {rights} {command} "$@"'

    def main_process(self):
        """Return the container's process id on this machine; None until it exists."""
        levels = 2 if self.spec.get("shareProcessNamespace") else 1
        found = psutil.Process(self.process.pid)
        for _ in range(levels):
            below = found.children()
            if not below:
                return None
            found = below[0]
        return found if "megamm" in " ".join(found.cmdline()) else None

    def drain(self):
        """Act like an eviction: the condition, then SIGTERM (the caller handles the grace time)."""
        self.is_disrupted = True
        self.main_process().send_signal(signal.SIGTERM)

    def cut_power(self):
        """Kill all processes at once: the namespace's first process takes the others along."""
        for first in psutil.Process(self.process.pid).children():
            first.kill()
        self.process.kill()
        self.process.wait()

    def exit_code(self):
        """Return None while it runs; 137 for SIGKILL, as the kubelet reports."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


class IndexedJob:
    """The Job controller for one Job, in turns: `turn` looks at ended pods and replaces them as the policy says.

    state: "running", "complete" or "failed" with `why`; failures: counted ones of each index; ended: (index, exit
    code, action) of every ended pod. The image's environment is `given`.
    """

    def __init__(self, job, folder, volumes, labels, given):
        self.job, self.folder, self.volumes, self.given = job, folder, volumes, given
        self.labels, self.name = labels, labels["batch.kubernetes.io/job-name"]
        self.service = labels.get("jobset.sigs.k8s.io/jobset-name") or job["template"]["spec"]["subdomain"]
        self.pods, self.failures, self.ended, self.succeeded = {}, {}, [], set()
        self.state, self.why, self._made = "running", "", 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pod in self.pods.values():
            if pod.exit_code() is None:
                pod.cut_power()

    def start(self, index):
        """Start a pod for this index with its own address, which DNS gives to the others."""
        self._made += 1
        folder, name = self.folder / f"pod-{self._made}-index-{index}", f"{self.name}-{index}"
        env = environment(container(self.job), self.labels, index, self.given)
        fqdn = f"{name}.{self.service}.{NAMESPACE}.svc.cluster.local"
        address = f"127.0.{index + 1}.{self._made}"
        pod = self.pods[index] = Pod(self.job, folder, name, fqdn, address, env, self.volumes)
        folder.mkdir(parents=True)
        self._tell_names()
        pod.start()
        return pod

    def _tell_names(self):
        for pod in self.pods.values():
            lines = ["127.0.0.1 localhost", f"{pod.address} {pod.fqdn} {pod.name}"]
            lines += [f"{other.address} {other.fqdn}" for other in self.pods.values() if other is not pod]
            with pod.hosts.open("w") as file:  # in place: the running pod has this very file
                file.write("\n".join(lines) + "\n")

    def turn(self):
        """Replace ended pods, as the manifest says."""
        for index, pod in list(self.pods.items()):
            code = pod.exit_code()
            if code is None or self.state != "running":
                continue
            del self.pods[index]
            if code == 0:
                self.succeeded.add(index)
                self.ended.append((index, 0, ""))
                if len(self.succeeded) == self.job["completions"]:
                    self.state = "complete"
                continue
            verdict = decide(self.job, code, pod.is_disrupted)
            self.ended.append((index, code, verdict.action))
            if verdict.action == "Count":
                self.failures[index] = self.failures.get(index, 0) + 1
            if verdict.action == "FailJob" or self.failures.get(index, 0) > self.job["backoffLimitPerIndex"]:
                self.state, self.why = "failed", verdict.message or "BackoffLimitExceeded"
            else:
                self.start(index)

    def until(self, what, seconds=240):
        """Take turns until what() is true; return its value."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, f"timed out\n{self.story()}"
            self.turn()
            time.sleep(0.02)
        return found

    def story(self):
        logs = [f"--- {path.parent.name}\n{path.read_text()}" for path in sorted(self.folder.glob("pod-*/log"))]
        return "\n".join([f"{self.state} {self.why} {self.ended}", *logs])
