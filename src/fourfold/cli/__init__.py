"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from fourfold.cli.app import main, script

__all__ = ["main", "script"]
