"""A request's fields, then its generation_config, then the model's own decide; and every field does what it says."""
import dataclasses
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import serve
import transformers
from conftest import LocalServer, ask

EOS = 2


def params(server: LocalServer, fields: dict, generation: dict | None = None) -> serve.SamplingParams:
    model = dataclasses.replace(server.engine.model, generation=transformers.GenerationConfig(**generation or {}))
    body = msgspec.json.decode(json.dumps({"messages": [], **fields}), type=serve.ChatRequest)
    return serve.sampling_params(body, model, None)


def config(**fields: object) -> dict:
    return {"generation_config": json.dumps(fields)}


@pytest.mark.parametrize("fields, generation, expected", [
    ({}, {}, {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None}),
    ({}, {"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ({}, {"do_sample": True}, {"temperature": 1.0}),
    ({}, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05},
     {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}),
    ({"temperature": 0.3, "top_k": -1, "top_p": 1.0}, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
     {"temperature": 0.3, "top_k": 0, "top_p": 1.0}),
    ({"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "max_tokens": None}, {}, {"temperature": 0.0}),
    ({"temperature": 1e-30}, {}, {"temperature": 1e-30}),  # sampling itself takes it for greedy
    (config(do_sample=False, temperature=0.7), {"do_sample": True}, {"temperature": 0.0}),
    (config(do_sample=True, temperature=0.7, top_k=5), {}, {"temperature": 0.7, "top_k": 5}),
    (config(do_sample=True, max_new_tokens=256), {}, {"temperature": 1.0, "top_k": 50, "max_tokens": 256}),  # transformers chat
    (config(max_new_tokens=7, min_new_tokens=2, stop_strings=["a"]), {}, {"max_tokens": 7, "min_tokens": 2, "stop": ("a",)}),
    ({"max_tokens": 3, **config(max_new_tokens=7, temperature=1.5), "temperature": 0.5}, {},
     {"max_tokens": 3, "temperature": 0.5}),
    (config(eos_token_id=[5, 6]), {}, {"stop_token_ids": frozenset({5, 6, EOS})}),
    (config(do_sample=True, transformers_version="5.23.0", use_cache=True, max_length=20, num_beams=1), {},
     {"max_tokens": None}),
    ({"stop_token_ids": [7]}, {}, {"stop_token_ids": frozenset({7, EOS})}),
    ({"stop_token_ids": [7], "ignore_eos": True}, {}, {"stop_token_ids": frozenset({7})}),
    ({"stop": "x"}, {}, {"stop": ("x",)}),
    ({"stop": ["x", "y"] * 8}, {}, {"stop": ("x", "y") * 8}),
    ({"logit_bias": {"5": -100, "6": 1.5}}, {}, {"logit_bias": {5: -100.0, 6: 1.5}}),
    ({"seed": -1}, {}, {"seed": -1}), ({"seed": 2**64 - 1}, {}, {"seed": 2**64 - 1}),
])
def test_what_decides(server: LocalServer, fields: dict, generation: dict, expected: dict) -> None:
    found = params(server, fields, generation)
    assert {name: getattr(found, name) for name in expected} == expected


def answer(server: LocalServer, **fields: object) -> dict:
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def text(server: LocalServer, **fields: object) -> str:
    return answer(server, **fields)["choices"][0]["message"]["content"]


def id_of(server: LocalServer, piece: str) -> int:
    [id] = server.engine.model.tokenizer.encode(piece, add_special_tokens=False)
    return id


PARIS = "The capital of France is Paris."


@pytest.mark.parametrize("fields", [
    {"temperature": 0}, {"temperature": 2, "top_k": 1, "seed": 1}, {"temperature": 2, "top_p": 0},
    {"temperature": 2, "min_p": 1}, {"temperature": 1e-6}, {"temperature": 1e-300}], ids=str)
def test_greedy_has_many_names(server: LocalServer, fields: dict) -> None:
    assert text(server, **fields) == PARIS


def test_logit_bias_forbids_and_forces(server: LocalServer) -> None:
    paris, lyon = id_of(server, " Paris"), id_of(server, " Lyon")
    assert "Paris" not in text(server, logit_bias={paris: -100}, max_tokens=6)
    assert text(server, logit_bias={lyon: 100}, max_tokens=3) == " Lyon" * 3


@pytest.mark.parametrize("presence, frequency", [(2, 0), (0, 1.5), (-1, -0.5), (1, 2)])
def test_penalties_follow_the_published_formula(server: LocalServer, presence: float, frequency: float) -> None:
    """The chosen token has the best of raw log-probability - count * frequency - seen * presence, over generated tokens."""
    fields = {"presence_penalty": presence, "frequency_penalty": frequency, "max_tokens": 30, "ignore_eos": True}
    found = answer(server, **fields, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
    counts, overruled = Counter(), 0
    for entry in found:
        scores = {tuple(top["bytes"]): top["logprob"] - counts[tuple(top["bytes"])] * frequency
                  - (tuple(top["bytes"]) in counts) * presence for top in entry["top_logprobs"]}
        assert scores[tuple(entry["bytes"])] >= max(scores.values()) - 1e-4
        overruled += entry["logprob"] < entry["top_logprobs"][0]["logprob"]
        counts[tuple(entry["bytes"])] += 1
    assert overruled  # or the penalties decided nothing


def test_repetition_penalty_avoids_prompt_and_answer(server: LocalServer) -> None:
    words = text(server, repetition_penalty=1e6, max_tokens=12, ignore_eos=True).split()
    assert len(set(words)) == len(words) and not {"capital", "France"} & set(words)


def test_logprobs_are_those_before_the_bias(server: LocalServer) -> None:
    biased = answer(server, logit_bias={id_of(server, " Lyon"): 100}, max_tokens=1, logprobs=True, top_logprobs=1)
    entry = biased["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == " Lyon" and entry["logprob"] < -5 and entry["top_logprobs"][0]["token"] != " Lyon"


def test_min_tokens_and_ignore_eos_keep_it_going(server: LocalServer) -> None:
    assert answer(server)["usage"]["completion_tokens"] == 8
    longer = answer(server, min_tokens=12, max_tokens=40)
    assert longer["usage"]["completion_tokens"] >= 12 and PARIS[:-1] in longer["choices"][0]["message"]["content"]
    endless = answer(server, ignore_eos=True, max_tokens=15)
    assert endless["usage"]["completion_tokens"] == 15 and endless["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("fields, expected, reason, tokens", [
    ({}, PARIS, "stop", 8),
    ({"max_tokens": 8}, PARIS, "stop", 8),
    ({"max_tokens": 7}, PARIS, "length", 7),
    ({"max_completion_tokens": 2, "max_tokens": 5}, "The capital", "length", 2),
    ({"max_tokens": 1}, "The", "length", 1),
    ({"stop": "."}, PARIS[:-1], "stop", 7),
    ({"stop": [".", "France"]}, "The capital of ", "stop", 4),
    ({"stop": "capital of France is"}, "The ", "stop", 5),
    ({"stop": ["is Pa"], "max_tokens": 6}, "The capital of France ", "stop", 6),
    ({"stop": "Parisian"}, PARIS, "stop", 8),
    ({"stop": "The"}, "", "stop", 1),
])
def test_where_it_stops_and_why(server: LocalServer, fields: dict, expected: str, reason: str, tokens: int) -> None:
    found = answer(server, **fields)
    choice = found["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, reason)
    assert found["usage"]["completion_tokens"] == tokens


def test_stop_token_ids_are_no_text(server: LocalServer) -> None:
    found = answer(server, stop_token_ids=[id_of(server, " Paris")])["choices"][0]
    assert (found["message"]["content"], found["finish_reason"]) == ("The capital of France is", "stop")


def test_a_seed_means_the_same_text_whatever_else_is_in_the_batch(server: LocalServer) -> None:
    seeded = {"temperature": 1, "seed": 7, "max_tokens": 24, "top_k": 50}
    alone, greedy = text(server, **seeded), text(server)
    assert text(server, **seeded) == alone
    assert text(server, **{**seeded, "seed": 8}) != alone
    with ThreadPoolExecutor(10) as pool:
        hot = [pool.submit(text, server, temperature=1.5, seed=100 + i, max_tokens=40 + i) for i in range(8)]
        together, beside = pool.submit(text, server, **seeded), pool.submit(text, server, max_tokens=20)
        assert together.result() == alone
        assert beside.result() == greedy == PARIS
        assert len({job.result() for job in hot}) == 8
    server.assert_idle()


def test_answers_of_one_request_differ_and_the_first_is_the_seeds_own(server: LocalServer) -> None:
    seeded = {"temperature": 1.2, "seed": 3, "max_tokens": 12}
    choices = [choice["message"]["content"] for choice in answer(server, n=4, **seeded)["choices"]]
    assert len(set(choices)) == 4 and choices[0] == text(server, **seeded)


def test_without_a_seed_answers_differ(server: LocalServer) -> None:
    assert len({text(server, temperature=1.5, max_tokens=12) for _ in range(3)}) > 1
