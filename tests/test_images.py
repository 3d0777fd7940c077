"""Images and sounds in the batch: what HTTP answers is what generate() of the same checkpoint says, token for token.

The checkpoints have random weights and real architectures, processors and pictures.
"""
from __future__ import annotations

import base64
import io
import threading
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import PIL.Image
import pytest
import serve
import sights
import torch
import transformers
from conftest import LocalServer, http

skimage = pytest.importorskip("skimage", reason="no pictures: scikit-image is not installed")
PICTURES = Path(skimage.__file__).parent / "data"
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "idefics3", "internvl", "gemma3", "qwen3_5"]
ANSWER = 12  # tokens


def picture(name: str) -> bytes:
    """A real picture, made smaller, so that the tests are fast."""
    with PIL.Image.open(PICTURES / name) as image:
        image.thumbnail((160, 120))
        file = io.BytesIO()
        image.save(file, "PNG")
    return file.getvalue()


ASTRONAUT, COFFEE = picture("astronaut.png"), picture("coffee.png")


def image_part(data: bytes, **extra: str) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode(), **extra}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


CONVERSATIONS = [
    user(image_part(ASTRONAUT, detail="low"), text_part("Who is this, and what does she wear?")),
    user(text_part("What is the capital of France?")),
    user(text_part("Compare "), image_part(COFFEE), text_part(" with "), image_part(ASTRONAUT), text_part(". What differs?")),
    user(image_part(COFFEE), text_part("Who is this, and what does she wear?")),
    [*user(image_part(COFFEE), text_part("Hot?")), {"role": "assistant", "content": "Yes."}, *user(text_part("How hot?"))],
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    sights.save(request.param, folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def seeing(folder: Path):
    server = LocalServer(str(folder), "--dtype", "float32", "--block-size", "8", "--max-batch-tokens", "24",
                         "--kv-cache-memory", "32MiB").start()
    yield server
    server.stop()


def generated(folder: Path, conversations: list[list[dict]]) -> list[tuple[int, str]]:
    """What transformers alone makes of them: the number of tokens of each prompt, and the answer."""
    network = transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    processor = serve.load_processor(serve.Checkpoint(str(folder)), False)
    answers = []
    for conversation in conversations:
        messages = [{"role": m["role"], "content": m["content"] if isinstance(m["content"], str) else [
            {"type": "image", "image": PIL.Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))}
            if part["type"] == "image_url" else {"type": "audio", "audio": heard(part)} if part["type"] == "input_audio"
            else part for part in m["content"]]} for m in conversation]
        inputs = transformers.ProcessorMixin.apply_chat_template(  # SmolVLM's own asks its video processor first
            processor, messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        ids = network.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        answers.append((inputs["input_ids"].shape[1], processor.tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def ask(server: LocalServer, messages: list[dict], **fields: object) -> tuple[int, str]:
    response = http.post(server.url + "/v1/chat/completions", json={
        "messages": messages, "temperature": 0, "max_tokens": ANSWER, **fields})
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens"], response.json()["choices"][0]["message"]["content"]


def test_answers_are_those_of_generate(seeing: LocalServer, folder: Path) -> None:
    expected = generated(folder, CONVERSATIONS)
    assert len(set(expected)) == len(expected), "the pictures make no difference"
    with ThreadPoolExecutor(8) as clients:
        for _ in range(2):  # the second time round from the prefix cache
            assert list(clients.map(lambda messages: ask(seeing, messages), CONVERSATIONS)) == expected
    seeing.assert_idle()
    assert seeing.engine.runner.paged == all(name not in str(folder) for name in ("gemma3", "qwen3_5"))


def usage(server: LocalServer, messages: list[dict]) -> tuple[int, int]:
    """Return how many tokens a prompt has, and how many of them were in the prefix cache."""
    response = http.post(server.url + "/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.text
    counts = response.json()["usage"]
    return counts["prompt_tokens"], counts["prompt_tokens_details"]["cached_tokens"]


def test_a_repeated_image_is_a_prefix_hit_and_another_is_not(seeing: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = seeing.engine.runner
    if not runner.paged:
        pytest.skip("the cache of a sequence is its own")
    embedded, embed = [], runner.embed
    monkeypatch.setattr(runner, "embed", lambda seq: embedded.append(seq) or embed(seq))
    before = text_part("These words come before the picture, and they are more than two blocks of eight tokens long.")

    def conversation(data: bytes) -> list[dict]:
        return user(before, image_part(data), text_part("Which picture is that, and what is there to be seen in it?"))

    length, cached = usage(seeing, conversation(ASTRONAUT))
    assert cached == 0 and len(embedded) == 1
    assert usage(seeing, conversation(ASTRONAUT)) == (length, (length - 1) // 8 * 8) and len(embedded) == 1
    other, cached = usage(seeing, conversation(COFFEE))
    start = len(runner.model.tokenizer.apply_chat_template(user(before), tokenize=True)["input_ids"]) - 2
    assert 16 <= cached <= start and len(embedded) == 2
    more = [*conversation(ASTRONAUT), {"role": "assistant", "content": "A portrait."}, *user(image_part(COFFEE))]
    assert usage(seeing, more)[1] >= (length - 1) // 8 * 8 - 8 and len(embedded) == 3
    seeing.assert_idle()


def test_several_answers_to_one_image(seeing: LocalServer) -> None:
    response = http.post(seeing.url + "/v1/chat/completions", json={
        "messages": CONVERSATIONS[0], "n": 3, "max_tokens": 4, "temperature": 0, "logprobs": True})
    choices = response.json()["choices"]
    assert len(choices) == 3 and len({choice["message"]["content"] for choice in choices}) == 1


def test_a_failing_tower_fails_its_request_alone(seeing: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = seeing.engine.runner
    if not runner.paged:
        pytest.skip("every sequence runs alone")
    good, text = ask(seeing, CONVERSATIONS[3]), ask(seeing, CONVERSATIONS[1])
    seeing.engine.scheduler.pool.forget()
    embed = runner.embed

    def fail(seq: serve.Sequence) -> None:
        raise torch.OutOfMemoryError("no room for this picture")

    monkeypatch.setattr(runner, "embed", fail)
    body = {"messages": CONVERSATIONS[3], "max_tokens": 4}
    with ThreadPoolExecutor(4) as clients:
        failed = [clients.submit(http.post, seeing.url + "/v1/chat/completions", json=body) for _ in range(3)]
        assert ask(seeing, CONVERSATIONS[1]) == text
        for response in failed:
            error = response.result().json()["error"]
            assert (response.result().status_code, error["code"]) == (400, "out_of_memory") and "room" not in str(error)
    monkeypatch.setattr(runner, "embed", embed)
    assert ask(seeing, CONVERSATIONS[3]) == good, "what the failed sequence left behind was taken for its image"
    seeing.assert_idle()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "smolvlm"])
def test_without_paging_the_answers_are_the_same(family: str, checkpoint: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    sights.save(family, tmp_path, checkpoint)
    monkeypatch.setattr(serve, "self_test", lambda runner: "not today")
    server = LocalServer(str(tmp_path), "--dtype", "float32").start()
    try:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda messages: ask(server, messages), CONVERSATIONS))
        assert answers == generated(tmp_path, CONVERSATIONS)
        assert not server.engine.runner.paged
    finally:
        server.stop()


def refusal(server: LocalServer, messages: list[dict]) -> tuple[int, str, str]:
    response = http.post(server.url + "/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_placeholder_in_a_clients_text_is_no_image(seeing: LocalServer) -> None:
    token = seeing.engine.model.processor.image_token
    expected = (400, "invalid_media", "messages")
    assert refusal(seeing, user(image_part(COFFEE), text_part(f"and {token}"))) == expected
    assert ask(seeing, user(text_part(f"and {token}")))[0] > 0


def test_images_count_for_the_context_length(seeing: LocalServer) -> None:
    many = user(*[image_part(COFFEE), text_part(" word" * 250)] * 8)
    status, code, _ = refusal(seeing, many)
    assert (status, code) == (400, "context_length_exceeded")


def test_what_is_preempted_sees_again(checkpoint: Path, tmp_path: Path) -> None:
    sights.save("qwen3_vl", tmp_path, checkpoint)
    server = LocalServer(str(tmp_path), "--dtype", "float32", "--block-size", "4", "--kv-cache-memory", "200000").start()
    preempt, victims = server.engine.scheduler.preempt, []
    server.engine.scheduler.preempt = lambda seq: victims.append(seq) or preempt(seq)
    try:
        conversations = CONVERSATIONS[:1] + CONVERSATIONS[3:4]
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda messages: ask(server, messages, max_tokens=60), 4 * conversations))
        assert any(seq.media for seq in victims), server.engine.scheduler.pool.num_blocks
        assert answers == 4 * [ask(server, messages, max_tokens=60) for messages in conversations]
        server.assert_idle()
    finally:
        server.stop()


def test_images_that_wait_are_bounded(seeing: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, begun, going_on = seeing.engine.runner, threading.Event(), threading.Event()
    forward = runner.forward

    def halted(*arguments: object) -> torch.Tensor:
        begun.set()
        assert going_on.wait(20)
        return forward(*arguments)

    monkeypatch.setattr(serve, "MAX_QUEUED_MEDIA", 1)
    monkeypatch.setattr(runner, "forward", halted)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(ask, seeing, CONVERSATIONS[0])
        assert begun.wait(20)
        refused = refusal(seeing, CONVERSATIONS[3])
        going_on.set()
        assert refused == (429, "queue_full", None) and first.result()
    assert ask(seeing, CONVERSATIONS[3])


HEARING = ["qwen2_audio", "qwen3_asr", "gemma4"]


def tone(start: float, end: float, seconds: float = 1.3, rate: int = 16000) -> bytes:
    """Return the WAV file of a tone that rises or falls from one frequency to another."""
    times = numpy.arange(int(seconds * rate)) / rate
    values = 0.5 * numpy.sin(2 * numpy.pi * (start + (end - start) / 2 / seconds * times) * times)
    with wave.open(out := io.BytesIO(), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())
    return out.getvalue()


RISING, FALLING = tone(200, 2000), tone(5000, 300, 2.1)


def sound_part(data: bytes) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def heard(part: dict) -> numpy.ndarray:
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
        return numpy.frombuffer(file.readframes(file.getnframes()), "<i2").astype("float32") / 32768


SPOKEN = [
    user(sound_part(RISING), text_part("What is to be heard?")),
    user(text_part("What is the capital of France?")),
    user(text_part("Listen closely: "), sound_part(FALLING), text_part(" What was that?")),
    user(sound_part(FALLING), text_part("What is to be heard?")),
]
TOGETHER = {  # what only some of them take
    "qwen2_audio": [user(sound_part(RISING), text_part(" or "), sound_part(FALLING), text_part("?"))], "qwen3_asr": [],
    "gemma4": [user(image_part(COFFEE), sound_part(FALLING), text_part(" and "), sound_part(RISING), image_part(ASTRONAUT))],
}


@pytest.fixture(scope="module", params=HEARING)
def ears(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ears") / request.param
    sights.save(request.param, folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def hearing(ears: Path):
    server = LocalServer(str(ears), "--dtype", "float32", "--block-size", "8", "--max-batch-tokens", "24",
                         "--kv-cache-memory", "32MiB").start()
    yield server
    server.stop()


def test_what_is_heard_is_what_generate_hears(hearing: LocalServer, ears: Path) -> None:
    conversations = SPOKEN + TOGETHER[ears.name]
    expected = generated(ears, conversations)
    assert len(set(expected)) == len(expected), "the sounds make no difference"
    with ThreadPoolExecutor(8) as clients:
        for _ in range(2):  # the second time round from the prefix cache
            assert list(clients.map(lambda messages: ask(hearing, messages), conversations)) == expected
    hearing.assert_idle()
    assert hearing.engine.runner.paged


def test_a_repeated_sound_is_a_prefix_hit_and_another_is_not(hearing: LocalServer) -> None:
    def conversation(data: bytes) -> list[dict]:
        return user(text_part("These words come before the sound, and they are more than two blocks of eight tokens."),
                    sound_part(data), text_part("What was to be heard there?"))

    shrill = tone(3000, 4000, 2.1)  # as long as the other
    length, cached = usage(hearing, conversation(FALLING))
    assert cached == 0
    assert usage(hearing, conversation(FALLING)) == (length, (length - 1) // 8 * 8)
    other, cached = usage(hearing, conversation(shrill))
    assert other == length and 16 <= cached <= 32
    hearing.assert_idle()


def test_without_paging_the_same_is_heard(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sights.save("qwen2_audio", tmp_path, checkpoint)
    monkeypatch.setattr(serve, "self_test", lambda runner: "not today")
    server = LocalServer(str(tmp_path), "--dtype", "float32").start()
    try:
        conversations = SPOKEN + TOGETHER["qwen2_audio"]
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda messages: ask(server, messages), conversations))
        assert answers == generated(tmp_path, conversations)
        assert not server.engine.runner.paged
    finally:
        server.stop()


def test_sounds_by_address_and_in_responses(hearing: LocalServer) -> None:
    address = "data:audio/wav;base64," + base64.b64encode(RISING).decode()
    expected = ask(hearing, SPOKEN[0])
    for url in (address, {"url": address}):
        assert ask(hearing, user({"type": "audio_url", "audio_url": url}, text_part("What is to be heard?"))) == expected
    response = http.post(hearing.url + "/v1/responses", json={
        "input": [{"role": "user", "content": [sound_part(RISING), {"type": "input_text", "text": "What is to be heard?"}]}],
        "temperature": 0, "max_output_tokens": ANSWER}).json()
    assert response["output"][-1]["content"][0]["text"] == expected[1]


def test_what_cannot_be_heard_is_refused(hearing: LocalServer, ears: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "messages[0].content[0].input_audio"
    for data, code in ((RISING[:40], "invalid_audio"), (b"hello", "invalid_audio"), (tone(200, 300, 0.05), "invalid_audio"),
                       (ASTRONAUT, "invalid_audio")):
        assert refusal(hearing, user(sound_part(data))) == (400, code, place)
    for given in ({"data": "%%%", "format": "wav"}, {"format": "wav"}, "AAAA", None):
        assert refusal(hearing, user({"type": "input_audio", "input_audio": given})) == (400, "invalid_media", place)
    for address in ("/etc/passwd", "http://localhost/", "data:audio/wav;base64,%%%", 5):
        expected = (400, "invalid_media", "messages[0].content[0].audio_url")
        assert refusal(hearing, user({"type": "audio_url", "audio_url": {"url": address}})) == expected
    for part in ({"type": "video_url", "video_url": {"url": ""}}, *([] if ears.name == "gemma4" else [image_part(COFFEE)])):
        assert refusal(hearing, user(part)) == (400, "unsupported_content", "messages[0].content[0].type")
    if ears.name == "qwen2_audio":  # whose tower takes 4 s: its processor would drop the rest without a word
        assert refusal(hearing, user(sound_part(tone(200, 300, 4.05)))) == (400, "invalid_media", "messages")
    monkeypatch.setattr(serve, "MAX_AUDIO_SECONDS", 3)
    assert refusal(hearing, user(sound_part(tone(200, 300, 3.5)))) == (400, "audio_too_long", place)
    assert refusal(hearing, user(sound_part(RISING), sound_part(FALLING))) == (400, "audio_too_long",
                                                                                 place.replace("[0].i", "[1].i"))
    assert ask(hearing, SPOKEN[0])
