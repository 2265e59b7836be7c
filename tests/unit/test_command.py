"""Commands as people paste them: what is read, what is named, and that nothing is run."""

import time
from pathlib import Path

import pytest
import yaml

from lowmem.errors import BadInput
from lowmem.inputs.pasted import read_text, read_words
from lowmem.inputs.shell import commands

COMMANDS = yaml.safe_load((Path(__file__).parents[1] / "data" / "commands.yml").read_text())


@pytest.mark.parametrize("case", COMMANDS, ids=lambda c: c["text"].strip()[:60])
def test_commands_that_people_run(case):
    found = read_text(case["text"])
    assert found.faults == []
    assert found.model == case["model"]
    assert found.options == case.get("options", {})
    assert found.cards == case.get("cards")
    assert [line.split(":")[0] for line in found.removed] == case.get("removed", [])
    assert all("; use " in line or "; leave it out" in line for line in found.removed)


def test_there_are_forty_of_them():
    assert len(COMMANDS) >= 40


def test_words_that_a_shell_split():
    found = read_words(["vllm", "serve", "m", "--hf-overrides", '{"a": 1}', "-tp", "2"])
    assert (found.model, found.options) == ("m", {"hf_overrides": '{"a":1}', "tensor_parallel_size": 2})
    assert read_words(["vllm serve m -tp 2"]).options == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("vllm serve m --max-num-seq 4", None),  # argparse takes an abbreviation of one flag
        ("vllm serve m --max-num-sequences 4", "--max-num-sequences is no flag of vLLM 0.32.0; did you me"),
        ("vllm serve m --max-lo 4", "--max-lo is no flag of vLLM 0.32.0"),
        ("vllm serve m --tensor-parallel-size two", "tensor_parallel_size='two' is not a whole number; co"),
        ("vllm serve m --tensor-parallel-size", "--tensor-parallel-size has no value; give one"),
        ("vllm serve m --tensor-parallel-size --dtype half", "--tensor-parallel-size has no value; give one"),
        ("vllm serve m -tp $N", "--tensor-parallel-size is N, which nothing here sets; write its value"),
        ("vllm serve m -tp $(nvidia-smi -L | wc -l)", "--tensor-parallel-size is $(nvidia-smi -L | wc -l)"),
        ("vllm serve m -tp `nproc`", "--tensor-parallel-size is `nproc`, which nothing here sets"),
        ("vllm serve ${MODEL}", "the model is MODEL, which nothing here sets"),
        ("vllm serve ${M[0]}", "the model is ${M[0]}, which nothing here sets"),
        ("M=a; vllm serve ${M//a/b}", "the model is ${M//a/b}, which nothing here sets"),
        ("VLLM_X='a\nb' vllm serve m", "VLLM_X is not one line of printable characters; correct it"),
        ("vllm serve m -tp2", "-tp2 is no flag of vLLM 0.32.0; write -tp 2"),
        ("vllm serve $1", "the model is $1, which nothing here sets"),
        ("vllm serve 'a\nb'", "the model 'a\\nb' is not one line of printable characters"),
        ("vllm serve m n", "'n' stands alone; vLLM takes one model, m"),
        ("vllm serve m \u2014tensor-parallel-size 2", "begins with a typographic dash; write --"),
        ("vllm serve m --kv-transfer-config {\"a\":1}", "is not JSON, such as {\"name\": 1}; correct it;"),
        ("vllm serve m --enable-lora yes", "'yes' stands alone"),
        ("vllm serve m --enable-lora=yes", "--enable-lora takes no value, and 'yes' is given; leave it out"),
        ("vllm serve m --config", "--config has no value; give one"),
        ("vllm serve m --tool-call-parser", "--tool-call-parser has no value"),
        ("vllm serve m --spec-method ngram --speculative-config '{}'", "vLLM takes one of them"),
        ("vllm serve m -O --dtype half", "-O takes a level from 0 to 3; give one"),
        ("docker run --gpus x=1 vllm/vllm-openai --model m", "--gpus x=1 is not read here"),
        ("vllm serve m\n  --dtype half", "--dtype stands on a line of its own, which the shell does not"),
        ("vllm serve m \\\n# two cards\n-tp 2", "-tp stands on a line of its own"),
        ("vllm serve m --max-model-len 1_000k", "max_model_len='1_000k' is not a whole number"),
    ],
)  # fmt: skip
def test_faults_of_a_command(text, fault):
    found = read_text(text).faults
    assert found == [] if fault is None else fault in found[0]
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("vllm serve m --host 0.0.0.0", "--host 0.0.0.0 is the deployment's, not the plan's; use lowmem_h"),
        ("vllm serve m --port=80", "--port 80 is the deployment's, not the plan's; use lowmem_port of the"),
        ("vllm serve m --api-key sk-secret", "--api-key is the deployment's, not the plan's; use vllm_ser"),
        ("HF_TOKEN=hf_secret vllm serve m", "HF_TOKEN is not part of the plan"),
        ("docker run -e HF_TOKEN=hf_secret vllm/vllm-openai:v0.9.1 --model m", "HF_TOKEN is not part of t"),
        ("docker run vllm/vllm-openai:v0.9.1 --model m", "the image has vLLM 0.9.1; the plan is for 0.32.0"),
        ("vllm serve m --enable-lora false", "--enable-lora takes no value in vLLM 0.32.0; write --no-ena"),
        ("vllm serve m --dtype half --dtype float16", "--dtype is given twice; vLLM takes the last, float16"),
        (f"vllm serve m --config {'c' * 9_000}", f"--config {'c' * 60} is no file here, so the plan is wi"),
        ("vllm serve m --config c.yaml", "--config c.yaml is no file here, so the plan is without its opt"),
    ],
)  # fmt: skip
def test_notes_of_a_command(text, note):
    found = read_text(text)
    assert note in found.notes[0]
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the text starts no `vllm serve`"),
        ("ls -l", "the text starts no `vllm serve`"),
        ("vllm bench serve", "`vllm bench` starts no server"),
        ("vllm", "`vllm` starts no server"),
        ("python -m vllm.entrypoints.api_server", "starts no OpenAI server"),
        ("vllm serve 'm", "a quote (') of the command does not end; close it"),
        ("vllm serve \u201cm\u201d", "has the typographic quote"),
        ("vllm serve m $(echo", "a bracket of $( does not end"),
        ("cat <<EOF\nvllm serve m\nEOF", "has a here-document"),
        ("vllm serve a; vllm serve b", "the text starts 2 servers; paste the command of one"),
        ("vllm serve m\0", "holds a NUL character"),
        ("bash -c " * 9 + "x", "the text starts no `vllm serve`"),
        ("docker run --frobnicate vllm/vllm-openai", "--frobnicate of the container is not known here"),
        ("docker run --gpus all", "the container's image is missing"),
        ("vllm serve " + "x" * 70_000, "the limit is 65,536"),
        ("vllm serve " + "x " * 3_000, "has more than 2,000 words"),
        ("services: {a: {image: vllm/vllm-openai, command: [[", "the YAML text is not YAML"),
        ("services:\n  a: {image: redis}\n", "the text starts no `vllm serve`"),
        ("containers: [{image: vllm, args: [{a: 1}]}]", "a word of the YAML text is a mapping"),
        ("containers: [{image: vllm, args: [[a]]}]", "a word of the YAML text is a list"),
        ("[Container]\nImage=\nExec=a", "the text starts no `vllm serve`"),
    ],
)
def test_texts_that_start_no_server(text, error):
    with pytest.raises(BadInput) as raised:
        read_text(text)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve m $(touch /tmp/lowmem-was-run)",
        "vllm serve `touch /tmp/lowmem-was-run`",
        "vllm serve m; touch /tmp/lowmem-was-run",
        "vllm serve m --dtype \"$(touch /tmp/lowmem-was-run)\" > /tmp/lowmem-was-run",
        "env X=1 bash -c 'touch /tmp/lowmem-was-run; vllm serve m'",
    ],
)  # fmt: skip
def test_nothing_is_run(text):
    assert read_text(text)
    assert not Path("/tmp/lowmem-was-run").exists()


@pytest.mark.parametrize(
    "text",
    ["$(" * 30_000, "((" * 30_000, "\\" * 65_000, "${a" * 20_000, "'" * 65_001, "A=$A" * 15_000,
     "--" * 30_000,
     "\n" * 60_000 + "x", "services: " + "[" * 30_000, "services: {a: &a [*a]}",
     "A=(" * 9_000 + ")" * 9_000, "`\n" * 30_000,
     "export A=aaaaaaaa\n" + "A=$A$A\n" * 64, "args: [" + "a, " * 15_000 + "]"],
    ids=range(14),
)  # fmt: skip
def test_hostile_texts_are_refused_at_once(text):
    started = time.process_time()
    with pytest.raises(BadInput):
        read_text(text)
    assert time.process_time() - started < 5  # the slowest takes 0.2 s; what is quadratic takes minutes


@pytest.mark.parametrize(
    "text",
    ["--a-b " * 1_900, "--" + "a_" * 30_000, "m --hf-overrides " + "[" * 60_000,
     "--hf-overrides.a.b 1 " * 900,
     "--hf-overrides." + "a." * 3_000 + " 1", "-" * 60_000],
    ids=range(6),
)  # fmt: skip
def test_hostile_arguments_are_read_at_once(text):
    started = time.process_time()
    found = read_text(f"vllm serve {text}")
    assert time.process_time() - started < 5
    assert all(len(line) < 400 for line in found.faults)


@pytest.mark.parametrize(
    ("text", "model", "given"),
    [
        ("M=a\nX=(-tp 2 --seed '1')\nvllm serve $M \"${X[@]}\"", "a", {"tensor_parallel_size": 2, "seed": 1}),
        ("T=${T:-4}\nexec vllm serve ${1:-a} -tp \"$T\" \"$@\"", "a", {"tensor_parallel_size": 4}),
        ("A='-tp 2'; vllm serve a $A", "a", {"tensor_parallel_size": 2}),
        ("vllm serve a ^\n -tp 2", "a", {"tensor_parallel_size": 2}),
        ("tmux new-session -d -s vllm 'vllm serve a -tp 2'", "a", {"tensor_parallel_size": 2}),
        ("screen -dmS vllm vllm serve a -tp 2", "a", {"tensor_parallel_size": 2}),
        ("kubectl run x --image=vllm/vllm-openai -- --model a", "a", {}),
        ('FROM x\nENTRYPOINT ["vllm", "serve"]\nCMD ["a", "-tp", "2"]', "a", {"tensor_parallel_size": 2}),
        ("if true; then vllm serve a; fi", "a", {}),
        ("FROM x\nCMD vllm serve a \\\n --seed 1", "a", {"seed": 1}),
        ('{"spec":{"containers":[{"image":"vllm/x","args":["a","--seed","1"]}]}}', "a", {"seed": 1}),
        ("A=()\nA+=(--seed 1)\nB=a\nB+=b\nvllm serve $B \"${A[@]}\"", "ab", {"seed": 1}),
        ("A=()\nvllm serve a \"${A[@]}\"", "a", {}),
        ("apptainer exec --nv -e -C -H /tmp:/h -B /d vllm.sif vllm serve a", "a", {}),
        ("docker run --memory-reservation 4g --dns-search x -e A=1 vllm/vllm-openai --model a", "a", {}),
        ("docker exec -it box vllm serve a", "a", {}),
        ("sudo -E -u llm CUDA_VISIBLE_DEVICES=0 /opt/bin/vllm serve a", "a", {}),
        ("args:\n- --model\n- a\n- -tp\n- 2", "a", {"tensor_parallel_size": 2}),
        ('["--model", "a"]', "a", {}),
        ("vllm --version\nvllm serve a & sleep 9; vllm bench serve --model a", "a", {}),
        ("command -v vllm && vllm serve a", "a", {}),
        ("python -m vllm.entrypoints.openai.run_batch -i x; vllm serve a", "a", {}),
        ("uvx vllm@0.11.0 serve a", "a", {}),
        ("ssh gpu1 'vllm serve a -tp 2'", "a", {"tensor_parallel_size": 2}),
        ("accelerate launch vllm serve a", "a", {}),
        ("torchrun --nproc-per-node 2 -m vllm.entrypoints.openai.api_server --model a", "a", {}),
        ("docker compose run --rm llm vllm serve a", "a", {}),
        ("until vllm serve a; do sleep 1; done", "a", {}),
        ("root@gpu:~# vllm serve a \\\n> -tp 2", "a", {"tensor_parallel_size": 2}),
        ("(base) me@host:~/x y$ vllm serve a -tp 2", "a", {"tensor_parallel_size": 2}),
        ("[me@host dir]$ vllm serve a", "a", {}),
        ("PS C:\\Users\\me> vllm serve a `\n -tp 2", "a", {"tensor_parallel_size": 2}),
        ("!vllm serve a", "a", {}),
        ("vllm serve a --hf-overrides $'{\"a\":1}'", "a", {"hf_overrides": '{"a":1}'}),
        ("image: {repository: vllm/x, command: [vllm, serve, a, --seed, 2]}", "a", {"seed": 2}),
        (
            "x-base: &b {image: vllm/vllm-openai}\nservices:\n  a:\n    <<: *b\n    command: --model a",
            "a",
            {},
        ),
        (
            "modelSpec:\n- modelURL: a\n  vllmConfig: {maxModelLen: 8192, enableChunkedPrefill: false,"
            " dtype: half, v1: 1, extraArgs: [--seed, '1']}",
            "a",
            {"max_model_len": 8192, "enable_chunked_prefill": False, "dtype": "half", "seed": 1},
        ),
        ("vllm serve a \\\n > out.log", "a", {}),
        ("vllm serve a --max-model-len 32_768", "a", {"max_model_len": 32768}),
    ],
)  # fmt: skip
def test_other_ways_to_start_it(text, model, given):
    found = read_text(text)
    assert (found.model, found.options, found.faults) == (model, given, [])


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ('$env:CUDA_VISIBLE_DEVICES = "0,1"\nvllm serve a', 2),
        ("set CUDA_VISIBLE_DEVICES=0,1\nvllm serve a", 2),
        ("set -gx CUDA_VISIBLE_DEVICES 0,1,2; vllm serve a", 3),
        ("export CUDA_VISIBLE_DEVICES=0\nexport CUDA_VISIBLE_DEVICES=0,1\nvllm serve a", 2),
        ("setenv CUDA_VISIBLE_DEVICES 3\nvllm serve a", 1),
        ("CUDA_VISIBLE_DEVICES=0,1\nvllm serve a", None),  # not exported
        ("CUDA_VISIBLE_DEVICES=0 python x.py\ndocker run --gpus 1 redis\nvllm serve a", None),
        ('[Service]\nEnvironment="CUDA_VISIBLE_DEVICES=0,1" X=1\nExecStart=-/bin/vllm serve a', 2),
        ("[Container]\nImage=vllm/vllm-openai\nAddDevice=nvidia.com/gpu=0\nExec=--model a", 1),
        ("services: {a: {image: vllm/vllm-openai, command: --model a, gpus: 2}}", 2),
        ("services: {a: {image: vllm/vllm-openai, command: --model a, gpus: [{count: 3}]}}", 3),
        ("services: {a: {image: vllm/vllm-openai, command: --model a, gpus: all, deploy: 5}}", None),
        ("image: {repository: vllm/x}\nargs: [--model, a]\nresources: {limits: {nvidia.com/gpu: 2}}", 2),
        ("modelSpec: [{modelURL: a, requestGPU: 2}]", 2),
        ('FROM x\nENV A=1 CUDA_VISIBLE_DEVICES=0,1\nCMD ["vllm", "serve", "a"]', 2),
        ("FROM x\nENV CUDA_VISIBLE_DEVICES 0,1\nENTRYPOINT vllm serve a", 2),
        ("[Container]\nImage=vllm/vllm-openai\nPodmanArgs=--gpus 2\nExec=--model a", 2),
    ],
)
def test_cards_that_a_command_leaves_the_engine(text, cards):
    found = read_text(text)
    assert (found.model, found.options, found.cards, found.faults) == ("a", {}, cards, [])


def test_a_unit_of_systemd():
    found = read_text(
        "[Unit]\nAfter=network.target\n[Service]\nEnvironment=M=a VLLM_USE_V1=0\n"
        "Environment=VLLM_LOGGING_LEVEL=INFO\nEnvironmentFile=-/etc/x\n; no\nExecStart=\n"
        "ExecStart=/bin/python -m vllm.entrypoints.openai.api_server --model ${M} \\\n# no\n  -tp 2\n"
    )
    assert (found.model, found.options, found.faults) == ("a", {"tensor_parallel_size": 2}, [])
    assert found.environment == {"VLLM_LOGGING_LEVEL": "INFO"}
    assert [line.partition(":")[0] for line in found.removed] == ["VLLM_USE_V1"]
    assert "EnvironmentFile -/etc/x is not read; name its VLLM_ variables here" in found.notes


def test_a_removed_switch_may_have_a_value():
    found = read_text("vllm serve a --multi-step-stream-outputs False --use-v2-block-manager m")
    assert found.faults == ["'m' stands alone; vLLM takes one model, a"]


@pytest.mark.parametrize(
    ("text", "given", "removed"),
    [
        (
            "--limit-mm-per-prompt image=5,video=1",
            {"limit_mm_per_prompt": '{"image":5,"video":1}'},
            ['--limit-mm-per-prompt image=5,video=1: vLLM 0.32.0 takes JSON; use \'{"image":5,"video":1}\''],
        ),
        (
            "-O.cudagraph_mode=FULL -O.level 3",
            {"compilation_config": '{"cudagraph_mode":"FULL"}'},
            [
                "-O with a configuration: vLLM 0.32.0 has it no longer; use -cc.cudagraph_mode",
                "-O with a configuration: vLLM 0.32.0 has it no longer; use -cc.level",
                "--compilation-config.level: vLLM 0.32.0 has it no longer; use mode",
            ],
        ),
        (
            "-O '{\"level\": 3}'",
            {},
            [
                "-O with a configuration: vLLM 0.32.0 has it no longer; use -cc",
                "--compilation-config.level: vLLM 0.32.0 has it no longer; use mode",
            ],
        ),
        (
            '-cc \'{"pass_config":{"enable_noop":true,"fuse_allreduce_rms":true}}\'',
            {"compilation_config": '{"pass_config":{"fuse_allreduce_rms":true}}'},
            [
                "--compilation-config.pass_config.enable_noop: vLLM 0.32.0 has it no longer; use"
                " pass_config.eliminate_noops"
            ],
        ),
        (
            '--kv-transfer-config \'{"kv_connector":"NixlConnector","kv_rank":0}\'',
            {"kv_transfer_config": '{"kv_connector":"NixlConnector"}'},
            [
                "--kv-transfer-config.kv_rank: vLLM 0.32.0 has it no longer; leave it out: kv_role and the"
                " connector's kv_connector_extra_config say it"
            ],
        ),
        ("-cc '{}'", {"compilation_config": "{}"}, []),
    ],
    ids=["pairs", "dotted", "all gone", "nested", "transfer", "empty"],
)
def test_old_forms_of_a_value(text, given, removed):
    found = read_text(f"vllm serve a {text}")
    assert (found.options, found.removed, found.faults) == (given, removed, [])


CONFIG = """
model: of-the-file
tensor-parallel-size: 2
max_model_len: 8k
enable-prefix-caching: false
trust-remote-code: true
disable-log-stats: false
cudagraph-capture-sizes: [1, 2]
compilation-config: {mode: 3}
swap-space: 4
"""


def test_code_of_a_checkpoint_is_left_out_and_said():
    found = read_text("vllm serve a --trust-remote-code -tp 2")
    assert (found.options, found.faults) == ({"tensor_parallel_size": 2}, [])
    assert found.notes == [
        "--trust-remote-code is left out: no code of a checkpoint is run on a host; a model type that vLLM"
        " knows needs none"
    ]


@pytest.mark.parametrize(("model", "form"), [("a", "--config {}"), ("a", "--config={}"), ("", "--config {}")])
def test_the_file_of_config_is_read_before_the_flags(tmp_path, model, form):
    (tmp_path / "c.yaml").write_text(CONFIG)
    found = read_text(f"vllm serve {model} --dtype half {form.format(tmp_path / 'c.yaml')} -tp 4")
    assert (found.model, found.faults) == (model or "of-the-file", [])
    assert found.options == {
        "tensor_parallel_size": 4, "max_model_len": 8000, "enable_prefix_caching": False,
        "cudagraph_capture_sizes": "1 2", "compilation_config": '{"mode":3}',
        "dtype": "half",
    }  # fmt: skip
    assert [line.partition(":")[0] for line in found.removed] == ["--swap-space"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[1]", "holds no options; write lines such as max-model-len: 4096"),
        (b"a: [", "is not YAML"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"a: &a [*a]", "holds a node that contains itself"),
        (b"frobnicate: 1", "--frobnicate is no flag of vLLM 0.32.0; leave it out"),
    ],
)
def test_faults_of_the_file_of_config(tmp_path, content, fault):
    (tmp_path / "c.yaml").write_bytes(content)
    assert fault in read_text(f"vllm serve a --config {tmp_path / 'c.yaml'}").faults[0]


def test_only_versions_of_vllm_are_compared():
    assert read_text("podman run x.io/vllm-cuda-rhel9:3.0.0 --model a").notes == []


def test_words_of_a_shell():
    text = "A='x y' B=z; c \"$A\" $A 'a'\"b\"\\ c # no\nd 2>/dev/null <in e &>f"
    words = [[w.text for w in command] for command in commands(text)]
    assert words == [["A=x y", "B=z"], ["c", "x y", "x", "y", "ab c"], ["d", "e"]]
