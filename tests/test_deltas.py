"""Tokens become text: the same text, counts and finish reason however they arrive, and never half a character."""
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import serve
import transformers

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
    seq = serve.Sequence([1], 1, serve.SamplingParams(stop=stop), 0, b"", stream, 0)
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
