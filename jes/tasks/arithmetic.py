"""The value of an expression, by a small parser of bounded work; never by `eval`."""

import re
from collections.abc import Iterator
from fractions import Fraction

LONGEST = 128
"""Characters in an expression that is read at all; it bounds the parser's depth."""
TOKEN = re.compile(r" *(0+(?![0-9])|[1-9][0-9]*|[-+*/()]) *")


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of + - * / ( ), whole numbers and spaces.

    None for anything else: other characters, a leading zero, unbalanced parentheses,
    division by zero, more than `LONGEST` characters. The work is bounded.
    """
    if len(expression) > LONGEST:
        return None
    tokens: list[str] = TOKEN.findall(expression)
    if sum(map(len, tokens)) != len(expression) - expression.count(" "):
        return None
    stream = iter([*tokens, ""])
    try:
        value, end = _sum(stream)
    except (ValueError, ZeroDivisionError):
        return None
    return value if end == "" else None


def _sum(stream: Iterator[str]) -> tuple[Fraction, str]:
    """The value of a sum, and the token after it."""
    total, token = _product(stream)
    while token in ("+", "-"):
        sign = 1 if token == "+" else -1
        value, token = _product(stream)
        total += sign * value
    return total, token


def _product(stream: Iterator[str]) -> tuple[Fraction, str]:
    value, token = _atom(next(stream), stream), next(stream)
    while token in ("*", "/"):
        factor = _atom(next(stream), stream)
        value = value * factor if token == "*" else value / factor
        token = next(stream)
    return value, token


def _atom(token: str, stream: Iterator[str]) -> Fraction:
    if token in ("+", "-"):
        value = _atom(next(stream), stream)
        return value if token == "+" else -value
    if token == "(":
        value, token = _sum(stream)
        if token != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if not token.isdigit():
        raise ValueError("a number is missing")
    return Fraction(token)
