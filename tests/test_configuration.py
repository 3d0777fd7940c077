"""The command line: every flag in both spellings, what is refused, and one line with exit code 2 for what is wrong."""
import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import serve
from conftest import ROOT

FIELDS = {f.name: f for f in dataclasses.fields(serve.Config)}
# For each setting that takes a value: what is written, and what it means.
VALUES = {
    "force_model": ("org/model", "org/model"), "served_model_name": ("my_model-1", "my_model-1"),
    "dtype": ("float32", "float32"),
    "gguf_weights": ("dequantised", "dequantised"),
    "device": ("cpu", "cpu"), "device_map": ("balanced", "balanced"), "quantization": ("bnb-8bit", "bnb-8bit"),
    "bnb_4bit_quant_type": ("fp4", "fp4"), "llm_int8_threshold": ("6", 6.0),
    "model_timeout": ("7.5", 7.5), "max_model_len": ("100", 100),
    "chat_template": (__file__, __file__), "chat_template_kwargs": ('{"a_b": [1]}', {"a_b": [1]}), "reasoning": ("off", "off"),
    "attn_implementation": ("eager_paged", "eager_paged"), "block_size": ("16", 16), "kv_cache_memory": ("2GiB", 2.0 * 2**30),
    "max_batch_tokens": ("99", 99), "max_running": ("3", 3), "max_queue": ("4", 4), "threads": ("2", 2),
    "default_seed": ("-5", -5), "host": ("0.0.0.0", "0.0.0.0"), "port": ("0", 0),
    "allowed_media_domain": ("Pictures.example", ("pictures.example",)),
    "cors_origin": ("https://a_b.example", ("https://a_b.example",)),
    "grace_period": ("0.5", 0.5), "log_level": ("debug", "debug"), "log_format": ("json", "json"),
    "api_key": ("k-1", ("k-1",)), "allowed_host": ("Proxy.Example", ("proxy.example",)), "max_body_size": ("1MiB", 1024.0**2),
    "request_timeout": ("2.5", 2.5),
    "mcp_timeout": ("2.5", 2.5), "mcp_max_result": ("100", 100),
    "response_store": ("a_b.db", "a_b.db"),
}
ALIASES = {
    "--torch-dtype": "dtype", "--cb-block-size": "block_size", "--cb-max-memory-percent": "kv_cache_memory",
    "--cb-max-batch-tokens": "max_batch_tokens",
}
SWITCHES = ["trust_remote_code", "continuous_batching", "enable_cors", "allow_remote_mcp"]


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Return the one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        serve.parse_command_line(list(argv))
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.endswith("\n") and output.err.count("\n") == 1, output.err
    return output.err


def test_every_setting_is_in_a_table() -> None:
    new = FIELDS.keys() - VALUES.keys() - set(SWITCHES) - {"models"}
    # these are in test_adapters.py, test_mcp_tools.py and test_main.py
    new -= {"adapter", "mcp_config", "mcp_auto", "api_key_file", "certfile", "keyfile"}
    assert not new, f"add a value for each of {new}"


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("spell", [lambda name: "--" + name, lambda name: "--" + name.replace("_", "-")],
                         ids=["underscores", "dashes"])
def test_values(name: str, spell) -> None:
    written, meant = VALUES[name]
    assert getattr(serve.parse_command_line([spell(name), written]), name) == meant
    assert getattr(serve.parse_command_line([f"{spell(name)}={written}"]), name) == meant


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("underscores", [False, True])
def test_aliases(alias: str, underscores: bool) -> None:
    written, meant = VALUES[ALIASES[alias]]
    flag = "--" + alias[2:].replace("-", "_") if underscores else alias
    assert getattr(serve.parse_command_line([flag, written]), ALIASES[alias]) == meant


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name: str) -> None:
    for dashed in (name, name.replace("_", "-")):
        assert getattr(serve.parse_command_line(["--" + dashed]), name) is True
    assert getattr(serve.parse_command_line(["--no-" + name]), name) is False
    assert getattr(serve.parse_command_line(["--no_" + name]), name) is False


def test_defaults() -> None:
    config = serve.parse_command_line([])
    assert config == serve.Config(device=config.device) and config.device in ("cpu", "cuda:0", "mps:0")
    assert (config.host, config.port, config.block_size, config.models) == ("127.0.0.1", 8000, 32, ())


def test_models_and_repeated_flags() -> None:
    config = serve.parse_command_line(["org/some_model", "./a_folder", "--cors-origin", "x", "--cors_origin", "y"])
    assert config.models == ("org/some_model", "./a_folder")
    assert config.cors_origin == ("x", "y")


@pytest.mark.parametrize("text, meant", [("500", 500), ("4GiB", 4 * 2**30), ("4 GB", 4 * 2**30), ("1.5m", 1.5 * 2**20),
                                         ("2K", 2048), ("1TiB", 2**40), ("0.5", 0.5), ("10B", 10)])
def test_memory(text: str, meant: float) -> None:
    assert serve.memory(text) == meant


@pytest.mark.parametrize("name", [name for name in serve.ATTENTION])
def test_attention_names(name: str) -> None:
    config = serve.parse_command_line(["--attn-implementation", name])
    assert config.attention == serve.ATTENTION[name]


@pytest.mark.parametrize("flag", serve.REFUSED_FLAGS)
@pytest.mark.parametrize("shape", ["{}", "{}=x", "{} x"])
def test_refused_flags_are_named(flag: str, shape: str, capsys: pytest.CaptureFixture) -> None:
    for spelling in (flag, "--" + flag[2:].replace("-", "_")):
        assert refusal(capsys, *shape.format(spelling).split()).startswith(f"serve.py: {flag} is not supported: ")


@pytest.mark.parametrize("flag", sorted(serve.ACCEPTED_FLAGS))
def test_flags_that_ask_for_what_is_so_anyway(flag: str) -> None:
    assert serve.parse_command_line([flag, "--port", "1"]) == serve.parse_command_line(["--port", "1"])


@pytest.mark.parametrize("argv", [
    ["--block-size", "0"], ["--block-size", "many"], ["--port", "-1"], ["--max-running", "0"],
    ["--max-queue", "0"], ["--max-batch-tokens", "0"], ["--max-model-len", "0"], ["--threads", "0"], ["--threads", "1.5"],
    ["--kv-cache-memory", "0"], ["--kv-cache-memory", "-1"], ["--kv-cache-memory", "4 bananas"], ["--kv-cache-memory", "1.2.3"],
    ["--model-timeout", "soon"], ["--model-timeout", "nan"], ["--grace-period", "-1"], ["--grace-period", "nan"],
    ["--dtype", "int3"], ["--log-level", "loud"], ["--reasoning", "maybe"], ["--attn-implementation", "magic"],
    ["--chat-template", "/no/such/file"], ["--chat-template-kwargs", "[1]"], ["--chat-template-kwargs", "{"],
    ["--default-seed", "x"], ["--device", "abacus"], ["--device", "cuda:99"], ["--device", ""],
    ["--no-such-flag"], ["--block"], ["--port"], ["-x"], ["--port="],
], ids=" ".join)
def test_bad_values(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert argv[0].partition("=")[0] in refusal(capsys, *argv)


@pytest.mark.parametrize("argv", [["--port", "99999"], ["--host", "203.0.113.1"], ["--host", "no such host"]], ids=" ".join)
def test_what_cannot_be_listened_on(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    try:
        code = serve.main(argv)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("serve.py: ") and argv[1] in lines[0]


def test_the_process_says_it_in_one_line() -> None:
    done = subprocess.run([sys.executable, ROOT / "serve.py", "--block_size", "x"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "serve.py: argument --block-size/--cb-block-size: invalid int value: 'x'\n"


def test_help_names_every_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.parse_command_line(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in FIELDS.keys() - {"models"}:
        assert f"--{name.replace('_', '-')}" in text
    for alias in ALIASES:
        assert alias in text
    assert "MODEL" in text and "SERVE_CACHE" in text


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        serve.Config().port = 1


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path))
    assert serve.cache_folder() == tmp_path
    monkeypatch.delenv("SERVE_CACHE")
    assert serve.cache_folder() == Path.home() / ".cache" / "serve.py"


def test_errors_carry_what_the_envelope_shows() -> None:
    error = serve.APIError(404, "No such thing.", "not_found", "thing")
    assert (error.status, error.message, error.code, error.param, str(error)) == (
        404, "No such thing.", "not_found", "thing", "No such thing.")
    assert str(copy.copy(error)) == "No such thing."
