"""Chat completions over real sockets, driven by real clients."""
import json

import httpx2 as httpx
import openai
import pytest
from conftest import LocalServer


def ask(server: LocalServer, **fields) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], **fields}
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)


def test_answers(server: LocalServer) -> None:
    answer = ask(server).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 8
    server.assert_idle()


def test_streamed_is_folded(server: LocalServer) -> None:
    lines = [line for line in ask(server, stream=True).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == ask(server).json()["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_openai_sdk_streams(server: LocalServer) -> None:
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none")
    stream = await client.chat.completions.create(model="SmolLM2-135M-Instruct", stream=True, messages=[
        {"role": "user", "content": "What is the capital of France?"}])
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "The capital of France is Paris."


@pytest.mark.parametrize("fields, param", [({"temperature": "hot"}, "temperature"), ({"tools": [{}]}, "tools"),
                                           ({"top_k": -2}, "top_k"), ({"messages": []}, "messages")])
def test_refuses_by_name(server: LocalServer, fields: dict, param: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    server.assert_idle()
