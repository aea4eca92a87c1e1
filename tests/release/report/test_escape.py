"""Text of unknown origin: read back by a CommonMark parser, it is the same text and nothing else."""

from __future__ import annotations

import html
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fourfold.release.report.escape import Markdown, block, clean, code, prose, script_json, table

SIGNS = st.sampled_from("ab1. \t\n|`*_[]()<>&#+-=~!\\:/@$\"'{}\u202e")
TEXTS = st.text(SIGNS | st.characters(codec="utf-8"), max_size=40)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@given(TEXTS)
@example("1. a")
@example("# a")
@example("- a")
@example("> a")
@example("![a](b)")
@example("<!-- a")
@example("&lt;b&gt;")
@example("~~a~~")
@example("   ")
def test_prose_is_one_paragraph_of_that_text(text: str) -> None:
    shown = PARSER.render(f"{prose(text)} z")
    inner = shown.removeprefix("<p>").removesuffix("</p>\n").removesuffix("z")
    assert "<" not in inner, shown
    assert html.unescape(inner).strip() == clean(text).strip()


@given(TEXTS)
def test_a_cell_stays_a_cell(text: str) -> None:
    shown = PARSER.render(table(("a", "b"), [(text, "end"), (code(text), "end")]))
    assert shown.count("<td") == 4
    assert shown.count("end</td>") == 2
    assert "<script" not in shown and "<img" not in shown and "<a" not in shown


@given(TEXTS)
def test_a_block_ends_where_it_should(text: str) -> None:
    shown = PARSER.render(f"{block(text, 'sh')}\n\nafter")
    assert shown.endswith("</code></pre>\n<p>after</p>\n")
    assert shown.count("<pre>") == 1


@pytest.mark.parametrize("text", ["https://evil.example", "www.evil.example", "a@evil.example", "HTTP://x"])
def test_no_address_becomes_a_link(text: str) -> None:
    """GitHub's dialect makes links of these where they stand as they are."""
    shown = prose(text)
    assert text not in shown
    assert shown.replace("\\", "") == text


def test_numbers_are_aligned_right_and_markdown_is_left_alone() -> None:
    lines = table(("name", "count"), [("*a*", "1,024"), (Markdown("*b*"), "")]).split("\n")
    assert lines[1] == "| --- | ---: |"
    assert lines[2].startswith("| \\*a\\* |")
    assert lines[3].startswith("| *b* |")


@given(st.recursive(TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=5))
def test_json_in_a_script_cannot_end_it(value: object) -> None:
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
