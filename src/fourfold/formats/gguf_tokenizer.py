"""A tokenizer of Hugging Face's as GGUF holds it: tokens, types, merges, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError, brief

# tokenizer.ggml.pre by the regular expression of tokenizer.json: llama.cpp has code for each, and none for others.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _MARKED = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_OTHER, _UNMARKED = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    "|".join((_CONTRACTIONS, _WORD, r"\p{N}", _OTHER, _SPACES)): "qwen2",
    "|".join((_CONTRACTIONS, _MARKED, r"\p{N}", _UNMARKED, _SPACES)): "qwen35",
    "|".join((_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _OTHER, _SPACES)): "glm4",
}
BYTE_LEVEL = "gpt-2"  # the expression that is built into ByteLevel
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def read_tokenizer(folder: Path, vocabulary: int, special: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    """Return GGUF's keys for the tokens of a folder's tokenizer, and its gguf.SpecialVocab: merges, special tokens and
    the chat template.

    vocabulary: rows of the embeddings; special: tokens by role, beyond those that the files name.
    Raises FourfoldError for a tokenizer that is no byte-level BPE, or whose regular expression llama.cpp does not have.
    """
    import gguf

    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens") or []
        pre = _pre(content, path)
        tokens = {index: token for token, index in model["vocab"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FourfoldError(f"{path}: cannot be read as a tokenizer ({error!r}); a tokenizer.json is wanted") from None
    types = dict.fromkeys(tokens, NORMAL)
    for one in added:
        tokens[one["id"]] = one["content"]
        looks_special = one["content"].startswith("<|") and one["content"].endswith("|>")
        types[one["id"]] = CONTROL if one["special"] or looks_special else USER_DEFINED
    if max(tokens) >= vocabulary:
        raise FourfoldError(f"{path}: got token {max(tokens)}, expected less than the {vocabulary} rows of embeddings")
    found = gguf.SpecialVocab(folder, load_merges=True)
    ids = {token: index for index, token in tokens.items()}
    found.special_token_ids |= {role: ids[token] for role, token in special.items() if token in ids}
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(index, f"[PAD{index}]") for index in range(vocabulary)],
        "tokenizer.ggml.token_type": [types.get(index, UNUSED) for index in range(vocabulary)],
    }
    return keys, found


def _pre(content: Mapping[str, Any], path: Path) -> str:
    """Which of llama.cpp's expressions splits text into words."""
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    splits = [step for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if content["model"].get("type") == "BPE" and len(splits) + 1 == len(steps) and len(levels) == 1:
        if not splits and levels[0].get("use_regex", True) and not levels[0].get("add_prefix_space"):
            return BYTE_LEVEL
        expression = splits[0].get("pattern", {}).get("Regex") if len(splits) == 1 else None
        if expression in PRE and not levels[0].get("use_regex", True) and not content["model"].get("ignore_merges"):
            return PRE[expression]
    raise FourfoldError(
        f"{path}: pre_tokenizer: got {brief(outer)}, expected byte-level BPE with a regular expression that llama.cpp "
        f"has ({', '.join(PRE.values())}, {BYTE_LEVEL}). It would split text into other tokens"
    )
