"""Evaluates the small expressions of data/architectures.yml over the fields of a config.json.

An expression is a subset of Python: numbers, strings, lists, names, `a.b`, `a[b]`, arithmetic, comparisons,
`and`, `or`, `not`, `x if c else y` and a few functions. It is parsed into closures and never executed.
A field that a config does not have is None, so that `num_key_value_heads or num_attention_heads` reads as it
says. Arithmetic on None names the missing field.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from lowmem.errors import BadInput

Scope = Callable[[str], Any]
"""Returns the value of a name, or None where there is no such name."""

Compiled = Callable[[Scope], Any]

ALIAS = "alias of "
"""A scope that is asked for this and a name says which expression the name stands for, for a message."""

LARGEST = 2**48
"""No dimension, count or byte size of a model comes near it; a larger number is damage."""

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in (b or ()),
    ast.NotIn: lambda a, b: a not in (b or ()), ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def _count(values: Any, wanted: Any) -> int:
    """Count how often a value stands in a list or a character in a string."""
    return sum(1 for v in values or () if v == wanted)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "len": len, "int": int, "round": round, "abs": abs, "ceil": math.ceil,
    "round_up": lambda n, multiple: -(-n // multiple) * multiple,
    "ceil_div": lambda a, b: -(-a // b),
    "count": _count,
    "starts": lambda text, *prefixes: isinstance(text, str) and text.startswith(prefixes),
    "ends": lambda text, *suffixes: isinstance(text, str) and text.endswith(suffixes),
    "short": lambda values, n: list(values or ())[:n],
    "items": lambda value: list(value) if isinstance(value, list | tuple | str | dict) else [],
}  # fmt: skip


@cache
def compiled(text: str) -> Compiled:
    """Compile an expression. A mistake in it is a mistake in the table: ValueError."""
    try:
        return _compile(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"architectures.yml: {text!r} is no expression ({error.msg})") from None


def evaluate(expression: Any, scope: Scope) -> Any:
    """Evaluate an expression; what is no string stands for itself. BadInput names a field that is missing."""
    return compiled(expression)(scope) if isinstance(expression, str) else expression


def evaluate_size(expression: Any, scope: Scope) -> int:
    """Evaluate an expression that gives a number of things: a whole number from 0 to LARGEST."""
    value = evaluate(expression, scope)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        field = scope(f"{ALIAS}{expression}") or expression
        if value is None:
            raise _missing(field)
        raise BadInput(
            f"config.json: {field} is {str(value)[:60]!r}; it must be a whole number from 0 to 2**48; check"
            " the checkpoint's config.json"
        )
    return value


def _compile(node: ast.expr) -> Compiled:
    """Return a closure for one node; the subset is what stands here."""
    if isinstance(node, ast.Constant):
        constant = node.value
        return lambda scope: constant
    if isinstance(node, ast.Name):
        name = node.id
        return lambda scope: scope(name)
    if isinstance(node, ast.List | ast.Tuple):
        parts = [_compile(part) for part in node.elts]
        return lambda scope: [part(scope) for part in parts]
    if isinstance(node, ast.BoolOp):
        return _compile_choice(isinstance(node.op, ast.Or), [_compile(value) for value in node.values])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _compile(node.operand)
        return lambda scope: not inner(scope)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _compile(node.operand)
        return lambda scope: -inner(scope)
    if isinstance(node, ast.IfExp):
        test, yes, no = _compile(node.test), _compile(node.body), _compile(node.orelse)
        return lambda scope: yes(scope) if test(scope) else no(scope)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _compile_arithmetic(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compile_comparison(node)
    if isinstance(node, ast.Attribute):
        owner, field = _compile(node.value), node.attr
        return lambda scope: found.get(field) if isinstance(found := owner(scope), Mapping) else None
    if isinstance(node, ast.Subscript):
        return _compile_subscript(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _compile_call(node.func.id, node)
    raise ValueError(f"architectures.yml: {ast.unparse(node)!r} is outside the subset of expressions")


def _compile_choice(is_or: bool, values: list[Compiled]) -> Compiled:
    def choose(scope: Scope) -> Any:
        result: Any = None
        for value in values:
            result = value(scope)
            if bool(result) == is_or:
                return result
        return result

    return choose


def _compile_arithmetic(node: ast.BinOp) -> Compiled:
    left, right, apply = _compile(node.left), _compile(node.right), _ARITHMETIC[type(node.op)]

    def compute(scope: Scope) -> Any:
        a, b = left(scope), right(scope)
        for side, value in ((node.left, a), (node.right, b)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _not_a_number(side, value)
        try:
            return apply(a, b)
        except (ZeroDivisionError, OverflowError):
            raise BadInput(
                f"config.json: {ast.unparse(node)} cannot be computed from {a!r} and {b!r}; check the"
                " checkpoint's config.json"
            ) from None

    return compute


def _compile_comparison(node: ast.Compare) -> Compiled:
    left, right, apply = _compile(node.left), _compile(node.comparators[0]), _COMPARISONS[type(node.ops[0])]

    def compare(scope: Scope) -> bool:
        a, b = left(scope), right(scope)
        try:
            return bool(apply(a, b))
        except TypeError:
            raise _not_a_number(node.left if not isinstance(a, int | float) else node.comparators[0],
                                a if not isinstance(a, int | float) else b) from None  # fmt: skip

    return compare


def _compile_subscript(node: ast.Subscript) -> Compiled:
    owner, index = _compile(node.value), _compile(node.slice)

    def pick(scope: Scope) -> Any:
        values, at = owner(scope), index(scope)
        if isinstance(values, Mapping):
            return values.get(at) if isinstance(at, str) else None
        if isinstance(values, Sequence) and isinstance(at, int):
            return values[at] if -len(values) <= at < len(values) else None
        return None

    return pick


def _compile_call(name: str, node: ast.Call) -> Compiled:
    apply, arguments = _FUNCTIONS[name], [_compile(argument) for argument in node.args]

    def call(scope: Scope) -> Any:
        values = [argument(scope) for argument in arguments]
        try:
            return apply(*values)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            raise BadInput(
                f"config.json: {ast.unparse(node)} cannot be computed from"
                f" {', '.join(map(repr, values))[:80]}; check the checkpoint's config.json"
            ) from None

    return call


def _not_a_number(side: ast.expr, value: Any) -> BadInput:
    name = ast.unparse(side)
    if value is None:
        return _missing(name)
    return BadInput(
        f"config.json: {name} is {str(value)[:60]!r}; it must be a number; check the checkpoint's config.json"
    )


def _missing(field: str) -> BadInput:
    return BadInput(
        f"config.json: {field} is missing; download the checkpoint's config.json again, or name a directory"
        " that has the whole one"
    )
