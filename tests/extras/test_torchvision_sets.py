"""extras/torchvision_sets.py: what we add to torchvision, for whose classes others stand here."""

import pytest
from numpy.testing import assert_array_equal
from torchvision import datasets as torchvision_sets

from data import datasets, prepare
from data.datasets import load_images, split_images
from tests.conftest import call, refused
from tests.data.packing import random_pixels, write_folder

# Of each image, the class
LABELS = [3 * i % 10 for i in range(50)]


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    return tmp_path


class Stand:
    """What torchvision's sets have, of which the last 10 of 50 images are the test set's."""

    images = random_pixels(50, 32, 32, 3)
    classes = tuple(f"kind {i}" for i in range(10))

    def __init__(self, root, train, download):
        if download:
            raise OSError(f"no network for {root}")
        part = slice(40) if train else slice(40, None)
        self.data, self.targets = self.images[part], LABELS[part]

    def __len__(self):
        return len(self.data)


class Digits(Stand):
    images = random_pixels(50, 28, 28)
    classes = tuple(f"{i} - digit" for i in range(10))


@pytest.mark.parametrize(
    "name, stand, size, channels, label",
    [("CIFAR10", Stand, 32, 3, "kind 3"), ("MNIST", Digits, 28, 1, "3")],
)
def test_images_come_as_they_were_and_those_of_the_test_files_validate(
    name, stand, size, channels, label, monkeypatch
):
    monkeypatch.setattr(torchvision_sets, name, stand)
    image_set = load_images(name, size, channels=channels, labels=True)
    assert_array_equal(image_set.images.squeeze(), stand.images)
    assert image_set.inputs["label"].tolist() == LABELS
    assert image_set.label_names[3] == label
    split = split_images(image_set, "official")
    assert split.val_indices.tolist() == list(range(40, 50))
    assert split.rule == "its test images"

    # Other images under the same names are noticed, as those of FashionMNIST are.
    monkeypatch.setattr(stand, "images", 255 - stand.images)
    again = load_images(name, size, channels=channels)
    assert_array_equal(again.images, 255 - image_set.images)


def test_a_missing_set_is_one_sentence_and_downloaded_only_if_asked_for(data_folder, monkeypatch):
    write_folder(data_folder / "cifar-10-batches-py", [], more={"data_batch_1": b"damaged"})
    with refused(r"CIFAR10 cannot .* Delete a damaged .* binary version is not read.*download"):
        load_images("CIFAR10", 32)
    with refused("MNIST cannot be read .* --download"):
        load_images("MNIST", 28)
    monkeypatch.setattr(torchvision_sets, "CIFAR10", Stand)
    with refused(f"no network for {data_folder}"):
        call(prepare, "CIFAR10 --download")
    with refused("only CIFAR10 and MNIST can"):
        call(prepare, "FFHQ --download")
