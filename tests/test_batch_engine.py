"""The queue of models that answer whole inputs: what is computed together, what fails alone, who is turned away."""
import functools
import time
import types
from collections.abc import Callable

import pytest
import serve
import trio


def make_engine(budget: int = 8, max_queue: int = 100) -> serve.BatchEngine:
    """An engine whose every batch takes a second."""
    async def run_on(function: Callable[[], object]) -> object:
        await trio.sleep(1)
        return function()

    return serve.BatchEngine(types.SimpleNamespace(id="fake"), run_on, budget, max_queue)


async def test_jobs_of_one_key_and_like_sizes_are_computed_together(autojump_clock: trio.testing.MockClock) -> None:
    batches: list[list[int]] = []

    def compute(model: object, jobs: list[serve.Job], *options: object) -> list[int]:
        batches.append([job.value for job in jobs])
        if 13 in batches[-1]:
            raise ValueError("an unlucky input")
        return [-job.value for job in jobs]

    engine = make_engine()
    jobs = [serve.Job((compute, "a"), value, size) for value, size in ((1, 1), (2, 6), (3, 1), (13, 1), (4, 2), (5, 6))]
    other, left = serve.Job((compute, "b"), 6, 1), serve.Job((compute, "a"), 7, 1)
    ended: list[int] = []

    async def follow(job: serve.Job) -> None:
        try:
            async for _ in engine.follow([job]):
                pass
            ended.append(job.result)
        except serve.APIError as error:
            ended.append(error.status)

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0):  # who leaves before its turn is not computed
            await follow(left)
        assert engine.idle
        nursery.start_soon(engine.run)
        async with trio.open_nursery() as clients:
            for job in (*jobs, other):
                clients.start_soon(follow, job)
        assert engine.idle
        nursery.cancel_scope.cancel()
    assert sorted(ended) == [-6, -5, -4, -3, -2, -1, 500]
    assert not any(7 in batch for batch in batches) and all(len(batch) == 1 for batch in batches if 6 in batch)
    assert all(not {1, 2} <= set(batch) for batch in batches) and any(len(batch) > 1 for batch in batches)


async def test_a_full_queue_and_a_dropped_model(autojump_clock: trio.testing.MockClock) -> None:
    engine = make_engine(max_queue=2)
    engine.waiting = [serve.Job((), 0, 1), serve.Job((), 0, 1)]
    with pytest.raises(serve.APIError) as full:
        engine.check_queue()
    engine.waiting = [serve.Job((), 0, 1, num_bytes=2 << 30)]
    with pytest.raises(serve.APIError) as heavy:
        engine.check_queue()
    engine.waiting, engine.stopped = [], True
    with pytest.raises(serve.APIError) as gone:
        engine.check_queue()
    assert [refusal.value.status for refusal in (full, heavy, gone)] == [429, 429, 503]


async def test_news_come_once_and_before_the_result() -> None:
    """Of two jobs that fail together, each is told again when it is tried alone."""
    def compute(model: object, jobs: list[serve.Job]) -> list[str]:
        for text in ("a", "ab", "abc")[:4 - len(jobs)]:
            for job in jobs:
                job.tell(text)
            time.sleep(0.01)
        if len(jobs) > 1:
            raise RuntimeError("too many")
        return ["abc"]

    engine = serve.BatchEngine(types.SimpleNamespace(id="fake"), functools.partial(serve.beside, 1), 8, 8)
    jobs = [serve.Job((compute,), None, 1), serve.Job((compute,), None, 1)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        assert "".join([text async for text in engine.follow(jobs)]) == "abcabc"
        assert [job.result for job in jobs] == ["abc", "abc"]
        nursery.cancel_scope.cancel()
