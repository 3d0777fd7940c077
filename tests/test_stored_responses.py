"""Stored responses: what was answered is kept, continued, followed, cancelled and forgotten, and outlives the server."""
import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
import serve
from conftest import LocalServer, http, start_server
from openai.types import responses as types
from test_responses import (
    PARIS,
    QUESTION,
    WEATHER,
    answer,
    client,
    create,
    get,
    prompt_of,
    read_events,
    same,
    text_of,
    valid,
    wait_for,
)


def test_a_conversation_is_continued(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id alone: the model reads what it would have been sent, and what it has read it finds in the prefix cache."""
    first = answer(server, instructions="You know the world's capitals, all of them, and you always answer in one sentence.")
    second = answer(server, previous_response_id=first["id"], input="And of Italy?", instructions=first["instructions"])
    assert second["previous_response_id"] == first["id"] and second["instructions"] == first["instructions"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    spelled = [{"role": "user", "content": QUESTION}, *first["output"], {"role": "user", "content": "And of Italy?"}]
    same({**second, "previous_response_id": None}, answer(server, input=spelled, instructions=first["instructions"]))
    messages = prompt_of(server, monkeypatch, previous_response_id=second["id"], input="Why?")
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"], "no instructions"
    assert get(server, second["id"]).json() == second
    server.assert_idle()


def test_calls_are_continued(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    first = answer(server, **fields)
    [call] = first["output"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny."}
    messages = prompt_of(server, monkeypatch, previous_response_id=first["id"], input=[output], tools=[WEATHER])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    [asked] = messages[1]["tool_calls"]
    assert asked["id"] == messages[2]["tool_call_id"] and re.fullmatch("[0-9a-f]{9}", asked["id"]), "Mistral's takes no other"
    assert asked["function"] == {"name": "get_weather", "arguments": call["arguments"]}
    by_reference = [{"role": "user", "content": QUESTION}, {"type": "item_reference", "id": call["id"]}, output]
    assert prompt_of(server, monkeypatch, input=by_reference, tools=[WEATHER]) == messages
    assert create(server, input=[{"id": call["id"] + "0"}]).status_code == 404
    assert create(server, input=[output]).status_code == 400


def test_deleted_unstored_and_unknown(server: LocalServer) -> None:
    unstored, kept = answer(server, store=False), answer(server)
    with client(server) as sdk:
        assert sdk.responses.retrieve(kept["id"]).output_text == PARIS
        sdk.responses.delete(kept["id"])
    for id in (unstored["id"], kept["id"], "resp_" + "0" * 32, "x", "resp_\u00e9"):
        for response in (get(server, id), get(server, id, stream=True), get(server, id + "/input_items"),
                         http.post(f"{server.url}/v1/responses/{id}/cancel"), http.delete(f"{server.url}/v1/responses/{id}"),
                         create(server, previous_response_id=id)):
            assert response.status_code == 404 and response.json()["error"]["code"] == "response_not_found"
    assert create(server, previous_response_id="x").json()["error"]["param"] == "previous_response_id"


def test_input_items(server: LocalServer) -> None:
    first = answer(server, input=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                                  {"type": "input_image", "image_url": "x"}][:2], max_output_tokens=2)
    second = answer(server, previous_response_id=first["id"], input=[{"role": "user", "content": str(i)} for i in range(30)],
                    max_output_tokens=2)
    with client(server) as sdk:
        items = list(sdk.responses.input_items.list(second["id"], limit=7))
        assert [item.content[0].text for item in items[:30]] == [str(i) for i in range(29, -1, -1)]
        assert [item.role for item in items[30:]] == ["assistant", "assistant", "user"] and len(items) == 33
        assert [item.id for item in sdk.responses.input_items.list(second["id"], order="asc", limit=100)] == [
            item.id for item in reversed(items)]
    page = get(server, second["id"] + "/input_items", after=items[3].id, limit=2).json()
    types.ResponseItemList.model_validate(page, strict=True)
    assert [item["id"] for item in page["data"]] == [items[4].id, items[5].id] == [page["first_id"], page["last_id"]]
    assert page["has_more"] and not get(server, second["id"] + "/input_items", limit=100).json()["has_more"]
    for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}):
        assert get(server, second["id"] + "/input_items", **query).status_code == 400
    assert get(server, second["id"] + "/input_items", after="x").status_code == 404


ENDLESS = {"input": "Tell a story.", "ignore_eos": True, "background": True}


def test_background(server: LocalServer) -> None:
    queued = answer(server, background=True)
    assert queued["status"] == "queued" and queued["output"] == []
    done = wait_for(server, queued["id"], "completed")
    assert text_of(done) == PARIS and done["id"] == queued["id"] and done["background"]
    events = read_events(get(server, queued["id"], stream=True))
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert events[-1]["response"] == done and [event["sequence_number"] for event in events] == list(range(len(events)))
    assert read_events(get(server, queued["id"], stream="true", starting_after=4)) == events[5:]
    assert get(server, queued["id"], stream=True, starting_after=10**6).text == ""
    assert get(server, queued["id"], stream=True, starting_after="x").status_code == 400
    ended = http.post(f"{server.url}/v1/responses/{queued['id']}/cancel")
    assert ended.json() == done, "what has ended stays as it is"
    assert answer(server, previous_response_id=done["id"], input="Why?")["status"] == "completed"
    server.assert_idle()


def test_background_survives_its_client_and_is_resumed(server: LocalServer) -> None:
    with client(server) as sdk:
        stream = sdk.responses.create(model="", input="Tell a story.", background=True, stream=True, max_output_tokens=60)
        before = []
        for event in stream:
            before.append(event)
            if event.type == "response.output_text.delta":
                break
        stream.close()
        id, last = before[0].response.id, before[-1].sequence_number
        with sdk.responses.stream(response_id=id, starting_after=last) as resumed:
            after = list(resumed)
        raw = list(sdk.responses.retrieve(id, stream=True, starting_after=last))
    assert [event.sequence_number for event in after] == [event.sequence_number for event in raw]
    assert [event.sequence_number for event in before + after] == list(range(len(before + after)))
    text = "".join(event.delta for event in before + after if event.type == "response.output_text.delta")
    assert text == text_of(wait_for(server, id, "incomplete")) == after[-1].response.output_text
    server.assert_idle()


def test_cancel(server: LocalServer) -> None:
    whole = answer(server)
    refused = http.post(f"{server.url}/v1/responses/{whole['id']}/cancel")
    assert refused.status_code == 400, "not in the background"
    id = answer(server, **ENDLESS)["id"]
    wait_for(server, id, "in_progress")
    assert create(server, previous_response_id=id).status_code == 400, "not yet"
    with client(server) as sdk:
        follower = sdk.responses.retrieve(id, stream=True)
        cancelled = sdk.responses.cancel(id)
        last = list(follower)[-1]
    assert cancelled.status == "cancelled" == last.response.status == valid(get(server, id).json())["status"]
    server.assert_idle()
    id = answer(server, **ENDLESS)["id"]
    assert http.delete(f"{server.url}/v1/responses/{id}").status_code == 200 and get(server, id).status_code == 404
    server.assert_idle()


def test_the_store_is_bounded(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by bytes; who was used last stays longest."""
    monkeypatch.setattr(serve, "STORED_RESPONSES", 3)
    ids = [answer(server, max_output_tokens=1)["id"] for _ in range(3)]
    assert get(server, ids[0]).status_code == 200
    ids.append(answer(server, max_output_tokens=1)["id"])
    assert [get(server, id).status_code for id in ids] == [200, 404, 200, 200]
    monkeypatch.setattr(serve, "STORED_BYTES", 20_000)
    ids.append(answer(server, input="word " * 2000, max_output_tokens=1)["id"])
    ids.append(answer(server, input="word " * 2000, max_output_tokens=1)["id"])
    assert [get(server, id).status_code for id in ids] == [404, 404, 404, 404, 404, 200]


def test_a_file_survives_kill_and_shutdown(tiny: Path, tmp_path: Path) -> None:
    """What was answered is there after kill -9; what was being made has failed, unless the grace period was enough for it."""
    shutil.copytree(tiny, tmp_path / "long")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    arguments = (str(tmp_path / "long"), "--response-store", str(tmp_path / "store.db"), "--grace-period", "1")
    with start_server(tmp_path, *arguments) as first:
        done = answer(first, max_output_tokens=9)
        running = answer(first, **ENDLESS)
        wait_for(first, running["id"], "in_progress")
        first.process.kill()
    with start_server(tmp_path, *arguments) as second:
        assert get(second, done["id"]).json() == done
        assert len(read_events(get(second, done["id"], stream=True))) > 5
        assert answer(second, previous_response_id=done["id"], max_output_tokens=3)["status"] == "incomplete"
        lost = valid(get(second, running["id"]).json())
        assert lost["status"] == "failed" and lost["error"]["code"] == "server_error"
        ids = [answer(second, **ENDLESS)["id"], answer(second, **ENDLESS, max_output_tokens=20)["id"]]
        assert second.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as store:
        kept = {id: valid(json.loads(text)) for id, text in store.execute("SELECT id, response FROM responses")}
    assert [kept[id]["status"] for id in ids] == ["failed", "incomplete"]


def test_a_store_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 99)
    for path in (tmp_path / "text", tmp_path / "no" / "folder", tmp_path):
        with start_server(tmp_path, str(tiny), "--response-store", str(path), ready=False) as server:
            assert server.process.wait(60) == 2 and "--response-store" in server.log.read_text()
