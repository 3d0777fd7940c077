"""What every endpoint shares: the error envelope for all that can be wrong, limits, headers, and clients that leave."""
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
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
