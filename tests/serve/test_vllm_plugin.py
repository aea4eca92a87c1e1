"""The plugin's values and its hooks, against classes shaped as vLLM's; against vLLM itself in tests/engines."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from fourfold.serve import vllm_plugin
from fourfold.serve.vllm_plugin import BUDGET, OTHERS, PENALTY, read_defaults, register


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, {}),
        ({BUDGET: "", PENALTY: " ", OTHERS: ""}, {}),
        ({BUDGET: "512"}, {"thinking_token_budget": 512}),
        ({BUDGET: "0"}, {"thinking_token_budget": 0}),
        ({PENALTY: "-1.5"}, {"presence_penalty": -1.5}),
        ({OTHERS: '{"top_k": 20, "min_p": 0.1}', BUDGET: "9"}, {"thinking_token_budget": 9, "top_k": 20, "min_p": 0.1}),
    ],
)
def test_values(environment: dict[str, str], wanted: dict[str, Any]) -> None:
    assert read_defaults(environment) == wanted


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (BUDGET, "many", "a whole number from 0 on"),
        (BUDGET, "-1", "a whole number from 0 on"),
        (BUDGET, "1.5", "a whole number from 0 on"),
        (BUDGET, "\u0665", "a whole number from 0 on"),
        (PENALTY, "2.1", "from -2 to 2"),
        (PENALTY, "nan", "from -2 to 2"),
        (PENALTY, "much", "from -2 to 2"),
        (OTHERS, "{", "not JSON"),
        (OTHERS, "[1]", "a JSON object"),
        (OTHERS, '{"max_tokens": 5}', "cannot be a server's default"),
        (OTHERS, '{"_all_stop_token_ids": 5}', "cannot be a server's default"),
    ],
)
def test_values_that_are_malformed(name: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        read_defaults({name: value})
    assert name in str(raised.value)


def test_the_same_value_twice() -> None:
    with pytest.raises(ValueError, match="of its own too"):
        read_defaults({BUDGET: "5", OTHERS: '{"thinking_token_budget": 6}'})


# --- hooks --------------------------------------------------------------------------------------------------------


class SamplingParams:
    def __init__(self, presence_penalty: float = 0.0, thinking_token_budget: int | None = None, top_k: int = 0) -> None:
        if not -2 <= presence_penalty <= 2 or top_k < -1:
            raise ValueError("out of range")
        self.presence_penalty, self.thinking_token_budget, self.top_k = presence_penalty, thinking_token_budget, top_k


class Request:
    """As pydantic's models: fields, which of them were sent, and what was sent beside them."""

    model_fields: ClassVar[dict[str, Any]] = {"presence_penalty": None, "thinking_token_budget": None, "top_k": None}

    def __init__(self, **sent: Any) -> None:
        for name in self.model_fields:
            setattr(self, name, sent.get(name))
        self.__dict__["model_fields_set"] = {name for name in sent if name in self.model_fields}
        self.__dict__["model_extra"] = {name: value for name, value in sent.items() if name not in self.model_fields}

    def __setattr__(self, name: str, value: Any) -> None:
        if "model_fields_set" in self.__dict__:
            self.__dict__["model_fields_set"].add(name)
        self.__dict__[name] = value

    def to_sampling_params(self, max_tokens: int, defaults: dict[str, Any]) -> SamplingParams:
        values = {name: getattr(self, name) for name in self.model_fields if getattr(self, name) is not None}
        return SamplingParams(**values)


class ResponsesRequest(Request):
    """Has no field for a thinking budget."""

    model_fields: ClassVar[dict[str, Any]] = {"presence_penalty": None, "top_k": None}


class EngineArgs:
    reasoning: ClassVar[Any] = types.SimpleNamespace(enabled=True)

    def create_engine_config(self) -> Any:
        return types.SimpleNamespace(reasoning_config=self.reasoning)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[dict[str, types.ModuleType]]:
    """Modules by name; what a test takes out is not there to be imported."""
    caplog.set_level(logging.INFO, "vllm.fourfold")
    contents = {"vllm.sampling_params": SamplingParams, "vllm.engine.arg_utils": type("EngineArgs", (EngineArgs,), {})}
    for module, name in vllm_plugin.PROTOCOLS.items():
        base = ResponsesRequest if name == "ResponsesRequest" else Request
        made = type(name, (base,), {"to_sampling_params": base.to_sampling_params})
        contents[module] = made
    modules = {}
    for name, content in contents.items():
        modules[name] = types.ModuleType(name)
        setattr(modules[name], content.__name__, content)
        monkeypatch.setitem(sys.modules, name, modules[name])
    monkeypatch.setattr(vllm_plugin, "_said", [])
    for name in (BUDGET, PENALTY, OTHERS):
        monkeypatch.delenv(name, raising=False)
    yield modules


def request(modules: dict[str, types.ModuleType], kind: str = "ChatCompletionRequest", **sent: Any) -> SamplingParams:
    module = next(module for module, name in vllm_plugin.PROTOCOLS.items() if name == kind)
    asked = getattr(modules[module], kind)(**sent)
    found: SamplingParams = asked.to_sampling_params(100, {})
    assert asked.model_fields_set == {name for name in sent if name in asked.model_fields}  # as it was
    return found


def test_nothing_is_done_where_nothing_is_set(vllm: dict[str, types.ModuleType]) -> None:
    register()
    assert request(vllm).presence_penalty == 0.0
    assert vllm["vllm.engine.arg_utils"].EngineArgs.create_engine_config is EngineArgs.create_engine_config


@pytest.mark.parametrize("kind", vllm_plugin.PROTOCOLS.values())
def test_defaults_fill_what_is_not_sent(
    vllm: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(BUDGET, "20")
    monkeypatch.setenv(PENALTY, "1.5")
    monkeypatch.setenv(OTHERS, '{"top_k": 7}')
    register()
    found = request(vllm, kind)
    assert (found.thinking_token_budget, found.presence_penalty, found.top_k) == (20, 1.5, 7)
    sent = request(vllm, kind, presence_penalty=0, top_k=0)
    assert (sent.thinking_token_budget, sent.presence_penalty, sent.top_k) == (20, 0, 0)


def test_a_null_is_a_value_for_the_budget_alone(
    vllm: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUDGET, "20")
    monkeypatch.setenv(PENALTY, "1.5")
    register()
    found = request(vllm, thinking_token_budget=None, presence_penalty=None)
    assert (found.thinking_token_budget, found.presence_penalty) == (None, 1.5)
    # A request kind without the field: vLLM would ignore what is sent, and so must the default.
    assert request(vllm, "ResponsesRequest", thinking_token_budget=5).thinking_token_budget is None


def test_a_value_that_vllm_does_not_accept(vllm: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ('{"top_k": -5}', '{"topk": 5}'):
        monkeypatch.setenv(OTHERS, text)
        with pytest.raises(ValueError, match="vLLM does not accept it"):
            register()


def test_no_start_where_a_budget_cannot_work(
    vllm: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(BUDGET, "20")
    register()
    register()  # in a process that loads plugins twice
    arguments = vllm["vllm.engine.arg_utils"].EngineArgs
    arguments().create_engine_config()
    arguments().create_engine_config()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "thinking_token_budget=20" in said
    arguments.reasoning = types.SimpleNamespace(enabled=False)
    with pytest.raises(ValueError, match="--reasoning-parser"):
        arguments().create_engine_config()


def test_hooks_that_are_gone_are_named(
    vllm: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PENALTY, "1")
    completion, responses, arguments = (
        "vllm.entrypoints.openai.completion.protocol", "vllm.entrypoints.openai.responses.protocol",
        "vllm.engine.arg_utils",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, completion, None)  # as if there were no such module
    del vllm[responses].ResponsesRequest
    del vllm[arguments].EngineArgs
    register()
    warned = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    for name in ("CompletionRequest", "ResponsesRequest", "EngineArgs.create_engine_config"):
        assert name in warned
    assert request(vllm).presence_penalty == 1.0
