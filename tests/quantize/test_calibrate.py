"""Calibration rows and held-out windows, with the example model's tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from msgspec import to_builtins
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

import fourfold
from fourfold.bundled import TEXT
from fourfold.datatypes import Event, FourfoldError
from fourfold.quantize import calibrate
from fourfold.quantize.calibrate import CalibrationRows, collect, heldout, load_tokenizer
from fourfold.quantize.contamination import check_sources, check_texts, refuse_calibrated, shingles
from fourfold.quantize.documents import read_documents
from fourfold.quantize.template import ChatTemplate
from fourfold.recipe import Calibration, Heldout, Recipe, Source, load_recipe

MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3.6-moe"
END = 0  # <|endoftext|>


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


def recipe_of(*sources: Source, **settings: Any) -> Recipe:
    return Recipe(calibration=Calibration(**{"length": 64, "sources": sources} | settings))


def jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def numbered(folder: Path, documents: int = 50, words: int = 30) -> str:
    """Documents of which every token tells whose it is."""
    texts = ({"text": " ".join([chr(ord("A") + number % 26) * 2 + str(number)] * words)} for number in range(documents))
    return jsonl(folder / "numbered.jsonl", *texts)


# ---- rows


def test_best_gets_its_mix_from_the_bundled_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = collect(load_recipe("best"), tokenizer)
    assert rows.token_RT.shape == (256, 1024) and rows.token_RT.dtype == torch.int64
    assert rows.notes == ()
    assert [(source.name, source.rows, source.licence) for source in rows.sources] == [
        ("general", 102, "CC BY-SA 3.0"), ("chat", 77, "MIT"), ("code", 51, "PSF-2.0"), ("math", 26, "MIT"),
    ]  # fmt: skip
    assert rows.source_R == ("general",) * 102 + ("chat",) * 77 + ("code",) * 51 + ("math",) * 26
    # what README.md of the texts says
    assert [source.tokens for source in rows.sources] == [177818, 144646, 280803, 140310]
    assert 0 <= int(rows.token_RT.min()) and int(rows.token_RT.max()) < len(tokenizer)
    assert "<|im_start|>user\n" in tokenizer.decode(rows.token_RT[102])
    assert "    def __init__(self" in tokenizer.decode(rows.token_RT[179:230].flatten())


def test_rows_are_cut_from_shuffled_documents_with_an_end_between(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = numbered(tmp_path, documents=20, words=7)
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    available = (sum(map(len, tokens)) + 20) // 16
    rows = collect(recipe_of(Source(rows=available, path=path), length=16), tokenizer)

    text = tokenizer.decode(rows.token_RT.flatten()[: 5 * 16])
    assert rows.token_RT.shape == (available, 16) and "<|endoftext|>" in text
    # all rows are there, none twice: in their first order they are the documents, each whole, each with an end after it
    whole = {tuple(ids) for ids in tokens}
    order = [rows.token_RT[index] for index in _chain(rows.token_RT)]
    stream = torch.cat(order).tolist()
    cut = _split(stream)
    assert set(map(tuple, cut[:-1])) <= whole and len(cut) >= 20 - 1
    assert [tuple(ids) for ids in cut[:-1]] != [tuple(ids) for ids in tokens][: len(cut) - 1]


def _split(stream: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == END:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _chain(token_RT: torch.Tensor) -> list[int]:
    """The rows in the order before they were drawn, by the same published rule: sha256 of seed, name, use and index."""
    drawn = sorted(
        range(len(token_RT)),
        key=lambda index: hashlib.sha256(f"0/numbered.jsonl/rows/{index}".encode()).digest(),
    )
    return [drawn.index(index) for index in range(len(token_RT))]


def test_rows_come_from_all_over_a_source(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"number {number} " * 200} for number in range(40)))
    rows = collect(recipe_of(Source(rows=12, path=path), length=128), tokenizer)
    starts = {tokenizer.decode(row).split("number")[1] for row in rows.token_RT}
    assert len(starts) >= 6  # 12 rows in one piece would be two documents or three


def test_a_big_file_is_read_only_as_far_as_needed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "big.jsonl"
    jsonl(path, *({"text": f"word {number} and some more"} for number in range(3000)))
    with open(path, "a") as file:
        file.write("this line is not JSON and is never reached\n")
    rows = collect(recipe_of(Source(rows=4, path=str(path))), tokenizer)
    assert rows.sources[0].tokens < 2 * calibrate.OVER_READ * 4 * 64 and rows.sources[0].documents < 400
    with pytest.raises(FourfoldError, match="line 3001: not JSON"):
        collect(recipe_of(Source(rows=400, path=str(path))), tokenizer)


def test_conversations_are_written_with_the_models_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "Because it is."}]
    path = jsonl(tmp_path / "talk.jsonl", *({"talk": talk} for _ in range(60)))
    rows = collect(recipe_of(Source(rows=2, path=path, kind="chat", fields=("talk",))), tokenizer)
    turn = tokenizer.apply_chat_template(talk, tokenize=False)
    assert turn in tokenizer.decode(rows.token_RT[0]) and END not in rows.token_RT


def test_parquet_text_and_datasets_give_the_same_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"text number {number} of a file" for number in range(50)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    jsonl(tmp_path / "set" / "train.jsonl", *({"text": text} for text in texts))
    sources = (
        Source(rows=2, path=str(tmp_path / "a.parquet"), licence="MIT"),
        Source(rows=2, path=str(tmp_path / "a.txt")),
        Source(rows=2, dataset=str(tmp_path / "set")),
    )
    rows = collect(recipe_of(*sources), tokenizer)
    assert rows.source_R == ("a.parquet", "a.parquet", "a.txt", "a.txt", "set", "set")
    assert [(source.documents, source.licence) for source in rows.sources] == [(50, "MIT"), (50, ""), (50, "")]
    assert all("of a file" in tokenizer.decode(row) for row in rows.token_RT)


def test_an_end_of_document_falls_back_to_eos_and_to_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(Source(rows=20, path=numbered(tmp_path)), length=32)
    monkeypatch.setattr(calibrate, "END_OF_DOCUMENT", "<|nothing of the kind|>")
    assert tokenizer.eos_token_id in collect(recipe, tokenizer).token_RT
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    token_RT = collect(recipe, bare).token_RT
    assert tokenizer.eos_token_id not in token_RT and END not in token_RT


def test_a_tokenizer_that_adds_special_tokens_is_kept_from_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    eager = copy.deepcopy(tokenizer)
    template = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    eager.backend_tokenizer.post_processor = template
    assert eager("text")["input_ids"][0] == 1
    assert 1 not in collect(recipe_of(Source(rows=20, path=numbered(tmp_path)), length=32), eager).token_RT
    assert 1 not in heldout(load_recipe("best"), eager).token_RT


def test_progress_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    events: list[Event] = []
    collect(recipe_of(Source(rows=2, path=numbered(tmp_path))), tokenizer, progress=events.append)
    last = {"done": 128, "total": 128, "unit": "tokens", "text": "numbered.jsonl"}
    assert events[-1] == Event(kind="stage", stage="calibrate", **last)


def test_json_says_everything_but_the_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = collect(recipe_of(Source(rows=2, path=numbered(tmp_path), licence="MIT")), tokenizer)
    told = to_builtins(rows.facts())
    assert (told["digest"], told["rows"], told["length"], told["notes"]) == (rows.digest, 2, 64, [])
    assert told["sources"][0] | {"tokens": 0} == {
        "name": "numbered.jsonl", "licence": "MIT", "documents": 50, "tokens": 0, "rows_wanted": 2, "rows": 2,
    }  # fmt: skip


# ---- the same everywhere


def test_the_digest_follows_the_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = Source(rows=4, path=numbered(tmp_path))
    first = collect(recipe_of(source), tokenizer)
    assert collect(recipe_of(source), tokenizer).digest == first.digest
    shutil.copytree(tmp_path, tmp_path / "moved")
    moved = Source(rows=4, path=str(tmp_path / "moved" / "numbered.jsonl"))
    assert collect(recipe_of(moved), tokenizer).digest == first.digest
    others = [recipe_of(source, seed=1), recipe_of(source, length=32), recipe_of(Source(rows=3, path=source.path))]
    assert len({first.digest, *(collect(other, tokenizer).digest for other in others)}) == 4
    small = dataclasses.replace(first, token_RT=first.token_RT.view(8, 32))
    assert calibrate._digest(small.token_RT) != first.digest  # the shape counts, too


@pytest.mark.slow
def test_rows_are_the_same_in_another_process(tokenizer: PreTrainedTokenizerBase) -> None:
    overrides = ["calibration.length=64", *(f"calibration.sources.{index}.rows=3" for index in range(4))]
    here = [collect(load_recipe("best", overrides), tokenizer).digest, heldout(load_recipe("best"), tokenizer).digest]
    code = (
        "import sys; from pathlib import Path; from fourfold.recipe import load_recipe;"
        "from fourfold.quantize.calibrate import *; tokenizer = load_tokenizer(Path(sys.argv[1]));"
        "print(collect(load_recipe('best', sys.argv[2:]), tokenizer).digest);"
        "print(heldout(load_recipe('best'), tokenizer).digest)"
    )
    source = str(Path(fourfold.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code, str(MODEL), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == here


# ---- too little text


@pytest.mark.slow
def test_a_short_bundled_text_hands_its_rows_to_the_others(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = collect(load_recipe("best", ["calibration.length=2048"]), tokenizer)
    assert rows.token_RT.shape == (256, 2048)
    counts = [source.rows for source in rows.sources]
    assert counts == [86, 70, 66, 34]  # 16 + 7 rows short; code and math give them 51 : 26
    assert rows.notes == (
        "built-in text general gives 86 rows of 2048 tokens, not 102: it holds 177,818 tokens",
        "built-in text chat gives 70 rows of 2048 tokens, not 77: it holds 144,646 tokens",
        "built-in text code gives 66 rows of 2048 tokens, not 51: in place of texts too short",
        "built-in text math gives 34 rows of 2048 tokens, not 26: in place of texts too short",
    )
    assert len({tuple(row) for row in rows.token_RT.tolist()}) == 256  # no row twice


def test_too_little_bundled_text_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FourfoldError) as caught:
        collect(load_recipe("best", ["calibration.length=4096"]), tokenizer)
    assert str(caught.value) == (
        "built-in texts: got 743,577 tokens, 180 samples of 4096, expected 256. "
        "Try: more text, or smaller --samples or --sequence-length"
    )


def test_too_little_text_of_ones_own_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "small.jsonl", {"text": "one two three"})
    tokens = len(tokenizer("one two three", add_special_tokens=False)["input_ids"])
    wanted = rf"small\.jsonl: got {tokens} tokens in 1 documents, 0 samples of 64, expected 2\. Try: more text"
    with pytest.raises(FourfoldError, match=wanted):
        collect(recipe_of(Source(rows=2, path=path), Source(rows=2, builtin="code")), tokenizer)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FourfoldError, match=r"empty\.jsonl: got 0 tokens in 0 documents"):
        collect(recipe_of(Source(rows=2, path=str(tmp_path / "empty.jsonl"))), tokenizer)


def test_texts_are_checked_without_a_tokenizer(tmp_path: Path) -> None:
    """What can be told from bytes alone, and only that: a text that `collect` takes is never refused."""
    long = jsonl(tmp_path / "long.jsonl", *[{"text": "one two three " * 40}] * 9)
    check_texts(recipe_of(Source(rows=2, path=long), Source(rows=2, builtin="code")))
    cut = jsonl(tmp_path / "cut.jsonl", *[{"text": "one two three " * 40}] * 90, {"text": 7})
    check_texts(recipe_of(Source(rows=2, path=cut)))  # as far as `collect` surely reads
    talk = [{"messages": [{"role": "user", "content": "hello"}]}] * 2  # templates add tokens
    path = jsonl(tmp_path / "talk.jsonl", *talk)
    check_texts(recipe_of(Source(rows=2, path=path, kind="chat", fields=("messages",))))
    for name, value, said in (("short", "one", "at most 4 tokens, expected 128 "), ("int", 7, "line 1")):
        with pytest.raises(FourfoldError, match=said):
            check_texts(recipe_of(Source(rows=2, path=jsonl(tmp_path / f"{name}.jsonl", {"text": value}))))
    with pytest.raises(FourfoldError, match="general: got at most"):
        check_texts(recipe_of(Source(rows=2**20, builtin="general")))


# ---- what is refused


def test_sources_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="split 'test' is a test set"):
        check_sources(recipe_of(Source(rows=1, dataset="openai/gsm8k", config="main", split="test")))
    with pytest.raises(FourfoldError, match=r"none\.txt does not exist"):
        check_sources(recipe_of(Source(rows=1, builtin="code"), Source(rows=1, path=str(tmp_path / "none.txt"))))
    with pytest.raises(FourfoldError, match=r"held\.txt does not exist"):
        check_sources(Recipe(heldout=Heldout(builtin="", path=str(tmp_path / "held.txt"))))


def test_held_out_text_under_another_name_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    shutil.copy(TEXT / "heldout" / "chat.jsonl", tmp_path / "mine.jsonl")
    (tmp_path / "wiki.txt").write_text((TEXT / "heldout" / "wikitext-2-test.txt").read_text()[:20000])
    talk = Source(rows=1, path=str(tmp_path / "mine.jsonl"), kind="chat", fields=("messages",))
    with pytest.raises(FourfoldError, match=r"mine\.jsonl, line 1: this document is held-out text"):
        collect(recipe_of(talk), tokenizer)
    with pytest.raises(FourfoldError, match=r"wiki\.txt, .*: this document is held-out text"):
        collect(recipe_of(Source(rows=1, path=str(tmp_path / "wiki.txt"))), tokenizer)
    rows = collect(recipe_of(talk, allow_test_sets=True), tokenizer)
    assert rows.notes == ("test sets were allowed as calibration text: figures measured on them are not held out",)


def test_the_recipes_own_held_out_text_is_kept_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": f"{'A sentence of one hundred characters, more or less. ' * 2}\n" * 40})
    recipe = dataclasses.replace(recipe_of(Source(rows=1, path=path)), heldout=Heldout(builtin="", path=path))
    with pytest.raises(FourfoldError, match=r"a\.jsonl, line 1: this document is held-out text"):
        collect(recipe, tokenizer)


def test_a_model_without_chat_template_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(FourfoldError, match=r"chat\.jsonl, line 1: a conversation, and the model has no chat template"):
        collect(recipe_of(Source(rows=1, builtin="chat")), bare)


TEMPLATES = {
    "refusal": ("{{ raise_exception('roles must alternate') }}", "template refuses this conversation: roles must alt"),
    "error": ("{{ 1 / 0 }}", "fails on this conversation: ZeroDivisionError: division by zero"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "5 s of CPU time"),
    "long text": ("{{ 'x' * 10**10 }}", "512 MiB of memory"),
    "many texts": ("{{ 'x' * 10**7 }}", "it makes 10,000,000 characters of it"),
    "endless": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this conversation: RecursionError"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_fails_or_exhausts_the_machine(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template, message = TEMPLATES[case]
    with pytest.raises(FourfoldError, match=rf"chat\.jsonl, line 1: .*{message}"):
        collect(recipe_of(Source(rows=1, builtin="chat")), bare)
    assert not [child for child in psutil.Process().children() if "fourfold.quantize.template" in child.cmdline()]


def test_the_child_renders_as_transformers_does(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also what the template sees of the tokenizer, and values that are no JSON."""
    probe = copy.deepcopy(tokenizer)
    probe.chat_template = tokenizer.chat_template + "{{ eos_token }}{{ pad_token }}{{ messages }}{{ bos_token }}"
    talks = [document.content for document in read_documents(Source(rows=1, builtin="chat"), seed=0)][:20]
    talks += [[{"role": "user", "content": None}, {"role": "assistant", "content": "é\u2028", "at": datetime.now()}]]
    with ChatTemplate(probe) as template:
        assert [template.render(talk, "") for talk in talks] == [
            probe.apply_chat_template(talk, tokenize=False) for talk in talks
        ]


# ---- held-out windows


def test_heldout_windows_are_one_tokenization_from_the_start(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = heldout(load_recipe("best"), tokenizer)
    text = (TEXT / "heldout" / "wikitext-2-test.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert windows.token_RT.flatten().tolist() == tokens[: 16 * 2048]
    assert windows.token_RT.shape == (16, 2048) and tokenizer.bos_token is None
    assert to_builtins(windows.protocol) == {
        "text": "wikitext-2 test split, tokenized form (not wikitext-2-raw)",
        "joining": "one row a line, blank rows included, as in the file",
        "tokens": 486324, "windows": 16, "windows_available": 237, "window": 2048, "stride": 2048,
        "predictions_per_window": 2047, "bos": False, "special_tokens": False, "tail": "dropped",
    }  # fmt: skip


def test_heldout_rows_of_a_table_are_joined_with_a_blank_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = ["", " = Title = \n", "", " Some text of the article . \n"] * 20
    pq.write_table(pa.table({"text": rows}), tmp_path / "raw.parquet")
    wanted = Heldout(builtin="", path=str(tmp_path / "raw.parquet"), windows=3, length=32)
    windows = heldout(Recipe(heldout=wanted), tokenizer)
    tokens = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    assert windows.token_RT.flatten().tolist() == tokens[:96]
    assert windows.protocol.text == "raw.parquet" and windows.protocol.joining == "rows joined with a blank line"


def test_heldout_conversations_are_written_with_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = heldout(load_recipe("best", ["heldout.builtin=chat", "heldout.windows=2"]), tokenizer)
    assert tokenizer.decode(windows.token_RT[0]).startswith("<|im_start|>user\nJanet")
    assert windows.protocol.text == "GSM8K test problems as conversations"


def test_too_little_held_out_text_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FourfoldError, match="486,324 tokens, 237 windows of 2048, expected 999"):
        heldout(load_recipe("best", ["heldout.windows=999"]), tokenizer)
    path = jsonl(tmp_path / "a.jsonl", {"text": None})
    with pytest.raises(FourfoldError, match=r"a\.jsonl, line 1: field 'text' is wanted in held-out text"):
        heldout(Recipe(heldout=Heldout(builtin="", path=path)), tokenizer)


# ---- the tokenizer


def test_errors_of_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(FourfoldError, match=r"no tokenizer; one of tokenizer\.json, .* is wanted"):
        load_tokenizer(tmp_path)
    broken = json.loads((MODEL / "tokenizer.json").read_text())
    broken["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "("}
    for content in (b"{}", bytes(range(128, 256)) * 100, b"[" * 100_000, json.dumps(broken).encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(FourfoldError, match="transformers cannot load the tokenizer") as error:
            load_tokenizer(tmp_path)
        assert len(str(error.value)) < 600


def test_rows_are_a_frozen_value(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = collect(recipe_of(Source(rows=1, path=numbered(tmp_path))), tokenizer)
    assert isinstance(rows, CalibrationRows)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.notes = ()  # type: ignore[misc]


# ---- calibrated text, when it is measured on


def test_shingles_are_found_wherever_a_stretch_stands() -> None:
    """One run in 64 is kept, and a stretch of 600 tokens has the same ones in other rows, at other places."""
    generator = torch.Generator().manual_seed(0)
    token_RT = torch.randint(50_000, (8, 1024), generator=generator)
    found = set(shingles(token_RT))
    assert 90 < len(found) < 160  # of 8 x 993
    moved_RT = torch.cat([torch.randint(50_000, (7,), generator=generator), token_RT[3, 200:800]])[None]
    assert set(shingles(moved_RT)) & found == set(shingles(token_RT[3:4, 200:800])) != set()
    assert not set(shingles(torch.randint(50_000, (8, 1024), generator=generator))) & found
    assert shingles(token_RT[:, :31]) == []


def test_a_little_in_common_is_told_and_more_is_refused() -> None:
    token_RT = torch.randint(50_000, (16, 1024), generator=torch.Generator().manual_seed(1))
    own = shingles(token_RT)
    place = Path("out/fourfold.json")
    assert refuse_calibrated(token_RT, [], "words", place) == 0
    assert refuse_calibrated(token_RT, own[:2], "words", place) == pytest.approx(2 / len(own))
    with pytest.raises(FourfoldError, match=r"words: 100% of this text was calibrated on, says out/fourfold\.json"):
        refuse_calibrated(token_RT, own, "words", place)
