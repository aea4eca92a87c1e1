"""The application: its commands, its help, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from inspect import getdoc
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console, ConsoleOptions

from fourfold import __version__
from fourfold.cli import errors
from fourfold.cli.commands import recipe
from fourfold.cli.commands.pipeline import doctor, release
from fourfold.cli.commands.quantize import evaluate, plan, quantize, verify
from fourfold.cli.commands.recipe import list_recipes, show_recipe
from fourfold.cli.commands.release import compare, convert, inspect, publish, report
from fourfold.cli.commands.serve import bench, serve
from fourfold.cli.console import open_console, paragraphs, say
from fourfold.datatypes import FourfoldError, system_fault

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel, InlineText

Command = Callable[..., int | None]
Shell = Literal["bash", "zsh", "fish"]
COMMANDS: tuple[Command, ...] = (
    plan, quantize, evaluate, verify, report, serve, bench, inspect, convert, compare, publish, release,
    doctor,
)  # fmt: skip
LABEL_WIDTH = 26  # columns: a longer label has a line of its own
EXIT_CODES = textwrap.fill(errors.EXIT_CODES, 79)
DESCRIPTION = """Quantize Mixture-of-Experts models to int4 (W4A16, GPTQ) for vLLM, SGLang, llama.cpp and MLX.

Every routed expert is quantized with GPTQ, one layer at a time; all other tensors are copied bit for bit. At the end
the release's perplexity and KL divergence on held-out text are reported.

Examples:
    fourfold plan Qwen/Qwen3.6-35B-A3B
    fourfold quantize Qwen/Qwen3.6-35B-A3B ./release --devices cuda:0
    fourfold verify ./release --source Qwen/Qwen3.6-35B-A3B
"""


class HelpText:
    """Help as plain text in two columns."""

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        console.print(f"Usage: {str(usage).strip().replace('[ARGS...]', '[-- WORDS]')}")

    def render_description(self, console: Console, options: ConsoleOptions, description: InlineText) -> None:
        for paragraph in str(description.primary_renderable).split("\n\n"):
            console.print()
            console.print(textwrap.fill(" ".join(paragraph.split()), console.width, break_on_hyphens=False))

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        rows = [(", ".join(entry.display_labels_with_metavar), help_of(entry)) for entry in panel.entries]
        width = min(max((len(label) for label, _ in rows), default=0), LABEL_WIDTH)
        console.print(f"\n{panel.title}:" if rows else "", end="\n" if rows else "")
        for label, text in rows:
            first, *rest = textwrap.wrap(text, max(console.width - width - 4, 20), break_on_hyphens=False) or [""]
            lines = [f"{label:{width}}  {first}"] if len(label) <= width else [label, f"{'':{width}}  {first}"]
            console.print("\n".join(f"  {line}" for line in (*lines, *(f"{'':{width}}  {line}" for line in rest))))


def help_of(entry: HelpEntry) -> str:
    """Help of an option or command, with its choices and its default."""
    parts = [" ".join(str(entry.description.primary_renderable).split())]
    if entry.choices:
        parts.append(f"One of {', '.join(entry.choices)}.")
    if entry.default not in (None, "False", '""', "()") and not entry.negative_names:
        parts.append(f"[default: {entry.default}]")
    if entry.required and not entry.positional_label:
        parts.append("[required]")
    return " ".join(parts)


def texts(docstring: str | None) -> dict[str, Any]:
    """Return a command's help above its options (the description) and below them (examples and exit codes)."""
    description, _, rest = (docstring or "").partition("\n\nExamples:\n")
    examples = [f"  {line.strip()}" for line in rest.strip().splitlines()]
    return {
        "help": description.partition("\n\nArgs:\n")[0],
        "help_epilogue": "\n".join(["Examples:", *examples, "", EXIT_CODES]),
    }


app = App(
    name="fourfold",
    version=f"fourfold {__version__}",
    version_flags=["--version"],
    **texts(DESCRIPTION),
    help_format="plaintext",
    help_formatter=HelpText(),
    default_parameter=Parameter(negative=(), allow_repeating=True),  # the last one counts
    group_parameters=Group("Options", sort_key=8),
    console=Console(markup=False, emoji=False, highlight=False, soft_wrap=True),  # what wraps, HelpText wraps
)
for place, command in enumerate(COMMANDS):
    app.command(command, sort_key=place, **texts(getdoc(command)))
recipe_app = App(name="recipe", sort_key=len(COMMANDS), **texts(getdoc(recipe)))
recipe_app.command(list_recipes, name="list", **texts(getdoc(list_recipes)))
recipe_app.command(show_recipe, name="show", **texts(getdoc(show_recipe)))
app.command(recipe_app)


@app.command(name="--install-completion", group="Options")
def install_completion(shell: Shell | None = None, /) -> None:
    """Install completion for the current shell, or for bash, zsh or fish."""
    print(f"{app.install_completion(shell=shell or _current_shell())}: restart the shell to use it")


@app.command(name="--show-completion", group="Options")
def show_completion(shell: Shell | None = None, /) -> None:
    """Print the completion script of the current shell, or of bash, zsh or fish."""
    print(app.generate_completion(shell=shell or _current_shell()))


def _current_shell() -> Shell | Literal["powershell"]:
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    try:
        return detect_shell()
    except ShellDetectionError:
        raise FourfoldError("current shell: got none that is known. Name it, as in --show-completion bash") from None


for flag, text in (("--help", "Show this message."), ("--version", "Print the version.")):
    app[flag].group, app[flag].help = "Options", text


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code. A bug of ours is reported and raised."""
    console = open_console(stderr=True)
    before = signal.signal(signal.SIGTERM, errors.terminate)
    try:
        function, bound, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
        code = function(*bound.args, **bound.kwargs) or 0
        sys.stdout.flush()
        lacks_command = function == app.help_print and not {"-h", "--help"} & {*arguments}
        return errors.BAD_INPUT if lacks_command else code
    except CycloptsError as error:
        say(console, f"Error: {paragraphs(errors.usage_error(error))}", "red")
        return errors.BAD_INPUT
    except FourfoldError as error:
        say(console, f"Error: {paragraphs(error)}", "red")
        return errors.BAD_INPUT
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, errors.Terminated)
        say(console, " ".join(["Terminated." if terminated else "Interrupted.", *getattr(stopped, "__notes__", ())]))
        return errors.TERMINATED if terminated else errors.INTERRUPTED
    except BrokenPipeError:  # as of `| head`: the rest has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.CHECK_FAILED
    except Exception as error:
        if said := system_fault(error):
            say(console, f"Error: {paragraphs(said)}", "red")
            return errors.BAD_INPUT
        notes = " ".join(getattr(error, "__notes__", ()))
        say(console, f"Error: {type(error).__name__}: this is a bug in fourfold. {notes}".rstrip(), "red")
        say(console, "Please report it with the traceback below.", "red")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def script() -> NoReturn:
    """The console script. A run that was stopped leaves at once, without messages from native libraries' threads."""
    # transformers' hints about optional CUDA kernels would cut through a progress bar; errors are still raised.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    code = main(sys.argv[1:])
    if code in (errors.INTERRUPTED, errors.TERMINATED):  # all has been cleaned up; workers may still be in a kernel
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
