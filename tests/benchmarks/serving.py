"""Compare serve.py with `transformers serve`: one checkpoint, one load over HTTP, one server at a time.

    python tests/benchmarks/serving.py > table.md
    python tests/benchmarks/serving.py --servers serve.py,serve.py-8bit,serve.py-4bit --loads single,batch > bits.md

Run it on a quiet machine, with the Python that runs serve.py (and psutil). `transformers serve` gets an environment of
its own in the cache folder ($SERVE_CACHE, else ~/.cache/serve.py) on first use. Each server is started twice: the first
start gives "first token, cold", the second "warm" (the first has filled the page cache and serve.py's own caches), and
answers the loads. Progress goes to stderr, tables in Markdown to stdout.

A load is closed-loop: each client sends its next request when its last answer has ended. A token is timed when the
client's read returns it; tokens that arrive in one read count as one arrival between two gaps. Counts of tokens are the
servers' own (`usage`), and every answer is forced to its full length.

The load "scoring" is what an evaluation harness asks for: the log-probabilities of a prompt's own tokens, of prompts that
share their examples and, for comparison, of prompts that share nothing. `transformers serve` has no such thing.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SERVE_CACHE", "~/.cache/serve.py")).expanduser()
DEFAULT_MODEL = CACHE / "models" / "SmolLM2-135M-Instruct"  # where serve.py keeps its own, converted
VENV = CACHE / "benchmark-venv"
REQUEST_LIMIT_S = 600.0
START_LIMIT_S = 600.0
IDLE_S = 5.0

Messages = list[dict[str, str]]

# ── Loads ─────────────────────────────────────────────────────────────────────────────────
# What the clients ask. Every prompt comes from a fixed seed, so every server answers the same ones.

# Common words, one token each in most vocabularies: lengths come out close without a tokenizer. Tables give the counted ones.
WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work number night point home water room mother area money
    story fact month lot right study book eye job word business issue side kind head house service friend father power
    hour game line end member law car city name team minute idea body back face door health person art war history
    party result change morning reason research girl boy food land field river music paper stone tree road light
""".split()


@dataclass(frozen=True)
class Load:
    """`clients` work through `requests` prompts of about `prompt_tokens`; the first `shared_tokens` are the same in all."""

    title: str
    clients: int
    requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: int
    shared_tokens: int = 0


LOADS = {
    "single": Load("One client", 1, 6, (50, 50), 128),
    "batch": Load("16 clients, mixed prompts", 16, 64, (20, 300), 128),
    "long": Load("4 clients, long prompts", 4, 12, (1500, 1500), 32),
    "shared": Load("8 clients, one system prompt", 8, 32, (1030, 1030), 64, shared_tokens=1000),
}


@dataclass(frozen=True)
class Scoring:
    """`clients` have prompts scored: `requests` that share all but their last tokens, and `apart` that share nothing."""

    clients: int
    requests: int
    apart: int
    shared_tokens: int
    own_tokens: int


SCORING = Scoring(8, 160, 24, 1000, 30)


def sentence(seed: str, tokens: int) -> str:
    """About `tokens` tokens of words; another seed differs from the first word on, so no prefix cache helps."""
    return " ".join(random.Random(seed).choices(WORDS, k=max(1, tokens)))


def prompts(name: str, load: Load, count: int, purpose: str = "load") -> list[Messages]:
    """Return `count` prompts; another purpose gives other prompts of the same shape, shared part included."""
    lengths = random.Random(f"{name} {purpose}")
    return [prompt(load, f"{name} {purpose}", i, lengths.randint(*load.prompt_tokens)) for i in range(count)]


def prompt(load: Load, seed: str, index: int, tokens: int) -> Messages:
    # The system message opens the prompt, and a seed of its own keeps the chat template from putting a shared one there.
    opening = load.shared_tokens - 5 if load.shared_tokens else 2
    system = sentence(seed if load.shared_tokens else f"{seed} system {index}", opening)
    user = sentence(f"{seed} user {index}", tokens - opening - 16)
    return [{"role": "system", "content": system}, {"role": "user", "content": f"{user}. Tell a long story."}]


# ── Client ────────────────────────────────────────────────────────────────────────────────
# Shares its cores with the server: while a load runs it only reads and notes the time. Parsing waits for the end.

EVENT = re.compile(rb"data: ?(\{[^\n]*\})\r?\n")


@dataclass(frozen=True)
class Answer:
    """What one request received: (time, bytes) for each read."""

    sent: float
    reads: list[tuple[float, bytes]]


@dataclass(frozen=True)
class Timing:
    """One parsed answer; `arrivals` are the times at which text arrived."""

    sent: float
    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int


def exchange(url: str, body: bytes, path: str = "/v1/chat/completions") -> Answer:
    """POST a body and keep all that arrives until the server closes."""
    where = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sent, reads = time.perf_counter(), []
    with socket.create_connection((where.hostname, where.port or 80), timeout=REQUEST_LIMIT_S) as connection:
        connection.sendall(head.encode() + body)
        while data := connection.recv(1 << 16):
            reads.append((time.perf_counter(), data))
            if reads[-1][0] - sent > REQUEST_LIMIT_S:
                raise TimeoutError(f"no end of the answer after {REQUEST_LIMIT_S:.0f} s")
    return Answer(sent, reads)


def parse(answer: Answer) -> Timing:
    """Find the events in an answer. Servers write an event in one piece, so the chunked framing never cuts one."""
    raw = b"".join(data for _, data in answer.reads)
    if not re.match(rb"HTTP/1\.1 200 ", raw):
        raise RuntimeError(f"refused: {raw[:1000].decode(errors='replace')}")
    ends = list(accumulate(len(data) for _, data in answer.reads))
    arrivals, usage = [], None
    for event in EVENT.finditer(raw):
        chunk = json.loads(event[1])
        if "error" in chunk:
            raise RuntimeError(f"failed: {chunk['error']}")
        usage = chunk.get("usage") or usage
        if any(choice["delta"].get("content") or choice["delta"].get("reasoning_content") for choice in chunk["choices"]):
            arrivals.append(answer.reads[bisect_left(ends, event.end())][0])
    if usage is None or not arrivals:
        raise RuntimeError(f"no text or no usage in the answer: {raw[-1000:].decode(errors='replace')}")
    return Timing(answer.sent, list(dict.fromkeys(arrivals)), usage["prompt_tokens"], usage["completion_tokens"])


def percentile(values: Sequence[float], fraction: float) -> float:
    return sorted(values)[math.ceil(fraction * len(values)) - 1]


# ── Servers ───────────────────────────────────────────────────────────────────────────────
# How each one is started, with its best settings, and asked for answers of a given length.


@dataclass(frozen=True)
class Server:
    """`command` gives the arguments that serve a model folder on a port; a server without one runs already, at `url`."""

    name: str
    command: Callable[[Path, int], list[str]] | None = None
    url: str = ""

    @property
    def is_transformers(self) -> bool:
        return self.name.startswith("transformers")


def serve_py(model: Path, port: int) -> list[str]:
    return [sys.executable, str(ROOT / "serve.py"), str(model), "--host", "127.0.0.1", "--port", str(port)]


def transformers(model: Path, port: int) -> list[str]:
    """One request at a time, the default of `transformers serve`. Naming the model loads it before the port opens."""
    options = ["--dtype", "bfloat16", "--attn-implementation", "sdpa"]
    return [str(VENV / "bin/transformers"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]


def transformers_cb(model: Path, port: int) -> list[str]:
    """Continuous batching. Left to itself it sizes its cache from all of the machine's memory and is killed.

    96 blocks of 256 tokens hold every load here with room for its scheduler's margin. Its attention masks one dense
    matrix of all requests, so smaller steps waste less: 256 tokens took the least CPU time of 128, 256 and 512.
    """
    options = ["--continuous-batching", "--cb-block-size", "256", "--cb-num-blocks", "96", "--cb-max-batch-tokens", "256"]
    return [*transformers(model, port), *options]


def with_flags(*flags: str) -> Callable[[Path, int], list[str]]:
    return lambda model, port: [*serve_py(model, port), *flags]


SERVERS = {
    "serve.py": Server("serve.py", serve_py),
    "serve.py-bf16": Server("serve.py-bf16", with_flags("--gguf-weights", "dequantised")),
    "serve.py-8bit": Server("serve.py-8bit", with_flags("--load-in-8bit")),
    "serve.py-4bit": Server("serve.py-4bit", with_flags("--load-in-4bit")),
    "transformers": Server("transformers", transformers),
    "transformers-cb": Server("transformers-cb", transformers_cb),
}

# OpenMP is left as it comes, libgomp's long spin included: with cores to itself `transformers serve` runs faster so than
# with GOMP_SPINCOUNT=2000 or OMP_WAIT_POLICY=PASSIVE. It suffers the most from busy neighbours, hence a quiet machine.
TRANSFORMERS_ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


def install_transformers() -> None:
    """Make the environment of `transformers serve`, or complete it; a complete one costs pip two seconds."""
    if not VENV.exists():
        say(f"creating {VENV}")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet"]
    # torch first and exact: left to choose, pip takes a build with gigabytes of CUDA libraries.
    for packages in (["torch==2.13.0"], ["transformers[serving]==5.23.0", "accelerate"]):
        subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)


def request_body(server: Server, model: str, messages: Messages, max_tokens: int) -> bytes:
    """Ask for exactly `max_tokens` tokens, greedily, in the server's own words."""
    body = {"model": model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": max_tokens}
    if server.is_transformers:
        # It refuses `ignore_eos`; a token id that does not exist as the end of sequence has the same effect.
        body["generation_config"] = json.dumps({"do_sample": False, "eos_token_id": -1})
    else:
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


def served_model(server: Server, model: Path) -> str:
    """Return the model to ask a running server for; `transformers serve` lists the hub's cache, not what it was given."""
    if server.is_transformers:
        return str(model)
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


@contextmanager
def running(server: Server, model: Path) -> Iterator[tuple[psutil.Popen, str]]:
    """Start a server on a free port; on leaving end it, and whatever it started, by process id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | (TRANSFORMERS_ENVIRONMENT if server.is_transformers else {})
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = psutil.Popen(server.command(model, port), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process, f"http://127.0.0.1:{port}"
        except Exception:
            log.seek(0)
            say(f"the last lines of {server.name}:\n{''.join(log.readlines()[-20:])}")
            raise
        finally:
            end(tree(process))


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)] if process.is_running() else []


def end(processes: list[psutil.Process]) -> None:
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            if process.is_running():
                stop(process)
        _, processes = psutil.wait_procs(processes, timeout=20)


# ── Measurements ──────────────────────────────────────────────────────────────────────────


def first_token(process: psutil.Popen, url: str, body: bytes, started: float) -> float:
    """Return the seconds from the command to the first token, asking again until the server answers."""
    while time.perf_counter() - started < START_LIMIT_S:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("the server ended before it answered")
        try:
            answer = exchange(url, body)
        except (ConnectionError, socket.timeout):
            time.sleep(0.05)
            continue
        if not re.match(rb"HTTP/1\.1 503 ", answer.reads[0][1] if answer.reads else b"HTTP/1.1 503 "):
            return parse(answer).arrivals[0] - started
        time.sleep(0.05)
    raise TimeoutError(f"no answer within {START_LIMIT_S:.0f} s of the start")


def idle_cpu(process: psutil.Process) -> float:
    """Return the percentage of one core that the server uses while nobody asks it anything."""

    def seconds() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in tree(process))

    before = seconds()
    time.sleep(IDLE_S)
    return 100 * (seconds() - before) / IDLE_S


def memory(process: psutil.Process) -> dict[str, float]:
    """Return resident memory now and at its highest so far (the kernel's own mark, where it has one), in MiB."""
    now = {each.pid: each.memory_info().rss / 2**20 for each in tree(process)}
    peak = 0.0
    for pid, resident in now.items():
        status = Path(f"/proc/{pid}/status")
        peak += int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10 if status.exists() else resident
    return {"resident_mib": sum(now.values()), "peak_mib": peak}


def run_load(server: Server, url: str, model: str, name: str) -> dict[str, float]:
    """Warm up with one prompt that no measured one shares anything with, then run the load."""
    load = LOADS[name]
    warm_up, *bodies = [
        request_body(server, model, messages, load.output_tokens)
        for messages in prompts(name, load, 1, "warm-up") + prompts(name, load, load.requests)
    ]
    parse(exchange(url, warm_up))
    started, own = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(load.clients) as clients:
        answers = list(clients.map(lambda body: exchange(url, body), bodies))
    own_cpu = 100 * (time.process_time() - own) / (time.perf_counter() - started)
    return summary([parse(answer) for answer in answers], load) | {"load_generator_cpu_percent": own_cpu}


def summary(timings: list[Timing], load: Load) -> dict[str, float]:
    """Reduce a load's answers to its figures; times in milliseconds."""
    first = [1e3 * (timing.arrivals[0] - timing.sent) for timing in timings]
    gaps = [1e3 * (after - before) for timing in timings for before, after in pairwise(timing.arrivals)]
    seconds = max(timing.arrivals[-1] for timing in timings) - min(timing.sent for timing in timings)
    output = sum(timing.output_tokens for timing in timings)
    if output != load.requests * load.output_tokens:
        say(f"warning: {output} output tokens instead of {load.requests * load.output_tokens}")
    return {
        "tokens_per_s": output / seconds,
        "ttft_p50_ms": percentile(first, 0.5),
        "ttft_p95_ms": percentile(first, 0.95),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p95_ms": percentile(gaps, 0.95),
        "prompt_tokens": sum(timing.prompt_tokens for timing in timings) / len(timings),
        "output_tokens": output / len(timings),
        "seconds": seconds,
    }


def run_scoring(server: Server, url: str, model: str) -> dict[str, float]:
    """Have prompts scored, those that share nothing first; the first of those that share fills the cache."""

    def post(prompt: str) -> int:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
        answer = exchange(url, json.dumps(body).encode(), "/v1/completions")
        raw = b"".join(data for _, data in answer.reads)
        if not re.match(rb"HTTP/1\.1 200 ", raw):
            raise RuntimeError(f"refused: {raw[:1000].decode(errors='replace')}")
        return json.loads(raw[raw.index(b"{"):])["usage"]["prompt_tokens"]

    def requests_per_s(name: str, count: int) -> tuple[float, float]:
        prefixes = [sentence("shared" if name == "shared" else f"{name} {i}", SCORING.shared_tokens) for i in range(count)]
        prompts = [f"{prefix} {sentence(f'{name} own {i}', SCORING.own_tokens)}" for i, prefix in enumerate(prefixes)]
        started = time.perf_counter()
        with ThreadPoolExecutor(SCORING.clients) as clients:
            lengths = list(clients.map(post, prompts))
        return count / (time.perf_counter() - started), sum(lengths) / count

    requests_per_s("warm-up", 1)
    apart, _ = requests_per_s("apart", SCORING.apart)
    shared, length = requests_per_s("shared", SCORING.requests)
    return {"requests_per_s": shared, "apart_per_s": apart, "ratio": shared / apart, "prompt_tokens": length}


def measure(server: Server, model: Path, loads: list[str]) -> dict:
    """Run one server through everything; one that runs already is only put under the loads."""
    if server.command is None:
        return {"loads": under_load(server, server.url, served_model(server, model), loads)}
    body = request_body(server, str(model), prompts("single", LOADS["single"], 1, "start")[0], 4)
    process_figures = {}
    for start in ("cold", "warm"):
        started = time.perf_counter()
        with running(server, model) as (process, url):
            process_figures[f"first_token_{start}_s"] = first_token(process, url, body, started)
            say(f"{server.name}: first token {start} after {process_figures[f'first_token_{start}_s']:.1f} s")
            if start == "warm":
                load_figures = under_load(server, url, str(model), loads)
                process_figures |= memory(process) | {"idle_cpu_percent": idle_cpu(process)}
    return {"process": process_figures, "loads": load_figures}


def under_load(server: Server, url: str, model: str, loads: list[str]) -> dict[str, dict[str, float]]:
    figures = {}
    for name in loads:
        if name == "scoring":
            if not server.is_transformers:
                figures[name] = run_scoring(server, url, model)
                say("{}: scoring: {requests_per_s:.1f} requests/s, {apart_per_s:.1f} that share nothing".format(
                    server.name, **figures[name]))  # fmt: skip
            continue
        figures[name] = run_load(server, url, model, name)
        say("{}: {}: {tokens_per_s:.1f} tokens/s in {seconds:.0f} s (the load generator took "
            "{load_generator_cpu_percent:.0f} % of a core)".format(server.name, name, **figures[name]))  # fmt: skip
    return figures


# ── Report ────────────────────────────────────────────────────────────────────────────────

# Figure, heading, digits, and whether more is better.
LOAD_COLUMNS = (
    ("tokens_per_s", "output tokens/s", 1, True),
    ("ttft_p50_ms", "first token p50, ms", 0, False),
    ("ttft_p95_ms", "p95", 0, False),
    ("itl_p50_ms", "between tokens p50, ms", 1, False),
    ("itl_p95_ms", "p95", 1, False),
)
SCORING_COLUMNS = (
    ("requests_per_s", "shared examples, requests/s", 1, True),
    ("apart_per_s", "nothing shared", 1, True),
    ("ratio", "ratio", 1, True),
)
PROCESS_COLUMNS = (
    ("first_token_cold_s", "first token cold, s", 1, False),
    ("first_token_warm_s", "warm, s", 1, False),
    ("resident_mib", "memory after the loads, MiB", 0, False),
    ("peak_mib", "peak, MiB", 0, False),
    ("idle_cpu_percent", "idle CPU, % of a core", 1, False),
)


def table(columns: Sequence[tuple[str, str, int, bool]], rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, ended by how many times better the first row is than the best of the others in each column."""
    lines = [["", *(heading for _, heading, _, _ in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(f"{row[key]:.{digits}f}" for key, _, digits, _ in columns)] for name, row in rows.items()]
    first, *others = rows.values()
    if others:
        lines.append([f"**{next(iter(rows))}, against the best other**"])
        for key, _, _, more_is_better in columns:
            values = [row[key] for row in others]
            better, worse = (first[key], max(values)) if more_is_better else (min(values), first[key])
            lines[-1].append(f"**{better / worse:.2f}×**" if worse else "")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(results: dict[str, dict], loads: list[str], model: Path) -> str:
    parts = [f"{model.name}, {os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, {time.strftime('%Y-%m-%d')}"]
    if scored := {server: result["loads"]["scoring"] for server, result in results.items() if "scoring" in result["loads"]}:
        length = next(iter(scored.values()))["prompt_tokens"]
        shape = f"{SCORING.clients} clients, prompts of {length:.0f} tokens (mean), of which {SCORING.shared_tokens} are shared"
        parts += [f"**Log-likelihoods** ({shape})", table(SCORING_COLUMNS, scored)]
    for name in [name for name in loads if name in LOADS]:
        load, rows = LOADS[name], {server: result["loads"][name] for server, result in results.items()}
        row = next(iter(rows.values()))
        shape = f"{load.requests} requests, {row['prompt_tokens']:.0f} tokens in (mean), {load.output_tokens} out"
        parts += [f"**{load.title}** ({shape})", table(LOAD_COLUMNS, rows)]
    if started := {server: result["process"] for server, result in results.items() if "process" in result}:
        parts += ["**The process**", table(PROCESS_COLUMNS, started)]
    return "\n\n".join(parts)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a checkpoint folder (default: %(default)s)")
    parser.add_argument("--servers", default="serve.py,transformers,transformers-cb",
                        help=f"comma-separated, in order, of {', '.join(SERVERS)} (default: %(default)s)")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="also drive a server that runs already")
    parser.add_argument("--loads", default=",".join([*LOADS, "scoring"]), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated benchmark ends its server too
    options = arguments()
    servers = [SERVERS[name] for name in options.servers.split(",") if name]
    servers += [Server(name, url=url.rstrip("/")) for name, _, url in (each.partition("=") for each in options.url)]
    loads = options.loads.split(",")
    model = options.model.resolve()
    if any(server.is_transformers and server.command for server in servers):
        install_transformers()
    results = {server.name: measure(server, model, loads) for server in servers}
    if options.json:
        shapes = {name: asdict(SCORING if name == "scoring" else LOADS[name]) for name in loads}
        options.json.write_text(json.dumps({"model": str(model), "loads": shapes, "servers": results}, indent=1))
    print(report(results, loads, model))


if __name__ == "__main__":
    main()
