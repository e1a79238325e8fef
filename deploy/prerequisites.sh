#!/usr/bin/env bash
# Installs what building Holdfast needs beyond Rust, on Debian and its relatives. Looks first, installs by apt-get only
# what is missing, and says nothing when nothing is.
#
#   deploy/prerequisites.sh          what the build needs: RocksDB is C++ and its bindings are made with libclang
#   deploy/prerequisites.sh test     also what the tests need: wrong clocks and cut networks
#   deploy/prerequisites.sh bench    also the peers that Holdfast is measured beside: etcd and PostgreSQL. Debian's packages
#                                    would start services of their own; what this installs is neither started nor enabled
set -euo pipefail

# Seconds to wait for another apt-get to let go of its lock.
readonly APT_LOCK_TIMEOUT_S=300

# Whether bindgen would find libclang, which it opens as a library and so has no program of its own to look for.
has_libclang() {
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        compgen -G "$LIBCLANG_PATH/libclang*.so*" >/dev/null && return 0
    fi
    # Runtime packages carry only libclang-NN.so.NN or libclang.so.NN, which bindgen takes as well.
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null \
        || compgen -G '/usr/lib/*/libclang*.so*' >/dev/null \
        || compgen -G '/usr/lib64/libclang*.so*' >/dev/null
}

# iptables and ip live in sbin, which is not in every user's PATH.
has_admin_program() {
    PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null
}

mode=${1:-build}
case "$mode" in
    build | test | bench) ;;
    *)
        echo "usage: deploy/prerequisites.sh [build|test|bench]" >&2
        exit 2
        ;;
esac

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
command -v clang >/dev/null || missing+=(clang)
has_libclang || missing+=(libclang-dev)
if [ "$mode" = test ]; then
    command -v faketime >/dev/null || missing+=(faketime)
    has_admin_program ip || missing+=(iproute2)
    has_admin_program iptables || missing+=(iptables)
    command -v python3 >/dev/null || missing+=(python3)
fi
services=()
if [ "$mode" = bench ]; then
    command -v etcd >/dev/null || { missing+=(etcd-server) && services+=(etcd.service); }
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null \
        || { missing+=(postgresql) && services+=(postgresql.service); }
fi

if ! command -v cargo >/dev/null; then
    echo "prerequisites: cargo is not in PATH; install Rust first (https://rustup.rs)" >&2
    exit 1
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "prerequisites: missing: ${missing[*]} (Debian's names), and there is no apt-get here to install them" >&2
    exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "prerequisites: missing: ${missing[*]}. Not root and no sudo, so run this as root:" >&2
        echo "    apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o "DPkg::Lock::Timeout=$APT_LOCK_TIMEOUT_S" "$@"
}

echo "prerequisites: installing ${missing[*]}"
log=$(mktemp)
readonly POLICY=/usr/sbin/policy-rc.d
policy_is_ours=
tidy() {
    rm -f "$log"
    [ -z "$policy_is_ours" ] || "${as_root[@]}" rm -f "$POLICY"
}
trap tidy EXIT
# Debian starts what it installs, unless this file says no.
if [ ${#services[@]} -gt 0 ] && [ ! -e "$POLICY" ]; then
    policy_is_ours=yes
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" install -m 755 /dev/stdin "$POLICY"
fi
# The package lists may be absent or too old to match the mirror; fetch them only if the install fails for it.
if ! apt install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
    if ! { apt update && apt install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
        cat "$log" >&2
        echo "prerequisites: apt-get could not install: ${missing[*]} (its output is above)" >&2
        exit 1
    fi
fi
# Nor at the next boot. Without systemd there is nothing to disable.
if [ ${#services[@]} -gt 0 ] && command -v systemctl >/dev/null; then
    "${as_root[@]}" systemctl disable "${services[@]}" >"$log" 2>&1 || true
fi
