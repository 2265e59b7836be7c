"""`lowmem calibrate`: a site's constants from receipts, and the plans that take them."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lowmem.artefacts import read
from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.measure import calibrate
from lowmem.measure.calibrate import knobs_of
from lowmem.plan.calibration import calibrated, constant, read_calibration
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import SiteConstant

RECEIPTS = Path(__file__).parents[2] / "docs" / "measurements"
H200 = RECEIPTS / "2026-11-26-4xh200"
LOW_MEM, EXTREME = H200 / "low_mem.json", H200 / "extreme.json"
NOW = "2026-12-01T00:00:00Z"


def lowmem(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The constants of four runs on H200."""
    path = tmp_path_factory.mktemp("site") / "site.yml"
    first = RECEIPTS / "2026-11-23-2xh200" / "low_latency.json"
    done = lowmem("calibrate", LOW_MEM, EXTREME, H200 / "plain.json", first, "--out", path)
    assert done.exit_code == 0, done.output
    return path


def test_the_file_says_what_was_measured_and_where_from(site):
    found = read_calibration(site)
    assert (found.device, found.vllm_version, len(found.receipts)) == ("h200", "0.32.0", 4)
    marlin = found.constants["latency.hbm_efficiency.marlin"]
    assert 0.4 < marlin.value < 0.9
    assert marlin.before == constant("latency", "hbm_efficiency")["marlin"]
    assert "low_latency.json, low_mem.json, plain.json" in marlin.source


def errors(path, constants):
    """The logarithmic error of decode step and token of each load of a receipt."""
    receipt = read(path)
    for run, result in zip(calibrate.runs_of(path.name, receipt), receipt.loads, strict=True):
        plan = run.plan(constants)
        yield abs(math.log(plan.latency_ms.terms["steady_step"] / result.itl_ms.p50))
        yield abs(math.log(plan.latency_ms.decode_expected / result.tpot_ms.mean))


def test_half_of_the_receipts_predicts_the_other_half_no_worse():
    every = [
        path
        for folder in ("2026-11-23-2xh200", "2026-11-26-4xh200")
        for path in sorted((RECEIPTS / folder).glob("*.json"))
        if '"argv"' in path.read_text() and read(path).loads
    ]
    half, other = every[::2], every[1::2]
    constants = calibrate.calibrate(half, NOW).constants
    before = statistics.mean(e for path in other for e in errors(path, {}))
    after = statistics.mean(e for path in other for e in errors(path, constants))
    assert after <= before
    assert after < 0.06


def test_a_constant_that_one_receipt_asks_for_is_found_again():
    """A receipt whose steps take as long as a plan with another efficiency gives that efficiency."""
    (run,) = calibrate.runs_of("extreme.json", read(EXTREME))
    name = "latency.hbm_efficiency.humming"
    target = next(t for t in calibrate.TARGETS if t.name(run) == name)
    wanted = SiteConstant(value=0.3, before=0.386, source="")
    slow = replace(run, step_ms=run.plan({name: wanted}).latency_ms.terms["steady_step"])
    assert calibrate.fitted(name, target, [slow], {}).value == pytest.approx(0.3, rel=0.01)


def test_a_plan_takes_the_constants_and_says_so(site):
    words = ("plan", "--device", "h200", "--set", "linear_backend=marlin", "--json")
    plain, own = lowmem(*words), lowmem(*words, "--calibration", site)
    before, after = json.loads(plain.stdout), json.loads(own.stdout)
    ratio = after["latency_ms"]["terms"]["steady_step"] / before["latency_ms"]["terms"]["steady_step"]
    assert 0.7 < ratio < 1.4
    assert ratio != 1
    assert before["calibration"] is None
    assert after["calibration"] == json.loads(read_calibration(site).model_dump_json())
    text = lowmem("plan", "--device", "h200", "--calibration", site).stdout
    assert "constants measured on h200, from 4 receipts: latency" in " ".join(text.split())


def test_constants_of_one_plan_do_not_reach_the_next(site):
    value = constant("latency", "hbm_efficiency")["marlin"]
    with calibrated(read_calibration(site), "h200"):
        assert constant("latency", "hbm_efficiency")["marlin@h200"] != value
    assert "marlin@h200" not in constant("latency", "hbm_efficiency")


def test_constants_of_other_cards_are_refused(site):
    with pytest.raises(BadInput, match=r"^calibration: its constants were measured on h200, .* a100-40g"):
        make_plan(PlanRequest("low_mem", calibration=read_calibration(site)))


def changed(name, constant_):
    """Return what writes the site's file with one constant more or other."""

    def write(site):
        data = yaml.safe_load(site.read_text())
        data["constants"][name] = constant_
        return yaml.safe_dump(data)

    return write


def worth(value):
    return {"value": value, "before": 1, "source": ""}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda _: "[1]", "holds no mapping; write it with `lowmem calibrate`"),
        (lambda _: "a: [", "is not YAML"),
        (lambda _: "device: h200\n", "created_utc: Field required"),
        (lambda s: s.read_text() + "more: 1\n", "more: Extra inputs are not permitted"),
        (changed("latency.nix", worth(1)), "'latency.nix' is no"),
        (changed("memory", worth(1)), "'memory' is no constant"),
        (changed("latency.interference_share", worth(0)), "interference_share is 0"),
        (changed("latency.interference_share", worth(-1)), "greater than or"),
        (changed("latency.interference_share", 3), "constants.latency.interference_share"),
        (lambda s: s.read_text().replace("value: ", "value: .nan #", 1), "not a finite number"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(site, tmp_path, text, said):
    path = tmp_path / "bad.yml"
    path.write_text(text(site))
    done = lowmem("plan", "--device", "h200", "--calibration", path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give receipts of `lowmem measure`, or --plan"),
        (["--url", "http://127.0.0.1:8000"], "--url needs --plan"),
        ([RECEIPTS / "2026-11-26-two-replicas-cpu" / "one.json"], "one.json is of a CPU"),
        ([H200 / "README.md"], "README.md"),
        ([LOW_MEM, RECEIPTS / "2026-11-23-1xh100" / "ll-enforce_eager.json"], "several devices (h100, h200)"),
        ([RECEIPTS / "2026-11-23-2xh200" / "extreme-capped-refused.json"], "holds no load"),
        (["/nowhere.json"], "/nowhere.json: No such file or directory"),
        ([LOW_MEM, "--out", "/dev/null"], "/dev/null is not a regular file"),
        ([LOW_MEM, "--model", "nix"], "model 'nix' is no built-in card"),
    ],
)
def test_wrong_receipts_are_one_line(tmp_path, words, said):
    out = [] if "--out" in words else ["--out", tmp_path / "site.yml"]
    done = lowmem("calibrate", *words, *out)
    assert done.exit_code == 1, done.output
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "site.yml").exists()


def test_a_damaged_receipt_is_one_line(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(LOW_MEM.read_text()[:5000])
    with pytest.raises(BadInput, match=r"cut\.json"):
        calibrate.calibrate([path], NOW)
    receipt = json.loads(EXTREME.read_text())
    receipt["hardware"]["gpu_total_mib"] = "many"
    path.write_text(json.dumps(receipt))
    with pytest.raises(BadInput, match="gpu_total_mib is 'many'; it must be MiB in digits"):
        calibrate.calibrate([path], NOW)


def test_arguments_of_a_server_are_read_as_knobs():
    argv = "vllm serve m --port 8000 --tensor-parallel-size=2 --max-num-seqs 8 --no-enable-prefix-caching"
    argv += (
        " --enforce-eager --gpu-memory-utilization 0.4 --kv-cache-memory-bytes 1 --gpu-memory-utilization=0.1"
    )
    assert calibrate.knobs_of(argv.split()) == {
        "tensor_parallel_size": "2", "max_num_seqs": "8", "enable_prefix_caching": False,
        "enforce_eager": True, "kv_cache_memory_bytes": "1",
    }  # fmt: skip


def test_what_the_deployment_sets_is_no_knob_of_a_receipt():
    """Each receipt of a deployed service has --served-model-name, for which all of them were refused."""
    argv = ["vllm", "serve", "/m", "--served-model-name", "chat", "--port", "8000", "--max-num-seqs", "8"]
    assert knobs_of(argv) == {"max_num_seqs": "8"}


def test_without_receipts_this_host_is_measured(tmp_path, monkeypatch):
    """One client and the plan's clients, on the running service; the receipt lies beside the file."""
    receipt, asked = read(EXTREME), []
    (tmp_path / "plan.json").write_text(receipt.plan.model_dump_json())

    def run(options):
        asked.append(options)
        options.out.write_text(EXTREME.read_text())
        return receipt

    monkeypatch.setattr("lowmem.measure.session.run", run)
    out = tmp_path / "site.yml"
    done = lowmem("calibrate", "--plan", tmp_path / "plan.json", "--url", "http://127.0.0.1:1", "--out", out)
    assert done.exit_code == 0, done.output
    assert [load.clients for load in asked[0].loads] == [1, 6]
    assert (asked[0].url, asked[0].out) == ("http://127.0.0.1:1", tmp_path / "site.receipt.json")
    assert read_calibration(out).device == "h200"
