"""The self-test: what does not compute as the model does is found at load."""
from pathlib import Path

import pytest
import serve
import torch
from test_runner import load, random_checkpoint


def test_a_wrong_kernel_does_not_pass_the_self_test(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def skewed(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        return serve.attention.paged_attention_eager(q, *args, **options) * 1.05

    folder = random_checkpoint("Qwen2", tmp_path, checkpoint)
    monkeypatch.setattr(serve, "choose_attention", lambda *_: (skewed, "skewed"))
    assert isinstance(load(folder), serve.SequentialRunner)


def test_attention_of_ours_that_fails_its_self_test_on_a_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: torch.Tensor, *args: object, decodes: int, max_seq_len: int, **options: object) -> torch.Tensor:
        return serve.attention.paged_attention_eager(q, *args, **options) * 1.05

    monkeypatch.setattr(serve, "choose_attention", lambda *_: (wrong, "wrong"))
    assert load(tiny).attention is serve.attention.paged_attention_sdpa


def test_state_in_modules_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Served, one client's prompt would be in another's answer."""
    with pytest.raises(serve.APIError, match="not kept apart"):
        load(random_checkpoint("RecurrentGemma", tmp_path, checkpoint))
