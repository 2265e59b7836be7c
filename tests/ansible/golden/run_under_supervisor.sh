#!/usr/bin/env bash
# Ansible managed
# What the supervisor runs: low_mem.sh of the current release, once nothing is left of the run before and a start is worth it. A server that is killed leaves its
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

# What the plan needs must be there: memory, devices, limits, the port, a whole checkpoint. systemd's unit asks the same.
"$release/env/bin/lowmem" start-check --plan "$release/plan.json"

exec "$release/low_mem.sh"
