"""The status page on a host: kept fresh by its timer, with the engine's own numbers, for those with a key;
and `lowmem top` there.
"""

import datetime as dt
import json
import re
import time

from conftest import KEYS, needs_minutes

testinfra_hosts = ["ansible://edge-one"]

ROOT = "/opt/vllm-lowmem"
FOLDER = "/var/lib/vllm-lowmem/status/main"
UNIT, TIMER = "vllm-status@main.service", "vllm-status@main.timer"
ALICE = f"alice:{KEYS['alice']}"
LOAD = """
set -a; . /opt/vllm-lowmem/etc/vllm.env; set +a
for request in 1 2 3; do
  curl --silent --show-error --fail --max-time 120 http://127.0.0.1:8000/v1/completions \
    -H "Authorization: Bearer $VLLM_API_KEY" -H 'Content-Type: application/json' \
    -d '{"model": "SmolLM2-135M-Instruct", "prompt": "Hello", "max_tokens": 24, "ignore_eos": true}'
done
"""


def fresh_page(host):
    """The unit is a oneshot: its start returns when the page is written."""
    host.check_output("systemctl start %s", UNIT)
    return host.file(f"{FOLDER}/index.html").content_string


def written(page):
    return dt.datetime.fromisoformat(re.search(r'Written <time datetime="([^"]+)"', page)[1])


def since_start(page):
    """(requests, tokens/s) of the row since the server started."""
    row = re.search(r'<th scope="row">since it started</th>(.*?)</tr>', page, re.DOTALL)[1]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
    return int(cells[0].replace(",", "")), float(cells[-1].replace(",", ""))


def metric(host, name):
    text = host.check_output("curl --silent --fail http://127.0.0.1:8000/metrics")
    return sum(
        float(value) for value in re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    )


def test_the_timer_writes_it_by_itself(host):
    shown = host.check_output("systemctl show %s --property=ActiveState,UnitFileState", TIMER).splitlines()
    assert sorted(shown) == ["ActiveState=active", "UnitFileState=enabled"]
    until = time.monotonic() + 200
    while not host.file(f"{FOLDER}/index.html").exists and time.monotonic() < until:
        time.sleep(2)
    first = written(host.file(f"{FOLDER}/index.html").content_string)
    while written(host.file(f"{FOLDER}/index.html").content_string) == first and time.monotonic() < until:
        time.sleep(2)
    second = written(host.file(f"{FOLDER}/index.html").content_string)
    assert second > first, host.run(
        "systemctl status %s %s; journalctl -u %s -n 30 --no-pager", TIMER, UNIT, UNIT
    ).stdout


def test_the_page_has_the_numbers_of_a_known_load(host):
    before = since_start(fresh_page(host))[0]
    host.check_output("bash -euc %s", LOAD)
    finished = metric(host, "vllm:request_success_total")
    page = fresh_page(host)
    # health checks may complete requests of their own meanwhile
    assert before + 3 <= finished <= since_start(page)[0] <= metric(host, "vllm:request_success_total")
    assert '<span class="pill good">serving</span>' in page
    assert "demo_cpu: smollm2-135m, 4-bit awq" in page
    release = host.check_output("basename $(readlink %s/current)", ROOT)
    assert f"<code>{release}</code>" in page
    for argument in json.loads(host.file(f"{ROOT}/etc/plan.json").content_string)["arguments"]:
        assert argument["flag"] in page


def test_the_sandbox_lets_it_read_the_memory_and_not_the_keys(host):
    page = fresh_page(host)
    assert "Memory: PSS of the process tree." in page
    used = int(re.search(r"<h3>Memory</h3>\s*<p class=\"figure\">([\d,]+)", page)[1].replace(",", ""))
    assert 500 < used < 3072
    hidden = host.check_output("systemctl show %s --property=InaccessiblePaths", UNIT)
    assert f"{ROOT}/etc/vllm.env" in hidden
    said = host.run("systemd-analyze security --no-pager %s", UNIT).stdout
    assert float(re.search(r"Overall exposure level for \S+: (\d+\.\d)", said)[1]) <= 2.0, said


def test_the_page_is_readable_and_nothing_half_written_lies_beside_it(host):
    fresh_page(host)
    page = host.file(f"{FOLDER}/index.html")
    assert (page.user, page.mode) == ("vllm", 0o644)
    assert host.check_output("ls -A %s", FOLDER).split() == ["index.html"]
    assert host.file("/var/lib/vllm-lowmem/status/index.html").content_string == page.content_string


def test_the_gateway_shows_it_to_those_with_a_key(host):
    page = fresh_page(host)
    curl = "curl --silent --insecure --output %s --write-out '%%{http_code}' https://127.0.0.1/status/"
    for path in ("", "main/"):
        assert host.check_output(f"{curl}{path} --user {ALICE}", "/tmp/status.html") == "200"
        assert host.file("/tmp/status.html").content_string.split("</title>")[0] == page.split("</title>")[0]
        assert host.check_output(f"{curl}{path}", "/tmp/refused.html") == "401"
        assert "SmolLM2" not in host.file("/tmp/refused.html").content_string
        assert host.check_output(f"{curl}{path} --user alice:wrong", "/tmp/refused.html") == "401"


def test_top_says_the_same_once_as_text_and_as_json(host):
    top = f"runuser -u vllm -- {ROOT}/current/env/bin/lowmem top --once"
    seen = json.loads(host.check_output(f"{top} --json"))
    assert (seen["state"], seen["model"], seen["running_most"]) == ("serving", "SmolLM2-135M-Instruct", 8)
    assert 500 * 2**20 < seen["memory_bytes"][0] < seen["memory_limit_bytes"]
    text = host.check_output(top)
    assert "SmolLM2-135M-Instruct  serving  up " in text
    assert "\x1b" not in text


@needs_minutes
def test_the_page_says_that_the_server_is_stopped(host):
    host.check_output("systemctl stop vllm@main.service")
    try:
        page = fresh_page(host)
        assert '<span class="pill bad">not running</span>' in page
        assert "http://127.0.0.1:8000: connection refused" in page
        assert "docs/runbooks/service-down.md" in page
        refused = host.run(f"runuser -u vllm -- {ROOT}/current/env/bin/lowmem top --once")
        assert refused.rc == 1
        assert refused.stderr.startswith("lowmem: http://127.0.0.1:8000: connection refused")
        assert len(refused.stderr.splitlines()) == 1
    finally:
        host.check_output("systemctl start vllm@main.service")
    assert '<span class="pill good">serving</span>' in fresh_page(host)
