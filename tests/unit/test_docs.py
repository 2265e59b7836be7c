"""Generated pages are the ones in the repository."""

from pathlib import Path

import pytest

from lowmem import claims, planning_page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "make", "command"),
    [
        ("planning.md", planning_page.page, "python -m lowmem.planning_page > docs/planning.md"),
        ("claims.md", claims.markdown, "lowmem check-article --markdown > docs/claims.md"),
    ],
)
def test_page_is_up_to_date(name, make, command):
    assert (DOCS / name).read_text() == make(), f"run: {command}"


def test_at_most_two_runs_calibrate():
    from lowmem.data import load_yaml

    assert len(load_yaml("calibration.yml")["calibrated_on"]) <= 2
