"""Every command that reads a file answers any file in one line: no traceback, no hang, no crash."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.artefacts import read, read_environment, read_plan
from lowmem.cli.measure import parse_clients
from lowmem.errors import BadInput
from lowmem.files import parse_json, read_json, read_json_object, read_yaml
from lowmem.inputs.profiles import load_profile
from lowmem.measure.receipt import read_checks
from lowmem.service.start_check import cores_of

from .command import ROOT, lowmem

ENDS_WITHIN_S = 60
"""Bounds a hang only: a call takes about a second on an idle machine."""


def bomb(levels: int) -> bytes:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


SHAPES = {
    "empty": b"",
    "blank": b" \n\n",
    "null": b"null",
    "list": b"[]",
    "list_of_lists": b"[[1], [2]]",
    "text": b'"text"',
    "number": b"7",
    "integer_of_5000_digits": b'{"name": ' + b"9" * 5000 + b"}",
    "yaml_integer_of_5000_digits": b"name: " + b"9" * 5000,
    "brackets": b"[" * 50_000,
    "closed_brackets": b"[" * 50_000 + b"]" * 50_000,
    "braces": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "dashes": b"- " * 50_000 + b"x",
    "bomb": bomb(10),
    "merge_bomb": b"a: &a {b: 1}\nc: {<<: [" + b"*a," * 50_000 + b"]}",
    "latin_1": "name: caf\xe9".encode("latin-1"),
    "utf_16": '{"name": 1}'.encode("utf-16"),
    "nul": b"\x00" * 100,
    "nan": b'{"device_count": NaN}',
    "infinity": b'{"device_count": -Infinity}',
    "too_large_a_float": b'{"device_count": 1e999}',
    "yaml_nan": b"device_count: .nan",
    "half_a_pair": b'{"name": "\\ud800"}',
    "escape_sequences": b'{"\\u001b[2J": "\\u202e"}',
    "cut_short": b'{"name": "low_mem", "limits": {',
    "python_tag": b"!!python/object/apply:os.system ['true']",
    "date": b"name: 2026-99-99",
    "key_that_is_a_map": b"? {a: 1}\n: 2",
    "recursive": b"&a [*a]",
    "nine_megabytes": b'{"name": "' + b"x" * (9 * 2**20) + b'"}',
    "document_type": b'<!DOCTYPE a [<!ENTITY b "c">]><testsuite>&b;</testsuite>',
    "time_that_is_none": b'<testsuite><testcase name="a" time="soon"/></testsuite>',
    "unclosed_quote": b"VLLM_API_KEY='abc",
}

SPECIAL = ("fifo", "zero", "directory", "absent", "loop", "unreadable_name")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in SHAPES.items():
        (folder / f"{name}.yml").write_bytes(content)
    os.mkfifo(folder / "fifo.yml")
    (folder / "zero.yml").symlink_to("/dev/zero")
    (folder / "directory.yml").mkdir()
    (folder / "loop.yml").symlink_to("loop.yml")
    return folder


def one_line(read_it, *words):
    """What it says in one line; a value is as good."""
    try:
        read_it(*words)
    except BadInput as error:
        return str(error)
    return ""


READERS = (read_json, read_json_object, read_yaml, read_plan, read, read_environment, read_checks)


@pytest.mark.parametrize("shape", [*SHAPES, *SPECIAL])
@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_every_reader_answers_every_shape(reader, shape, hostile):
    said = one_line(reader, hostile / f"{shape}.yml")
    if reader in (read_json_object, read_plan, read):
        assert f"{shape}.yml" in said or shape in ("escape_sequences", "nine_megabytes")
        assert said or shape == "escape_sequences"


@pytest.mark.parametrize("shape", [*SHAPES, *SPECIAL])
def test_a_profile_of_any_shape_is_refused(shape, hostile):
    with pytest.raises(BadInput, match=shape):
        load_profile(str(hostile / f"{shape}.yml"))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("fifo", "is not a regular file"),
        ("zero", "is not a regular file"),
        ("directory", "is not a regular file"),
        ("absent", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("integer_of_5000_digits", "holds an integer of 5000 digits; the limit is 20"),
        ("braces", "is nested deeper than 100 levels"),
        ("closed_brackets", "is nested deeper than 100 levels"),
        ("nan", "holds NaN, which is not a finite number"),
        ("too_large_a_float", "holds inf, which is not a finite number"),
        ("latin_1", "is not UTF-8 at byte 9"),
        ("nine_megabytes", "is larger than 8388608 bytes"),
    ],
)
def test_json_is_refused_by_the_limit_that_it_passes(shape, says, hostile):
    with pytest.raises(BadInput, match=says):
        read_json(hostile / f"{shape}.yml")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("bomb", "holds more than 100000 nodes"),
        ("closed_brackets", "is nested deeper than 100 levels"),
        ("dashes", "is nested deeper than 100 levels"),
        ("yaml_integer_of_5000_digits", "holds an integer of 5000 digits; the limit is 20"),
        ("yaml_nan", "holds nan, which is not a finite number"),
        ("python_tag", "is not YAML"),
    ],
)
def test_yaml_is_refused_by_the_limit_that_it_passes(shape, says, hostile):
    with pytest.raises(BadInput, match=says):
        read_yaml(hostile / f"{shape}.yml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_json_is_read_or_refused(value):
    one_line(parse_json, json.dumps(value), "it")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    path = tmp_path / "any.yml"
    path.write_bytes(content)
    for reader in (*READERS, lambda p: load_profile(str(p))):
        one_line(reader, path)


COMMANDS = {
    "plan": ("plan", "--profile", "{}"),
    "plan_device": ("plan", "--device", "{}"),
    "plan_calibration": ("plan", "--calibration", "{}"),
    "calibrate": ("calibrate", "{}", "--out", "/tmp/calibration.yml"),
    "explain": ("explain", "{}"),
    "receipt": ("receipt", "{}"),
    "checks": ("receipt", "tests/data/absent.json", "--checks", "{}"),
    "report": ("report", "{}"),
    "report_live": ("report", "--live", "--plan", "{}"),
    "fleet": ("fleet", "--qps", "1", "--receipt", "{}"),
    "doctor": ("doctor", "{}"),
    "top": ("top", "--plan", "{}", "--once"),
    "watch": ("watch", "--plan", "{}", "--env-file", "{}"),
    "ready": ("ready", "--plan", "{}", "--env-file", "{}"),
    "start_check": ("start-check", "--plan", "{}"),
    "measure": ("measure", "--plan", "{}", "--out", "/tmp/receipt.json", "--serve"),
    "gateway_health": ("gateway-health", "--plan", "{}", "--env-file", "{}", "--socket", "/nonexistent/s"),
}


ALL_SHAPES = """
import json, sys
from typer.testing import CliRunner
from lowmem.cli.main import app
words, files = json.loads(sys.argv[1])
for file in files:
    done = CliRunner().invoke(app, [word.replace("{}", file) for word in words])
    print(json.dumps([file, done.exit_code, done.stdout, done.stderr]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_every_shape_in_one_line(command, hostile):
    """One process a command: a crash and a hang are seen, and the command is imported once."""
    files = [str(hostile / f"{shape}.yml") for shape in (*SHAPES, *SPECIAL)]
    words = json.dumps([COMMANDS[command], files])
    done = subprocess.run(
        [sys.executable, "-c", ALL_SHAPES, words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=len(files) * ENDS_WITHIN_S,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer[0] for answer in answers] == files
    for file, code, printed, said in answers:
        assert (code, printed) == (1, ""), file
        assert said.startswith("lowmem: "), file
        assert len(said.splitlines()) == 1, file
        assert "a fault in lowmem itself" not in said, file


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("watch", "--plan", "p", "--env-file", "e", "--silence-s", "nan"),
            "--silence-s nan is not a number",
        ),
        (("top", "--every-s", "nan"), "Invalid value for '--every-s'"),
        (("top", "--window-s", "inf"), "--window-s inf is not a number"),
        (("fleet", "--qps", "inf"), "--qps inf is not a number"),
        (("frontier", "--memory-limit-gib", "nan"), "--memory-limit-gib nan is not a number"),
        (("plan", "--network-gb-per-s", "nan"), "--network-gb-per-s nan is not a number"),
        (("plan", "--input-tokens", "9" * 18), "--input-tokens 1e+18 is not a number"),
        (("plan", "--memory-limit", "9" * 5000), "--memory-limit: "),
        (("plan", "--model-path", "/m", "--port", "99999"), "port: "),
    ],
)
def test_an_odd_number_is_refused_in_one_line(words, says):
    done = lowmem(*words, timeout_s=ENDS_WITHIN_S)
    assert done.returncode == 1
    assert done.stderr.startswith(f"lowmem: {says}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["0", "8,-1", "9" * 5000, "100001", "nan", ""])
def test_an_odd_number_of_clients_is_refused(text):
    with pytest.raises(BadInput, match="--clients"):
        parse_clients(text)


def test_a_span_of_cores_is_never_longer_than_a_kernel_has_cores():
    assert cores_of("0-1|4,6") == {0, 1, 4, 6}
    assert len(cores_of("0-999999999")) == 8192
    assert cores_of("0-" + "9" * 5000) == cores_of("0-8191")


BROKEN = "import lowmem.cli.receipt as r; r.read = lambda path: [][1]; from lowmem.cli.main import app; app()"


def test_a_fault_of_the_program_is_one_line_with_a_place():
    def call(**more):
        words = [sys.executable, "-c", BROKEN, "receipt", "x"]
        return subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | more
        )

    done = call()
    assert done.returncode == 1
    assert done.stderr.startswith(
        "lowmem: a fault in lowmem itself, IndexError at <string>:1: list index out of range"
    )
    assert len(done.stderr.splitlines()) == 1
    assert call(LOWMEM_DEBUG="1").stderr.startswith("Traceback")
