"""A server that answers as an engine does, or fails as one may: for what a real engine does not do on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7e+09
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {draft_tokens}
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {second}
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0",model_name="m"}} 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="256",num_gpu_blocks="4096",kv_cache_size_tokens="262144",engine="0"}} 1.0
"""


def chunk(**delta: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def usage(prompt: int, output: int, reasoning: int | None = None) -> bytes:
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, **details}})


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = (chunk(role="assistant"), chunk(reasoning="so"), chunk(content="yes"), usage(7, 5, 2), DONE)
Parts = tuple[bytes | float, ...]


@dataclass
class StandIn:
    """parts: of each answer to a chat request, bytes to send and seconds to wait; status: of it; metrics: None for a
    404; plain: what answers requests that are not streamed, by path, body and how many are answered at once, with a
    status and JSON. seen: bodies of requests.
    """

    parts: Callable[[int], Parts] = lambda number: GOOD
    status: int = 200
    model: str = "m"
    context: int | None = None
    metrics: Callable[[int], str] | None = None
    plain: Callable[[str, Any, int], tuple[int, Any]] | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    port: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def whole(self, path: str, body: Any) -> tuple[int, bytes] | None:
        """Status and body of an answer that is not streamed."""
        if self.plain and not body.get("stream"):
            status, value = self.plain(path, body, self.at_once)
            return status, json.dumps(value).encode()
        return None if self.status == 200 else (self.status, b'{"error": "no room [/]"}')


def counters(requests: int) -> str:
    """As of a server that drafts 10 times for each request and has two thirds and half accepted."""
    return METRICS.format(
        drafts=10 + 10 * requests,
        draft_tokens=20 + 20 * requests,
        accepted=5 + 11 * requests,
        first=4 + 6 * requests,
        second=1 + 5 * requests,
    )


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(
                    200, json.dumps({"data": [{"id": stand_in.model, "max_model_len": stand_in.context}]}).encode()
                )
            elif self.path == "/metrics" and stand_in.metrics:
                self.answer(200, stand_in.metrics(len(stand_in.seen)).encode())
            else:
                self.answer(404, b"not here")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(stand_in.seen)
                stand_in.seen.append(body)
                stand_in.at_once += 1
                stand_in.most_at_once = max(stand_in.most_at_once, stand_in.at_once)
            try:
                self.stream(number, body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has given up
            finally:
                with lock:
                    stand_in.at_once -= 1

        def stream(self, number: int, body: Any) -> None:
            if whole := stand_in.whole(self.path, body):
                self.answer(*whole)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")  # sets close_connection too
            self.end_headers()
            for part in stand_in.parts(number):
                if isinstance(part, float):
                    time.sleep(part)
                else:
                    self.wfile.write(part)
                    self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", stand_in.port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
