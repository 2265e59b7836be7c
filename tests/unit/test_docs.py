"""Generated pages are the ones in the repository."""

from pathlib import Path

import accuracy_page
import planning_page
import pytest

from lowmem.plan import claims

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "make", "command"),
    [
        ("planning.md", planning_page.page, "python scripts/planning_page.py > docs/planning.md"),
        ("accuracy.md", accuracy_page.page, "python scripts/accuracy_page.py > docs/accuracy.md"),
        ("claims.md", claims.markdown, "lowmem check-article --markdown > docs/claims.md"),
    ],
)
def test_page_is_up_to_date(name, make, command):
    assert (DOCS / name).read_text() == make(), f"run: {command}"


def test_the_runs_that_calibrate_are_declared():
    """Three of the reference file, fourteen of our own, four of other models; the others are tests."""
    from lowmem.data import load_yaml

    assert load_yaml("calibration.yml")["calibrated_on"] == [
        "awq40-0.26.0", "tp2-0.26.0", "low_mem-0.32.0", "offload_uva-0.32.0", "extreme_uncapped-0.32.0",
        "extreme_expandable-0.32.0", "low_mem-int8-0.32.0", "low_mem-int4-0.32.0",
        "extreme-kv_cache_dtype-auto-0.32.0",
        "pipeline-0.32.0", "low_mem-max_num_seqs-256-0.32.0", "low_mem-no-custom-all-reduce-0.32.0",
        "extreme-8-batched-128-0.32.0",
        "ll-enforce_eager-0.32.0", "low_latency-0.32.0", "long_context-0.32.0",
        "awq40g-0.26.0", "llama-3.1-8b-0.32.0", "qwen3-30b-a3b-0.32.0", "mixtral-8x7b-awq-0.32.0",
        "gpt-oss-20b-0.32.0",
    ]  # fmt: skip
