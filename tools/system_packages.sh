#!/bin/sh
# Make sure of what pip cannot bring, a C++ compiler and a supported Python that can make environments:
# `sh tools/system_packages.sh PYTHON`.
#
# Python is probed by using it, so nothing is installed where it is already there. What is missing is installed
# with apt-get as root or through a sudo that asks for no password; elsewhere the command to run is printed
# and the exit code is 2.
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
    # Debian splits venv off; another Python's venv comes with it and does not get here.
    missing=$("$python" -c 'import sys; print(" python%d.%d-venv" % sys.version_info[:2])')
fi
# csrc/ is compiled at installation; without a compiler megamm works too, but its tests would leave the kernels out.
command -v "${CXX:-c++}" >/dev/null || missing="$missing g++"
[ -n "$missing" ] || exit 0

case $missing in
*/*)
    echo "error: $python does not run; give the path of a Python $supported: make PYTHON=/path/to/python3.11" >&2
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
    echo "error: missing on this system:$missing; install it as root (Debian: apt-get install$missing) and repeat" >&2
    exit 2
fi
echo "installing with apt-get:$missing"
# An image's package lists may be absent or older than the archive.
$as_root apt-get update -qq
# shellcheck disable=SC2086  # $missing is a list
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null || {
    echo "error: apt-get could not install$missing; give another Python $supported: make PYTHON=/path/to/python3.11" >&2
    exit 2
}
