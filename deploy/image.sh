#!/usr/bin/env bash
# Builds the container image from the binaries in target/release, without a registry: FROM scratch, with the shared
# libraries the binaries load here and Debian's static busybox.
#
#   deploy/image.sh [IMAGE]      the image's name, holdfast:dev if not given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IMAGE=${1:-holdfast:dev}
readonly BINARIES=(holdfast holdfast-controller holdfast-drone)
# What backend commands may call by name in the container; `busybox NAME` reaches the rest.
readonly APPLETS=(sh cat cp date echo env expr false head httpd id kill ls mkdir mv nc ps rm seq sleep tail test true wget)

die() {
    echo "image: $*" >&2
    exit 1
}

command -v docker >/dev/null || die "there is no docker here"
for binary in "${BINARIES[@]}"; do
    [ -x "target/release/$binary" ] || die "target/release/$binary is missing; run: make build"
done

if ! busybox=$(command -v busybox) || ldd "$busybox" >/dev/null 2>&1; then
    # Missing, or not the static one, which alone runs without libraries.
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends busybox-static)
    log=$(mktemp)
    if ! "${install[@]}" >"$log" 2>&1 && ! { "${as_root[@]}" apt-get update && "${install[@]}"; } >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "busybox-static could not be installed"
    fi
    rm -f "$log"
    busybox=$(command -v busybox) || die "busybox is missing although busybox-static is installed"
fi

context=$(mktemp -d "${TMPDIR:-/tmp}/holdfast-image.XXXXXXXX")
trap 'rm -rf "$context"' EXIT
root=$context/rootfs
mkdir -p "$root"/{bin,dev,etc,proc,sys,tmp,usr/local/bin,var/lib/holdfast}
chmod 1777 "$root/tmp"

install -m 0755 "$busybox" "$root/bin/busybox"
for applet in "${APPLETS[@]}"; do
    ln -s busybox "$root/bin/$applet"
done

for binary in "${BINARIES[@]}"; do
    # Debug information stays outside: it is most of the file, and no container needs it.
    strip --strip-debug -o "$root/usr/local/bin/$binary" "target/release/$binary"
    chmod 0755 "$root/usr/local/bin/$binary"
    # ldd prints the libraries it found, and the loader, by their paths; a library it did not find is an error.
    libraries=$(ldd "target/release/$binary")
    ! grep -q 'not found' <<<"$libraries" || die "$binary lacks a library: $libraries"
    while read -r library; do
        [ -e "$root$library" ] || install -D -m 0755 "$(readlink -f "$library")" "$root$library"
    done < <(grep -oE '/[^ ]+' <<<"$libraries")
done

printf 'root:x:0:0:root:/var/lib/holdfast:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"

cp deploy/Dockerfile "$context/Dockerfile"
docker build --quiet -t "$IMAGE" "$context" >/dev/null
echo "image: built $IMAGE ($(docker image inspect -f '{{.Size}}' "$IMAGE") bytes)"
