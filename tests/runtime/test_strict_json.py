"""JSON from strangers is JSON, or a ValueError; soon."""

import time

import pytest

from mgptq_runtime.strict_json import parse_json, parse_json_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is beyond float64"),
        ('{"a": -1.5e400}', "beyond float64"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
        ('{"' + "k" * 99 + '": 1, "' + "k" * 99 + '": 2}', "duplicate key 'k{40}'$"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ('["\\ud83d"]', "half a surrogate pair"),
        ('{"\\uDC00": 1}', "half a surrogate pair"),
        (b'["\xed\xa0\x80"]', "codec can't decode"),
        (b'["\xff"]', "codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": "' + "x" * 1000 + '"}', "1009 bytes of JSON, at most 1000 are allowed"),
        ('{"a": "' + "ö" * 500 + '"}', "1009 bytes of JSON, at most 1000 are allowed"),
    ],
)
def test_what_is_no_json_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, 1000 if "at most 1000" in message else None)


def test_whole_surrogate_pairs_and_byte_order_marks_are_text():
    assert parse_json('["\\ud83d\\ude42", "\\u00df"]') == ["🙂", "ß"]
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5]}') == {"a": [1, 2.5]}


def test_one_of_many_keys_that_is_there_twice_is_found_at_once():
    text = "{" + "".join(f'"{i}": 0, ' for i in range(200_000)) + '"199999": 1}'
    start = time.monotonic()
    with pytest.raises(ValueError, match="duplicate key '199999'"):
        parse_json(text)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("text", ["[]", "1", "null", '"text"'])
def test_an_object_is_an_object(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        parse_json_object(text)
