"""Images in the batch: what HTTP answers is what generate() of the same checkpoint says, token for token.

The checkpoints have random weights and real architectures, processors and pictures.
"""
from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
import serve
import sights
import torch
import transformers
from conftest import LocalServer, http

skimage = pytest.importorskip("skimage", reason="no pictures: scikit-image is not installed")
PICTURES = Path(skimage.__file__).parent / "data"
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "idefics3", "internvl", "gemma3"]
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
            if part["type"] == "image_url" else part for part in m["content"]]} for m in conversation]
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
    assert seeing.engine.runner.paged == ("gemma3" not in folder.name)
