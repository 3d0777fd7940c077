"""Sampling against transformers' own logits processors, row by row, and against the distribution that they define."""
import math
from collections import Counter

import pytest
import serve
import torch
import transformers
from transformers.generation import logits_process as reference

VOCAB = 300
Params = serve.SamplingParams


def row(params: serve.SamplingParams, prompt: list[int] = (), answer: list[int] = (), seed: int = 0) -> serve.Sequence:
    return serve.Sequence([*prompt, *answer], len(prompt), params, seed, b"", None, 0)


def sample(logits: torch.Tensor, rows: list[serve.Sequence]) -> list[serve.Token]:
    return serve.tokens_of(serve.sample(logits, rows, serve.draw_points(rows)).tolist(), logits, rows)


def random_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def warped(logits: torch.Tensor, params: serve.SamplingParams) -> torch.Tensor:
    """Return the probabilities [vocab] of one row of logits [vocab], by transformers' warpers in `generate`'s order."""
    scores = reference.TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        scores = reference.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = reference.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = reference.MinPLogitsWarper(params.min_p)(None, scores)
    return scores.softmax(-1)[0]


def draws(logits: torch.Tensor, params: serve.SamplingParams, count: int) -> Counter[int]:
    """Return how often each token is drawn from one row of logits [vocab], under as many seeds."""
    rows = [row(params, seed=seed) for seed in range(count)]
    return Counter(token.id for token in sample(logits.expand(count, -1), rows))


def chi_square_limit(freedom: int) -> float:
    """Return what a chi-square statistic passes once in 30,000 times (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.0 * math.sqrt(2 / (9 * freedom))) ** 3


SHAPES = [
    Params(temperature=1.0), Params(temperature=0.5), Params(temperature=2.0), Params(temperature=1.0, top_k=5),
    Params(temperature=1.3, top_k=1), Params(temperature=1.0, top_k=VOCAB + 7), Params(temperature=1.0, top_p=0.9),
    Params(temperature=1.0, top_p=0.3), Params(temperature=1.5, top_p=0.999), Params(temperature=1.0, min_p=0.1),
    Params(temperature=0.8, min_p=1.0), Params(temperature=1.0, top_k=20, top_p=0.7),
    Params(temperature=1.2, top_k=40, top_p=0.8, min_p=0.05),
]


def shown(params: serve.SamplingParams) -> str:
    return f"t{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}"


@pytest.mark.parametrize("params", SHAPES, ids=shown)
def test_the_distribution_drawn(params: serve.SamplingParams) -> None:
    logits, count = random_logits()[0], 4000
    expected, observed = warped(logits, params), draws(logits, params, count)
    assert set(observed) <= set(expected.nonzero()[:, 0].tolist()), "drawn, though cut off"
    likely = [id for id in range(VOCAB) if expected[id] * count >= 5]
    assert set(likely) <= set(observed), "likely, and never drawn"
    cells = [(observed[id], expected[id].item() * count) for id in likely]
    rest = (count - sum(o for o, _ in cells), count - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    if len(cells) > 1:
        assert sum((o - e) ** 2 / e for o, e in cells) < chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("params", [params for params in SHAPES if params.top_k or params.top_p < 1 or params.min_p], ids=shown)
@pytest.mark.parametrize("vocab", [VOCAB, 5000])
def test_the_tokens_kept(params: serve.SamplingParams, vocab: int) -> None:
    logits = random_logits(20, vocab, scale=1.0)
    scores = logits / params.temperature
    kept = scores >= serve.cutoffs(scores, [params] * 20)[:, None]
    for mine, line in zip(kept, logits):
        assert mine.nonzero()[:, 0].tolist() == warped(line, params).nonzero()[:, 0].tolist()


def test_rows_of_every_kind_in_one_batch_are_as_alone() -> None:
    rows = [row(params, seed=7) for params in [*SHAPES, Params()]] * 3
    logits = random_logits(len(rows), 5000, scale=1.0)
    together = sample(logits, rows)
    assert together == [sample(logits[i:i + 1], [seq])[0] for i, seq in enumerate(rows)]


@pytest.mark.parametrize("others", [1, 7])
def test_a_seed_decides_whatever_other_rows_there_are(others: int) -> None:
    """Bitwise: what is cut off is equal, so that no seed whatsoever can draw another token."""
    params = Params(temperature=0.9, top_p=0.9, top_k=50)
    logits = random_logits(1 + others, 49152, seed=3)
    alone, together = logits[:1] / 0.9, logits / 0.9
    neighbours = [Params(temperature=1.5, top_p=0.9999)] * others
    assert torch.equal(serve.cutoffs(alone, [params]), serve.cutoffs(together, [params, *neighbours])[:1])
    for seed in range(6):
        mine = row(params, [1, 2], [3], seed)
        company = [row(neighbour, seed=seed + 1) for neighbour in neighbours]
        assert sample(logits[:1], [mine])[0] == sample(logits, [mine, *company])[0]
        assert sample(logits[:1], [mine])[0] == sample(logits.flip(0), [*company, mine])[-1]


def test_the_nucleus_alone_or_beside_others_is_bitwise_the_same() -> None:
    for scale in (0.1, 1.0, 5.0):
        scores = random_logits(40, 49152, scale=scale)
        params = [Params(temperature=1.0, top_p=0.05 + 0.02 * i) for i in range(40)]
        together = serve.cutoffs(scores, params)
        for i in range(40):
            assert serve.cutoffs(scores[i:i + 1], params[i:i + 1]).equal(together[i:i + 1])


def test_positions_and_seeds_draw_differently() -> None:
    logits, params = torch.zeros(1, VOCAB), Params(temperature=1.0)
    by_seed = {sample(logits, [row(params, seed=seed)])[0].id for seed in range(50)}
    by_position = {sample(logits, [row(params, [1], [2] * n)])[0].id for n in range(50)}
    assert len(by_seed) > 30 and len(by_position) > 30


def test_uniform_is_uniform() -> None:
    points = sorted(serve.uniform(seed, position) for seed in (0, 1, -1, 2**63 - 1, -2**63) for position in range(2000))
    assert 0 <= points[0] and points[-1] < 1 and len(set(points)) == len(points)
    assert max(abs(point - (i + 0.5) / len(points)) for i, point in enumerate(points)) < 1.95 / math.sqrt(len(points))


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-10, 1e-38, 1e-320], ids=str)
def test_cold_is_greedy(temperature: float) -> None:
    logits = random_logits(8)
    tokens = sample(logits, [row(Params(temperature=temperature, top_p=0.9), seed=i) for i in range(8)])
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [Params(temperature=2.0, top_p=0.0), Params(temperature=2.0, top_k=1), Params(
    temperature=2.0, min_p=1.0)], ids=shown)
def test_one_token_is_always_kept(params: serve.SamplingParams) -> None:
    logits = random_logits(8)
    assert [token.id for token in sample(logits, [row(params, seed=i) for i in range(8)])] == logits.argmax(-1).tolist()


def test_equal_scores_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    assert draws(logits[0], Params(temperature=1.0, top_k=2), 200).keys() == {1, 2, 3}


def test_greedy_next_to_hot() -> None:
    logits = random_logits(6)
    rows = [row(Params(temperature=2.0 * (i % 2)), seed=i) for i in range(6)]
    tokens = sample(logits, rows)
    assert [token.id for token in tokens[::2]] == logits[::2].argmax(-1).tolist()
    assert tokens[1::2] == sample(logits[1::2], rows[1::2])


def test_no_rows() -> None:
    assert sample(random_logits()[:0], []) == sample(random_logits()[:0].bfloat16(), []) == []


PROMPT, ANSWER = [3, 4, 4, 5], [4, 6, 6, 6, 7]


@pytest.mark.parametrize("penalty", [1.3, 0.7, 10.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = random_logits()
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + ANSWER]), logits.clone())
    got = serve.adjust(logits, [row(Params(repetition_penalty=penalty), PROMPT, ANSWER)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("params", [Params(presence_penalty=1.5), Params(frequency_penalty=-0.5), Params(
    presence_penalty=-2.0, frequency_penalty=0.25), Params(logit_bias={6: 5.0, 100: -100.0}), Params(
    repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={6: 1.0, 3: -1.0, 8: 2.0})], ids=str)
def test_the_published_formulas(params: serve.SamplingParams) -> None:
    logits = random_logits()
    expected = logits[0].tolist()
    for id in range(VOCAB):
        if id in PROMPT + ANSWER:
            expected[id] *= 1 / params.repetition_penalty if expected[id] > 0 else params.repetition_penalty
        count = ANSWER.count(id)
        expected[id] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
        expected[id] += params.logit_bias.get(id, 0.0)
    got = serve.adjust(logits, [row(params, PROMPT, ANSWER)])
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_only_the_rows_that_ask_are_adjusted() -> None:
    logits = random_logits(3)
    before = logits.clone()
    plain = row(Params(), PROMPT, ANSWER)
    got = serve.adjust(logits, [plain, row(Params(logit_bias={9: 50.0})), plain])
    assert got[[0, 2]].equal(before[[0, 2]]) and got[1].argmax() == 9 and logits.equal(before)


@pytest.mark.parametrize("generated, banned", [(0, True), (2, True), (3, False), (4, False)])
def test_no_stop_before_min_tokens(generated: int, banned: bool) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 9], logits[0, 5] = 10.0, 9.0, 8.0
    params = Params(min_tokens=3, stop_token_ids=frozenset({2, 9}), logit_bias={2: 100.0})
    assert sample(logits, [row(params, [1], [7] * generated)])[0].id == (5 if banned else 2)


def test_a_bias_forces_and_forbids() -> None:
    logits = random_logits()
    best = int(logits.argmax())
    assert sample(logits, [row(Params(logit_bias={17: 100.0}))])[0].id == 17
    assert sample(logits, [row(Params(logit_bias={best: -100.0}))])[0].id == int(logits[0].argsort()[-2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = random_logits(4).to(dtype)
    params = [Params(logprobs=3, temperature=1.7, top_k=2, logit_bias={11: 90.0}), Params(logprobs=0), Params(),
              Params(logprobs=20)]
    tokens = sample(logits, [row(p, PROMPT, ANSWER) for p in params])
    exact = logits.double().log_softmax(-1)
    assert tokens[0].id == 11 and tokens[2].logprob is None and tokens[2].top == () and tokens[1].top == ()
    for i in (0, 1, 3):
        assert tokens[i].logprob == pytest.approx(exact[i, tokens[i].id].item(), abs=1e-5)
        assert len(tokens[i].top) == params[i].logprobs
        values = exact[i].topk(params[i].logprobs).values.tolist()
        assert [logprob for _, logprob in tokens[i].top] == pytest.approx(values, abs=1e-5)
        assert all(exact[i, id].item() == pytest.approx(logprob, abs=1e-5) for id, logprob in tokens[i].top)
    assert tokens[3].top[0] == (tokens[3].id, tokens[3].logprob)  # greedy: one computation for both


def test_scores_are_what_with_logprobs_says_of_each_row() -> None:
    """However many rows there are, and however many alternatives a neighbour wants."""
    prompts = [[1, 2, 3] * 30, [7, 8], [9] * 50, [5]]
    params = [Params(score_prompt=True, logprobs=k) for k in (2, 5, 0, 1)]
    batch = {row(p, prompt): len(prompt) for p, prompt in zip(params, prompts)} | {row(Params(logprobs=1), [3, 4]): 2}
    logits = random_logits(89 + 1 + 49).bfloat16()
    found = serve.score(logits, batch)
    assert [len(tokens) for tokens in found.values()] == [89, 1, 49]
    exact, rows = logits.double().log_softmax(-1), iter(range(len(logits)))
    for seq, tokens in found.items():
        assert [token.id for token in tokens] == seq.token_ids[1:]
        for token in tokens:
            i = next(rows)
            assert token.logprob == pytest.approx(exact[i, token.id].item(), abs=1e-5)
            assert [logprob for _, logprob in token.top] == pytest.approx(
                exact[i].topk(seq.sampling.logprobs).values.tolist(), abs=1e-5)
    assert serve.score(logits[:0], {row(Params(), [1]): 1}) == {}


def test_bfloat16_is_drawn_from_as_float32() -> None:
    logits = random_logits(16).bfloat16()
    rows = [row(Params(temperature=1.0, top_p=0.9, repetition_penalty=1.1), PROMPT, ANSWER, seed) for seed in range(16)]
    assert sample(logits, rows) == sample(logits.float(), rows)


def test_the_whole_chain_against_generate(tiny) -> None:
    """Greedy with a repetition penalty over several tokens, by a model of random weights."""
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[5, 9, 5]])
    expected = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                repetition_penalty=3.0, eos_token_id=None)[0, 3:].tolist()
    seq = row(Params(repetition_penalty=3.0), [5, 9, 5])
    with torch.inference_mode():
        for _ in range(12):
            seq.token_ids.append(sample(network(torch.tensor([seq.token_ids])).logits[:, -1], [seq])[0].id)
    assert seq.generated == expected
