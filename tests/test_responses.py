"""Responses: every object and event is the openai SDK's own, and its clients work."""
import json
import subprocess
import time
from collections.abc import Callable
from typing import Literal
from unittest.mock import Mock

import httpx2 as httpx
import openai
import pydantic
import pytest
import serve
import torch
from conftest import LocalServer, ServerProcess, http
from openai.types import responses as types

PARIS = "The capital of France is Paris."
QUESTION = "What is the capital of France?"
EVENT: pydantic.TypeAdapter = pydantic.TypeAdapter(types.ResponseStreamEvent)
FIELDS = set(
    "id object created_at completed_at status model output error incomplete_details instructions metadata parallel_tool_calls "
    "tool_choice tools temperature top_p presence_penalty frequency_penalty top_logprobs max_output_tokens max_tool_calls "
    "previous_response_id reasoning text truncation store background service_tier safety_identifier prompt_cache_key user "
    "usage".split())
EXTRA = {"presence_penalty", "frequency_penalty", "store", "bytes"}  # sent by OpenAI too, but unknown to the SDK's models


def known(value: pydantic.BaseModel) -> None:
    """Check that the SDK knows every field of an object."""
    pending = [value]
    while pending:
        part = pending.pop()
        assert not set(part.model_extra or {}) - EXTRA, part
        for field in part.__dict__.values():
            items = field if isinstance(field, list) else [field]
            pending += [item for item in items if isinstance(item, pydantic.BaseModel)]


def valid(response: dict) -> dict:
    """Check a whole response against the SDK's model, strictly."""
    assert set(response) == FIELDS
    known(types.Response.model_validate(response, strict=True))
    assert response["id"].startswith("resp_") and (response["completed_at"] is None) == (response["status"] != "completed")
    for item in response["output"]:
        assert item["id"].startswith({"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}[item["type"]])
    return response


def create(server: LocalServer | ServerProcess, **fields: object) -> httpx.Response:
    return http.post(server.url + "/v1/responses", json={"input": QUESTION, **fields})


def answer(server: LocalServer | ServerProcess, **fields: object) -> dict:
    response = create(server, **fields)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json", response.text
    return valid(response.json())


def read_events(response: httpx.Response) -> list[dict]:
    """Return the events of a stream, framed as they must be, each of them valid."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"), response.text
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for frame in frames:
        head, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {events[-1]['type']}"
        known(EVENT.validate_python(events[-1], strict=True))
        if "response" in events[-1]:
            valid(events[-1]["response"])
    return events


def fold(events: list[dict]) -> dict:
    """Put a stream together from its deltas, as a client does, checking the order of it all; return its last response."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    items, done = [], 0
    for event in events[2:-1]:
        assert event["output_index"] == len(items) - (event["type"] != "response.output_item.added"), "one item at a time"
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert done == len(items) and event["item"]["status"] == "in_progress"
                items.append(event["item"])
                assert event["item"].get("content", []) == [] and event["item"].get("arguments", "") == ""
            case "content_part.added":
                items[-1]["content"].append(event["part"])
                assert event["part"]["text"] == ""
            case "output_text.delta" | "reasoning_text.delta":
                items[-1]["content"][0]["text"] += event["delta"]
                items[-1]["content"][0].get("logprobs", []).extend(event.get("logprobs", []))
            case "function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == items[-1]["content"][0]["text"]
                assert event.get("logprobs") == items[-1]["content"][0].get("logprobs")
            case "function_call_arguments.done":
                assert event["arguments"] == items[-1]["arguments"]
            case "content_part.done":
                assert [event["part"]] == items[-1]["content"]
            case "output_item.done":
                done += 1
                assert event["item"] == {**items[-1], "status": event["item"]["status"]}
                items[-1] = event["item"]
        assert event.get("item_id", items[-1]["id"]) == items[-1]["id"]
    last = events[-1]["response"]
    assert last["output"] == items and done == len(items) and events[-1]["type"] == f"response.{last['status']}"
    return last


def same(left: dict, right: dict) -> None:
    """Check that two responses differ in nothing but ids, times and what the cache held."""
    def plain(response: dict) -> dict:
        usage = {**response["usage"], "input_tokens_details": 0}
        text = json.dumps({**response, "created_at": 0, "completed_at": 0, "usage": usage})
        for item in response["output"]:
            text = text.replace(item["id"], "").replace(item.get("call_id", item["id"]), "")
        return json.loads(text.replace(response["id"], ""))

    assert plain(left) == plain(right)


WEATHER = {"type": "function", "name": "get_weather", "description": "The weather.", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": None}
CITY = {"type": "json_schema", "name": "city", "strict": True, "schema": {
    "type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


@pytest.mark.parametrize("fields", [
    {}, {"max_output_tokens": 4}, {"temperature": 1, "seed": 5, "top_p": 0.9, "max_output_tokens": 20},
    {**LOGPROBS, "top_logprobs": 3}, LOGPROBS, {"text": {"format": CITY}},
    {"text": {"format": {"type": "json_object"}, "verbosity": "low"}, "max_output_tokens": 30},
    {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "name": "get_weather"}},
    {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 12},
    {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{
        "type": "function", "name": "clock"}]}, "max_tool_calls": 3, "parallel_tool_calls": False},
    {"tools": [WEATHER], "tool_choice": "none", "metadata": {"foo": "bar"}, "user": "u", "safety_identifier": "s",
     "prompt_cache_key": "k", "service_tier": "auto", "truncation": "disabled", "store": False, "instructions": "Be brief.",
     "reasoning": {"effort": "none", "summary": "auto"}},
    {"stop": [" is"], **LOGPROBS}, {"max_output_tokens": 1}, {"logit_bias": {"2": 100}}, {"text": {"format": None}},
    dict.fromkeys(["max_output_tokens", "text", "tools", "store"]),
], ids=str)
def test_streamed_and_not_are_the_same(server: LocalServer, fields: dict) -> None:
    whole = answer(server, **fields)
    last = fold(read_events(create(server, stream=True, **fields)))
    same(whole, last)
    for name in fields.keys() & FIELDS - {"text", "service_tier"}:
        assert fields[name] in (whole[name], None)
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_tokens"] > 0
    cut = whole["status"] == "incomplete"
    assert cut == (usage["output_tokens"] == fields.get("max_output_tokens"))
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert [item["status"] for item in whole["output"]] == ["completed"] * (len(whole["output"]) - 1) + [whole["status"]]
    if fields.get("include"):
        [message] = whole["output"]
        entries = message["content"][0]["logprobs"]
        spelled, text = b"".join(bytes(entry["bytes"]) for entry in entries).decode(), message["content"][0]["text"]
        assert spelled.startswith(text) if "stop" in fields else spelled == text
        assert {len(entry["top_logprobs"]) for entry in entries} == {fields.get("top_logprobs", 0)}
    if "tool_choice" in fields and fields["tool_choice"] != "none" and not cut:
        [call] = whole["output"]
        assert call["type"] == "function_call" and call["call_id"].startswith("call_")
        named = fields["tool_choice"]
        assert call["name"] in ("get_weather", "clock") and (
            named == "required" or call["name"] == named.get("name", "clock"))
        assert call["name"] == "clock" or json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    server.assert_idle()


def client(server: LocalServer | ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def text_of(response: dict) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


class City(pydantic.BaseModel):
    capital: Literal["Paris", "Rome"]


def test_sync_sdk(server: LocalServer) -> None:
    """The example of `transformers serve`, the streaming helper, parsing, tools of pydantic models."""
    with client(server) as sdk:
        story = sdk.responses.create(
            model="SmolLM2-135M-Instruct", instructions="You are a helpful assistant.", input=QUESTION, stream=True,
            metadata={"foo": "bar"})
        events = list(story)
        assert [event.delta for event in events if event.type == "response.output_text.delta"]
        assert events[-1].response.output_text == PARIS and events[-1].response.metadata == {"foo": "bar"}
        assert sdk.responses.create(input=QUESTION, model="").output_text == PARIS
        with sdk.responses.stream(input=QUESTION, model="", text_format=City) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[0] == "response.created" and final.output_parsed.capital in ("Paris", "Rome")
        assert sdk.responses.parse(input=QUESTION, model="", text_format=City).output_parsed.capital in ("Paris", "Rome")
        tool = openai.pydantic_function_tool(City)
        flat = {"type": "function", **tool["function"]}
        [call] = sdk.responses.parse(input=QUESTION, model="", tools=[flat], parallel_tool_calls=False,
                                     tool_choice={"type": "function", "name": "City"}).output
        assert call.type == "function_call" and call.parsed_arguments["capital"] in ("Paris", "Rome")
        with sdk.responses.stream(input=QUESTION, model="", tools=[flat], tool_choice="required",
                                  parallel_tool_calls=False) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        assert City.model_validate_json(snapshots[-1])
    server.assert_idle()


async def test_async_sdk(server: LocalServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as sdk:
        assert (await sdk.responses.create(input=QUESTION, model="")).output_text == PARIS
        async with sdk.responses.stream(input=QUESTION, model="") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == (await stream.get_final_response()).output_text == PARIS
        parsed = await sdk.responses.parse(input=QUESTION, model="", text_format=City)
        assert parsed.output_parsed.capital in ("Paris", "Rome")
        endless = {"input": "Tell a story.", "stream": True, "extra_body": {"ignore_eos": True}}
        async with await sdk.responses.create(model="", **endless) as events:
            async for event in events:
                if event.type == "response.output_text.delta":
                    break  # and leave
    server.assert_idle()


def test_curl(server: LocalServer) -> None:
    for stream in (False, True):
        command = ["curl", "-sN", server.url + "/v1/responses", "-H", "Content-Type: application/json", "-d", json.dumps({
            "model": "SmolLM2-135M-Instruct", "stream": stream, "input": QUESTION, "max_output_tokens": 256})]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert PARIS in out and out.startswith("event: response.created\ndata: {" if stream else "{")


def prompt_of(server: LocalServer, monkeypatch: pytest.MonkeyPatch, **fields: object) -> list[dict]:
    """Return the messages that a request comes to: those of `render_chat`."""
    seen = []
    real = serve.render_chat
    with monkeypatch.context() as patch:
        patch.setattr(serve, "render_chat", lambda model, messages, *rest, **more: seen.append(messages) or real(
            model, messages, *rest, **more))
        answer(server, max_output_tokens=1, **fields)
    return seen[0]


CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "21 degrees"}
SAID = {"type": "output_text", "text": "It is ", "annotations": []}
INPUTS = [  # items → messages
    ("Hi", [("user", "Hi")]),
    ([{"role": "user", "content": "Hi"}], [("user", "Hi")]),
    ([{"role": "developer", "content": "Be brief"}, {"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]}],
     [("developer", "Be brief"), ("user", "Hi")]),
    ([{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}, {"role": "user", "content": "you"},
      {"type": "input_text", "text": "!"}], [("user", "Hi"), ("user", "you"), ("user", "!")]),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [SAID, {"type": "refusal", "refusal": "no"}]},
      {"role": "user", "content": "Why"}], [("user", "Hi"), ("assistant", "It is no"), ("user", "Why")]),
    ([{"role": "user", "content": "Hi"},
      {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
      {"role": "assistant", "content": "I look."}, CALL, {**CALL, "call_id": "x"}, OUTPUT, {**OUTPUT, "output": [
          {"type": "input_text", "text": "22"}], "call_id": "x"}],
     [("user", "Hi"), ("assistant", "I look.", "Hm.", ["1", "x"]), ("tool", "21 degrees", "1"), ("tool", "22", "x")]),
    ([{"role": "user", "content": "Hi"}, CALL, OUTPUT, {"role": "assistant", "content": "21."}, {
        "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Now"}], "encrypted_content": None},
      {**CALL, "call_id": "call_2"}, {**OUTPUT, "call_id": "call_2"}],
     [("user", "Hi"), ("assistant", ["1"]), ("tool", "21 degrees", "1"), ("assistant", "21."), ("assistant", "Now", ["2"]),
      ("tool", "21 degrees", "2")]),
]


@pytest.mark.parametrize("given, expected", INPUTS, ids=str)
def test_items_become_messages(server: LocalServer, monkeypatch: pytest.MonkeyPatch, given: object, expected: list) -> None:
    def plain(message: dict) -> tuple:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", part.get("refusal")) for part in content)
        calls = [call["id"] for call in message.get("tool_calls", ())]
        values = (message["role"], content, message.get("reasoning_content"), calls, message.get("tool_call_id"))
        return tuple(value for value in values if value)

    assert [plain(message) for message in prompt_of(server, monkeypatch, input=given)] == expected
    first, *rest = prompt_of(server, monkeypatch, input=given, instructions="Be kind.")
    assert first == {"role": "system", "content": "Be kind."} and [plain(message) for message in rest] == expected


JSON_SCHEMA = {"format": {"type": "json_schema"}}
REFUSED = [  # fields → param
    *[({name: value}, name) for name, value in [
        ("input", None), ("input", []), ("input", 5), ("n", 2), ("max_tokens", 5), ("prompt", {"id": "p"}),
        ("conversation", "c"), ("max_output_tokens", 0), ("top_logprobs", 3), ("truncation", "some"), ("background", "yes"),
        ("metadata", {"a": 1}), ("metadata", {"a" * 65: "b"}), ("metadata", {str(i): "" for i in range(17)}),
        ("service_tier", "flex"), ("tool_choice", "required"), ("tool_choice", {"type": "web_search"}),
        ("tool_choice", {"type": "function", "name": "f"}), ("moderation", {"model": "m"}), ("stream_options", {}),
        ("temperature", 3), ("previous_response_id", 5), ("tools", [WEATHER, WEATHER])]],
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"), ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"text": JSON_SCHEMA}, "text.format"), ({"text": {"verbosity": "huge"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"), ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f g"}]}, "tools[0].name"),
    ({"text": {"format": {**CITY, "schema": {"type": "no"}}}}, "text.format"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"background": True, "store": False}, "background"),
    *[({"input": [{"role": "user", "content": "Hi"}, item]}, "input[1]") for item in [
        {"type": "web_search_call"}, {"role": "tool", "content": "x"}, {"role": "user"}, OUTPUT, {"type": 5}, {"type": ["a"]},
        {"type": "function_call", "name": "f"}, {"role": "user", "content": ["x"]}, {"type": "reasoning", "content": ["x"]},
        {"type": "reasoning", "content": 5},
        {"type": "reasoning", "encrypted_content": "x"}, {"type": "input_image", "file_id": "f"}]],
    *[({"input": [{"role": "user", "content": [part]}]}, "input") for part in [
        {"type": "input_file", "file_url": "http://x"}, {"type": "input_text"}, {"type": "input_image", "image_url": "http://x"}]],
]


@pytest.mark.parametrize("fields, param", REFUSED, ids=str)
def test_refused_by_name(server: LocalServer, fields: dict, param: str) -> None:
    response = create(server, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error


def test_reasoning_is_an_item_of_its_own(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model, under a template that opens the reasoning, and made to close it after five tokens."""
    tokenizer = server.engine.model.tokenizer
    thinking = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    monkeypatch.setattr(tokenizer, "chat_template", thinking)
    monkeypatch.setattr(serve, "needs_tokens", lambda seq: True)  # so that all tokens are known when the next is chosen
    monkeypatch.setattr(serve, "sample", ends_its_reasoning(tokenizer, serve.sample))
    fields = {"max_output_tokens": 30, **LOGPROBS}
    whole = answer(server, **fields)
    same(whole, fold(read_events(create(server, stream=True, **fields))))
    reasoning, message = whole["output"]
    assert (reasoning["type"], message["type"]) == ("reasoning", "message") and reasoning["content"][0]["text"]
    assert len(message["content"][0]["logprobs"]) < whole["usage"]["output_tokens"]
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] <= 6
    messages = prompt_of(server, monkeypatch, previous_response_id=whole["id"], input="And Italy?")
    assert messages[1]["reasoning_content"] == reasoning["content"][0]["text"] and messages[1]["content"] == message["content"]


def ends_its_reasoning(tokenizer: object, sample: Callable) -> Callable:
    """Return a `sample` under which every answer's sixth and following tokens spell the end of reasoning."""
    end = tokenizer.encode("</think>", add_special_tokens=False)

    def forced(logits: object, sequences: list[serve.Sequence], *others: object) -> torch.Tensor:
        chosen = sample(logits, sequences, *others)
        for row, seq in enumerate(sequences):
            if 0 <= (place := seq.num_generated_tokens - 5) < len(end):
                chosen[row] = end[place]
        return chosen

    return forced


def test_truncation(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto drops the oldest items, calls together with what they returned; the instructions stay."""
    monkeypatch.setattr(server.engine.model, "max_model_len", 400)
    turns = [{"role": "user", "content": f"{i} " + "word " * 60} for i in range(8)]
    turns[5:5] = [CALL, {**OUTPUT, "output": "word " * 150}]
    refused = create(server, input=turns).json()["error"]
    assert refused["code"] == "context_length_exceeded" and "400" in refused["message"]
    seen = []
    real = serve.render_chat
    monkeypatch.setattr(serve, "render_chat", lambda model, messages, *rest, **more: seen.append(messages) or real(
        model, messages, *rest, **more))
    whole = answer(server, input=turns, truncation="auto", instructions="Be brief.", max_output_tokens=5)
    assert whole["usage"]["input_tokens"] < 400 and whole["truncation"] == "auto"
    assert [message["content"][0]["text"][:1] if message["role"] == "user" else message["role"] for message in seen[-1]] == [
        "system", "5", "6", "7"]
    assert create(server, input="word " * 500, truncation="auto").json()["error"]["code"] == "context_length_exceeded"


def get(server: LocalServer | ServerProcess, path: str, **query: object) -> httpx.Response:
    return http.get(f"{server.url}/v1/responses/{path}", params=query)


def wait_for(server: LocalServer | ServerProcess, id: str, *ends: str) -> dict:
    deadline = time.monotonic() + 30
    while (found := valid(get(server, id).json()))["status"] not in ends:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_failures_are_told(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error amid an answer ends the stream with response.failed, and is an error where nothing is sent yet."""
    for error, status, code in ((serve.APIError(400, "No."), 400, "invalid_prompt"), (ValueError("ours"), 500, "server_error")):
        monkeypatch.setattr(serve, "addition", Mock(side_effect=error))
        assert create(server).status_code == status
        events = read_events(create(server, stream=True))
        assert events[-1]["type"] == "response.failed" and events[-1]["response"]["error"]["code"] == code
        assert "ours" not in json.dumps(events[-1])
        found = wait_for(server, answer(server, background=True)["id"], "failed")
        assert found["error"]["code"] == code and [item["status"] for item in found["output"]] == ["incomplete"]
    server.assert_idle()


