#!/usr/bin/env bash
# Clients that others wrote, by their own defaults, against a server with the demo model: each in an environment of its
# own, with the versions of requirements/ and package.json. Prints a table; exit code 1 if a check failed.
#     tests/clients/run.sh [CLIENT...]      all: openai reports instructor pydantic_ai langchain litellm llm aider openai.mjs ai_sdk.mjs
# PYTHON is an interpreter that has pydiffusion with the extra `server`; CLIENTS_FOLDER keeps environments between runs.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
python=${PYTHON:-python3}
clients=("$@")
[ $# -gt 0 ] || clients=(openai reports instructor pydantic_ai langchain litellm llm aider openai.mjs ai_sdk.mjs)
work=$(mktemp -d)
folder=${CLIENTS_FOLDER:-$work}
server=
stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT
table=$work/table

cd "$work" # not the repository, whose source Python would take for the installed package
"$python" - <<'EOF' # with room for an agent's prompt, which no one expects it to understand
from pydiffusion.convert import convert, edit_metadata
from pydiffusion.demo import checkpoint_path

convert(checkpoint_path(), "demo.gguf", "q8_0")
edit_metadata("demo.gguf", {"diffusion-gemma.context_length": 16384})
EOF
"$python" -m pydiffusion serve -m demo.gguf --port 0 --ctx 16384 2>server.log &
server=$!
for _ in $(seq 600); do
    OPENAI_BASE_URL=$(sed -n 's|.*serving on \(http://[^ /]*\).*|\1/v1|p' server.log)
    [ -z "$OPENAI_BASE_URL" ] || break
    kill -0 "$server" 2>/dev/null || { cat server.log; exit 1; }
    sleep 0.1
done
[ -n "$OPENAI_BASE_URL" ] || { echo "the server is not up after a minute"; cat server.log; exit 1; }
export OPENAI_BASE_URL OPENAI_API_KEY=none CLIENTS_MODEL=demo NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 CLIENTS_FOLDER=$work

# The interpreter or program of a client, installed on first use; what can't be installed is not checked.
install() {
    if [[ $1 = *.mjs ]]; then
        command -v npm >/dev/null || { echo "there is no npm"; return 1; }
        mkdir -p "$folder/js"
        cp "$here"/*.mjs "$here/package.json" "$folder/js/"
        (cd "$folder/js" && npm install --silent --no-audit --no-fund) >"$work/install.log" 2>&1
    elif [ ! -e "$folder/$1/ready" ]; then
        "$python" -m venv "$folder/$1" && "$folder/$1/bin/pip" install --quiet -r "$here/requirements/$1.txt" \
            >"$work/install.log" 2>&1 && touch "$folder/$1/ready"
    fi || { echo "it could not be installed: $(tail -1 "$work/install.log")"; return 1; }
}

for client in "${clients[@]}"; do
    if ! reason=$(install "$client"); then
        echo "NOT CHECKED $client: $reason" | tee -a "$table"
        continue
    fi
    case $client in
    *.mjs) run=(node "$folder/js/check_$client") ;;
    *) run=("$folder/$client/bin/python" "$here/check_$client.py") ;;
    esac
    echo "--- $client"
    status=0
    (cd "$work" && env -u PYTHONPATH timeout 900 "${run[@]}") >"$work/out" 2>"$work/err" </dev/null || status=$?
    [ "$status" = 0 ] || { grep -vE '^(PASS|FAIL) ' "$work/out" | tail -c 4000 && tail -c 4000 "$work/err"; } || true
    grep -E '^(PASS|FAIL) ' "$work/out" | tee -a "$table" || true
    if [ "$status" -gt 1 ] || ! grep -qE '^(PASS|FAIL) ' "$work/out"; then
        echo "FAIL $client: it ended with exit code $status" | tee -a "$table"
    fi
done
kill -0 "$server" 2>/dev/null || echo "FAIL the server ended" | tee -a "$table"
if grep -q '^Traceback' server.log; then
    cat server.log
    echo "FAIL the server printed a traceback" | tee -a "$table"
fi

printf '\n=== clients\n'
cat "$table"
count() { grep -c "^$1 " "$table" || true; }
echo "$(count PASS) passed, $(count FAIL) failed, $(count 'NOT CHECKED') clients not checked"
[ "$(count FAIL)" = 0 ]
