"""The small classifiers take what the toy data sets give."""

import pytest
import torch

from dybit.demo.classifiers import DigitCNN, DigitViT, SignalCNN


@pytest.mark.parametrize(("make", "features"), [(SignalCNN, 40), (DigitCNN, 64), (DigitViT, 64)])
def test_shapes(make, features):
    logits = make()(torch.randn(3, features))
    assert logits.shape == (3, 10) and logits.requires_grad
