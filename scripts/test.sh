#!/usr/bin/env bash
# Every test, in less time than one after the other. First whatever measures or fills the machine, alone: real
# engines, emulated links, transfers. Then the tests that wait (etcd: leases, elections, outages) beside those
# that compute (cores, index services). Fails when any of the three runs does.
set -uo pipefail
cd "$(dirname "$0")/.."

pytest=(.venv/bin/python -m pytest)
waiting=(tests/integration/etcd tests/integration/replication)
computing=(tests/unit tests/layering tests/integration/test_{cache,index,router}_*.py)

failed=0
"${pytest[@]}" tests "${waiting[@]/#/--ignore=}" "${computing[@]/#/--ignore=}" || failed=1

log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${pytest[@]}" "${computing[@]}" >"$log" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null; rm -f "$log"' EXIT
"${pytest[@]}" "${waiting[@]}" || failed=1
wait "$other" || failed=1
cat "$log"
[ "$failed" = 0 ] || echo "test.sh: at least one of the three runs above failed" >&2
exit "$failed"
