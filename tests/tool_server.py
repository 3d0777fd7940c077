"""An MCP server to test with: `tool_server.py EVENTS stdio` (or stubborn, or http PORT); it appends to EVENTS what happens."""
import os
import signal
import sys
import time
from typing import Literal

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import ToolAnnotations

server = MCPServer("test")


def note(event: str) -> None:
    with open(sys.argv[1], "a") as events:
        print(event, file=events)


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def capital(country: Literal["France", "Italy"]) -> str:
    """Tell the capital of a country."""
    note(f"capital {country}")
    return {"France": "Paris", "Italy": "Rome"}[country]


@server.tool()
async def hang() -> str:
    """Never answer."""
    note("hang")
    try:
        await anyio.sleep_forever()
    finally:
        note("hang ended")


@server.tool()
def fail() -> str:
    """Raise."""
    raise ValueError("no luck today")


@server.tool()
def megabyte() -> str:
    """Say much."""
    return "word " * 200_000


@server.tool()
async def learn(name: str, context: Context) -> str:
    """Offer one more tool."""
    server.add_tool(lambda: "new", name=name, description="New.")
    await context.notify_tools_changed()
    return "learned"


@server.tool()
def die() -> str:
    """End the process amid the call."""
    note("die")
    os._exit(1)


if __name__ == "__main__":
    note(f"start {os.getpid()}")
    print("the tool server \x1b[31mspeaks", file=sys.stderr, flush=True)
    if sys.argv[2] == "stdio":
        server.run()
    elif sys.argv[2] == "stubborn":  # it has no tools, and takes its time to leave
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        MCPServer("stubborn").run()
        time.sleep(20)
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[3]))
