"""Real checkpoints, and real servers on loopback: in a process of their own, or on a thread of the tests' own process."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import serve  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trio  # noqa: E402

serve.end_soon = lambda code: None  # a server that crashes in the tests' own process must not end them


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
def start_server(folder: Path, *arguments: str, ready: bool = True, env: dict[str, str] | None = None,
                 program: tuple[str, ...] = (str(ROOT / "serve.py"),)) -> Iterator[ServerProcess]:
    """Run the server as a user would, or a program that changes it; its log is in `folder`. Kills it at the end by its PID."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *program, "--port", "0", *arguments], stdout=out, stderr=out, cwd=folder,
                                   env={**os.environ, **(env or {})})
    try:
        url = wait_for(lambda: re.search(r"listening on ([^\s\"]+)", log.read_text()), process, log)[1]
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


APP_STATE = [*serve.App.__annotations__, "draining"]


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
        self.before = {name: vars(serve.app)[name] for name in APP_STATE if name in vars(serve.app)}
        self.thread.start()
        deadline = time.monotonic() + 120
        while not is_healthy(self.url):
            assert self.thread.is_alive() and time.monotonic() < deadline, self.error
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        self.token.run_sync_soon(self.stop_event.set)
        self.thread.join(20)
        vars(serve.app).update(self.before)  # the app is one: what another server of this process serves with goes on
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


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
http = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def ask(server: LocalServer | ServerProcess, **fields: object) -> httpx.Response:
    """Ask for a chat completion."""
    return http.post(server.url + "/v1/chat/completions", json={"messages": QUESTION, **fields})


def stream(server: LocalServer | ServerProcess, **fields: object) -> list[dict]:
    """Return the chunks of a streamed chat completion, framed as they must be."""
    response = ask(server, stream=True, **fields)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"), response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="session")
def exact(checkpoint: Path) -> serve.Runner:
    """The built-in model in float32, with a small cache: what it says is compared token for token."""
    config = serve.Config(device="cpu", dtype="float32", block_size=8, kv_cache_memory=128 << 20)
    model = serve.load_model(serve.DEFAULT_MODEL, serve.Checkpoint(str(checkpoint)), config, True, lambda stage: None)
    kernel, _ = serve.choose_attention(config.attention, model.device)
    return serve.make_runner(model, kernel, config)[0]


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads in no time: a llama of random weights, with the built-in model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, folder)
    return folder


@contextlib.asynccontextmanager
async def running(runner: serve.Runner, num_blocks: int | None = None, max_batch_tokens: int = 256, max_running: int = 64,
                  **settings: object) -> AsyncIterator[serve.Engine]:
    """An engine in a nursery of its own; at the end it must be idle, and every block free."""
    block_size = getattr(runner, "block_size", 8)
    pool = serve.BlockPool(num_blocks or getattr(runner, "num_blocks", 4096), block_size)
    scheduler = serve.Scheduler(pool, max_batch_tokens, max_running, paged=runner.paged)
    engine = serve.Engine(runner.model, runner, scheduler, serve.EngineThread(None), serve.Config(**settings))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine
        with trio.fail_after(10):
            while not scheduler.idle:
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert len(pool.free) == pool.num_blocks - 1 and not any(pool.references)


async def collect(stream: serve.TokenStream) -> list[list[serve.Token]]:
    """Run a stream to its end; return the tokens of each sequence."""
    answers: list[list[serve.Token]] = [[] for _ in stream.sequences]
    async with stream:
        async for seq, tokens in stream:
            answers[seq.index] += tokens
    return answers
