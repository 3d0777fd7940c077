"""Compare speech and embeddings with `transformers serve` and plain transformers, and see what they cost a chat beside them.

    python tests/benchmarks/media.py

Speech: six clips of up to 10 s in real English, by Whisper base, as several clients ask for them; `transformers serve` would
hear no more than the first 30 s of a longer one. Both in bfloat16; its environment is that of serving.py, with what it needs
to read audio. Embeddings: all-MiniLM-L6-v2 in float32; plain transformers sorts the texts by length and pads batches of 32.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), *map(str, Path(__file__).resolve().parents[1:3])]

import httpx2 as httpx
import serve
import serving
import torch
import transformers
import weights
from conftest import start_server

CLIENTS = 4


def seconds_of(work: Callable[[object], object], items: list) -> float:
    """Return the seconds that several clients take for all of the items."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        started = time.perf_counter()
        list(pool.map(work, items))
        return time.perf_counter() - started


def hear(url: str, model: str, clip: Path) -> str:
    answer = httpx.post(f"{url}/v1/audio/transcriptions", files={"file": clip.open("rb")}, data={"model": model}, timeout=300)
    return answer.raise_for_status().json()["text"]


def speech(url: str, model: str, clips: list[Path]) -> tuple[float, list[str]]:
    """Return seconds of audio per second, and what was heard, after one clip that warms up."""
    hear(url, model, clips[0])
    length = sum(len(serve.read_audio(clip.read_bytes(), 16000)) / 16000 for clip in clips)
    texts: dict[Path, str] = {}
    return length / seconds_of(lambda clip: texts.update({clip: hear(url, model, clip)}), clips), list(texts.values())


def speech_of_transformers(folder: Path, clips: list[Path]) -> tuple[float, list[str]]:
    serving.install_transformers()
    pip = [str(serving.VENV / "bin/python"), "-m", "pip", "install", "--quiet", "python-multipart", "soundfile", "soxr"]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    with serving.running(serving.SERVERS["transformers"], folder) as (_, url):
        for _ in range(600):
            try:
                hear(url, str(folder), clips[0])
                return speech(url, str(folder), clips)
            except httpx.ConnectError:
                time.sleep(0.2)
    raise TimeoutError("transformers serve did not start")


def embeddings(url: str, model: str, texts: list[str]) -> float:
    """Return texts per second, asked for 32 at a time."""
    def ask(part: list[str]) -> None:
        httpx.post(url + "/v1/embeddings", json={"model": model, "input": part, "encoding_format": "base64"},
                   timeout=300).raise_for_status()

    parts = [texts[i:i + 32] for i in range(0, len(texts), 32)]
    ask(parts[0])
    return len(texts) / seconds_of(ask, parts)


@torch.inference_mode()
def embeddings_of_transformers(folder: Path, texts: list[str]) -> float:
    tokenizer, network = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    network(**tokenizer(texts[:32], padding=True, return_tensors="pt"))
    started = time.perf_counter()
    ordered = sorted(texts, key=len)
    for i in range(0, len(ordered), 32):
        batch = tokenizer(ordered[i:i + 32], padding=True, return_tensors="pt")
        states, mask = network(**batch).last_hidden_state, batch["attention_mask"][..., None]
        torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return len(texts) / (time.perf_counter() - started)


def gaps(url: str, tokens: int = 150) -> list[float]:
    """Return the milliseconds between a chat's chunks."""
    messages = [{"role": "user", "content": "Tell me a story."}]
    body = {"messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    arrivals = []
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                arrivals.append(time.perf_counter())
    return [1000 * (b - a) for a, b in zip(arrivals[1:], arrivals[2:])]


def beside(url: str, model: str, clip: Path) -> list[float]:
    """Return the gaps of a chat while a long clip is heard, again and again."""
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            hear(url, model, clip)

    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(1)
    found = gaps(url)
    done.set()
    thread.join()
    return found


def shown(values: list[float]) -> str:
    ordered = sorted(values)
    return f"median {statistics.median(ordered):.1f}, 95 of 100 below {ordered[int(0.95 * len(ordered))]:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=2, help="times every clip is heard (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=512, help="to embed (default: %(default)s)")
    options = parser.parse_args()
    whisper, minilm, long = weights.whisper("whisper-base"), weights.minilm(), weights.clips() / "two_cities.wav"
    clips = [*weights.librivox(), weights.clips() / "beckett.wav"] * options.repeat
    words = " ".join(weights.librivox().values()).split()
    texts = [" ".join(words[i % 40:i % 40 + 3 + i * 7 % 25]) for i in range(options.texts)]
    with tempfile.TemporaryDirectory() as folder, start_server(
            Path(folder), serve.DEFAULT_MODEL, str(whisper), str(minilm), "--kv-cache-memory", "500M") as server:
        spoken, heard = speech(server.url, str(whisper), clips)
        print(f"a chat's gaps: alone {shown(gaps(server.url))}")
        print(f"a chat's gaps: beside a transcription {shown(beside(server.url, str(whisper), long))}")
        embedded = embeddings(server.url, str(minilm), texts)
    plain = embeddings_of_transformers(minilm, texts)
    print(f"embeddings: serve.py {embedded:.0f} texts/s, plain transformers {plain:.0f}: {embedded / plain:.1f} times as many")
    theirs, also = speech_of_transformers(whisper, clips)
    same = sum(a.strip() == b.strip() for a, b in zip(sorted(heard), sorted(also)))
    print(f"speech: serve.py {spoken:.1f} s/s, transformers serve {theirs:.1f}: {spoken / theirs:.1f} times as much; "
          f"{same} of {len(heard)} texts are the same")


if __name__ == "__main__":
    main()
