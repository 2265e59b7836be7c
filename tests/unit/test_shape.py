"""Functions of the package are short enough to read at once; ruff counts their parameters (PLR0913)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "lowmem"

MOST_LINES = 70

LONG = ["measure/judge.py: terms", "measure/receipt.py: show"]


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef, command: bool) -> int:
    """Lines of a function; of a command without its signature, where each option has its help."""
    assert function.end_lineno is not None
    return function.end_lineno - (function.body[0].lineno if command else function.lineno) + 1


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{file.relative_to(PACKAGE)}: {node.name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines(node, command=file.parent.name == "cli") > MOST_LINES
    ]
    assert long == LONG
