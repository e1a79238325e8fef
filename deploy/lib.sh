# shellcheck shell=bash
# What demo.sh and compose-test.sh share: checks that are printed, waiting, and reading HTTP and JSON with bash alone,
# because a bare Debian has neither curl nor jq. To be sourced by a script that has `set -euo pipefail`.

# Seconds without a byte after which http_get gives up.
readonly HTTP_TIMEOUT_S=5

say() { printf '\n%s\n' "$*"; }
ok() { printf '  ✓ %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
fail() {
    printf '  ✗ %s\n' "$*" >&2
    exit 1
}

# check DESCRIPTION ACTUAL EXPECTED: prints ✓, or both values and exits 1.
check() {
    [ "$2" = "$3" ] || fail "$1: expected '$3', got '$2'"
    ok "$1"
}

# json_field NAME < JSON: the last scalar called NAME anywhere in the text, without quotes; empty if absent or null.
# Enough for the answers read here, whose names are each used once and whose values hold no escapes.
json_field() {
    local value
    value=$(tr -d '\n' | grep -oE "\"$1\"[[:space:]]*:[[:space:]]*(\"[^\"]*\"|-?[0-9]+|true|false|null)" | tail -n 1 \
        | sed -E 's/^"[^"]*"[[:space:]]*:[[:space:]]*//; s/^"(.*)"$/\1/') || true
    [ "$value" = null ] || printf '%s\n' "$value"
}

# json_count NAME VALUE < JSON: how often NAME has that scalar value (strings with their quotes).
json_count() {
    tr -d '\n' | { grep -oE "\"$1\"[[:space:]]*:[[:space:]]*$2" || true; } | wc -l
}

# wait_until SECONDS COMMAND...: repeats the command until it succeeds; fails when the time is over.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# http_get ADDRESS: the body of GET / at HOST:PORT; fails if nobody answers.
http_get() {
    local host=${1%:*} port=${1##*:} answer
    # In a process of its own, so that a host that swallows packets cannot hold us longer than the time-out.
    # shellcheck disable=SC2016 # expanded by the inner shell
    answer=$(timeout "$HTTP_TIMEOUT_S" bash -c '
        exec 3<>"/dev/tcp/$1/$2" || exit 1
        printf "GET / HTTP/1.0\r\nHost: %s\r\n\r\n" "$1" >&3
        cat <&3' - "$host" "$port" 2>/dev/null) || return 1
    case "$answer" in
        HTTP/1.?" 200"*) printf '%s\n' "${answer#*$'\r\n\r\n'}" ;;
        *) return 1 ;;
    esac
}

# Milliseconds since the epoch.
now_ms() { printf '%s\n' $((${EPOCHREALTIME//[.,]/} / 1000)); }
