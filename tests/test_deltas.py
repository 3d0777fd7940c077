"""Tokens become text, reasoning and calls: the same however they arrive, and never half a character."""
import functools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import serve
import transformers
from answers import ANSWERS, FAMILIES, PARIS, Answer, Family

TEXTS = ["The capital of France is Paris.",
         "Olá! 👩‍👩‍👧 says 日本語, Ελλάδα and 🦜🦜🦜.", "  two\n\n\tlines ", "🦜", "ab" * 20, ""]
STOPS = [(), ("Paris",), ("f Fr", "s P"), ("🦜.",), ("語, Ελ",), ("abababab!", "baba"), ("\n",), ("nowhere",), (".",)]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def looks(tokenizer, ids: list[int], stop: tuple[str, ...], reason: str, cuts: list[int]) -> list[serve.Delta]:
    """Deliver the tokens of one answer as they are cut, the finish reason with the last; return the deltas."""
    engine = SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer), wake=lambda: None)
    stream = serve.TokenStream(engine, 1)
    sampling = serve.SamplingParams(stop=stop, stop_token_ids=frozenset({tokenizer.eos_token_id}))
    seq = serve.Sequence([1], 1, sampling, 0, b"", stream, 0)
    stream.sequences, stream.unfinished = [seq], 1
    text, found, edges = serve.Detokenizer(tokenizer, stop), [], [0, *cuts, len(ids)]
    for start, end in zip(edges, edges[1:]):
        if end == len(ids):
            seq.finish_reason = reason
        found.append(serve.delta(stream, seq, [serve.Token(id) for id in ids[start:end]], text))
        if found[-1].finish_reason:
            break
    return found


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_any_cut_gives_the_same(tokenizer, stop: tuple[str, ...], reason: str) -> None:
    choose = random.Random(0)
    for whole in TEXTS:
        ids = tokenizer.encode(whole, add_special_tokens=False) + ([tokenizer.eos_token_id] if reason == "stop" else [])
        at = min([whole.find(s) for s in stop if s in whole], default=len(whole))
        answers = set()
        for _ in range(8):
            cuts = sorted(choose.sample(range(1, len(ids)), choose.randint(0, len(ids) - 1))) if len(ids) > 1 else []
            deltas = looks(tokenizer, ids, stop, reason, cuts)
            assert "".join(delta.text for delta in deltas) == whole[:at]
            assert not any("\ufffd" in delta.text for delta in deltas)
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            tokens = [token.id for delta in deltas for token in delta.tokens]
            assert ids[:len(tokens)] == tokens
            answers.add((len(tokens), sum(delta.num_tokens for delta in deltas), deltas[-1].finish_reason))
        assert len(answers) == 1
        num_tokens, num_generated, finish_reason = answers.pop()
        if at < len(whole):  # as many tokens as it takes to see the stop string, and no more
            assert finish_reason == "stop" and num_generated == num_tokens
            seen = [s in tokenizer.decode(ids[:num_tokens]) for s in stop]
            assert any(seen) and not any(s in tokenizer.decode(ids[:num_tokens - 1]) for s in stop)
        else:
            assert (finish_reason, num_generated, num_tokens) == (reason, len(ids), len(ids) - (reason == "stop"))


def test_text_before_a_stop_string_is_not_held_back_longer_than_it_must_be(tokenizer) -> None:
    ids = tokenizer.encode("The end is near", add_special_tokens=False)
    pieces = [delta.text for delta in looks(tokenizer, ids, ("end of",), "length", list(range(1, len(ids))))]
    assert pieces == ["Th", "e ", "end is", " near"]


def test_half_a_character_is_shown_only_at_the_end(tokenizer) -> None:
    ids = tokenizer.encode("a🦜", add_special_tokens=False)
    assert len(ids) > 2
    deltas = looks(tokenizer, ids[:-1], (), "length", list(range(1, len(ids) - 1)))
    assert "".join(delta.text for delta in deltas[:-1]) == "a" and deltas[-1].text == "\ufffd"


def test_special_tokens_are_no_text(tokenizer) -> None:
    ids = [*tokenizer.encode("Hi", add_special_tokens=False), 1, 2, *tokenizer.encode(" you", add_special_tokens=False)]
    for cuts in ([], [1, 2, 3]):
        deltas = looks(tokenizer, ids, (), "length", cuts)
        assert "".join(delta.text for delta in deltas) == "Hi you" and sum(delta.num_tokens for delta in deltas) == len(ids)


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}


def model_of(family: Family, tokenizer: transformers.PreTrainedTokenizerBase | None = None) -> SimpleNamespace:
    """Return what of a model says how its answers are read."""
    if tokenizer is None:
        added = {text: id for id, text in enumerate(family.special + family.added)}
        tokenizer = SimpleNamespace(chat_template=family.template, get_added_vocab=lambda: added)
    return SimpleNamespace(tokenizer=tokenizer, network=SimpleNamespace(config=SimpleNamespace(model_type=family.model_type)))


def said(pieces: list[serve.Piece]) -> tuple[str, str, list[tuple[str, dict]]]:
    """Put pieces together as a client does: content, reasoning and calls."""
    texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.call == len(calls)
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            assert piece.call == len(calls) - 1
            calls[piece.call][1] += piece.text
    return texts["content"], texts["reasoning"], [(name, json.loads(arguments)) for name, arguments in calls]


def read_in_cuts(answer: Answer, cuts: list[int], parallel: bool = True) -> list[serve.Piece]:
    family = FAMILIES[answer.family]
    form = serve.answer_form(model_of(family))
    opening = family.opening if answer.opening is None else answer.opening
    reader = serve.Reader(serve.response_template(form, form.calls), opening, [WEATHER], parallel)
    edges = [0, *cuts, len(answer.text)]
    return [piece for start, end in zip(edges, edges[1:]) for piece in reader.read(answer.text[start:end])] + reader.read(
        "", last=True)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer.family}: {answer.text[:50]}")
def test_answers_of_families(answer: Answer) -> None:
    """What each says, whole, character by character, and in cuts of all kinds."""
    choose, length = random.Random(0), len(answer.text)
    for cuts in ([], range(min(length, 400)), *[sorted(choose.choices(range(length + 1), k=choose.randint(1, 30)))
                                               for _ in range(20)]):
        assert said(read_in_cuts(answer, list(cuts))) == (answer.content, answer.reasoning, answer.calls)


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer.calls], ids=lambda answer: answer.family)
def test_without_parallel_calls_an_answer_has_one(answer: Answer) -> None:
    for cuts in ([], list(range(len(answer.text)))):
        assert said(read_in_cuts(answer, cuts, parallel=False))[2] == answer.calls[:1]


@functools.cache
def tokenizer_of(family: Family, checkpoint: Path) -> transformers.PreTrainedTokenizerBase:
    """Return the built-in model's tokenizer with the family's tokens, and with one that has no meaning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = family.template
    for special, texts in ((True, (*family.special, "<|other|>")), (False, family.added)):
        tokenizer.add_tokens([transformers.AddedToken(text, special=special, normalized=False) for text in texts])
    return tokenizer


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if len(answer.text) < 1000],
                         ids=lambda answer: f"{answer.family}: {answer.text[:50]}")
def test_answers_of_families_as_tokens(checkpoint: Path, answer: Answer) -> None:
    """The family's own tokens among them, of which some are special: those are text only where they are markers."""
    family = FAMILIES[answer.family]
    tokenizer = tokenizer_of(family, checkpoint)
    form = serve.answer_form(model_of(family, tokenizer))
    template = serve.response_template(form, form.calls)
    hidden = serve.hidden_tokens(tokenizer, template)
    ids = tokenizer.encode(answer.text, add_special_tokens=False)
    ids.insert(len(ids) // 2, tokenizer.convert_tokens_to_ids("<|other|>"))
    opening = family.opening if answer.opening is None else answer.opening
    reader, text, pieces = serve.Reader(template, opening, [WEATHER], True), serve.Detokenizer(tokenizer, (), hidden=hidden), []
    for id in ids:
        pieces += reader.read(text.add([id]))
    pieces += reader.read(text.add([], last=True), last=True)
    assert said(pieces) == (answer.content, answer.reasoning, answer.calls)


LIVE = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'


def read_live(text: str, cuts: list[int], opening: str = "", family: str = "qwen3") -> list[list[serve.Piece]]:
    form = serve.answer_form(model_of(FAMILIES[family]))
    reader = serve.Reader(serve.response_template(form, serve.live_calls([WEATHER])), opening, [WEATHER], True)
    edges = [0, *cuts, len(text)]
    return [reader.read(text[start:end]) for start, end in zip(edges, edges[1:])] + [reader.read("", last=True)]


@pytest.mark.parametrize("before, reasoning", [("", ""), ("<think>\nI call {it}.\n</think>\n\n", "I call {it}.")])
def test_enforced_calls_are_told_as_they_come(before: str, reasoning: str) -> None:
    text = before + LIVE + "\n" + LIVE
    expected = ("", reasoning, [("get_weather", {"city": "Paris", "days": 2})] * 2)
    choose = random.Random(0)
    for _ in range(40):
        cuts = sorted(choose.choices(range(len(text) + 1), k=choose.randint(0, 60)))
        assert said([piece for look in read_live(text, cuts) for piece in look]) == expected
    looks = read_live(LIVE, list(range(len(LIVE))))
    first = next(i for i, look in enumerate(looks) if look)
    assert looks[first] == [serve.Piece("call", "get_weather", 0), serve.Piece("arguments", "{", 0)]
    assert first == LIVE.index("{", 1) + 1
    assert all(look and look[0].kind == "arguments" for look in looks[first + 1:-3])  # one for each character


@pytest.mark.parametrize("end", range(len(LIVE)))
def test_an_enforced_call_that_is_cut_off_keeps_what_came(end: int) -> None:
    pieces = [piece for look in read_live(LIVE[:end], []) for piece in look]
    start = LIVE.index("{", 1)
    if end < start:
        assert pieces == ([serve.Piece("content", LIVE[:end])] if end else [])
    else:
        assert LIVE[start:end].startswith("".join(piece.text for piece in pieces[1:])) and pieces[0].kind == "call"


@pytest.mark.parametrize("family", ["qwen3", "function gemma", "gpt-oss"])
def test_white_space_without_end_holds_up_nobody(family: str) -> None:
    form = serve.answer_form(model_of(FAMILIES[family]))
    reader = serve.Reader(serve.response_template(form, form.calls), "", [WEATHER], True)
    text, start = " \n\n\n" * 1000, time.time()
    pieces = [piece for cut in (text, "x", text) for piece in reader.read(cut)] + reader.read("", last=True)
    assert said(pieces) == (text + "x" + text, "", []) and time.time() - start < 2


def test_nothing_is_read_where_there_is_nothing_to_read() -> None:
    form = serve.answer_form(model_of(FAMILIES["no template for tools"]))
    assert form.markers is None and serve.response_template(form, {}) is None
    form = serve.answer_form(model_of(FAMILIES["qwen2"]))  # its family reasons, it does not
    assert form.markers is None and serve.response_template(form, {}) is None
    assert serve.hidden_tokens(None, None) is None


def test_a_response_template_of_the_tokenizers_own_goes_first() -> None:
    model = model_of(FAMILIES["qwen3"])
    model.tokenizer.response_template = {"start_anchor": "<go>", "fields": {
        "thinking": {"open": "<<", "close": ">>", "optional": False}, "content": {"content": "text"},
        "tool_calls": {"open_pattern": r"CALL (?P<name>\w+)", "close": "END", "content": "kv-lines", "repeats": True,
                       "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}}}}
    model.tokenizer.chat_template = "{{ '<<' + thoughts + '>>' }}"
    form = serve.answer_form(model)
    assert form.markers == ("<<", ">>")
    reader = serve.Reader(serve.response_template(form, form.calls), "", [WEATHER], True)
    pieces = reader.read("<<hm>>So: CALL get_weather\ncity: Paris\nEND") + reader.read("", last=True)
    assert said(pieces) == ("So: ", "hm", [PARIS])
