"""A release's signature in OpenSSF's model-signing format: every file by its sha256, signed with a key or keyless.

It covers all that is published but verify.json, which every `fourfold verify` writes anew. docs/releases.md.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError
from fourfold.install import pip_install
from fourfold.quantize.journal import STATE
from fourfold.release import contents

KEYLESS = "keyless"
PASSWORD = "FOURFOLD_SIGN_PASSWORD"  # environment variable
CHANGED = re.compile("Hash mismatch for '(.*?)': Expected .*")  # of model-signing's message
UNSIGNED = (
    contents.SIGNATURE,
    contents.VERDICT,
    STATE,
    ".cache",
)  # .cache: where huggingface_hub downloads to a folder


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Whose signature is expected. key: file of a public key; identity, issuer: of a keyless signature."""

    key: Path | None = None
    identity: str = ""
    issuer: str = ""

    def __str__(self) -> str:
        return str(self.key) if self.key else f"{self.identity} by {self.issuer}"


def find_signer(signature: str, issuer: str) -> Signer | None:
    """Return the signer of --signature: of a public key's file, or by identity and issuer. None where it is not given.

    Raises FourfoldError for half of it, a file that is not there, and without model-signing.
    """
    if not signature and not issuer:
        return None
    if not signature:
        raise FourfoldError("--issuer is of use with --signature IDENTITY only; wanted both, or neither")
    _library("verifying", "--signature")
    if issuer:
        return Signer(identity=signature, issuer=issuer)
    if not Path(signature).is_file():
        keyless = "an identity with --issuer, as of a keyless signature"
        raise FourfoldError(f"--signature: got {signature!r}, expected the file of a public key, or {keyless}")
    return Signer(key=Path(signature))


def check_signing(key: Path | None) -> None:
    """Raise FourfoldError where `sign` could not sign: without model-signing, with a file that is no private key."""
    _signing_config(key)


def sign(out: Path, key: Path | None, without: Iterable[str]) -> None:
    """Write the signature of OUT's files. without: those that are not published.

    key: a private one (PEM, elliptic curve); None for Sigstore's keyless way, which opens a browser or takes a CI job's
    identity.

    Raises FourfoldError if it cannot be signed.
    """
    config = _signing_config(key).set_hashing_config(_hashing([*UNSIGNED, *without]))
    path = out / contents.SIGNATURE
    try:
        config.sign(out, path)
    except Exception as error:  # noqa: BLE001 - sigstore, its HTTP library and cryptography raise what they like
        path.unlink(missing_ok=True)
        raise FourfoldError(f"{out}: not signed: {_reason(error)}") from None


def problems(out: Path, signer: Signer) -> list[str]:
    """What of OUT's files is not as the signer signed it. Raises FourfoldError for a public key that cannot be read."""
    verifying = _library("verifying", "--signature")
    if not (out / contents.SIGNATURE).is_file():
        return [f"there is no {contents.SIGNATURE}: it was never signed"]
    config = verifying.Config().set_hashing_config(_hashing(UNSIGNED))
    try:
        if signer.key is None:
            config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)
        else:
            config.use_elliptic_key_verifier(public_key=signer.key)
    except Exception as error:  # noqa: BLE001 - as in `sign`
        raise FourfoldError(f"--signature: {signer}: {_reason(error)}") from None
    try:
        config.verify(out, out / contents.SIGNATURE)
    except Exception as error:  # noqa: BLE001 - as in `sign`
        return [CHANGED.sub(r"\1 has changed since it was signed", said) for said in _differences(_reason(error))]
    return []


def _differences(said: str) -> list[str]:
    """model-signing's message, one for each kind of difference."""
    listed = said.removeprefix("Signature mismatch: ")
    if listed == said:
        return [f"{contents.SIGNATURE} is not this signer's: {said}"]
    found: list[str] = ast.literal_eval(listed)
    return found


def _signing_config(key: Path | None) -> Any:
    config = _library("signing", "--sign").Config()
    if key is None:
        return config.use_sigstore_signer(use_ambient_credentials="CI" in os.environ)
    try:
        return config.use_elliptic_key_signer(private_key=key, password=os.environb.get(PASSWORD.encode()))
    except Exception as error:  # noqa: BLE001 - as in `sign`
        expected = f"expected a private key of an elliptic curve as PEM (its password in {PASSWORD})"
        raise FourfoldError(f"--sign: {key}: {_reason(error)}; {expected}") from None


def _hashing(without: Iterable[str]) -> Any:
    hashing = _library("hashing", "--signature")
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=without)


def _library(module: str, option: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError:
        raise FourfoldError(
            f"{option} needs model-signing, which is not installed. Try: {pip_install('sign')}"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
