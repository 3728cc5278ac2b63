"""Lines of a batch: which form they have, why one is refused, what a file is if it has none."""

from __future__ import annotations

import json

import pytest

from pydiffusion.openai.batch.answering import Defaults, error_of, failed_answer, line_of
from pydiffusion.openai.batch.lines import read_lines, repeated_ids

REQUEST = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def lines_of(*rows: object, **options: object) -> list:
    texts = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    return read_lines(
        b"\n".join(text.encode() if isinstance(text, str) else text for text in texts), "file", **options
    )


def test_numbers_count_blank_lines_and_endings_do_not_matter() -> None:
    data = b'"a"\n\n  \n{"prompt": "b", "id": 7}\n' + json.dumps(REQUEST).encode()
    lines = read_lines(data, "file")
    assert [(line.number, line.form, line.id) for line in lines] == [
        (1, "short", None), (4, "short", 7), (5, "openai", "r"),
    ]  # fmt: skip
    assert [line.error for line in lines] == [None] * 3
    assert lines[2].fields == {"messages": []} and lines[2].url == "/v1/chat/completions"
    for other in (
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data + b"\n\n",
        data.replace(b"\n", b"\r"),
    ):
        assert read_lines(other, "file") == lines


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b'{"prompt": "\xe9"}', "not UTF-8: byte 0xe9 at 13"),
        ('{"prompt": "a"', "not valid JSON: Expecting"),
        ("[" * 99999, "not valid JSON"),
        ([1], "an object or a string"),
        (None, "an object or a string"),
        ({}, "give a prompt or messages"),
        ({"prompt": "a", "messages": []}, "give a prompt or messages"),
        ({"prompt": ["a", "b"]}, "a string or an array of token ids"),
        ({"prompt": [True]}, "a string or an array of token ids"),
        ({"prompt": "a", "custom_id": "x"}, "here it is called id"),
        ({"prompt": "a", "n": 2}, "n is 2; a line gets one whole answer"),
        ({"prompt": "a", "stream": True}, "stream is True"),
        (REQUEST | {"custom_id": None}, "custom_id must be a string"),
        (REQUEST | {"custom_id": 7}, "custom_id must be a string"),
        (REQUEST | {"method": "GET"}, "method is 'GET'; permitted is POST"),
        (REQUEST | {"url": None}, "url is None; give the endpoint"),
        (REQUEST | {"body": "x"}, "body must be an object"),
        (REQUEST | {"max_tokens": 3}, "the request's fields belong into body"),
        ({"custom_id": "x"}, "body must be an object"),
        ({"custom_id": "x", "params": {"max_tokens": 3}}, "this is Anthropic's batch form"),
        ({"key": "x", "request": {"contents": []}}, "this is Google's batch form"),
        ({"recordId": "x", "modelInput": {}}, "this is Bedrock's batch form"),
    ],
)
def test_lines_that_are_refused(row: object, words: str) -> None:
    good, wrong = lines_of('"good"', row)
    assert good.error is None and words in wrong.error


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"sort: d a c\nsort: b a\n", r"no line is JSON \(line 1: 'sort: d a c'\).*--lines"),
        (b'\n[{"prompt": "a"}]', "is one JSON value; write one object per line"),
        (b'[\n "a",\n "b"\n]\n', "is one JSON value"),
        (b'{\n "prompt": "a"\n}\n', "is one JSON value"),
        ('"a"\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"\xff\x00\n", "no line is JSON"),
    ],
)
def test_files_of_another_kind(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=f"^the-file: .*{words}"):
        read_lines(data, "the-file")


def test_plain_lines() -> None:
    lines = lines_of("{not json", "", " b ", b"\xff", plain=True)
    assert [(line.number, line.fields, line.error) for line in lines] == [
        (1, {"prompt": "{not json"}, None), (3, {"prompt": "b"}, None), (4, {}, "not UTF-8: byte 0xff at 1"),
    ]  # fmt: skip


def test_the_digest_of_a_prompt_depends_on_how_it_is_passed() -> None:
    rows = '"a"', {"prompt": "a"}, {"prompt": [1]}, {"messages": []}, REQUEST
    ways = Defaults(chat=False), Defaults(), Defaults(system="be brief"), Defaults(chat=False, special=True)
    digests = [[line.digest for line in lines_of(*rows, salt=way.salt)] for way in ways]
    assert Defaults(chat=True).salt == Defaults().salt
    assert all(len({by_way[i] for by_way in digests}) == len(ways) for i in (0, 1))
    assert all(len({by_way[i] for by_way in digests}) == 1 for i in (2, 3, 4))


def test_null_fields_are_absent() -> None:
    """As of a table with empty cells, of which all rows have all columns."""
    first, second, third = lines_of(
        {"id": None, "prompt": "a", "messages": None, "n": None},
        {"id": 0, "prompt": None, "messages": [{"role": "user", "content": None}]},
        {"prompt": None, "question": "a"},
    )
    assert (first.fields, first.id, first.error) == ({"prompt": "a"}, None, None)
    assert (second.fields, second.id) == ({"messages": [{"role": "user", "content": None}]}, 0)
    assert third.error == "give a prompt or messages; the line has question"


def test_repeated_ids() -> None:
    rows = [{"prompt": "a", "id": own_id} for own_id in ("x", 1, "1", "x", [2], [2], "x")]
    assert repeated_ids(lines_of(*rows, "null")) == {'"x"': [1, 4, 7], "[2]": [5, 6]}


@pytest.mark.parametrize("good", ['"a"', json.dumps(REQUEST)])
def test_a_broken_line_is_answered_in_the_form_of_the_others(good: str) -> None:
    line, broken = lines_of(good, "{not json")
    assert broken.form == line.form
    for each in (line, broken):
        answer = failed_answer(each, ValueError("it is wrong"))
        assert line_of(json.loads(json.dumps(answer))) == (each.number, each.digest)
        assert error_of(answer) == "it is wrong"


@pytest.mark.parametrize(
    "other", [None, [], {}, {"line": "1", "digest": "x"}, {"custom_id": "a", "id": "batch_req_1_x"}]
)
def test_what_is_not_an_answer(other: object) -> None:
    with pytest.raises(ValueError, match="not an answer"):
        line_of(other)


def test_errors_in_answers_of_other_programs() -> None:
    """A failure is told by either: vLLM sets the error, OpenAI's service the status alone."""
    good = {"custom_id": "r", "response": {"status_code": 200, "body": {}}, "error": None}
    assert error_of(good) is None
    assert error_of(good | {"error": {"message": "no"}}) == "no"
    assert error_of(good | {"response": {"status_code": 400, "body": {}}}) == "failed"
