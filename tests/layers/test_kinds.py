"""Kinds of layers: their weights, inputs and channels."""

import torch
from helpers import Padded, conv1d
from torch import nn

from dybit.layers.kinds import (
    channel_dim,
    channel_groups,
    channels,
    inner_weights,
    input_places,
    transposed,
    weight_names,
)


def test_what_is_asked_about_modules():
    attention = nn.MultiheadAttention(8, 2)
    assert weight_names(attention) == ("in_proj_weight",)
    assert weight_names(nn.MultiheadAttention(8, 2, kdim=4)) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert weight_names(nn.LayerNorm(4)) == weight_names(nn.Bilinear(4, 4, 4)) == ()
    assert weight_names(nn.LSTM(4, 4)) == ("weight_ih_l0", "weight_hh_l0")
    assert inner_weights(nn.LSTM(4, 4, 2)) == ("weight_hh_l0", "weight_ih_l1", "weight_hh_l1")
    assert weight_names(Padded(1, 1, 1)) == weight_names(conv1d()) == ("weight",)
    conv = nn.ConvTranspose2d(4, 6, 1, groups=2)
    assert (transposed(conv), channel_groups(conv), channels(conv)) == (2, 2, 4)
    assert (transposed(conv1d()), channels(conv1d())) == (1, 9)
    assert (transposed(nn.Linear(3, 2)), channels(nn.Linear(3, 2))) == (0, 3)
    assert channels(nn.Conv2d(6, 4, 1, groups=2)) == 6
    assert channel_dim(conv, torch.zeros(1, 4, 2, 2)) == 1 and channel_dim(conv, torch.zeros(4, 2, 2)) == 0
    assert channel_dim(nn.Linear(3, 2), torch.zeros(2, 5, 3)) == 2
    x, mask = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert input_places(nn.Linear(1, 1), (), {"factor": 2, "input": x}) == ["input"]
    assert input_places(nn.Linear(1, 1), (mask, x), {"y": x}) == [1]
    assert input_places(nn.Linear(1, 1), (mask,), {}) == []
    assert input_places(attention, (x, x, x, x), {}) == [0, 1, 2]
    assert input_places(attention, (x,), {"attn_mask": x, "value": x, "key": x}) == [0, "key", "value"]
