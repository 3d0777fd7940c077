"""Tools of real MCP servers, over stdio and HTTP: called, hanging, failing, killed amid a call; in chat completions."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import mcp_types
import openai
import pytest
import serve
import trio
from conftest import QUESTION, ROOT, ServerProcess, ask, http, start_server, stream
from openai.types import responses as types
from test_responses import EVENT, known

TOOL_SERVER = str(ROOT / "tests" / "tool_server.py")


def until(probe: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the probe returns something true."""
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Process:
    """A tool server as these tests see it: how it is reached, and what it has noted."""

    def __init__(self, folder: Path, transport: str) -> None:
        self.events = folder / f"{transport}.events"
        self.events.touch()
        if transport != "http":
            self.settings = {"command": sys.executable, "args": [TOOL_SERVER, str(self.events), transport]}
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.command = [sys.executable, TOOL_SERVER, str(self.events), "http", str(port)]
        self.settings = {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"X-Token": "secret"}}
        self.children: list[subprocess.Popen] = []
        self.start()

    def start(self) -> None:
        """Start a server that is reached over HTTP; one over stdio is started by who uses it."""
        if "url" in self.settings:
            self.children.append(subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            until(lambda: not socket.socket().connect_ex(("127.0.0.1", int(self.command[-1]))))

    @property
    def noted(self) -> list[str]:
        return self.events.read_text().split("\n")

    @property
    def pid(self) -> int:
        return int([event for event in self.noted if event.startswith("start")][-1].split()[1])

    async def notes(self, event: str, seconds: float = 10) -> None:
        """Wait until it has noted an event."""
        with trio.fail_after(seconds):
            while event not in self.noted:
                await trio.sleep(0.02)

    def stop(self) -> None:
        for child in getattr(self, "children", []):
            child.kill()
            child.wait()


@pytest.fixture(scope="module", params=["stdio", "http"])
def process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("tools"), request.param)
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.app, "settings", serve.Config(mcp_timeout=5.0), raising=False)
    monkeypatch.setattr(serve.app, "tool_servers", {}, raising=False)


@contextlib.asynccontextmanager
async def running(settings: dict, label: str = "test") -> AsyncIterator[serve.ToolServer]:
    """A tool server's task in a nursery of its own."""
    server = serve.ToolServer(label, serve.msgspec.convert(settings, serve.ToolServerSettings))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server
        nursery.cancel_scope.cancel()


async def offered(*servers: serve.ToolServer, taken: list[str] | None = None) -> dict[str, serve.ServerTool]:
    """Return the tools of servers, when those have started."""
    serve.app.tool_servers = {server.label: server for server in servers}
    tools, _ = await serve.mcp_tools([serve.McpTools(server.label) for server in servers], taken or [])
    return tools


async def test_calls(process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serve")
    async with running(process.settings) as server:
        tools = await offered(server, taken=["fail"])
        assert server.status == "ready" and {"capital", "hang", "test__fail", "megabyte"} <= tools.keys()
        assert tools["test__fail"].listed.name == "fail" and tools["test__fail"].definition["function"]["name"] == "test__fail"
        assert tools["capital"].definition["function"]["parameters"]["properties"]["country"]["enum"] == ["France", "Italy"]
        assert await server.call("capital", '{"country": "Italy"}') == serve.CallResult("Rome", False)
        for name, arguments, said in [("capital", '{"country": "Mars"}', "Input should be"), ("fail", "{}", "fail"),
                                      ("none", "{}", "none"), ("capital", "[", "not a JSON object")]:
            result = await server.call(name, arguments)
            assert result.is_error and said in result.text
        much = await server.call("megabyte", "")
        assert not much.is_error and len(much.text) < 16500 and much.text.endswith("[Cut here: it has 1000000 characters.]")
        assert server.status == "ready"
    if "command" in process.settings:
        assert "mcp test: the tool server [31mspeaks" in caplog.text  # without the escape before it


async def test_a_call_that_hangs_is_given_up(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.app, "settings", serve.Config(mcp_timeout=0.5))
    async with running(process.settings) as server:
        await offered(server)
        assert await server.call("hang", "{}") == serve.CallResult("The tool did not answer within 0.5 s.", True)
        await process.notes("hang ended", 2)


async def test_a_server_killed_amid_a_call(process: Process) -> None:
    async with running(process.settings) as server, trio.open_nursery() as nursery:
        await offered(server)
        process.events.write_text(f"start {process.pid}\n")
        results: list[serve.CallResult] = []

        async def call() -> None:
            results.append(await server.call("hang", "{}"))

        nursery.start_soon(call)
        nursery.start_soon(call)
        await process.notes("hang")
        os.kill(process.pid, signal.SIGKILL)
        with trio.fail_after(2):
            while len(results) < 2:
                await trio.sleep(0.01)
        assert all(result.is_error and result.text.startswith("The call failed") for result in results)
        process.start()
        with trio.fail_after(8):
            while (again := await server.call("capital", '{"country": "France"}')).is_error:
                assert "url" in process.settings, "it is waited for"
                await trio.sleep(0.05)
        assert again.text == "Paris"


async def test_a_server_that_fails_a_call_is_looked_at(process: Process) -> None:
    """So it is when one over HTTP has forgotten its session."""
    async with running(process.settings) as server:
        await offered(server)
        server.client = Mock(call_tool=Mock(side_effect=RuntimeError("session terminated")))
        failed = await server.call("capital", '{"country": "Italy"}')
        assert failed == serve.CallResult("The call failed: session terminated", True)
        assert await server.call("capital", '{"country": "Italy"}') == serve.CallResult("Rome", False)


async def test_a_server_that_dies_idle_is_started_again(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    if "url" in process.settings:  # that it died shows at the next look
        monkeypatch.setattr(serve, "MCP_LOOK", 0.2)
    async with running(process.settings) as server:
        await offered(server)
        os.kill(first := process.pid, signal.SIGKILL)
        with trio.fail_after(5):
            while server.status == "ready":
                await trio.sleep(0.02)
        assert server.reason and not server.tools
        process.start()
        with trio.fail_after(10):
            while server.status != "ready":
                await trio.sleep(0.02)
        assert process.pid != first and server.reason is None and server.tools


async def test_new_tools_are_seen(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MCP_LOOK", 0.2)
    async with running(process.settings) as server:
        await offered(server)
        assert (await server.call("learn", '{"name": "news"}')).text == "learned"
        with trio.fail_after(3):
            while "news" not in await offered(server):
                await trio.sleep(0.02)


async def test_servers_that_do_not_start(caplog: pytest.LogCaptureFixture) -> None:
    async with (running({"command": "no-such-command"}, "none") as none,
                running({"command": sys.executable, "args": ["-c", "print('nonsense')"]}, "nonsense") as nonsense,
                running({"url": "http://127.0.0.1:9/mcp"}, "refused") as refused):
        assert await offered(none, nonsense, refused) == {}
        for server, reason in ((none, "FileNotFoundError"), (nonsense, "Connection closed"), (refused, "ConnectError")):
            assert server.status == "failed" and reason in server.reason
            with trio.fail_after(0.1):  # nobody waits for it again
                assert (await server.call("capital", "{}")).is_error
        with trio.fail_after(20):  # one second passes until the next attempt, and two until the one after it
            while min(caplog.text.count(f"mcp {server.label}: cannot be started") for server in (none, nonsense, refused)) < 3:
                await trio.sleep(0.05)
    times = [record.created for record in caplog.records if "mcp refused: cannot be started" in record.getMessage()]
    assert times[1] - times[0] > 0.9 and times[2] - times[1] > 1.9


async def test_a_slow_server_is_waited_for_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(tmp_path, "stdio")
    code = "import runpy, sys, time; time.sleep(0.5); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    async with running({**process.settings, "args": ["-c", code, *process.settings["args"]]}) as server:
        monkeypatch.setattr(serve, "MCP_WAIT", 0.1)
        assert await offered(server) == {} and server.status == "starting"
        monkeypatch.setattr(serve, "MCP_WAIT", 10)
        assert "capital" in await offered(server)


@pytest.mark.parametrize("text, said", [
    ("{", "cannot be read"), ("[]", "Expected `object`"), ("{}", "`mcpServers`"),
    ({"a": {}}, "'a' needs either a command or a url"), ({"a": {"command": "x", "url": "http://x"}}, "either"),
    ({"a": {"command": ["x"]}}, "$.mcpServers[...].command"), ({"a b": {"command": "x"}}, "key"),
    ({"a": {"url": "ftp://x"}}, "$.mcpServers[...].url"), (None, "cannot be read"),
])
def test_a_bad_configuration(text: str | dict | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mcp.json"
    if text is not None:
        file.write_text(text if isinstance(text, str) else json.dumps({"mcpServers": text}))
    with pytest.raises(SystemExit):
        serve.parse_command_line(["--mcp-config", str(file)])
    assert said in capsys.readouterr().err


def test_configuration(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {
        "a-1": {"command": "x", "args": ["y"], "env": {"K": "V"}, "autoApprove": []},
        "b": {"url": "https://x/mcp", "type": "http"}, "c": {"command": "z", "disabled": True}}}))
    config = serve.parse_command_line(["--mcp-config", str(file), "--mcp-auto"])
    assert config.mcp_config == {"a-1": serve.ToolServerSettings(command="x", args=["y"], env={"K": "V"}),
                                 "b": serve.ToolServerSettings(url="https://x/mcp")}
    with pytest.raises(SystemExit):
        serve.parse_command_line(["--mcp-auto"])
    assert "--mcp-auto needs --mcp-config" in capsys.readouterr().err


class Local:
    """The built-in model in a process of its own, with a tool server behind it over each transport."""

    def __init__(self, server: ServerProcess, processes: dict[str, Process]) -> None:
        self.server, self.processes = server, processes
        self.url = server.url

    def definitions(self) -> list[dict]:
        """Return the tools that are offered, as a client would write them."""
        taken, tools = set(), []
        for server in http.get(self.url + "/v1/mcp/servers").json()["data"]:
            for tool in server["tools"]:
                name = f"{server['name']}__{tool['name']}" if tool["name"] in taken else tool["name"]
                taken.add(name)
                tools.append({"type": "function", "function": {
                    "name": name, "description": tool["description"], "parameters": tool["input_schema"]}})
        return tools


@pytest.fixture(scope="module")
def local(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("server")
    processes = {transport: Process(folder, transport) for transport in ("stdio", "http", "stubborn")}
    config = {"mcpServers": {name: process.settings for name, process in processes.items()} | {
        "gone": {"command": "no-such-command"}}}
    (folder / "mcp.json").write_text(json.dumps(config))
    with start_server(folder, "--mcp-config", str(folder / "mcp.json"), "--mcp-auto", "--mcp-timeout", "2",
                      "--mcp-max-result", "500", "--allow-remote-mcp") as server:
        yield Local(server, processes)
    for process in processes.values():
        process.stop()


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def test_servers_are_listed(local: Local) -> None:
    listed = http.get(local.url + "/v1/mcp/servers").json()
    assert listed["object"] == "list" and [server["name"] for server in listed["data"]] == ["stdio", "http", "stubborn", "gone"]
    assert listed["data"][3]["status"] == "failed" and "no-such-command" in listed["data"][3]["error"]
    for server in listed["data"][:2]:
        assert server["status"] == "ready" and server["error"] is None
        assert {"name": "fail", "description": "Raise.", "input_schema": {
            "type": "object", "properties": {}, "title": "failArguments"}, "annotations": None} in server["tools"]


@pytest.mark.parametrize("name, transport", [("capital", "stdio"), ("http__capital", "http")])
def test_a_chat_runs_a_tool(local: Local, name: str, transport: str) -> None:
    """The answer is that to the conversation which a client would have sent that had run the tool itself."""
    # Of two answers neither has a next turn: nothing is run here.
    tools = local.definitions()
    first = ask(local, tool_choice=named(name), tools=tools, n=2, temperature=0).json()
    spent = first["usage"]["completion_tokens"] // 2
    fields = {"tool_choice": named(name), "max_tokens": spent + 6, "temperature": 0}
    answer = ask(local, **fields).json()
    called = local.processes[transport].noted[-2]
    assert called in ("capital France", "capital Italy")
    country = called.removeprefix("capital ")
    call = {"id": "call_1", "type": "function", "function": {
        "name": name, "arguments": json.dumps({"country": country})}}
    history = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "call_1", "content": {"France": "Paris", "Italy": "Rome"}[country]}]
    assert [json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) for choice in first["choices"]] == [
        {"country": country}] * 2
    expected = ask(local, messages=history, tools=tools, n=2, max_tokens=6, temperature=0).json()
    [choice] = answer["choices"]
    assert choice["message"] == expected["choices"][0]["message"] and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert answer["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + expected["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == spent + expected["usage"]["completion_tokens"] // 2
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"] // 2

    *chunks, last = stream(local, **fields, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert [i for i, delta in enumerate(deltas) if "role" in delta] == [0]
    assert not any("tool_calls" in delta for delta in deltas)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        choice["finish_reason"]]
    assert {key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens")} == {
        key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")}


@pytest.mark.parametrize("name", ["fail", "hang", "megabyte", "http__die", "die"])
def test_whatever_a_tool_does_there_is_an_answer(local: Local, name: str) -> None:
    process = local.processes["http" if name.startswith("http") else "stdio"]
    response = ask(local, tool_choice=named(name), max_tokens=40)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert choice["message"]["content"] and choice["finish_reason"] in ("stop", "length")
    assert name != "hang" or process.noted[-2] == "hang ended"
    if name == "http__die":
        process.start()
    until(lambda: not any(server["status"] == "starting" for server in http.get(local.url + "/v1/mcp/servers").json()["data"]))


def test_a_call_of_the_clients_own_tool_is_the_clients(local: Local) -> None:
    own = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {
        "city": {"enum": ["Oslo"]}}, "required": ["city"]}}}
    before = local.processes["stdio"].noted
    [choice] = ask(local, tools=[own], tool_choice=named("capital"), max_tokens=60).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "capital", "arguments": '{"city": "Oslo"}'}
    assert local.processes["stdio"].noted == before
    assert ask(local, tools=[own], tool_choice=named("stdio__capital"), max_tokens=60).status_code == 200
    assert local.processes["stdio"].noted != before


def test_tools_stay_out_where_they_are_not_wanted(local: Local) -> None:
    plain = ask(local, tool_choice="none", max_tokens=8).json()
    assert plain["usage"]["prompt_tokens"] < 60 < ask(local, max_tokens=8).json()["usage"]["prompt_tokens"]
    assert ask(local, n=2, max_tokens=8).json()["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def leave_amid_a_call(local: Local, process: Process, path: str, **fields: object) -> None:
    """Ask for an answer to which the tool `hang` is called, leave when it is, and see that it is then cancelled."""
    body = json.dumps(fields).encode()
    host, port = local.url.removeprefix("http://").split(":")
    hung, ended = process.noted.count("hang"), process.noted.count("hang ended")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: process.noted.count("hang") > hung)
    until(lambda: process.noted.count("hang ended") > ended, 1.5)  # the call would be given up half a second later


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_cancels_the_call(local: Local, streamed: bool) -> None:
    name, transport = ("http__hang", "http") if streamed else ("hang", "stdio")
    leave_amid_a_call(local, local.processes[transport], "/v1/chat/completions", messages=QUESTION, stream=streamed,
                      tool_choice=named(name))


def test_what_the_client_sees_of_calls() -> None:
    async def found() -> AsyncIterator[serve.Delta | serve.CallResult]:
        def part(*pieces: serve.Piece) -> serve.Delta:
            return serve.Delta(0, "", [], 1, None, [], pieces)

        yield part(serve.Piece("content", "a"), serve.Piece("call", "mine", 0), serve.Piece("arguments", "{}", 0))
        yield serve.CallResult("x", False)
        yield part(serve.Piece("call", "mine", 0), serve.Piece("arguments", "{1", 0), serve.Piece("call", "yours", 1))
        yield part(serve.Piece("arguments", "{2", 1), serve.Piece("reasoning", "b"))

    async def collect() -> list[tuple]:
        return [part.pieces async for part in serve.without_calls(found(), {"mine": None})]

    assert trio.run(collect) == [(serve.Piece("content", "a"),), (serve.Piece("call", "yours", 0),),
                                 (serve.Piece("arguments", "{2", 0), serve.Piece("reasoning", "b"))]


PARIS = "What is the capital of France?"
FIELDS = {"input": PARIS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 60}
PREFIXES = {"mcp_list_tools": "mcpl_", "mcp_call": "mcp_", "mcp_approval_request": "mcpr_", "message": "msg_",
            "function_call": "fc_"}


def mcp(label: str = "stdio", **fields: object) -> dict:
    return {"type": "mcp", "server_label": label, "require_approval": "never", **fields}


def check(response: dict) -> dict:
    """Check a response against the SDK's model; return it."""
    known(types.Response.model_validate(response, strict=True))
    assert all(item["id"].startswith(PREFIXES[item["type"]]) for item in response["output"])
    return response


def respond(local: Local, **fields: object) -> dict:
    """Return a response, not streamed."""
    answered = http.post(local.url + "/v1/responses", json={**FIELDS, **fields})
    assert answered.status_code == 200, answered.text
    return check(answered.json())


def respond_streamed(local: Local, **fields: object) -> tuple[dict, list[str]]:
    """Return a streamed response, put together from its events, and the types of these; they are the SDK's own, in order."""
    answered = http.post(local.url + "/v1/responses", json={**FIELDS, **fields, "stream": True})
    assert answered.status_code == 200, answered.text
    events = [json.loads(frame.split("\ndata: ")[1]) for frame in answered.text.split("\n\n")[:-1]]
    items: list[dict] = []
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        known(EVENT.validate_python(event, strict=True))
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items)
            assert not any(event["item"].get(name) for name in ("content", "arguments", "tools", "output", "error"))
            items.append(event["item"])
        elif "output_index" in event:
            item = items[event["output_index"]]
            assert event.get("item_id", item["id"]) == item["id"]
            if event["type"].endswith("arguments.delta"):
                item["arguments"] += event["delta"]
            elif event["type"].endswith("arguments.done"):
                assert event["arguments"] == item["arguments"]
            elif event["type"] == "response.output_item.done":
                assert event["item"]["id"] == item["id"]
                if item["type"] != "mcp_approval_request":  # its arguments come all at once
                    assert event["item"].get("arguments") == item.get("arguments")
                items[event["output_index"]] = event["item"]
    assert check(events[-1]["response"])["output"] == items
    return events[-1]["response"], [event["type"].removeprefix("response.") for event in events]


def plain(output: list[dict]) -> list[dict]:
    """Return items without their ids."""
    return [{key: value for key, value in item.items() if key not in ("id", "approval_request_id")} for item in output]


@pytest.mark.parametrize("label", ["stdio", "http"])
def test_a_response_runs_a_tool(local: Local, label: str) -> None:
    tools = [mcp(label, allowed_tools=["capital"])]
    response, events = respond_streamed(local, tools=tools)
    text = [event for event in events[events.index("mcp_call.completed") + 2:] if event != "output_text.delta"]
    assert events[:6] == ["created", "in_progress", "output_item.added", "mcp_list_tools.in_progress",
                          "mcp_list_tools.completed", "output_item.done"]
    assert [event for event in events[6:] if event != "mcp_call_arguments.delta"][:5] == [
        "output_item.added", "mcp_call.in_progress", "mcp_call_arguments.done", "mcp_call.completed", "output_item.done"]
    assert text == ["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
                    response["status"]]
    listed, call, message = response["output"]
    [tool] = listed["tools"]
    assert tool["name"] == "capital" and tool["annotations"] == {"readOnlyHint": True} and listed["error"] is None
    assert (call["name"], call["server_label"], call["status"], call["error"]) == ("capital", label, "completed", None)
    country = json.loads(call["arguments"])["country"]
    assert call["output"] == {"France": "Paris", "Italy": "Rome"}[country]
    assert local.processes[label].noted[-2] == f"capital {country}"
    again = respond(local, tools=tools)
    assert plain(again["output"]) == plain(response["output"])
    assert again["usage"]["total_tokens"] == response["usage"]["total_tokens"]

    # The answer is the one that a client gets which has run the function itself.
    function = {"type": "function", "name": "capital", "description": tool["description"], "parameters": tool["input_schema"]}
    said = {"call_id": "call_1", "type": "function_call", "name": "capital", "arguments": call["arguments"]}
    result = {"call_id": "call_1", "type": "function_call_output", "output": call["output"]}
    first = respond(local, tools=[function], max_output_tokens=60)
    spent = first["usage"]["output_tokens"]
    expected = respond(local, tools=[function], tool_choice="auto", max_output_tokens=60 - spent,
                       input=[{"role": "user", "content": PARIS}, said, result])
    assert plain(expected["output"]) == plain([message])
    assert response["usage"]["output_tokens"] == spent + expected["usage"]["output_tokens"]
    assert response["usage"]["input_tokens"] == first["usage"]["input_tokens"] + expected["usage"]["input_tokens"]

    # What follows is told from what was said, which is still in the cache, and the list is known.
    more = {"tools": tools, "tool_choice": "auto", "max_output_tokens": 10}
    after = respond(local, input="And of Italy?", previous_response_id=response["id"], **more)
    assert "mcp_list_tools" not in [item["type"] for item in after["output"]]
    assert after["usage"]["input_tokens_details"]["cached_tokens"] > response["usage"]["input_tokens"] // 2
    given = [{"role": "user", "content": PARIS}, *response["output"], {"role": "user", "content": "And of Italy?"}]
    assert plain(respond(local, input=given, **more)["output"]) == plain(after["output"])


@pytest.mark.parametrize("name", ["fail", "hang", "die"])
def test_a_tools_error_is_an_item(local: Local, name: str) -> None:
    response, events = respond_streamed(local, tools=[mcp(allowed_tools={"tool_names": [name]})])
    _, call, message = response["output"]
    assert call["status"] == "failed" and call["output"] is None and call["error"]["type"] == "mcp_tool_execution_error"
    assert {"fail": "Error executing tool fail", "hang": "The tool did not answer within 2 s.",
            "die": "The call failed: Connection closed"}[name] in call["error"]["content"][0]["text"]
    assert events.count("mcp_call.failed") == 1 and "mcp_call.completed" not in events
    assert message["type"] == "message" and response["error"] is None


def test_a_call_may_need_approval(local: Local) -> None:
    def run() -> list[str]:
        return [event for event in local.processes["stdio"].noted if event.startswith("capital")]

    before = run()
    tools = [mcp(allowed_tools={"read_only": True}, require_approval=None)]
    asked, events = respond_streamed(local, tools=tools)
    listed, request = asked["output"]
    assert request["type"] == "mcp_approval_request" and request["name"] == "capital" and run() == before
    assert [tool["name"] for tool in listed["tools"]] == ["capital"] and not any("mcp_call" in event for event in events)
    answer = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}
    more = {"tools": tools, "tool_choice": "auto"}
    done, events = respond_streamed(local, input=[answer], previous_response_id=asked["id"], **more)
    call, message = done["output"]
    assert call["approval_request_id"] == request["id"] and call["arguments"] == request["arguments"]
    assert call["status"] == "completed" and run()[-1] == "capital " + json.loads(call["arguments"])["country"]
    assert events[2:7] == ["output_item.added", "mcp_call.in_progress", "mcp_call_arguments.delta", "mcp_call_arguments.done",
                           "mcp_call.completed"]
    count = len(run())
    question = {"role": "user", "content": PARIS}
    by_items = respond(local, input=[question, *asked["output"], answer], **more)
    assert plain(by_items["output"]) == plain(done["output"]) and len(run()) == count + 1
    no = {**answer, "approve": False, "reason": "Too dear."}
    denied = respond(local, input=[no], previous_response_id=asked["id"], **more)
    assert "mcp_call" not in [item["type"] for item in denied["output"]]
    again = respond(local, input=[{"role": "user", "content": "Thanks."}], previous_response_id=done["id"], **more)
    assert "mcp_call" not in [item["type"] for item in again["output"]] and len(run()) == count + 1
    for bad, tools_ in (({**answer, "approval_request_id": "mcpr_1"}, tools), ({**answer, "approve": 1}, tools), (answer, [])):
        refused = http.post(local.url + "/v1/responses", json={
            "input": [bad], "previous_response_id": asked["id"], "tools": tools_})
        assert refused.status_code == 400, refused.text


@pytest.mark.parametrize("rule, expected", [
    (None, {"a", "b"}), ("always", {"a", "b"}), ("never", set()), ({"always": {"tool_names": ["a"]}}, {"a"}),
    ({"never": {"tool_names": ["a"]}}, {"b"}), ({"never": {"read_only": True}}, {"a"}),
    ({"always": {"tool_names": ["a"]}, "never": {"tool_names": ["a"]}}, {"b"}),
])
def test_which_calls_need_approval(rule: object, expected: set[str]) -> None:
    hint = mcp_types.ToolAnnotations(read_only_hint=True)
    tools = [mcp_types.Tool(name=name, input_schema={"type": "object"}, annotations=notes) for name, notes in (
        ("a", None), ("b", hint))]
    asked = serve.msgspec.convert(mcp(require_approval=rule), serve.McpTools)
    assert {tool.name for tool in tools if asked.needs_approval(tool)} == expected


def test_the_number_of_calls_is_bounded(local: Local) -> None:
    tools = [mcp(allowed_tools=["capital"])]
    fields = {"parallel_tool_calls": True, "max_output_tokens": 200, "tools": tools}
    calls = [item for item in respond(local, max_tool_calls=1, **fields)["output"] if item["type"] == "mcp_call"]
    assert len(calls) > 1, "this model likes to call"
    assert [call["status"] for call in calls] == ["completed"] + ["incomplete"] * (len(calls) - 1)


def test_the_choice_of_tools(local: Local) -> None:
    own = {"type": "function", "name": "capital", "parameters": {"type": "object", "properties": {}}}
    both = [own, mcp("http"), mcp("stdio", server_description="Of states.")]
    called = [respond(local, tools=both, tool_choice=choice)["output"][2] for choice in (
        {"type": "function", "name": "capital"}, {"type": "mcp", "server_label": "stdio", "name": "capital"},
        {"type": "mcp", "server_label": "http", "name": "fail"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp", "server_label": "http", "name": "capital"}]})]
    assert [(call["type"], call.get("server_label"), call["name"]) for call in called] == [
        ("function_call", None, "capital"), ("mcp_call", "stdio", "capital"), ("mcp_call", "http", "fail"),
        ("mcp_call", "http", "capital")]
    response, events = respond_streamed(local, tools=[mcp("gone")], tool_choice="auto", max_output_tokens=5)
    assert "no-such-command" in response["output"][0]["error"] and events[4] == "mcp_list_tools.failed"


@pytest.mark.parametrize("tools, choice, said", [
    ([mcp("other")], "auto", "'other'"), ([mcp(connector_id="x")], "auto", "connector_id"),
    ([mcp(headers={"a": "b"})], "auto", "headers"), ([mcp(defer_loading=True)], "auto", "defer_loading"),
    ([{"type": "mcp", "command": "x"}], "auto", "server_label"), ([mcp(allowed_tools=5)], "auto", "allowed_tools"),
    ([mcp(server_url="file:///x")], "auto", "server_url"), ([mcp()], {"type": "mcp", "server_label": "x"}, "tool_choice"),
    ([mcp("gone")], "required", "tool_choice"),
])
def test_what_is_refused(local: Local, tools: list, choice: object, said: str) -> None:
    answered = http.post(local.url + "/v1/responses", json={**FIELDS, "tools": tools, "tool_choice": choice})
    assert answered.status_code == 400 and said in answered.text


def test_an_address_is_refused_unless_allowed() -> None:
    asked = serve.msgspec.convert(mcp("x", server_url="http://127.0.0.1:1/mcp"), serve.McpTools)
    with pytest.raises(serve.APIError, match="server_url is not supported here"):
        asked.server()


def test_a_server_that_the_request_names(local: Local) -> None:
    url = local.processes["http"].settings["url"]
    tools = [mcp("remote", server_url=url, authorization="secret", headers={"X-Key": "private"}, allowed_tools=["capital"])]
    answered = http.post(local.url + "/v1/responses", json={**FIELDS, "tools": tools})
    assert answered.status_code == 200 and "secret" not in answered.text and "private" not in answered.text
    listed, call, _ = check(answered.json())["output"]
    assert call["status"] == "completed" and call["server_label"] == listed["server_label"] == "remote"
    assert "private" not in http.get(f"{local.url}/v1/responses/{answered.json()['id']}").text
    assert local.processes["http"].noted[-2].startswith("capital")


async def test_the_openai_client(local: Local) -> None:
    fields = {key: value for key, value in FIELDS.items()} | {"model": "", "tools": [mcp(allowed_tools=["capital"])]}
    async with openai.AsyncOpenAI(base_url=local.url + "/v1", api_key="none") as client:
        async with client.responses.stream(**fields) as stream_:
            kinds = [event.type async for event in stream_]
            response = await stream_.get_final_response()
        assert "response.mcp_call.completed" in kinds and kinds[-1] == f"response.{response.status}"
        assert [item.type for item in response.output] == ["mcp_list_tools", "mcp_call", "message"] and response.output_text
        whole = await client.responses.create(**fields)
        assert whole.output_text == response.output_text


def test_a_response_that_is_left_or_cancelled_cancels_the_call(local: Local) -> None:
    fields, process = {**FIELDS, "tools": [mcp(allowed_tools=["hang"])]}, local.processes["stdio"]
    leave_amid_a_call(local, process, "/v1/responses", **fields, stream=True)
    hung = process.noted.count("hang")
    made = http.post(local.url + "/v1/responses", json={**fields, "background": True}).json()
    until(lambda: process.noted.count("hang") > hung)
    ended = http.post(f"{local.url}/v1/responses/{made['id']}/cancel").json()
    assert ended["status"] == "cancelled" and ended["output"][-1]["status"] == "incomplete"
    until(lambda: process.noted.count("hang ended") > hung, 1)


def test_no_tool_server_outlives_the_server(local: Local, tmp_path: Path) -> None:
    """Whether it is asked to end, or killed while it loads."""
    process = Process(tmp_path, "stdio")
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": process.settings}}))
    with start_server(tmp_path, "--mcp-config", str(tmp_path / "mcp.json"), ready=False) as server:
        until(lambda: process.noted[0])
        server.process.kill()
    pids = [process.pid, local.processes["stdio"].pid, local.processes["stubborn"].pid]
    local.server.stop()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 3)
