"""Speech to text: real speech through real weights, every container and format, beside a chat; what is refused and why."""
from __future__ import annotations

import contextlib
import io
import json
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx2 as httpx
import numpy
import openai
import pytest
import serve
import torch
import transformers
import weights
from conftest import ServerProcess, ask, start_server
from openai.types.audio import TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent, TranscriptionVerbose

TWO_CITIES = """
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of
Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing
before us, we were all going direct to Heaven, we were all going direct the other way. In short, the period
was so far like the present period, that some of its noisiest authorities insisted on its being received, for
good or for evil, in the superlative degree of comparison only.
"""


@pytest.fixture(scope="module")
def heard(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that chats with a small model of random weights and hears with two of real ones."""
    folder = tmp_path_factory.mktemp("hearing")
    places = {"chat": tiny, "base": weights.whisper("whisper-base"), "tiny.en": weights.whisper("whisper-tiny.en")}
    for name, place in places.items():
        (folder / name).symlink_to(place)
    with start_server(folder, "chat", "base", "tiny.en", "--kv-cache-memory", "64M") as server:
        yield server


@pytest.fixture(scope="module")
def clips() -> Path:
    return weights.clips()


def post(server: ServerProcess, file: Path | bytes, model: str = "base", to: str = "transcriptions",
         **fields: object) -> httpx.Response:
    data = file if isinstance(file, bytes) else file.read_bytes()
    return httpx.post(f"{server.url}/v1/audio/{to}", files={"file": ("sound", data)}, data={"model": model, **fields},
                      timeout=120)


def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def sound(rate: int = 16000, seconds: float = 1.0) -> numpy.ndarray:
    """A chirp, float32: containers must give it back."""
    t = numpy.arange(int(rate * seconds)) / rate
    return (0.5 * numpy.sin(2 * numpy.pi * (200 + 300 * t) * t)).astype("float32")


def written(samples: numpy.ndarray, container: str, codec: str, rate: int = 16000, layout: str = "mono") -> bytes:
    """Return samples in a file of a kind."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        planes = numpy.repeat(samples[None], 2 if layout == "stereo" else 1, axis=0)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return out.getvalue()


CONTAINERS = [("wav", "pcm_s16le", 16000), ("wav", "pcm_f32le", 44100), ("flac", "flac", 48000), ("mp3", "libmp3lame", 44100),
              ("ogg", "libopus", 48000), ("ipod", "aac", 44100), ("mp4", "aac", 44100),
              ("webm", "libopus", 48000)]


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("container, codec, rate", CONTAINERS)
def test_every_container_gives_the_sound_back(container: str, codec: str, rate: int, layout: str) -> None:
    got = serve.read_audio(written(sound(rate), container, codec, rate, layout), 16000)
    want = sound(16000)
    assert got.dtype == numpy.float32 and abs(len(got) - len(want)) < 0.15 * 16000
    shift = numpy.correlate(got, want, "full").argmax() - len(want) + 1  # codecs put silence before the sound
    cut = got[max(0, shift):][:12000]
    start = max(0, -shift)
    assert numpy.corrcoef(cut, want[start:start + len(cut)])[0, 1] > 0.98


def test_the_sound_of_a_film() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        video, audio = file.add_stream("mpeg4", rate=5), file.add_stream("aac", rate=16000, layout="mono")
        video.width = video.height = 64
        for _ in range(5):
            file.mux(video.encode(av.VideoFrame.from_ndarray(numpy.zeros((64, 64, 3), "uint8"), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(sound()[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        resampler = av.AudioResampler(audio.format, "mono", 16000, frame_size=audio.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(audio.encode(part))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))
    assert 0.9 < len(serve.read_audio(out.getvalue(), 16000)) / 16000 < 1.2


def bad_files(tmp_path: Path) -> dict[str, bytes]:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(written(sound(), "wav", "pcm_s16le"))
    good = secret.read_bytes()
    bomb = bytearray(good)
    bomb[24:28] = (1).to_bytes(4, "little")  # one sample a second: four hours of a file of 32 kB
    with av.open(out := io.BytesIO(), "w", format="mp4") as film:
        video = film.add_stream("mpeg4", rate=5)
        video.width = video.height = 64
        film.mux(video.encode(av.VideoFrame.from_ndarray(numpy.zeros((64, 64, 3), "uint8"), format="rgb24")))
        film.mux(video.encode(None))
    return {
        "empty": b"", "text": b"hello" * 100, "noise": bytes(range(256)) * 64, "cut": good[:30], "no samples": good[:44],
        "bomb": bytes(bomb), "silent film": out.getvalue(), "a list": f"ffconcat version 1.0\nfile {secret}\n".encode(),
        "a playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
        "a description": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n{secret}".encode(),
    }


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    for name, file in bad_files(tmp_path).items():
        with pytest.raises(serve.APIError) as refusal:
            serve.read_audio(file, 16000)
        assert (refusal.value.status, refusal.value.param) == (400, "file"), name
        assert str(tmp_path) not in str(refusal.value)


def test_too_much_sound_and_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(sound(seconds=3), "flac", "flac")
    for limit, value in (("MAX_AUDIO_SECONDS", 2), ("DECODE_SECONDS", -1.0)):
        with monkeypatch.context() as patch, pytest.raises(serve.APIError) as refusal:
            patch.setattr(serve, limit, value)
            serve.read_audio(file, 16000)
        assert refusal.value.code == "audio_too_long"


def test_sentences_are_heard_as_they_are_read_several_at_once(heard: ServerProcess) -> None:
    sentences = weights.librivox()
    with ThreadPoolExecutor(len(sentences)) as pool:
        answers = list(pool.map(lambda path: post(heard, path), sentences))
    texts = [answer.json()["text"] for answer in answers]
    assert texts[1] == "He was not an ill-disposed young man."
    assert texts[4] == "He might even have been made amiable himself."
    errors = sum(weights.word_errors(said, text) for said, text in zip(sentences.values(), texts))
    assert errors <= 2, texts  # of 65 words; the reference has one that is not read
    assert answers[1].json()["usage"] == {"type": "duration", "seconds": 3}


def test_an_english_model(heard: ServerProcess) -> None:
    (raw,) = {path.parent / "goforward.raw" for path in weights.librivox()}
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(raw.read_bytes())
    answer = post(heard, file.getvalue(), "tiny.en", language="en").json()
    assert answer["text"].rstrip(".") in ("Go forward 10 meters", "Go forward ten meters")
    for fields, param in (({"language": "de"}, "language"), ({"to": "translations"}, "model")):
        response = post(heard, file.getvalue(), "tiny.en", **fields)
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_longer_than_a_window_with_times(heard: ServerProcess, clips: Path) -> None:
    with (clips / "two_cities.wav").open("rb") as file:
        answer = client(heard).audio.transcriptions.create(model="base", file=file, response_format="verbose_json",
                                                           timestamp_granularities=["segment", "word"])
    TranscriptionVerbose.model_validate(answer.model_dump(), strict=True)
    assert weights.word_errors(TWO_CITIES, answer.text) <= 6, answer.text  # of 118
    assert answer.language == "english" and 44 < answer.duration < 45
    assert answer.text == "".join(segment.text for segment in answer.segments).strip()
    assert [word.word for word in answer.words] == answer.text.split()
    for parts in (answer.segments, answer.words):
        edges = [edge for part in parts for edge in (part.start, part.end)]
        assert edges == sorted(edges) and edges[0] < 1.5 and 40 < edges[-1] <= answer.duration
    weighed = [(segment.avg_logprob, segment.no_speech_prob) for segment in answer.segments]
    assert all(-1 < logprob < 0 < silence < 1 for logprob, silence in weighed), weighed
    assert abs(weighed[0][1] - 0.667) < 0.1  # what the plain network gives <|nocaptions|> right after its start
    assert {segment.seek for segment in answer.segments} > {0}  # there was more than one window


def test_a_stream_is_told_segment_by_segment(heard: ServerProcess, clips: Path) -> None:
    with (clips / "two_cities.wav").open("rb") as file:
        *deltas, done = client(heard).audio.transcriptions.create(model="base", file=file, stream=True, language="en")
    for event, kind in [(delta, TranscriptionTextDeltaEvent) for delta in deltas] + [(done, TranscriptionTextDoneEvent)]:
        kind.model_validate(event.model_dump(exclude_unset=True), strict=True)
    assert len(deltas) > 5 and "".join(delta.delta for delta in deltas) == done.text
    assert weights.word_errors(TWO_CITIES, done.text) <= 6


def test_formats(heard: ServerProcess, clips: Path) -> None:
    file = clips / "beckett.wav"
    text = post(heard, file, response_format="text", language="en")
    assert text.headers["content-type"].startswith("text/plain") and text.text.endswith("\n")
    assert weights.word_errors("Ever tried, ever failed. No matter, try again. Fail again. Fail better.", text.text) <= 1
    srt = post(heard, file, response_format="srt", language="english").text
    first, *_ = srt.strip().split("\n\n")
    number, times, _ = first.split("\n")
    assert number == "1" and times.startswith("00:00:00,") and " --> 00:00:0" in times
    vtt = post(heard, file, response_format="vtt", language="en").text
    assert vtt.startswith("WEBVTT\n\n00:00:0") and "," not in vtt.split("\n")[2].split(" --> ")[0]
    assert [line for line in vtt.split("\n") if "-->" in line] == [
        line.replace(",", ".") for line in srt.split("\n") if "-->" in line]
    verbose = post(heard, file, response_format="verbose_json", language="en").json()
    assert "words" not in verbose and len(verbose["segments"]) == srt.count("-->")
    assert post(heard, file, to="translations", prompt="A play.", temperature=0.2).json()["text"]


REFUSED = [
    ({"language": "xx"}, "language"), ({"response_format": "diarized_json"}, "response_format"),
    ({"response_format": "srt", "stream": "true"}, "response_format"), ({"temperature": "1.5"}, "temperature"),
    ({"temperature": "nan"}, "temperature"), ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
    ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
    ({"include[]": "logprobs"}, "include"), ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy"),
    ({"known_speaker_names[]": "Ann"}, "known_speaker_names"), ({"stream": "perhaps"}, "stream"),
    ({"prompt": "<|startoftranscript|>"}, "prompt"), ({"model": "chat"}, "model"), ({"model": "nobody/nothing"}, "model"),
]


@pytest.mark.parametrize("fields, param", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(heard: ServerProcess, fields: dict, param: str) -> None:
    response = post(heard, written(sound(), "wav", "pcm_s16le"), **fields)
    assert response.status_code == (404 if "nobody" in str(fields) else 400)
    error = response.json()["error"]
    assert error["param"].startswith(param) and set(error) == {"message", "type", "param", "code"}


def test_bad_forms(heard: ServerProcess) -> None:
    url = heard.url + "/v1/audio/transcriptions"
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    for status, arguments in [
        (415, {"json": {"model": "base"}}), (400, {"content": b"nonsense", "headers": multipart}),
        (400, {"content": b"", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, {"content": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--x--\r\n',
               "headers": multipart}),
        (400, {"files": {"file": ("a.wav", b"nothing")}, "data": {"model": "base"}}),
        (413, {"files": {"file": ("a.wav", b"\0" * (65 << 20))}, "data": {"model": "base"}}),
    ]:
        response = httpx.post(url, **arguments)
        assert response.status_code == status and response.json()["error"]["message"], (status, response.text)
    assert ask(heard, model="base").json()["error"]["param"] == "model"
    assert "Traceback" not in heard.log.read_text()


def test_a_chat_streams_meanwhile_and_the_models_are_listed(heard: ServerProcess, clips: Path) -> None:
    done = threading.Event()

    def hear() -> None:
        assert post(heard, clips / "two_cities.wav").status_code == 200
        done.set()

    thread = threading.Thread(target=hear)
    thread.start()
    time.sleep(0.7)
    assert ask(heard, model="chat", max_tokens=60, ignore_eos=True).json()["usage"]["completion_tokens"] == 60
    assert not done.is_set()
    thread.join()
    listed = httpx.get(heard.url + "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["chat", "base", "tiny.en"] and all(model["created"] for model in listed)


def test_who_leaves_is_not_heard_to_the_end(heard: ServerProcess, clips: Path) -> None:
    started = time.monotonic()
    assert post(heard, clips / "two_cities.wav", language="en").status_code == 200
    whole = time.monotonic() - started
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{heard.url}/v1/audio/transcriptions", files={"file": (clips / "two_cities.wav").open("rb")},
                   data={"model": "base", "language": "en"}, timeout=0.35 * whole)
    started = time.monotonic()
    assert post(heard, written(sound(), "wav", "pcm_s16le"), language="en").status_code == 200
    assert time.monotonic() - started < 0.8 * whole
    assert json.loads(httpx.get(heard.url + "/health").text) == {"status": "ok"}


def test_a_model_without_times_is_heard_by_transformers_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(["<pad>", "<unk>", "|", *"abcdefg"])}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path)
    config = transformers.Wav2Vec2Config(
        vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 3,
        conv_stride=[10, 8, 4], conv_kernel=[10, 8, 4], num_feat_extract_layers=3, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, pad_token_id=0, initializer_range=0.5)
    network = transformers.Wav2Vec2ForCTC(config).eval()
    network.save_pretrained(tmp_path)
    model = serve.load_model("ctc", serve.Checkpoint(str(tmp_path)), serve.Config(device="cpu", dtype="float32"), False, print)
    assert model.kind == "speech" and not serve.is_timed(model)
    samples = sound(seconds=2) + numpy.random.default_rng(0).normal(0, 0.1, 32000).astype("float32")
    job = serve.Job(("",), samples, 1, token=None)
    with torch.inference_mode():
        inputs = extractor(samples, sampling_rate=16000, return_tensors="pt")
        (want,) = tokenizer.batch_decode(network(inputs.input_values).logits.argmax(-1))
        (got,) = serve.transcribe(model, [job], serve.Hearing("transcribe", None, (), 0.0, False), 1)
    assert got["text"] == want.strip() and len(want) > 5 and got["usage"]["seconds"] == 2
    for fields, param in (({"language": "en"}, "language"), ({"prompt": "x"}, "prompt"), ({"temperature": 0.5}, "temperature"),
                          ({"response_format": "srt"}, "response_format")):
        with pytest.raises(serve.APIError) as refusal:
            serve.hearing(serve.AudioRequest(**fields), "transcribe", model)
        assert refusal.value.param == param
