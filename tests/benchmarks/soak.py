"""Load a server with everything at once, twice as much as it takes, for minutes, and see whether that leaves a trace.

    python tests/benchmarks/soak.py --minutes 2 > report.md
    python tests/benchmarks/soak.py --minutes 10 -- Qwen/Qwen3-0.6B --max-queue 64

What stands after -- are serve.py's own arguments. The clients send short and long prompts, several answers to one, grammars,
bad requests, and they leave: amid the body, in the queue, amid the answer; some read slowly. Responses, embeddings, images and
transcriptions are asked of each model that is served, and a 400 is right for those that cannot. It must hold that

- no answer is an error but for 429 when the queue is full, and a 400 for what is bad;
- every greedy answer is the one that was given alone, before;
- /health answers all the time;
- memory is no more at the end than after the first third, but for 5 % (the KV cache is filled before);
- in the end nothing runs, nothing waits, and every block is free: /metrics says so.

The report goes to stdout; the exit code is 1 if something does not hold.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import wave
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SERVER = ["--max-running", "8", "--max-queue", "12", "--kv-cache-memory", "256MiB"]  # a small capacity: it is soon exceeded
CLIENTS = 40
WORDS = "time year people way day man thing woman life child world school state family student group country problem".split()


class Soak:
    """What the clients share: where the server is, what greedy answers are, and what was seen."""

    def __init__(self, url: str, paths: set[str]) -> None:
        self.url, self.paths = url, paths
        self.host, self.port = url.removeprefix("http://").split(":")
        self.stop = threading.Event()
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.health: list[float] = []
        self.memory: list[int] = []
        self.alone: dict[str, str] = {}
        self.models = [model["id"] for model in json.loads(self.call("/v1/models")[1])["data"]]

    def call(self, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Return the status and the answer; a body is JSON unless it is bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def expect(self, what: str, answer: tuple[int, bytes], *statuses: int) -> bytes | None:
        """Count an answer; one that is neither of these statuses nor a 429 is wrong. Return it if it is a 200."""
        status, content = answer
        self.seen[f"{what}: {status}"] += 1
        if status not in (*statuses, 429):
            self.wrong.append(f"{what}: {status} {content[:300]!r}")
        if status == 429:
            time.sleep(0.2)  # less than it asks for
        return content if status == 200 else None


def text_of(content: bytes) -> str:
    """Return the text of a chat completion, streamed or not. Raises for an error in a stream, or one without an end."""
    if not content.startswith(b"data:") and not content.startswith(b":"):
        return json.loads(content)["choices"][0]["message"]["content"]
    events = [event.removeprefix("data: ") for event in content.decode().split("\n\n") if event.startswith("data: ")]
    assert events[-1] == "[DONE]", content[-300:]
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def question(rng: random.Random, words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Say something about " + " ".join(rng.choices(WORDS, k=words))}]


def greedy(soak: Soak, rng: random.Random) -> None:
    """Ask one of the questions that were asked alone."""
    prompt = rng.choice(list(soak.alone))
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0, "stream": rng.random() < 0.5}
    if content := soak.expect("greedy", soak.call("/v1/chat/completions", body), 200):
        if (text := text_of(content)) != soak.alone[prompt]:
            soak.wrong.append(f"greedy: {text!r} and not {soak.alone[prompt]!r}")


def several(soak: Soak, rng: random.Random) -> None:
    body = {"messages": question(rng, 9), "n": rng.randint(2, 6), "max_tokens": 30, "temperature": 1.0}
    soak.expect("several answers", soak.call("/v1/chat/completions", body), 200)


def long(soak: Soak, rng: random.Random) -> None:
    body = {"prompt": " ".join(rng.choices(WORDS, k=600)), "max_tokens": 10, "echo": True, "logprobs": 2}
    soak.expect("long prompt", soak.call("/v1/completions", body), 200)


def grammar(soak: Soak, rng: random.Random) -> None:
    pattern = f"[a-z]{{{rng.randint(2, 40)}}} [0-9]{{3}}"
    body = {"messages": question(rng, 5), "max_tokens": 200, "structured_outputs": {"regex": pattern}}
    if content := soak.expect("grammar", soak.call("/v1/chat/completions", body), 200):
        if not re.fullmatch(pattern, text_of(content)):
            soak.wrong.append(f"grammar: {text_of(content)!r} for {pattern}")


def bad(soak: Soak, rng: random.Random) -> None:
    body = rng.choice([{"messages": []}, {"messages": question(rng, 3), "temperature": 9}, b"{", b"\xff" * 10_000,
                       {"messages": question(rng, 3), "structured_outputs": {"regex": "("}}, {"messages": question(rng, 9000)}])
    soak.expect("bad", soak.call("/v1/chat/completions", body), 400)


def leaving(soak: Soak, rng: random.Random) -> None:
    """Leave amid the body, in the queue or amid the answer; half the time with a reset."""
    body = json.dumps({"messages": question(rng, 20), "max_tokens": 400, "ignore_eos": True, "n": rng.choice([1, 1, 4]),
                       "stream": rng.random() < 0.7}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection((soak.host, int(soak.port)), timeout=30) as connection:
        connection.sendall(sent[:rng.randrange(len(sent))] if rng.random() < 0.3 else sent)
        time.sleep(rng.choice([0, 0.01, 0.1, 1.0]))
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    soak.seen["left"] += 1


def slow(soak: Soak, rng: random.Random) -> None:
    """Read a large answer in small pieces; its server has long gone on to others."""
    body = json.dumps({"messages": question(rng, 5), "max_tokens": 60, "ignore_eos": True, "n": 2, "stream": True,
                       "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(120)
        connection.connect((soak.host, int(soak.port)))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while data := connection.recv(4096):
            received += data
            time.sleep(0.01)
        status = int(received.split(b" ")[1])
        soak.expect("slow reader", (status, received[-300:]), 200)
        if status == 200 and b"[DONE]" not in received:
            soak.wrong.append(f"slow reader: {received[-300:]!r}")


def embedding(soak: Soak, rng: random.Random) -> None:
    soak.expect("embedding", soak.call("/v1/embeddings", {
        "model": rng.choice(soak.models), "input": [" ".join(rng.choices(WORDS, k=20))] * 3}), 200, 400)


def response(soak: Soak, rng: random.Random) -> None:
    body = {"input": "Say " + rng.choice(WORDS), "max_output_tokens": 20, "stream": rng.random() < 0.5, "store": False}
    soak.expect("response", soak.call("/v1/responses", body), 200)


def image(soak: Soak, rng: random.Random) -> None:
    """Ask about a picture of one colour; a model that reads no pictures says so."""
    row = b"\0" + bytes(rng.randbytes(3)) * 32
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row * 32)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What colour is it?"}]
    body = {"model": rng.choice(soak.models), "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    soak.expect("image", soak.call("/v1/chat/completions", body), 200, 400)


def transcription(soak: Soak, rng: random.Random) -> None:
    made = io.BytesIO()
    with wave.open(made, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(rng.randbytes(32000))
    model = f'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{rng.choice(soak.models)}\r\n'.encode()
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + made.getvalue() + b"\r\n--x--\r\n"
    answer = soak.call("/v1/audio/transcriptions", model + file, "multipart/form-data; boundary=x")
    soak.expect("transcription", answer, 200, 400)


KINDS: dict[Callable[[Soak, random.Random], None], tuple[int, str]] = {  # how often, and the endpoint that it needs
    greedy: (10, "/v1/chat/completions"), several: (3, "/v1/chat/completions"), long: (3, "/v1/completions"),
    grammar: (3, "/v1/chat/completions"), bad: (4, "/v1/chat/completions"), leaving: (6, "/v1/chat/completions"),
    slow: (1, "/v1/chat/completions"), embedding: (2, "/v1/embeddings"), response: (3, "/v1/responses"),
    image: (1, "/v1/chat/completions"), transcription: (1, "/v1/audio/transcriptions"),
}


def client(soak: Soak, seed: int) -> None:
    """Do one thing after the other until it is time to stop."""
    rng = random.Random(seed)
    kinds = [kind for kind, (weight, path) in KINDS.items() if path in soak.paths for _ in range(weight)]
    while not soak.stop.is_set():
        kind = rng.choice(kinds)
        try:
            kind(soak, rng)
        except Exception as error:
            soak.wrong.append(f"{kind.__name__}: {error!r}")
        time.sleep(rng.random() * 0.05)


def watch(soak: Soak, process: psutil.Process) -> None:
    """Ask for /health, and look at the memory."""
    while not soak.stop.is_set():
        started = time.monotonic()
        soak.expect("health", soak.call("/health"), 200)
        soak.health.append(time.monotonic() - started)
        soak.memory.append(process.memory_info().rss)
        time.sleep(0.1)


def gauges(soak: Soak) -> dict[str, float]:
    """Return the samples of /metrics without labels but the model's."""
    lines = soak.call("/metrics")[1].decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.partition("{")[0].removeprefix("vllm:"): float(value) for name, value in pairs if "," not in name}


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[Soak, psutil.Process]]:
    """Start the server, and stop it: that must take no force."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--log-level", "info", *SERVER, *arguments]
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                log.seek(0)
                text = log.read()
                if "ready: " in text:
                    break
                assert process.poll() is None, text
                time.sleep(0.2)
            url = re.search(r"listening on (\S+)", text)[1]
            paths = json.loads(urllib.request.urlopen(url + "/openapi.json").read())["paths"].keys()
            yield Soak(url, set(paths)), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
            log.seek(0)
            text = log.read()
            assert code == 0 and "Traceback" not in text and "  | " not in text, (code, text[-3000:])


def run(soak: Soak, process: psutil.Process, minutes: float) -> dict[str, str]:
    """Run the load; return what does not hold."""
    rng = random.Random(0)
    for _ in range(12):
        prompt = question(rng, rng.choice([3, 30, 100]))[0]["content"]
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
        soak.alone[prompt] = text_of(soak.call("/v1/chat/completions", body)[1])
    threads = [threading.Thread(target=client, args=(soak, seed)) for seed in range(CLIENTS)]
    threads.append(threading.Thread(target=watch, args=(soak, process)))
    for thread in threads:
        thread.start()
    time.sleep(60 * minutes)
    soak.stop.set()
    for thread in threads:
        thread.join(180)
    deadline = time.monotonic() + 20
    while (found := gauges(soak))["num_requests_running"] + found["num_requests_waiting"] + found["kv_cache_usage_perc"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    third = len(soak.memory) // 3
    early, late = max(soak.memory[third // 2:third]), statistics.median(soak.memory[-third // 2:])
    return {what: why for what, why, holds in [
        ("wrong answers", "; ".join(soak.wrong[:5]), not soak.wrong),
        ("clients that hang", "", not any(thread.is_alive() for thread in threads)),
        ("429s", "there were none: this is no load", any(name.endswith(": 429") for name in soak.seen)),
        ("left behind", str({name: value for name, value in found.items() if value and "num_requests" in name}), not (
            found["num_requests_running"] or found["num_requests_waiting"] or found["kv_cache_usage_perc"])),
        ("memory", f"{early >> 20} MiB, then {int(late) >> 20} MiB", late < 1.05 * early),
        ("health", f"{max(soak.health):.1f} s at worst", max(soak.health) < 5),
    ] if not holds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("server", nargs="*", help="after --: arguments of serve.py")
    options = parser.parse_args()
    with serving(options.server) as (soak, process):
        problems = run(soak, process, options.minutes)
        found = gauges(soak)
        print(f"{options.minutes:g} minutes, {CLIENTS} clients, serve.py {' '.join([*SERVER, *options.server])}\n")
        print("| request | answers |\n|---|---:|")
        print("\n".join(f"| {name} | {count} |" for name, count in sorted(soak.seen.items())))
        print(f"\nTokens: {found['prompt_tokens_total']:.0f} read, {found['prefix_cache_hits_total']:.0f} of them cached, "
              f"{found['generation_tokens_total']:.0f} generated; {found['num_preemptions_total']:.0f} preemptions.")
        memory = soak.memory[len(soak.memory) // 3] >> 20, soak.memory[-1] >> 20
        print(f"/health: median {statistics.median(soak.health) * 1e3:.0f} ms, longest {max(soak.health) * 1e3:.0f} ms. "
              f"Resident: {memory[0]} MiB after a third, {memory[1]} MiB at the end.")
        print("\n" + ("\n".join(f"NOT SO: {what}: {why}" for what, why in problems.items()) or "All holds."))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
