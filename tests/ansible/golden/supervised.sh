#!/usr/bin/env bash
# Ansible managed
# What the supervisor runs: low_mem.sh of the current release, once nothing is left of the run before and the checkpoint is whole. A server that is killed leaves its
# engine behind, with the model's memory; systemd ends such left-overs by itself (KillMode), a supervisor does not.
set -euo pipefail

root=/srv/vllm-lowmem
for process in /proc/[0-9]*; do
    name=$(cat "$process/comm" 2>/dev/null) || continue
    folder=$(readlink "$process/cwd" 2>/dev/null) || continue
    if [[ $folder == "$root" && ($name == VLLM::* || $name == vllm) ]]; then
        echo "ending process ${process##*/} ($name), left over from the run before"
        kill -KILL "${process##*/}" || true
    fi
done

# Looked up once: a switch meanwhile is for the next start.
release=$(readlink -f "$root/current")

# Only the bytes that the manifest has are served. What was read once and has not changed since is not read again.
checkpoint=$(readlink "$release/model")
if [[ -e $checkpoint.manifest.json ]] && ! "$release/env/bin/python" -m lowmem.manifest "$checkpoint.manifest.json" "$checkpoint"; then
    echo "$checkpoint is not as its manifest has it, and is not served: run site.yml again, which makes it anew"
    exit 1
fi

exec "$release/low_mem.sh"
