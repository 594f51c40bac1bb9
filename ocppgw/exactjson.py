"""JSON in and out so that values survive: what a charge point wrote is what a service reads.

orjson does the work. It stores numbers as 64-bit integers and doubles and refuses lone surrogates, so what it cannot
keep exactly is recognised before parsing and left to the standard library, with ``Decimal`` for such numbers. Of
duplicate keys in one object the last one wins, as in both parsers. Knows nothing of OCPP.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import orjson

MAX_DEPTH = 200
"""Levels of nesting that are read. orjson reads 1,024 but writes only 254."""

# What a double might not give back as it was written: 17 or more digits, or an exponent. It stands behind one of the
# characters of the first group; the same inside a string only costs time. Half the cost of finding it in a frame is
# saved by asking two cheaper questions first (bytes.translate is ten times as quick as a character class in re).
_INEXACT = re.compile(rb"[\[:,\s]-?(?:[\d.]{17}|\d[\d.]*[eE])")
_DIGITS = bytes.maketrans(b"123456789.", b"0000000000")
_LONG = b"0" * 17
_BEFORE_NUMBERS = bytes.maketrans(b"E[, \t\r\n", b"e::::::")
# A string that never ends is taken as one, or each of its quotes would be tried as a beginning.
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)

_SURROGATE = re.compile("[\ud800-\udfff]")


def loads(data: bytes) -> Any:
    """Parse JSON text in UTF-8, with or without a byte order mark. Raises ValueError with a short reason."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(data)
    if _may_be_inexact(data) and _INEXACT.search(data) is not None:
        return _loads_exactly(data)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        # Escaped lone surrogates are the only JSON that orjson does not read.
        if b"\\u" in data:
            return _loads_exactly(data)
        raise


def dumps(value: Any) -> bytes:
    """Write what loads returned, compact, in UTF-8. Lone surrogates stay escaped."""
    try:
        return orjson.dumps(value, default=_number)
    except TypeError:
        return _SURROGATE.sub(_escape, _dump_surrogates(value)).encode()


def _may_be_inexact(data: bytes) -> bool:
    return _LONG in data.translate(_DIGITS) or b":e" in data.translate(_BEFORE_NUMBERS, b"0123456789.-")


def _number(value: object) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value))
    raise TypeError(type(value).__name__)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < 19 else Decimal(digits)


def _fraction(digits: str) -> float | Decimal:
    value = float(digits)
    return value if repr(value) == digits else Decimal(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_depth(data: bytes) -> None:
    depth = 0
    for token in _NESTING.finditer(data):
        if token[0] in b"[{":
            depth += 1
        elif token[0] in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _loads_exactly(data: bytes) -> Any:
    text = data.decode("utf-8")
    try:
        return json.loads(text, parse_int=_integer, parse_float=_fraction, parse_constant=_refuse_constant)
    except InvalidOperation:
        raise ValueError("a number that no decimal can hold") from None


def _dump_surrogates(value: Any) -> str:
    """Write what orjson does not: text with lone surrogates, not escaped yet."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except TypeError:
        return _dump_surrogates_and_decimals(value)


def _dump_surrogates_and_decimals(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{json.dumps(key, ensure_ascii=False)}:{_dump_surrogates(item)}" for key, item in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump_surrogates, value)) + "]"
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def _escape(surrogate: re.Match[str]) -> str:
    # Only the surrogates: what goes out is hardly larger than what came in.
    return f"\\u{ord(surrogate[0]):04x}"
