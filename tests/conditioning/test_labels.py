"""Labels, their table and their names."""

import pytest
import torch

from kinoflow.conditioning.labels import LabelEmbedding, LabelEncoder, Labels
from kinoflow.configs.errors import UserError
from kinoflow.train.run.batches import moved


def labels(*index, classes=3):
    return Labels(index=torch.tensor(index), classes=classes)


def test_the_table_has_a_row_for_each_class_and_one_for_none():
    table = LabelEmbedding(3, 5)
    torch.nn.init.normal_(table.weight)
    assert table.weight.shape == (4, 5)
    found = table(labels(2, 0, 3))
    assert torch.equal(found, table.weight[[2, 0, 3]])
    found.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [1, 0, 1, 1]


def test_dropped_labels_are_none():
    assert labels(0, 1, 2).without(torch.tensor([True, False, True])).index.tolist() == [3, 1, 3]


@pytest.mark.parametrize("index", [[4], [0, -1]])
def test_a_label_outside_the_table_is_one_line(index):
    with pytest.raises(UserError, match=r"^label: -?\d is no class of 0\.\.2; take one of these$"):
        labels(*index)


def test_labels_of_another_number_of_classes_are_refused():
    """Their ∅ would be a class here, or outside the table."""
    with pytest.raises(ValueError, match="of 3 classes, and the model has 4"):
        LabelEmbedding(4, 2)(labels(3))


def test_a_class_is_named_or_numbered_and_a_name_goes_first():
    encoder = LabelEncoder(["cat", "1", "dog"])
    assert encoder(["cat", "2", " dog ", "1", "0"]).index.tolist() == [0, 2, 2, 1, 0]
    assert encoder.null().index.tolist() == [3]
    assert encoder.name("0") == "cat"
    assert encoder.name("1") == "1"
    for unknown in ("3", "-1", "cow", "", "²"):
        with pytest.raises(
            UserError, match=r"is no class; name one of cat, 1, dog, or give its number, 0 to 2"
        ):
            encoder([unknown])
    with pytest.raises(UserError, match=r"name one of c0, .*, c11, …, or"):
        LabelEncoder([f"c{i}" for i in range(40)])(["x"])


def test_labels_move_with_their_batch():
    found = moved((labels(1, 2),), torch.device("meta"))[0]
    assert found.index.is_meta
    assert found.classes == 3
