"""The picture of the running host in README.md is the one that its script draws."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from scripts.host_picture import picture

DOCS = Path(__file__).parents[2] / "docs"


def test_picture_is_up_to_date():
    assert (DOCS / "host.svg").read_text() == picture(), "run: python scripts/host_picture.py"


def test_picture_names_every_part_and_stays_within_its_frame():
    root = ET.fromstring(picture())
    names = [
        node.text for node in root.iter("{http://www.w3.org/2000/svg}text") if node.get("class") == "name"
    ]
    assert names == [
        "GPU host", "Client", "nginx gateway", "vLLM", "GPUs", "Status page", "Watchdog", "Prometheus",
        "receipt.json", "plan.json", "Controller",
    ]  # fmt: skip
    assert [float(number) for number in root.get("viewBox").split()] == [0, 0, 960, 470]
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        if path.get("class") == "arrow":
            points = re.findall(r"[ML](\d+) (\d+)", path.get("d"))
            assert all(0 <= int(x) <= 960 and 0 <= int(y) <= 470 for x, y in points)
