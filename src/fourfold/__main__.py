"""`python -m fourfold`."""

from fourfold.cli import script

script()
