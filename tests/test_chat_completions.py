"""Chat completions: streamed and folded are the same, exact, valid for the openai SDK, and what real clients expect."""
import asyncio
import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import huggingface_hub
import openai
import pydantic
import pytest
import serve
import torch
import transformers
from conftest import QUESTION, LocalServer, ask, stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

PARIS = "The capital of France is Paris."
STORY = [{"role": "user", "content": "Tell me a story about a dog."}]


def valid(kind: type[pydantic.BaseModel], value: dict) -> None:
    """Check that the SDK's model reads an object strictly, knows all of its fields, and loses none."""
    model = kind.model_validate(value, strict=True)
    assert model.model_dump(exclude_unset=True) == value
    pending = [model]
    while pending:
        part = pending.pop()
        assert not part.model_extra, part
        for field in part.__dict__.values():
            items = field if isinstance(field, list) else [field]
            pending += [item for item in items if isinstance(item, pydantic.BaseModel)]


def fold(chunks: list[dict]) -> dict:
    """Put a stream together as a client does; the choices by index."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"roles": [], "text": "", "logprobs": [], "reasons": []})
            choice["roles"] += [part["delta"]["role"]] if "role" in part["delta"] else []
            choice["text"] += part["delta"].get("content") or ""
            choice["logprobs"] += part["logprobs"]["content"] if part["logprobs"] else []
            assert not choice["reasons"], "nothing comes after the finish reason"
            choice["reasons"] += [part["finish_reason"]] if part["finish_reason"] else []
    return choices


@pytest.mark.parametrize("fields", [
    {}, {"max_tokens": 5}, {"temperature": 1, "seed": 5, "max_tokens": 30}, {"logprobs": True, "top_logprobs": 4},
    {"logprobs": True}, {"n": 3, "temperature": 1, "seed": 9, "max_tokens": 20, "logprobs": True, "top_logprobs": 2},
    {"stop": ["is Pa"]}, {"stop": [" of"], "logprobs": True}, {"messages": STORY, "max_tokens": 60, "stop": ["\n\n", " and "]},
    {"messages": STORY, "n": 2, "max_tokens": 40, "frequency_penalty": 0.5, "temperature": 0.7, "seed": 1, "top_k": 40},
    {"logit_bias": {"2": 100}}, {"logit_bias": {"2": 100}, "logprobs": True}, {"ignore_eos": True, "max_tokens": 12},
], ids=str)
def test_streamed_is_folded_and_valid(server: LocalServer, fields: dict) -> None:
    answer = ask(server, **fields).json()
    *chunks, last = stream(server, stream_options={"include_usage": True}, **fields)
    valid(ChatCompletion, answer)
    for chunk in [*chunks, last]:
        valid(ChatCompletionChunk, chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)
    details = [usage.pop("prompt_tokens_details")["cached_tokens"] for usage in (last["usage"], answer["usage"])]
    assert last["choices"] == [] and last["usage"] == answer["usage"] and details[0] >= details[1]
    streamed = fold(chunks)
    assert sorted(streamed) == [choice["index"] for choice in answer["choices"]] == list(range(fields.get("n", 1)))
    for choice in answer["choices"]:
        found = streamed[choice["index"]]
        assert found["roles"] == ["assistant"] and found["reasons"] == [choice["finish_reason"]]
        assert found["text"] == choice["message"]["content"]
        assert found["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
        assert "\ufffd" not in found["text"]
    server.assert_idle()


def test_usage_comes_only_when_asked(server: LocalServer) -> None:
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert all(chunk["choices"] and "usage" not in chunk for chunk in stream(server, **options))


@pytest.mark.parametrize("messages", [QUESTION, STORY, [{"role": "user", "content": "🦜 日本"}]], ids=str)
def test_usage_is_exact(server: LocalServer, messages: list[dict]) -> None:
    tokenizer = server.engine.model.tokenizer
    answer = ask(server, messages=messages, max_tokens=20, n=2, logprobs=True).json()
    generated = sum(len(choice["logprobs"]["content"]) + (choice["finish_reason"] == "stop") for choice in answer["choices"])
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    assert usage["completion_tokens"] == generated
    assert usage["total_tokens"] == usage["prompt_tokens"] + generated
    assert ask(server, messages=messages, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == (
        (usage["prompt_tokens"] - 1) // server.engine.scheduler.pool.block_size * server.engine.scheduler.pool.block_size)


def test_logprobs_are_the_models_own(server: LocalServer, checkpoint: Path) -> None:
    """Compared with transformers in float32, over a hot answer: bfloat16 may be off by a little, never by a shift."""
    network = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = server.engine.model.tokenizer
    found = ask(server, messages=STORY, temperature=0.8, top_p=0.9, presence_penalty=1, seed=4, max_tokens=40, logprobs=True,
                top_logprobs=5).json()["choices"][0]
    entries = found["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == found["message"]["content"]
    vocabulary = {tuple(tokenizer.decode([id]).encode()): id for id in range(server.engine.model.vocab_size)}
    ids = [vocabulary[tuple(entry["bytes"])] for entry in entries]
    prompt = tokenizer.apply_chat_template(STORY, add_generation_prompt=True)["input_ids"]
    with torch.inference_mode():
        logits = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
    wanted = logits.log_softmax(-1)
    errors = []
    for row, (id, entry) in enumerate(zip(ids, entries)):
        errors.append(abs(entry["logprob"] - wanted[row, id].item()))
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 5 and tops == sorted(tops, reverse=True)
        assert tops == pytest.approx(wanted[row].topk(5).values.tolist(), abs=0.4)
        same = [top for top in entry["top_logprobs"] if top["bytes"] == entry["bytes"]]
        assert all(top["logprob"] == entry["logprob"] for top in same)
        assert all(top["token"] == bytes(top["bytes"]).decode(errors="replace") for top in entry["top_logprobs"])
    assert max(errors) < 0.5 and sum(errors) / len(errors) < 0.08


def test_characters_are_whole(server: LocalServer) -> None:
    """The model goes on with what it sees: each of these characters takes several tokens."""
    for character in ("🦜", "語", "Ω🎉"):
        messages = [{"role": "user", "content": "Repeat"}, {"role": "assistant", "content": character * 12}]
        pieces = [chunk["choices"][0]["delta"].get("content") or ""
                  for chunk in stream(server, messages=messages, continue_final_message=True, max_tokens=24)]
        text = "".join(pieces)
        assert character[0] in text and "\ufffd" not in "".join(pieces[:-2])


@pytest.mark.parametrize("n", [1, 3])
def test_bytes_that_are_no_character_come_at_the_end(server: LocalServer, n: int) -> None:
    first = server.engine.model.tokenizer.encode("🦜", add_special_tokens=False)[0]
    fields = {"logit_bias": {first: 100}, "max_tokens": 5, "n": n, "logprobs": True}
    for choice, found in zip(ask(server, **fields).json()["choices"], fold(stream(server, **fields)).values()):
        assert set(choice["message"]["content"]) == {"\ufffd"} and found["text"] == choice["message"]["content"]
        assert len(found["logprobs"]) == 5 and all(entry["bytes"] for entry in found["logprobs"])


def test_stop_strings_never_leak(server: LocalServer) -> None:
    fields = {"messages": STORY, "max_tokens": 30}
    whole = ask(server, **fields).json()["choices"][0]["message"]["content"]
    for stop in (whole[20:23], whole[40:49], whole[3:60], whole[-1], "e", "zzz", whole + "and more"):
        [found] = fold(stream(server, **fields, stop=["nowhere to be found", stop])).values()
        assert found["text"] == whole.split(stop)[0], stop
        assert found["reasons"] == ["stop" if stop in whole else "length"]


def test_many_at_once_are_each_alone(server: LocalServer) -> None:
    """Ten different streams in one batch: nobody gets a word of another's."""
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            async def one(i: int) -> str:
                chunks = await client.chat.completions.create(model="", stream=True, max_tokens=12, messages=[
                    {"role": "user", "content": f"What is {i} plus {i}?"}])
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(one(i) for i in range(10)))

    together = asyncio.run(main())
    alone = [ask(server, messages=[{"role": "user", "content": f"What is {i} plus {i}?"}], max_tokens=12).json()
             ["choices"][0]["message"]["content"] for i in range(10)]
    assert together == alone
    server.assert_idle()


async def test_openai_sdk(server: LocalServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        chunks = await create(model="SmolLM2-135M-Instruct", stream=True, messages=QUESTION)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == PARIS
        answer = await create(model="SmolLM2-135M-Instruct", messages=QUESTION, extra_body={"top_k": 1}, temperature=1)
        assert answer.choices[0].message.content == PARIS
        async with await create(model="", stream=True, messages=STORY, extra_body={"ignore_eos": True}) as chunks:
            async for _ in chunks:
                break  # and leave
        with pytest.raises(openai.BadRequestError) as refused:
            await create(model="", messages=QUESTION, extra_body={"best_of": 2})
        assert (refused.value.param, refused.value.code) == ("best_of", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="nobody/nothing", messages=QUESTION)
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    server.assert_idle()


def test_huggingface_hub_client(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    async def main() -> str:
        client = huggingface_hub.AsyncInferenceClient(server.url)
        return "".join([chunk.choices[0].delta.content or ""
                        async for chunk in await client.chat_completion(QUESTION, stream=True, max_tokens=100)])

    assert asyncio.run(main()) == PARIS


def test_the_documented_curl_body(server: LocalServer) -> None:
    chunks = stream(server, model="SmolLM2-135M-Instruct", temperature=0.9, max_tokens=1000, stop=["\n"], messages=QUESTION)
    assert fold(chunks)[0]["text"] and fold(chunks)[0]["reasons"][0] in ("stop", "length")


def test_transformers_chat(server: LocalServer, tmp_path: Path) -> None:
    """`transformers chat` on a terminal: one question, one answer, `!exit`."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it obeys it on loopback too
    terminal, inner = pty.openpty()
    child = subprocess.Popen([str(Path(sys.executable).with_name("transformers")), "chat", "SmolLM2-135M-Instruct",
                              server.url.replace("127.0.0.1", "localhost"), "do_sample=False", "max_new_tokens=20"],
                             stdin=inner, stdout=inner, stderr=inner, cwd=tmp_path, env=env, start_new_session=True)
    os.close(inner)
    screen, typed = "", [(r"<\w+>:", "What is the capital of France?\r"), (r"is Paris\.[^$]*<\w+>:", "!exit\r")]
    try:
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # it has left
                    screen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(terminal, 1 << 16).decode(errors="replace"))
            if typed and re.search(typed[0][0], screen):
                os.write(terminal, typed.pop(0)[1].encode())
    finally:
        child.kill()
        os.close(terminal)
    assert not typed and child.wait() == 0 and PARIS in screen, screen
    server.assert_idle()


def test_reasoning_and_template_defaults_of_the_server(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's chat_template_kwargs go before the server's own, and those before --reasoning."""
    seen = []
    monkeypatch.setattr(server.engine.model.tokenizer, "chat_template", "{{ messages[0].content }}|{{ enable_thinking }}")
    plain = transformers.PreTrainedTokenizerBase.apply_chat_template

    def spy(self: object, *args: object, **kwargs: object) -> object:
        seen.append(kwargs.get("enable_thinking"))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", spy)
    assert ask(server, max_tokens=1, chat_template_kwargs={"enable_thinking": True}).status_code == 200
    assert ask(server, max_tokens=1).status_code == 200
    assert seen == [True, True, None, None]  # each is rendered with and without the start of an answer


def test_json_is_compact_and_utf8(server: LocalServer) -> None:
    response = ask(server, max_tokens=8)
    assert response.headers["content-type"] == "application/json" and response.content.startswith(b'{"id":"chatcmpl-')
    assert json.loads(response.content)["object"] == "chat.completion"


# ── Tools and reasoning ───────────────────────────────────────────────────────────────────────────────────────────────


class Weather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


class Notes(pydantic.BaseModel):
    """Write something down."""

    items: list[Literal["milk", "bread"]] = pydantic.Field(max_length=2)


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Notes)]
WHICH = [{"role": "user", "content": "How is the weather in Paris?"}]
NAMED = {"type": "function", "function": {"name": "Notes"}}


def check_calls(calls: list[dict]) -> None:
    for call in calls:
        function = call["function"]
        assert set(call) == {"id", "type", "function"} and call["type"] == "function" and set(function) == {"name", "arguments"}
        {"Weather": Weather, "Notes": Notes}[function["name"]].model_validate_json(function["arguments"], strict=True)
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.parametrize("fields, count", [
    ({"tool_choice": "required"}, range(1, 9)), ({"tool_choice": "required", "parallel_tool_calls": False, "n": 1}, [1]),
    ({"tool_choice": NAMED}, [1]), ({"tool_choice": "required", "response_format": {"type": "json_object"}}, range(1, 9)),
    ({"tool_choice": NAMED, "logprobs": True, "stop": ["zzz"]}, [1]),
], ids=str)
def test_enforced_calls(server: LocalServer, fields: dict, count: range) -> None:
    """Valid each time even of a small model at a high temperature; streamed in fragments that add up to the same."""
    fields = {"messages": WHICH, "tools": TOOLS, "temperature": 1.2, "seed": 4, "n": 3, **fields}
    answer, chunks = ask(server, **fields).json(), stream(server, **fields)
    valid(ChatCompletion, answer)
    for i, choice in enumerate(answer["choices"]):
        calls, found = choice["message"]["tool_calls"], []
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None and len(calls) in count
        check_calls(calls)
        if fields["tool_choice"] == NAMED:
            assert calls[0]["function"]["name"] == "Notes"
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "tool_calls"
        assert "tool_calls" in mine[0]["delta"] or "logprobs" in fields or fields["n"] > 1
        for part in mine:
            for fragment in part["delta"].get("tool_calls", ()):
                if fragment["index"] == len(found):
                    found.append({"name": fragment["function"]["name"], "arguments": ""})
                    assert fragment["id"] and fragment["type"] == "function"
                else:
                    assert set(fragment) == {"index", "function"} and set(fragment["function"]) == {"arguments"}
                found[fragment["index"]]["arguments"] += fragment["function"]["arguments"]
        assert found == [call["function"] for call in calls]
        assert len(mine) > 5  # fragments, not whole calls
    for chunk in chunks:
        valid(ChatCompletionChunk, chunk)
    server.assert_idle()


def test_an_enforced_call_that_is_cut_off_says_so(server: LocalServer) -> None:
    for max_tokens in range(1, 14, 3):
        choice = ask(server, messages=WHICH, tools=TOOLS, tool_choice="required", max_tokens=max_tokens).json()["choices"][0]
        assert choice["finish_reason"] == "length"


def test_tools_that_are_not_called(server: LocalServer) -> None:
    """Under `auto` a small model says something; under `none` it does not even hear of the tools."""
    answer = ask(server, messages=WHICH, tools=TOOLS, max_tokens=40).json()["choices"][0]
    assert answer["finish_reason"] in ("stop", "length", "tool_calls")
    free, none = (ask(server, messages=WHICH, max_tokens=20, **fields).json()["choices"]
                  for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}))
    assert free == none


def test_auto_finds_the_call_that_a_model_writes(server: LocalServer) -> None:
    """The model continues a call that it is told it has begun; cut off before its end, that is content."""
    begun = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Paris", "days": 2'
    fields = {"messages": [*WHICH, {"role": "assistant", "content": begun}], "tools": TOOLS, "continue_final_message": True,
              "parallel_tool_calls": False, "logit_bias": {str(server.engine.model.tokenizer.encode("}}")[0]): 100}}
    answer = ask(server, **fields, max_tokens=1).json()["choices"][0]
    check_calls(answer["message"]["tool_calls"])
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["Weather"]
    chunks = stream(server, **fields, max_tokens=1)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    del fields["logit_bias"]
    answer = ask(server, **fields, max_tokens=1, logit_bias={"17": 100}).json()["choices"][0]
    assert answer["message"]["content"] == server.engine.model.tokenizer.decode([17])


def test_an_answer_or_calls(server: LocalServer) -> None:
    """With a response format, tools stay at hand: an answer is the one or the other."""
    schema = {"type": "object", "properties": {"text": {"enum": ["no", "yes"]}}, "required": ["text"],
              "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(12):
        choice = ask(server, messages=WHICH, tools=TOOLS, temperature=1.5, seed=seed, parallel_tool_calls=False,
                     response_format=wanted).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["text"] in ("no", "yes")
        else:
            check_calls(choice["message"]["tool_calls"])
        kinds.add(choice["finish_reason"])
    assert kinds <= {"stop", "tool_calls"}


async def test_openai_sdk_helpers(server: LocalServer) -> None:
    """`parse` with a pydantic model and with tools, and the streaming helper's events."""
    class Capital(pydantic.BaseModel):
        country: Literal["France", "Italy"]
        population: int = pydantic.Field(ge=0, le=10**8)

    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        parse = client.chat.completions.parse
        answer = await parse(model="", messages=QUESTION, response_format=Capital, temperature=1)
        assert isinstance(answer.choices[0].message.parsed, Capital)
        answer = await parse(model="", messages=WHICH, tools=TOOLS, tool_choice="required", temperature=1)
        assert all(isinstance(call.function.parsed_arguments, Weather | Notes) for call in answer.choices[0].message.tool_calls)
        with pytest.raises(openai.LengthFinishReasonError):
            await parse(model="", messages=QUESTION, response_format=Capital, max_tokens=3)
        kinds = set()
        async with client.chat.completions.stream(model="", messages=WHICH, tools=TOOLS, tool_choice="required", n=2,
                                                  temperature=1) as events:
            async for event in events:
                kinds.add(event.type)
            final = await events.get_final_completion()
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        for choice in final.choices:
            assert choice.message.tool_calls and choice.finish_reason == "tool_calls"
            assert all(isinstance(call.function.parsed_arguments, Weather | Notes) for call in choice.message.tool_calls)


async def test_a_whole_conversation_with_tools(server: LocalServer) -> None:
    """The SDK's own message goes back as it is, with a result for each call."""
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        first = await create(model="", messages=WHICH, tools=TOOLS, tool_choice="required")
        message = first.choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
        second = await create(model="", messages=[*WHICH, message, *results], tools=TOOLS, max_tokens=30)
        assert second.choices[0].message.content or second.choices[0].message.tool_calls
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_huggingface_hub_agents_see_the_call_in_the_first_chunk(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    async def main() -> list:
        client = huggingface_hub.AsyncInferenceClient(server.url)
        return [chunk.choices[0].delta async for chunk in await client.chat_completion(
            WHICH, tools=TOOLS, tool_choice="required", stream=True)]

    deltas = asyncio.run(main())
    assert deltas[0].role == "assistant" and deltas[0].tool_calls[0].function.name in ("Weather", "Notes")


def test_reasoning_comes_under_both_names(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model, under a template that opens the reasoning: all that it says then is reasoning."""
    tokenizer = server.engine.model.tokenizer
    thinking = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    monkeypatch.setattr(tokenizer, "chat_template", thinking)
    message = ask(server, max_tokens=12).json()["choices"][0]["message"]
    assert message["content"] == "" and message["reasoning"] == message["reasoning_content"] != ""
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(server, max_tokens=12)]
    assert deltas[0]["role"] == "assistant"
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    assert "".join(delta.get("reasoning", "") for delta in deltas) == message["reasoning"]
    assert len([delta for delta in deltas if "reasoning" in delta]) > 4
    refused = ask(server, max_tokens=1, reasoning_effort="none")  # this template has no switch
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "reasoning_effort"


@pytest.mark.parametrize("effort, template, expected", [
    ("none", "{{ enable_thinking }}<think>", {"enable_thinking": False}), ("none", "", {"enable_thinking": False}),
    ("high", "{{ reasoning_effort }}", {"reasoning_effort": "high"}),
    ("none", "{{ reasoning_effort }}", {"reasoning_effort": "none"}),
    ("low", "{{ enable_thinking }}<think>", None), ("none", "<think>", None), (None, "<think>", {}),
])
def test_reasoning_effort(server: LocalServer, monkeypatch: pytest.MonkeyPatch, effort: str, template: str,
                          expected: dict | None) -> None:
    monkeypatch.setattr(server.engine.model.tokenizer, "chat_template", template)
    if expected is None:
        with pytest.raises(serve.APIError, match="reasoning_effort"):
            serve.template_kwargs(server.engine.model, effort, None)
    else:
        assert serve.template_kwargs(server.engine.model, effort, None) == expected


@pytest.mark.parametrize("written", [
    'x ```json\n{"a": 1}\n``` y', "<think>a</think>b", '<tool_call>{"name": "f"}</tool_call> '])
def test_an_opening_that_looks_like_a_call_is_continued(written: str, server: LocalServer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    response = ask(server, continue_final_message=True, tools=[tool], max_tokens=3, messages=[
        {"role": "user", "content": "Go on."}, {"role": "assistant", "content": written}])
    assert response.status_code == 200, response.text


def test_names_are_no_paths_and_not_repeated_at_length(server: LocalServer) -> None:
    for name in ("~nouser/x", "~", "a" * 100_000):
        response = ask(server, model=name)
        assert response.status_code == 404 and len(response.content) < 3000
