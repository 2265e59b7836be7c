"""Headers of safetensors files: hostile ones, many tensors, and which files of a folder count."""

import json
import struct
import time

import pytest

from lowmem.checkpoint.headers import checkpoint_headers, read_header, tensor_bytes
from lowmem.checkpoint.patterns import matches
from lowmem.errors import BadInput


def write(path, tensors):
    """Write a file of the given name -> (dtype, shape, bytes); its data is a hole."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        ({"dtype": "BF16", "shape": [3, 5]}, 30),
        ({"dtype": "F8_E8M0", "shape": [7]}, 7),
        ({"dtype": "F4", "shape": [3]}, 2),
        ({"dtype": "I64", "shape": []}, 8),
        ({"dtype": "F32", "shape": [0, 9]}, 0),
    ],
)
def test_bytes_of_a_tensor(tensor, size):
    assert tensor_bytes(tensor, "t") == size


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "BF16", "shape": [-1]},
        {"dtype": "BF16", "shape": [1.5]},
        {"dtype": "BF16", "shape": [True]},
        {"dtype": "BF16", "shape": ["4"]},
        {"dtype": "BF16", "shape": [float("inf")]},
        {"dtype": "BF16", "shape": [2**40, 2**40]},
        {"dtype": "BF16", "shape": [1] * 20},
        {"dtype": "BF16", "shape": 4},
        {"dtype": "BF16"},
        {"dtype": "Q4", "shape": [4]},
        {"dtype": ["BF16"], "shape": [4]},
        [],
        None,
    ],
)
def test_a_hostile_tensor_is_one_line(tensor):
    with pytest.raises(BadInput, match="no usable dtype and shape") as caught:
        tensor_bytes(tensor, "t")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offsets", [[0, 7], [-8, 0], [8, 0], [0], None, [0.0, 8.0], [0, 2**70]])
def test_offsets_that_do_not_fit_are_one_line(tmp_path, offsets):
    text = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(BadInput, match="do not fit its 8 bytes"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"t": NaN', b"\xff\xfe{}", b"[]", b'{"t": ' + b"9" * 5000]
)
def test_a_header_that_is_no_json_object_is_one_line(tmp_path, text):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BadInput, match="its safetensors header"):
        read_header(tmp_path / "a.safetensors")


def test_adapters_and_second_copies_are_left_aside(tmp_path):
    write(tmp_path / "model.safetensors", {"a": ("BF16", [4], 8)})
    write(tmp_path / "consolidated.safetensors", {"b": ("BF16", [4], 8)})
    write(tmp_path / "adapter_model.safetensors", {"c": ("BF16", [4], 8)})
    assert set(checkpoint_headers(tmp_path)) == {"a"}


def test_the_index_says_which_files_count(tmp_path):
    write(tmp_path / "model-1.safetensors", {"a": ("BF16", [4], 8)})
    write(tmp_path / "model-2.safetensors", {"b": ("BF16", [4], 8)})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert set(checkpoint_headers(tmp_path)) == {"a"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", ".hidden"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadInput, match="is no file of its folder"):
        checkpoint_headers(tmp_path)


def test_ninety_thousand_tensors_take_little_work(tmp_path):
    write(
        tmp_path / "model.safetensors",
        {f"model.layers.{n // 1000}.mlp.experts.{n % 1000}.up_proj.weight": ("F8_E4M3", [4, 4], 16)
         for n in range(90_000)},
    )  # fmt: skip
    begin = time.process_time()
    assert len(checkpoint_headers(tmp_path)) == 90_000
    assert time.process_time() - begin < 1.5  # seconds of this process alone, whatever else runs


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        (".*self_attn.*", "model.layers.0.self_attn.q_proj", True),
        (r".*\.(?:1[0-5])\..*", "model.layers.12.mlp.up_proj", True),
        (r".*\.(?:1[0-5])\..*", "model.layers.2.mlp.up_proj", False),
        ("^(?!.*experts).*proj$", "mlp.experts.0.up_proj", False),
        ("^(?!.*experts).*proj$", "mlp.up_proj", True),
        ("down_proj", "mlp.down_proj", False),
        (r"layers\.\d{1,2}\.a", "layers.31.a", True),
        (r"[^a-f]+\b", "xyz.a", True),
        ("(a+)+$", "a" * 60 + "b", False),
        ("(a|aa)*(b|bb)*c", "a" * 100 + "b" * 100, False),
    ],
)
def test_patterns_match_as_python_does_and_in_bounded_time(pattern, name, found):
    assert matches(pattern, name) is found


@pytest.mark.parametrize("pattern", ["(", "a{3,1}", "[z-a]", "(?P<x>m)(?P=x)", "x" * 3000])
def test_a_broken_pattern_is_one_line(pattern):
    with pytest.raises(BadInput, match="pattern") as caught:
        matches(pattern, "model.layers.0")
    assert "\n" not in str(caught.value)
