"""Answers are what their grammars say: schemas, regexes, choices, tools, after reasoning too, and nobody else waits for it."""
import dataclasses
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import serve
import torch
import transformers
import trio
from conftest import QUESTION, LocalServer, ServerProcess, ask, collect, http, running, start_server, stream

NAME, SMALL, YES = {"type": "string", "maxLength": 20}, {"type": "integer", "minimum": 0, "maximum": 120}, {"type": "boolean"}


def record(optional: tuple[str, ...] = (), **properties: object) -> dict:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": [name for name in properties if name not in optional]}


def items(schema: dict, low: int = 1, high: int = 3) -> dict:
    return {"type": "array", "items": schema, "minItems": low, "maxItems": high}


TREE = {"$defs": {"leaf": record(size=SMALL), "branch": record(name=NAME, twigs=items({"$ref": "#/$defs/leaf"}))},
        "$ref": "#/$defs/branch"}
LIST = {"$defs": {"node": record(("next",), value=SMALL, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})},
        "$ref": "#/$defs/node"}
SCHEMAS = [
    record(name=NAME), record(name=NAME, age=SMALL), record(a=YES, b=YES, c=YES), record(("b",), a=SMALL, b=SMALL),
    record(who=record(name=NAME, born=SMALL)), record(a=record(b=record(c=record(d=SMALL)))), record(tags=items(NAME)),
    record(matrix=items(items(SMALL, 2, 2), 2, 2)), record(people=items(record(name=NAME, age=SMALL))),
    record(unit={"enum": ["C", "F", "K"]}), record(mixed={"enum": ["a", 1, None, True, 2.5]}), record(kind={"const": "cat"}),
    record(exact={"const": {"a": [1, {"b": None}]}}), record(x={"type": ["string", "null"], "maxLength": 8}),
    record(x={"anyOf": [SMALL, NAME]}), record(x={"anyOf": [record(a=SMALL), record(b=NAME)]}),
    record(x={"oneOf": [record(kind={"const": "a"}, v=SMALL), record(kind={"const": "b"}, w=NAME)]}),
    {"allOf": [record(a=SMALL), {"type": "object"}]}, TREE, LIST, items(SMALL, 3, 3),
    {"type": "array", "prefixItems": [SMALL, NAME, YES], "items": False, "minItems": 3}, items(record(a=SMALL, b=YES)),
    SMALL, NAME, YES, {"type": "null"}, {"enum": ["red", "green", "blue"]}, {"enum": ["naïve", "日本", "🦜", 'a "b" \\']},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, {"type": "string", "pattern": "^(yes|no|maybe)$"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}, {"type": "string", "format": "ipv4"},
    record(at={"type": "string", "format": "time"}, on={"type": "string", "format": "date-time"}),
    {"type": "string", "minLength": 5, "maxLength": 9}, {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13}, {"type": "number", "multipleOf": 0.25},
    {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 7}, {"type": "object", "properties": {"a": SMALL},
        "required": ["a"], "additionalProperties": SMALL, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": SMALL}, "additionalProperties": False, "minProperties": 1,
     "maxProperties": 2}, record(**{"with space": SMALL, 'quo"te': YES, "日本": YES, "": YES}),
    record(**{f"field{i}": YES for i in range(12)}), record(**{"\\": YES, "/": YES, "\n": YES}),
    record(("city", "unit"), city=NAME, unit={"enum": ["C", "F"]}, days=SMALL), record(none={"type": "null"}, empty=record()),
    record(a={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}), {"title": "T", "description": "d", **record(a=YES)},
    record(a={"default": 3, "examples": [4], "deprecated": True, **SMALL}), {"anyOf": [SMALL, record(a=SMALL), items(YES)]},
]


def json_schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def at_once(requests: list[dict], server: LocalServer | ServerProcess) -> list[dict]:
    """Return the answers to requests that run together."""
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda fields: ask(server, **fields), requests))
    for answer in answers:
        assert answer.status_code == 200, answer.text
    return [answer.json() for answer in answers]


def test_fifty_schemas_at_temperature_1(server: LocalServer) -> None:
    assert len(SCHEMAS) >= 50
    requests = [{"response_format": json_schema(schema), "temperature": 1, "top_p": 1, "seed": i, "max_tokens": 400,
                 "messages": [{"role": "user", "content": f"Give me an example of {json.dumps(schema)}"[:300]}]}
                for i, schema in enumerate(SCHEMAS)]
    for schema, answer in zip(SCHEMAS, at_once(requests, server)):
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop", (schema, choice)
        jsonschema.validate(json.loads(choice["message"]["content"]), schema,
                            format_checker=jsonschema.FormatChecker(["date", "uuid", "ipv4"]))
    server.assert_idle()


def test_an_answer_that_is_cut_off_says_so(server: LocalServer) -> None:
    endless = {"type": "array", "items": record(name={"type": "string", "minLength": 10}), "minItems": 50}
    for max_tokens in (1, 7, 60):
        choice = ask(server, response_format=json_schema(endless), max_tokens=max_tokens).json()["choices"][0]
        assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("[")
        with pytest.raises(ValueError):
            json.loads(choice["message"]["content"])


KINDS = [({"regex": r"[A-Z][a-z]{2,8} \d{3}"}, r"[A-Z][a-z]{2,8} \d{3}"),
         ({"regex": "a/b\\\\|\\x41{1,3}!|a\nb \"c\""}, r"a/b\\|A{1,3}!|a\nb \"c\""),
         ({"choice": ["Paris", "Rome", "a \"b\" \\ \n\t\x01", "naïve 🦜"]}, r"Paris|Rome|a \"b\" \\ \n\t\x01|naïve 🦜"),
         ({"choice": ["yes", "yes and no"]}, "yes|yes and no"), ({"grammar": 'root ::= "x" [0-9] "y"'}, r"x\dy"),
         ({"grammar": "start: WORD (\" \" WORD){2}\nWORD: /[a-z]{1,6}/"}, r"[a-z]{1,6}( [a-z]{1,6}){2}"),
         ({"json": {"type": "integer", "minimum": 10, "maximum": 20}}, r"1\d|20"), ({"json": '{"const": [1, 2]}'}, r"\[1, 2\]")]


@pytest.mark.parametrize("wanted, expected", KINDS, ids=str)
def test_structured_outputs(server: LocalServer, wanted: dict, expected: str) -> None:
    """Every one of several answers, streamed the same, and the same again with the same seed."""
    fields = {"structured_outputs": wanted, "temperature": 1.2, "seed": 3, "n": 4, "max_tokens": 60}
    texts = [choice["message"]["content"] for choice in ask(server, **fields).json()["choices"]]
    assert all(re.fullmatch(expected, text) for text in texts), texts
    streamed = [""] * 4
    for chunk in stream(server, **fields):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content") or ""
    assert streamed == texts
    assert ask(server, **{**fields, "temperature": 0, "n": 1}).json()["choices"][0]["finish_reason"] == "stop"


def test_json_object_and_text(server: LocalServer) -> None:
    answer = ask(server, max_tokens=9, response_format={"type": "json_object"}).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")
    free = ask(server).json()["choices"]
    assert ask(server, response_format={"type": "text"}).json()["choices"] == free


REFUSED = [
    ({"type": "object", "not": {}}, "not"), ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"if": {}}, "if"),
    ({"type": "string", "format": "telepathy"}, "telepathy"), ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ({"$ref": "https://example.com/schema"}, "https://example.com/schema"), ({"$ref": "#/$defs/missing"}, "missing"),
    ({"oneOf": [NAME, {"type": "string"}]}, "oneOf"), ({"type": "orange"}, "orange"), ({"required": "a"}, "required"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"), ({"enum": []}, "Unsatisfiable"),
    ({"properties": []}, "properties"),
]


@pytest.mark.parametrize("schema, word", REFUSED, ids=str)
def test_what_cannot_be_enforced_is_named(server: LocalServer, schema: dict, word: str) -> None:
    for fields in ({"response_format": json_schema(schema)}, {"structured_outputs": {"json": schema}},
                   {"tools": [tool("f", None), tool("g", record(x=schema))], "tool_choice": "required"}):
        for streams in (False, True):
            response = ask(server, stream=streams, **fields)
            error = response.json()["error"]
            assert response.status_code == 400 and error["code"] == "invalid_grammar" and (
                word in error["message"] or "tools" in fields and "unsatisfiable" in error["message"]), error
            assert error["param"] in ("response_format", "structured_outputs.json", "tools[1].function.parameters")
    server.assert_idle()


@pytest.mark.parametrize("fields, param", [
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": r"(a)\1"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
    ({"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
    ({"response_format": json_schema({"enum": ["x" * 100] * 3000})}, "response_format"),
    ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs.regex"),
], ids=lambda value: str(value)[:70])
def test_bad_grammars(server: LocalServer, fields: dict, param: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize("size", [30_000, 3_000_000])
def test_a_grammar_of_blank_lines_holds_up_nobody(server: LocalServer, size: int) -> None:
    start = time.monotonic()
    response = ask(server, structured_outputs={"grammar": "\n" * size})
    assert response.status_code == 400 and response.json()["error"]["param"] == "structured_outputs.grammar", response.text
    assert time.monotonic() - start < 2


def test_schemas_too_deep_to_write_are_the_clients_error(server: LocalServer) -> None:
    """Somewhere between what can be compiled and what cannot even be read."""
    for depth in range(960, 1000):
        schema = '{"a":' * depth + "{}" + "}" * depth
        body = f'{{"messages": {json.dumps(QUESTION)}, "structured_outputs": {{"json": {schema}}}}}'
        response = http.post(server.url + "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, (depth, response.text)


def tool(name: str, parameters: dict | None) -> dict:
    return {"type": "function", "function": {"name": name, **({} if parameters is None else {"parameters": parameters})}}


def chain(length: int, link: dict | None = None) -> dict:
    """Return a schema whose definitions refer to each other in a row."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **(link or {})} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}}


@pytest.mark.parametrize("schema", [chain(3000), chain(3000, {"title": "a"}), {"$ref": "#/$defs/d0", "$defs": {
    f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(2000)} | {"d2000": {}}}],
    ids=["references", "with titles", "objects"])
def test_long_chains_of_definitions_do_not_end_the_process(schema: dict, server: LocalServer) -> None:
    """llguidance recurses over them, which took more stack than a thread usually has."""
    assert ask(server, max_tokens=4, response_format=json_schema(schema)).status_code in (200, 400)
    assert ask(server, max_tokens=4).status_code == 200


@pytest.mark.parametrize("multiple", [123456789, 0.123456789, 1e9])
def test_large_multiples_are_refused(multiple: float, server: LocalServer) -> None:
    response = ask(server, response_format=json_schema({"type": "number", "multipleOf": multiple}))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "response_format") and "multipleOf" in error["message"]


@pytest.mark.parametrize("choices", [["a", "ab"], ["\x7f"], [f"word {i}" for i in range(5000)]], ids=["prefix", "DEL", "many"])
def test_choices_of_any_kind_and_number(choices: list[str], server: LocalServer) -> None:
    response = ask(server, structured_outputs={"choice": choices})
    assert response.status_code == 200 and response.json()["choices"][0]["message"]["content"] in choices, response.text


async def test_no_more_compilations_than_may_be_given_up(exact: serve.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes too long cannot be stopped: beside as many as may be so, others are asked to come again."""
    monkeypatch.setattr(serve, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(serve, "MAX_COMPILING", 2)
    grammars, release = serve.Grammars(exact.model), threading.Event()
    for status in (400, 400, 429):
        with pytest.raises(serve.APIError) as refusal:
            await grammars.add("text", release.wait, "field")
        assert refusal.value.status == status
    release.set()
    while grammars.compiling:
        await trio.sleep(0.01)
    await grammars.add("text", lambda: "compiled", "field")
    assert grammars.compiled["text"] == "compiled"


def test_logprobs_are_of_the_raw_logits(server: LocalServer) -> None:
    fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 3}
    free, bound = (ask(server, **fields, **extra).json()["choices"][0]["logprobs"]["content"]
                   for extra in ({}, {"structured_outputs": {"choice": ["Zebra crossing"]}}))
    assert bound[0]["top_logprobs"] == free[0]["top_logprobs"] and bound[0]["token"] != free[0]["token"]
    assert bound[0]["logprob"] < free[0]["top_logprobs"][-1]["logprob"]


@pytest.mark.parametrize("fields, text, reason", [
    ({"structured_outputs": {"regex": "a+"}, "min_tokens": 9, "max_tokens": 9}, "a{9,}", "length"),
    ({"structured_outputs": {"regex": "a+"}, "ignore_eos": True, "max_tokens": 9}, "a+", "length"),
    ({"structured_outputs": {"choice": ["ab"]}, "min_tokens": 9}, "ab", "stop"),
    ({"structured_outputs": {"choice": ["abc def"]}, "stop": ["c d"]}, "ab", "stop"),
    ({"structured_outputs": {"choice": ["Rome"]}, "logit_bias": {"2": 100, "504": 100}}, "Rome", "stop"),
    ({"structured_outputs": {"choice": ["Rome"]}, "presence_penalty": 2, "repetition_penalty": 3.0}, "Rome", "stop"),
    ({"structured_outputs": {"choice": ["Rome", "Oslo"]}, "top_k": 1, "temperature": 1, "min_p": 0.9}, "Rome|Oslo", "stop"),
    ({"structured_outputs": {"regex": ""}}, "", "stop"),
], ids=str)
def test_beside_other_fields(server: LocalServer, fields: dict, text: str, reason: str) -> None:
    choice = ask(server, **fields).json()["choices"][0]
    assert re.fullmatch(text, choice["message"]["content"]) and choice["finish_reason"] == reason, choice


def test_no_token_left_is_the_requests_own_error(server: LocalServer) -> None:
    response = ask(server, structured_outputs={"regex": ""}, min_tokens=2)
    assert response.status_code == 400 and response.json()["error"]["code"] == "grammar_too_complex"
    server.assert_idle()


def test_others_in_the_batch_are_not_constrained(server: LocalServer) -> None:
    """Free and constrained answers that run together are each what they are alone."""
    kinds = [{}, {"structured_outputs": {"regex": "[a-z ]{10,40}"}}, {"temperature": 1, "seed": 1},
             {"response_format": json_schema(record(name=NAME)), "temperature": 1, "seed": 2}]
    requests = [{"max_tokens": 30, **kind} for kind in kinds * 3]
    alone = [at_once([fields], server)[0]["choices"] for fields in requests[:4]]
    assert [answer["choices"] for answer in at_once(requests, server)] == alone * 3


# ── Below HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────


def grammar_of(part: dict) -> serve.Grammar:
    return serve.answer_grammar("preamble: \n", part, "field", [], 1)


async def test_preempted_sequences_go_on_where_they_were(exact: serve.Runner) -> None:
    """Blocks for a third of them: the answers are those of an engine with room for all."""
    tokenizer, answers = exact.model.tokenizer, []
    preempted: list[serve.Sequence] = []
    prompts = [serve.Prompt(tokenizer.encode(f"{i} and {i}: ")) for i in range(6)]
    for num_blocks in (None, 24):
        async with running(exact, num_blocks=num_blocks, max_batch_tokens=32) as engine:
            grammar = await engine.grammars.compile(grammar_of(serve.json_part(items(record(name=NAME, age=SMALL), 2, 2))))
            preempt = engine.scheduler.preempt
            engine.scheduler.preempt = lambda seq, preempt=preempt: (preempted.append(seq), preempt(seq))
            sampling = serve.SamplingParams(temperature=1.0, seed=5, max_tokens=90, grammar=grammar,
                                            stop_token_ids=engine.model.eos_token_ids)
            found = await collect(engine.submit(prompts, sampling))
            answers.append([tokenizer.decode([token.id for token in tokens]) for tokens in found])
            assert bool(preempted) == bool(num_blocks)
    assert answers[0] == answers[1]
    for text in answers[0]:
        jsonschema.validate(json.loads(text), items(record(name=NAME, age=SMALL), 2, 2))


async def test_a_mask_is_what_the_grammar_lets_follow(exact: serve.Runner) -> None:
    """Asked token by token, of a vocabulary that is neither the tokenizer's nor a multiple of eight."""
    model = dataclasses.replace(exact.model, vocab_size=exact.model.vocab_size + 3)
    matcher = await serve.Grammars(model).compile(grammar_of(serve.json_part(record(name=NAME, ok=YES))))
    ids = model.tokenizer.encode('{"name": "A", "ok": tr', add_special_tokens=False)
    for id in ids:
        follower = matcher.deep_copy()
        rows = serve.allowed_tokens([SimpleNamespace(matcher=matcher), SimpleNamespace(matcher=follower)],
                                    torch.zeros(2, model.vocab_size))
        assert rows.shape == (2, model.vocab_size) and torch.equal(rows[0], rows[1]) and rows[0, id]
        sample = {*rows[0].nonzero()[:50, 0].tolist(), *range(0, model.vocab_size - 3, 997)}
        assert all(rows[0, token] == (matcher.validate_tokens([token]) == 1) for token in sample)
        assert matcher.consume_token(id)


async def test_compiled_once_and_kept(exact: serve.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled, compile_grammar = serve.Grammars(exact.model), [], serve.compile_grammar
    monkeypatch.setattr(serve, "GRAMMARS_KEPT", 3)
    monkeypatch.setattr(serve, "compile_grammar", lambda *args: (compiled.append(args), compile_grammar(*args))[1])
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(grammars.compile, grammar_of(serve.choice_part(["a"])))
    assert len(compiled) == 1
    for choice in "bcdad":
        await grammars.compile(grammar_of(serve.choice_part([choice])))
    assert len(compiled) == 5 and len(grammars.compiled) == 3  # "a" had to go, "d" did not


async def test_a_compilation_that_takes_too_long_is_given_up(exact: serve.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, end = serve.Grammars(exact.model), threading.Event()
    monkeypatch.setattr(serve, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(serve, "compile_grammar", lambda *_: end.wait(10))
    with trio.fail_after(2), pytest.raises(serve.APIError) as caught:
        await grammars.compile(grammar_of(serve.choice_part(["a"])))
    end.set()
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "grammar_too_complex", "field")
    monkeypatch.undo()
    assert not (await grammars.compile(grammar_of(serve.choice_part(["a"])))).is_error()


def test_streams_go_on_while_a_grammar_compiles(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compilation takes a second, of which a stream gets its tokens all along; its thread yields to the others."""
    arrived, nice, done = [], [], threading.Event()

    def slow(*_: object) -> None:
        nice.append(serve.os.getpriority(serve.os.PRIO_PROCESS, threading.get_native_id()))
        start = time.monotonic()
        time.sleep(1)
        done.times = (start, time.monotonic())
        raise serve.APIError(400, "enough", "invalid_grammar", "response_format")

    monkeypatch.setattr(serve, "compile_grammar", slow)

    def follow() -> None:
        body = {"messages": QUESTION, "stream": True, "max_tokens": 150, "ignore_eos": True}
        with http.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                arrived.append((time.monotonic(), line))

    thread = threading.Thread(target=follow)
    thread.start()
    while len(arrived) < 10:
        time.sleep(0.01)
    assert ask(server, response_format=json_schema({"const": time.time()})).status_code == 400
    thread.join()
    start, end = done.times
    during = [at for at, line in arrived if start <= at <= end and line]
    assert len(during) > 10 and max(b - a for a, b in itertools.pairwise(during)) < 0.4
    assert nice == [10] or not serve.sys.platform.startswith("linux")
    server.assert_idle()


async def test_a_tokenizer_that_cannot_be_constrained(exact: serve.Runner) -> None:
    model = dataclasses.replace(exact.model, tokenizer=transformers.ByT5Tokenizer(), vocab_size=384)
    grammars = serve.Grammars(model)
    grammars.prepare()  # says so in the log
    with pytest.raises(serve.APIError, match="tokenizer cannot be constrained: Only fast") as caught:
        await grammars.compile(grammar_of(serve.choice_part(["a"])))
    assert (caught.value.status, caught.value.param) == (400, "field")


async def test_a_vocabulary_smaller_than_its_tokenizer(exact: serve.Runner) -> None:
    model = dataclasses.replace(exact.model, vocab_size=40_000)
    matcher = await serve.Grammars(model).compile(grammar_of(serve.choice_part(["a"])))
    assert serve.allowed_tokens([SimpleNamespace(matcher=matcher)], torch.zeros(1, 40_000)).shape == (1, 40_000)


# ── Reasoning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def thinker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A model of random weights whose answers start with reasoning; with logit_bias it can be made to end that."""
    folder = tmp_path_factory.mktemp("thinker")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([transformers.AddedToken(text, special=False) for text in ("<think>", "</think>")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if opens %}{{ '<think>\n' }}{% endif %}"
        "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
    tokenizer.save_pretrained(folder)
    network = transformers.LlamaForCausalLM.from_pretrained(folder)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network.save_pretrained(folder)
    with start_server(folder, str(folder)) as process:
        yield process


OPEN, CLOSE = "49152", "49153"
OPENS = pytest.mark.parametrize("fields", [
    {"chat_template_kwargs": {"opens": True}, "logit_bias": {CLOSE: 8.5}}, {"logit_bias": {OPEN: 100, CLOSE: 8.5}},
], ids=["the template opens", "the model opens"])


@OPENS
def test_the_constraint_starts_after_the_reasoning(thinker: ServerProcess, fields: dict) -> None:
    """The random reasoning ends with a likely end token; both spellings of the field carry it, streamed and not."""
    seen = 0
    for seed in range(8):
        fields = {**fields, "messages": [{"role": "user", "content": "x"}], "temperature": 1, "seed": seed, "max_tokens": 200,
                  "response_format": json_schema(record(a=SMALL, b=YES)), "n": 2}
        answer = ask(thinker, **fields).json()
        streamed = [{"content": "", "reasoning": "", "reasoning_content": ""} for _ in range(2)]
        for chunk in stream(thinker, **fields):
            for name, text in chunk["choices"][0]["delta"].items():
                if name != "role":
                    streamed[chunk["choices"][0]["index"]][name] += text
        for choice, parts in zip(answer["choices"], streamed):
            message = choice["message"]
            assert message.get("reasoning", "") == message.get("reasoning_content", "") == parts["reasoning"]
            assert parts["reasoning_content"] == parts["reasoning"] and parts["content"] == message["content"]
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(message["content"]), record(a=SMALL, b=YES))
                seen += len(message.get("reasoning", "")) > 20
    assert seen > 3


def test_without_reasoning_the_constraint_starts_at_once(thinker: ServerProcess) -> None:
    fields = {"messages": [{"role": "user", "content": "x"}], "response_format": json_schema(record(b=YES)), "max_tokens": 50}
    for extra in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"},
                  {"logit_bias": {OPEN: -100}}):
        message = ask(thinker, **fields, **extra).json()["choices"][0]["message"]
        jsonschema.validate(json.loads(message["content"]), record(b=YES))
        assert "reasoning" not in message


@OPENS
def test_calls_are_enforced_after_the_reasoning(thinker: ServerProcess, fields: dict) -> None:
    tools = [tool("f", record(a=SMALL)), tool("g", None)]
    fields = {**fields, "messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required",
              "parallel_tool_calls": False, "temperature": 1, "max_tokens": 200}
    reasons = []
    for seed in range(6):
        choice = ask(thinker, seed=seed, **fields).json()["choices"][0]
        reasons.append(choice["finish_reason"])
        if reasons[-1] == "tool_calls":
            [call] = choice["message"]["tool_calls"]
            schema = record(a=SMALL) if call["function"]["name"] == "f" else record()
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
            assert choice["message"]["content"] is None
    assert "tool_calls" in reasons and set(reasons) <= {"tool_calls", "length"}


@pytest.mark.parametrize("special", [True, False, None], ids=["special tokens", "tokens", "text"])
async def test_reasoning_in_a_grammar(checkpoint: Path, exact: serve.Runner, special: bool | None) -> None:
    """Whether the markers are tokens or not, and whoever opens: what ends it ends it, whatever was thought."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    if special is not None:
        tokenizer.add_tokens([transformers.AddedToken(text, special=special) for text in ("<think>", "</think>")])
    model = dataclasses.replace(exact.model, tokenizer=tokenizer, vocab_size=len(tokenizer))
    grammars = serve.Grammars(model)
    for opened in (True, False):
        rules = serve.preamble_rules(tokenizer, ("<think>", "</think>"), opened, "")
        matcher = await grammars.compile(serve.answer_grammar(rules, serve.json_part(record(a=SMALL)), "x", [], 1))
        start = "" if opened else "<think>"
        for text, ends in [(start + '\nSo {"a": 1}?\n</think>\n\n{"a": 5}', True), (start + "x</think>" + '{"a": 5}', True),
                           (start + '</think>{"a": 5}', True), ('{"a": 5}', not opened), (start + 'never {"a": 5}', False),
                           (start + 'x</think>never {"a": 5}', False)]:
            follower, ids = matcher.deep_copy(), tokenizer.encode(text, add_special_tokens=False)
            assert (follower.try_consume_tokens(ids) == len(ids) and follower.is_stopped()) == ends, text


async def test_gpt_oss_constrains_its_final_channel(checkpoint: Path, exact: serve.Runner) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    markers = [f"<|{name}|>" for name in ("start", "end", "message", "channel")]
    tokenizer.add_tokens([transformers.AddedToken(marker, special=True) for marker in markers])
    tokenizer.chat_template = "<|channel|>"
    model = dataclasses.replace(exact.model, tokenizer=tokenizer, vocab_size=len(tokenizer))
    form = serve.answer_form(model)
    grammar = serve.chat_grammar(model, form, serve.Prompt([], opening="<|start|>assistant"),
                                 ("response_format", serve.json_part(record(a=SMALL))), [], 1)
    matcher = await serve.Grammars(model).compile(grammar)
    final = '<|channel|>final<|message|>{"a": 5}'
    for text, ends in [(final, True), ("<|channel|>analysis<|message|>Hm {}.<|end|><|start|>assistant" + final, True),
                       ("<|channel|>final<|message|>five", False), ('{"a": 5}', False)]:
        follower, ids = matcher.deep_copy(), tokenizer.encode(text, add_special_tokens=False)
        assert (follower.try_consume_tokens(ids) == len(ids) and follower.is_stopped()) == ends, text
