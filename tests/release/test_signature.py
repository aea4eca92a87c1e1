"""Signatures of releases by model-signing: what is signed, and that every change of it is found."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fourfold.datatypes import FourfoldError
from fourfold.release import signature
from fourfold.release.signature import Signer

PEM = serialization.Encoding.PEM
FILES = {"model-00001-of-00001.safetensors": b"weights", "config.json": b"{}", "figures/drift.png": b"picture"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem, locked.pem (password "open"), key.pub and another's other.pub."""
    folder = tmp_path_factory.mktemp("keys")
    own, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ways = {"key": serialization.NoEncryption(), "locked": serialization.BestAvailableEncryption(b"open")}
    for name, way in ways.items():
        (folder / f"{name}.pem").write_bytes(own.private_bytes(PEM, serialization.PrivateFormat.PKCS8, way))
    for name, key in {"key": own, "other": other}.items():
        public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def signed(keys: Path, tmp_path: Path) -> Path:
    out = tmp_path / "release"
    for name, content in {**FILES, "notes.txt": b"not published"}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    signature.sign(out, keys / "key.pem", ["notes.txt"])
    return out


def test_every_published_file_is_signed_by_its_sha256(signed: Path) -> None:
    bundle = json.loads((signed / "model.sig").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert {resource["name"] for resource in statement["predicate"]["resources"]} == FILES.keys()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda out: (out / "config.json").write_bytes(b"[]"), "config.json has changed since it was signed"),
    "a file more": (lambda out: (out / "modeling.py").write_text("x"), "modeling.py"),
    "a shard less": (lambda out: (out / "model-00001-of-00001.safetensors").unlink(), "model-00001"),
    "a file in a folder less": (lambda out: (out / "figures/drift.png").unlink(), "figures/drift.png"),
    "no signature": (lambda out: (out / "model.sig").unlink(), "never signed"),
    "no signature in it": (lambda out: (out / "model.sig").write_text("{}"), "model.sig is not this signer's"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found(signed: Path, keys: Path, change: str) -> None:
    signer = Signer(key=keys / "key.pub")
    assert signature.problems(signed, signer) == []
    make, said = CHANGES[change]
    make(signed)
    (problem,) = signature.problems(signed, signer)
    assert said in problem


def test_what_is_made_after_the_signature_does_not_matter(signed: Path, keys: Path) -> None:
    """What verify and huggingface_hub write, and git's."""
    for name in ("verify.json", ".cache/huggingface/download", ".fourfold/lock", ".gitattributes"):
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_text("later")
    assert signature.problems(signed, Signer(key=keys / "key.pub")) == []


def test_another_key_is_no_proof(signed: Path, keys: Path) -> None:
    (problem,) = signature.problems(signed, Signer(key=keys / "other.pub"))
    assert "does not match" in problem


def test_a_password_comes_from_the_environment(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FourfoldError, match="its password in FOURFOLD_SIGN_PASSWORD"):
        signature.check_signing(keys / "locked.pem")
    monkeypatch.setenv("FOURFOLD_SIGN_PASSWORD", "open")
    signature.sign(signed, keys / "locked.pem", ["notes.txt"])
    assert signature.problems(signed, Signer(key=keys / "key.pub")) == []


@pytest.mark.parametrize("name", ["nowhere.pem", "key.pub", "text.pem"])
def test_a_file_that_is_no_key_is_one_error(signed: Path, keys: Path, name: str) -> None:
    (keys / "text.pem").write_text("no key")
    with pytest.raises(FourfoldError, match=f"--sign: .*{name}.*expected a private key of an elliptic curve"):
        signature.check_signing(keys / name)
    if name != "key.pub":
        with pytest.raises(FourfoldError, match=f"--signature: .*{name}"):
            signature.problems(signed, Signer(key=keys / name))


def test_a_missing_package_is_named(keys: Path) -> None:
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from pathlib import Path; from fourfold.release.signature import check_signing\n"
        f"check_signing(Path({str(keys / 'key.pem')!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "--sign needs model-signing, which is not installed. Try: pip install" in ran.stderr
