"""The models in memory: loaded once and on demand, dropped when idle or in the way, and then really gone."""
import contextlib
import gc
import time
import types
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import serve
import torch
import trio
from conftest import collect

GREEDY = serve.SamplingParams(max_tokens=3)


@contextlib.asynccontextmanager
async def pool(*models: Path | str, **settings: object) -> AsyncIterator[serve.ModelPool]:
    """A started pool in a nursery of its own."""
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 64 << 20, "models": tuple(map(str, models)), **settings}
    async with trio.open_nursery() as nursery:
        models = serve.ModelPool(serve.Config(**settings), nursery)
        await models.start()
        nursery.start_soon(models.expire)
        yield models
        nursery.cancel_scope.cancel()


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hub ids "tiny/…" are the tiny checkpoint, fetched as if from the hub; the list grows by what is fetched."""
    fetched = []

    def locate_on_hub(name: str):
        if not name.startswith("tiny/"):
            raise serve.unknown_model(name)
        return lambda: (fetched.append(name), serve.Checkpoint(str(tiny)))[1]

    monkeypatch.setattr(serve, "locate_on_hub", locate_on_hub)
    return fetched


async def answer(engine: serve.Engine) -> list[int]:
    (tokens,) = await collect(engine.submit([serve.Prompt([5, 6, 7])], GREEDY))
    return [token.id for token in tokens]


async def refused(models: serve.ModelPool, name: str | None) -> serve.APIError:
    with pytest.raises(serve.APIError) as refusal:
        await models.get(name)
    return refusal.value


async def test_named_models_are_loaded_and_the_first_is_the_default(tiny: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.symlink_to(tiny)
    async with pool(tiny, second) as models:
        assert models.started and list(models.loaded) == [str(tiny), str(second)]
        engine = await models.get(None)
        assert engine is await models.get("") is await models.get(str(tiny)) and engine.model.id == str(tiny)
        assert (await models.get(str(second))) is not engine
        assert len(await answer(engine)) == 3


async def test_the_built_in_model_is_the_default_of_all(checkpoint: Path) -> None:
    async with pool() as models:
        assert (await models.get(None)).model.id == serve.DEFAULT_MODEL


async def test_a_model_that_is_named_twice_is_loaded_once(tiny: Path) -> None:
    async with pool(tiny, tiny) as models:
        assert models.named == [str(tiny)]


async def test_on_demand(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny) as models:
        engines = []

        async def get() -> None:
            engines.append(await models.get("tiny/a"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(get)
        assert len(set(map(id, engines))) == 1 and hub == ["tiny/a"]
        assert await answer(engines[0]) == await answer(await models.get(None))
        assert await models.get("tiny/a@main") is engines[0]
        assert await models.get("tiny/a@v2") is not engines[0] and hub == ["tiny/a", "tiny/a@v2"]


UNKNOWN = ["no/such-model", "nonsense", "../../etc/passwd", "/etc/passwd", "a b", "tiny", ".", "~",
           "x" * 5000, "a/b/c", "\0", "http://127.0.0.1/x", "a/b:c.gguf"]


async def test_unknown_models(tiny: Path) -> None:
    async with pool(tiny) as models:
        for name in UNKNOWN:
            with trio.fail_after(6):
                error = await refused(models, name)
            assert (error.status, error.code, error.param) == (404, "model_not_found", "model"), name
        assert list(models.loaded) == [str(tiny)]
        assert len(await answer(await models.get(None))) == 3


async def test_what_is_gated_once_its_files_are_wanted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may have its description."""
    class GatedRepoError(Exception):
        pass

    def fetch() -> serve.Checkpoint:
        raise GatedRepoError("403 Client Error")

    monkeypatch.setattr(serve, "locate_on_hub", lambda name: fetch)
    async with pool(tiny) as models:
        error = await refused(models, "org/gated")
        assert (error.status, error.code) == (404, "model_not_found") and "HF_TOKEN" in error.message


async def test_a_path_in_a_request_is_refused_unless_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "org" / "model"
    other.parent.mkdir()
    other.symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    async with pool(tiny) as models:
        for name in (str(other), "org/model", "./org/model", f"{tiny}/", f"{tiny}/model.safetensors"):
            assert (await refused(models, name)).status == 404, name
        assert (await models.get(str(tiny))).model.id == str(tiny)
    async with pool("org/model") as models:
        assert (await models.get("org/model")).model.id == "org/model"


async def test_what_cannot_be_loaded_is_an_error_and_can_be_asked_for_again(tiny: Path, tmp_path: Path, hub: list[str],
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool(tiny) as models:
        with monkeypatch.context() as patch:
            patch.setattr(serve, "load_network", lambda *_: 1 / 0)
            assert (await refused(models, "tiny/a")).code in ("model_load_failed", "model_not_supported")
        with monkeypatch.context() as patch:
            patch.setattr(serve, "locate_on_hub", lambda name: lambda: serve.Checkpoint(str(tmp_path)))
            assert (await refused(models, "tiny/a")).status == 400
        assert "tiny/a" not in models.loaded
        assert (await models.get("tiny/a")).model.id == "tiny/a"


async def test_a_named_model_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as crash:
        async with pool(tmp_path / "nothing"):
            pass
    assert crash.group_contains(serve.APIError)


async def test_the_one_idle_longest_makes_room(tiny: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool(tiny) as models:
        for name in "abc":
            await models.get(f"tiny/{name}")
        await answer(await models.get("tiny/a"))
        b = models.loaded["tiny/b"].engine
        free = iter([0, 0])  # until two are dropped there is not enough
        monkeypatch.setattr(serve, "available_memory", lambda device: next(free, 1 << 40))
        async with b.submit([serve.Prompt([1])], serve.SamplingParams()):  # whoever works stays
            await models.get("tiny/d")
            assert list(models.loaded) == [str(tiny), "tiny/b", "tiny/d"]


async def test_named_models_stay(tiny: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool(tiny) as models:
        await models.get("tiny/a")
        monkeypatch.setattr(serve, "available_memory", lambda device: 0 if "tiny/a" in models.loaded else 1 << 40)
        await models.get("tiny/b")
        assert list(models.loaded) == [str(tiny), "tiny/b"]
        assert not models.drop_idle(1e9) and models.drop_idle(0) and not models.drop_idle(0)


async def test_a_dropped_model_is_gone_from_memory(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny) as models:
        engine = await models.get("tiny/a")
        await answer(engine)
        network, cache = weakref.ref(engine.model.network), weakref.ref(next(iter(engine.runner.caches.values()))[0])
        del engine
        assert models.drop_idle(0)
        with trio.move_on_after(3):
            while network() is not None or cache() is not None:
                await trio.sleep(0.05)
                gc.collect()
        assert network() is None and cache() is None


async def test_the_model_timeout(tiny: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool(tiny, model_timeout=0.5) as models:
        busy = await models.get("tiny/a")
        forward = busy.runner.forward
        monkeypatch.setattr(busy.runner, "forward", lambda *batch: (time.sleep(0.04), forward(*batch))[1])  # 250 tokens: 10 s
        async with busy.submit([serve.Prompt([1])], serve.SamplingParams()) as stream:
            idle = await models.get("tiny/b")
            with trio.fail_after(5):
                while "tiny/b" in models.loaded:
                    await trio.sleep(0.05)
            assert idle.stopped and not busy.stopped
            assert stream.sequences[0].finish_reason is None, "too fast for this test"
        with trio.fail_after(4):
            while "tiny/a" in models.loaded:
                await trio.sleep(0.05)
        assert list(models.loaded) == [str(tiny)] and busy.stopped
        assert await models.get("tiny/a") is not busy


async def test_use_puts_the_timeout_off(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny) as models:
        await models.get("tiny/a")
        await trio.sleep(0.3)
        await models.get("tiny/a")
        assert not models.drop_idle(0.25)
        await trio.sleep(0.3)
        assert models.drop_idle(0.25)


async def test_no_timeout(tiny: Path, hub: list[str], autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        models = serve.ModelPool(serve.Config(model_timeout=0), nursery)
        nursery.start_soon(models.expire)
        await trio.sleep(1e6)
        nursery.cancel_scope.cancel()


async def test_whoever_comes_too_late_is_told_so(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny) as models:
        engine = await models.get("tiny/a")
        stream = engine.submit([serve.Prompt([1])], GREEDY)
        assert models.drop_idle(0)
        with pytest.raises(serve.APIError) as refusal:
            await collect(stream)
        assert refusal.value.status == 503


async def test_a_model_dropped_while_it_is_asked_for(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny) as models:
        await models.get("tiny/a")
        entry = models.loaded["tiny/a"]
        ready = entry.ready

        async def wait() -> None:  # what may happen in the moment that waiting takes even for what has happened
            entry.ready = ready
            assert models.drop_idle(0)

        entry.ready = types.SimpleNamespace(wait=wait, is_set=ready.is_set)
        try:
            assert len(await answer(await models.get("tiny/a"))) == 3
        except serve.APIError as error:
            assert error.status == 503


async def test_force_model(tiny: Path, hub: list[str]) -> None:
    async with pool("tiny/unused", force_model=str(tiny)) as models:
        engine = await models.get(None)
        assert engine.model.id == str(tiny) and list(models.loaded) == [str(tiny)]
        for name in ("gpt-4o", "tiny/a", str(tiny), "../x"):
            assert await models.get(name) is engine
        assert hub == []


async def test_served_model_name(tiny: Path, hub: list[str]) -> None:
    async with pool(tiny, "tiny/b", served_model_name="gpt-4o") as models:
        engine = await models.get("gpt-4o")
        assert engine.model.id == str(tiny) and await models.get(None) is engine
        assert [models.public_id(name) for name in models.named] == ["gpt-4o", "tiny/b"]
        assert (await refused(models, "gpt-4o-mini")).status == 404


async def test_settings_reach_the_engine(tiny: Path) -> None:
    async with pool(tiny, max_batch_tokens=7, block_size=4, max_running=3, max_model_len=50, max_queue=9) as models:
        engine = await models.get(None)
        scheduler = engine.scheduler
        assert (scheduler.max_batch_tokens, scheduler.pool.block_size, scheduler.max_running) == (7, 4, 3)
        assert (engine.max_len, engine.max_queue, engine.model.network.dtype) == (50, 9, torch.float32)
    async with pool(tiny, continuous_batching=False) as models:
        assert (await models.get(None)).scheduler.max_running == 1


@pytest.mark.parametrize("name", ["org/repo:*", "org/repo:*.gguf", "org/repo:a\nb.gguf", "org/repo:weights.bin"])
def test_only_gguf_files_can_be_named_in_a_repository(name: str) -> None:
    with pytest.raises(serve.APIError) as caught:
        serve.locate(name, local=False)
    assert caught.value.status == 404
