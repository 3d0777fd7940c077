"""Responses: every object and event is the openai SDK's own, its clients work, and what was answered is kept."""
import json

import httpx2 as httpx
import openai
import pydantic
import pytest
import serve
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
            pending += [item for item in (field if isinstance(field, list) else [field]) if isinstance(item, pydantic.BaseModel)]


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
        text = json.dumps({**response, "created_at": 0, "completed_at": 0, "usage": {**response["usage"], "input_tokens_details": 0}})
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
    {}, {"max_output_tokens": 4}, {"temperature": 1, "seed": 5, "top_p": 0.9, "max_output_tokens": 20}, {**LOGPROBS, "top_logprobs": 3},
    LOGPROBS, {"text": {"format": CITY}}, {"text": {"format": {"type": "json_object"}, "verbosity": "low"}, "max_output_tokens": 30},
    {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "name": "get_weather"}},
    {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 12},
    {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{
        "type": "function", "name": "clock"}]}, "max_tool_calls": 3, "parallel_tool_calls": False},
    {"tools": [WEATHER], "tool_choice": "none", "metadata": {"foo": "bar"}, "user": "u", "safety_identifier": "s",
     "prompt_cache_key": "k", "service_tier": "auto", "truncation": "disabled", "store": False, "instructions": "Be brief.",
     "reasoning": {"effort": "none", "summary": "auto"}},
    {"stop": [" is"], **LOGPROBS}, {"max_output_tokens": 1}, {"logit_bias": {"2": 100}},
], ids=str)
def test_streamed_and_not_are_the_same(server: LocalServer, fields: dict) -> None:
    whole = answer(server, **fields)
    last = fold(read_events(create(server, stream=True, **fields)))
    same(whole, last)
    for name in ("max_output_tokens", "tools", "tool_choice", "metadata", "user", "safety_identifier", "prompt_cache_key", "store",
                 "instructions", "reasoning", "parallel_tool_calls", "max_tool_calls", "temperature", "top_p", "top_logprobs"):
        assert name not in fields or whole[name] == fields[name]
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
