"""The process: it answers while it loads, drains when told to stop, and says in one line why it cannot start."""
import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import serve
import trustme
from conftest import QUESTION, ROOT, ServerProcess, ask, http, start_server

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def half_a_request(server: ServerProcess) -> Iterator[tuple[socket.socket, bytes]]:
    """A request that is being answered for as long as its client likes: the rest of its body is yet to be sent."""
    body = json.dumps({"messages": QUESTION, "max_tokens": 5}).encode()
    head = (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + body[:9])
        time.sleep(0.3)
        yield connection, body[9:]


@pytest.fixture(scope="module")
def namesake(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """An installed package that is called `kernels` like our folder, and the file that it leaves when it is imported."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        "import pathlib\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *args, **kwargs: None, '__call__': lambda self, it: it})\n")
    (folder / "kernels-0.18.2.dist-info").mkdir()
    (folder / "kernels-0.18.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return {"PYTHONPATH": str(folder)}, folder / "kernels" / "imported"


def test_sigterm_lets_running_requests_finish_and_refuses_others(tiny: Path, tmp_path: Path, namesake: tuple) -> None:
    """Beside a package called `kernels`, which transformers imports and we do not."""
    env, imported = namesake
    with start_server(tmp_path, str(tiny), "--max-running", "1", "--max-queue", "1", env=env) as server:
        assert imported.exists() and "attention" in server.log.read_text()
        assert ask(server, max_tokens=3).status_code == 200
        assert ask(server, n=3).status_code in (400, 429)  # more than can ever wait
        with half_a_request(server) as (connection, rest):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            for path in ("/health", "/v1/models"):
                refused = http.get(server.url + path)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) >= 1
            assert ask(server).status_code == 503
            assert server.process.poll() is None
            connection.sendall(rest)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200 ") and b'"finish_reason"' in answer
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.log.read_text()


def test_ctrl_c_waits_no_longer_than_the_grace_period(tiny: Path, tmp_path: Path) -> None:
    """And --force-model answers for every name."""
    with start_server(tmp_path, "--force_model", str(tiny), "--served-model-name", "forced", "--grace-period", "1") as server:
        assert ask(server, model="some/other", max_tokens=1).json()["model"] == "forced"
        [entry] = http.get(server.url + "/v1/models").json()["data"]
        assert entry["id"] == "forced" and http.get(server.url + "/v1/models/forced").json() == entry
        assert http.get(server.url + "/v1/models/some/other").status_code == 404
        with half_a_request(server):
            started = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(10) == 0
            assert 0.9 < time.monotonic() - started < 5
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_does_not_wait(tiny: Path, tmp_path: Path) -> None:
    with start_server(tmp_path, str(tiny), "--grace-period", "60") as server, half_a_request(server):
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="timed out"):
            server.process.wait(1.5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_client_that_does_not_read_cannot_keep_it_alive(tiny: Path, tmp_path: Path) -> None:
    with start_server(tmp_path, str(tiny), "--grace-period", "0.5") as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": QUESTION, "stream": True, "n": 128, "ignore_eos": True, "logprobs": True,
                           "top_logprobs": 20, "temperature": 1}).encode()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(3)
            started = time.monotonic()
            assert server.stop(timeout=12) == 0
            assert time.monotonic() - started < 8


def test_the_port_answers_before_the_model_is_there_and_an_unknown_model_ends_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a hub that does not answer
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        with start_server(tmp_path, "nobody/nothing", ready=False, env=env) as server:
            health = http.get(server.url + "/health")
            assert health.status_code == 503 and "loading" in health.text
            asked = ask(server)
            assert asked.status_code == 503 and asked.json()["error"]["code"] == "loading"
            assert int(asked.headers["retry-after"]) >= 1
            assert [entry["id"] for entry in http.get(server.url + "/v1/models").json()["data"]] == ["nobody/nothing"]
            assert server.process.wait(15) not in (0, None)
            errors = [line for line in server.log.read_text().splitlines() if not re.match(r"I \d", line)]
            assert len(errors) == 1 and "nobody/nothing" in errors[0]


def test_a_corrupt_checkpoint_ends_it_in_one_line(tiny: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(tiny, tmp_path / "corrupt") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with start_server(tmp_path, str(weights.parent), ready=False) as server:
        assert server.process.wait(30) == 2
        errors = [line for line in server.log.read_text().splitlines() if not re.match(r"I \d", line)]
        assert len(errors) == 1 and "corrupt" in errors[0], errors


def test_https_keys_and_a_log_in_json(tiny: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    (tmp_path / "keys").write_text("from-a-file\n\n  another \n")
    with start_server(tmp_path, str(tiny), "--certfile", str(tmp_path / "server.pem"), "--api-key-file", str(tmp_path / "keys"),
                      "--log-format", "json", "--api-key", "of-the-line", env={"SERVE_API_KEY": "of-the-environment"},
                      ready=False) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        with httpx.Client(base_url=server.url, verify=trust, timeout=30) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.05)
            for key in ("from-a-file", "another", "of-the-line", "of-the-environment"):
                answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 2}, headers={
                    "Authorization": f"Bearer {key}", "X-Request-Id": f"<{key}>"})
                assert answer.status_code == 200 and answer.headers["x-request-id"] == f"<{key}>"
            assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401
        host, port = server.url.removeprefix("https://").split(":")
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(nonsense)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    requests = [line for line in lines if line["message"] == "request" and line["path"] == CHAT]
    assert [line["id"] for line in requests] == ["<from-a-file>", "<another>", "<of-the-line>", "<of-the-environment>"]
    assert all(line["level"] == "info" and line["status"] == 200 and line["completion_tokens"] == 2 for line in requests)


BREAKS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import serve

run_step = serve.Engine.run_step

def fails(engine, step, meanwhile):
    engine.broken = getattr(engine, "broken", False) or any(seq.sampling.seed == 666 for seq in step.batch)
    if engine.broken:
        raise RuntimeError("the device is lost")
    return run_step(engine, step, meanwhile)

serve.Engine.run_step = fails
sys.exit(serve.main(sys.argv[1:]))
"""


def test_an_engine_that_cannot_go_on_ends_the_process(tiny: Path, tmp_path: Path) -> None:
    """With all its requests, one whose client does not read among them."""
    with start_server(tmp_path, str(tiny), program=("-c", BREAKS)) as server, socket.socket() as deaf:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": QUESTION, "stream": True, "n": 128, "ignore_eos": True, "logprobs": True,
                           "top_logprobs": 20, "temperature": 1}).encode()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert ask(server, max_tokens=2).status_code == 200
        time.sleep(2)
        with contextlib.suppress(httpx.TransportError):
            assert ask(server, seed=666, max_tokens=2).status_code == 500
        assert server.process.wait(15) not in (0, None)
    assert "the device is lost" in server.log.read_text()


@pytest.mark.parametrize("arguments", [
    ["--api-key", ""], ["--api-key", "a b"], ["--api-key", "é"], ["--api-key-file", "/dev/null"], ["--api-key-file", "/none"],
    ["--certfile", __file__], ["--certfile", __file__, "--keyfile", __file__], ["--keyfile", __file__],
    ["--max-body-size", "0"], ["--request-timeout", "-1"], ["--log-format", "xml"],
    ["--port", "99999"], ["--port", "-1"], ["--host", "nowhere.invalid"], ["--host", "192.0.2.1"],
    ["--device", "nonsense"]], ids=str)
def test_what_can_be_known_before_it_starts(arguments: list[str], capfd: pytest.CaptureFixture) -> None:
    assert exit_code(arguments) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_an_empty_key_in_the_environment_is_no_open_door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("SERVE_API_KEY", "")
    assert exit_code([]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "API keys" in line


def test_a_port_in_use(capfd: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert exit_code(["--port", str(taken.getsockname()[1])]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "in use" in line


def exit_code(arguments: list[str]) -> int:
    try:
        return serve.main(arguments)
    except SystemExit as exit:
        return exit.code
