"""The kinds of values that operators set, and the filters that read what the plan and the key file say."""

from __future__ import annotations

from typing import Any

import pytest

from .plugin import load

IS = load("test/values.py").TestModule().tests()
API_KEYS = load("filter/keys.py").FilterModule().filters()["api_keys"]
LOCAL_URL = load("filter/address.py").FilterModule().filters()["local_url"]

GOOD = {
    "config_path": ["/opt/vllm-lowmem", "/srv/a_b+c@d.e"],
    "instance_name": ["main", "A_1", "x" * 32],
    "user_name": ["vllm", "_a-1"],
    "api_key": ["sk-0123456789abcdef", 1234567890123456, "A._~+/=-" * 2],
    "api_key_name": ["alice", "B_2"],
    "major_minor": ["12.9", 12.9],
    "repository_url": ["https://example.org/cuda/", "file:///srv/mirror"],
    "ip_address": ["10.0.0.1", "::", "fd00::1"],
    "ip_network": ["10.0.0.1", "10.0.0.0/24", "10.0.0.5/8", "fd00::/64"],
    "loopback": ["127.0.0.1", "127.8.8.8", "::1", "localhost"],
}

BAD: dict[str, list[Any]] = {
    "config_path": ["", "opt", "/", "/a b", "/a\n", "/a/", "/a;b", "/$(id)", "/a//b", 1, None],
    "instance_name": ["", "a-b", "a.b", "x" * 33, "main\n", True],
    "user_name": ["Root", "1a", "a b", "a" * 33, "vllm\n"],
    "api_key": ["short", "0123456789abcde\n", "0123456789abcdef 1", "k" * 257, True, None],
    "api_key_name": ["1a", "a-b", "", "a\n"],
    "major_minor": ["12", "12.9.1", "12.9\n", 12],
    "repository_url": ["http://", "ftp://example.org", "https://a b", "https://a\n"],
    "ip_address": ["10.0.0.256", "10.0.0", "10.0.0.1/24", "::::", "fe80::1%eth0", "localhost", 1],
    "ip_network": [
        "10.0.0.0/33",
        "10.0.0.0/255.255.255.0",
        "fe80::1%eth0",
        "10.0.0.0/",
        "a/24",
        "",
        "fd00::/129",
    ],
    "loopback": ["0.0.0.0", "::", "10.0.0.1", "", None],
}


@pytest.mark.parametrize("kind", sorted(IS))
def test_a_value_is_of_its_kind_or_not(kind: str) -> None:
    assert [value for value in GOOD[kind] if not IS[kind](value)] == []
    assert [value for value in BAD[kind] if IS[kind](value)] == []


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", {}),
        ("VLLM_API_KEY=0123456789abcdef\n", {"default": "0123456789abcdef"}),
        ("# VLLM_API_KEY=a\nVLLM_API_KEY='one'\nVLLM_API_KEY_alice='one'\nVLLM_API_KEY_bob=two\n",
         {"alice": "one", "bob": "two"}),
        ("HF_TOKEN=x\nVLLM_API_KEYS=y\n", {}),
    ],
)  # fmt: skip
def test_the_keys_of_a_file_have_names(text: str, keys: dict[str, str]) -> None:
    assert API_KEYS(text) == keys


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("a.example", "http://a.example:8000"),
    ],
)
def test_a_server_is_reached_from_its_host(host: str, url: str) -> None:
    assert LOCAL_URL({"host": host, "port": 8000}) == url
