"""Requests by the OpenAI client, each endpoint and streamed too. Runs in vLLM's environment, which has the client.

    python openai_requests.py URL MODEL

Prints one JSON object: what each request gave.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
from openai import OpenAI

address, model = sys.argv[1:]
client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
ASKED: list[Any] = [{"role": "user", "content": "How many legs have three cats and a bird?"}]
PROMPT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n"
TOKENS = 60


def chat(**options: Any) -> dict[str, Any]:
    """Sampling is left to the server but for what is said."""
    body = {"ignore_eos": True, **options.pop("extra_body", {})}
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=TOKENS, extra_body=body, **{"temperature": 0} | options
    )
    message = answer.choices[0].message
    return {
        "thinking": answer.usage.completion_tokens_details.reasoning_tokens,
        "text": f"{message.model_extra.get('reasoning')}</think>{message.content}",
    }


def streamed(**options: Any) -> dict[str, Any]:
    stream = client.chat.completions.create(
        model=model,
        messages=ASKED,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        **options,
    )
    usage = [chunk.usage for chunk in stream if chunk.usage][-1]
    return {"thinking": usage.completion_tokens_details.reasoning_tokens, "tokens": usage.completion_tokens}


def completion(**options: Any) -> dict[str, Any]:
    body = {"ignore_eos": True, "skip_special_tokens": False, **options}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, extra_body=body)
    return {"ended": "</think>" in answer.choices[0].text, "text": answer.choices[0].text}


def response(**options: Any) -> dict[str, Any]:
    answer = client.responses.create(
        model=model, input=ASKED, max_output_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True, **options}
    )
    return {"thinking": answer.usage.output_tokens_details.reasoning_tokens}


def messages() -> dict[str, Any]:
    """Anthropic's protocol, for which vLLM's environment has no client."""
    body = {"model": model, "messages": ASKED, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{address}/v1/messages", json=body, timeout=120)
    answer.raise_for_status()
    blocks = answer.json()["content"]
    return {"text": "".join(block.get("thinking", "") for block in blocks)}


print(
    json.dumps(
        {
            "chat": chat(),
            "chat streamed": streamed(),
            "chat, budget 5": chat(extra_body={"thinking_token_budget": 5}),
            "chat, budget 0": chat(extra_body={"thinking_token_budget": 0}),
            "chat, no limit": chat(extra_body={"thinking_token_budget": -1}),
            "chat, null": chat(extra_body={"thinking_token_budget": None}),
            "chat, penalty 0": chat(presence_penalty=0),
            "chat, penalty 1.5": chat(presence_penalty=1.5),
            "chat, other penalty": chat(extra_body={"repetition_penalty": 1}),
            "completion": completion(),
            "completion, no limit": completion(thinking_token_budget=-1),
            "response": response(),
            "messages": messages(),
        }
    )
)
