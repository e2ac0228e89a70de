"""Fetches and unpacks packages in a private folder, without installing them, running their code, or root.

A Debian package is downloaded by the system's apt-get, with its mirrors and signatures, and unpacked by dpkg-deb. For a
large package its first bytes, from the same mirror, can be enough. A Python source distribution is downloaded from
pip's configured package index. The last two are checked against the SHA-256 given here.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from megamm.common.errors import UserError

logger = logging.getLogger(__name__)
_TIMEOUT = 60


@dataclass(frozen=True)
class Sdist:
    """A source distribution of a Python package; only the files with these extensions are unpacked."""

    name: str
    version: str
    sha256: str
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class DebianPrefix:
    """The first `size` bytes of a Debian package, with their SHA-256, and the files to unpack from them."""

    name: str
    size: int
    sha256: str
    files: tuple[str, ...]


def fetch_package(package: str | Sdist | DebianPrefix, work: Path, folder: Path) -> None:
    """Download a package (a Debian package's name, or a class from this module) into `work`, unpack into `folder`."""
    if isinstance(package, Sdist):
        _unpack_sdist(package, _download_sdist(package, work), folder)
    elif isinstance(package, DebianPrefix):
        _unpack_files(_download_prefix(package, work), package.files, folder)
    else:
        _unpack_debian(_download_debian(package, work), folder)


def _download_debian(package: str, work: Path) -> Path:
    """Download it with apt-get download."""
    _apt_get_download(work, package)
    return next(work.glob(f"{package}_*.deb"))


def _apt_get_download(work: Path, package: str, *how: str) -> str:
    """Output of apt-get download; uses its own package lists if the system's do not contain the package."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            remedy = "fetch on a Debian or Ubuntu machine and copy its RAW folder here, or bring your own samples.jsonl"
            raise UserError(f"cannot fetch: {tool} is not installed", remedy=remedy)
    options = ["-q", "-o", "Acquire::Retries=2", "-o", f"Acquire::http::Timeout={_TIMEOUT}"]
    # "download" needs neither root nor the dpkg database, and checks signatures.
    result = _run(["apt-get", *options, "download", *how, package], work)
    if result.returncode:
        logger.info("%s is not in the system's package lists: fetching lists into %s", package, work)
        for folder in ("lists/partial", "cache/archives/partial"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        # Own package lists: updating the system's would need root, and containers often have none.
        options += ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
        for command in (["update"], ["download", *how, package]):
            result = _run(["apt-get", *options, *command], work)
            if result.returncode:
                reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
                remedy = "check the network and /etc/apt/sources.list, then try again; nothing was stored"
                raise UserError(f"apt-get could not fetch {package}: {reason}", remedy=remedy)
    return result.stdout


def _download_prefix(prefix: DebianPrefix, work: Path) -> Path:
    """Download the first bytes from apt-get's address; if that fails the whole package with apt-get."""
    archive = work / f"{prefix.name}.prefix"
    try:
        address = _debian_address(prefix.name, work)
        # The members of a .deb are in a fixed order, and its data can be unpacked up to where they are cut off.
        request = urllib.request.Request(address, headers={"Range": f"bytes=0-{prefix.size - 1}"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
            data = reply.read(prefix.size)  # a server without range support sends everything
        if hashlib.sha256(data).hexdigest() != prefix.sha256:
            raise OSError("unexpected content (SHA-256 differs)")
    except (OSError, http.client.HTTPException) as error:
        logger.warning("%s: its first %.1f MB failed, fetching all: %s", prefix.name, prefix.size / 1e6, error)
        return _download_debian(prefix.name, work)
    # Written only after the check of its digest.
    archive.write_bytes(data)
    return archive


def _debian_address(package: str, work: Path) -> str:
    """The address from which apt-get would download a package. Raises OSError if it is not HTTP."""
    found = re.search(r"'(https?://[^']+)'", _apt_get_download(work, package, "--print-uris"))
    if found is None:
        raise OSError("the mirror does not use HTTP")
    return found[1]


def _unpack_debian(deb: Path, folder: Path) -> None:
    """Unpack all files of a package. Raises UserError if dpkg-deb fails."""
    result = _run(["dpkg-deb", "-x", str(deb), str(folder)], folder.parent)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"cannot unpack {deb.name}: {reason}", remedy="check the disk space and fetch it again")


def _unpack_files(deb: Path, files: tuple[str, ...], folder: Path) -> None:
    """Unpack these files of a package that may be truncated after them. Raises UserError if some are missing."""
    missing = set(files)
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        reason = "not in it"
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    if member.isfile() and (name := member.name.removeprefix("./")) in missing:
                        tar.extract(member, folder, filter="data")
                        missing.remove(name)
                    # Stop here: what follows in a truncated package would be an error.
                    if not missing:
                        return
        except tarfile.TarError as error:
            reason = str(error)
    remedy = "check the disk space and fetch it again"
    raise UserError(f"cannot unpack {', '.join(sorted(missing))}: {reason}", where=deb.name, remedy=remedy)


def _download_sdist(package: Sdist, work: Path) -> Path:
    """Download without `pip download`, which would run the package's setup to learn its name."""
    archive = work / f"{package.name}-{package.version}.tar.gz"
    page = f"{_package_index()}/{package.name}/"
    remedy = "check the network and pip's index-url, then try again; nothing was stored"
    try:
        accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
        with urllib.request.urlopen(
            urllib.request.Request(page, headers={"Accept": accept}), timeout=_TIMEOUT
        ) as reply:
            # The page is JSON or HTML, depending on the index.
            address = find_sdist(reply.read().decode(), archive.name, page)
        if address is None:
            raise UserError(f"the package index has no {archive.name}", where=page, remedy=remedy)
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as reply, archive.open("wb") as file:
            shutil.copyfileobj(reply, file)
    except OSError as error:
        raise UserError(f"could not fetch {archive.name}: {error}", remedy=remedy) from error
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
            raise UserError(f"unexpected content of {archive.name} (SHA-256 differs)", where=page, remedy=remedy)
    return archive


def _package_index() -> str:
    """The simple index that pip would use; pip prints it as the default of --index-url, from all its settings."""
    command = [sys.executable, "-m", "pip", "download", "--help"]
    # A wide terminal, so that the help text does not break the address.
    result = subprocess.run(command, env={**os.environ, "COLUMNS": "999"}, capture_output=True, text=True)
    found = re.search(r"--index-url.*?\(default (\S+)\)", " ".join(result.stdout.split()))
    if not found:
        raise UserError("pip does not print its package index", remedy="install pip in megamm's environment")
    return found[1].rstrip("/")


def find_sdist(page: str, file: str, address: str) -> str | None:
    """Absolute address of `file` on a simple index page (JSON, PEP 691, or HTML, PEP 503); None if it is missing."""
    if page.lstrip().startswith("{"):
        links = [entry["url"] for entry in json.loads(page)["files"]]
    else:
        links = re.findall(r'href="([^"#]+)', page)
    return next((urllib.parse.urljoin(address, link) for link in links if link.endswith(f"/{file}")), None)


def _unpack_sdist(package: Sdist, archive: Path, folder: Path) -> None:
    """Unpack regular files only, and none outside the folder."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(package.extensions):
                    tar.extract(member, folder, filter="data")
    except tarfile.TarError as error:
        remedy = "report it as an issue; nothing was stored"
        raise UserError(f"cannot unpack {archive.name}: {error}", remedy=remedy) from error


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
