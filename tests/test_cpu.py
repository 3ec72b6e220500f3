"""What a run on a CPU leaves out, and that nothing else changes by it."""

import pytest
import tiny
import torch
import trl
from trl.kernels import chunked_logprob

import dpotrainer


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", chunked_logprob._use_triton)
    small = tiny.make_model(tmp_path / "model")
    data = tiny.make_pairs(tmp_path / "pairs.jsonl", 12)
    job = dpotrainer.read_settings(tiny.settings(small, data, tmp_path / "out"))
    start = dpotrainer.load_start(job)
    preferences = dpotrainer.load_preferences(job, start.tokenizer)
    sharing = dpotrainer.check_sharing(job, start, preferences)
    return dpotrainer.build_trainer(job, start, preferences, sharing)


def take_loss(trainer, batch, monkeypatch):
    """(tokens scored by the reference and by the policy, loss, gradients of the adapter)."""
    scored = []
    head = trl.trainer.utils._ChunkedLogProbFunction
    score = head.apply

    def count(hidden, *rest):
        scored.append(len(hidden))
        return score(hidden, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(head, "apply", count)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return scored, loss.item(), torch.cat([weight.grad.flatten() for weight in weights])


def test_a_cpu_scores_the_answers_tokens_alone_with_the_same_loss(trainer, monkeypatch):
    """TRL's head on a CPU would score prompt and padding too, against the whole vocabulary."""
    batch = next(iter(trainer.get_train_dataloader()))
    answers = int(batch["completion_mask"][:, 1:].sum())
    scored, loss, gradient = take_loss(trainer, batch, monkeypatch)
    assert scored == [answers, answers]

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", chunked_logprob._use_triton)
    places = batch["completion_mask"][:, 1:].numel()
    stock_scored, stock_loss, stock_gradient = take_loss(trainer, batch, monkeypatch)
    assert stock_scored == [places, places], "TRL does so itself now: spare_cpu can go"
    assert loss == pytest.approx(stock_loss, abs=1e-6)
    torch.testing.assert_close(gradient, stock_gradient, atol=1e-6, rtol=1e-4)


def test_a_gpu_keeps_the_head_of_trl(trainer, monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", chunked_logprob._use_triton)
    trainer.args.use_cpu = False
    dpotrainer.spare_cpu(trainer.args)
    assert trl.trainer.utils._use_triton is chunked_logprob._use_triton
