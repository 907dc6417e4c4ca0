"""A real HTTP server on this machine: right answers, and every way of not giving one."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from needles import TASKS, SmallWriter, ask
from oracle import ByteTokenizer

from rwkvx.errors import InputError
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.models.endpoint import Endpoint, open_endpoint

pytest.importorskip("openai")
NEEDLE: dict[str, Any] = {"tasks": {"needle": TASKS["needle"]}, "lengths": (400,), "samples": 6}


@dataclass
class Server:
    """How it behaves, and what it was asked.

    bad: what happens to prompts with these keys, by the index of the sample. fails: so many first
    requests get status 503.
    """

    bad: dict[str, str] = field(default_factory=dict)
    fails: int = 0
    logprobs: bool = True
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "test"}])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)
    url: str = ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        found = re.search(r"The pass key is (\d+)", prompt)
        text = f" {found[1]}" if found else " none"
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs"):
            tokens = {"content": [{"token": text, "logprob": -0.5, "bytes": None}]}
            choice["logprobs"] = tokens if chat else {"token_logprobs": [-0.25, -0.75]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": 0}
        return {"id": "x", "object": "y", "created": 0, "model": "test", "choices": [choice],
                "usage": usage}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_: Any) -> None:
        return

    def send(self, status: int, content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send(200, json.dumps({"object": "list", "data": self.state.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with state.lock:
            state.bodies.append(body)
            state.now += 1
            state.most = max(state.most, state.now)
            failing = state.fails > 0
            state.fails -= failing
        try:
            self.reply(body, failing)
        finally:
            with state.lock:
                state.now -= 1

    def reply(self, body: dict[str, Any], failing: bool) -> None:
        good = self.state.answer(body)
        content = json.dumps(good).encode()
        prompt = body.get("prompt") or body["messages"][0]["content"]
        bad = next((how for key, how in self.state.bad.items() if key in prompt), "")
        if failing:
            self.send(503, b'{"error": {"message": "later"}}')
        elif body.get("logprobs") and not self.state.logprobs:
            self.send(400, b'{"error": {"message": "no logprobs here"}}')
        elif bad == "stalls":
            time.sleep(4)
            self.close_connection = True
        elif bad == "trickles":
            self.send(200, b"", length=len(content))
            self.close_connection = True
            for byte in content[:40]:
                with contextlib.suppress(OSError):  # nobody listens any more
                    self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif bad == "half":
            self.send(200, content[: len(content) // 2], length=len(content))
            self.close_connection = True
        elif bad == "garbage":
            self.send(200, b"<html>nothing here</html>")
        elif bad == "empty":
            self.send(200, json.dumps(good | {"choices": []}).encode())
        elif bad == "other":
            self.send(200, b'["what"]')
        elif bad == "unfinished":
            good["choices"][0]["finish_reason"] = None
            self.send(200, json.dumps(good).encode())
        elif bad == "refused":
            self.send(400, b'{"error": {"message": "maximum context length is 10"}}')
        else:
            self.send(200, content)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    handler = type("Own", (Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        yield state
        http.shutdown()
        thread.join()


def endpoint(server: Server, **more: Any) -> Endpoint:
    return open_endpoint(server.url, "test", ByteTokenizer(), **more)


def keys(count: int) -> list[str]:
    task = TASKS["needle"]
    return [f"is {task.sample(SmallWriter(), 400, i).answers[0]}." for i in range(count)]


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("chat", [False, True])
def test_right_answers(server: Server, tmp_path: Path, chat: bool) -> None:
    settings = Settings(chat=chat)
    found = ask(endpoint(server, chat=chat), tmp_path, **NEEDLE, settings=settings)
    assert found["tasks"]["needle"]["lengths"]["400"]["score"] == 1.0
    assert [row["logprob"] for row in answers(tmp_path)] == [-0.5] * 6
    assert {row["endpoint_tokens"] for row in answers(tmp_path)} == {392}
    assert found["warnings"] == []
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0, 8, ["."])
    assert ("messages" in body) is chat
    asked = len(server.bodies)
    ask(endpoint(server, chat=chat), tmp_path, **NEEDLE, settings=settings)
    assert len(server.bodies) == asked


def test_several_at_a_time(server: Server, tmp_path: Path) -> None:
    ask(endpoint(server), tmp_path / "one", **NEEDLE, concurrency=1)
    assert server.most == 1
    ask(endpoint(server), tmp_path / "many", **NEEDLE, concurrency=4)
    assert server.most <= 4
    assert answers(tmp_path / "one") == answers(tmp_path / "many")


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.fails = 2
    found = ask(endpoint(server), tmp_path, **NEEDLE)
    assert found["total"]["failed"] == 0
    assert len(server.bodies) == 8


def test_a_server_without_log_probabilities(server: Server, tmp_path: Path) -> None:
    server.logprobs = False
    found = ask(endpoint(server), tmp_path, **NEEDLE, concurrency=1)
    assert found["total"]["scored"] == 6
    assert len(server.bodies) == 7
    assert answers(tmp_path)[0]["logprob"] is None


REASONS = {
    "stalls": "no answer within 1 s",
    "trickles": "no answer within 1 s",
    "half": "connection broke",
    "garbage": "not an answer of this protocol",
    "empty": "not an answer of this protocol",
    "other": "not an answer of this protocol",
    "unfinished": "the answer was cut short",
    "refused": "maximum context length is 10",
}


def test_bad_answers_fail_one_by_one_and_are_tried_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkvx_evals.models.endpoint.RETRIES", 1)
    monkeypatch.setattr("rwkvx_evals.models.endpoint.GRACE", 1.0)
    count = len(REASONS)
    server.bad = dict(zip(keys(count), REASONS, strict=True))
    began = time.monotonic()
    samples = NEEDLE | {"samples": count + 2}
    found = ask(endpoint(server, timeout=1.0), tmp_path, **samples)
    assert time.monotonic() - began < 30
    cell = found["tasks"]["needle"]["lengths"]["400"]
    assert (cell["asked"], cell["scored"], cell["failed"], cell["error"]) == (10, 2, 8, 8)
    for row, reason in zip(answers(tmp_path), REASONS.values(), strict=False):
        assert row["status"] == "error"
        assert reason in row["reason"], row
    server.bad = {}
    found = ask(endpoint(server), tmp_path, **samples)
    assert found["tasks"]["needle"]["lengths"]["400"]["score"] == 1.0


def test_a_server_that_cuts_prompts_is_noticed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server.answer

    def cut(body: dict[str, Any]) -> dict[str, Any]:
        found = whole(body)
        found["usage"]["prompt_tokens"] = 200
        return found

    monkeypatch.setattr(server, "answer", cut)
    found = ask(endpoint(server), tmp_path, **NEEDLE)
    assert "0.51 to 0.51 times the prompt tokens" in found["warnings"][0]


def test_what_the_server_has(server: Server, tmp_path: Path) -> None:
    assert open_endpoint(server.url, None, ByteTokenizer()).name == "test"
    with pytest.raises(InputError, match="has no model 'none'; it has test"):
        open_endpoint(server.url, "none", ByteTokenizer())
    server.models = [{"id": "test", "max_model_len": 500}, {"id": "other"}]
    with pytest.raises(InputError, match=r"has 2 models \(test, other\): name one"):
        open_endpoint(server.url, None, ByteTokenizer())
    found = ask(endpoint(server), tmp_path, **(NEEDLE | {"lengths": (400, 600)}))
    assert found["total"]["skipped"] == 6
    with pytest.raises(InputError, match="needs a model on this machine"):
        ask(endpoint(server), tmp_path / "loss", **NEEDLE, loss=True)


def test_nobody_there() -> None:
    with pytest.raises(InputError, match=r"cannot reach http://127.0.0.1:9/v1"):
        open_endpoint("http://127.0.0.1:9/v1", "test", ByteTokenizer())
