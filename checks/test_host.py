"""The host is what the plan was made for."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.schema import Plan


def test_environment_has_the_planned_vllm(deployment: Any, plan: Plan) -> None:
    version = deployment.python("import importlib.metadata as m; print(m.version('vllm'))").strip()
    assert version.split("+")[0] == plan.vllm_version


def test_ram_holds_what_the_plan_asks_of_the_host(deployment: Any, plan: Plan) -> None:
    total = int(deployment.python("import psutil; print(psutil.virtual_memory().total)"))
    assert total >= plan.host_ram_bytes, (
        f"{total / 2**30:.1f} GiB of RAM, the plan needs {plan.host_ram_bytes / 2**30:.1f} GiB"
    )


def test_gpus_are_there(deployment: Any, plan: Plan) -> None:
    if plan.device_kind != "cuda":
        pytest.skip("the plan uses no GPU")
    seen = deployment.host.check_output("nvidia-smi --query-gpu=name --format=csv,noheader").splitlines()
    assert len(seen) >= plan.device_count, (
        f"the plan is for {plan.device_count} GPUs, nvidia-smi shows {seen}"
    )


def test_pinned_memory_is_allowed(deployment: Any, plan: Plan) -> None:
    if plan.service.memlock != "infinity":
        pytest.skip("the plan pins no memory")
    main = next(p["pid"] for p in deployment.processes()["processes"] if p["main"])
    limits = deployment.host.file(f"/proc/{main}/limits").content_string
    line = next(line for line in limits.splitlines() if line.startswith("Max locked memory"))
    assert line.split()[3] == "unlimited", line


def test_only_the_planned_address_is_listened_on(deployment: Any) -> None:
    assert deployment.processes()["addresses"] == [deployment.deploy.host]
