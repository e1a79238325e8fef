#!/usr/bin/env bash
# `make demo`: a cluster of three controllers and a drone on this machine, a backend that holds a key, and the death of
# the leader under it. Every ✓ is checked; the first thing that is not so ends the demo with exit code 1. Ends by itself,
# with everything it started. Needs the binaries in target/release and what every Debian has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. deploy/lib.sh
# A setting meant for another cluster must not reach this one.
unset "${!HOLDFAST_@}"

readonly BIN=$PWD/target/release
readonly CONTROLLERS=3
# Where to look for free ports: below the kernel's ephemeral range. Controllers listen on base + 1, 2, 3 and, for their
# peers, on base + 101, 102, 103.
readonly BASE_PORT_FIRST=17100 BASE_PORT_STEP=200 BASE_PORT_LAST=31900
readonly READY_TIMEOUT_S=60
readonly CONNECT_TIMEOUT_S=60
readonly STOP_TIMEOUT_S=20

port_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

base_port_free() {
    local id
    for ((id = 1; id <= CONTROLLERS; id++)); do
        port_free $(($1 + id)) && port_free $(($1 + 100 + id)) || return 1
    done
}

find_base_port() {
    local base
    for ((base = BASE_PORT_FIRST; base <= BASE_PORT_LAST; base += BASE_PORT_STEP)); do
        if base_port_free "$base"; then
            printf '%s\n' "$base"
            return
        fi
    done
    fail "no free ports between $BASE_PORT_FIRST and $BASE_PORT_LAST"
}

# Pids of the processes of this demo and no others: our data directory, whose name is random, is in their command line,
# environment or working directory.
demo_pids() {
    local dir pid
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        [ "$pid" = $$ ] || [ "$pid" = "$BASHPID" ] && continue
        if grep -qsF -- "$data_dir" "$dir/cmdline" "$dir/environ" \
            || [[ $(readlink "$dir/cwd" 2>/dev/null) == "$data_dir"* ]]; then
            # A zombie is gone, but for its parent's notice.
            grep -qs '^State:[[:space:]]*Z' "$dir/status" || printf '%s\n' "$pid"
        fi
    done
}

none_left() { [ -z "$(demo_pids)" ]; }

# controller_pid ID: the pid of our controller with that member id. The first controller of the list that forms the
# cluster is member 1, and dev names the data directories in the same order.
controller_pid() {
    local pid args
    for pid in $(demo_pids); do
        args=$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) || continue
        if [[ $args == *holdfast-controller\ * && "$args " == *" --data-dir $data_dir/controller-$1 "* ]]; then
            printf '%s\n' "$pid"
            return
        fi
    done
    return 1
}

holdfast() { timeout "$CONNECT_TIMEOUT_S" "$BIN/holdfast" --controller "$urls" "$@"; }

cluster_ready() {
    kill -0 "$dev_pid" 2>/dev/null || fail "holdfast dev ended by itself; its output: $(tail -n 20 "$work/dev.log")"
    [ -n "$(holdfast cluster status --json 2>/dev/null | json_field leader)" ] \
        && [ "$(holdfast drones list --json 2>/dev/null | json_count ready true)" -ge 1 ]
}

leader() { holdfast cluster status --json 2>/dev/null | json_field leader; }

new_leader() {
    local now
    now=$(leader) || return 1
    [ -n "$now" ] && [ "$now" != "$old_leader" ]
}

connect() {
    holdfast connect --key demo --wait --wait-for-drone --json -- /usr/bin/perl "$PWD/deploy/demo-backend.pl" \
        >"$work/connect.json" 2>"$work/connect.err" \
        || fail "connect failed: $(cat "$work/connect.err")"
    backend_id=$(json_field backend_id <"$work/connect.json")
    token=$(json_field fencing_token <"$work/connect.json")
    spawned=$(json_field spawned <"$work/connect.json")
    address=$(json_field address <"$work/connect.json")
    if [ -z "$backend_id" ] || [ -z "$token" ] || [ -z "$address" ]; then
        fail "connect answered without backend, token or address: $(cat "$work/connect.json")"
    fi
}

# ask: what the backend says of itself, and the part of it that another process could not say.
ask() {
    answer=$(http_get "$address") || fail "the backend does not answer on $address"
    self=${answer% requests=*}
}

stop() {
    local pid
    if [ -n "$dev_pid" ]; then
        kill -TERM "$dev_pid" 2>/dev/null || true
        wait_until "$STOP_TIMEOUT_S" none_left || true
    fi
    stray=$(demo_pids | tr '\n' ' ')
    for pid in $stray; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    dev_pid=
}

cleanup() {
    local code=$?
    trap - EXIT
    stop
    if [ "$code" -ne 0 ] && [ -s "$work/dev.log" ]; then
        printf '\nThe end of the output of holdfast dev:\n' >&2
        tail -n 40 "$work/dev.log" >&2
    fi
    rm -rf "$work"
    exit "$code"
}

for binary in holdfast holdfast-controller holdfast-drone; do
    [ -x "$BIN/$binary" ] || fail "$BIN/$binary is missing; run: make build"
done

dev_pid='' stray=''
work=$(mktemp -d "${TMPDIR:-/tmp}/holdfast-demo.XXXXXXXX")
data_dir=$work/data
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

base_port=$(find_base_port)
urls=
for ((id = 1; id <= CONTROLLERS; id++)); do
    urls+=${urls:+,}http://127.0.0.1:$((base_port + id))
done

say "1. A cluster on this machine: $CONTROLLERS controllers, 1 drone"
began=$(now_ms)
"$BIN/holdfast" dev --controllers "$CONTROLLERS" --drones 1 --base-port "$base_port" --data-dir "$data_dir" \
    </dev/null >"$work/dev.log" 2>&1 &
dev_pid=$!
wait_until "$READY_TIMEOUT_S" cluster_ready || fail "the cluster is not ready after $READY_TIMEOUT_S s"
old_leader=$(leader)
ok "ready after $(($(now_ms) - began)) ms; controller $old_leader leads"

say "2. Connect to the key 'demo', which is free"
connect
check "a backend was started" "$spawned" true
first_backend=$backend_id first_token=$token first_address=$address
ask
first_self=$self first_answer=$answer
note "backend $backend_id at $address, fencing token $token"
note "it says: $answer"
check "the backend was given its own id and token" "${answer%% pid=*}" "key=demo backend=$backend_id token=$token"

say "3. Connect again, while it is held"
connect
check "no second backend was started" "$spawned" false
check "same backend" "$backend_id" "$first_backend"
check "same fencing token" "$token" "$first_token"

say "4. Kill the leader: kill -9 of controller $old_leader"
leader_pid=$(controller_pid "$old_leader") || fail "no process of controller $old_leader is found"
kill -KILL "$leader_pid"
began=$(now_ms)
connect
ok "connected again $(($(now_ms) - began)) ms after the kill"
check "no second backend was started" "$spawned" false
check "same backend" "$backend_id" "$first_backend"
check "same fencing token" "$token" "$first_token"
check "same address" "$address" "$first_address"
ask
note "before: $first_answer"
note "after:  $answer"
check "the very process that answered before answers now" "$self" "$first_self"
wait_until "$READY_TIMEOUT_S" new_leader || fail "no other leader after $READY_TIMEOUT_S s"
ok "controller $(leader) leads now, no longer $old_leader"

say "5. End the backend, and connect once more"
holdfast backends terminate "$first_backend" --hard >"$work/terminate.out" 2>&1 \
    || fail "terminate failed: $(cat "$work/terminate.out")"
connect
check "a new backend was started" "$spawned" true
[ "$backend_id" != "$first_backend" ] || fail "it has the old backend's id"
[ "$token" -gt "$first_token" ] || fail "its fencing token $token is not larger than $first_token"
ok "its fencing token is larger: $token > $first_token"

say "6. Stop everything"
stop
[ -z "$stray" ] || fail "these processes had to be killed after $STOP_TIMEOUT_S s: $stray"
ok "nothing is left running"
printf '\nThat was the demo. By hand: see "A first session" in README.md.\n'
