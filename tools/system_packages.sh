#!/bin/sh
# Install what pip cannot: a C++ compiler and a supported Python with venv.
# `sh tools/system_packages.sh PYTHON`.
#
# Only missing packages are installed, with apt-get, as root or through a sudo that needs no password. Otherwise the
# command to run is printed and the exit code is 2.
set -eu
python=$1

supported="3.11 or 3.12"  # as in setup.py

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
case $version in
3.11 | 3.12 | "") ;;
*)
    echo "error: $python is Python $version, megamm needs $supported: make PYTHON=/path/to/python3.11" >&2
    exit 2
    ;;
esac

missing=""
if [ -z "$version" ]; then
    missing=" $python $python-venv"
elif ! "$python" -c "import ensurepip, venv" 2>/dev/null; then
    # Debian packages venv separately; other Pythons include it.
    missing=$("$python" -c 'import sys; print(" python%d.%d-venv" % sys.version_info[:2])')
fi
# csrc/ is compiled at installation; megamm works without a compiler, but its tests would skip the kernels.
command -v "${CXX:-c++}" >/dev/null || missing="$missing g++"
[ -n "$missing" ] || exit 0

case $missing in
*/*)
    echo "error: cannot run $python; set the path of a Python $supported: make PYTHON=/path/to/python3.11" >&2
    exit 2
    ;;
esac
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo"
else
    as_root="none"
fi
if [ "$as_root" = none ] || ! command -v apt-get >/dev/null; then
    echo "error: missing on this system:$missing; install as root (Debian: apt-get install$missing) and try again" >&2
    exit 2
fi
echo "installing with apt-get:$missing"
# An image's package lists may be absent or older than the archive.
$as_root apt-get update -qq
# shellcheck disable=SC2086  # $missing is a list
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null || {
    echo "error: apt-get could not install$missing; use another Python $supported: make PYTHON=/path/to/python3.11" >&2
    exit 2
}
