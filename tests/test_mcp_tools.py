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
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import serve
import trio
from conftest import QUESTION, ROOT, ServerProcess, ask, http, start_server, stream

TOOL_SERVER = str(ROOT / "tests" / "tool_server.py")


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
            deadline = time.monotonic() + 20
            while socket.socket().connect_ex(("127.0.0.1", int(self.command[-1]))):
                assert time.monotonic() < deadline
                time.sleep(0.05)

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


@contextlib.asynccontextmanager
async def running(settings: dict, label: str = "test") -> AsyncIterator[serve.ToolServer]:
    """A tool server's task in a nursery of its own."""
    server = serve.ToolServer(label, serve.msgspec.convert(settings, serve.ToolServerSettings))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server
        nursery.cancel_scope.cancel()


async def test_calls(process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serve")
    async with running(process.settings) as server:
        tools = await serve.server_tools([server], ["fail"])
        assert server.status == "ready" and {"capital", "hang", "test__fail", "megabyte"} <= tools.keys()
        assert tools["test__fail"].listed.name == "fail" and tools["test__fail"].definition["function"]["name"] == "test__fail"
        assert tools["capital"].definition["function"]["parameters"]["properties"]["country"]["enum"] == ["France", "Italy"]
        assert await server.call("capital", '{"country": "Italy"}') == serve.CallResult("Rome", False)
        for name, arguments, said in [("capital", '{"country": "Mars"}', "Input should be"), ("fail", "{}", "fail"),
                                      ("none", "{}", "none"), ("capital", "[", "The call failed")]:
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
        await serve.server_tools([server], [])
        assert await server.call("hang", "{}") == serve.CallResult("The tool did not answer within 0.5 s.", True)
        await process.notes("hang ended", 2)


async def test_a_server_killed_amid_a_call(process: Process) -> None:
    async with running(process.settings) as server, trio.open_nursery() as nursery:
        await serve.server_tools([server], [])
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


async def test_a_server_that_dies_idle_is_started_again(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    if "url" in process.settings:  # that it died shows at the next look
        monkeypatch.setattr(serve, "MCP_LOOK", 0.2)
    async with running(process.settings) as server:
        await serve.server_tools([server], [])
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
        await serve.server_tools([server], [])
        assert (await server.call("learn", '{"name": "news"}')).text == "learned"
        with trio.fail_after(3):
            while "news" not in await serve.server_tools([server], []):
                await trio.sleep(0.02)


async def test_servers_that_do_not_start(caplog: pytest.LogCaptureFixture) -> None:
    async with (running({"command": "no-such-command"}, "none") as none,
                running({"command": sys.executable, "args": ["-c", "print('nonsense')"]}, "nonsense") as nonsense,
                running({"url": "http://127.0.0.1:9/mcp"}, "refused") as refused):
        assert await serve.server_tools([none, nonsense, refused], []) == {}
        for server, reason in ((none, "FileNotFoundError"), (nonsense, "Connection closed"), (refused, "ConnectError")):
            assert server.status == "failed" and reason in server.reason
            with trio.fail_after(0.1):  # nobody waits for it again
                assert (await server.call("capital", "{}")).is_error
        await trio.sleep(2)
    for name in ("none", "nonsense", "refused"):  # the second time after one second, the third after two more
        assert caplog.text.count(f"mcp {name}: cannot be started") == 2


async def test_a_slow_server_is_waited_for_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(tmp_path, "stdio")
    code = "import runpy, sys, time; time.sleep(0.5); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    async with running({**process.settings, "args": ["-c", code, *process.settings["args"]]}) as server:
        monkeypatch.setattr(serve, "MCP_WAIT", 0.1)
        assert await serve.server_tools([server], []) == {} and server.status == "starting"
        monkeypatch.setattr(serve, "MCP_WAIT", 10)
        assert "capital" in await serve.server_tools([server], [])


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
    config = {"mcpServers": {name: process.settings for name, process in processes.items()}}
    (folder / "mcp.json").write_text(json.dumps(config))
    with start_server(folder, "--mcp-config", str(folder / "mcp.json"), "--mcp-auto", "--mcp-timeout", "2",
                      "--mcp-max-result", "500") as server:
        yield Local(server, processes)
    for process in processes.values():
        process.stop()


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def test_servers_are_listed(local: Local) -> None:
    listed = http.get(local.url + "/v1/mcp/servers").json()
    assert listed["object"] == "list" and [server["name"] for server in listed["data"]] == ["stdio", "http", "stubborn"]
    for server in listed["data"][:2]:
        assert server["status"] == "ready" and server["error"] is None
        assert {"name": "fail", "description": "Raise.", "input_schema": {
            "type": "object", "properties": {}, "title": "failArguments"}} in server["tools"]


@pytest.mark.parametrize("name, transport", [("capital", "stdio"), ("http__capital", "http")])
def test_a_chat_runs_a_tool(local: Local, name: str, transport: str) -> None:
    """The answer is that to the conversation which a client would have sent that had run the tool itself."""
    fields = {"tool_choice": named(name), "max_tokens": 60, "temperature": 0}
    answer = ask(local, **fields).json()
    called = local.processes[transport].noted[-2]
    assert called in ("capital France", "capital Italy")
    country = called.removeprefix("capital ")
    call = {"id": "call_1", "type": "function", "function": {
        "name": name, "arguments": json.dumps({"country": country})}}
    history = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "call_1", "content": {"France": "Paris", "Italy": "Rome"}[country]}]
    tools = local.definitions()
    # Of two answers neither has a next turn: nothing is run here.
    first = ask(local, **{**fields, "tools": tools, "n": 2}).json()
    assert [json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) for choice in first["choices"]] == [
        {"country": country}] * 2
    spent = first["usage"]["completion_tokens"] // 2
    expected = ask(local, messages=history, tools=tools, n=2, max_tokens=60 - spent, temperature=0).json()
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
    deadline = time.monotonic() + 10
    while any(server["status"] != "ready" for server in http.get(local.url + "/v1/mcp/servers").json()["data"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


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


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_cancels_the_call(local: Local, streamed: bool) -> None:
    process = local.processes["http" if streamed else "stdio"]
    before = process.noted.count("hang ended")
    with pytest.raises(httpx.ReadTimeout):
        http.post(local.url + "/v1/chat/completions", timeout=0.8, json={
            "messages": QUESTION, "stream": streamed, "tool_choice": named("http__hang" if streamed else "hang")})
    deadline = time.monotonic() + 1  # the call itself would be given up later
    while process.noted.count("hang ended") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def test_no_tool_server_outlives_the_server(local: Local, tiny: Path, tmp_path: Path) -> None:
    """Whether it is asked to end, or killed while it loads."""
    process = Process(tmp_path, "stdio")
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": process.settings}}))
    with start_server(tmp_path, str(tiny), "--mcp-config", str(tmp_path / "mcp.json"), ready=False) as server:
        while not process.noted[0]:
            time.sleep(0.05)
        server.process.kill()
    pids = [process.pid, local.processes["stdio"].pid, local.processes["stubborn"].pid]
    local.server.stop()
    deadline = time.monotonic() + 3
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
