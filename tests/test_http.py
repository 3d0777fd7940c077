"""What every endpoint shares: the error envelope for all that can be wrong, limits, headers, and clients that leave."""
import contextlib
import dataclasses
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import serve
from conftest import QUESTION, LocalServer, ask, http

CHAT = "/v1/chat/completions"
LONG = [{"role": "user", "content": "word " * 9000}]
STORY = {"messages": [{"role": "user", "content": "Tell me a very long story."}], "ignore_eos": True}
TOOL = {"type": "function", "function": {"name": "f"}}


def error_of(response: httpx.Response) -> dict:
    """Return the error of a response, in the one envelope there is."""
    body = response.json()
    assert response.headers["content-type"] == "application/json" and list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] and error["code"]
    assert "Traceback" not in response.text and ".py" not in response.text and " at 0x" not in response.text
    return error


REFUSED = [  # fields of a chat completion → status, code, param
    ({"model": "nobody/nothing"}, 404, "model_not_found", "model"),
    ({"model": "/etc"}, 404, "model_not_found", "model"),
    ({"model": "../.."}, 404, "model_not_found", "model"),
    ({"model": "nobody/nothing@main:x.gguf"}, 404, "model_not_found", "model"),
    ({"model": "a" * 3000}, 404, "model_not_found", "model"),
    ({"reasoning_effort": "low"}, 400, "unsupported_parameter", "reasoning_effort"),
    ({"chat_template_kwargs": {"tokenize": False}}, 400, "reserved_name", "chat_template_kwargs"),
    ({"continue_final_message": True}, 400, "invalid_messages", "messages"),
    *[({name: value}, 400, "invalid_value", name) for name, value in [
        ("model", 5), ("messages", {}), ("messages", None), ("messages", "Hi"), ("stream", "yes"), ("stream", 1),
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"), ("temperature", True), ("top_p", 1.1), ("top_p", -1),
        ("min_p", 1.5), ("min_p", -0.1), ("top_k", -2), ("top_k", 1.5), ("top_k", "5"), ("presence_penalty", 2.1),
        ("presence_penalty", -2.1), ("frequency_penalty", 3), ("repetition_penalty", 0), ("repetition_penalty", -1),
        ("logit_bias", {"49152": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": -101}),
        ("logit_bias", {"x": 1}), ("logit_bias", {"5": "1"}), ("logit_bias", [5]), ("logit_bias", {str(2**70): 1}),
        ("n", 0), ("n", 129), ("n", 1.5), ("n", "2"), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5),
        ("max_completion_tokens", 0), ("min_tokens", -1),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 5), ("stop", ["a"] * 1025),
        ("stop_token_ids", [49152]), ("stop_token_ids", [-1]), ("stop_token_ids", 5), ("ignore_eos", "true"), ("seed", 2**64),
        ("seed", -2**63 - 1), ("seed", 1.5), ("seed", "7"), ("logprobs", 5), ("top_logprobs", 3), ("stream_options", 5),
        ("stream_options", {"include_usage": True}), ("generation_config", {}), ("generation_config", "[]"),
        ("generation_config", "{"), ("generation_config", '{"temperature": 9}'), ("generation_config", '{"max_new_tokens": 0}'),
        ("generation_config", '{"do_sample": "yes"}'), ("chat_template_kwargs", []),
        ("tools", "x"), ("tools", [TOOL, TOOL]), ("tools", [TOOL] * 129), ("tool_choice", "sometimes"),
        ("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("parallel_tool_calls", "x"), ("response_format", "json"), ("structured_outputs", {"regex": "a", "choice": ["a"]}),
        ("structured_outputs", {})]],
    ({"tools": [{}]}, 400, "invalid_value", "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, 400, "invalid_value", "tools[0].function.name"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ({"stream": True, "stream_options": {"include_usage": "no"}}, 400, "invalid_value", "stream_options.include_usage"),
    ({"max_tokens": 5, "min_tokens": 6}, 400, "invalid_value", "min_tokens"),
    ({"max_completion_tokens": 5, "min_tokens": 6}, 400, "invalid_value", "min_tokens"),
    *[({name: value}, 400, "unsupported_parameter", name) for name, value in [
        ("best_of", 2), ("functions", [{}]), ("function_call", {"name": "f"}), ("guided_json", {}),
        ("guided_regex", "a"), ("guided_choice", ["a"]),
        ("guided_grammar", "a"), ("modalities", ["text", "audio"]), ("audio", {"voice": "x", "format": "wav"}),
        ("web_search_options", {}), ("service_tier", "flex"), ("chat_template", "x"), ("prompt_logprobs", 1), ("echo", True),
        ("add_generation_prompt", False), ("use_beam_search", True), ("length_penalty", 2.0), ("bad_words", ["a"]),
        ("allowed_token_ids", [5]), ("include_stop_str_in_output", True), ("skip_special_tokens", False),
        ("truncate_prompt_tokens", 5), ("generation_config", '{"num_beams": 4}'),
        ("generation_config", '{"num_return_sequences": 3}')]],
]


@pytest.mark.parametrize("fields, status, code, param", REFUSED, ids=[str(row[0])[:60] for row in REFUSED])
def test_what_is_wrong_is_named(server: LocalServer, fields: dict, status: int, code: str, param: str) -> None:
    for extra in ({}, {"stream": True}) if "stream" not in fields and "stream_options" not in fields else ({},):
        response = ask(server, **fields, **extra)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert ask(server, max_tokens=1).status_code == 200
    server.assert_idle()


def test_a_prompt_too_long_is_told_both_numbers(server: LocalServer) -> None:
    response = ask(server, messages=LONG)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "8192" in error["message"] and "9031" in error["message"]


HARMLESS = [{"user": "u"}, {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}, {"prompt_cache_key": "k"},
            {"safety_identifier": "s"}, {"modalities": ["text"]}, {"verbosity": "low"}, {"prediction": {}}, {"best_of": 1},
            {"tools": []}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}}, {"never_heard_of": {"it": 1}},
            {"parallel_tool_calls": True}, {"model": None}, {"model": ""}, {"model": "SmolLM2-135M-Instruct@main"}]


def test_harmless_unknown_and_null_fields_are_accepted(server: LocalServer) -> None:
    everything = {key: value for fields in HARMLESS for key, value in fields.items()}
    nulls = {name: None for name in serve.ChatRequest.__struct_fields__ if name != "messages"}
    for fields in (*HARMLESS, everything, nulls):
        response = ask(server, **{"max_tokens": 2, **fields})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] in ("The capital", "The capital of France is Paris.")


BODIES = [
    (b"", "invalid_json"), (b"{", "invalid_json"), (b"\x00", "invalid_json"), (b'{"messages": []} x', "invalid_json"),
    (b'{"messages": NaN}', "invalid_json"), (b'{"messages":"\xff"}', None), (b'{"user":"\xff","messages":[]}', None),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json"), (b"\xff\xfe{\x00}\x00", "invalid_json"),
    (b"[]", "invalid_value"), (b"null", "invalid_value"), (b'"text"', "invalid_value"), (b"{}", "invalid_value"),
    (b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}', "invalid_value"), (b'{"x":' + b"[" * 100_000, None),
    (b'{"messages":[{"role":"user","content":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}]}", None),
    (b'{"messages":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}", None),
]


@pytest.mark.parametrize("body, code", BODIES, ids=[str(row[0][:40]) for row in BODIES])
def test_malformed_bodies(server: LocalServer, body: bytes, code: str | None) -> None:
    response = http.post(server.url + CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and error_of(response)["code"] == (code or error_of(response)["code"])
    assert ask(server, max_tokens=1).status_code == 200
    server.assert_idle()


def test_a_missing_field_is_named(server: LocalServer) -> None:
    assert error_of(http.post(server.url + CHAT, json={}))["param"] == "messages"


@pytest.mark.parametrize("method, path, status, code", [
    ("GET", "/nothing", 404, "not_found"), ("GET", "/v1/nothing", 404, "not_found"), ("POST", "/v1/nothing", 404, "not_found"),
    ("POST", "/v1/chat/completions/", 404, "not_found"), ("POST", "/v1//chat/completions", 404, "not_found"),
    ("GET", "/v1/models/", 404, "not_found"), ("GET", "/../../etc/passwd", 404, "not_found"),
    ("GET", "/%00%ff", 404, "not_found"),
    ("GET", CHAT, 405, "method_not_allowed"), ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ("PUT", "/health", 405, "method_not_allowed"), ("GET", "/reset", 405, "method_not_allowed"),
    ("POST", "/", 405, "method_not_allowed"),
])
def test_unknown_paths_and_methods(server: LocalServer, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, server.url + path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    if status == 405:
        assert method not in response.headers["allow"] and response.headers["allow"]


@pytest.mark.parametrize("content_type, status", [
    ("application/json", 200), ("application/json; charset=utf-8", 200), ("APPLICATION/JSON", 200),
    ("application/vnd.api+json", 200), ("text/plain", 415), ("application/x-www-form-urlencoded", 415),
    ("multipart/form-data; boundary=x", 415), ("application/notjson", 415), ("x", 415),
])
def test_content_types(server: LocalServer, content_type: str, status: int) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 1})
    response = http.post(server.url + CHAT, content=body, headers={"Content-Type": content_type})
    assert response.status_code == status
    if status != 200:
        assert error_of(response)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:1", 200), ("LocalHost:80", 200), ("127.0.0.1", 200), ("[::1]", 200), ("[::1]:8000", 200),
    ("127.9.9.9:5", 200), ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
    ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("evil.example:localhost", 403), ("", 403),
    ("[::2]", 403),
])
def test_foreign_hosts_are_turned_away(server: LocalServer, host: str, status: int) -> None:
    response = http.get(server.url + "/v1/models", headers={"Host": host})
    assert response.status_code == status and (status == 200 or error_of(response)["code"] == "forbidden_host")


def test_foreign_web_pages_are_turned_away(server: LocalServer) -> None:
    for method, path in (("POST", CHAT), ("POST", "/reset"), ("GET", "/v1/models"), ("OPTIONS", CHAT)):
        response = http.request(method, server.url + path, headers={"Origin": "https://evil.example"})
        assert response.status_code == 403 and not any(name.startswith("access-control") for name in response.headers)
    assert http.get(server.url + "/v1/models", headers={"Origin": server.url}).status_code == 200
    for origin in ("null", "http://[", "://", "http://"):
        assert http.get(server.url + "/v1/models", headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("sent, echoed", [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("é", False), (None, False)])
def test_request_ids(server: LocalServer, sent: str | None, echoed: bool) -> None:
    headers = {"X-Request-Id": sent.encode()} if sent else {}
    back = http.get(server.url + "/health", headers=headers).headers["x-request-id"]
    assert back and (back == sent) == echoed


def connect(server: LocalServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def request_bytes(version: str = "1.1", extra: str = "", **fields: object) -> bytes:
    body = json.dumps({"messages": QUESTION, **fields}).encode()
    return (f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    received = b""
    while data := connection.recv(1 << 16):
        received += data
    return received


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 104857600"])
def test_a_body_over_the_limit(server: LocalServer, framing: str) -> None:
    megabyte = b"x" * (1 << 20)
    with connect(server) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
                           .encode())
        try:
            for _ in range(100):
                connection.sendall(b"100000\r\n" + megabyte + b"\r\n" if "chunked" in framing else megabyte)
        except OSError:
            pass  # it did not wait for the end
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    assert ask(server, max_tokens=1).status_code == 200


def test_a_chunked_body_under_the_limit(server: LocalServer) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 8}).encode()
    response = http.post(server.url + CHAT, content=iter([body[:9], body[9:]]), headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("version, extra", [("1.1", "Connection: close\r\n"), ("1.0", "")])
def test_connections_are_closed_when_that_was_asked(server: LocalServer, version: str, extra: str, stream: bool) -> None:
    """An HTTP/1.0 client, as proxies are by default, knows the end of a stream by nothing else."""
    with connect(server) as connection:
        connection.sendall(request_bytes(version, extra, max_tokens=8, stream=stream))
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 200 ") and b"Paris" in received and (b"[DONE]" in received) == stream


def test_connections_are_kept_otherwise(server: LocalServer) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for stream in (True, False, True):
            assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1, "stream": stream}).status_code == 200
            assert client.post(CHAT, json={"messages": []}).status_code == 400
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as connection:  # pipelined
        connection.sendall(two + two.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert read_all(connection).count(b'{"status":"ok"}') == 2


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"NONSENSE\r\n\r\n",
                                     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"], ids=len)
def test_what_is_not_http_is_closed(server: LocalServer, garbage: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(garbage)
        assert read_all(connection).split(b" ")[1].startswith(b"4")
    assert http.get(server.url + "/health").status_code == 200


def wait_until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def asking(server: LocalServer, **fields: object) -> Iterator[socket.socket]:
    """Ask for a chat completion, and leave without having read the answer."""
    with connect(server) as connection:
        connection.sendall(request_bytes(**{**STORY, **fields}))
        yield connection


@contextlib.contextmanager
def full_batch(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let one request fill the batch, so that others wait."""
    scheduler = server.engine.scheduler
    with monkeypatch.context() as patch, asking(server, stream=True):
        patch.setattr(scheduler, "max_running", 1)
        wait_until(lambda: scheduler.running and not scheduler.waiting)
        yield


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 5}], ids=str)
@pytest.mark.parametrize("phase", ["queued", "prompt", "answer"])
def test_who_leaves_frees_everything(server: LocalServer, monkeypatch: pytest.MonkeyPatch, phase: str, fields: dict) -> None:
    """Leaving is closing the socket, whatever the request was waiting for; its blocks are free by the next step."""
    scheduler = server.engine.scheduler
    with full_batch(server, monkeypatch) if phase == "queued" else contextlib.nullcontext():
        long = [{"role": "user", "content": f"{time.time()} " + "word " * 6000}]
        with asking(server, **fields, **{"messages": long} if phase == "prompt" else {}):
            wait_until(lambda: scheduler.waiting if phase == "queued" else scheduler.running)
            if phase == "answer":
                wait_until(lambda: scheduler.running[0].num_generated_tokens > 3)
            else:
                assert all(seq.num_generated_tokens == 0 for seq in (scheduler.waiting or scheduler.running))
        if phase == "queued":
            wait_until(lambda: not scheduler.waiting)
            assert len(scheduler.running) == 1
    server.assert_idle()


def test_who_leaves_in_the_middle_of_the_body_is_forgotten(server: LocalServer) -> None:
    with connect(server) as connection:
        connection.sendall(request_bytes()[:-10])
        wait_until(lambda: serve.app.active == 1)
    wait_until(lambda: serve.app.active == 0)
    server.assert_idle()


def test_neighbours_do_not_notice_who_leaves(server: LocalServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        connections = [connect(server) for _ in range(6)]
        for connection in connections:
            connection.sendall(request_bytes(**STORY, stream=True))
        wait_until(lambda: len(server.engine.scheduler.running) == 6)
        answers = [pool.submit(ask, server, max_tokens=30) for _ in range(4)]
        for connection in connections:
            connection.close()
        for job in answers:
            assert job.result().json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
    server.assert_idle()


def test_a_full_queue_is_429(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_batch(server, monkeypatch), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(server.engine, "max_queue", 2)
        queued = [pool.submit(ask, server, max_tokens=1) for _ in range(2)]
        wait_until(lambda: len(server.engine.scheduler.waiting) == 2)
        for stream in (False, True):
            response = ask(server, stream=stream)
            assert response.status_code == 429 and error_of(response)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
        server.engine.scheduler.max_running = 3
        assert [job.result().status_code for job in queued] == [200, 200]
    server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_ours_is_a_500_that_tells_nothing(server: LocalServer, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"a secret from {__file__}")

    monkeypatch.setattr(serve, "delta", broken)
    response = ask(server, stream=stream)
    if stream:  # too late for a status
        assert response.status_code == 200
        [event] = response.text.split("\n\n")[:-1]
        response = httpx.Response(500, text=event.removeprefix("data: "), headers={"Content-Type": "application/json"})
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    monkeypatch.undo()
    assert ask(server, max_tokens=1).status_code == 200
    server.assert_idle()


# Keys, names, time.


@pytest.fixture
def settings(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings that are read at each request."""
    def change(**values: object) -> None:
        monkeypatch.setattr(serve.app, "settings", dataclasses.replace(serve.app.settings, **values))

    return change


@pytest.mark.parametrize("headers, allowed", [
    ({}, False), ({"Authorization": "Bearer key-one"}, True), ({"Authorization": "bearer  key-two"}, True),
    ({"X-Api-Key": "key-two"}, True), ({"Authorization": "Bearer none", "X-Api-Key": "key-one"}, True),
    ({"Authorization": "Bearer"}, False), ({"Authorization": "Bearer key-on"}, False),
    ({"Authorization": "Bearer key-one-"}, False), ({"Authorization": "Basic key-one"}, False), ({"X-Api-Key": ""}, False),
    ({"Authorization": "key-one"}, False), ({"X-Api-Key": "KEY-ONE"}, False), ({"X-Api-Key": "é".encode()}, False),
    ({"Authorization": "Bearer key-one key-two"}, False)], ids=str)
def test_every_path_needs_a_key_but_those_that_are_open(server: LocalServer, settings: Callable, headers: dict,
                                                       allowed: bool) -> None:
    settings(api_key=("key-one", "key-two"))
    known = {(method, rule.rule.replace("<path:model_id>", "x")) for rule in serve.app.url_map.iter_rules()
             for method in rule.methods}
    for method, path in sorted(known | {("GET", "/v1/nothing"), ("GET", "/health/x"), ("POST", "/health/")}):
        if method in ("HEAD", "OPTIONS") and path == "/health" or path == "/reset":
            continue
        response = http.request(method, server.url + path, headers=headers)
        assert (response.status_code == 401) == (not allowed and path not in ("/health", "/")), (method, path, response.text)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or error_of(response)["code"] == "invalid_api_key" and "key-" not in response.text


def test_preflights_need_no_key(server: LocalServer, settings: Callable) -> None:
    settings(api_key=("key",), cors_origin=("https://page.example",))
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization"}
    response = http.request("OPTIONS", server.url + CHAT, headers=headers)
    assert response.status_code == 200 and response.headers["access-control-allow-headers"] == "authorization"
    response = http.post(server.url + CHAT, json={}, headers={"Origin": "https://page.example"})
    assert response.status_code == 401 and response.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("host, status", [("proxy.example", 200), ("PROXY.example:443", 200), ("localhost", 200), ("", 403),
                                          ("other.example", 403), ("proxy.example.other.example", 403), ("[::5]:81", 200)])
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_names_that_are_allowed(server: LocalServer, settings: Callable, bound: str, host: str, status: int) -> None:
    settings(host=bound, allowed_host=("proxy.example", "[::5]"))
    assert http.get(server.url + "/v1/models", headers={"Host": host}).status_code == status
    settings(host=bound, allowed_host=())
    other = http.get(server.url + "/v1/models", headers={"Host": "any.example"})
    assert other.status_code == (200 if bound == "0.0.0.0" else 403)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_request_that_takes_too_long(server: LocalServer, settings: Callable, monkeypatch: pytest.MonkeyPatch, queued: bool,
                                       stream: bool) -> None:
    with full_batch(server, monkeypatch) if queued else contextlib.nullcontext():
        settings(request_timeout=0.5)
        started = time.monotonic()
        response = ask(server, **{**STORY, "stream": stream})
        assert 0.4 < time.monotonic() - started < 3
    if stream:
        assert response.status_code == 200
        *_, event, rest = response.text.split("\n\n")
        assert rest == ""
        response = httpx.Response(400, text=event.removeprefix("data: "), headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and error_of(response)["code"] == "request_timeout"
    server.assert_idle()
    settings(request_timeout=60.0)
    assert ask(server, max_tokens=8, stream=stream).status_code == 200


def test_a_body_that_does_not_come_in_time(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serve.app.config, "BODY_TIMEOUT", 0.2)
    with connect(server) as connection:
        connection.sendall(request_bytes(extra="Connection: close\r\n")[:-10])
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 400 ") and b"request_timeout" in received


def test_a_body_over_a_limit_of_ones_own(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serve.app.config, "MAX_CONTENT_LENGTH", 1000)
    response = ask(server, messages=[{"role": "user", "content": "a" * 1000}])
    assert response.status_code == 413 and error_of(response)["code"] == "request_entity_too_large"


def test_a_stream_that_is_silent_is_kept_alive(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With comments, each a write of its own, while it is queued and between events; never once it has ended."""
    monkeypatch.setattr(serve, "PING_SECONDS", 0.2)
    with full_batch(server, monkeypatch), connect(server) as connection:
        connection.sendall(request_bytes(max_tokens=8, stream=True, extra="Connection: close\r\n"))
        time.sleep(0.9)
        server.engine.scheduler.max_running = 2
        received = read_all(connection)
    assert 3 <= received.count(b": ping") <= 6 and received.count(b": ping") == received.count(b"8\r\n: ping\n\n\r\n")
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        monkeypatch.setattr(serve, "PING_SECONDS", 0.001)
        chunks = client.chat.completions.create(model="", messages=QUESTION, max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The capital of France is Paris."
    server.assert_idle()


@pytest.mark.parametrize("client_leaves", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_line_of_the_log(server: LocalServer, caplog: pytest.LogCaptureFixture, stream: bool,
                                        client_leaves: bool) -> None:
    def lines() -> list[dict]:
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return [line for line in fields if line.get("id") == "mine"]

    with caplog.at_level("INFO", "serve"):
        if client_leaves:
            with asking(server, extra="X-Request-Id: mine\r\n", stream=stream):
                wait_until(lambda: server.engine.scheduler.running)
        else:
            http.post(server.url + CHAT, json={"messages": QUESTION, "max_tokens": 2, "n": 2, "stream": stream},
                      headers={"X-Request-Id": "mine"})
        wait_until(lines)
    [found] = lines()
    assert found.items() >= {"method": "POST", "path": CHAT, "model": "SmolLM2-135M-Instruct", "prompt_tokens": 37}.items() or (
        client_leaves and found["prompt_tokens"] > 30)
    if client_leaves:
        assert found["gone"] and found["finish_reason"] == "abort" and found["status"] == (200 if stream else None)
    else:
        assert found["status"] == 200 and found["completion_tokens"] == 4 and "gone" not in found
        assert found["finish_reason"] == "length" and 0 < found["ttft"] <= found["seconds"] < 20
    server.assert_idle()


def test_what_a_client_wrote_is_escaped_in_the_log() -> None:
    record = logging.LogRecord("serve", logging.WARNING, "", 0, "%s", ("a\nE 00:00:00 b\x1b[31m\u202e\x85é",), None)
    record.fields = {"id": "x status=200", "path": "/a\r\nb", "ttft": None}
    text, shown = serve.LogFormatter(False).format(record), json.loads(serve.LogFormatter(True).format(record))
    assert text.isprintable() and "é" in text and 'id="x status=200"' in text and text.startswith("W ")
    assert shown["id"] == "x status=200" and shown["level"] == "warning" and "\n" in shown["message"]
    try:
        raise ValueError("a\nI 00:00:00 request")
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *rest = serve.LogFormatter(False).format(record).splitlines()
    assert rest and all(line.startswith("  | ") for line in rest)
    assert "ValueError" in json.loads(serve.LogFormatter(True).format(record))["trace"]
