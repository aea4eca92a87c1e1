"""Text that would be markup if it were not escaped, and the type of a fixture that puts it into a release's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Change = Callable[[str, Callable[[Any], None]], None]

# Each construct ends what a careless writer would have begun.
HOSTILE = (
    "x</script><img src=x onerror=alert(1)>|`**b**`[l](javascript:alert(1)) https://evil.example\n---\n"
    "license: mit\n# h {{ 7*7 }} \u202e"
)
