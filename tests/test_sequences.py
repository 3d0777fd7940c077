"""Sequences: what is prompt, what is answer, whether anybody still wants it, and the names of its blocks."""
import dataclasses

import pytest
import serve


class Stream:
    closed = False


def sequence(token_ids: list[int], salt: bytes = b"") -> serve.Sequence:
    return serve.Sequence(list(token_ids), len(token_ids), serve.SamplingParams(), 0, salt, Stream(), 0)


def test_prompt_and_answer() -> None:
    seq = sequence([5, 6, 7])
    assert (seq.generated, seq.num_generated_tokens) == ([], 0)
    seq.token_ids += [8, 9]
    assert (seq.generated, seq.num_generated_tokens, seq.num_prompt_tokens) == ([8, 9], 2, 3)


@pytest.mark.parametrize("leave", [lambda seq: setattr(seq, "finish_reason", "stop"),
                                   lambda seq: setattr(seq.stream, "closed", True)], ids=["finished", "closed"])
def test_ended(leave) -> None:
    seq = sequence([1])
    assert not seq.ended
    leave(seq)
    assert seq.ended


def test_block_hashes_chain_over_everything_before() -> None:
    seq = sequence(list(range(10)), salt=b"salt")
    first = serve.block_hash(b"salt", [0, 1, 2, 3])
    second = serve.block_hash(first, [4, 5, 6, 7])
    assert seq.hash_blocks(4, 1) == [first]
    assert seq.hash_blocks(4, 2) == [first, second]
    assert seq.hash_blocks(4, 1) == [first]
    seq.token_ids += [10, 11]
    assert seq.hash_blocks(4, 3)[2] == serve.block_hash(second, [8, 9, 10, 11])


@pytest.mark.parametrize("other", [sequence([9, 1, 2, 3, 4, 5, 6, 7]), sequence(range(8), salt=b"image")],
                         ids=["token", "salt"])
def test_what_differs_at_the_start_shares_no_block(other: serve.Sequence) -> None:
    seq = sequence(list(range(8)))
    assert not set(seq.hash_blocks(4, 2)) & set(other.hash_blocks(4, 2))


def test_sequences_are_themselves() -> None:
    one, two = sequence([1]), sequence([1])
    assert one != two and len({one: 1, two: 1}) == 2


@pytest.mark.parametrize("value", [serve.Prompt([1]), serve.SamplingParams(), serve.Token(1)],
                         ids=["prompt", "sampling params", "token"])
def test_values_are_frozen(value: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


def test_sampling_is_greedy_and_unbounded_unless_asked() -> None:
    params = serve.SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (0, 1, 0, 0, 1)
    assert params.max_tokens is params.seed is params.logprobs is None and not params.stop and not params.stop_token_ids
