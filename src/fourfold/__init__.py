"""fourfold: a BF16 Mixture-of-Experts checkpoint in, a published int4 release out."""

# First the room of that name, which is empty: a package takes its name here when it is loaded, and would take it from
# the function later. What is in the room is reached by `from fourfold.quantize.run import ...`.
import fourfold.quantize  # noqa: F401
from fourfold.api import evaluate, plan, quantize, verify
from fourfold.datatypes import Event, FourfoldError

__all__ = ["Event", "FourfoldError", "__version__", "evaluate", "plan", "quantize", "verify"]
__version__ = "0.1.0"
