#!/bin/bash
# On the GPU machine, in the repository, when every part is in /tmp/rig: unpacks them, and leaves /tmp/rig-env.sh to source.
# HERE has the wheels that are not in the parts: zstandard; for fleet_two_replicas.py also vllm_router and orjson; for speculation.yml also vllm_offload_drafts. MODELS is
# what models.py made.
#   benchmarks/gpu/stage.sh HERE MODELS
set -euo pipefail
here=$1 models=$2
install() { python3 -m pip install -q --no-index --no-deps --no-compile --target "$@"; }
install /tmp/zs "$here"/zstandard-*.whl
# torchvision and torchaudio of the machine belong to its own, older torch
site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p /tmp/rig-away
for package in torchvision torchaudio; do mv "$site/$package"* /tmp/rig-away/ 2>/dev/null || true; done
cp -r "$models" /tmp/models
# torch wants its own NCCL ahead of the machine's; the rest keeps vLLM from the network, and from kernels that an A100 has not
cat > /tmp/rig-env.sh <<END
export PYTHONPATH=/tmp/site:$PWD:/tmp/zs LD_PRELOAD=/tmp/site/nvidia/nccl/lib/libnccl.so.2 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_CACHE_ROOT=/tmp/vllm-cache
export VLLM_DISABLED_KERNELS=MacheteLinearKernel VLLM_BIN=/tmp/vllm
END
program() { printf '#!/bin/sh\n%s "$@"\n' "$2" > "$1"; chmod +x "$1"; }
program /tmp/vllm 'exec python3 -m vllm.entrypoints.cli.main'
# sourced before the NCCL that it preloads is there: until then the loader says that it is ignored
# shellcheck source=/dev/null
. /tmp/rig-env.sh
python3 benchmarks/gpu/rig.py unpack /tmp/rig /tmp/site --try torch --try torchvision --try vllm.model_executor.warmup.kernel_warmup
rm -f /tmp/rig/part-*
if ls "$here"/vllm_offload_drafts-*.whl > /dev/null 2>&1; then
    install /tmp/site "$here"/vllm_offload_drafts-*.whl
fi
if ls "$here"/vllm_router-*.whl > /dev/null 2>&1; then
    install /tmp/router "$here"/vllm_router-*.whl "$here"/orjson-*.whl
    program /tmp/vllm-router 'PYTHONPATH=/tmp/router:/tmp/site exec python3 -m vllm_router.launch_router'
    PYTHONPATH=/tmp/router:/tmp/site python3 -c "import vllm_router.launch_router"
fi
