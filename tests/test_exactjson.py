"""JSON in and out: what was written is what is read, and hostile text costs no more than its length."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocppgw.exactjson import MAX_DEPTH, dumps, loads

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy
INTEGERS = st.from_regex(r"\A-?(0|[1-9][0-9]{0,40})\Z")
FRACTIONS = st.from_regex(r"\A-?(0|[1-9][0-9]{0,25})\.[0-9]{1,25}\Z")
EXPONENTS = st.from_regex(r"\A-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?[eE][+-]?[0-9]{1,4}\Z")
STRINGS = st.text(st.characters(exclude_categories=()), max_size=8).map(json.dumps)  # with lone surrogates, escaped
BLANKS = st.sampled_from(["", " ", "\n\t", "\r\n  "])


def arrays(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda blank, parts: f"[{blank}{f',{blank}'.join(parts)}]", BLANKS, st.lists(items, max_size=4))


def objects(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.dictionaries(STRINGS, items, max_size=4)
    return st.builds(
        lambda blank, pairs: "{" + ",".join(f"{blank}{key}:{blank}{item}" for key, item in pairs.items()) + "}",
        BLANKS,
        members,
    )


SCALARS = st.one_of(st.sampled_from(["null", "true", "false"]), INTEGERS, FRACTIONS, EXPONENTS, STRINGS)
TEXTS = arrays(st.recursive(SCALARS, lambda items: arrays(items) | objects(items), max_leaves=12))


def reference(data: bytes | str) -> Any:
    """What the text says: every number with all of its digits and apart from true, members of objects in order."""

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)

    return json.loads(data, parse_int=number, parse_float=number, object_pairs_hook=lambda pairs: ["object", *pairs])


@PATIENT
@given(TEXTS)
def test_values_survive_from_text_to_text(text):
    assert reference(dumps(loads(text.encode()))) == reference(text)


@PATIENT
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_double_keeps_all_of_its_digits(value):
    assert reference(dumps([value])) == [("number", Decimal(repr(value)))]
    assert float(loads(dumps([value]))[0]) == value


@PATIENT
@given(st.binary(max_size=40) | TEXTS.map(str.encode).flatmap(lambda data: st.permutations(data).map(bytes)))
def test_whatever_is_not_json_is_a_value_error(data):
    try:
        value = loads(data)
    except ValueError:
        return
    json.loads(data.removeprefix(b"\xef\xbb\xbf").decode())  # the standard library takes it for JSON, too
    dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        "[1.0]",
        "[-0.0]",
        "[0.1]",
        "[123456789012345678]",
        "[18446744073709551616]",
        "[-9223372036854775809]",
        "[0.1000000000000000055511151231257827]",
        "[0.30000000000000004]",
        "[1E+400]",
        "[100000.00000000000000000]",
        '["\\ud800"]',
        '{"\\udfff":1}',
        '[1E+5,{"\\ud83d":[true,null,"e"]}]',
        '["é😀\u2028"]',
        '[""]',
        '{"é\\ud800":"😀\\udfff\u2028\x7f"}',
        '["\\u0000"]',
        '[{"b":1,"a":2}]',
    ],
)
def test_compact_text_comes_back_unchanged(text):
    assert dumps(loads(text.encode())) == text.encode()


def test_numbers_that_a_double_holds_stay_quick_to_use():
    assert [type(value) for value in loads(b"[1, 1.5, 123456789012345678, 0.30000000000000004]")] == [
        int,
        float,
        int,
        float,
    ]


def test_a_number_with_a_million_digits_is_one_number():
    digits = b"[" + b"7" * 1_000_000 + b"]"
    assert dumps(loads(digits)) == digits


def test_the_last_of_duplicate_keys_wins_in_both_parsers():
    assert loads(b'{"a": 1, "a": 2}') == {"a": 2}
    assert loads(b'{"a": 1e0, "a": 2e0}') == {"a": 2}


def test_a_byte_order_mark_is_passed_over():
    assert loads(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[",
        b"[,1]",
        b"[01]",
        b"[1,]",
        b"[1] x",
        b"{'a': 1}",
        b"[NaN]",
        b"[1e0, NaN]",
        b"[1e0, -Infinity]",
        b'["\xff"]',
        b'["\xff", 1e0]',
        b'["\xed\xa0\x80"]',
        b'["\xed\xa0\x80\\u0041"]',
        b'["a\nb"]',
        b'["a\nb", 1e0]',
        b'["\\x"]',
        b"\xff\xfe[\x001\x00]\x00",
    ],
)
def test_faulty_text_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        loads(data)


@pytest.mark.parametrize("exponent", ["99999999999999999999", "-99999999999999999999"])
def test_a_number_beyond_every_decimal_is_refused(exponent):
    with pytest.raises(ValueError, match="no decimal can hold"):
        loads(f"[1e{exponent}]".encode())


@pytest.mark.parametrize("scalar", ["1", "1e5"])
def test_nesting_is_read_and_written_up_to_its_limit(scalar):
    deepest = "[" * MAX_DEPTH + scalar + "]" * MAX_DEPTH
    assert reference(dumps(loads(deepest.encode()))) == reference(deepest)
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(ValueError, match="nested deeper than 200 levels"):
            loads(f"{opening}{deepest}{closing}".encode())


def test_brackets_in_strings_and_side_by_side_are_no_nesting():
    text = json.dumps([[], {}, '[{"\\'] * MAX_DEPTH)
    assert loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "data",
    [
        b"[]" * (MAX_DEPTH + 1) + b'\\"' * 300_000,
        b"[]" * (MAX_DEPTH + 1) + b'"' + b"\\" * 600_001,
        b"[]" * (MAX_DEPTH + 1) + b'"' * 600_001,
        b"[" + b"1." * 300_000,
        b"[" + b" -" * 300_000 + b"e",
        b"[" + b"1e" * 300_000,
    ],
    ids=["escaped quotes", "backslashes", "quotes", "points", "signs", "exponents"],
)
def test_hostile_text_is_refused_in_linear_time(data):
    # With the square of the length in steps each of these would take minutes.
    with pytest.raises(ValueError, match=r"."):
        loads(data)


def test_only_what_json_has_is_written():
    with pytest.raises(TypeError):
        dumps([object()])
    with pytest.raises(TypeError):
        dumps({"\ud800": object()})
