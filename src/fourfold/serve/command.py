"""From a checkpoint, a machine and what the user wants to an engine's command line, checked before anything starts."""

from __future__ import annotations

import ipaddress
import json
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fourfold.datatypes import FourfoldError
from fourfold.formats import DRAFTS_IN_SGLANG
from fourfold.install import pip_install
from fourfold.model.family import FAMILIES
from fourfold.serve import engines
from fourfold.serve.drafter import Drafter
from fourfold.serve.engines import ENGINES, KV_CACHES, SGLANG, VLLM, Engine, Profile, Version
from fourfold.serve.forecast import Cache, Forecast, Split, forecast
from fourfold.serve.machine import Machine
from fourfold.serve.served import Served

BUDGET_VARIABLE, PENALTY_VARIABLE = "VLLM_DEFAULT_THINKING_BUDGET", "VLLM_DEFAULT_PRESENCE_PENALTY"
OPTIONS = {
    "context": "--context", "ranks": "--tp", "kv_cache": "--kv-cache", "drafts": "--mtp", "host": "--host",
    "port": "--port",
}  # fmt: skip
IMAGE_ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "arm64"}  # platform.machine() -> as images are tagged
CPU_VARIABLE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", 1  # vLLM's cache on a CPU
PENALTY_BY_FLAG, BUDGET_UNDER_MTP = (0, 32), (0, 32)  # vLLM versions
Settings = dict[str, str]  # setting -> value; "" for a flag without one


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What the user requests. None: as the checkpoint and the machine have it.

    drafts: tokens per step of the MTP head, or of the external drafter; ranks: tensor-parallel size; extra: further
    words for the engine; plugin: whether the engine's environment has ours, None: unknown; inherited: environment
    variables of the engine.
    """

    engine: str
    version: Version | None = None
    profile: str = engines.DEFAULT
    drafts: int | None = None
    drafter: Drafter | None = None
    context: int | None = None
    kv_cache: str | None = None
    ranks: int | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    thinking_budget: int | None = None
    presence_penalty: float | None = None
    extra: tuple[str, ...] = ()
    plugin: bool | None = None
    inherited: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Command:
    """words: the command; environment: on top of the inherited; problems: why it must not be run; notes: to know."""

    engine: Engine
    version: Version
    words: tuple[str, ...]
    environment: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    forecast: Forecast
    host: str
    port: int
    name: str
    reasoning: str
    thinking_budget: int | None

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{reached}]:{self.port}" if ":" in reached else f"http://{reached}:{self.port}"

    def text(self) -> str:
        """For a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(shlex.quote, self.words)])

    def run_words(self, python: Path) -> list[str]:
        """The same under an interpreter of the engine's environment."""
        return [str(python), *self.engine.module, *self.words[len(self.engine.launch) :]]

    def docker(self, folder: Path) -> str:
        """The same in the engine's container: the checkpoint read-only, the port published on the host address alone.

        Raises FourfoldError for an address that Docker does not take, and where there is no image for this machine.
        """
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            expected = "an IP address, as in 127.0.0.1: Docker publishes on no name"
            raise FourfoldError(f"--host: got {self.host!r}, expected {expected}") from None
        launch = self.engine.launch
        words = [*launch, "/model", *self.words[len(launch) + 1 :]]
        # In the container every interface is its own: what is reached from outside is for -p to say.
        words = ["0.0.0.0" if before == "--host" else word for before, word in zip(["", *words], words, strict=False)]
        host = f"[{address}]" if address.version == 6 else str(address)
        parts = [
            "docker run --rm --init",
            *(["--gpus all"] if self.forecast.split.gpus else []),
            f"--ipc=host -p {host}:{self.port}:{self.port}",
            f"-v {shlex.quote(str(folder.resolve()))}:/model:ro",
            *(f"-e {name}={shlex.quote(value)}" for name, value in self.environment.items()),
            self._image(),
        ]
        prefix = len(launch) if self.engine.name == VLLM else 0  # vLLM's images begin so themselves
        return " ".join([*parts, *map(shlex.quote, words[prefix:])])

    def _image(self) -> str:
        engine, machine = self.engine, platform.machine()
        image = engine.image if self.forecast.split.gpus else engine.cpu_image
        if "{arch}" in image and machine not in IMAGE_ARCHITECTURES:
            image = ""
        if not image:
            fix = "Install it and serve without --docker" if engine.name == VLLM else f"Try --engine {VLLM}"
            problem = f"got a machine without a GPU ({machine}), for which {engine.title} publishes no image"
            raise FourfoldError(f"--docker: {problem}. {fix}")
        return image.format(version=engines.version_text(self.version), arch=IMAGE_ARCHITECTURES.get(machine))


def smallest(served: Served, machines: Iterable[Machine], wanted: Deployment) -> tuple[Machine, Command]:
    """The first machine on which the command has no problem, or else the last one, and the command there."""
    for machine in machines:
        command = build(served, machine, wanted)
        if not command.problems:
            break
    return machine, command


def build(served: Served, machine: Machine, wanted: Deployment) -> Command:
    """The command, with every check that needs no start. Raises FourfoldError for what no command can be made of."""
    engine = ENGINES[wanted.engine]
    if wanted.drafter:  # in place of the release's own draft head
        geometry = replace(served.geometry, drafter=wanted.drafter.geometry)
        served = replace(
            served, draft_bytes=wanted.drafter.weight_bytes, ends_bytes=0, drafts_by_name=False, geometry=geometry
        )
    by_default = served.has_draft and not (engine.name == SGLANG and _undrafted(served, wanted))
    drafting = by_default if wanted.drafts is None else wanted.drafts > 0
    profile = engines.profile(wanted.profile, engine.name, drafting)
    at = wanted.version or profile.version or engine.known[-1]
    drafts = wanted.drafts if wanted.drafts is not None else engines.DRAFTS[engine.name] if drafting else 0
    if wanted.drafter and not drafts:
        raise FourfoldError(f"--draft: got {wanted.drafter.folder} with --mtp 0, expected tokens to draft")
    if drafts and not served.has_draft:
        raise FourfoldError(f"{served.folder}: has no MTP head, so --mtp {drafts} has nothing to draft with; --mtp 0")
    problems = list(_problems(served, machine, engine, at, drafts, wanted))
    experts_apart = engine.flag("experts", at) in wanted.extra
    split = Split.choose(served, machine, wanted.ranks or profile.ranks, experts_apart)
    problems += split.problems
    predicted = forecast(served, split, _cache(served, machine, engine, at, profile, wanted, drafts))
    problems += predicted.problems
    if engine.name == SGLANG and not machine.gpus:
        problems.append(f"SGLang is not known to run this on a CPU ({machine.describe()}); vLLM does, for a trial")
    settings = dict(_common(served, engine, wanted, profile, predicted))
    own, environment = (_vllm if engine.name == VLLM else _sglang)(served, predicted, wanted)
    settings |= own | {setting: value for setting, value in profile.settings.items() if setting not in own}
    command = Command(
        engine=engine, version=at,
        words=(*engine.launch, str(served.folder), *_spell(engine, at, settings, wanted.extra), *wanted.extra),
        environment={**profile.environment, **environment}, problems=tuple(problems), forecast=predicted,
        host=wanted.host, port=wanted.port or engine.port, name=served.name,
        reasoning=_parsers(served, engine.name)[0], thinking_budget=wanted.thinking_budget,
    )  # fmt: skip
    return replace(command, notes=tuple(_notes(served, machine, command, wanted, profile)))


def _undrafted(served: Served, wanted: Deployment) -> tuple[str, str] | None:
    """Why SGLang makes no drafts of a release, and what does; None if it makes them."""
    if wanted.drafter:
        return None
    if served.quantized_head:
        return engines.NO_DRAFTS_WITH_HEAD, "a release with a BF16 output head (recipe compact-sglang)"
    if served.format is None or served.format.sglang_drafts or served.int4_drafts:
        return None
    cause = (
        f"SGLang does not load the draft experts of a {served.format} release: it skips their BF16 weights without an "
        "error and every draft is wrong"
    )
    return cause, f"a release in format {DRAFTS_IN_SGLANG}"


def _cache(
    served: Served, machine: Machine, engine: Engine, at: Version, profile: Profile, wanted: Deployment, drafts: int
) -> Cache:
    """How the cache is set: the user's own words for the engine count, and an option before the profile."""
    context = wanted.context or profile.context
    if context and context > served.context:
        raise FourfoldError(f"--context {context:,}: {served.name} was made for at most {served.context:,} tokens")
    share = _value(wanted.extra, engine.flag("share", at)) or str(profile.share)
    requests = _value(wanted.extra, "--max-running-requests") or "0"
    space = wanted.inherited.get(CPU_VARIABLE, str(CPU_CACHE_GIB))
    try:
        numbers = float(share), int(requests), int(space)
    except ValueError as error:
        given = f"memory share {share!r}, --max-running-requests {requests!r}, {CPU_VARIABLE} {space!r}"
        raise FourfoldError(f"{given}: {error}, expected numbers, the last two whole") from None
    prefix_caching = "--enable-prefix-caching" in wanted.extra  # on a CPU off by default
    if machine.gpus:
        prefix_caching = "--no-enable-prefix-caching" not in wanted.extra
    return Cache(
        engine=engine.name, version=at, share=numbers[0], elements=wanted.kv_cache or profile.kv_cache, drafts=drafts,
        context=context, prefix_caching=prefix_caching, requests=numbers[1], cpu_gib=numbers[2],
    )  # fmt: skip


def _value(extra: tuple[str, ...], flag: str) -> str:
    """Of `--flag value` or `--flag=value` among words for the engine; "" if it is not there."""
    for word, after in zip(extra, (*extra[1:], ""), strict=False):
        if word == flag:
            return after
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return ""


def _parsers(served: Served, engine: str) -> tuple[str, str]:
    """Return the parsers of thinking and of tool calls; "" where none is known or the template needs none."""
    reasoning, tools = engines.PARSERS.get((served.model_type, engine), ("", ""))
    if engines.XML_CALL in served.template:
        tools = engines.XML_PARSER
    thinks = engines.THINKING in served.template or not served.template
    return (reasoning if thinks else ""), tools


def _common(
    served: Served, engine: Engine, wanted: Deployment, profile: Profile, found: Forecast
) -> Iterator[tuple[str, str]]:
    reasoning, tools = _parsers(served, engine.name)
    yield from {"name": served.name, "host": wanted.host, "port": str(wanted.port or engine.port)}.items()
    if found.split.ranks > 1:
        yield "ranks", str(found.split.ranks)
    yield "context", str(found.context)
    if found.split.gpus:
        yield "share", f"{profile.share:.2f}"
    if found.cache.elements != "auto":
        yield "kv_cache", KV_CACHES[engine.name][found.cache.elements]
    if reasoning:
        yield "reasoning", reasoning
    if tools and engine.name == VLLM:
        yield "tools_on", ""
    if tools:
        yield "tools", tools


def _vllm(served: Served, found: Forecast, wanted: Deployment) -> tuple[Settings, dict[str, str]]:
    settings: Settings = {}
    environment: dict[str, str] = {}
    if found.cache.drafts:
        one = wanted.drafter
        how = {"method": one.method, "model": str(one.folder)} if one else {"method": "mtp"}
        settings["drafts"] = _compact({**how, "num_speculative_tokens": found.cache.drafts})
    if not found.split.gpus:  # no Triton there: graphs and the prefix caching of hybrid models need it
        settings |= {"dtype": "bfloat16", "eager": ""}
        if not found.cache.prefix_caching:
            settings["no_prefix_caching"] = ""
        if served.vision:
            settings["images"] = _compact({"image": 0, "video": 0})
        environment[CPU_VARIABLE] = str(found.cache.cpu_gib)
    if wanted.thinking_budget is not None:
        environment[BUDGET_VARIABLE] = str(wanted.thinking_budget)
        settings["reasoning_config"] = "{}"
    if wanted.presence_penalty is not None and found.cache.version >= PENALTY_BY_FLAG:
        settings["sampling"] = _compact({"presence_penalty": wanted.presence_penalty})
    elif wanted.presence_penalty is not None:
        environment[PENALTY_VARIABLE] = str(wanted.presence_penalty)
    return settings, environment


def _sglang(served: Served, found: Forecast, wanted: Deployment) -> tuple[Settings, dict[str, str]]:
    settings: Settings = {"metrics": ""}
    if (form := served.format) and form.sglang_method != form.method:  # SGLang's own choice by config.json is wrong
        settings["quantization"] = form.sglang_method
    drafts = found.cache.drafts
    if drafts:
        settings |= {"drafts": "EAGLE", "draft_steps": str(drafts), "draft_topk": "1", "draft_tokens": str(drafts + 1)}
    if drafts and wanted.drafter:
        settings |= {"drafts": wanted.drafter.algorithm, "drafter": str(wanted.drafter.folder)}
    if not drafts or not found.cache.old:  # later versions choose both by themselves
        return settings, {}
    return settings | {"strategy": "extra_buffer"}, {"SGLANG_ENABLE_SPEC_V2": "1"}


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _spell(engine: Engine, at: Version, settings: Settings, extra: tuple[str, ...]) -> Iterator[str]:
    """Words for settings, but for flags that the user gives the engine directly."""
    given = {word.partition("=")[0] for word in extra}
    for setting, value in settings.items():
        flag = engine.flag(setting, at)
        if flag and flag not in given:
            yield flag
            if value:
                yield value


def _problems(
    served: Served, machine: Machine, engine: Engine, at: Version, drafts: int, wanted: Deployment
) -> Iterator[str]:
    given = {word.partition("=")[0] for word in wanted.extra}
    for setting, option in OPTIONS.items():
        flag = engine.flag(setting, at)
        if flag in given:
            yield f"{flag} after `--`: use {option}, on which other values depend"
    if engine.name == VLLM and given & {"--quantization", "-q"}:
        cause = (
            "it reads the method from config.json, and moe_wna16 stops at KeyError experts.w2_weight in the MTP loader"
        )
        yield f"--quantization must not be passed to vLLM: {cause}"
    family = FAMILIES.get(served.model_type)
    if family is not None and engine.name in family.refuse:
        other = VLLM if engine.name == SGLANG else SGLANG
        yield f"{engine.name} must not serve {family.title}: {family.refuse[engine.name]}. Try: --engine {other}"
    if engine.name == SGLANG and drafts and (found := _undrafted(served, wanted)):
        yield f"{found[0]}. Try: {found[1]}, --mtp 0, or vLLM"
    if served.quantized_head and engine.name == SGLANG and served.format and not served.format.sglang_drafts:
        fix = f'format {DRAFTS_IN_SGLANG}, scheme.rest.head = "bf16", or vLLM'
        cause = f"SGLang leaves the quantized output head of a {served.format} release unwritten, without an error"
        yield f"{cause}. Try: {fix}"
    if served.quantized_head and engine.name == VLLM and at < engines.QUANTIZED_HEAD:
        found_at, since = map(engines.version_text, (at, engines.QUANTIZED_HEAD))
        yield f"vLLM {found_at} does not load a quantized output head, {since} does. Try: a newer vLLM"
    if served.int8 and engine.name == VLLM and not machine.gpus:
        yield engines.NO_CPU_INT8
    yield from _default_problems(engine, at, drafts, wanted)


def _default_problems(engine: Engine, at: Version, drafts: int, wanted: Deployment) -> Iterator[str]:
    """Of server-wide defaults."""
    defaults = (wanted.thinking_budget, wanted.presence_penalty) != (None, None)
    if engine.name == SGLANG and defaults:
        fix = "send the penalty with each request, or serve with vLLM"
        yield f"SGLang has no server-wide defaults for a thinking budget and a presence penalty; {fix}"
        return
    by_plugin = wanted.thinking_budget is not None or (wanted.presence_penalty is not None and at < PENALTY_BY_FLAG)
    if by_plugin and wanted.plugin is False:
        yield f"this default {_needs_plugin()}"
    if wanted.thinking_budget is not None and drafts and at < BUDGET_UNDER_MTP:
        vllm = f"vLLM {engines.version_text(at)}"
        yield f"{vllm} drops a thinking budget under MTP without a word (0.32 keeps it): --mtp 0, or a newer vLLM"


def _needs_plugin() -> str:
    fix = f"PYTHON -m {pip_install(option='--no-deps')}, PYTHON being the engine's own"
    return f"needs fourfold's plugin in the engine's environment: {fix}"


def _notes(served: Served, machine: Machine, found: Command, wanted: Deployment, profile: Profile) -> Iterator[str]:
    """What a user should know; `found` has no notes yet."""
    engine, at, cache = found.engine, found.version, found.forecast.cache
    if at not in engine.known:
        known = " and ".join(map(engines.version_text, engine.known))
        yield f"{engine.title} {engines.version_text(at)} was not looked at; flags are those known of {known}"
    if not machine.gpus:
        yield f"{machine.describe()}: a trial on the CPU, eager, without images and prefix caching"
    if cache.elements == "fp8" and machine.gpus and min(gpu.capability for gpu in machine.gpus) < (8, 9):
        yield "below compute capability 8.9 an fp8 cache is stored only: half the bytes, computed in BF16"
        if engine.name == VLLM and not cache.old:
            yield f"if vLLM says `{engines.FP8_CACHE[0]}`: {engines.FP8_CACHE[1]}"
    yield from _known_issues(served, machine, found, wanted)
    if wanted.drafts is None and served.has_draft and not cache.drafts and (why := _undrafted(served, wanted)):
        yield f"no drafts: {why[0]}. Try: {why[1]}, or vLLM"
    if not machine.gpus and cache.drafts and served.sampling.get("top_k", -1) > 0:
        yield "on a CPU vLLM stops at a request that samples with top_k under MTP: --mtp 0, or temperature 0 in each"
    if engine.name == VLLM and served.format and served.format.vllm_cpu and not machine.gpus:
        yield served.format.vllm_cpu
    if wanted.thinking_budget is not None and wanted.plugin is None:
        yield f"the thinking budget {_needs_plugin()}"
    if profile.measured and served.is_reference:
        yield f"the reference measured with this, on 4 x RTX 3060: {profile.measured}"
    if one := wanted.drafter:
        size = f"{one.weight_bytes / 1e9:.2f} GB of weights, KV cache of {one.geometry.attention} layers"
        yield f"drafter {one.folder.name} ({one.method}), as predicted: {size}; fourfold has run EAGLE-3 in vLLM alone"
    yield from found.forecast.doubts
    if served.sampling:
        values = ", ".join(f"{name} {value}" for name, value in served.sampling.items())
        yield f"sampling where a request says nothing, from generation_config.json: {values}"


def _known_issues(served: Served, machine: Machine, found: Command, wanted: Deployment) -> Iterator[str]:
    """Issues of this engine that nothing at its start would show."""
    if served.format is not None:
        yield from engines.kernel_issues(found.engine.name, machine.gpus, wanted.inherited)
    drafting = found.engine.name == SGLANG and found.forecast.cache.drafts
    if drafting and served.drafts_by_name and found.version < engines.NAMED_DRAFTS:
        yield engines.DRAFTS_BY_NAME
