#!/usr/bin/env bash
# Runs tests N times in a row and reports each failure, how often and in which run: for tests of threads, servers and
# processes, beside other load. Arguments after N go to pytest:
#     scripts/steady.sh 20 tests/server tests/unit/test_batching.py
set -uo pipefail
[ $# -ge 2 ] && [ "$1" -gt 0 ] 2>/dev/null || { echo "usage: scripts/steady.sh N FILE..." >&2; exit 2; }
n=$1
shift
logs=$(mktemp -d "${TMPDIR:-/tmp}/steady-XXXXXX")
failed=0
for run in $(seq "$n"); do
    begin=$SECONDS
    nice pytest -q -p no:cacheprovider "$@" >"$logs/$run.log" 2>&1
    status=$?
    printf 'run %d of %d: %d s, exit %d, %s\n' "$run" "$n" $((SECONDS - begin)) "$status" "$(tail -1 "$logs/$run.log")"
    if [ "$status" = 0 ]; then rm "$logs/$run.log"; else failed=$((failed + 1)); fi
done
if [ "$failed" = 0 ]; then
    rmdir "$logs"
    echo "steady: $n runs, no failure"
    exit 0
fi
echo "NOT STEADY: $failed of $n runs failed; how often, and which:"
grep -hE '^(FAILED|ERROR) ' "$logs"/*.log | sed 's/ - .*//' | sort | uniq -c | sort -rn
echo "logs of the failed runs: $logs"
exit 1
