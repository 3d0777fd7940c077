"""The block pool, by its definition: references, free blocks, hashes and the order of eviction."""
import random
from collections import Counter

import pytest
import serve

BLOCK_SIZE = 4


def digest(*tokens: int, parent: bytes = b"") -> bytes:
    return serve.block_hash(parent, list(tokens))


def check(pool: serve.BlockPool, held: list[list[int]]) -> None:
    """The pool agrees with the lists of blocks that were taken from it and not given back."""
    counts = Counter(block for blocks in held for block in blocks)
    assert pool.references == [counts[block] for block in range(pool.num_blocks)]
    assert set(pool.free) == set(range(1, pool.num_blocks)) - counts.keys()
    assert {digest: block for block, digest in enumerate(pool.hashes) if digest is not None} == pool.cached
    assert pool.scores.keys() <= pool.cached.keys()


def test_block_zero_is_never_handed_out() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    assert pool.capacity == 4 * BLOCK_SIZE


@pytest.mark.parametrize("num_tokens, blocks", [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert serve.BlockPool(2, BLOCK_SIZE).blocks_for(num_tokens) == blocks


def test_too_much_takes_nothing() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    held = pool.allocate(2)
    assert pool.allocate(3) is None
    check(pool, [held])


def test_shared_from_memory_and_from_the_free() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    (block,) = pool.allocate(1)
    pool.publish(block, digest(1))
    assert pool.share([digest(1)]) == [block]
    check(pool, [[block], [block]])
    pool.release([block])
    pool.release([block])
    assert block in pool.free
    assert pool.share([digest(1)]) == [block] and block not in pool.free
    check(pool, [[block]])


def test_share_stops_at_the_first_miss() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    a, b, c = pool.allocate(3)
    for block, token in ((a, 1), (c, 3)):
        pool.publish(block, digest(token))
    assert pool.share([digest(1), digest(2), digest(3)]) == [a]
    assert pool.share([digest(2), digest(3)]) == []


def test_twins_and_second_names_stay_out() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    a, b = pool.allocate(2)
    pool.publish(a, digest(1))
    pool.publish(b, digest(1))
    pool.publish(a, digest(2))
    assert pool.share([digest(1)]) == [a] and pool.share([digest(2)]) == []
    check(pool, [[a], [a], [b]])


def test_eviction_takes_what_was_released_first_and_the_end_of_a_prompt_before_its_start() -> None:
    pool = serve.BlockPool(7, BLOCK_SIZE)
    first, second = pool.allocate(3), pool.allocate(3)
    for token, block in enumerate(first + second):
        pool.publish(block, digest(token))
    pool.release(first)
    pool.release(second)
    order = [pool.allocate(1)[0] for _ in range(6)]
    assert order == first[::-1] + second[::-1]
    assert not pool.cached


def test_use_protects_from_eviction() -> None:
    pool = serve.BlockPool(4, BLOCK_SIZE)
    blocks = pool.allocate(3)
    for token, block in enumerate(blocks):
        pool.publish(block, digest(token))
        pool.release([block])
    pool.release(pool.share([digest(0)]))  # released last now
    assert pool.allocate(2) == blocks[1:]
    assert pool.share([digest(0)]) == blocks[:1]


def test_forget() -> None:
    pool = serve.BlockPool(4, BLOCK_SIZE)
    free, used = pool.allocate(2)
    pool.publish(free, digest(1))
    pool.publish(used, digest(2))
    pool.release([free])
    pool.forget()
    assert pool.share([digest(1)]) == [] and pool.share([digest(2)]) == [used]
    check(pool, [[used], [used]])


def test_scores_are_found_from_the_first_block_on_and_with_enough_alternatives() -> None:
    pool = serve.BlockPool(5, BLOCK_SIZE)
    a, b, c = pool.allocate(3)
    first, second, third = [serve.Token(1)], [serve.Token(2)], [serve.Token(3)]
    for block, token, top, scores in ((a, 1, 5, first), (b, 2, 0, second), (c, 3, 5, third)):
        pool.publish(block, digest(token))
        pool.keep_scores(digest(token), top, scores)
    assert pool.find_scores([digest(1), digest(2), digest(3)], 0) == [first, second, third]
    assert pool.find_scores([digest(1), digest(2), digest(3)], 1) == [first]
    assert pool.find_scores([digest(4), digest(1)], 0) == pool.find_scores([digest(1)], 6) == []


def test_scores_are_replaced_by_better_ones_only_and_lost_with_their_block() -> None:
    pool = serve.BlockPool(3, BLOCK_SIZE)
    (block,) = pool.allocate(1)
    pool.keep_scores(digest(1), 3, [serve.Token(0)])  # not cached: nobody could find it
    assert not pool.scores
    pool.publish(block, digest(1))
    for top in (2, 1, 2, 4):
        pool.keep_scores(digest(1), top, [serve.Token(top)])
    assert pool.find_scores([digest(1)], 4) == [[serve.Token(4)]]
    pool.release([block])
    assert pool.find_scores([digest(1)], 0)
    pool.allocate(2)
    assert not pool.scores and not pool.cached


def test_released_too_often_is_our_bug() -> None:
    pool = serve.BlockPool(4, BLOCK_SIZE)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_hashes_depend_on_tokens_order_parent_and_salt() -> None:
    hashes = [digest(1, 2), digest(2, 1), digest(1, 2, 0), digest(1, 2, parent=digest(1)), digest(1, 2, parent=b"image"),
              digest(258), digest(2, 1, 0)]
    assert len(set(hashes)) == len(hashes) and digest(1, 2) == digest(1, 2)


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    pool = serve.BlockPool(rng.randint(2, 12), BLOCK_SIZE)
    held: list[list[int]] = []
    for _ in range(300):
        match rng.choice(["allocate", "release", "share", "publish", "forget"]):
            case "allocate":
                count = rng.randint(0, 4)
                fits = count <= len(pool.free)
                blocks = pool.allocate(count)
                assert (blocks is not None) == fits
                held += [blocks] if fits else []
            case "release" if held:
                pool.release(held.pop(rng.randrange(len(held))))
            case "share":
                wanted = [digest(rng.randrange(8)) for _ in range(3)]
                known = [pool.cached.get(d) for d in wanted]
                held.append(pool.share(wanted))
                assert held[-1] == known[:known.index(None) if None in known else 3]
            case "publish" if held and held[-1]:
                pool.publish(rng.choice(held[-1]), digest(rng.randrange(8)))
                pool.keep_scores(digest(rng.randrange(8)), rng.randrange(3), [])
            case "forget" if rng.random() < 0.1:
                pool.forget()
                assert not any(pool.hashes[block] for block in pool.free)
        check(pool, held)
    for blocks in held:
        pool.release(blocks)
    check(pool, [])
    assert len(pool.free) == pool.num_blocks - 1
