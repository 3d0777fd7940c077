"""Requests that nobody should send, on every endpoint: each gets its status and the one envelope, and leaves nothing behind."""
from __future__ import annotations

import gc
import itertools
import json
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h2.config
import h2.connection
import httpx2 as httpx
import pytest
import schemathesis
import serve
import trio
from conftest import QUESTION, LocalServer, ask

CHAT, TEXT, TOKENIZE, DETOKENIZE, LOAD = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/load_model"
USER = QUESTION[0]
ANY = object()  # whatever the field is that the error names


def bad(path: str, rows: list[tuple], **base: Any) -> list[tuple]:
    """Return (path, body, status, code, param) for rows of (fields, code, param), a 400 each; `base` makes them complete."""
    return [(path, {**base, **fields}, 400, code, param) for fields, code, param in rows]


def values(names: dict[str, list[Any]], code: str = "invalid_value") -> list[tuple]:
    """Return a row for each bad value of each field, which the error names."""
    return [({name: value}, code, name) for name, values in names.items() for value in values]


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


def parts(*items: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(items)}]}


def calls(*items: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": list(items)}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def schema(shape: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}, **fields}


SHARED = {  # fields of chat and text completions
    "model": [5, [], {}, True], "stream": [0, "true", []], "stream_options": [[], "x", {"include_usage": 1}],
    "temperature": ["hot", [], {}, -1e-9, 2.0001, 1e308], "top_p": [-0.1, 1.0001, "x", {}], "top_k": [-2, 1.5, "x", 1e300],
    "min_p": [-1, 2, []], "presence_penalty": [-3, 3, "x"], "frequency_penalty": [-2.01, 2.01, {}],
    "repetition_penalty": [0, -1, "x"], "n": [0, -1, 129, 10**30, 1.5, "1", [1]], "min_tokens": [-1, "x", 1.5],
    "stop": ["", [""], ["a", ""], 5, {}, [5], [None], ["a"] * 1025, "a" * 20_000, ["a" * 1000] * 100],
    "stop_token_ids": [5, "x", [-1], [49152], [2**63], [1.5], list(range(1025))], "ignore_eos": [1, "x"],
    "seed": [2**64, -2**63 - 1, 1.5, "x", 10**400],
    "logit_bias": [[], 5, {"x": 1}, {"": 1}, {"-1": 1}, {"49152": 1}, {"1": 101}, {"1": "x"}, {"1e3": 1},
                   {str(i): 1 for i in range(1025)}],
    "generation_config": [5, {}, "x", "[]", "null", "{" * 50, '{"temperature": "x"}', '{"top_k": 1.5}', '{"do_sample": 1}'],
}
PLACES = {"stop_token_ids", "logit_bias", "stop", "stream_options"}  # the error may name a place within the field
UNSUPPORTED = {
    "best_of": [2, 0], "use_beam_search": [True], "length_penalty": [0.5], "guided_json": [{}], "guided_regex": ["a"],
    "guided_choice": [["a"]], "guided_grammar": ["a"], "prompt_logprobs": [1], "bad_words": [["a"]], "allowed_token_ids": [[1]],
    "include_stop_str_in_output": [True], "skip_special_tokens": [False], "truncate_prompt_tokens": [1],
    "logits_processors": [["x"]], "kv_transfer_params": [{}], "service_tier": ["flex", 5],
    "spaces_between_special_tokens": [False],
}
SCHEMAS: list[Any] = [
    {"type": "zz"}, {"type": 5}, {"properties": []}, {"required": {}}, {"enum": []}, {"$ref": "#/$defs/none"}, {"$ref": 5},
    {"$ref": "http://127.0.0.1/x"}, {"$ref": "file:///etc/passwd"}, {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(?=a)b"}, {"type": "integer", "minimum": 5, "maximum": 1}, {"allOf": [{}, 5]},
    {"multipleOf": 1e-300, "type": "number"}, {"type": "integer", "multipleOf": 123456789}, {"format": "zzz", "type": "string"},
    {"type": "array", "prefixItems": 5}, {"not": {}}, {"enum": list(range(60_000))},
]
REGEXES = ["(", "(?<=a)b", "(a)\\1", "a" * 300_000, "(?=a)b", "[^\\s\\S]", "(" * 10_000]
GRAMMARS = ["", " ", "start: (((", "start: a", "start: @answer", "start: start", 'start: %json {', "%import x.y\nstart: y",
            "start: <[999999999]>", "root ::= (", 'start: ("a"{1000}){1000}', "start: /(?<=a)b/", "\x00"]
ROWS = [
    *bad(CHAT, [({}, "invalid_value", "messages")]),
    *bad(CHAT, [({"messages": value}, "invalid_value", ANY) for value in (None, 5, "Hi", {}, [5], ["Hi"], [None], [[]])]),
    *bad(CHAT, [({"messages": []}, "invalid_messages", "messages")]
         + [({"messages": [{"role": role, "content": "x"}]}, "invalid_messages", "messages[0].role")
            for role in (None, 5, "", "robot", "USER", ["user"], {}, "x" * 100_000, "user\n")]
         + [({"messages": [{"role": "user", "content": content}]}, "invalid_messages", "messages[0].content")
            for content in (None, 5, True, {}, {"type": "text"})]
         + [(parts(part), "unsupported_content", "messages[0].content[0].type") for part in (
             5, None, [], "x", {}, {"type": 5}, {"type": "image"}, {"type": "input_audio", "input_audio": {"data": "x"}},
             {"type": "file", "file": {"file_data": "x"}}, {"type": "x" * 10_000})]
         + [(parts({"type": "text", "text": text}), "invalid_messages", "messages[0].content[0].text")
            for text in (None, 5, [], {})]
         + [(calls(call), "invalid_messages", "messages[1].tool_calls") for call in (
             5, None, "x", {}, {"function": None}, {"function": {}}, {"function": {"name": None}},
             {"function": {"name": "f", "arguments": 5}}, {"id": 5, "function": {"name": "f"}})]
         + [(calls(*[tool()] * 10_001), "invalid_messages", "messages[1].tool_calls")]
         + [({"messages": [USER, {"role": "user", "content": "word " * 9000}]}, "context_length_exceeded", None),
            ({"messages": [{"role": "user", "content": "a" * 2_000_000}]}, "context_length_exceeded", None)]),
    *bad(CHAT, [(fields, code, ANY if param in PLACES else param) for fields, code, param in values(SHARED)], messages=[USER]),
    *bad(CHAT, values(UNSUPPORTED, "unsupported_parameter"), messages=[USER]),
    *bad(CHAT, values({"functions": [[{}], 5], "function_call": [{"name": "f"}, "f"], "modalities": [["audio"], "text"],
                       "audio": [{}], "web_search_options": [{}], "chat_template": ["x", ""], "documents": [[{}]],
                       "echo": [True], "add_generation_prompt": [False], "suffix": ["x"], "moderation": [{}],
                       "mm_processor_kwargs": [{"a": 1}],
                       "thinking_token_budget": [5], "reasoning_effort": ["high", "", "x" * 5000]}, "unsupported_parameter"),
         messages=[USER]),
    *bad(CHAT, values({"max_tokens": [0, -1, 1.5, "x"], "max_completion_tokens": [0, "x"], "logprobs": [1, "x"],
                       "top_logprobs": [-1, 21, 1.5, 5], "chat_template_kwargs": [[], "x", 5], "reasoning_effort": [5],
                       "continue_final_message": [1, "x"], "parallel_tool_calls": [0, "x"],
                       "tools": ["x", {}, 5, [tool()] * 129, [tool(), tool()]], "tool_choice": ["any", 5, [], "required"],
                       "response_format": ["json", [], 5],
                       "structured_outputs": [[], "x", {}, {"regex": "a", "choice": ["a"]}]}), messages=[USER]),
    *bad(CHAT, [({"tools": [made]}, "invalid_value", ANY) for made in (
        5, None, [], {}, {"type": "x"}, {"type": "function"}, {"type": "function", "function": None}, tool(name=""),
        tool(name="a b"), tool(name="a" * 65), tool(name="f\n"), tool(name=5), tool(parameters=5), tool(parameters=[]))]
        + [({"tools": [tool()], "tool_choice": tool(name="g")}, "invalid_value", "tool_choice"),
           ({"tool_choice": tool()}, "invalid_value", "tool_choice"),
           ({"continue_final_message": True}, "invalid_messages", "messages"),
           ({"chat_template_kwargs": {"messages": []}}, "reserved_name", "chat_template_kwargs"),
           ({"chat_template_kwargs": {"chat_template": "x"}}, "reserved_name", "chat_template_kwargs"),
           ({"max_tokens": 5, "min_tokens": 6}, "invalid_value", "min_tokens"),
           ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
           ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
           ({"response_format": {}}, "invalid_value", ANY), (schema([]), "invalid_value", ANY),
           ({"structured_outputs": {"never": 1}}, "invalid_value", ANY),
           ({"structured_outputs": {"choice": []}}, "invalid_value", ANY),
           ({"structured_outputs": {"choice": ["a" * 300_000]}}, "grammar_too_large", "structured_outputs.choice"),
           ({"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json"),
           (schema({"a": ["x" * 100] * 30_000}), "grammar_too_large", "response_format"),
           (schema(nested(900)), ANY, ANY)]
        + [(schema(shape), ANY, "response_format") for shape in SCHEMAS]
        + [({"structured_outputs": {"regex": regex}}, ANY, ANY) for regex in REGEXES]
        + [({"structured_outputs": {"grammar": text}}, ANY, ANY) for text in GRAMMARS], messages=[USER]),
    *bad(TEXT, [({}, "invalid_value", "prompt")]
         + [({"prompt": prompt}, "invalid_value", ANY) for prompt in (
             None, 5, {}, [], [None], ["a", 5], [1, "a"], ["a", [1]], [-1], [[-1]], [1.5], [[1.5]], [[[1]]], [True], [49152],
             [[1], [49152]], [2**64], [10**400], ["a"] * 1025, [[1, "a"]])]
         + [({"prompt": prompt}, "empty_prompt", None) for prompt in ("", [""], [[]], ["a", ""])]
         + [({"prompt": prompt}, "context_length_exceeded", None) for prompt in (
             [5] * 8192, [[5] * 9000], "word " * 9000, ["a", "b" * 3_000_000])]),
    *bad(TEXT, values({"max_tokens": [-1, 0, 1.5, "x"], "echo": [1, "x"], "logprobs": [-1, 21, True, "x"], "suffix": [5],
                       "add_special_tokens": [1, "x"], "n": [0, 129], "temperature": [3, "x"], "stop": ["", ["a" * 1000] * 100],
                       "generation_config": ["x"], "stream_options": [{}]}), prompt="a"),
    *bad(TEXT, values({**UNSUPPORTED, "suffix": ["x"], "structured_outputs": [{"regex": "a"}], "prompt_embeds": ["x"],
                       "response_format": [{"type": "json_object"}], "return_token_ids": [True],
                       "return_tokens_as_token_ids": [True]}, "unsupported_parameter"), prompt="a"),
    *bad(TEXT, [({"prompt": ["a"] * 9, "n": 128}, "invalid_value", "prompt"),
                ({"prompt": [1], "suffix": "x"}, "unsupported_parameter", "suffix"),
                ({"max_tokens": 2, "min_tokens": 3}, "invalid_value", "min_tokens")], prompt="a"),
    *bad(TOKENIZE, [({}, "invalid_value", "prompt"), *values({"prompt": [None, 5, [], {}, ["a"], "a" * (4 << 20) + "a"]})]),
    *bad(TOKENIZE, [*values({"model": [5, []], "add_special_tokens": [1, "x"]}),
                    *values({"messages": [[]], "return_token_strs": [True, 5]}, "unsupported_parameter")], prompt="a"),
    *bad(DETOKENIZE, [({}, "invalid_value", "tokens"), *[({"tokens": ids}, "invalid_value", ANY) for ids in (
        None, 5, "x", {}, [-1], [1.5], ["a"], [None], [[1]], [True], [49152], [2**64], [10**400], [1] * 262_145)]]),
    *bad(LOAD, [({}, "invalid_value", "model"), *values({"model": [None, 5, [], {}]})]),
    *[(path, {**body, "model": name}, 404, "model_not_found", "model") for path, body in (
        (CHAT, {"messages": [USER]}), (TEXT, {"prompt": "a"}), (TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": [1]}))
      for name in ("nobody/nothing", "/etc/passwd", "../..", "~root", "\0", "a b", "http://127.0.0.1/", "x" * 100_000,
                   "a/b@c:d.gguf")],
]
RAW_BODIES = [b"", b" ", b"{", b"}", b"nonsense", b"[]", b"null", b"5", b'"x"', b"\x00", b"\xff\xfe{}", b'{"a":', b'{"a":1,}',
              b"{'a': 1}", b'{"a":1}{}', b'{"a":NaN}', b'{"a":01}', b'{"prompt":"\xff","messages":[{"role":"\xff"}]}',
              b'{"prompt":"\\ud800","messages":[{"role":"user","content":"\\ud800"}]}', b"[" * 100_000, b'{"a":' * 100_000,
              b'{"prompt":"a\nb","messages":1}', b"{},", b'{"x":[' + b"{}," * 1_500_000 + b"{}]}"]
ROUTES = [
    ("GET", "/", 200), ("DELETE", "/", 405), ("GET", "/favicon.ico", 404), ("GET", "/.env", 404), ("GET", "/v1", 404),
    ("GET", "/v1/", 404),
    ("GET", "/v1/models/", 404), ("GET", "/v1/models/nobody", 404), ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/" + "x" * 9000, 404), ("GET", "/health/", 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/chat/completions/x", 404), ("POST", "/v1/chat", 404),
    ("POST", "/v1/chat/completions?", 415), ("POST", "/metrics", 405), ("POST", "/docs", 405), ("PUT", "/openapi.json", 405),
    ("DELETE", CHAT, 405), ("PATCH", TEXT, 405), ("GET", TOKENIZE, 405), ("GET", DETOKENIZE, 405), ("GET", LOAD, 405),
    ("GET", "/reset", 405), ("POST", "/health", 405), ("POST", "/v1/models", 405), ("DELETE", "/v1/models/x", 405),
    ("POST", "/tokenizer_info", 405), ("GET", "/tokenizer_info?model=nobody/nothing", 404), ("TRACE", "/health", 405),
    ("GET", "/tokenizer_info?model=%00", 404), ("BREW", "/health", 405), ("GET", "/v1/models?" + "x=" * 3000, 200),
]


def error_of(content: bytes, kind: str) -> dict[str, Any]:
    """Return the error of an answer, in the one envelope there is, which tells nothing of this machine."""
    assert kind == "application/json", (kind, content[:200])
    body = json.loads(content)
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and body["error"]["type"] and body["error"]["code"] and len(content) < 20_000
    assert b"Traceback" not in content and b" at 0x" not in content and b"site-packages" not in content, content
    return body["error"]


def counts(server: LocalServer) -> tuple[int, int]:
    """Return how many tasks and files there are."""
    gc.collect()
    found: list[int] = []
    done = threading.Event()
    server.token.run_sync_soon(lambda: (found.append(trio.lowlevel.current_statistics().tasks_living), done.set()))
    assert done.wait(5)
    return found[0], len(os.listdir("/proc/self/fd"))


def assert_nothing_left(server: LocalServer, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while serve.app.active:
        assert time.monotonic() < deadline, serve.app.active
        time.sleep(0.001)
    server.assert_idle()


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[httpx.Client]:
    """A client that keeps its connection. At the end no task, file or thread is left that was not there before."""
    ask(server, max_tokens=1)
    time.sleep(0.2)
    before, threads = counts(server), threading.active_count()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    deadline = time.monotonic() + 15  # an idle thread of trio's ends after 10 s
    while counts(server) > before or threading.active_count() > threads + serve.app.rendering.total_tokens:
        assert time.monotonic() < deadline, (counts(server), before, threading.enumerate())
        time.sleep(0.1)
    assert len(serve.Grammars(server.engine.model).compiling) == 0


turn = itertools.count()


def check(server: LocalServer, response: httpx.Response, status: int, code: object = ANY, param: object = ANY) -> None:
    """Check an answer, that nothing is left of its request, and now and then that a good request is answered."""
    assert response.status_code == status, response.text[:500]
    if status != 200:
        error = error_of(response.content, response.headers["content-type"])
        assert (code is ANY or error["code"] == code) and (param is ANY or error["param"] == param), error
    assert_nothing_left(server)
    if next(turn) % 25 == 0:
        assert ask(server, max_tokens=8).json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


@pytest.mark.parametrize("path, body, status, code, param", ROWS, ids=[f"{row[0]} {str(row[1])[-40:]}" for row in ROWS])
def test_bodies(server: LocalServer, client: httpx.Client, path: str, body: dict, status: int, code: object,
                param: object) -> None:
    check(server, client.post(path, json=body), status, code, param)


@pytest.mark.parametrize("path", [CHAT, TEXT, TOKENIZE, DETOKENIZE, LOAD])
def test_malformed_bodies(server: LocalServer, client: httpx.Client, path: str) -> None:
    for body in RAW_BODIES:
        check(server, client.post(path, content=body, headers={"Content-Type": "application/json"}), 400)
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "json"):
        check(server, client.post(path, content=b"{}", headers={"Content-Type": kind}), 415, "unsupported_media_type")


@pytest.mark.parametrize("method, path, status", ROUTES, ids=[f"{row[0]} {row[1][:50]}" for row in ROUTES])
def test_routes(server: LocalServer, client: httpx.Client, method: str, path: str, status: int) -> None:
    check(server, client.request(method, path, headers={"Content-Type": "text/plain"}), status)


def test_rows_are_many() -> None:
    assert len(ROWS) + 5 * (len(RAW_BODIES) + 4) + len(ROUTES) > 250


# Over raw sockets.


def connect(server: LocalServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(path: str = CHAT, extra: str = "", **fields: Any) -> bytes:
    body = json.dumps({"messages": QUESTION, **fields} if path == CHAT else fields).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def head(*lines: str, method: str = "POST", path: str = TOKENIZE) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""]).encode("latin1")


CHUNKED = head("Content-Type: application/json", "Transfer-Encoding: chunked")
UPGRADE = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
           "Sec-WebSocket-Version: 13"]
UPGRADING = ("GET /health HTTP/1.1\r\nHost: localhost\r\n" + "\r\n".join(UPGRADE) + "\r\n\r\n").encode()
SENT = [  # what is sent, and the status of the answer; None: the connection is closed without one
    ([b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1"], 400), ([b"\0" * 100 + b"\r\n\r\n"], 400), ([b"GET\r\n\r\n"], 400),
    ([b"GET /health\r\n\r\n"], 400), ([b"GET /health HTTP/1\r\n\r\n"], 400), ([b"GET /health HTTP/1.1\r\n\r\n"], 400),
    ([b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"], 400), ([head("Bad Header: x", method="GET")], 400),
    ([head(": x", method="GET")], 400), ([head("X: a\x00b", method="GET")], 400),
    ([b"GET /hea lth HTTP/1.1\r\nHost: a\r\n\r\n"], 400),
    ([head("X: " + "a" * 70_000, method="GET")], 431), ([head(*[f"X{i}: {'a' * 900}" for i in range(90)], method="GET")], 431),
    ([head(path="/" + "a" * 70_000, method="GET")], 431), ([head(method="GET", path="/\xe9")], 400),
    ([head("Content-Length: -5")], 400), ([head("Content-Length: x")], 400),
    ([head("Content-Length: 5", "Content-Length: 6")], 400),
    ([head("Content-Length: " + "9" * 30)], 400), ([head("Content-Length: 99999999999")], 413),
    ([head("Transfer-Encoding: gzip")], 400), ([head("Transfer-Encoding: chunked, gzip")], 400),
    ([CHUNKED, b"zz\r\n"], 400), ([CHUNKED, b"-1\r\n"], 400), ([CHUNKED, b"2;" + b"x" * 70_000], 431),
    ([CHUNKED, b"2\r\n{}XX"], 400), ([CHUNKED, b"2\r\n{}\r\n0\r\n\r\n"], 400), ([CHUNKED, b"f" * 30 + b"\r\n"], 400),
    ([head("Content-Length: 2", "Content-Type: application/json"), b"{", b"}"], 400),
    ([head("Content-Length: 2", "Content-Type: application/json", "Expect: 100-continue"), b"{}"], 100),
    ([b"GET ?x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"], 200),
    ([head(method="GET", path="http://evil.example/v1/nothing")], 404), ([head(method="GET", path="http://[/health")], 200),
    ([head(method="OPTIONS", path="*")], 404), ([head(method="CONNECT", path="localhost:80")], 404),
    ([b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"], 403),
    ([b"GET /health HTTP/1.1\r\nHost: localhost, evil.example\r\nConnection: close\r\n\r\n"], 403),
    ([UPGRADING], 403),
    ([post()[:40]], None), ([post()[:-5]], None), ([b"G"], None), ([b""], None), ([b"\r\n\r\n"], None),
]


def exchange(server: LocalServer, sent: list[bytes], leave: bool) -> bytes:
    """Send pieces and return what comes back, up to the end of it or, if `leave`, nothing: with a reset."""
    with connect(server) as connection:
        for piece in sent:
            connection.sendall(piece)
            time.sleep(0.01)
        if leave:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        received = b""
        try:
            while data := connection.recv(1 << 16):
                received += data
                if received.startswith(b"HTTP/1.1 100"):
                    break
        except ConnectionResetError:  # it has closed with some of ours unread
            pass
        return received


@pytest.mark.parametrize("sent, status", SENT, ids=[f"{row[0][-1][:60]!r}" for row in SENT])
def test_raw_requests(server: LocalServer, client: httpx.Client, sent: list[bytes], status: int | None) -> None:
    received = exchange(server, sent, leave=status is None)
    if status is not None:
        assert received.split(b" ")[1:2] == [str(status).encode()], received[:300]
        answer, _, content = received.partition(b"\r\n\r\n")
        if status >= 400 and b"content-length: 0" not in answer:
            error_of(content, "application/json" if b"content-type: application/json" in answer else str(answer))
    assert_nothing_left(server)


GET = (b":method", b"GET")


@pytest.mark.parametrize("headers", [
    [GET, (b":path", b"/\xff")], [(b":method", b"\xff"), (b":path", b"/")], [GET, (b":path", b"")], [GET], [(b":path", b"/")],
    [GET, (b":path", b"x")], [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":path", b"/")],
    [GET, (b":path", b"/"), (b"x\xff", b"\n")]], ids=str)
def test_http_2_that_is_none_ends_its_connection_alone(server: LocalServer, client: httpx.Client, headers: list) -> None:
    """hypercorn lets the error of some of these through, which ended the server."""
    made = h2.connection.H2Connection(h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None))
    made.initiate_connection()
    made.send_headers(1, [(b":scheme", b"http"), (b":authority", b"localhost"), *headers], end_stream=True)
    with connect(server) as connection:
        connection.sendall(made.data_to_send())
        assert connection.recv(1 << 16)
    assert client.get("/health").status_code == 200
    assert_nothing_left(server)


GRAMMAR = {"structured_outputs": {"choice": [f"choice {i}" for i in range(500)]}}
TAKES_LONG = [post(max_tokens=300, ignore_eos=True, stream=True), post(max_tokens=300, ignore_eos=True, n=5),
              post(max_tokens=300, ignore_eos=True, stream=True, n=3, logprobs=True, top_logprobs=20), post(**GRAMMAR, n=4),
              post(TEXT, prompt=["Once upon a time"] * 20, echo=True, logprobs=5, max_tokens=50, stream=True),
              post(TOKENIZE, prompt="hello world " * 100_000), post(DETOKENIZE, tokens=[5] * 200_000),
              post(messages=[USER] * 20_000), post(LOAD, model="nobody/nothing")]


@pytest.mark.parametrize("after", [0, 0.03, 0.2])
@pytest.mark.parametrize("reset", [False, True])
def test_who_leaves_leaves_nothing(server: LocalServer, client: httpx.Client, after: float, reset: bool) -> None:
    connections = [connect(server) for _ in TAKES_LONG]
    for connection, sent in zip(connections, TAKES_LONG):
        connection.sendall(sent)
    time.sleep(after)
    for connection in connections:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert_nothing_left(server)


def test_slow_clients_get_their_answer_and_hold_up_nobody(server: LocalServer, client: httpx.Client) -> None:
    """One sends byte by byte, one reads that way; one that only begins its headers is cut off."""
    sent = post(max_tokens=8)
    with connect(server) as writer, connect(server) as reader, connect(server) as silent:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(post(max_tokens=20, ignore_eos=True, stream=True, n=2, logprobs=True, top_logprobs=20, temperature=1))
        silent.sendall(b"POST / HTTP/1.1\r\nHost: ")
        for i in range(len(sent)):
            writer.sendall(sent[i:i + 1])
        assert b"Paris" in b"".join(iter(lambda: writer.recv(1 << 16), b""))
        started = time.monotonic()
        assert ask(server, max_tokens=8).status_code == 200
        assert time.monotonic() - started < 5
        reader.settimeout(30)
        assert b"[DONE]" in b"".join(iter(lambda: reader.recv(4096), b""))
        silent.settimeout(10)
        assert silent.recv(100) == b""
    assert_nothing_left(server)


# Nothing blocks the event loop.


def test_health_answers_throughout(server: LocalServer, client: httpx.Client) -> None:
    """What takes long to read is read on threads, and what takes long to compute is computed on another."""
    load = [
        {"messages": [USER] * 30_000}, {"messages": [{"role": "user", "content": "a\n" * 4_000_000}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [tool()] * 9_000}]}, {"messages": [USER], **GRAMMAR, "n": 128},
        {"messages": [USER], **schema({"enum": [f"v{i}" for i in range(9000)]}), "n": 16},
        {"messages": [USER], "structured_outputs": {"regex": "(a|b)*a(a|b){12}"}},
        {"messages": [USER], "tools": [tool(name=f"f{i}", parameters={"properties": {
            f"p{j}": {"enum": list(range(9))} for j in range(20)}}) for i in range(100)], "tool_choice": "required"},
        {"messages": [USER], **schema({"a": ["x" * 1000] * 9_000})},
    ]
    stop, waits = threading.Event(), []

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as prober:
            while not stop.is_set():
                started = time.perf_counter()
                assert prober.get("/health").status_code == 200
                waits.append(time.perf_counter() - started)
                time.sleep(0.01)

    with ThreadPoolExecutor(9) as pool:
        probing = pool.submit(probe)
        jobs = [pool.submit(ask, server, **{"max_tokens": 2, **fields}) for fields in load]
        jobs += [pool.submit(client.post, TOKENIZE, json={"prompt": "hello, world " * 100_000}),
                 pool.submit(client.post, DETOKENIZE, json={"tokens": [5] * 250_000})]
        assert {job.result().status_code for job in jobs} <= {200, 400}
        stop.set()
        probing.result()
    print(f"health: median {statistics.median(waits) * 1e3:.1f} ms, longest {max(waits) * 1e3:.0f} ms of {len(waits)}")
    assert statistics.median(waits) < 0.05 and max(waits) < 0.5
    assert_nothing_left(server)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


def test_a_template_that_does_not_end_is_stopped(server: LocalServer, client: httpx.Client,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, or when nobody waits any more: its thread is free again, and does other work."""
    with monkeypatch.context() as patch:
        patch.setattr(server.engine.model.tokenizer, "chat_template", ENDLESS)
        patch.setattr(serve, "PROMPT_SECONDS", 0.3)
        with ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(ask, server) for _ in range(8)]:
                response = job.result()
                assert (response.status_code, response.json()["error"]["code"]) == (400, "prompt_too_complex")
        patch.setattr(serve, "PROMPT_SECONDS", 60)
        for _ in range(6):
            with connect(server) as connection:
                connection.sendall(post())
                time.sleep(0.05)
    assert_nothing_left(server)
    deadline = time.monotonic() + 5
    while serve.app.rendering.borrowed_tokens:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    check(server, ask(server, max_tokens=1), 200)


# Faults, at every step of a request's life.


def fault(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"a secret from {__file__}")


FAULTS = {
    "decode": (serve.msgspec.json, "decode"), "get the model": (serve.ModelPool, "get"), "render": (serve, "plain_messages"),
    "tokenize": (serve, "tokenize"), "grammar": (serve, "chat_grammar"), "compile": (serve, "compile_grammar"),
    "submit": (serve.Engine, "submit"), "enter": (serve.Engine, "enter"), "sample": (serve, "sample"),
    "mask": (serve, "allowed_tokens"), "detokenise": (serve.Detokenizer, "add"), "chunks": (serve, "message_delta"),
    "usage": (serve, "usage"), "fields": (serve, "sampling_params"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", FAULTS)
def test_faults(server: LocalServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, step: str, stream: bool) -> None:
    """The request is a 500 that tells nothing, and leaves nothing."""
    fields = {"messages": [USER], "max_tokens": 8, "stream": stream, "n": 2,
              "structured_outputs": {"regex": f"[a-z]{{9}}{step}{stream}"},
              "stream_options": {"include_usage": True} if stream else None}
    with monkeypatch.context() as patch:
        owner, name = FAULTS[step]
        whole = getattr(owner, name)  # if there is anything to sample without grammars, nothing is wrong: the engine goes on
        spare = step == "sample"
        patch.setattr(owner, name, lambda *args, **options: whole(*args, **options) if spare and not any(
            seq.matcher for seq in args[1]) else fault())
        response = client.post(CHAT, json=fields)
    if response.status_code == 200 and stream:  # too late for a status
        *_, event = response.text.removesuffix("\n\n").split("\n\n")
        error = error_of(event.removeprefix("data: ").encode(), "application/json")
    else:
        assert response.status_code in (500, 400) and (step == "render" or response.status_code == 500), response.text
        error = error_of(response.content, response.headers["content-type"])
    assert error["code"] == ("template_error" if response.status_code == 400 else "internal_error")
    assert "secret" not in str(error)
    assert_nothing_left(server)
    check(server, ask(server, max_tokens=8), 200)


def test_a_forward_pass_that_fails_fails_its_own_request(server: LocalServer, client: httpx.Client,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, who share its prompt: out of memory is the request's fault, anything else is ours."""
    run_step = server.engine.run_step
    for error, status, code in ((RuntimeError("a bug"), 500, "internal_error"), (MemoryError(), 400, "out_of_memory")):
        def fails(step: serve.Step, meanwhile: Callable[[], None], error: Exception = error) -> Any:
            if any(seq.sampling.seed == 666 for seq in step.batch):
                raise error
            return run_step(step, meanwhile)

        with monkeypatch.context() as patch, ThreadPoolExecutor(6) as pool:
            patch.setattr(server.engine, "run_step", fails)
            jobs = [pool.submit(ask, server, max_tokens=8, seed=666 if i == 2 else 1) for i in range(6)]
            answers = [job.result() for job in jobs]
        assert [answer.status_code for answer in answers] == [200, 200, status, 200, 200, 200]
        assert error_of(answers[2].content, "application/json")["code"] == code
        assert {answer.json()["choices"][0]["message"]["content"] for i, answer in enumerate(answers) if i != 2} == {
            "The capital of France is Paris."}
        assert_nothing_left(server)
    assert ask(server, max_tokens=8).json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


# What others try.


def test_schemathesis_finds_nothing(server: LocalServer, client: httpx.Client) -> None:
    """It makes requests of our own description, and finds no 5xx."""
    import hypothesis

    made = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    made.config.base_url = server.url
    tried: dict[str, int] = {}

    @hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=hypothesis.strategies.data())
    def all_is_well(data: Any) -> None:
        for operation in made.get_all_operations():
            case = data.draw(operation.ok().as_strategy())
            if isinstance(case.body, dict):  # answers as long as it likes are not what is tried here
                case.body["max_output_tokens" if case.path == "/v1/responses" else "max_tokens"] = 2
            response = case.call()
            tried[operation.ok().label] = response.status_code
            assert response.status_code < 500, response.text

    all_is_well()
    assert len(tried) > 10
    assert_nothing_left(server)
