"""A vLLM plugin: server-wide defaults of sampling parameters, for requests that leave them unset.

    VLLM_DEFAULT_THINKING_BUDGET=8192       thinking tokens, a whole number from 0 on
    VLLM_DEFAULT_PRESENCE_PENALTY=1.5       from -2 to 2
    VLLM_DEFAULT_SAMPLING_PARAMS='{...}'    any other parameter, one JSON object, as {"top_k": 20}

vLLM calls `register` by the entry point group vllm.general_plugins in each of its processes. For chat, completion,
responses and messages requests, streamed or not, what a request sends wins; a null for the budget is a value too and
means no limit. A value that cannot be used stops the server. Nothing is done where no variable is set.
Imports nothing else of fourfold: installed without its dependencies in vLLM's environment, it works.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

BUDGET, PENALTY = "VLLM_DEFAULT_THINKING_BUDGET", "VLLM_DEFAULT_PRESENCE_PENALTY"
OTHERS = "VLLM_DEFAULT_SAMPLING_PARAMS"
BUDGET_FIELD, PENALTY_FIELD = "thinking_token_budget", "presence_penalty"
# Decided before a request's sampling parameters are made, or not a sampler's business.
NOT_DEFAULTS = {"max_tokens", "output_kind", "skip_clone", "extra_args", "structured_outputs"}
PROTOCOLS = {  # requests of /v1/messages become chat requests
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}
MADE_BY = "to_sampling_params"

logger = logging.getLogger("vllm.fourfold")  # under vLLM's own, whose handlers show it
_said: list[int] = []  # by which process


def register() -> None:
    """The entry point. Raises ValueError for a malformed value: vLLM then does not start."""
    defaults = read_defaults(os.environ)
    if not defaults:
        return
    _check(defaults)
    hooked, gone = _hook_requests(defaults)
    _hook_start(defaults, hooked, gone)


def read_defaults(environment: Mapping[str, str]) -> dict[str, Any]:
    """Defaults by the names of vLLM's SamplingParams. Raises ValueError that names the variable."""
    defaults: dict[str, Any] = {}
    if (text := environment.get(BUDGET, "").strip()) != "":
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{BUDGET} is {text!r}: thinking tokens are wanted, a whole number from 0 on")
        defaults[BUDGET_FIELD] = int(text)
    if (text := environment.get(PENALTY, "").strip()) != "":
        defaults[PENALTY_FIELD] = _number(text)
    if (text := environment.get(OTHERS, "").strip()) != "":
        for name, value in _object(text).items():
            if name in defaults or name in NOT_DEFAULTS or name.startswith("_"):
                reason = "is set by a variable of its own too" if name in defaults else "cannot be a server's default"
                raise ValueError(f"{OTHERS}: {name!r} {reason}; leave it out")
            defaults[name] = value
    return defaults


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if -2 <= (value := float(text)) <= 2:
            return value
    raise ValueError(f"{PENALTY} is {text!r}: a number from -2 to 2 is wanted")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{OTHERS} is {text!r}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{OTHERS} is {text!r}: a JSON object is wanted, as in " + '{"top_k": 20}')
    return found


def _check(defaults: Mapping[str, Any]) -> None:
    """vLLM itself must accept the values. Raises ValueError with what it says."""
    parameters = importlib.import_module("vllm.sampling_params").SamplingParams
    try:
        parameters(**defaults)
    except (TypeError, ValueError) as error:  # vLLM's own validation errors are ValueErrors
        names = ", ".join(defaults)
        raise ValueError(f"{BUDGET}, {PENALTY} or {OTHERS} ({names}): vLLM does not accept it: {error}") from None


def _hook_requests(defaults: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Wrap what makes sampling parameters of requests. Returns the request classes wrapped, and hooks that are gone."""
    hooked, gone = [], []
    for module, name in PROTOCOLS.items():
        request = getattr(_import(module), name, None)
        make = getattr(request, MADE_BY, None)
        if request is None or make is None:
            gone.append(f"{module}.{name}.{MADE_BY}")
            continue
        setattr(request, MADE_BY, _with_defaults(make, defaults))
        hooked.append(name)
    return hooked, gone


def _import(module: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)


def _with_defaults(make: Callable[..., Any], defaults: Mapping[str, Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(request: Any, *arguments: Any, **options: Any) -> Any:
        fields = type(request).model_fields
        unset = {name: value for name, value in defaults.items() if not _is_set(request, name)}
        sent = set(request.model_fields_set)
        before = {name: getattr(request, name) for name in unset if name in fields}
        try:
            # Fields of the request go the way of a value that was sent, through vLLM's own checks and conversions.
            for name in before:
                setattr(request, name, unset[name])
            parameters = make(request, *arguments, **options)
        finally:
            for name, value in before.items():
                setattr(request, name, value)
            request.model_fields_set.intersection_update(sent)
        for name in unset.keys() - before.keys():
            setattr(parameters, name, unset[name])
        return parameters

    return made


def _is_set(request: Any, name: str) -> bool:
    """Whether the client sent a value. Null says nothing, but for the budget, where it says: no limit."""
    if name not in request.model_fields_set:
        return name in (request.model_extra or {})
    return name == BUDGET_FIELD or getattr(request, name) is not None


def _hook_start(defaults: Mapping[str, Any], hooked: list[str], gone: list[str]) -> None:
    """When the engine's config is made: look whether a budget can work, and say what is done.

    Not sooner: vLLM calls plugins before it has set up its logging. Without a reasoning config it would answer 400 to
    each request with a budget, so rather do not start.
    """
    arguments = getattr(_import("vllm.engine.arg_utils"), "EngineArgs", None)
    create = getattr(arguments, "create_engine_config", None)
    if arguments is None or create is None:
        _say(defaults, hooked, [*gone, "EngineArgs.create_engine_config"])
        return

    @functools.wraps(create)
    def created(*positional: Any, **options: Any) -> Any:
        config = create(*positional, **options)
        reasoning = getattr(config, "reasoning_config", None)
        if BUDGET_FIELD in defaults and not getattr(reasoning, "enabled", False):
            fix = "start vLLM with --reasoning-parser NAME (before 0.32 also with --reasoning-config '{}')"
            raise ValueError(f"{BUDGET} is set, but vLLM does not separate thinking: {fix}")
        _say(defaults, hooked, gone)
        return config

    arguments.create_engine_config = created


def _say(defaults: Mapping[str, Any], hooked: list[str], gone: list[str]) -> None:
    """Once, and in one process for all."""
    if _said or multiprocessing.parent_process() is not None:
        return
    _said.append(os.getpid())
    if hooked:
        values = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
        logger.info("fourfold: %s where a request sets no such value (%s)", values, ", ".join(hooked))
    for what in gone:
        logger.warning("fourfold: this vLLM has no %s, so the defaults do not reach there", what)
