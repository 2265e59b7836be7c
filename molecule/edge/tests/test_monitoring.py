"""The real Prometheus and exporters beside the real engine: what is scraped, what the rules make of the plan,
and an alert that fires.
"""

import json
import time
from urllib.parse import quote

import pytest
from conftest import needs_minutes

testinfra_hosts = ["edge-one"]

GATEWAY = "/etc/systemd/system/vllm-gateway@main.service"
PLAN = "/opt/vllm-lowmem/etc/plan.json"
COMPLETION = """
set -a; . /opt/vllm-lowmem/etc/vllm.env; set +a
curl --silent --show-error --fail --max-time 120 http://127.0.0.1:8000/v1/completions \
  -H "Authorization: Bearer $VLLM_API_KEY" -H 'Content-Type: application/json' \
  -d '{"model": "SmolLM2-135M-Instruct", "prompt": "Hello", "max_tokens": 8, "ignore_eos": true}'
"""


@pytest.fixture(autouse=True)
def as_root(host):
    with host.sudo():
        yield


def api(host, path):
    answer = json.loads(
        host.check_output("curl --silent --show-error --max-time 30 http://127.0.0.1:9090/api/v1/%s", path)
    )
    assert answer["status"] == "success", answer
    return answer["data"]


def query(host, expression):
    return api(host, f"query?query={quote(expression)}")["result"]


def until(seen, longest_s, every_s=3):
    """The first answer that is not empty; the last one where the time is over."""
    end = time.monotonic() + longest_s
    while True:
        answer = seen()
        if answer or time.monotonic() > end:
            return answer
        time.sleep(every_s)


def serving(host):
    return (
        host.run(
            'timeout 600 sh -c \'until [ "$(systemctl is-active vllm@main.service)" = active ]; do sleep 1;'
            " done'"
        ).rc
        == 0
    )


def health(host):
    return {target["labels"]["job"]: target["health"] for target in api(host, "targets")["activeTargets"]}


def test_every_target_is_up(host):
    """Also after a reboot, where all of it starts by itself."""
    assert serving(host)
    wanted = {"vllm": "up", "node": "up", "prometheus": "up"}
    if host.file(GATEWAY).exists:
        wanted["gateway"] = "up"
    until(lambda: wanted.items() <= health(host).items(), 120)
    assert wanted.items() <= health(host).items(), health(host)


def test_the_gateways_certificate_is_watched(host):
    if not host.file(GATEWAY).exists:
        pytest.skip("role gateway has made no unit here")
    [sample] = until(lambda: query(host, "lowmem_certificate_not_after_timestamp_seconds"), 120)
    assert sample["metric"]["path"] == "/etc/vllm-gateway/main-tls/certificate.pem"
    assert float(sample["value"][1]) > time.time()


def test_every_rule_is_evaluated(host):
    def rules():
        return [rule for group in api(host, "rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] == "ok" for rule in rules()), 120)
    assert [(rule["name"], rule.get("lastError")) for rule in rules() if rule["health"] != "ok"] == []
    assert {"EngineDown", "TpotOverLimit", "XidError", "CertificateEnds"} <= {
        rule["name"] for rule in rules()
    }


@pytest.mark.parametrize(
    ("series", "of_plan"),
    [
        ("lowmem:limit_tpot_p99_seconds", lambda plan: plan["limits"]["tpot_p99_ms"] / 1000),
        ("lowmem:limit_ttft_p99_seconds", lambda plan: plan["limits"]["ttft_p99_ms"] / 1000),
        ("lowmem:limit_memory_bytes", lambda plan: plan["limits"]["memory_bytes"]),
        ("lowmem:planned_memory_bytes", lambda plan: plan["peak_bytes"]),
    ],
)
def test_limits_are_the_deployed_plans(host, series, of_plan):
    plan = json.loads(host.file(PLAN).content_string)
    [sample] = until(lambda: query(host, series), 60)
    assert (sample["metric"]["deployment"], float(sample["value"][1])) == ("main", of_plan(plan))


def test_what_the_engine_does_is_seen(host):
    assert serving(host)
    before = sum(
        float(sample["value"][1]) for sample in until(lambda: query(host, "vllm:generation_tokens_total"), 60)
    )
    host.check_output("bash -c %s", COMPLETION)
    [sample] = until(lambda: query(host, f"vllm:generation_tokens_total >= {before + 8}"), 60)
    assert sample["metric"]["deployment"] == "main"
    assert sample["metric"]["profile"] == "demo_cpu"


def test_the_unit_is_seen(host):
    assert serving(host)
    wanted = 'node_systemd_unit_state{name="vllm@main.service",state="active"} == 1'
    assert len(until(lambda: query(host, wanted), 60)) == 1
    assert (
        len(until(lambda: query(host, 'node_systemd_service_restart_total{name="vllm@main.service"}'), 60))
        == 1
    )


def test_the_host_is_read_in_its_sandbox(host):
    assert host.check_output("systemctl is-active vllm-host-metrics.timer") == "active"
    until(
        lambda: (
            "Result=success"
            in host.check_output("systemctl show vllm-host-metrics.service --property=Result")
        ),
        60,
    )
    said = host.check_output("systemctl show vllm-host-metrics.service --property=Result,ExecMainStatus")
    assert set(said.splitlines()) == {"Result=success", "ExecMainStatus=0"}
    assert (
        float(host.check_output("date +%s"))
        - host.file("/var/lib/prometheus/node-exporter/vllm_lowmem.prom").mtime.timestamp()
        < 180
    )
    [sample] = until(
        lambda: query(host, 'time() - node_textfile_mtime_seconds{file=~".*vllm_lowmem.prom"}'), 60
    )
    assert float(sample["value"][1]) < 180
    assert query(host, "node_textfile_scrape_error")[0]["value"][1] == "0"


def test_all_of_it_listens_on_loopback_only(host):
    listening = {
        line.split()[3]
        for line in host.check_output("ss --no-header --listening --tcp --numeric").splitlines()
    }
    assert {address for address in listening if address.endswith((":9090", ":9100"))} == {
        "127.0.0.1:9090",
        "127.0.0.1:9100",
    }


def test_what_is_kept_is_bounded(host):
    flags = api(host, "status/flags")
    assert (flags["storage.tsdb.retention.time"], flags["storage.tsdb.retention.size"]) == ("15d", "4GiB")


def firing(host):
    return {
        alert["labels"]["alertname"]: alert
        for alert in api(host, "alerts")["alerts"]
        if alert["state"] == "firing"
    }


@needs_minutes
def test_a_stopped_engine_raises_an_alert_and_a_started_one_ends_it(host):
    assert serving(host)
    try:
        host.check_output("systemctl stop vllm@main.service")
        alert = until(lambda: firing(host).get("EngineDown"), 240)
        assert alert["labels"]["deployment"] == "main"
        assert alert["annotations"]["runbook"] == "docs/runbooks/service-down.md"
    finally:
        host.check_output("systemctl start vllm@main.service")
    assert serving(host)
    until(lambda: "EngineDown" not in firing(host), 240)
    assert "EngineDown" not in firing(host)
