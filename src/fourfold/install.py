"""How to install fourfold: from where pip had it here. The one place that knows, as it is on no index yet."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from importlib.util import find_spec
from typing import Any

from fourfold.datatypes import FourfoldError

NAME = "fourfold"
EXTRAS = {"report": "vl_convert", "gguf": "gguf", "sign": "model_signing", "tasks": "lm_eval"}  # what is imported of it


def require_extra(extra: str, command: str) -> None:
    """Raise FourfoldError, with what installs it, if an extra that a command needs is not there."""
    if find_spec(EXTRAS[extra]) is None:
        raise FourfoldError(f"{command} needs {EXTRAS[extra]}. Try: {pip_install(extra)}")


def pip_install(extra: str = "", option: str = "") -> str:
    """The command that installs this fourfold again on this machine, with an extra or an option of pip's."""
    requirement = NAME + (f"[{extra}]" if extra else "")
    if url := _url(_origin()):
        requirement += f" @ {url}"
    return " ".join(filter(None, ["pip install", option, shlex.quote(requirement)]))


def public_install(version: str) -> str:
    """The command for readers elsewhere: from the index, the repository that it came from, or that of its metadata.

    A comment where none of them is known: a folder or a file of this machine helps nobody.
    """
    origin = _origin()
    if origin is None:
        return f"pip install {NAME}=={version}"
    url = _url(origin) if "vcs_info" in origin else _repository()
    return f"pip install {shlex.quote(url)}" if url else f"# fourfold {version}"


def _origin() -> dict[str, Any] | None:
    """What pip recorded of where fourfold came from (PEP 610); None for an index."""
    try:
        recorded = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return {}
    return dict(json.loads(recorded)) if recorded else None


def _url(origin: dict[str, Any] | None) -> str:
    url = str((origin or {}).get("url", ""))
    if commit := (origin or {}).get("vcs_info"):
        return f"{commit['vcs']}+{url}@{commit['commit_id']}"
    return url


def _repository() -> str:
    """`Repository` of pyproject.toml's project.urls, as pip takes it; "" if there is none."""
    try:
        urls = importlib.metadata.metadata(NAME).get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    named = dict(entry.split(", ", 1) for entry in urls)
    return f"git+{named['Repository']}" if "Repository" in named else ""
