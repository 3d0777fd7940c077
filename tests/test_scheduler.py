"""The scheduler against a cache of tokens: whatever happens, a sequence reads back its own tokens through its block table."""
import random
from collections import Counter
from collections.abc import Callable

import pytest
import serve


def end(scheduler: serve.Scheduler, which: Callable[[serve.Sequence], bool]) -> None:
    """End some sequences, as if a stop string had been found, and let the scheduler drop them."""
    for seq in filter(which, [*scheduler.running, *scheduler.waiting]):
        seq.finish_reason = "stop"
    scheduler.drop_ended()


class Stream:
    closed = False


def sequence(token_ids: list[int], salt: bytes = b"", score: int | None = None) -> serve.Sequence:
    """A sequence; `score` asks for scores of its prompt, with so many alternatives."""
    params = serve.SamplingParams(score_prompt=score is not None, logprobs=score)
    return serve.Sequence(list(token_ids), len(token_ids), params, 0, salt, Stream(), 0)


def scores(token_ids: list[int], salt: bytes, top: int) -> list[tuple]:
    """What a prompt's scores must be: a token's number depends on all before it, and it has at least `top` alternatives."""
    return [(id, i and hash((salt, *token_ids[:i + 1]))) for i, id in enumerate(token_ids)]


class World:
    """A scheduler, and a runner whose cache holds token ids where a real one holds keys and values."""

    def __init__(self, num_blocks: int = 20, block_size: int = 4, max_batch_tokens: int = 8, max_running: int = 4,
                 paged: bool = True) -> None:
        self.pool = serve.BlockPool(num_blocks, block_size)
        self.scheduler = serve.Scheduler(self.pool, max_batch_tokens, max_running, paged=paged)
        self.cache: dict[int, tuple] = {}  # slot → the token there and everything before it
        self.admitted: list[serve.Sequence] = []  # in the order of their first step

    def add(self, *sequences: serve.Sequence) -> None:
        self.scheduler.waiting.extend(sequences)

    def slots(self, seq: serve.Sequence, end: int) -> list[int]:
        size = self.pool.block_size
        return [seq.block_table[p // size] * size + p % size for p in range(end)]

    def step(self, next_token=lambda seq: 0) -> serve.Batch:
        """Schedule; write every scheduled token, as each layer does, before any is read; append what is sampled."""
        batch = self.scheduler.schedule()
        self.check()
        assert sum(batch.values()) <= self.scheduler.max_batch_tokens and all(count > 0 for count in batch.values())
        assert set(batch) <= set(self.scheduler.running) and len(self.scheduler.running) <= self.scheduler.max_running
        written: set[int] = set()
        for seq, count in batch.items():
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + count
            assert end <= len(seq.token_ids)
            first = max(start, seq.num_shared_tokens)  # what is another's is not written to
            assert first - start <= seq.scoring
            new = self.slots(seq, end)[first:]
            assert not written.intersection(new), "two writers of one slot"
            written.update(new)
            self.cache |= {slot: (seq.salt, *seq.token_ids[:p + 1]) for p, slot in zip(range(first, end), new)}
        for seq, count in batch.items():
            if self.scheduler.paged:
                for p, slot in enumerate(self.slots(seq, seq.num_computed_tokens + count)):
                    assert self.cache[slot] == (seq.salt, *seq.token_ids[:p + 1]), "another's keys and values"
        self.admitted += [seq for seq in batch if seq not in self.admitted]
        receivers = serve.sampled(batch)
        for seq, count in batch.items():
            for p in seq.scored(count):
                number = hash((seq.salt, *seq.token_ids[:p + 1]))
                top = ((0, 0.0),) * seq.sampling.logprobs
                seq.scores[p // self.pool.block_size].append(serve.Token(seq.token_ids[p], number, top))
            seq.num_computed_tokens += count
        for seq in receivers:
            if seq.scoring:
                found = [token for tokens in seq.scores for token in tokens]
                assert [(token.id, token.logprob or 0) for token in found] == scores(seq.token_ids, seq.salt, 0)
                assert all(len(token.top) >= seq.sampling.logprobs for token in found[1:])
            seq.token_ids.append(next_token(seq))
        return batch

    def check(self) -> None:
        """References are those of the block tables; what is still written to has one owner; the waiting hold nothing."""
        pool, size = self.pool, self.pool.block_size
        counts = Counter(block for seq in self.scheduler.running for block in seq.block_table)
        assert pool.references == [counts[block] for block in range(pool.num_blocks)]
        assert set(pool.free) == set(range(1, pool.num_blocks)) - counts.keys()
        assert {digest: block for block, digest in enumerate(pool.hashes) if digest is not None} == pool.cached
        for seq in self.scheduler.running:
            for block in seq.block_table[len(seq.token_ids) // size:]:
                assert counts[block] == 1, "an unfinished block is shared"
        for seq in self.scheduler.waiting:
            assert not seq.block_table and seq.num_computed_tokens == 0 and seq.cache is None

    def assert_idle(self) -> None:
        assert self.scheduler.idle and len(self.pool.free) == self.pool.num_blocks - 1 and not any(self.pool.references)


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "sequential"])
@pytest.mark.parametrize("seed", range(30))
def test_random_lives(seed: int, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(serve, "MAX_SCORED", rng.choice([1, 3, 1024]))
    world = World(rng.randint(4, 14), rng.choice([1, 2, 4]), rng.randint(1, 9), rng.randint(1, 5), paged)
    longest = world.pool.capacity - 1
    alive: list[serve.Sequence] = []
    arrived: list[serve.Sequence] = []
    for step in range(400):
        if step < 250 and rng.random() < 0.4:
            stem = [rng.randrange(2)] * rng.randint(0, longest - 1)  # much is shared, and much is nearly shared
            seq = sequence([*stem, rng.randrange(3)], rng.choice([b"", b"", b"salt"]), rng.choice([None, None, 0, 2]))
            world.add(seq)
            alive.append(seq)
            arrived.append(seq)
        for seq in alive:
            if rng.random() < 0.03:
                seq.stream.closed = True
            if len(seq.token_ids) >= longest + 1 or seq.num_generated_tokens and rng.random() < 0.1:
                seq.finish_reason = "length"
        world.scheduler.drop_ended()
        alive = [seq for seq in alive if not seq.ended]
        world.check()
        assert set(alive) == {*world.scheduler.waiting, *world.scheduler.running}
        batch = world.step(lambda seq: rng.randrange(2))
        assert batch or not alive, "nothing moves"
        if rng.random() < 0.02:
            world.pool.forget()
    assert [seq for seq in arrived if seq in world.admitted] == world.admitted, "not first come, first served"
    assert not alive
    world.assert_idle()


def test_decodes_first_then_prompts_in_chunks() -> None:
    world = World(max_batch_tokens=6)
    old = sequence([1])
    world.add(old)
    assert world.step() == {old: 1}
    new, newest = sequence(list(range(10, 20))), sequence([5, 6])
    world.add(new, newest)
    assert list(world.step().items()) == [(old, 1), (new, 5)]
    assert list(world.step().items()) == [(old, 1), (new, 5)]
    assert list(world.step().items()) == [(old, 1), (new, 1), (newest, 2)]
    assert [seq.num_generated_tokens for seq in (old, new, newest)] == [4, 2, 1]


def test_only_what_is_computed_to_its_end_is_sampled() -> None:
    world = World(max_batch_tokens=3)
    seq = sequence([1, 2, 3, 4, 5])
    world.add(seq)
    assert (world.step(), seq.num_generated_tokens) == ({seq: 3}, 0)
    assert (world.step(), seq.num_generated_tokens) == ({seq: 2}, 1)
    assert (world.step(), seq.num_generated_tokens) == ({seq: 1}, 2)


def test_a_cached_prefix_is_not_computed_again() -> None:
    world = World(num_blocks=20, block_size=4, max_batch_tokens=64)
    one, two = sequence(list(range(11))), sequence(list(range(11)))
    world.add(one)
    world.step()
    world.add(two)
    assert world.step()[two] == 3  # two whole blocks are there
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 8)
    assert one.block_table[:2] == two.block_table[:2] and one.block_table[2] != two.block_table[2]


def test_twins_in_one_step_share_what_is_being_written() -> None:
    world = World(num_blocks=20, block_size=4, max_batch_tokens=64)
    twins = [sequence(list(range(11))) for _ in range(3)]
    world.add(*twins)
    assert list(world.step().values()) == [11, 3, 3]
    assert len({seq.block_table[0] for seq in twins}) == 1 and len({seq.block_table[2] for seq in twins}) == 3


def scoring_world() -> World:
    return World(num_blocks=40, block_size=4, max_batch_tokens=64, max_running=9)


def test_a_scored_prompt_shares_blocks_that_were_scored_and_computes_one_token_of_them_again() -> None:
    world = scoring_world()
    plain, first, second, other = (sequence(list(range(11)), score=score) for score in (None, 0, 0, 0))
    other.token_ids[8] = 90
    world.add(plain)
    assert world.step() == {plain: 11}
    world.add(first)
    assert world.step()[first] == 11  # what is there has no scores
    world.add(second, other)
    batch = world.step()
    assert (batch[second], batch[other]) == (4, 4)
    assert second.block_table[:2] == other.block_table[:2] == plain.block_table[:2] != first.block_table[:2]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 7)
    assert second.scores[:2] == first.scores[:2] and second.scores[2] == first.scores[2] != other.scores[2]


def test_scored_twins_in_one_step_share_scores_that_are_yet_to_come() -> None:
    world = scoring_world()
    twins = [sequence(list(range(11)), score=1) for _ in range(3)]
    world.add(*twins)
    assert list(world.step().values()) == [11, 4, 4]
    assert all(seq.scores == twins[0].scores for seq in twins)


def test_scores_with_too_few_alternatives_are_computed_again_and_replaced() -> None:
    world = scoring_world()
    for score, computed in ((1, 11), (0, 4), (3, 11), (2, 4), (None, 3)):
        seq = sequence(list(range(11)), score=score)
        world.add(seq)
        assert world.step()[seq] == computed


def test_scores_end_with_the_prompt() -> None:
    """A block that prompt and answer fill together has no scores, and a prompt is scored once, whatever comes after."""
    world = scoring_world()
    one = sequence(list(range(6)), score=0)
    world.add(one)
    for _ in range(6):
        world.step(lambda seq: 7)
    world.scheduler.preempt(one)
    world.step(lambda seq: 7)
    assert [len(tokens) for tokens in one.scores] == [4, 2] and one.num_generated_tokens == 7
    two = sequence(one.token_ids, score=0)
    world.add(two)
    assert world.step()[two] == 10  # of 13 tokens, the first 4 are there, and one of them is computed again


def test_the_rows_of_logits_of_a_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_SCORED", 6)
    world = World(num_blocks=40, block_size=4, max_batch_tokens=20)
    scored, queued, plain = sequence(list(range(9)), score=0), sequence([50, 51], score=0), sequence(list(range(60, 75)))
    world.add(scored, queued, plain)
    assert world.step() == {scored: 6}
    assert world.step() == {scored: 3, queued: 2, plain: 15}


@pytest.mark.parametrize("length, cached", [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_one_token_is_left_to_compute(length: int, cached: int) -> None:
    world = World(num_blocks=20, block_size=4, max_batch_tokens=64)
    one, two = sequence(list(range(length))), sequence(list(range(length)))
    world.add(one)
    world.step()
    end(world.scheduler, lambda seq: True)
    world.add(two)
    assert world.step()[two] == length - cached
    assert two.num_cached_tokens == cached


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    world = World(num_blocks=6, block_size=2, max_batch_tokens=64)
    old, young, waiting = sequence([1, 2, 3, 4]), sequence([5, 6, 7, 8]), sequence([9])
    world.add(old, young)
    world.step()  # 4 blocks
    world.add(waiting)
    assert world.step() == {old: 1}  # takes the fifth; young has none left and makes way
    assert list(world.scheduler.waiting) == [young, waiting]
    assert young.generated == [0] and young.num_computed_tokens == 0
    end(world.scheduler, lambda seq: seq is old)
    batch = world.step()
    assert list(batch)[:2] == [young, waiting] and young.generated == [0, 0]
    assert young.num_cached_tokens == 0  # what it found at its first admission, not now


def test_a_full_pool_keeps_the_next_one_waiting_and_does_not_let_others_pass() -> None:
    world = World(num_blocks=5, block_size=2, max_batch_tokens=64)
    big, bigger, small = sequence([1, 2, 3, 4]), sequence([5, 6, 7, 8, 9]), sequence([1])
    world.add(big, bigger, small)
    assert list(world.step()) == [big]
    assert list(world.scheduler.waiting) == [bigger, small]
    world.check()


def test_max_running() -> None:
    world = World(max_running=2)
    world.add(*(sequence([i]) for i in range(3)))
    assert len(world.step()) == 2 and len(world.scheduler.waiting) == 1


def test_without_paging_a_prompt_goes_through_in_one_piece() -> None:
    world = World(max_batch_tokens=3, paged=False)
    one, two = sequence(list(range(10))), sequence(list(range(10)))
    world.add(one, two)
    assert world.step() == {one: 10, two: 10}
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 0)
    assert world.step() == {one: 1, two: 1}


def test_dropped_while_waiting_and_running() -> None:
    world = World(max_running=1)
    running, waiting, kept = sequence([1, 2]), sequence([3]), sequence([4])
    world.add(running, waiting, kept)
    world.step()
    running.cache = object()
    end(world.scheduler, lambda seq: seq is not kept)
    assert running.cache is None and running.block_table == []
    world.check()
    assert list(world.step()) == [kept]


def test_a_prompt_in_chunks_and_its_answer_are_found_again() -> None:
    world = World(num_blocks=20, block_size=4, max_batch_tokens=5)
    one = sequence(list(range(11)))
    world.add(one)
    for _ in range(6):
        world.step(lambda seq: 7)
    assert one.num_generated_tokens == 4
    end(world.scheduler, lambda seq: True)
    two = sequence([*one.token_ids, 1])
    world.add(two)
    world.step()
    assert two.num_cached_tokens == 12  # a block that prompt and answer filled together; the fourth was never full


def test_a_prompt_is_shared_where_there_is_no_room_for_another() -> None:
    world = World(num_blocks=10, max_batch_tokens=256)
    answers = [sequence(list(range(24))) for _ in range(3)]  # six of nine blocks, of which five can be shared
    world.add(*answers)
    assert world.step() == dict(zip(answers, [24, 4, 4]))
