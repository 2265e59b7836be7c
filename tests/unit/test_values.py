"""A value that reaches a shell, a unit or a configuration is of one validated type."""

import pytest
from pydantic import ValidationError

from lowmem.errors import BadInput
from lowmem.plan.request import PlanRequest, gather
from lowmem.schema import Deploy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_path", "/m\ntouch /tmp/x"),
        ("model_path", "/m\r"),
        ("model_path", ""),
        ("served_model_name", "a\nb"),
        ("host", "$(id)"),
        ("host", "127.0.0.1; id"),
        ("host", "127.0.0.1\n"),
        ("port", True),
        ("port", "1_0"),
        ("port", " 80"),
        ("port", 0),
        ("port", 65536),
        ("master_port", True),
    ],
)
def test_a_hostile_value_is_refused(field, value):
    with pytest.raises(ValidationError) as refused:
        Deploy.model_validate({"model_path": "/m", "served_model_name": "m", field: value})
    assert refused.value.errors()[0]["loc"] == (field,)


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("host", "::1", "::1"),
        ("host", "fe80::1%eth0", "fe80::1%eth0"),
        ("host", "gpu-1.example.org", "gpu-1.example.org"),
        ("port", "8010", 8010),
        ("model_path", "/srv/a model/größe", "/srv/a model/größe"),
    ],
)
def test_an_ordinary_value_is_kept(field, value, read):
    found = Deploy.model_validate({"model_path": "/m", "served_model_name": "m", field: value})
    assert getattr(found, field) == read


def test_a_plan_refuses_it_in_one_line():
    deploy = {"model_path": "/m", "served_model_name": "m", "port": True}
    with pytest.raises(BadInput, match=r"^port=True of the deployment: Value error, a number is wanted$"):
        gather(PlanRequest("low_mem", deploy=deploy))
