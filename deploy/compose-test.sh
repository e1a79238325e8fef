#!/usr/bin/env bash
# Brings deploy/compose.yaml up on this machine's container engine and takes its leader away twice: killed, then cut off
# from the network. Each time the keys must stay with the same backends, whose processes must not notice, past the expiry
# of every lease that was held when the leader went. Everything is made under a name of its own and removed at the end.
#
# Exit codes: 0 all checks hold; 1 one does not; 77 there is no container engine here.
# Needs the binaries in target/release (make build).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. deploy/lib.sh
# A setting meant for another cluster must not reach this one.
unset "${!HOLDFAST_@}"

readonly KEYS=5
readonly CONTROLLERS=3 DRONES=2
# Short, so that leases of before a fault run out within the test; soft leaves the drone 9 s to find the new leader.
readonly LEASE=renew=3s,soft=12s,hard=15s,expiry=20s
readonly EXPIRY_S=20
readonly READY_TIMEOUT_S=60
readonly CONNECT_TIMEOUT_S=30
# How long the cut-off leader is given to acknowledge what it must not.
readonly ISOLATED_TIMEOUT_S=8
readonly BIN=$PWD/target/release
# The backend: one page, written once when it starts. Its last word is random, so no other process can serve the same.
# shellcheck disable=SC2016 # expanded in the container
readonly BACKEND='mkdir -p www && echo "$SESSION_BACKEND_ID $SESSION_BACKEND_FENCING_TOKEN $(cat /proc/sys/kernel/random/uuid)" >www/index.html && exec busybox httpd -f -p "$PORT" -h www'

skip() {
    echo "SKIP: no container engine ($*)"
    exit 77
}

command -v docker >/dev/null || skip "no docker command"
docker info >/dev/null 2>&1 || skip "docker does not reach its engine"
if docker compose version >/dev/null 2>&1; then
    compose_command=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose_command=(docker-compose)
else
    skip "neither docker compose nor docker-compose"
fi
[ -x "$BIN/holdfast" ] || fail "$BIN/holdfast is missing; run: make build"

compose() { "${compose_command[@]}" -p "$project" -f deploy/compose.yaml "$@" >>"$work/compose.log" 2>&1; }

container() { docker ps -aq --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"; }

# A /24 of 10.77 that neither a container network nor a route of this machine uses.
free_prefix() {
    local taken third first=$((RANDOM % 250)) i
    taken=$(
        docker network ls -q | xargs docker network inspect -f '{{range .IPAM.Config}}{{.Subnet}} {{end}}'
        # Destinations in /proc/net/route are hexadecimal, least significant byte first: 10.77.X.0 is 00XX4D0A.
        while read -r _ destination _; do
            [[ $destination =~ ^[0-9A-F]{2}([0-9A-F]{2})4D0A$ ]] && printf '10.77.%d.0 ' "0x${BASH_REMATCH[1]}"
        done </proc/net/route
    )
    for ((i = 0; i < 250; i++)); do
        third=$(((first + i) % 250 + 1))
        if [[ " $taken" != *[[:space:]]10.77.$third.* ]]; then
            printf '10.77.%s\n' "$third"
            return
        fi
    done
    fail "every /24 of 10.77.0.0/16 is in use"
}

holdfast() { timeout "$CONNECT_TIMEOUT_S" "$BIN/holdfast" --controller "$urls" "$@"; }

leader() { holdfast cluster status --json 2>/dev/null | json_field leader; }

cluster_ready() {
    local status ended
    # The service that forms the cluster ends, with 0.
    ended=$(docker ps -a --filter "label=com.docker.compose.project=$project" --filter status=exited \
        --format '{{.Label "com.docker.compose.service"}} {{.Status}}' | grep -v '^init Exited (0)' || true)
    [ -z "$ended" ] || fail "ended by themselves: $ended"
    status=$(holdfast cluster status --json 2>/dev/null) || return 1
    [ -n "$(json_field leader <<<"$status")" ] && [ "$(json_count ready true < <(holdfast drones list --json 2>/dev/null))" -eq "$DRONES" ]
}

init_ended() { [ "$(docker inspect -f '{{.State.Status}}' "$(container init)")" = exited ]; }

# init_done: the service that forms the cluster has ended well.
init_done() {
    wait_until "$READY_TIMEOUT_S" init_ended || fail "the init service has not ended after $READY_TIMEOUT_S s"
    check "the init service ended well" "$(docker inspect -f '{{.State.ExitCode}}' "$(container init)")" 0
}

cluster_id() { holdfast cluster status --json | json_field cluster_id; }

# other_leader ID: there is a leader, and it is not ID.
other_leader() {
    local now
    now=$(leader) || return 1
    [ -n "$now" ] && [ "$now" != "$1" ]
}

# serves ID: controller ID answers a linearizable read, which it can only if it hears from the leader.
serves() {
    [ -n "$(timeout "$CONNECT_TIMEOUT_S" "$BIN/holdfast" --controller "http://$HOLDFAST_NET_PREFIX.1$1:7101" cluster status --json 2>/dev/null | json_field leader)" ] \
        && timeout "$CONNECT_TIMEOUT_S" "$BIN/holdfast" --controller "http://$HOLDFAST_NET_PREFIX.1$1:7101" keys list --json >/dev/null 2>&1
}

# connect KEY: sets backend_id, token, spawned, address and page.
connect() {
    local answer
    answer=$(holdfast connect --key "$1" --wait --wait-for-drone --json -- /bin/sh -c "$BACKEND" 2>"$work/connect.err") \
        || fail "connect to $1 failed: $(cat "$work/connect.err")"
    backend_id=$(json_field backend_id <<<"$answer")
    token=$(json_field fencing_token <<<"$answer")
    spawned=$(json_field spawned <<<"$answer")
    address=$(json_field address <<<"$answer")
    if [ -z "$backend_id" ] || [ -z "$token" ] || [ -z "$address" ]; then
        fail "connect to $1 answered without backend, token or address: $answer"
    fi
    page=$(http_get "$address") || fail "the backend of $1 does not answer on $address"
}

# same_holders WHEN: every key is held as it was at first.
same_holders() {
    local i
    for ((i = 1; i <= KEYS; i++)); do
        connect "key-$i"
        [ "$spawned" = false ] || fail "$1: connect to key-$i started a backend"
        [ "$backend_id" = "${backends[i]}" ] || fail "$1: key-$i moved from ${backends[i]} to $backend_id"
        [ "$token" = "${tokens[i]}" ] || fail "$1: the token of key-$i changed from ${tokens[i]} to $token"
        [ "$page" = "${pages[i]}" ] || fail "$1: another process serves key-$i: '${pages[i]}' became '$page'"
    done
    ok "$1: $KEYS keys have the same backends, tokens and processes"
}

# past_expiry SINCE: waits until leases held at SINCE (in $SECONDS) and not renewed since are over.
past_expiry() {
    local left=$(($1 + EXPIRY_S + 1 - SECONDS))
    [ "$left" -le 0 ] || sleep "$left"
}

cleanup() {
    local code=$?
    trap - EXIT INT TERM
    if [ "$code" -ne 0 ]; then
        {
            echo "--- containers"
            docker ps -a --filter "label=com.docker.compose.project=$project" --format '{{.Names}}: {{.Status}}'
            echo "--- their last lines"
            "${compose_command[@]}" -p "$project" -f deploy/compose.yaml logs --no-color --tail 30 2>&1 || true
            echo "--- what compose said"
            tail -n 20 "$work/compose.log"
        } >&2
    fi
    compose down --volumes --remove-orphans --timeout 2 || echo "could not remove project $project: $(tail -n 5 "$work/compose.log")" >&2
    docker image rm -f "$HOLDFAST_IMAGE" >/dev/null 2>&1 || true
    rm -rf "$work"
    exit "$code"
}

project=holdfast-test-$$-$RANDOM
work=$(mktemp -d "${TMPDIR:-/tmp}/holdfast-compose.XXXXXXXX")
: >"$work/compose.log"
export HOLDFAST_IMAGE=holdfast:$project HOLDFAST_LEASE=$LEASE
HOLDFAST_NET_PREFIX=$(free_prefix)
export HOLDFAST_NET_PREFIX
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

urls=
for ((id = 1; id <= CONTROLLERS; id++)); do
    urls+=${urls:+,}http://$HOLDFAST_NET_PREFIX.1$id:7101
done

say "1. Image and containers ($project, $HOLDFAST_NET_PREFIX.0/24)"
deploy/image.sh "$HOLDFAST_IMAGE" >"$work/image.log" 2>&1 || fail "no image: $(cat "$work/image.log")"
compose up -d || fail "compose up failed"
wait_until "$READY_TIMEOUT_S" cluster_ready || fail "the cluster is not ready after $READY_TIMEOUT_S s"
ok "$CONTROLLERS controllers and $DRONES drones are ready"
init_done
formed=$(cluster_id)
compose up -d || fail "compose up failed when everything was up"
init_done
check "a second 'up' changed nothing" "$(cluster_id)" "$formed"

say "2. Connect to $KEYS keys"
declare -a backends tokens pages
for ((i = 1; i <= KEYS; i++)); do
    connect "key-$i"
    [ "$spawned" = true ] || fail "key-$i was held already"
    [[ $page == "$backend_id $token "* ]] || fail "the backend of key-$i was not given its id and token: '$page'"
    backends[i]=$backend_id tokens[i]=$token pages[i]=$page
    note "key-$i: backend $backend_id at $address, token $token"
done
same_holders "at once"

say "3. Kill the leader's container"
killed=$(leader)
docker kill -s KILL "$(container "controller-$killed")" >/dev/null
since=$SECONDS
same_holders "controller $killed dead"
wait_until "$READY_TIMEOUT_S" other_leader "$killed" || fail "no other leader after $READY_TIMEOUT_S s"
ok "controller $(leader) leads, no longer $killed"
past_expiry "$since"
same_holders "a whole lease later"
docker start "$(container "controller-$killed")" >/dev/null
wait_until "$READY_TIMEOUT_S" serves "$killed" || fail "controller $killed, started again, does not serve after $READY_TIMEOUT_S s"
ok "controller $killed, started again, serves"

say "4. Cut the leader's container off from the network"
cut=$(leader)
cut_container=$(container "controller-$cut")
docker network disconnect "${project}_holdfast" "$cut_container"
since=$SECONDS
same_holders "controller $cut cut off"
wait_until "$READY_TIMEOUT_S" other_leader "$cut" || fail "no other leader after $READY_TIMEOUT_S s"
ok "controller $(leader) leads, no longer $cut"
if isolated=$(docker exec "$cut_container" /bin/busybox timeout "$ISOLATED_TIMEOUT_S" /usr/local/bin/holdfast \
    --controller http://127.0.0.1:7101 connect --key isolated --json -- /bin/sh -c "$BACKEND" 2>&1); then
    fail "controller $cut, cut off, acknowledged an acquisition: $isolated"
fi
ok "controller $cut, cut off, acknowledges nothing"
past_expiry "$since"
same_holders "a whole lease later"
docker network connect --ip "$HOLDFAST_NET_PREFIX.1$cut" "${project}_holdfast" "$cut_container"
wait_until "$READY_TIMEOUT_S" serves "$cut" || fail "controller $cut, back on the network, does not serve after $READY_TIMEOUT_S s"
ok "controller $cut, back on the network, serves"
same_holders "at the end"

# Of the backends of these keys no other was ever started; the isolated connect may have left one of its own behind.
for ((i = 1; i <= KEYS; i++)); do
    shown=$(holdfast backends show "${backends[i]}" --json) || fail "backend ${backends[i]} is unknown"
    check "backend ${backends[i]} is ready" "$(json_field status <<<"$shown")" ready
done

say "All checks hold."
