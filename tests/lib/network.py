"""Two hosts on this machine: programs with a host name, an /etc/hosts and an address of their own, joined by a cable.

    python tests/lib/network.py < SPEC        in a private network (APART); prints the exit codes as JSON

SPEC is the JSON of two hosts: {"name", "address", "names", "command", "variables", "log"}, where `names` is the text of
/etc/hosts. With "until", a path, the host loses power once that exists. No root is needed where unprivileged user
namespaces are allowed.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

APART = ("unshare", "--user", "--map-root-user", "--net")
"""A command that runs a program in a private network, from which nothing outside can be reached."""
LINKS = ("ve-a", "ve-b")
_HOST = ("setpriv", "--pdeathsig", "KILL", "unshare", "--uts", "--mount", "--net")
_SHELL = (
    'hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up; touch "$3"; read _; shift 3; exec "$@" </dev/null'
)


def is_possible() -> bool:
    """Whether namespaces and virtual interfaces are allowed here."""
    try_it = "ip link add name ve-a type veth peer name ve-b && mount --bind /etc/hosts /etc/hosts"
    try:
        return subprocess.run([*APART, "--mount", "sh", "-c", try_it], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def lay_cable() -> None:
    """Create the two ends of the cable; `start_host` takes one of them."""
    ip("link", "add", "name", LINKS[0], "type", "veth", "peer", "name", LINKS[1])


def start_host(name: str, address: str, names: Path, link: str, command: list[str], **options: Any) -> subprocess.Popen:
    """Start a host, which runs the command after `go`. names: its /etc/hosts; options: of subprocess.Popen."""
    ready = names.with_suffix(".ready")
    shell = ["sh", "-e", "-c", _SHELL, "sh", name, str(names), str(ready), *command]
    host = subprocess.Popen([*_HOST, *shell], stdin=subprocess.PIPE, **options)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline and host.poll() is None, f"{name} does not start"
        time.sleep(0.02)
    ip("link", "set", link, "netns", str(host.pid))
    ip("addr", "add", f"{address}/24", "dev", link, within=host)
    ip("link", "set", link, "up", within=host)
    return host


def go(*hosts: subprocess.Popen) -> None:
    """Let the hosts run their commands."""
    for host in hosts:
        assert host.stdin is not None
        host.stdin.write(b"\n")
        host.stdin.close()


def ip(*arguments: str, within: subprocess.Popen | None = None) -> None:
    """Run ip(8), in the network of a host."""
    enter = [] if within is None else ["nsenter", "--target", str(within.pid), "--net"]
    subprocess.run([*enter, "ip", *arguments], check=True)


def run_hosts(specs: list[dict[str, Any]], seconds: float) -> list[int]:
    """Run the two hosts in a private network; return their exit codes."""
    command = [*APART, sys.executable, __file__, str(seconds)]
    done = subprocess.run(command, input=json.dumps(specs), capture_output=True, text=True, timeout=2 * seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    """Run the hosts of standard input."""
    hosts: list[subprocess.Popen] = []
    networks, specs = [], json.load(sys.stdin)
    deadline = time.monotonic() + float(sys.argv[1])
    lay_cable()
    try:
        for spec, link in zip(specs, LINKS, strict=True):
            log = Path(spec["log"])
            names = log.with_suffix(".hosts")
            names.write_text(spec["names"])
            with log.open("w") as file:
                options = {"env": os.environ | spec["variables"], "stdout": file, "stderr": file}
                hosts.append(start_host(spec["name"], spec["address"], names, link, spec["command"], **options))
            # While it is open, the cable's end exists, although the host's command has ended.
            networks.append(os.open(f"/proc/{hosts[-1].pid}/ns/net", os.O_RDONLY))
        go(*hosts)
        while None in (codes := [host.poll() for host in hosts]):
            assert time.monotonic() < deadline, f"still running: {codes}"
            for host, spec in zip(hosts, specs, strict=True):
                if "until" in spec and Path(spec["until"]).exists():
                    host.kill()
            time.sleep(0.02)
        print(json.dumps(codes))
    finally:
        for host in hosts:
            host.kill()
        for network in networks:
            os.close(network)


if __name__ == "__main__":
    main()
