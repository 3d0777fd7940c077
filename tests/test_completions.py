"""Completions: every form of prompt, echoed and scored or not, streamed and folded alike; and a tokenizer for who has none."""
import itertools
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import serve
import tokenizers
import transformers
from conftest import LocalServer, http
from openai.types import Completion

FRANCE = "The capital of France is"
MIXED = "Olá 👩‍👩‍👧 says 日本語 <|im_start|>user\n\n  and 🦜🦜"
TALE = "Once upon a time there was a dog. " * 12


def post(server: LocalServer, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    return http.post(server.url + path, json=fields)


def complete(server: LocalServer, prompt: object, **fields: object) -> dict:
    response = post(server, prompt=prompt, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: LocalServer, **fields: object) -> list[dict]:
    response = post(server, stream=True, **fields)
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), response.text
    return [json.loads(event.removeprefix("data: ")) for event in events]


def tokens_of(server: LocalServer, text: str) -> list[int]:
    return server.engine.model.tokenizer(text)["input_ids"]


def check_offsets(choice: dict) -> None:
    """Each token begins at its offset and ends where the next one begins, but for parts of characters and the end of sequence.

    What a stop string cuts off is a token still: it ends, or begins and ends, where the text does.
    """
    text, logprobs = choice["text"], choice["logprobs"]
    offsets = [*logprobs["text_offset"], len(text)]
    assert offsets == sorted(offsets) and offsets[0] == 0
    assert len({len(values) for values in logprobs.values()}) == 1
    for start, end, token in zip(offsets, offsets[1:], logprobs["tokens"]):
        cut = choice["finish_reason"] == "stop" and end == len(text) and token.startswith(text[start:])
        assert text[start:end] == token or "\ufffd" in token or cut, (start, end, token)


FIELDS = [
    {}, {"max_tokens": 30}, {"temperature": 1, "seed": 5, "max_tokens": 30, "logprobs": 3}, {"echo": True},
    {"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 2, "max_tokens": 0}, {"echo": True, "max_tokens": 0},
    {"n": 3, "temperature": 1, "seed": 9, "logprobs": 1, "echo": True}, {"prompt": [FRANCE, "1, 2, 3,", MIXED], "logprobs": 5},
    {"prompt": [[504, 3575, 282], [1, 2], [30]], "echo": True, "logprobs": 1, "n": 2}, {"stop": [" Paris", "\n"]},
    {"prompt": TALE, "max_tokens": 60, "stop": ["a dog. Once upon", "zzz"], "logprobs": 1, "echo": True},
    {"logit_bias": {"2": 100}, "logprobs": 1, "echo": True}, {"prompt": MIXED, "echo": True, "logprobs": 1},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_streamed_is_folded_and_valid(server: LocalServer, fields: dict) -> None:
    fields = {"prompt": FRANCE, **fields}
    answer = complete(server, **fields)
    *chunks, last = stream(server, stream_options={"include_usage": True}, **fields)
    for usage in (last["usage"], answer["usage"]):
        usage.pop("prompt_tokens_details")  # of the second there may be more in the cache
    assert last["choices"] == [] and last["usage"] == answer["usage"]
    assert {(chunk["object"], chunk["id"]) for chunk in chunks} == {("text_completion", last["id"])}
    folded: dict[int, dict] = {}
    for (part,) in (chunk["choices"] for chunk in chunks):
        assert part["text"] or part["logprobs"] or part["finish_reason"]
        choice = folded.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
        assert choice["finish_reason"] is None, "nothing comes after the finish reason"
        choice["text"] += part["text"]
        choice["finish_reason"] = part["finish_reason"]
        for name, values in (part["logprobs"] or {}).items():
            choice["logprobs"] = choice["logprobs"] or {}
            choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
    assert [{"index": i, **folded[i]} for i in sorted(folded)] == answer["choices"]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    for choice in answer["choices"]:
        assert (choice["logprobs"] is not None) == ("logprobs" in fields)
        if choice["logprobs"]:
            check_offsets(choice)
            if fields.get("echo"):  # the SDK does not know that the first has none
                for name in ("token_logprobs", "top_logprobs"):
                    assert choice["logprobs"][name].pop(0) is None
    assert Completion.model_validate(answer, strict=True).model_dump(exclude_unset=True) == answer
    server.assert_idle()


def test_the_four_forms_say_the_same(server: LocalServer) -> None:
    texts = [FRANCE, "1, 2, 3, 4,", "def add(a, b):\n"]
    ids = [tokens_of(server, text) for text in texts]
    alone = [complete(server, text)["choices"][0]["text"] for text in texts]
    assert alone == [complete(server, each)["choices"][0]["text"] for each in ids]
    for many in (texts, ids):
        found = complete(server, many, n=2)
        assert [choice["text"] for choice in found["choices"]] == [text for text in alone for _ in range(2)]
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids)) and found["usage"]["completion_tokens"] == 6 * 16


def test_what_lm_eval_slices(server: LocalServer) -> None:
    """N+1 entries, the last of them generated, even if it is the end of sequence; nothing is put before token ids."""
    ids = tokens_of(server, TALE)
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for prompt, bias in itertools.product((ids, ids[:1], ids[:32], ids[:33]), ({}, {"2": 100})):
        logprobs = complete(server, [prompt], logit_bias=bias, **body)["choices"][0]["logprobs"]
        assert [len(values) for values in logprobs.values()] == [len(prompt) + 1] * 4
        assert "".join(logprobs["tokens"][:-1]) == server.engine.model.tokenizer.decode(prompt)
        assert (logprobs["tokens"][-1] == "<|im_end|>") == bool(bias)
        for value, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"]))[1:]:
            assert value in top.values() and len(top) <= 2
            assert value == max(top.values()) or len(top) == 2
    server.assert_idle()


def test_scores_are_the_generated_tokens_own(server: LocalServer) -> None:
    """What a model generates has, scored as a prompt, the log-probabilities that it had: bfloat16 may round otherwise."""
    ids = tokens_of(server, TALE)
    generated = complete(server, ids, max_tokens=20, logprobs=3, temperature=0.7, seed=3)["choices"][0]
    scored = complete(server, TALE + generated["text"], max_tokens=0, logprobs=3, echo=True)["choices"][0]
    assert scored["text"] == TALE + generated["text"]
    assert scored["logprobs"]["tokens"][len(ids):] == generated["logprobs"]["tokens"]
    found, expected = scored["logprobs"]["token_logprobs"][len(ids):], generated["logprobs"]["token_logprobs"]
    assert found == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_the_cache_does_not_show(server: LocalServer, k: int) -> None:
    """After others asked for more, for less, for nothing, the same number of alternatives and the same values come."""
    prompt, fields = tokens_of(server, f"{k} " + TALE), {"max_tokens": 0, "echo": True}
    complete(server, prompt)
    first = complete(server, prompt, logprobs=k, **fields)
    complete(server, prompt, logprobs=10, **fields)
    again = complete(server, prompt, logprobs=k, **fields)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(prompt) - 1) // 32 * 32 - 1
    one, other = (each["choices"][0]["logprobs"] for each in (first, again))
    assert (one["tokens"], one["text_offset"]) == (other["tokens"], other["text_offset"])
    assert [len(top) for top in one["top_logprobs"][1:]] == [len(top) for top in other["top_logprobs"][1:]]
    assert one["token_logprobs"][1:] == pytest.approx(other["token_logprobs"][1:], abs=0.5)


def test_what_is_spelled_the_same_keeps_the_likelier(server: LocalServer) -> None:
    model = server.engine.model
    pieces = [model.tokenizer.convert_tokens_to_ids(piece) for piece in ("ð", "Ł", "a")]  # bytes that are no character
    token = serve.Token(pieces[1], -3.0, ((pieces[2], -0.5), (pieces[0], -1.0), (pieces[1], -3.0)))
    assert serve.Spelling(model, 3).alternatives(token) == {"a": -0.5, "\ufffd": -1.0}
    assert serve.Spelling(model, 1).alternatives(token) == {"a": -0.5, "\ufffd": -3.0}
    impossible = serve.Token(pieces[2], -math.inf)
    assert serve.Spelling(model, 0).alternatives(impossible) == {"a": -9999.0}


@pytest.mark.parametrize("fields, tokens", [({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": 3}, 3), (
    {"generation_config": '{"max_new_tokens": 4}'}, 4), ({"max_tokens": 0, "echo": True}, 0)], ids=str)
def test_how_many_tokens(server: LocalServer, fields: dict, tokens: int) -> None:
    answer = complete(server, FRANCE, **fields)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (tokens, "length")


def test_stop_lists_of_any_length(server: LocalServer) -> None:
    whole = complete(server, TALE, max_tokens=40)["choices"][0]["text"]
    stops = [f"nowhere {i}" for i in range(200)]
    for stop in (whole[20:25], whole[3:30]):
        choice = complete(server, TALE, max_tokens=40, stop=[*stops, stop], logprobs=0, echo=True)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (TALE + whole.split(stop)[0], "stop")
        check_offsets(choice)


@pytest.mark.parametrize("fields, param", [
    ({"prompt": []}, "prompt"), ({"prompt": [FRANCE, [1]]}, "prompt"), ({"prompt": [1, [1]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [[-1]]}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 2000}, "prompt"), ({"prompt": ["a"] * 100, "n": 128}, "prompt"), ({"prompt": {"a": 1}}, "prompt"),
    ({}, "prompt"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"), ({"logprobs": 21}, "logprobs"), ({"logprobs": -1}, "logprobs"), ({"echo": 1}, "echo"),
    ({"logprobs": True}, "logprobs"), ({"best_of": 2}, "best_of"), ({"suffix": "."}, "suffix"), ({"prompt_logprobs": 1},
    "prompt_logprobs"), ({"suffix": ".", "echo": True}, "echo"), ({"use_beam_search": True}, "use_beam_search"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"), ({"stream_options": {}}, "stream_options"),
], ids=str)
def test_refused_by_name(server: LocalServer, fields: dict, param: str) -> None:
    response = post(server, **({"prompt": FRANCE, **fields} if fields else {}))
    error = response.json()["error"]
    assert response.status_code == 400 and (error["param"] or "").split("[")[0] == param, error


@pytest.mark.parametrize("prompt, code", [("", "empty_prompt"), ([[]], "empty_prompt"), ([[1], []], "empty_prompt"), (
    [49152], "invalid_value"), ([[1], [2**70]], "invalid_value"), ([5] * 8192, "context_length_exceeded"), (
    "a " * 9000, "context_length_exceeded")], ids=lambda value: str(value)[:20])
def test_prompts_that_cannot_be(server: LocalServer, prompt: object, code: str) -> None:
    response = post(server, prompt=prompt)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_the_longest_prompt(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine.model, "max_model_len", 50)
    answer = complete(server, [[5] * 49], max_tokens=1, logprobs=1, echo=True)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 50 and answer["usage"]["total_tokens"] == 50
    error = post(server, prompt=[[5] * 50], max_tokens=1).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["message"].count("50") == 2


def test_a_prompt_that_is_not_continued_has_no_scores(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine.model.network.config, "is_encoder_decoder", True)
    for fields, status in (({"echo": True, "logprobs": 0}, 400), ({"echo": True}, 200), ({"logprobs": 0}, 200)):
        response = post(server, prompt=FRANCE, max_tokens=1, **fields)
        assert response.status_code == status
        assert status == 200 or response.json()["error"]["param"] == "logprobs"


def test_accepted_without_effect(server: LocalServer) -> None:
    fields = {"best_of": 1, "suffix": "", "user": "me", "unknown": [1], "logprobs": None, "echo": None, "stream": None}
    assert complete(server, FRANCE, **fields)["choices"] == complete(server, FRANCE)["choices"]


def test_models_with_tokens_for_it_fill_in_the_middle(server: LocalServer) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(server.engine.model.tokenizer.name_or_path)
    model = types.SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(serve.APIError, match="no tokens to fill in the middle"):
        serve.with_suffix(model, "a", "b")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]})
    text = serve.with_suffix(model, "def f(", "): pass")
    assert text == "<fim_prefix>def f(<fim_suffix>): pass<fim_middle>"
    assert len([id for id in tokenizer(text)["input_ids"] if id >= 49152]) == 3
    with pytest.raises(serve.APIError, match="beside token ids") as refusal:
        serve.with_suffix(model, [1], "b")
    assert refusal.value.param == "suffix"


async def test_openai_sdk(server: LocalServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model="", prompt=FRANCE, max_tokens=2, logprobs=1, echo=True)
        assert answer.choices[0].text == FRANCE + " Paris."
        chunks = await client.completions.create(model="", prompt=[FRANCE, FRANCE], max_tokens=2, stream=True)
        texts = ["", ""]
        async for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [" Paris.", " Paris."]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(model="", prompt=FRANCE, suffix="!")
        assert refused.value.param == "suffix"
    server.assert_idle()


def test_many_scoring_clients_are_each_alone(server: LocalServer) -> None:
    prompts = [tokens_of(server, TALE[:34 * (i % 3)] + f"The number {i} is") for i in range(12)]

    def score(prompt: list[int]) -> list[float]:
        return complete(server, prompt, max_tokens=0, logprobs=0, echo=True)["choices"][0]["logprobs"]["token_logprobs"][1:]

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(score, prompts))
    http.post(server.url + "/reset")
    for found, prompt in zip(together, prompts):
        assert found == pytest.approx(score(prompt), abs=0.5)
    server.assert_idle()


# Text that is not as its tokens spell it.


@pytest.fixture(scope="module")
def pieced() -> serve.Model:
    """A tokenizer as llama's: it begins with a token of its own, and the first word's space is no text."""
    pieces = ["<s>", "</s>", *"▁abcdefghi"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                            tokenizers.normalizers.Replace(" ", "▁")])
    tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return types.SimpleNamespace(tokenizer=fast, byte_level=False, special_ids=frozenset({0, 1}))


def test_offsets_without_what_the_tokenizer_put_first(pieced: serve.Model) -> None:
    ids, spelling = pieced.tokenizer("ab c")["input_ids"], serve.Spelling(pieced, 0)
    spelling.add_prompt([serve.Token(id) for id in ids], "ab c")
    spelling.add([serve.Token(id) for id in pieced.tokenizer.convert_tokens_to_ids(["▁", "d", "</s>"])])
    found = spelling.logprobs("ab c d", last=True)
    assert found["tokens"] == ["<s>", " ", "a", "b", " ", "c", " ", "d", "</s>"]
    assert found["text_offset"] == [0, 0, 0, 1, 2, 3, 4, 5, 6]


def test_text_that_goes_on_keeps_its_space(pieced: serve.Model) -> None:
    first, *rest = pieced.tokenizer.convert_tokens_to_ids(["▁", "d"])
    befores = (), pieced.tokenizer("ab c")["input_ids"]
    fresh, going_on = (serve.Detokenizer(pieced.tokenizer, (), before) for before in befores)
    assert fresh.add([first, *rest]) == "d" and going_on.add([first, *rest]) == " d"


# The tokenizer.


@pytest.mark.parametrize("text", ["", "test", FRANCE, MIXED, TALE * 300], ids=lambda text: text[:12])
def test_tokenize_and_back(server: LocalServer, text: str) -> None:
    found = post(server, "/tokenize", prompt=text, add_special_tokens=False).json()
    assert found == {"tokens": tokens_of(server, text), "count": len(found["tokens"]), "max_model_len": 8192}
    assert post(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": text}


def test_tokenizer_info(server: LocalServer) -> None:
    tokenizer, info = server.engine.model.tokenizer, http.get(server.url + "/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert info["chat_template"] == tokenizer.chat_template
    assert "/" not in json.dumps({**info, "chat_template": ""}), "a path of this machine"


@pytest.mark.parametrize("path, fields, param", [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 5}, "prompt"), ("/detokenize", {}, "tokens"),
    ("/tokenize", {"prompt": "a", "messages": []}, "messages"), ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [1, 49152]}, "tokens"), ("/detokenize", {"tokens": [2**70]}, "tokens"),
    ("/detokenize", {"tokens": "1"}, "tokens")], ids=str)
def test_tokenizer_refusals(server: LocalServer, path: str, fields: dict, param: str) -> None:
    response = post(server, path, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"].split("[")[0] == param


@pytest.mark.parametrize("path, body, param", [
    ("/detokenize", {"tokens": [1] * (serve.MAX_TOKENIZED // 16 + 1)}, "tokens"),
    ("/tokenize", {"prompt": "a" * (serve.MAX_TOKENIZED + 1)}, "prompt"),
], ids=["ids", "text"])
def test_tokenizing_has_bounds(path: str, body: dict, param: str, server: LocalServer) -> None:
    response = http.post(server.url + path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
