"""Real checkpoints, and real servers on loopback: in a process of their own, or on a thread of the tests' own process."""
from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import serve  # noqa: E402
import trio  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The folder of the built-in model, fetched and converted at the first use."""
    try:
        return serve.default_checkpoint()
    except serve.APIError as error:
        pytest.skip(f"no weights: {error}")


@dataclass
class ServerProcess:
    """`python serve.py …` on a free port."""

    process: subprocess.Popen
    url: str
    log: Path

    def stop(self, timeout: float = 15) -> int:
        """Send SIGTERM and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextlib.contextmanager
def start_server(folder: Path, *arguments: str, ready: bool = True, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run the server as a user would; its log is in `folder`. Kills it at the end by its PID, if it still runs."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), "--port", "0", *arguments], stdout=out, stderr=out,
                                   cwd=folder, env={**os.environ, **(env or {})})
    try:
        url = wait_for(lambda: re.search(r"listening on (\S+)", log.read_text()), process, log)[1]
        if ready:
            wait_for(lambda: is_healthy(url), process, log)
        yield ServerProcess(process, url, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(probe, process: subprocess.Popen, log: Path, seconds: float = 120):
    """Poll until the probe returns something true."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(url + "/health", timeout=5).status == 200
    except OSError:
        return False


class LocalServer:
    """The server on a thread of this process, so that a test can look into its engine."""

    def __init__(self, *arguments: str) -> None:
        self.config = serve.parse_command_line([*arguments, "--log-level", "warning"])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.token: trio.lowlevel.TrioToken | None = None
        self.stop_event: trio.Event | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        async def main() -> None:
            self.token, self.stop_event = trio.lowlevel.current_trio_token(), trio.Event()
            await serve.serve(self.config, self.listener, self.stop_event)

        try:
            trio.run(main)
        except BaseException as error:  # shown by whoever waits for the server
            self.error = error

    def start(self) -> LocalServer:
        self.thread.start()
        deadline = time.monotonic() + 120
        while not is_healthy(self.url):
            assert self.thread.is_alive() and time.monotonic() < deadline, self.error
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        self.token.run_sync_soon(self.stop_event.set)
        self.thread.join(20)
        assert not self.thread.is_alive() and self.error is None, self.error

    @property
    def engine(self) -> serve.Engine:
        return serve.app.models.loaded[serve.app.models.default].engine

    def assert_idle(self, seconds: float = 5) -> None:
        """Wait until no sequence is left, then check that every block is free."""
        deadline = time.monotonic() + seconds
        scheduler = self.engine.scheduler
        while not scheduler.idle:
            assert time.monotonic() < deadline, (scheduler.waiting, scheduler.running)
            time.sleep(0.01)
        pool = scheduler.pool
        assert len(pool.free) == pool.num_blocks - 1 and not any(pool.references)


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[LocalServer]:
    """The built-in model behind HTTP, in bfloat16, shared by all tests: leave it idle."""
    local = LocalServer().start()
    yield local
    local.stop()
