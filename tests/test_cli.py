"""The command line: its surface, its first mistakes, its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from cyclopts.completion.detect import ShellDetectionError

import checkpoints
import families
from command_line import Answer, commands, invoke
from fourfold import __version__
from fourfold.cli import options
from fourfold.cli.commands import serve
from fourfold.cli.options import RecipeOptions
from fourfold.datatypes import Event, FourfoldError
from fourfold.distributed.devices import Machine
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.results import Metrics, TextFacts
from fourfold.release.evaluate import Protocol
from fourfold.release.suite import Servers

HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "safetensors", "numpy", "numba", "llvmlite", "pyarrow",
         "psutil", "httpx2", "jinja2", "vl_convert", "triton")  # fmt: skip
MODULES = 420
CONFIG = '{"model_type": "qwen3_moe", "num_experts": 8}'  # all that is read of a model before torch is there
SMALL = ["calibration.length=32", "heldout.length=32", "heldout.windows=1", "solver.pool_rows=64"]


def environment() -> dict[str, str]:
    """Of a child: no terminal, a fixed width."""
    return {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def fourfold(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fourfold", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=300)


def surface() -> str:
    """Every command with the first line of its help, every argument and option with what it is by default."""
    lines = []
    for name, command, arguments in commands():
        lines.append(f"{name}: {command.help.partition(chr(10))[0]}")
        flags = [flag for flag in command if flag.startswith("-")] if name == "fourfold" else []
        lines += [f"    {flag}: {command[flag].help}" for flag in flags]
        for argument in arguments:
            value = "|".join(argument.get_choices() or ()) or argument.parameter.metavar or ""
            default = "required" if argument.required else f"default {argument.field_info.default!r}"
            help = " ".join((argument.parameter.help or "").split())
            lines.append(f"    {' '.join([', '.join(argument.names), value]).strip()} ({default}): {help}")
    return "\n".join(lines) + "\n"


def test_surface(golden: Callable[[str, str], None]) -> None:
    golden("cli.txt", surface())


def test_every_option_has_help() -> None:
    assert [line for line in surface().splitlines() if line.endswith(": ")] == []


@pytest.mark.parametrize("name", [name for name, *_ in commands()])
def test_help_has_an_example_that_names_the_command(name: str) -> None:
    shown = invoke(*name.split()[1:], "--help")
    assert shown.exit_code == 0
    example = shown.output.partition("Example")[2]
    assert name in example
    assert "Exit codes: 0 done" in example


def test_examples_of_help_use_options_that_exist() -> None:
    for name, command, arguments in commands():
        known = {option for argument in arguments for option in argument.names}
        for line in (command.help_epilogue or "").splitlines():
            if line.strip().startswith(name + " ") and command.default_command:
                used = {word for word in line.partition(" -- ")[0].split() if word.startswith("--")}
                assert used <= known, f"{name}: {line}"


def modules_after(code: str) -> list[str]:
    """Names of all modules that a fresh Python has loaded when it has run the code."""
    code += "\nimport sys; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    return child.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["recipe", "list"]])
def test_start_up_waits_for_no_heavy_import(arguments: list[str]) -> None:
    """Modules are counted, not seconds: those stand for the seconds, and are the same on every machine."""
    loaded = modules_after(f"from fourfold.cli import main\nmain({arguments})")
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    assert len(loaded) < MODULES, "more modules than cyclopts, Rich, tomli-w and fourfold's own edge need"


TORCH_FREE = """
import contextlib, io, json, sys
from fourfold.cli import main
for arguments in json.load(sys.stdin):
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        code = main(arguments)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([code, shown.getvalue() + said.getvalue(), loaded]))
"""


def answers(calls: list[list[str]], folder: Path) -> list[tuple[int, str, list[str]]]:
    """What one fresh Python answers to commands, one by one: exit code, what it says, the big libraries it loaded."""
    command, text = [sys.executable, "-c", TORCH_FREE], json.dumps(calls)
    child = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment(), check=True, cwd=folder
    )
    return [tuple(json.loads(line)) for line in child.stdout.splitlines()]


MISTAKES = [  # in the folder of `mistakes`, where "model" could be quantized and "done" is a finished release
    ("plan nowhere", "no such folder"),
    ("plan model/config.json", "a file; expected the folder"),
    ("plan empty", "no config.json"),
    ("plan dense", "a dense model"),
    ("plan unnamed", "expected the name of an architecture"),
    ("plan quantized", "already quantized"),
    ("plan gguf", "GGUF"),
    ("plan lora", "a LoRA adapter of 'a/b'"),
    ("plan model --machine rtx4091", "--machine: got 'rtx4091', expected one of 3060, 3090, "),
    ("plan model --devices tpu", "device 'tpu'"),
    ("plan model --recipe bset", "Did you mean 'best'?"),
    ("plan model --set solver.pases=3", "--set solver.pases=3: unknown key 'solver.pases'. Did you mean"),
    ("plan model --calibration c7.csv", "--calibration c7.csv: got .csv, expected one of .jsonl, .txt, .parquet"),
    ("plan model --calibration short.txt", "short.txt: got at most 6 tokens, expected 262,144 (256 samples of 1,024)"),
    ("plan model --calibration seven.jsonl", "line 1: field 'text' is of type int"),
    ("plan model --calibration latin.txt", "not UTF-8 text"),
    ("plan model --samples 4000", "general, chat, code, math: got "),
    ("plan model --out /sys/x", "OUT cannot be written"),
    ("quantize nowhere out", "no such folder"),
    ("quantize dense out", "a dense model"),
    ("quantize model model", "OUT is the MODEL folder itself"),
    ("quantize model model/out", "OUT is inside MODEL"),
    ("quantize model c7.csv", "OUT is a file"),
    ("quantize model dense", "OUT is not empty"),
    ("quantize model /sys/x", "OUT cannot be written"),
    ("evaluate nowhere --source model", "no such folder"),
    ("evaluate unfinished --source model", "not finished. Rerun the same `fourfold quantize` command to resume"),
    ("evaluate trial --source model", "partial, a trial on layers 0-1"),
    ("evaluate done --source dense", "a dense model"),
    ("evaluate done --source model --against unfinished", "not finished"),
    ("verify nowhere", "no such folder"),
    ("verify unfinished", "not finished"),
    ("verify model", "no release of fourfold"),
    ("verify done --source lora", "a LoRA adapter"),
    ("verify done --load 1 --engine vllm", "--load: got 1, expected an even number from 2 to 256"),
    ("verify done --load 16", "--load: got no --engine, expected --engine vllm, or a running server"),
    ("verify done --load 16 --engine sglang", "--load: got --engine sglang, expected --engine vllm"),
    ("verify http://localhost:1 --load 15", "--load: got 15, expected an even number"),
    ("verify http://localhost:1", "got no --load, expected --load N alone"),
    ("report unfinished", "not finished"),
    ("report done --against nowhere", "no such folder"),
    ("convert nowhere new --format gptq", "no such folder"),
    ("convert unfinished new --format gptq", "not finished"),
    ("convert dense new --format gptq", "a dense model"),
    ("convert done done/new --format gptq", "NEW is inside OUT"),
    ("convert done dense --format gptq", "NEW is not empty"),
    ("serve nowhere --engine vllm --print", "no such folder"),
    ("serve unfinished --engine vllm", "not finished"),
    ("serve unnamed --engine sglang --print", "expected the name of an architecture"),
    ("inspect nowhere", "no such folder"),
    ("inspect unfinished", "not finished"),
    ("inspect lora", "a LoRA adapter"),
    ("compare model nowhere", "no such folder"),
    ("publish nowhere me/x", "no such folder"),
    ("publish done me/x", "no README.md"),
    ("publish done x/y/z", "REPO"),
    ("report done --repo x/y/z", "--repo"),
    ("compare empty model", "no config.json"),
]


STATE = {  # fourfold.json of a finished release, all that must be in it
    "fourfold": __version__, "partial": False, "layers": "0-1", "recipe": "best", "format": "gptq", "projections": 0,
    "identity": {"recipe": "", "source": "", "calibration": "", "heldout": "", "layers": "0-1", "parts": {}},
    "source": {"headers": "", "content": ""}, "output": {"content": "", "shards": {}, "tensor_bytes": 0},
    "calibration": {"rows": 0, "length": 0, "sources": [], "notes": []}, "source_tensor_bytes": 1, "workers": [],
    "finished_at": "", "metrics": {}, "devices": {}, "versions": {}, "methods": {}, "seconds": {},
    "peak_memory_bytes": {},
}  # fmt: skip


@pytest.fixture
def mistakes(tmp_path: Path) -> Path:
    quantized = {"model_type": "qwen3_moe", "num_experts": 8, "quantization_config": {"quant_method": "awq"}}
    files = {
        "model/config.json": CONFIG,
        "empty/notes.txt": "",
        "dense/config.json": '{"model_type": "llama"}',
        "unnamed/config.json": '{"num_local_experts": 8}',
        "quantized/config.json": json.dumps(quantized),
        "gguf/model.gguf": "",
        "lora/adapter_config.json": '{"base_model_name_or_path": "a/b"}',
        "unfinished/.fourfold/run.json": "{}",
        "trial/fourfold.json": json.dumps(STATE | {"partial": True}),
        "done/fourfold.json": json.dumps(STATE),
        "done/config.json": json.dumps(quantized),
        "c7.csv": "a,b",
        "short.txt": "a few",
        "seven.jsonl": '{"text": 7}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    return tmp_path


def test_a_mistake_in_arguments_paths_or_config_is_found_before_torch_is_imported(mistakes: Path) -> None:
    before = sorted(mistakes.rglob("*"))
    found = answers([line.split() for line, _ in MISTAKES], mistakes)
    for (line, said), (code, stderr, loaded) in zip(MISTAKES, found, strict=True):
        assert (code, loaded) == (2, []), f"{line}: {stderr}"
        assert said in stderr, line
        assert len(stderr.strip().splitlines()) <= 3, line
    assert sorted(mistakes.rglob("*")) == before


def test_help_is_not_cut_at_80_columns() -> None:
    for name, command, _ in list(commands())[1:]:
        assert len(command.help.partition("\n")[0].rstrip(".")) < 60, name
    command, narrow = [sys.executable, "-m", "fourfold", "--help"], environment() | {"COLUMNS": "80"}
    child = subprocess.run(command, capture_output=True, text=True, env=narrow, check=True)
    summaries = child.stdout.partition("Commands:")[2].partition("Options:")[0]
    assert len(summaries.strip().splitlines()) == 14
    assert "..." not in summaries and max(map(len, child.stdout.splitlines())) <= 80


def test_no_word_follows_the_message_of_an_interrupted_run() -> None:
    """What threads of native libraries have to say when Python ends under them is left out, with all of its end."""
    code = (
        "import atexit, sys\nfrom fourfold.cli import app, script\n"
        "def stopped(arguments): print('Terminated.'); return 143\n"
        "atexit.register(print, 'terminate called without an active exception')\n"
        "sys.modules['fourfold.cli.app'].main = stopped\nscript()"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert (child.returncode, child.stdout) == (143, "Terminated.\n")


def test_version() -> None:
    shown = fourfold("--version")
    assert (shown.returncode, shown.stdout) == (0, f"fourfold {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize"], "Missing argument 'MODEL'"),
        (["quantize", "model"], "Missing argument 'OUT'"),
        (["quantise", "model", "out"], "No such command: 'quantise'. Did you mean 'quantize'?"),
        (["quantize", "model", "out", "--recipe", "bset"], "Did you mean 'best'?"),
        (["quantize", "model", "out", "--set", "solver.dam=0.1"], "solver.damp"),
        (["quantize", "model", "out", "--set", "solver.damp"], "--set solver.damp: expected KEY=VALUE"),
        (["quantize", "model", "out", "--layers", "some"], "got 'some', expected a first and a last layer"),
        (["quantize", "model", "out", "--layers", "3-1"], "Did you mean 1-3?"),
        (["quantize", "model", "out", "--layers", "-1"], "--layers"),
        (["quantize", "model", "out", "--memory", "lots"], "got 'lots', expected a number with a unit, as in 8GiB"),
        (["quantize", "model", "out", "--memory", "0GiB"], "got '0GiB', expected more than nothing"),
        (["quantize", "model", "out", "--devices", "cpu,cuda:0"], "cuda:0"),
        (["quantize", "model", "out", "--memory", "gpu=8GiB"], "gpu=8GiB: expected cuda=SIZE"),
        (["quantize", "model", "out", "--memory", "host=8GiB"], "cuda=SIZE or cpu=SIZE"),
        (["quantize", "model", "out", "--calibration", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["recipe", "show", "fats"], "Did you mean 'fast'?"),
        (["quantize", "model", "out", "--recipie", "best"], "No such option: '--recipie'. Did you mean '--recipe'?"),
        (["quantize", "model", "out", "--memory", "8"], "got '8', expected a number with a unit, as in 8GiB"),
        (["convert", "out", "new", "--format", "awq"], "got 'awq', expected one of compressed-tensors, gptq, gptq_v2"),
        (["convert", "out", "new", "--format", "gtpq"], "Did you mean 'gptq'?"),
        (["evaluate", "out", "--source", "m", "--length", "1"], "got '1', expected a whole number, at least 2"),
        (["plan", "model", "--samples", "many"], "got 'many', expected a whole number, at least 1"),
        (["bench", "http://localhost:1", "--temperature", "9"], "got '9', expected a number from 0 to 2"),
        (["quantize", "model", "out", "more"], "Unexpected argument: 'more'"),
        (["quantize", "model", "out", "--layers"], "--layers: got no value"),
        (["evaluate", "out"], "--source: got none, expected the checkpoint that OUT was made from, or a server: --url"),
        (["verify", "out", "--engine", "vlm"], "got 'vlm', expected one of vllm, sglang, llama.cpp, mlx. Did you mean"),
        (["--verion"], "No such option: '--verion'. Did you mean '--version'?"),
        (["recipe", "shw"], "No such command: 'shw'. Did you mean 'show'?"),
    ],
)
def test_first_mistakes(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answered = fourfold(*arguments)
    assert answered.returncode == 2
    assert said in answered.stderr
    assert answered.stdout == ""
    assert "Traceback" not in answered.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["recipe"]])
def test_no_command_shows_the_help(words: list[str]) -> None:
    shown = invoke(*words)
    assert (shown.exit_code, shown.stdout) == (2, invoke(*words, "--help").stdout)
    assert "Commands:" in shown.stdout


def test_an_error_of_usage_is_one_line_that_says_where_to_read_on() -> None:
    shown = invoke("recipe", "show")
    expected = "Error: Missing argument 'NAME|FILE'. Run `fourfold recipe show --help` for usage.\n"
    assert (shown.exit_code, shown.stdout, shown.stderr) == (2, "", expected)


def test_a_reader_that_leaves_is_no_error() -> None:
    """As of `fourfold recipe show best | head -0`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fourfold", "recipe", "show", "best"]
    child = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    os.close(write)
    assert (child.returncode, child.stderr) == (1, "")


def test_completion_knows_commands_options_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = invoke("--show-completion", "zsh")
    assert shown.exit_code == 0
    for word in ("quantize", "--sequence-length", "compressed-tensors"):
        assert word in shown.stdout
    assert invoke("--show-completion", "csh").stderr.startswith("Error: SHELL: got 'csh', expected one of bash, zsh, ")

    def detect() -> str:
        raise ShellDetectionError

    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", detect)
    unknown = invoke("--install-completion")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "Name it, as in --show-completion bash" in unknown.stderr


def test_model_that_is_not_there(tmp_path: Path) -> None:
    answered = invoke("quantize", tmp_path / "[bold]nowhere", tmp_path / "out")
    assert answered.exit_code == 2
    assert answered.stderr.startswith("Error: ")
    assert "[bold]nowhere" in answered.stderr  # no markup is read in a user's text
    assert "no such folder" in answered.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("8GB", 8 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("7kb", 7_000),
    ],
)
def test_size(text: str, size: int) -> None:
    assert options.read_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8QiB", "-1GiB", "8GiBB", "1e9", "8i", "8iB", "8", "8000000000", "7b"])
def test_size_refused(text: str) -> None:
    with pytest.raises(ValueError):
        options.read_size(text)


def test_ranks() -> None:
    assert (serve.read_ranks("4"), serve.read_ranks("auto")) == (4, None)
    for text in ("0", "-1", "all", "\u0664"):
        with pytest.raises(ValueError):
            serve.read_ranks(text)


def test_levels() -> None:
    assert serve.read_levels("1,4,16,4") == (1, 4, 16)


def test_layers() -> None:
    assert options.read_layers("0-3") == range(4)
    assert options.read_layers("7") == range(7, 8)
    assert options.read_layers("7-7") == range(7, 8)


# --- a calibration file ------------------------------------------------------------------------------------------


def test_calibration_file_takes_the_place_of_all_sources(tmp_path: Path) -> None:
    file = tmp_path / 'talk "one".jsonl'
    file.write_text('\n{"messages": [{"role": "user", "content": "hello"}], "text": "unused"}\n')
    chosen = RecipeOptions(overrides=("calibration.sources.0.rows=3", "calibration.seed=7"), calibration=file).load()
    (source,) = chosen.calibration.sources
    rows = [source.rows for source in load_recipe("best").calibration.sources]
    assert (source.path, source.kind, source.fields) == (str(file), "chat", ("messages",))
    assert source.rows == sum(rows[1:]) + 3
    assert chosen.calibration.seed == 7


def test_format_and_tensor_parallel_change_the_recipe() -> None:
    chosen = RecipeOptions(recipe="fast", format="gptq", tensor_parallel=2).load()
    assert (chosen.name, chosen.format, chosen.scheme.tensor_parallel) == ("fast", "gptq", 2)


def test_calibration_file_of_plain_text(tmp_path: Path) -> None:
    for name in ("plain.txt", "lines.jsonl"):
        (tmp_path / name).write_text('{"text": "a line"}\n')
        assert options.text_kind(tmp_path / name) == ("text", "text")


def test_calibration_file_of_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"messages": [[{"role": "user", "content": "hello"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert options.text_kind(tmp_path / "t.parquet") == ("chat", "messages")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("other.jsonl", '{"prompt": "a", "answer": "b"}', "prompt, answer"),
        ("bad.jsonl", "{", "cannot be read as .jsonl"),
        ("list.jsonl", "[1]", "(none)"),
        ("empty.jsonl", "", "(none)"),
        ("bad.parquet", "no", "cannot be read as .parquet"),
        ("book.pdf", "%PDF", ".jsonl, .txt, .parquet"),
    ],
)
def test_calibration_file_refused(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FourfoldError) as refused:
        RecipeOptions(calibration=tmp_path / name).load()
    assert said in str(refused.value)


# --- quantize, with the work itself stubbed ----------------------------------------------------------------------


class Work:
    """Stands for quantize.run: remembers what it was called with and does what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raises: BaseException | None = None
        self.called: dict[str, Any] = {}
        run = types.SimpleNamespace(quantize=self)
        monkeypatch.setitem(sys.modules, "fourfold.quantize.run", run)

    def __call__(self, model: Path, out: Path, recipe: Recipe, *, progress: Any, **options: Any) -> Any:
        self.called = {"model": model, "out": out, "recipe": recipe, **options}
        progress(Event(kind="note", text="a [bold]note[/bold]"))
        progress(Event(kind="stage", stage="read", layer=0, layers=2))
        progress(Event(kind="layer", layer=0, layers=2, data={"hidden_error": 0.5, "router_agreement": None}))
        if self.raises is not None:
            raise self.raises
        figures = {
            "out": str(out),
            "partial": True,
            "projections": 6,
            "methods": {"gptq": 6},
            "tokens_per_input": {},
            "bytes_before": 10**9,
            "bytes_after": 10**8,
            "metrics": {},
            "seconds": {"solve": 1.0},
            "peak_memory_bytes": {"host": 10**6},
            "planned_memory_bytes": {"host": 10**6},
            "workers": (),
            "notes": (),
        }
        return types.SimpleNamespace(**figures, to_json=lambda: figures)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def run_quantize(tmp_path: Path, *options: str) -> Answer:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(CONFIG)
    return invoke("quantize", tmp_path / "model", tmp_path / "out", "--devices", "cpu", *options)


def test_quantize_passes_its_options_on(work: Work, tmp_path: Path) -> None:
    options = ["-r", "best", "--set", "solver.passes=3", "--memory=1MiB", "--layers", "1-2", "--restart"]
    options += ["-r", "fast"]  # the last one counts
    done = run_quantize(tmp_path, *options)
    assert done.exit_code == 0, done.output
    assert work.called == {
        "model": tmp_path / "model",
        "out": tmp_path / "out",
        "recipe": load_recipe("fast", ["solver.passes=3"]),
        "machine": Machine(devices="cpu", memory_bytes=1 << 20, strict=True),
        "layers": range(1, 3),
        "restart": True,
        "trace": None,
    }


def test_quantize_prints_a_line_per_layer_and_the_summary(work: Work, tmp_path: Path) -> None:
    shown = run_quantize(tmp_path).stdout
    assert "note: a [bold]note[/bold]\n" in shown
    assert "layer 1/2" in shown
    assert "projections      6 (6 gptq)" in shown
    assert "partial" in shown


def test_quantize_json(work: Work, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run_quantize(tmp_path, "--json").stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["note", "stage", "layer", "summary"]
    assert lines[2]["data"] == {"hidden_error": 0.5, "router_agreement": None}
    assert lines[3]["data"]["projections"] == 6


def test_quantize_quiet(work: Work, tmp_path: Path) -> None:
    done = run_quantize(tmp_path, "--quiet")
    assert (done.exit_code, done.output) == (0, "")


def test_error_of_the_user(work: Work, tmp_path: Path) -> None:
    work.raises = FourfoldError("the disk [/] is full\nmake room")
    done = run_quantize(tmp_path)
    assert done.exit_code == 2
    assert "Error: the disk [/] is full\nmake room\n" in done.stderr


def test_interrupt(work: Work, tmp_path: Path) -> None:
    work.raises = KeyboardInterrupt()
    done = run_quantize(tmp_path)
    assert done.exit_code == 130
    assert "Finished layers are kept. Rerun the same command to resume." in done.stderr


def test_interrupt_of_a_restart(work: Work, tmp_path: Path) -> None:
    work.raises = KeyboardInterrupt()
    assert "Rerun the same command without --restart to resume." in run_quantize(tmp_path, "--restart").stderr


def test_bug_of_ours(work: Work, tmp_path: Path) -> None:
    (tmp_path / "out" / ".fourfold").mkdir(parents=True)
    (tmp_path / "out" / ".fourfold" / "run.log").touch()
    work.raises = IndexError("of ours")
    done = run_quantize(tmp_path)
    assert done.exception is work.raises  # Python prints its traceback
    assert "a bug in fourfold" in done.stderr
    assert f"{tmp_path / 'out' / '.fourfold' / 'run.log'}" in done.stderr


# --- evaluate: its options -------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What evaluate was called with."""
    called: dict[str, Any] = {}

    def run(out: Path, source: Path, **options: Any) -> Metrics:
        options.pop("progress")(Event(kind="note", text="a note"))
        called.update(options, out=out, source=source)
        return Metrics(measured_by="evaluate", protocol=TextFacts(), summary=None, layers=[])

    monkeypatch.setattr("fourfold.release.evaluate.evaluate", run)
    return called


def test_evaluate_passes_its_options_on(evaluated: dict[str, Any], tmp_path: Path) -> None:
    for name in ("model", "other", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(CONFIG)
    (tmp_path / "words.txt").touch()
    paths = ["--source", tmp_path / "model", "--against", tmp_path / "other", "--text", tmp_path / "words.txt"]
    numbers = ["--windows", "8", "--length", "512", "--no-drafts", "--devices", "cpu", "--json"]
    done = invoke("evaluate", tmp_path / "out", *paths, *numbers, "--tasks", "gsm8k,ifeval", "--url", "http://h:1")
    assert done.exit_code == 0, done.output
    assert evaluated == {
        "out": tmp_path / "out",
        "source": tmp_path / "model",
        "against": tmp_path / "other",
        "protocol": Protocol(text=tmp_path / "words.txt", windows=8, length=512, drafts=False),
        "servers": Servers(url="http://h:1", tasks=("gsm8k", "ifeval")),
        "device": "cpu",
    }
    shown = json.loads(done.stdout.splitlines()[-1])
    assert (shown["kind"], shown["data"]["measured_by"]) == ("metrics", "evaluate")


def test_tasks_need_a_url(evaluated: dict[str, Any], tmp_path: Path) -> None:
    done = invoke("evaluate", tmp_path / "out", "--source", tmp_path, "--tasks", "gsm8k")
    assert done.exit_code == 2 and not evaluated
    assert "got no --url" in done.stderr


def test_evaluate_of_no_release(example_model: Path, tmp_path: Path) -> None:
    done = invoke("evaluate", tmp_path / "out", "--source", example_model, "--devices", "cpu")
    assert done.exit_code == 2
    assert "no such folder; expected the folder of a finished release" in done.stderr


# --- the real thing ----------------------------------------------------------------------------------------------


def test_plan(example_model: Path) -> None:
    shown = invoke("plan", example_model, "--devices", "cpu")
    assert shown.exit_code == 0, shown.output
    for word in ("experts", "int4", "MTP", "copy + split", "host memory", "time"):
        assert word in shown.stdout
    assert "core, as measured here, idle: " in shown.stdout


def test_the_plan_of_a_guided_run_tells_what_guidance_leaves_or_when(example_model: Path, tmp_path: Path) -> None:
    shown = invoke("plan", example_model, "--machine", "h200", "--recipe", "guided", "--out", tmp_path / "new")
    assert shown.exit_code == 0, shown.output
    assert "known after the sweep" in shown.stdout and "are free" in shown.stdout
    assert "guidance" not in invoke("plan", example_model, "--machine", "h200").stdout
    assert not (tmp_path / "new").exists()


def test_a_plan_with_groups_of_32_tells_what_they_cost_a_gguf(example_model: Path, tmp_path: Path) -> None:
    """Where the model is written as GGUF, and of groups that are as small as a block alone."""
    families.tiny(tmp_path / "mixtral", "mixtral", checkpoints.VOCABULARY)
    for name in checkpoints.TOKENIZER_FILES:
        shutil.copyfile(example_model / name, tmp_path / "mixtral" / name)
    options = ("--machine", "h200", "--recipe")
    shown = invoke("plan", example_model, *options, "gguf")
    assert shown.exit_code == 0, shown.output
    assert "as GGUF" in shown.stdout and "4.5 bits per expert weight" in shown.stdout
    for model, recipe in ((example_model, "best"), (tmp_path / "mixtral", "gguf")):
        other = invoke("plan", model, *options, recipe)
        assert other.exit_code == 0 and "GGUF" not in other.stdout, other.output


def test_plan_for_another_machine_as_json(example_model: Path) -> None:
    shown = invoke("plan", example_model, "--machine", "4x3060", "--layers", "1-2", "--json")
    plan = json.loads(shown.stdout)
    assert plan["memory"]["devices"] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert plan["memory"]["budget_bytes"] < 12 * 2**30
    assert "4 x RTX 3060 12 GB, by data sheet, not measured" in plan["time"]["basis"]
    assert (plan["solve"], plan["partial"]) == ([1, 3], True)
    assert len(plan["tensors"]) == sum(row["tensors_before"] for row in plan["groups"])


def test_a_plan_for_a_machine_that_is_not_known(example_model: Path) -> None:
    unknown = invoke("plan", example_model, "--machine", "h101")
    assert unknown.exit_code == 2
    assert "--machine: got 'h101', expected one of 3060, 3090, " in unknown.stderr and "'h100'?" in unknown.stderr
    both = invoke("plan", example_model, "--machine", "h200", "--devices", "cpu")
    assert both.exit_code == 2
    assert "--machine and --devices exclude each other" in both.stderr


def test_dry_run_writes_nothing(example_model: Path, tmp_path: Path) -> None:
    shown = invoke("quantize", example_model, tmp_path / "out", "--devices", "cpu", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "disk" in shown.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_trial_is_stopped_and_goes_on(example_model: Path, tmp_path: Path) -> None:
    """A real run on one layer: `kill`, Ctrl-C, the same command, and the same command once more."""
    small = [option for value in SMALL for option in ("--set", value)]
    options = ["--devices", "cpu", "--layers", "0-0", "--json", *small]
    arguments = ["quantize", str(example_model), str(tmp_path / "out"), *options]
    command = [sys.executable, "-m", "fourfold", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, env=environment(), **pipes) as child:
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                if json.loads(line)["stage"] == "attend":
                    child.send_signal(number)
                    break
            child.stdout.read()
            said = child.stderr.read()
        assert child.returncode == code, said
        assert "Rerun the same command to resume." in said
        assert "Traceback" not in said
    went_on = invoke(*arguments)
    assert went_on.exit_code == 0, went_on.output
    summary = json.loads(went_on.stdout.splitlines()[-1])
    assert summary["kind"] == "summary"
    assert summary["data"]["partial"] is True
    assert summary["data"]["methods"] == {"gptq": 48}
    again = invoke(*arguments)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout.splitlines()[-1]) == summary
