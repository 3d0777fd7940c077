"""The engine: answers depend on nothing but the request, whoever leaves frees everything, and text is whole characters."""
import dataclasses
import functools
import gc
import hashlib
import random
import types
import weakref
from collections.abc import Callable

import pytest
import serve
import tokenizers
import torch
import transformers
import trio
import trio.testing
from conftest import collect, running

Params = serve.SamplingParams
EOS = 0


class TokenCacheRunner:
    """A model in microseconds: its cache holds tokens, and the next token is a hash of what it reads there."""

    paged, block_size, vocab = True, 4, 50

    def __init__(self, max_model_len: int = 40) -> None:
        self.model = types.SimpleNamespace(id="fake", max_model_len=max_model_len, vocab_size=1000)
        self.cache: dict[int, int] = {}  # slot → token
        self.last, self.chosen = torch.zeros(1), None

    def keep(self, chosen: torch.Tensor) -> None:
        self.last = chosen

    def lay_out(self, batch: serve.Batch, points: list[float]) -> list[tuple]:
        """Return of each sequence the slots up to this step's end, the new tokens, and how many tokens are before each row."""
        laid_out = []
        for seq, count in batch.items():
            end = seq.num_computed_tokens + count
            slots = [seq.block_table[p // 4] * 4 + p % 4 for p in range(end)]
            new = [seq.token_ids[p] if p < len(seq.token_ids) else ~seq.row for p in range(seq.num_computed_tokens, end)]
            laid_out.append((slots, new, [end] * (seq in serve.sampled(batch)), list(seq.scored(count))))
        return laid_out

    def forward(self, batch: list[tuple], meanwhile: Callable[[], None]) -> torch.Tensor:
        """Return logits [samples, vocab]; every token is written before any is read."""
        meanwhile()
        for slots, new, _, _ in batch:
            self.cache |= {slot: id if id >= 0 else int(self.last[~id]) for slot, id in zip(slots[-len(new):], new)}
        rows = [(slots, end) for slots, _, ends, _ in batch for end in ends]
        rows += [(slots, p) for slots, _, _, scored in batch for p in scored]
        ids = [next_token([self.cache[slot] for slot in slots[:end]]) for slots, end in rows]
        return torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.int64), self.vocab).float() * 9


def next_token(token_ids: list[int]) -> int:
    digest = hashlib.blake2b(bytes(id % 256 for id in token_ids), digest_size=2).digest()
    return int.from_bytes(digest) % TokenCacheRunner.vocab


def follow(prompt: list[int], length: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """Return the answer of a `TokenCacheRunner`, by definition."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (len(ids) == len(prompt) or ids[-1] not in stop):
        ids.append(next_token(ids))
    return ids[len(prompt):]


def inline(function: Callable[[], None]) -> None:
    function()


def make_engine(num_blocks: int = 64, max_batch_tokens: int = 8, max_running: int = 8, thread=inline, max_model_len: int = 40,
                **settings: object) -> serve.Engine:
    runner = TokenCacheRunner(max_model_len)
    scheduler = serve.Scheduler(serve.BlockPool(num_blocks, 4), max_batch_tokens, max_running)
    return serve.Engine(runner.model, runner, scheduler, thread, serve.Config(**settings))


def assert_all_free(engine: serve.Engine) -> None:
    pool = engine.scheduler.pool
    assert engine.scheduler.idle and len(pool.free) == pool.num_blocks - 1 and not any(pool.references)


def failing(engine: serve.Engine, fails: Callable[[serve.Batch], Exception | None]) -> None:
    """Let some batches fail, before anything is written or after."""
    start, run_step, errors = engine.start, engine.run_step, {}

    def marked(batch: serve.Batch, *options: object, **others: object) -> serve.Step:
        errors[id(batch)] = batch, fails(batch)
        return start(batch, *options, **others)

    def partly(step: serve.Step, meanwhile: Callable[[], None]) -> Callable[[], tuple]:
        _, error = errors[id(step.batch)]
        if isinstance(error, MemoryError):
            run_step(step, lambda: None)
        if error:
            raise error
        return run_step(step, meanwhile)

    engine.start, engine.run_step = marked, partly


def ids(tokens: list[serve.Token]) -> list[int]:
    return [token.id for token in tokens]


# Answers: the real model, in float32.

STORY = "Once upon a time there was a little girl who lived near a dark forest. Her grandmother had given her a red hood, and "


def prompts(model: serve.Model, count: int) -> list[serve.Prompt]:
    return [serve.Prompt(model.tokenizer(f"{STORY[:11 * i % 117]} The number {i} is")["input_ids"]) for i in range(count)]


async def test_sixteen_together_are_as_each_alone(exact: serve.Runner) -> None:
    batch = prompts(exact.model, 16)
    async with running(exact, max_batch_tokens=48) as engine:
        together = await collect(engine.submit(batch, Params(max_tokens=6)))
    for prompt, answer in zip(batch, together):
        async with running(exact) as engine:
            assert await collect(engine.submit([prompt], Params(max_tokens=6))) == [answer]


async def test_preempted_or_not(exact: serve.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = []
    preempt = serve.Scheduler.preempt
    monkeypatch.setattr(serve.Scheduler, "preempt", lambda self, seq: (preempted.append(seq), preempt(self, seq)))
    batch, sampling = prompts(exact.model, 4), Params(max_tokens=14)
    async with running(exact) as engine:
        expected = await collect(engine.submit(batch, sampling))
    assert not preempted
    blocks = 2 + sum(-(-len(prompt.token_ids) // 8) for prompt in batch)
    async with running(exact, num_blocks=blocks) as engine:
        assert await collect(engine.submit(batch, sampling)) == expected
    assert preempted


async def test_a_cached_prefix_changes_nothing(exact: serve.Runner) -> None:
    tokens = exact.model.tokenizer(STORY)["input_ids"]
    first, second = serve.Prompt(tokens), serve.Prompt([*tokens[:20], *tokens[:9]])
    answers, cached = {}, {}
    async with running(exact) as engine:
        for name, prompt in (("miss", first), ("hit", first), ("half", second), ("salted", serve.Prompt(tokens, b"salt"))):
            stream = engine.submit([prompt], Params(max_tokens=6))
            answers[name] = await collect(stream)
            cached[name] = stream.sequences[0].num_cached_tokens
        again = serve.Prompt(first.token_ids + ids(answers["miss"][0]) + [5])
        stream = engine.submit([again], Params(max_tokens=6))
        answers["turn"] = await collect(stream)
    assert cached == {"miss": 0, "hit": (len(tokens) - 1) // 8 * 8, "half": 16, "salted": 0}
    assert stream.sequences[0].num_cached_tokens == (len(tokens) + 5) // 8 * 8  # of the answer too, but for its last token
    assert answers["miss"] == answers["hit"] == answers["salted"]
    for name, prompt in (("half", second), ("turn", again)):
        async with running(exact) as engine:
            assert await collect(engine.submit([prompt], Params(max_tokens=6))) == answers[name]


async def test_sampled_answers_do_not_depend_on_company(exact: serve.Runner) -> None:
    hot = Params(max_tokens=6, temperature=1.0, top_p=0.95, seed=11)
    prompt, *others = prompts(exact.model, 5)
    async with running(exact) as engine:
        answers = await collect(engine.submit([prompt], hot, n=3))
        assert len({tuple(ids(answer)) for answer in answers}) == 3
        assert await collect(engine.submit([prompt], dataclasses.replace(hot, seed=12))) == answers[1:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, engine.submit(others, Params(max_tokens=6)))
            assert await collect(engine.submit([prompt], hot, n=3)) == answers


# Bookkeeping: the model in microseconds.


@pytest.mark.parametrize("flaky", [0, 0.15])
@pytest.mark.parametrize("seed", range(12))
async def test_random_lives(seed: int, flaky: float) -> None:
    """Whatever comes, leaves, fails, is preempted or shared, what is answered is right, and what is held is freed."""
    rng = random.Random(seed)
    thread = serve.EngineThread(1) if seed % 2 else inline
    engine = make_engine(rng.randint(8, 24), rng.randint(1, 12), rng.randint(1, 6), max_model_len=28, thread=thread)
    longest, failures = engine.max_len, random.Random(seed)
    failing(engine, lambda batch: failures.choice([ZeroDivisionError(), MemoryError()]) if (
        failures.random() < flaky and all(seq.stream for seq in batch)) else None)

    async def live() -> None:
        for _ in range(rng.randint(0, 15)):
            await trio.lowlevel.checkpoint()
        stem = [7] * rng.randint(0, longest - 4)
        batch = [serve.Prompt([*stem, rng.randrange(3)]) for _ in range(rng.randint(1, 2))]
        n, wanted = rng.randint(1, 3), rng.randint(1, 12)
        patience = rng.choice([0, 3, 1000, 1000])
        score = rng.choice([None, None, 0, 2])
        stream = engine.submit(batch, Params(max_tokens=wanted, stop_token_ids=frozenset({EOS}), logprobs=score,
                                             score_prompt=score is not None), n)
        answers: list[list[int]] = [[] for _ in stream.sequences]
        async with stream:
            async for seq, tokens in stream:
                answers[seq.index] += ids(tokens)
                if (patience := patience - 1) < 0:
                    break
        for i, answer in enumerate(answers):
            prompt = batch[i // n].token_ids
            failed = stream.sequences[i].error is not None
            if score is not None and (answer or patience >= 0) and not failed:
                scores = sum(stream.sequences[i].scores, [])
                assert ids(scores) == prompt and [token.logprob > -1 for token in scores[1:]] == [
                    prompt[p] == next_token(prompt[:p]) for p in range(1, len(prompt))]
            expected = follow(prompt, min(wanted, longest - len(prompt)), frozenset({EOS}))
            assert answer == (expected if patience >= 0 and not failed else expected[:len(answer)])
            if failed:
                assert flaky and stream.sequences[i].finish_reason == "error"
            elif patience >= 0:
                assert stream.sequences[i].finish_reason == ("stop" if expected[-1] == EOS else "length")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            async with trio.open_nursery() as lives:
                for _ in range(40):
                    lives.start_soon(live)
            while not engine.scheduler.idle:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    assert_all_free(engine)


# The next step is on its way when a step's tokens are delivered.


def count_rows(engine: serve.Engine) -> list[int]:
    """Return a list to which every step adds how many tokens it computes."""
    counts, forward = [], engine.runner.forward
    engine.runner.forward = lambda batch, meanwhile: (counts.append(sum(len(new) for _, new, _, _ in batch)),
                                                      forward(batch, meanwhile))[1]
    return counts


async def test_an_end_that_is_foreseen_wastes_no_row() -> None:
    engine = make_engine()
    counts = count_rows(engine)
    async with engine.submit([serve.Prompt([1, 2, 3])], Params(max_tokens=5)) as stream:
        await engine.step()
        for n in range(2, 6):
            assert stream.sequences[0].num_generated_tokens == n - 1
            await engine.step()
    assert stream.sequences[0].finish_reason == "length" and counts == [3, 1, 1, 1, 1] and not engine.ahead


async def test_finished_while_its_next_step_is_on_its_way() -> None:
    engine = make_engine()
    counts, answer = count_rows(engine), follow([1, 2, 3], 6)
    params = Params(max_tokens=20, stop_token_ids=frozenset({answer[3]}))
    async with engine.submit([serve.Prompt([1, 2, 3])], params) as stream:
        for _ in range(4):
            await engine.step()
        (seq,) = stream.sequences
        assert seq.finish_reason == "stop" and engine.ahead and seq.block_table
        await engine.step()
        assert (ids(seq.arrived), counts) == (answer[:4], [3, 1, 1, 1, 1])
    assert_all_free(engine)


async def test_blocks_of_who_left_are_written_by_the_next_owner_after_the_step_on_its_way() -> None:
    engine = make_engine(num_blocks=4)  # 3 blocks of 4: there is room for one of them only
    async with engine.submit([serve.Prompt(list(range(7)))], Params(max_tokens=5)) as leaver:
        for _ in range(3):
            await engine.step()
        assert engine.ahead and len(leaver.sequences[0].block_table) == 3
    async with engine.submit([serve.Prompt([9] * 9)], Params(max_tokens=3)) as stream:
        for _ in range(6):
            await engine.step()
        assert ids(stream.sequences[0].arrived) == follow([9] * 9, 3)
    await engine.step()
    assert_all_free(engine)


async def test_preempted_while_its_token_is_on_its_way() -> None:
    engine = make_engine(num_blocks=5, max_batch_tokens=16)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16]]
    old, young = (engine.submit([serve.Prompt(prompt)], Params(max_tokens=8)) for prompt in prompts)
    async with old, young:
        (seq,) = young.sequences
        while seq not in engine.scheduler.waiting or not seq.token_ids[6:]:
            await engine.step()
        assert engine.ahead and seq not in engine.ahead.batch and seq.num_pending_tokens == 0 and not seq.block_table
        while not (seq.finish_reason and old.sequences[0].finish_reason):
            await engine.step()
        assert [ids(stream.sequences[0].arrived) for stream in (old, young)] == [follow(prompt, 8) for prompt in prompts]
    await engine.step()
    assert_all_free(engine)


@pytest.mark.parametrize("params, overlaps", [
    (Params(), True), (Params(temperature=1.0, top_p=0.5, seed=3), True), (Params(logit_bias={7: 5.0}), True),
    (Params(logprobs=0), False), (Params(repetition_penalty=1.1), False), (Params(presence_penalty=0.5), False),
    (Params(min_tokens=9, stop_token_ids=frozenset({EOS})), False)], ids=str)
async def test_who_is_computed_further_before_its_token_is_read(params: serve.SamplingParams, overlaps: bool) -> None:
    engine = make_engine()
    async with engine.submit([serve.Prompt([1, 2, 3])], params):
        await engine.step()
        assert not engine.ahead
        for _ in range(3):
            await engine.step()
            assert bool(engine.ahead) == overlaps
    await engine.step()
    assert_all_free(engine)


@pytest.mark.parametrize("params", [Params(temperature=1.0, seed=3), Params(temperature=1.5, seed=8, top_k=20)], ids=str)
async def test_answers_are_the_same_ahead_or_not(params: serve.SamplingParams, exact: serve.Runner,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> list[list[serve.Token]]:
        async with running(exact) as engine:
            return await collect(engine.submit(prompts(exact.model, 3), dataclasses.replace(params, max_tokens=8)))

    ahead = await answer()
    monkeypatch.setattr(serve, "needs_tokens", lambda seq: True)
    assert await answer() == ahead


async def test_a_block_that_a_pending_token_fills_is_shared_once_it_is_known() -> None:
    engine = make_engine()
    prompt = [1, 2, 3]
    async with engine.submit([serve.Prompt(prompt)], Params(max_tokens=8)) as stream:
        await engine.step()
        await engine.step()  # the fourth token is computed, the step that computes the fifth is on its way
        assert engine.ahead and engine.scheduler.pool.cached == {serve.block_hash(b"", stream.sequences[0].token_ids[:4]): 1}


async def test_a_crash_amid_the_step_that_is_ahead() -> None:
    """The step before it is delivered."""
    engine = make_engine()
    forwards = iter([engine.runner.forward] * 2)
    engine.runner.forward = lambda *batch: next(forwards, lambda *_: 1 / 0)(*batch)
    async with engine.submit([serve.Prompt([1, 2, 3])], Params(max_tokens=8)) as stream:
        await engine.step()
        await engine.step()
        assert ids(stream.sequences[0].arrived) == follow([1, 2, 3], 2)
        with pytest.raises(ZeroDivisionError):
            await engine.step()


async def test_answers_to_one_prompt_share_its_blocks() -> None:
    engine = make_engine(max_batch_tokens=100)
    stream = engine.submit([serve.Prompt(list(range(11)))], Params(max_tokens=9), n=4)
    async with stream:
        await engine.step()
        tables = [seq.block_table for seq in stream.sequences]
        assert all(table[:2] == tables[0][:2] for table in tables) and len({table[2] for table in tables}) == 4
        assert engine.scheduler.pool.num_blocks - 1 - len(engine.scheduler.pool.free) == 2 + 4
        assert [seq.num_cached_tokens for seq in stream.sequences] == [0, 8, 8, 8]
    await engine.step()
    assert_all_free(engine)


@pytest.mark.parametrize("phase, steps", [("queued", 0), ("prefill", 1), ("between chunks", 2), ("decode", 6)])
async def test_leaving_frees_everything_within_a_step(phase: str, steps: int) -> None:
    engine = make_engine(max_batch_tokens=4)
    stream = engine.submit([serve.Prompt(list(range(15)))], Params(max_tokens=20))
    async with stream:
        for _ in range(steps):
            await engine.step()
        (seq,) = stream.sequences
        assert (seq.num_generated_tokens > 0) == (phase == "decode") and bool(seq.block_table) == (steps > 0)
    await engine.step()
    assert_all_free(engine)


async def test_leaving_while_others_hold_the_batch() -> None:
    engine = make_engine(max_running=1)
    busy, queued = (engine.submit([serve.Prompt([i, i])], Params(max_tokens=20)) for i in (1, 2))
    async with busy:
        await engine.step()
        async with queued:
            await engine.step()
            assert queued.sequences[0] in engine.scheduler.waiting
        await engine.step()
        assert not engine.scheduler.waiting and busy.sequences[0] in engine.scheduler.running
    await engine.step()
    assert_all_free(engine)


async def test_leaving_during_the_forward_pass() -> None:
    jobs = []
    engine = make_engine(thread=jobs.append)
    async with trio.open_nursery() as nursery:
        async with engine.submit([serve.Prompt([1, 2, 3])], Params(max_tokens=5)) as stream:
            nursery.start_soon(engine.step)
            await trio.testing.wait_all_tasks_blocked()
        for job in jobs:
            job()
    assert stream.sequences[0].arrived == []
    await engine.step()
    assert_all_free(engine)


async def test_a_cancelled_request_leaves() -> None:
    engine = make_engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        with trio.move_on_after(0.05) as scope:
            async with engine.submit([serve.Prompt([1])], Params()) as stream:
                await trio.sleep_forever()
        assert scope.cancelled_caught and stream.closed
        await trio.sleep(0.05)
        assert_all_free(engine)
        nursery.cancel_scope.cancel()


async def test_a_stream_that_nobody_enters_holds_no_block() -> None:
    engine = make_engine(max_queue=5)
    streams = [engine.submit([serve.Prompt([1])], Params()) for _ in range(5)]
    await engine.step()
    assert_all_free(engine)
    assert not any(seq.block_table for stream in streams for seq in stream.sequences)


async def test_what_arrives_before_a_look_comes_at_once() -> None:
    engine = make_engine()
    stream = engine.submit([serve.Prompt([1, 2])], Params(max_tokens=6))
    async with stream:
        for _ in range(4):
            await engine.step()
        (seq, first) = await anext(stream)
        for _ in range(4):
            await engine.step()
        (_, rest) = await anext(stream)
        assert seq.finish_reason == "length"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert (len(first), ids(first) + ids(rest)) == (4, follow([1, 2], 6))
    await engine.step()
    assert_all_free(engine)


async def test_order_of_prompts_and_answers() -> None:
    engine = make_engine(max_running=16)
    stream = engine.submit([serve.Prompt([1]), serve.Prompt([2])], Params(max_tokens=1), n=2)
    assert [(seq.index, seq.token_ids) for seq in stream.sequences] == [(0, [1]), (1, [1]), (2, [2]), (3, [2])]


# Where an answer ends.


@pytest.mark.parametrize("sampling, ends", [
    (Params(stop_token_ids=frozenset({1000})), None),
    (Params(max_tokens=3), 3),
    (Params(max_tokens=30), None),
    (Params(max_tokens=1000), None),
])
async def test_length(sampling: serve.SamplingParams, ends: int | None) -> None:
    engine = make_engine(max_model_len=20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        stream = engine.submit([serve.Prompt([5, 6, 7])], sampling)
        (answer,) = await collect(stream)
        nursery.cancel_scope.cancel()
    assert ids(answer) == follow([5, 6, 7], ends or 17) and stream.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [0, 4])
async def test_stop_tokens_and_min_tokens(min_tokens: int) -> None:
    prompt = [5, 6, 7]
    answer = follow(prompt, 12)
    stop = frozenset({answer[2]})
    engine = make_engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        stream = engine.submit([serve.Prompt(prompt)], Params(max_tokens=12, min_tokens=min_tokens, stop_token_ids=stop))
        (got,) = await collect(stream)
        nursery.cancel_scope.cancel()
    if min_tokens == 0:
        assert ids(got) == answer[:3] and stream.sequences[0].finish_reason == "stop"
    else:  # the most likely token that does not stop comes instead
        assert ids(got)[:2] == answer[:2] and not stop & set(ids(got)[:4]) and len(got) >= 4


async def test_nothing_but_scores() -> None:
    engine = make_engine()
    prompt, stop = [5, 6, 7], frozenset({next_token([5, 6, 7])})
    stream = engine.submit([serve.Prompt(prompt)], Params(max_tokens=0, logprobs=0, score_prompt=True, stop_token_ids=stop))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        assert await collect(stream) == [[]]
        nursery.cancel_scope.cancel()
    (seq,) = stream.sequences
    assert (seq.finish_reason, ids(sum(seq.scores, []))) == ("length", prompt)
    engine.scheduler.drop_ended()
    assert_all_free(engine)


async def test_who_leaves_amid_a_step_still_scores_what_others_share() -> None:
    engine = make_engine(max_batch_tokens=100)
    prompt, params = serve.Prompt(list(range(11))), Params(max_tokens=1, logprobs=0, score_prompt=True)
    engine.thread = lambda function: (leaver.__setattr__("closed", True), function())
    async with engine.submit([prompt], params) as leaver, engine.submit([prompt], params) as stayer:
        await engine.step()
    assert stayer.sequences[0].num_shared_tokens == 8
    assert ids(sum(stayer.sequences[0].scores, [])) == prompt.token_ids


async def test_scores_do_not_depend_on_the_cache(exact: serve.Runner) -> None:
    """A hit neither changes a number nor omits one; what a cached block holds is the number that was computed."""
    tokens = exact.model.tokenizer(STORY)["input_ids"]
    params = Params(max_tokens=1, logprobs=2, score_prompt=True)
    prompts = [tokens, tokens, [*tokens[:16], *tokens[3:9]], tokens[:17], tokens[:16], tokens[:8], tokens[:1]]
    expected = []
    for prompt in prompts:
        async with running(exact) as engine:
            await collect(stream := engine.submit([serve.Prompt(prompt)], params))
            expected.append(sum(stream.sequences[0].scores, []))
    cached = []
    async with running(exact, max_batch_tokens=20) as engine:
        await collect(engine.submit([serve.Prompt(tokens)], Params(max_tokens=1)))  # without scores
        for prompt, wanted in zip(prompts, expected):
            await collect(stream := engine.submit([serve.Prompt(prompt)], params))
            found = sum(stream.sequences[0].scores, [])
            cached.append(stream.sequences[0].num_cached_tokens)
            assert ids(found) == prompt
            for one, other in zip(found[1:], wanted[1:]):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4) and ids_of(one.top) == ids_of(other.top)
    assert cached == [0, (len(tokens) - 1) // 8 * 8 - 1, 15, 15, 7, 0, 0]


def ids_of(top: tuple[tuple[int, float], ...]) -> list[int]:
    return [id for id, _ in top]


async def test_the_end_of_sequence_stops_only_where_it_is_asked_to(exact: serve.Runner) -> None:
    model = exact.model
    prompt = serve.render_chat(model, [{"role": "user", "content": "What is the capital of France?"}], False, {})
    async with running(exact) as engine:
        stops, ignores = (engine.submit([prompt], Params(max_tokens=15, stop_token_ids=stop)) for stop in (model.eos_token_ids,
                                                                                                         frozenset()))
        (stopped,), (ignored,) = await collect(stops), await collect(ignores)
    assert stopped[-1].id in model.eos_token_ids and stops.sequences[0].finish_reason == "stop"
    assert model.tokenizer.decode(ids(stopped[:-1])) == "The capital of France is Paris."
    assert ignored[:len(stopped)] == stopped and len(ignored) == 15 and ignores.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("max_model_len, num_blocks, max_len", [(20, 64, 20), (400, 6, 20)], ids=["model", "cache"])
async def test_the_longest_prompt(max_model_len: int, num_blocks: int, max_len: int) -> None:
    engine = make_engine(num_blocks, max_model_len=max_model_len)
    assert engine.max_len == max_len
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        stream = engine.submit([serve.Prompt([3] * (max_len - 1))], Params(logprobs=0, score_prompt=True))
        assert [ids(answer) for answer in await collect(stream)] == [follow([3] * (max_len - 1), 1)]
        assert stream.sequences[0].finish_reason == "length" and len(sum(stream.sequences[0].scores, [])) == max_len - 1
        nursery.cancel_scope.cancel()
    for length in (max_len, max_len + 1):
        with pytest.raises(serve.APIError) as refusal:
            engine.submit([serve.Prompt([1]), serve.Prompt([3] * length)], Params())
        assert (refusal.value.status, refusal.value.code) == (400, "context_length_exceeded")
        assert str(max_len) in refusal.value.message and str(length) in refusal.value.message


async def test_an_empty_prompt() -> None:
    with pytest.raises(serve.APIError) as refusal:
        make_engine().submit([serve.Prompt([])], Params())
    assert refusal.value.status == 400


async def test_a_full_queue() -> None:
    engine = make_engine(max_running=1, max_queue=2)
    async with engine.submit([serve.Prompt([1])], Params()):
        await engine.step()  # runs, and leaves the queue
        async with engine.submit([serve.Prompt([1])], Params(), n=2):
            with pytest.raises(serve.APIError) as refusal:
                engine.submit([serve.Prompt([1])], Params())
            assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
        await engine.step()
        engine.submit([serve.Prompt([1])], Params())


async def test_who_was_let_in_has_a_place_in_the_queue() -> None:
    """However long it takes to enter; who never does gives it back."""
    engine = make_engine(max_running=1, max_queue=2)
    streams = [engine.submit([serve.Prompt([1])], Params()) for _ in range(2)]
    for _ in range(3):
        with pytest.raises(serve.APIError, match="try again"):
            engine.submit([serve.Prompt([1])], Params())
    async with streams.pop():
        with pytest.raises(serve.APIError, match="try again"):
            engine.submit([serve.Prompt([1])], Params())
        streams.clear()
        gc.collect()
        async with engine.submit([serve.Prompt([1])], Params()):
            assert len(engine.scheduler.waiting) == 2


async def test_a_dropped_engine_takes_nobody() -> None:
    engine = make_engine()
    stream = engine.submit([serve.Prompt([1])], Params())
    engine.stopped = True
    with pytest.raises(serve.APIError) as refusal:
        await stream.__aenter__()
    assert refusal.value.status == 503 and engine.scheduler.idle


async def test_seeds() -> None:
    def seeds(engine: serve.Engine, sampling: serve.SamplingParams) -> list[int]:
        return [seq.seed for _ in range(3) for seq in engine.submit([serve.Prompt([1])], sampling, n=2).sequences]

    assert seeds(make_engine(default_seed=5), Params()) == seeds(make_engine(default_seed=5), Params())
    assert seeds(make_engine(), Params()) != seeds(make_engine(), Params())
    assert len(set(seeds(make_engine(), Params()))) == 6
    assert seeds(make_engine(), Params(seed=9)) == [9, 10] * 3


# The engine's thread.


async def test_the_thread() -> None:
    thread, done, seen = serve.EngineThread(1), trio.Event(), []
    for _ in range(2):
        thread(lambda: seen.append((torch.is_inference_mode_enabled(), torch.get_num_threads(), trio.lowlevel.in_trio_run())))
    thread(functools.partial(trio.lowlevel.current_trio_token().run_sync_soon, done.set))
    await done.wait()
    assert seen == [(True, 1, False)] * 2


async def test_an_idle_thread_holds_on_to_nothing() -> None:
    class Thing:
        pass

    thread, thing = serve.EngineThread(None), Thing()
    alive = weakref.ref(thing)
    thread(lambda thing=thing: thing)
    del thing
    with trio.move_on_after(2):
        while alive():
            gc.collect()
            await trio.sleep(0.01)
    assert alive() is None


async def test_a_crash_of_the_model_ends_the_engine() -> None:
    engine = make_engine()
    engine.runner.forward = lambda *_: 1 / 0
    with pytest.raises(ExceptionGroup) as crash:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            await collect(engine.submit([serve.Prompt([1])], Params()))
    assert crash.group_contains(ZeroDivisionError)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError("and it wrote before")], ids=repr)
@pytest.mark.parametrize("when", [1, 3])
async def test_who_makes_a_step_fail_fails_alone(error: Exception, when: int) -> None:
    """Those that were to share what it did not compute included; and nobody finds its blocks in the prefix cache."""
    async with running(TokenCacheRunner(), 64, max_running=8) as engine:
        failing(engine, lambda batch: next((error for seq in batch if 13 in seq.token_ids[:1]
                                            and seq.num_tokens - seq.num_prompt_tokens + 1 >= when), None))
        bad = list(range(13, 26))
        prompts = [[1, 2, 3], bad, [*bad, 1], [4, 5], [7, 8]] if when > 1 else [[1, 2, 3], bad, [4, 5], [7, 8]]
        stream = engine.submit([serve.Prompt(ids) for ids in prompts], Params(max_tokens=6))
        answers = await collect(stream)
        for prompt, answer, seq in zip(prompts, answers, stream.sequences):
            if prompt[0] != 13:
                assert [token.id for token in answer] == follow(prompt, 6) and seq.error is None
            else:
                assert len(answer) == when - 1 and seq.error.status == (400 if isinstance(error, MemoryError) else 500)
        del engine.start, engine.run_step
        for prompt in prompts:
            assert [token.id for token in (await collect(engine.submit([serve.Prompt(prompt)], Params(max_tokens=6))))[0]] == (
                follow(prompt, 6))


async def test_who_shares_what_was_not_computed_is_computed_again() -> None:
    async with running(TokenCacheRunner(), 64, max_running=8) as engine:
        common = list(range(1, 13))
        failing(engine, lambda batch: ZeroDivisionError() if any(seq.token_ids[-1] == 40 for seq in batch) else None)
        prompts = [[*common, 40], [*common, 30], [*common, 31]]
        stream = engine.submit([serve.Prompt(ids) for ids in prompts], Params(max_tokens=5))
        answers = [[token.id for token in answer] for answer in await collect(stream)]
        assert [seq.error is not None for seq in stream.sequences] == [True, False, False]
        assert answers[1:] == [follow(prompt, 5) for prompt in prompts[1:]]
        assert engine.metrics.request_success == {"error": 1, "length": 2}


def fail_once(engine: serve.Engine, amid: Callable[[], None] = lambda: None) -> None:
    """Let the next step fail; before the one after it is scheduled, something happens."""
    left = [ZeroDivisionError()]
    failing(engine, lambda batch: (amid(), left.pop())[1] if left else None)


async def test_what_a_failed_step_was_to_write_is_not_shared_when_its_owner_has_left() -> None:
    engine = make_engine()
    prompt = [1, 2, 3]
    async with engine.submit([serve.Prompt([4, 5])], Params(max_tokens=20)):
        async with engine.submit([serve.Prompt(prompt)], Params(max_tokens=20)) as leaver:
            await engine.step()
            fail_once(engine, lambda: setattr(leaver, "closed", True))
            await engine.step()  # the fourth token was to fill a block
        filled = [*prompt, *follow(prompt, 1)]
        assert serve.block_hash(b"", filled) not in engine.scheduler.pool.cached
        async with engine.submit([serve.Prompt([*filled, 9])], Params(max_tokens=3)) as stream:
            for _ in range(4):
                await engine.step()
            assert ids(stream.sequences[0].arrived) == follow([*filled, 9], 3) and not stream.sequences[0].error


async def test_who_has_ended_cannot_fail() -> None:
    """Its row in the step that was on its way may; it is told of one end only."""
    engine = make_engine()
    answer = follow([1, 2, 3], 6)
    params = Params(max_tokens=8, stop_token_ids=frozenset({answer[2]}))
    newcomer = engine.submit([serve.Prompt([6])], Params(max_tokens=20))
    async with engine.submit([serve.Prompt([1, 2, 3]), serve.Prompt([4, 5])], params) as stream:
        ended, other = stream.sequences
        for _ in range(2):
            await engine.step()
        failing(engine, lambda batch: ZeroDivisionError() if ended in batch else None)
        async with newcomer:  # with its prompt, the step on its way is one of those after which nothing is under way
            await engine.step()
            assert ended.finish_reason == "stop" and ended in engine.ahead.batch
            await anext(stream)
            while not other.finish_reason:
                await engine.step()
        assert (ids(other.arrived), other.finish_reason) == (follow([4, 5], 8), "length")
        assert (ended.error, ended.finish_reason, stream.unfinished) == (None, "stop", 1)
    await engine.step()
    assert_all_free(engine)


async def test_no_step_goes_on_from_one_that_failed() -> None:
    """Where a GPU looks for the tokens of a step, there are those of another."""
    engine, steps = make_engine(), []
    async with engine.submit([serve.Prompt([1, 2, 3])], Params(max_tokens=8)) as stream:
        await engine.step()
        forward = engine.runner.forward
        engine.runner.forward = lambda *batch: (steps.append(batch), 1 / (len(steps) - 1), forward(*batch))[2]
        await engine.step()
        assert len(steps) == 2 and stream.sequences[0].error  # the one that failed, and the probe
    await engine.step()
    assert_all_free(engine)


async def test_a_batch_that_does_not_fit_in_memory_is_computed_in_parts() -> None:
    async with running(TokenCacheRunner(), 64, max_running=8) as engine:
        failing(engine, lambda batch: MemoryError() if len(batch) > 2 else None)
        stream = engine.submit([serve.Prompt([id]) for id in range(7)], Params(max_tokens=4))
        assert [[token.id for token in answer] for answer in await collect(stream)] == [follow([id], 4) for id in range(7)]


async def test_what_is_counted() -> None:
    async with running(TokenCacheRunner(), 64, max_running=2) as engine:
        prompt = serve.Prompt(list(range(12)))
        for _ in range(2):
            await collect(engine.submit([prompt], Params(max_tokens=3)))
        async with engine.submit([prompt], Params(max_tokens=20), n=3) as stream:
            await anext(stream)
        found = engine.metrics
        assert found.request_success == {"length": 2, "abort": 3}
        assert found.prompt_tokens in (36, 48)
        assert found.prefix_cache_hits in (16, 24) and found.generation_tokens >= 7
        assert sum(found.e2e_request_latency_seconds.counts) == 2
        firsts, others = found.time_to_first_token_seconds, found.inter_token_latency_seconds
        assert sum(firsts.counts) + sum(others.counts) == found.generation_tokens
        assert sum(found.request_queue_time_seconds.counts) == found.prompt_tokens // 12


# Text.

TEXTS = ["Hello, world!", "naïve café — “quotes” …", "日本語のテキストと한국어",
         "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 done",
         "  leading and  double  spaces\n\n\ttab",
         "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ẍ̧ combining", "a � b", "👍👍👍"]


@pytest.fixture(scope="module")
def byte_level(checkpoint) -> transformers.PreTrainedTokenizerBase:
    """The built-in model's: GPT-2's alphabet of bytes."""
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def byte_fallback() -> transformers.PreTrainedTokenizerBase:
    """One like llama's: ▁ for spaces, <0x..> for what it has no piece for, the first space stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,.!STOPé日"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True,
                                                           unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                            tokenizers.normalizers.Replace(" ", "▁")])
    tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def pieces(rng: random.Random, token_ids: list[int]) -> list[list[int]]:
    """Cut a list at random places."""
    cuts = sorted({0, len(token_ids), *(rng.randrange(len(token_ids) + 1) for _ in range(rng.randrange(len(token_ids) + 1)))})
    return [token_ids[a:b] for a, b in zip(cuts, cuts[1:])]


def stream_text(tokenizer: transformers.PreTrainedTokenizerBase, parts: list[list[int]],
                stop: tuple[str, ...] = ()) -> list[str]:
    """Return what a detokenizer gives for each part, up to where it stops, and at the end."""
    text, shown = serve.Detokenizer(tokenizer, stop), []
    for part in parts:
        shown.append(text.add(part))
        if text.stopped:
            return shown
    return [*shown, text.add([], last=True)]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer, rng = request.getfixturevalue(kind), random.Random(0)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(token_ids) > 3
    for parts in [[[id] for id in token_ids], *(pieces(rng, token_ids) for _ in range(10))]:
        shown = stream_text(tokenizer, parts)
        assert "".join(shown) == tokenizer.decode(token_ids, skip_special_tokens=True) == text
        assert "�" in text or not any("�" in piece for piece in shown), "part of a character"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_nonsense_make_the_whole_text(byte_level, seed: int) -> None:
    rng = random.Random(seed)
    raw = [id for id in range(len(byte_level)) if len(byte_level.convert_ids_to_tokens(id)) == 1]  # single bytes
    token_ids = [rng.choice([rng.randrange(len(byte_level)), rng.choice(raw)]) for _ in range(60)]
    whole = byte_level.decode(token_ids, skip_special_tokens=True)
    for parts in [[[id] for id in token_ids], *(pieces(rng, token_ids) for _ in range(5))]:
        assert "".join(stream_text(byte_level, parts)) == whole


def test_special_tokens_are_not_text(byte_level) -> None:
    token_ids = byte_level("<|im_start|>Hi<|im_end|> there")["input_ids"]
    assert "".join(stream_text(byte_level, [[id] for id in token_ids])) == "Hi there"


@pytest.mark.parametrize("text, stop, shown", [
    ("one two three four", (" three",), "one two"),
    ("one two three four", ("wo thr",), "one t"),  # begins and ends amid tokens
    ("one two three four", ("four", "two"), "one "),
    ("one two three four", ("o t",), "one tw"),
    ("one two three four", ("one",), ""),
    ("one two three four", ("fourth", "three f0ur"), "one two three four"),
    ("aaaaaab", ("aab",), "aaaa"),
    ("ababac end", ("abac",), "ab"),
    ("nice 👍🏽 thumb", ("👍🏽",), "nice "),
    ("nice 👍🏽 thumb", ("🏽",), "nice 👍"),
    ("x\n\ny", ("\n\n",), "x"),
    ("User: hi\nUser: ho", ("\nUser:",), "User: hi"),
])
def test_stop_strings(byte_level, text: str, stop: tuple[str, ...], shown: str) -> None:
    rng, token_ids = random.Random(0), byte_level(text)["input_ids"]
    raw = [byte_level.convert_tokens_to_ids(piece) for piece in "".join(byte_level.tokenize(text))]  # byte by byte
    for parts in [[[id] for id in token_ids], [[id] for id in raw], [token_ids], *(pieces(rng, raw) for _ in range(10))]:
        assert "".join(stream_text(byte_level, parts, stop)) == shown


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_never_leak(byte_level, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab👍") for _ in range(40))
    stop = tuple("".join(rng.choice("ab👍") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
    token_ids = byte_level(text)["input_ids"]
    shown = stream_text(byte_level, [[id] for id in token_ids], stop)
    known = [byte_level.decode(token_ids[:n]) for n in range(len(token_ids) + 1)]
    complete = next((t for t in known if not t.endswith("�") and any(s in t for s in stop)), None)
    expected = complete[:min(complete.find(s) for s in stop if s in complete)] if complete else text
    assert "".join(shown) == expected and not any(s in expected for s in stop)


def test_what_may_become_a_stop_string_is_held_back_no_longer_than_needed(byte_level) -> None:
    text = serve.Detokenizer(byte_level, ("STOP!",))
    ids = [byte_level.convert_tokens_to_ids(c) for c in "aSTOxSTOP"]
    assert [text.add([id]) for id in ids] == ["a", "", "", "", "STOx", "", "", "", ""]
    assert text.add([], last=True) == "STOP" and not text.stopped


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    model = types.SimpleNamespace(tokenizer=tokenizer, byte_level=kind == "byte_level",
                                  special_ids=frozenset(tokenizer.all_special_ids))
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(serve.token_bytes(model, id) for id in token_ids).decode().removeprefix(
        " " if kind == "byte_fallback" else "") == text
    assert serve.token_bytes(model, tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    assert serve.token_bytes(model, len(tokenizer) + 5) == b""


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    """A tokenizer may know more tokens than its model has embeddings."""
    engine = make_engine()
    assert engine.submit([serve.Prompt([999])], serve.SamplingParams())
    with pytest.raises(serve.APIError, match="outside the vocabulary"):
        engine.submit([serve.Prompt([1, 1000])], serve.SamplingParams())
