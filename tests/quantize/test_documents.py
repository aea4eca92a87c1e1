"""Reading documents from files and datasets, and keeping test sets and held-out text away from calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fourfold.bundled import CALIBRATION_TEXTS, HELDOUT_TEXTS, TEXT
from fourfold.datatypes import FourfoldError
from fourfold.quantize import documents as module
from fourfold.quantize.contamination import FRAGMENT_CHARACTERS, fragments, refuse_heldout, refuse_test_sets
from fourfold.quantize.documents import Document, read_documents, source_name
from fourfold.recipe import Calibration, Source, load_recipe

CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def contents(source: Source) -> list[Any]:
    return [document.content for document in read_documents(source, seed=0)]


def jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


# ---- files


def test_jsonl_fields_are_joined_and_empty_documents_passed_over(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "1 + 1?", "a": "2"}, {"q": "", "a": None}, {"q": " ", "a": "3"})
    with open(path, "a") as file:
        file.write('\n  \n{"q": "last line without an end", "a": ""}')
    assert contents(Source(rows=1, path=path, fields=("q", "a"))) == ["1 + 1?\n\n2", "3", "last line without an end"]


def test_txt_gives_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nmore\n\n \n\ntwo ä\n\nthree", encoding="utf-8")
    found = list(read_documents(Source(rows=1, path=str(path)), seed=0))
    assert [document.content for document in found] == ["one\nmore\n", "two ä\n", "three"]
    assert [document.place for document in found] == [f"{path}, before line 5", f"{path}, before line 9",
                                                      f"{path}, at its end"]  # fmt: skip


def test_parquet_reads_only_the_fields_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(150)]  # more than one batch
    pq.write_table(pa.table({"text": texts, "other": [0] * 150, "chat": [CONVERSATION] * 150}), path)
    assert contents(Source(rows=1, path=str(path))) == texts
    assert contents(Source(rows=1, path=str(path), kind="chat", fields=("chat",)))[149] == CONVERSATION


def test_every_bundled_text_is_read_as_the_recipe_says() -> None:
    counts = {name: len(contents(Source(rows=1, builtin=name))) for name in CALIBRATION_TEXTS}
    assert counts == {"general": 60, "chat": 600, "code": 80, "math": 600}
    notes = (TEXT / "README.md").read_text() + (TEXT / "LICENSES.md").read_text()
    for text in (*CALIBRATION_TEXTS.values(), *HELDOUT_TEXTS.values()):
        assert (TEXT / text.file).is_file() and text.file in notes and text.licence in notes
    math = contents(Source(rows=1, builtin="math"))[0]
    assert math.startswith("Weng earns $12 an hour") and "\n\nWeng earns 12/60" in math


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "a.jsonl, line 3: a JSON object is wanted, found list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', "a.jsonl, line 1: no field 'text'; it has content, id. Way out"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: field 'text' is of type int; text is wanted"),
        ("a.jsonl", b'{"text": ["x"]}\n', "text is wanted (kind = 'chat' reads conversations)"),
        ("a.txt", b"\xff", "a.txt: not UTF-8 text"),
        ("a.parquet", b"PAR0", "a.parquet: not a Parquet file that pyarrow reads"),
    ],
)
def test_one_clear_error_for_a_bad_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FourfoldError) as caught:
        contents(Source(rows=1, path=str(tmp_path / name)))
    assert said in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_errors_for_files_that_are_not_there_and_fields_that_are_not_in_a_table(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"none\.jsonl does not exist"):
        contents(Source(rows=1, path=str(tmp_path / "none.jsonl")))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FourfoldError, match=r"folder\.txt is a folder"):
        contents(Source(rows=1, path=str(tmp_path / "folder.txt")))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(FourfoldError, match=r"a\.parquet: no field 'text'; it has body"):
        contents(Source(rows=1, path=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("messages", ["hello", [1], [{"content": "no role"}], {"role": "user"}])
def test_error_for_what_is_no_conversation(tmp_path: Path, messages: object) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION}, {"messages": None}, {"messages": messages})
    source = Source(rows=1, path=path, kind="chat", fields=("messages",))
    with pytest.raises(FourfoldError, match=r"a\.jsonl, line 3: field 'messages' is no conversation"):
        contents(source)


# ---- datasets (a local folder goes through the same library calls as a dataset of the Hub)


def local_dataset(folder: Path, documents: int = 40) -> Source:
    folder.mkdir(exist_ok=True)
    jsonl(folder / "train.jsonl", *({"text": f"text {number}", "extra": number} for number in range(documents)))
    return Source(rows=1, dataset=str(folder))


def test_a_dataset_is_streamed_in_an_order_fixed_by_the_seed(tmp_path: Path) -> None:
    source = local_dataset(tmp_path / "mine")
    first, again = contents(source), contents(source)
    other = [document.content for document in read_documents(source, seed=1)]
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(f"text {number}" for number in range(40))
    assert first != [f"text {number}" for number in range(40)]


def test_a_dataset_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    asked: dict[str, object] = {}

    def records() -> Iterator[dict[str, str]]:
        for number in range(10**6):
            read.append(number)
            yield {"text": f"text {number}"}

    def load(*names: object, **options: object) -> datasets.IterableDataset:
        asked.update(options, names=names)
        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(rows=1, dataset="org/name@abc", config="en", split="train")
    stream = read_documents(source, seed=0)
    assert [next(stream).content.startswith("text") for _ in range(100)] == [True] * 100
    assert len(read) <= 100 + module.SHUFFLE_BUFFER + 1
    assert asked == {"names": ("org/name", "en"), "split": "train", "revision": "abc", "streaming": True}


@pytest.mark.slow
def test_columns_that_are_not_asked_for_are_not_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    broken = {"text": ["a", "b"], "image": [{"bytes": b"no image", "path": None}] * 2}
    pq.write_table(pa.table(broken, schema=features.arrow_schema), tmp_path / "train.parquet")
    assert sorted(contents(Source(rows=1, dataset=str(tmp_path)))) == ["a", "b"]


def test_errors_of_a_dataset_that_is_there(tmp_path: Path) -> None:
    source = local_dataset(tmp_path / "mine")
    named = {"rows": 1, "dataset": source.dataset}
    with pytest.raises(FourfoldError, match=r"\(split tset\) cannot be read: Bad split: tset.*Way out: check config"):
        contents(Source(**named, split="tset"))
    with pytest.raises(FourfoldError, match=r"\(config xx, split train\) cannot be read: BuilderConfig 'xx' not found"):
        contents(Source(**named, config="xx"))
    with pytest.raises(FourfoldError, match=r"\(split train\): no field 'body'; it has extra, text"):
        contents(Source(**named, fields=("body",)))
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(FourfoldError, match=r"mine \(split train\) cannot be read: "):
        contents(source)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)"), "the Hub cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"), "check the name"),
        (datasets.exceptions.DatasetNotFoundError("'org/name' is a gated dataset"), "accept its terms"),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), "download it and give its file"),
        (ImportError("please install Pillow"), "download it and give its file"),
    ],
)
def test_errors_of_a_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FourfoldError) as caught:
        contents(Source(rows=1, dataset="org/name", config="en"))
    message = str(caught.value)
    assert message.startswith(f"dataset org/name (config en, split train) cannot be read: {error}. Way out: ")
    assert said in message


def test_without_a_network_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FourfoldError, match=r"dataset nobody/nothing \(split train\) cannot be read: .*go on line"):
        contents(Source(rows=1, dataset="nobody/nothing"))


def test_names_are_free_of_folders(tmp_path: Path) -> None:
    assert source_name(Source(rows=1, path=str(tmp_path / "a.txt"))) == "a.txt"
    assert source_name(Source(rows=1, dataset=str(tmp_path / "mine"))) == "mine"
    assert source_name(Source(rows=1, dataset="org/name", config="en")) == "org/name:en"
    assert source_name(Source(rows=1, builtin="code")) == "code"


# ---- test sets


def refused(**source: Any) -> str:
    try:
        refuse_test_sets(Calibration(sources=(Source(rows=1, **source),)))
    except FourfoldError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("dataset", "split"),
    [
        ("openai/gsm8k", "test"), ("someone/anything", "test"), ("HuggingFaceH4/ultrachat_200k", "test_sft"),
        ("a/b", "train+test"), ("a/b", "tests[:10%]"), ("Salesforce/wikitext", "test"), ("cais/mmlu", "validation"),
        ("TIGER-Lab/MMLU-Pro", "validation"), ("openai/openai_humaneval", "train"), ("bigcode/humanevalpack", "train"),
        ("google-research-datasets/mbpp", "prompt"), ("allenai/ai2_arc", "validation"), ("a/hellaswag", "validation"),
        ("allenai/winogrande", "validation"), ("truthfulqa/truthful_qa", "train"), ("Idavidrein/gpqa", "train"),
        ("HuggingFaceH4/aime_2024", "train"), ("math-ai/aime25", "train"), ("AI-MO/aimo-validation-aime", "train"),
        ("HuggingFaceH4/MATH-500", "train"), ("google/IFEval", "train"), ("google/IFEval@main", "train"),
        ("/data/gpqa/", "train"),
    ],
)  # fmt: skip
def test_known_test_sets_are_refused(dataset: str, split: str) -> None:
    message = refused(dataset=dataset, split=split)
    assert message.startswith(f"calibration source {dataset.rstrip('/').removeprefix('/data/')}: ")
    assert "calibration.allow_test_sets = true" in message
    source = Source(rows=1, dataset=dataset, split=split)
    refuse_test_sets(Calibration(sources=(source,), allow_test_sets=True))


@pytest.mark.parametrize(
    ("dataset", "split"),
    [
        ("openai/gsm8k", "train"), ("cais/mmlu", "auxiliary_train"), ("Rowan/hellaswag", "train"),
        ("allenai/ai2_arc", "train"), ("a/b", "latest"), ("a/openaimessages", "train"), ("a/search-logs", "train"),
        ("a/claims", "validation"), ("a/architecture", "validation"), ("a/monarc", "validation"),
        ("a/aimee", "train"), ("a/attest", "train"), ("Salesforce/wikitext", "validation"),
    ],
)  # fmt: skip
def test_training_splits_are_not_refused(dataset: str, split: str) -> None:
    assert refused(dataset=dataset, split=split) == ""


def test_no_preset_is_refused() -> None:
    for name in ("best", "fast", "card", "release"):
        refuse_test_sets(load_recipe(name).calibration)


def test_files_of_test_sets_are_refused(tmp_path: Path) -> None:
    assert "held-out text that ships with fourfold" in refused(path=str(TEXT / "heldout" / "chat.jsonl"))
    roundabout = f"{TEXT}/calibration/../heldout/wikitext-2-test.txt"
    assert "held-out text that ships with fourfold" in refused(path=roundabout)
    (tmp_path / "link.jsonl").symlink_to(TEXT / "heldout" / "chat.jsonl")
    assert "held-out text that ships with fourfold" in refused(path=str(tmp_path / "link.jsonl"))
    assert "test split" in refused(path="/data/test-00000-of-00001.parquet")
    assert refused(path="/data/train-00000-of-00001.parquet") == ""
    assert refused(path=str(TEXT / "calibration" / "chat.jsonl")) == ""


# ---- held-out text by content

LONG = "A line of the held-out text that is long enough that nobody else has written it, number {}."


def test_a_document_of_held_out_lines_is_refused() -> None:
    held = fragments("\n".join(LONG.format(number) for number in range(9)))
    assert len(held) == 9 and all(len(line) >= FRAGMENT_CHARACTERS for line in held)
    own = "This is a line of its own, which is in no text that was ever held out of anything at all, {}."
    half = [LONG.format(1), LONG.format(2), own.format(1), own.format(2)[:-4]]
    with pytest.raises(FourfoldError, match=r"here: this document is held-out text \(\"A line of the held-out text"):
        refuse_heldout(Document("here", "\n".join(half)), held)
    with pytest.raises(FourfoldError, match="held-out text"):  # white space and indentation do not hide it
        refuse_heldout(Document("here", "  " + LONG.format(1).replace(" ", "  ") + "\nshort"), held)
    with pytest.raises(FourfoldError, match="held-out text"):
        refuse_heldout(Document("here", [{"role": "user", "content": LONG.format(3)}]), held)
    refuse_heldout(Document("here", "\n".join([LONG.format(1), *map(own.format, range(3))])), held)  # a shared line
    refuse_heldout(Document("here", "short\nlines"), held)
    refuse_heldout(Document("here", LONG.format(1)), frozenset())
