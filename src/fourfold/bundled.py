"""Texts that ship with fourfold, and how their files are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TEXT = Path(__file__).parent / "text"


@dataclass(frozen=True, kw_only=True)
class BundledText:
    """A text that ships with fourfold (text/README.md): how to read its file, which lies in `TEXT`."""

    file: str
    title: str
    licence: str
    kind: Literal["text", "chat"] = "text"
    fields: tuple[str, ...] = ("text",)


CALIBRATION_TEXTS = {
    "general": BundledText(
        file="calibration/general.jsonl",
        title="wikitext-2 validation split, tokenized form",
        licence="CC BY-SA 3.0",
    ),
    "chat": BundledText(
        file="calibration/chat.jsonl",
        title="GSM8K training problems as conversations",
        licence="MIT",
        kind="chat",
        fields=("messages",),
    ),
    "code": BundledText(
        file="calibration/code.jsonl",
        title="modules of CPython's standard library",
        licence="PSF-2.0",
        fields=("content",),
    ),
    "math": BundledText(
        file="calibration/math.jsonl",
        title="GSM8K training problems",
        licence="MIT",
        fields=("problem", "solution"),
    ),
}
HELDOUT_TEXTS = {
    "wikitext-2-test": BundledText(
        file="heldout/wikitext-2-test.txt",
        licence="CC BY-SA 3.0",
        title="wikitext-2 test split, tokenized form (not wikitext-2-raw)",
    ),
    "chat": BundledText(
        file="heldout/chat.jsonl",
        title="GSM8K test problems as conversations",
        licence="MIT",
        kind="chat",
        fields=("messages",),
    ),
}
