"""CIFAR-10 and MNIST by torchvision: what we add to its classes, for which others stand here."""

import pytest
from numpy.testing import assert_array_equal
from torchvision import datasets as torchvision_sets

from data import datasets, prepare
from data.datasets import load_images, split_images
from tests.conftest import call, refused
from tests.data.packing import random_pixels

DIGITS = random_pixels(47, 28, 28)
PHOTOS = random_pixels(107, 32, 32, 3)
# Of each image, the class
LABELS = [3 * i % 10 for i in range(107)]


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(prepare, "DATA_FOLDER", tmp_path)
    return tmp_path


def stand_in(images, train_count, classes):
    """Return a class with what torchvision's sets have, of images (N, ...) and LABELS."""

    class Set:
        def __init__(self, root, train, download):
            if download:
                raise OSError(f"no network for {root}")
            part = slice(train_count) if train else slice(train_count, len(images))
            self.data, self.targets, self.classes = (
                images[part],
                LABELS[: len(images)][part],
                classes,
            )

        def __len__(self):
            return len(self.data)

    return Set


@pytest.mark.parametrize(
    "name, images, train_count, classes",
    [
        ("MNIST", DIGITS, 40, [f"{i} - digit" for i in range(10)]),
        ("CIFAR10", PHOTOS, 100, [f"kind {i}" for i in range(10)]),
    ],
)
def test_images_come_as_they_were_and_those_of_the_test_files_validate(
    name, images, train_count, classes, monkeypatch
):
    monkeypatch.setattr(torchvision_sets, name, stand_in(images, train_count, classes))
    size, channels = images.shape[1], images[..., None].shape[3]

    image_set = load_images(name, size, channels=channels, inputs=["label"])
    assert_array_equal(image_set.images, images.reshape(len(images), size, size, channels))
    assert image_set.inputs["label"].tolist() == LABELS[: len(images)]
    assert image_set.facts["label_names"][3] == classes[3].removesuffix(" - digit")
    assert image_set.ids == list(range(len(images)))
    for split_name in ("reference", "official"):
        split = split_images(image_set, split_name)
        assert split.train_indices.tolist() == list(range(train_count))
        assert split.val_indices.tolist() == list(range(train_count, len(images)))
        assert "its test images" in split.description

    # Other images under the same names are noticed, as those of FashionMNIST are.
    monkeypatch.setattr(torchvision_sets, name, stand_in(255 - images, train_count, classes))
    assert (load_images(name, size, channels=channels).images == 255 - image_set.images).all()


def test_a_missing_set_is_one_sentence_and_downloaded_only_if_asked_for(data_folder, monkeypatch):
    (data_folder / "cifar-10-batches-py").mkdir()
    (data_folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"damaged")
    with refused(r"CIFAR10 cannot .* Delete a damaged .* binary version is not read.*download"):
        load_images("CIFAR10", 32)
    with refused("MNIST cannot be read .* --download"):
        load_images("MNIST", 28)
    monkeypatch.setattr(torchvision_sets, "CIFAR10", stand_in(PHOTOS, 100, []))
    with refused(f"no network for {data_folder}"):
        call(prepare, "CIFAR10 --download")
    with refused("only CIFAR10 and MNIST can"):
        call(prepare, "FFHQ --download")
