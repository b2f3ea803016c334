import pytest
import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.sample.guidance import guide, guided_velocity, stack


def embedding(rows, length, value=1.0, width=3):
    return TextEmbedding(
        hidden=torch.full((rows, length, width), value), mask=torch.ones(rows, length, dtype=torch.bool)
    )


class MeanText:
    """A model whose velocity is the mean of the text it sees; remembers the batches it was given."""

    def __init__(self):
        self.batches, self.encoded = [], 0

    def encode_condition(self, text):
        self.encoded += 1
        total = sum((e.hidden * e.mask[..., None]).sum(dim=(1, 2)) for e in text)
        return total / sum(e.mask.sum(dim=1) * e.hidden.shape[2] for e in text)

    def __call__(self, latent, time, text):
        self.batches.append(latent.shape[0])
        assert time.shape == (latent.shape[0],)
        return text.view(-1, 1, 1, 1, 1).expand_as(latent)


def test_equation_1_8():
    unconditional, conditional = torch.randn(2, 1, 2, 3, 4, 5, dtype=torch.float64)
    guided = guide(unconditional, conditional, 7.5)
    torch.testing.assert_close(guided, unconditional + 7.5 * (conditional - unconditional))
    assert torch.equal(guide(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)


@pytest.mark.parametrize("lengths", [(1, 4), (4, 1), (3, 3)])
def test_both_halves_run_as_one_batch_with_padding_masked(lengths):
    model = MeanText()
    null, own = embedding(1, lengths[0], value=2.0), embedding(3, lengths[1], value=5.0)
    velocity = guided_velocity(model, [own], [null], 4.0)
    result = velocity(torch.zeros(3, 2, 1, 2, 2), torch.tensor(0.3))
    assert model.batches == [6]
    torch.testing.assert_close(result, torch.full((3, 2, 1, 2, 2), -3 * 2.0 + 4 * 5.0))


def test_scale_1_skips_the_unconditional_half_and_text_is_encoded_once():
    model = MeanText()
    velocity = guided_velocity(model, [embedding(2, 3, value=5.0)], [embedding(1, 9)], 1.0)
    for _ in range(3):
        assert (velocity(torch.zeros(2, 1, 1, 1, 1), torch.tensor(0.5)) == 5.0).all()
    assert model.batches == [2, 2, 2]
    assert model.encoded == 1


def test_stack_keeps_rows_in_order_and_masks_what_it_adds():
    null = TextEmbedding(hidden=torch.randn(1, 2, 3), mask=torch.tensor([[True, False]]))
    own = TextEmbedding(hidden=torch.randn(2, 4, 3), mask=torch.ones(2, 4, dtype=torch.bool))
    (both,) = stack([null], [own])
    assert both.mask.tolist() == 2 * [[True, False, False, False]] + 2 * [4 * [True]]
    assert torch.equal(both.hidden[:2, :2], null.hidden.expand(2, -1, -1))
    assert (both.hidden[:2, 2:] == 0).all()
    assert torch.equal(both.hidden[2:], own.hidden)


def test_pooled_text_is_stacked_and_moved_as_well():
    null, own = (
        TextEmbedding(
            hidden=torch.randn(rows, 2, 3), mask=torch.ones(rows, 2).bool(), pooled=torch.randn(rows, 5)
        )
        for rows in (1, 2)
    )
    (both,) = stack([null], [own])
    assert torch.equal(both.pooled, torch.cat((null.pooled, null.pooled, own.pooled)))
    moved = both.to(torch.empty(0, dtype=torch.float64))
    assert {moved.hidden.dtype, moved.pooled.dtype} == {torch.float64} and moved.mask.dtype == torch.bool
    (plain,) = stack([embedding(1, 2)], [embedding(2, 2)])
    assert plain.pooled is None and plain.to(torch.empty(0)).pooled is None
