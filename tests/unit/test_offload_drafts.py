"""Tests vllm_plugins/offload_drafts: which layers of a draft model stay on the card, which engines fail."""

import ast
import hashlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "vllm_plugins/offload_drafts/src/vllm_offload_drafts/__init__.py"
spec = importlib.util.spec_from_file_location("vllm_offload_drafts", SOURCE)
assert spec
assert spec.loader
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)


def offloader():
    """A stand-in for vLLM's offloaders: it marks each layer that it was given."""

    class PrefetchOffloader:
        def wrap_modules(self, modules_generator, prefix=""):
            return [f"streamed {module}" for module in modules_generator]

    plugin.keep_later_models(PrefetchOffloader)
    return PrefetchOffloader


def test_the_layers_of_a_second_model_stay_as_they_are():
    one = offloader()()
    assert one.wrap_modules(iter(["t0", "t1"])) == ["streamed t0", "streamed t1"]
    assert one.wrap_modules(iter(["d0"])) == ["d0"]
    assert one.wrap_modules(iter(["d1"])) == ["d1"]


def test_a_tower_of_the_first_model_is_offloaded_too():
    one = offloader()()
    assert one.wrap_modules(iter(["v0"]), prefix="vision_tower") == ["streamed v0"]
    assert one.wrap_modules(iter(["t0"])) == ["streamed t0"]


def test_another_worker_begins_anew():
    kind = offloader()
    kind().wrap_modules(iter(["t0"]))
    assert kind().wrap_modules(iter(["t0"])) == ["streamed t0"]


def test_a_second_registration_changes_nothing():
    kind = offloader()
    once = kind.wrap_modules
    plugin.keep_later_models(kind)
    assert kind.wrap_modules is once


def test_an_engine_whose_source_was_not_read_is_refused_by_name():
    class UVAOffloader:
        def wrap_modules(self, modules_generator, prefix=""):
            return list(modules_generator)

    with pytest.raises(
        RuntimeError,
        match=r"UVAOffloader\.wrap_modules has source [0-9a-f]{12}, known are those of vLLM 0\.32\.0",
    ):
        plugin.refuse_unknown(UVAOffloader)


@pytest.mark.engine
@pytest.mark.parametrize(("file", "name"), [("prefetch.py", "PrefetchOffloader"), ("uva.py", "UVAOffloader")])
def test_the_locked_engine_is_the_one_that_was_read(file, name, demo_root):
    [path] = (demo_root / "current/env/lib").glob(
        f"python3.*/site-packages/vllm/model_executor/offloader/{file}"
    )
    text = path.read_text()
    kind = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    method = next(n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "wrap_modules")
    source = "".join(text.splitlines(keepends=True)[method.lineno - 1 : method.end_lineno])
    assert hashlib.sha256(source.encode()).hexdigest() in plugin.KNOWN_SOURCES[name]
