"""Loss and error as sums over samples, however they are spread over batches and ranks."""

import pytest
import torch
from torch import nn

from normlab.subject import Score, Scoring, measure


class Fixed(nn.Module):
    """Its inputs are its outputs."""

    def forward(self, x):
        assert not self.training
        return x


def labelled(sizes=(5, 3, 1)):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 4, (n,), generator=generator))
        for n in sizes
    ]


def by_hand(batches):
    loss = wrong = 0.0
    for x, y in batches:
        for row, label in zip(x.double().tolist(), y.tolist(), strict=True):
            total = sum(torch.tensor(row, dtype=torch.float64).exp().tolist())
            loss += torch.tensor(total, dtype=torch.float64).log().item() - row[label]
            wrong += max(range(4), key=row.__getitem__) != label
    return wrong, loss


def assert_score(score, n, wrong, loss):
    assert (score.n, score.error_sum) == (n, wrong)
    assert score.loss_sum == pytest.approx(loss, rel=1e-12)
    assert score.error == pytest.approx(100 * wrong / n)
    assert score.loss == pytest.approx(loss / n)


def test_classification_needs_no_word():
    model = Fixed().train()
    score = measure(model, labelled(), Scoring())
    assert_score(score, 9, *by_hand(labelled()))
    assert model.training


def test_a_loss_of_ones_own_is_weighed_by_samples():
    scoring = Scoring(
        forward=lambda model, batch: {"out": model(batch["x"])},
        loss=lambda outputs, batch: (outputs["out"].mean(), batch["wrong"]),
    )
    batches = [{"x": torch.full((n, 2), float(n)), "wrong": n / 10} for n in (1, 4)]
    score = measure(Fixed(), batches, scoring)
    assert_score(score, 5, 1 * 0.1 + 4 * 0.4, 1 * 1.0 + 4 * 4.0)
    alone = measure(Fixed(), [torch.ones(3, 2)], Scoring(loss=lambda y, _: y.sum()))
    assert (alone.loss, alone.error) == (6.0, None)


@pytest.mark.parametrize(
    "batch",
    [(torch.ones(3, 2), None), torch.ones(3, 2), (torch.ones(3, 2), torch.ones(3)),
     (torch.ones(3, 2), torch.ones(3, 2).long())],
)  # fmt: skip
def test_without_classes_nothing_is_known(batch):
    assert measure(Fixed(), [batch], Scoring()) == Score(3, None, None)


def test_what_one_batch_does_not_know_the_sum_does_not():
    assert Score(2, 1.0, 3.0) + Score(1, None, 1.0) == Score(3, None, 4.0)


@pytest.mark.parametrize(
    ("batch", "loss", "said"),
    [
        ((torch.ones(2, 4), torch.tensor([0, 4])), None, "go from 0 to 4, and the model tells 4"),
        ((torch.ones(2, 4), torch.tensor([-1, 0])), None, "go from -1 to 0, and the model tells 4"),
        (torch.ones(2, 4), lambda y, _: y, "returns its mean over the batch, .* not Tensor"),
        (torch.ones(2, 4), lambda *_: "good", "returns its mean over the batch, .* not str"),
        ({"name": "a"}, None, "a batch of type str holds no tensor"),
    ],
)
def test_what_cannot_be_scored_is_refused(batch, loss, said):
    scoring = Scoring(loss=loss)
    with pytest.raises(ValueError, match=said):
        measure(Fixed(), [batch], scoring)


def shared(rank):
    """Rank 3 has nothing."""
    shares = [labelled()[0:1], labelled()[1:2], labelled()[2:3], []]
    unlabelled = [[(x, None) for x, _ in share] for share in shares]
    return [measure(Fixed(), each[rank], Scoring()) for each in (shares, unlabelled)]


def test_ranks_score_together(ranks):
    for known, unknown in ranks.run(shared):
        assert_score(known, 9, *by_hand(labelled()))
        assert unknown == Score(9, None, None)
