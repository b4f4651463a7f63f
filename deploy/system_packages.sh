#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages of programs that PyPI does not have; does nothing if none is missing.
# `system_packages.sh setup`: packages for the engines. `system_packages.sh tests`: also those that the tests start.
# PYTHON names a Python that can make environments; empty if there is none. BUILD is cpu or gpu.
set -euo pipefail

HAS_HEADERS='import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
packages=()
services=()

need() {  # need PACKAGE SERVICE COMMAND…: any one of the commands is enough; "-" if the package has no service
    local package=$1 service=$2
    shift 2
    for command in "$@"; do
        if command -v "$command" >/dev/null; then return; fi
    done
    packages+=("$package")
    if [[ $service != - ]]; then services+=("$service"); fi
}

stop() {
    echo "make: packages are missing, and $1: ${packages[*]}" >&2
    exit 1
}

may_sudo() {  # Whether sudo works without a password, or somebody at a terminal can type one.
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null || { [[ -t 0 ]] && sudo -v; }
}

need python3-venv - "${PYTHON-python3}"
if [[ ${BUILD-cpu} == cpu ]]; then
    # vLLM compiles a function with these at the first request for log-probabilities.
    need g++ - g++
    "${PYTHON:-python3}" -c "$HAS_HEADERS" 2>/dev/null || packages+=(python3-dev)
    if [[ $(ldconfig -p) != *'libnuma.so.1 '* ]]; then packages+=(libnuma1); fi
fi
if [[ $1 == tests ]]; then
    need redis-server redis-server redis-server
    need nginx-light nginx nginx
    need prometheus prometheus promtool
    # Ubuntu has Chromium only as a snap; there, `make` lets Playwright download its own.
    if ! grep -qx 'ID=ubuntu' "${OS_RELEASE:-/etc/os-release}" 2>/dev/null; then
        need chromium - chromium google-chrome
    fi
fi
if ((${#packages[@]} == 0)); then exit 0; fi

command -v apt-get >/dev/null || stop 'there is no apt-get to install them'
as_root=(env DEBIAN_FRONTEND=noninteractive)
if [[ $(id -u) != 0 ]]; then
    may_sudo || stop 'only root, or sudo, may install them'
    as_root=(sudo "${as_root[@]}")
fi

echo "Installing ${packages[*]}…"
apt_get=("${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=300)
"${apt_get[@]}" update || stop 'apt-get update failed'
"${apt_get[@]}" install --no-install-recommends "${packages[@]}" >/dev/null || stop 'apt-get install failed'

# Debian starts installed services now and at every boot. The tests start their own, so stop these.
for service in "${services[@]}"; do
    "${as_root[@]}" service "$service" stop >/dev/null 2>&1 || true
    "${as_root[@]}" update-rc.d "$service" disable >/dev/null 2>&1 || true
done
