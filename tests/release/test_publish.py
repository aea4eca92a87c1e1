"""Publishing to a small Hub of our own on the loopback device, through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import ModelCard

from command_line import invoke
from fourfold import api
from fourfold.datatypes import FourfoldError
from fourfold.release import signature
from fourfold.release.export import Options, export
from fourfold.release.publish import publish
from fourfold.release.verify.run import verify
from hub import TOKEN, Hub, serving

CARD = "---\nlicense: apache-2.0\n---\n\n# A release\n"
Altered = Callable[[Path], Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def verified(shipped: dict[str, Path], altered: Altered) -> Path:
    """A release that verify has passed, with a card and what report leaves beside it."""
    out = altered(shipped["compressed-tensors"])
    assert verify(out).passed
    (out / "README.md").write_text(CARD, encoding="utf-8")
    (out / "report.html").write_text("<p>", encoding="utf-8")
    return out


def visible(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_results_for_leaderboards_are_sent(hub: Hub, verified: Path) -> None:
    """Written after verify, as a card is; nothing else that is hidden goes out."""
    (verified / ".eval_results").mkdir()
    for name in ("lm-eval.yaml", "another.yaml", ".hidden"):
        (verified / ".eval_results" / name).write_text("[]", encoding="utf-8")
    publish(verified, "me/model")
    assert hub.branches["main"] == visible(verified) | {".eval_results/lm-eval.yaml": b"[]"}


def refused(out: Path, **options: Any) -> str:
    with pytest.raises(FourfoldError) as raised:
        publish(out, "me/model", **options)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


def test_the_very_bytes(hub: Hub, verified: Path) -> None:
    found = publish(verified, "me/model", private=True)
    assert hub.branches["main"] == visible(verified)
    assert hub.private and (found.unverified, found.reason) == ((), "")
    content = json.loads((verified / "fourfold.json").read_text())["output"]["content"]
    assert hub.tags == {f"fourfold-{content[:12]}": found.commit}
    assert found.url.endswith("/me/model/tree/main")
    uploads = len(hub.large)
    assert publish(verified, "me/model").commit == found.commit and len(hub.large) == uploads
    assert not [name for name in hub.branches["main"] if name.startswith(".")]


def test_a_branch(hub: Hub, verified: Path) -> None:
    publish(verified, "me/model", branch="four-bits")
    assert hub.branches["four-bits"] == visible(verified) and hub.branches["main"] == {}


def test_dry_run(hub: Hub, verified: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in verified.rglob("*")}
    shown = invoke("publish", str(verified), "me/model", "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    files = json.loads(shown.output.splitlines()[-1])["files"]
    assert {file["name"]: (file["size_bytes"], file["sha256"]) for file in files} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in visible(verified).items()
    }
    assert hub.asked == []
    assert {path: path.stat().st_mtime_ns for path in verified.rglob("*") if path.name != "lock"} == {
        path: when for path, when in before.items() if path.name != "lock"
    }
    table = invoke("publish", str(verified), "me/model", "--dry-run")
    assert "would be sent to" in table.output and "README.md" in table.output


def append(name: str) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        with (out / name).open("ab") as file:
            file.write(b" ")

    return change


def failing(out: Path) -> None:
    verdict = json.loads((out / "verify.json").read_text())
    (out / "verify.json").write_text(json.dumps(verdict | {"passed": False}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (append("config.json"), "config.json has changed since it was verified"),
        (append("model-00001-of-00003.safetensors"), "model-00001-of-00003.safetensors has changed"),
        (append("fourfold.json"), "fourfold.json has changed"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json was verified and is not there"),
        (lambda out: (out / "more.safetensors").touch(), "more.safetensors was not there when it was verified"),
        (lambda out: (out / "verify.json").unlink(), "there is no verify.json"),
        (failing, "a check failed"),
        (lambda out: (out / "README.md").unlink(), "`fourfold report"),
    ],
)
def test_what_verify_has_not_seen(hub: Hub, verified: Path, change: Callable[[Path], object], said: str) -> None:
    change(verified)
    assert said in refused(verified)
    assert hub.asked == []


def test_forced(hub: Hub, verified: Path) -> None:
    """The reason is in the card, below its front matter, as text; gone when it is verified again."""
    append("config.json")(verified)
    found = publish(verified, "me/model", force="<script>the\n *GPU* is on order")
    card = hub.branches["main"]["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n---\n<!-- fourfold: not verified -->\n> **Published without")
    assert r"&lt;script&gt;the \*GPU\* is on order" in card and card.endswith("\n# A release\n")
    assert found.unverified == ("config.json has changed since it was verified",)
    publish(verified, "me/model", force="another reason")
    assert hub.branches["main"]["README.md"].decode().count("Published without") == 1
    verify(verified)
    publish(verified, "me/model", force="of no use")
    assert hub.branches["main"]["README.md"].decode() == CARD


def test_the_hub_says_no(hub: Hub, verified: Path) -> None:
    hub.refuse = 403
    assert "may not write" in refused(verified)
    hub.refuse = 500
    assert "the Hub answered 500" in refused(verified)
    hub.refuse = 0
    hub.repos["me/model"].lose = "tokenizer.json"
    assert "tokenizer.json is not there after the upload" in refused(verified)
    assert hub.tags == {}


# --- what may be sent ---------------------------------------------------------------------------------------------


def test_only_what_fourfold_wrote(hub: Hub, verified: Path) -> None:
    wanted = visible(verified)
    (verified / "figures").mkdir()
    for name in ("secret.env", "chat.py", "serve-vllm.log", "notes.md", "figures/holiday.png"):
        (verified / name).write_text("mine")
    (verified / "figures" / "errors.png").write_bytes(b"ours")
    assert verify(verified).passed  # with them there
    found = publish(verified, "me/model")
    assert hub.branches["main"] == wanted | {
        "figures/errors.png": b"ours",
        "verify.json": (verified / "verify.json").read_bytes(),
    }
    assert found.skipped == ("chat.py", "figures/holiday.png", "notes.md", "secret.env", "serve-vllm.log")
    (verified / "secret.env").unlink()
    shown = invoke("publish", str(verified), "me/model", "--dry-run", "--include", "chat.py")
    said = " ".join(shown.output.split())
    assert shown.exit_code == 0 and "chat.py" in shown.output.split("not sent")[0], shown.output
    assert "did not write it: figures/holiday.png, notes.md, serve-vllm.log (--include FILE" in said
    (verified / "chat.py").write_text("altered")
    assert "chat.py has changed since it was verified" in refused(verified, include=["chat.py"])
    for name in ("nothing.md", "../altered/chat.py", ".fourfold/lock", "figures"):
        assert f"--include: got '{name}'" in refused(verified, include=[name])


@pytest.mark.parametrize("name", ["notes.md", "LICENSE", "figures/drift.png"])
def test_links_are_refused(hub: Hub, verified: Path, name: str) -> None:
    (verified / "figures").mkdir()
    (verified / name).unlink(missing_ok=True)
    (verified / name).symlink_to("/etc/passwd")
    assert f"{verified / name}: got a link to /etc/passwd, expected a file" in refused(verified, force="a test")
    assert hub.asked == []


@pytest.mark.parametrize("repo", ["x y", "me/no//name", "me/ünï", "model", "me/model.git", "a/b/c"])
def test_names_of_repositories(verified: Path, repo: str) -> None:
    done = invoke("publish", str(verified), repo, "--dry-run")
    assert done.exit_code == 2 and f"REPO: got '{repo}', expected org/name" in done.stderr, done.output


def test_a_card_for_another_repository(hub: Hub, verified: Path) -> None:
    (verified / "README.md").write_text(CARD + "tokenizer = AutoTokenizer.from_pretrained('me/tiny-int4')\n")
    said = refused(verified)
    assert "its commands are for 'me/tiny-int4', expected 'me/model'" in said
    assert said.endswith(f"fourfold report {verified} --repo me/model")
    (verified / "README.md").write_text(CARD + "tokenizer = AutoTokenizer.from_pretrained('me/model')\n")
    publish(verified, "me/model")


def test_what_is_there_already(hub: Hub, verified: Path) -> None:
    hub.repos["me/model"].branches = {"main": {"model-00001-of-00009.safetensors": b"of another release"}}
    assert "has 1 shards of another release on main" in refused(verified)
    hub.repos["me/model"].branches = {"main": {}}
    assert "expected a private one" in refused(verified, private=True)
    assert hub.branches == {"main": {}}


# --- what convert wrote as GGUF and for MLX -----------------------------------------------------------------------


def report(folder: Path, *options: str) -> str:
    done = invoke("report", str(folder), "--repo", "me/model", *options)
    assert done.exit_code == 0, done.output
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def licensed(shipped: dict[str, Path], altered: Altered) -> Path:
    """A release of a model of the Hub, under a licence."""
    out = altered(shipped["compressed-tensors"])
    state = json.loads((out / "fourfold.json").read_text())
    state["source"] |= {"hub": "org/base", "terms": {"license": "mit", "language": ["en"]}}
    (out / "fourfold.json").write_text(json.dumps(state))
    return out


@pytest.mark.parametrize(("form", "tag"), [("gguf", "llama.cpp"), ("mlx", "mlx")])
def test_an_export(hub: Hub, licensed: Path, tmp_path: Path, form: str, tag: str) -> None:
    new = tmp_path / "new"
    export(licensed, new, form)
    assert "no README.md" in refused(new)
    assert api.verify(new, source=licensed).passed
    text = report(new)
    (new / "stray.txt").write_text("mine")
    found = publish(new, "me/model", dry_run=True)
    assert hub.asked == [] and found.skipped == ("stray.txt",)
    found = publish(new, "me/model")
    files = visible(new)
    del files["stray.txt"]
    assert hub.branches["main"] == files and "LICENSE" in files and hub.tags == {found.tag: found.commit}
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = ModelCard(text).data.to_dict()
    assert (card["base_model"], card["base_model_relation"], card["license"]) == ("org/base", "quantized", "mit")
    assert card["library_name"] == form and {form, tag, "fourfold"} <= {*card["tags"]}
    assert card["pipeline_tag"] == {"gguf": "text-generation", "mlx": "image-text-to-text"}[form]
    command = {
        "gguf": "llama-server --model model/base-Q4_0.gguf --jinja --spec-type draft-mtp --spec-draft-n-max 2",
        "mlx": "mlx_vlm.server --model model",
    }[form]
    assert f"hf download me/model --local-dir model\n{command}\n" in text
    summary = json.loads((licensed / "metrics.json").read_text())["summary"]
    assert f"| mean KLD (nats) | {summary['kl_mean']:.5f} " in text and "| verified | passed: files, source |" in text
    for name, content in files.items():
        assert name in ("README.md", "verify.json", "conversion.json") or hashlib.sha256(content).hexdigest() in text


@pytest.mark.parametrize("name", ["conversion.json", "tokenizer.json", "model-00001-of-00003.safetensors"])
def test_an_export_that_changed(hub: Hub, licensed: Path, tmp_path: Path, name: str) -> None:
    new = tmp_path / "new"
    export(licensed, new, "mlx")
    report(new)
    assert "there is no verify.json" in refused(new)
    assert api.verify(new).passed
    assert "expected 'me/other'" in _refused_for(new, "me/other")
    append(name)(new)
    assert f"{name} has changed since it was verified" in refused(new)
    assert hub.asked == []


def _refused_for(new: Path, repo: str) -> str:
    with pytest.raises(FourfoldError) as raised:
        publish(new, repo)
    return str(raised.value)


def test_the_card_of_an_export_that_rounds(shipped: dict[str, Path], tmp_path: Path) -> None:
    """No figures of other weights; the base model and licence that its maker states."""
    new = tmp_path / "new"
    export(shipped["compressed-tensors"], new, "gguf", options=Options(rest="q8_0", mtp=False))
    text = report(new, "--base-model", "org/other", "--license", "apache-2.0")
    assert "Not measured." in text and "KLD" not in text and "matrices are rounded to q8" in text
    assert "| verified | no |" in text and "draft-mtp" not in text
    card = ModelCard(text).data.to_dict()
    assert (card["base_model"], card["license"]) == ("org/other", "apache-2.0")
    done = invoke("report", str(new), "--against", str(new))
    assert done.exit_code == 2 and "--against: got" in done.output


def test_what_is_sent_is_signed(hub: Hub, verified: Path, tmp_path: Path) -> None:
    """Also when it is published again; without a key the old signature would be of other files."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    (verified / "notes.txt").write_text("mine")
    shown = invoke("publish", str(verified), "me/model", "--sign", str(tmp_path / "key.pem"), "--dry-run")
    assert "model.sig, to be made with" in shown.output and not (verified / "model.sig").exists()
    for _ in range(2):
        publish(verified, "me/model", sign=str(tmp_path / "key.pem"))
        sent = hub.branches["main"]
        assert "model.sig" in sent and "notes.txt" not in sent
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for name, content in sent.items():
            (copy / name).write_bytes(content)
        assert signature.problems(copy, signature.Signer(key=tmp_path / "key.pub")) == []
    signed_by = ["--signature", str(tmp_path / "key.pub")]
    found = invoke("verify", str(copy), *signed_by)
    assert found.exit_code == 0 and "signature" in found.output, found.output
    (copy / "modeling.py").write_text("pass")
    assert invoke("verify", str(copy), *signed_by).exit_code == 1
    wrong = {"nowhere": "expected the file of a public key", "me@example.org": "--issuer"}
    for signer, said in wrong.items():
        shown = invoke("verify", str(copy), "--signature", signer)
        assert shown.exit_code == 2 and said in " ".join(shown.output.split()), shown.output
    assert invoke("verify", str(copy), "--issuer", "https://example.org").exit_code == 2
    assert verify(verified).passed and publish(verified, "me/other", dry_run=True).skipped == ("notes.txt",)
    assert "has model.sig on main, which is of other files" in refused(verified)
    assert "expected a private key" in refused(verified, sign=str(tmp_path / "key.pub"))
