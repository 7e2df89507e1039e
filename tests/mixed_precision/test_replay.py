"""Tests of replay: the same outputs, bit for bit, and no replay where it would change them."""

import torch
from searched import batches, net
from torch import nn

from dybit import Candidate
from dybit.mixed_precision.estimators import Twins
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.replay import Replay


def test_replayed_blocks_change_nothing():
    subject = Subject(net(), batches(3))
    replay, twins = Replay(subject), Twins(subject)
    assert set(replay._kept) == {"blocks.0", "blocks.1"}
    for name in subject.layers:
        with subject.replaced(twins.of(name, Candidate(2, 4))) as model:
            expected = subject.judge.error(model)
        with replay.before([name]), subject.replaced(twins.of(name, Candidate(2, 4))) as model:
            assert subject.judge.error(model) == expected
        assert all("forward" not in module.__dict__ for module in subject.model.modules())


def test_earlier_blocks_are_not_run():
    subject = Subject(net(), batches())
    replay, runs = Replay(subject), []
    for block in subject.model.blocks:
        block[0].register_forward_pre_hook(lambda module, _: runs.append(module))
    with replay.before(["blocks.1.0"]):
        subject.judge.error(subject.model)
    assert runs == [subject.model.blocks[1][0]] * 2
    with replay.before(["attention.out_proj"]):  # never called by itself: the attention around it counts
        subject.judge.error(subject.model)
    assert len(runs) == 2


class Counting(nn.Module):
    """Blocks with a side effect that the result depends on."""

    def __init__(self, twice=False):
        super().__init__()
        self.blocks, self.twice, self.seen = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), twice, []
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        self.seen = []
        for block in self.blocks:
            x = block(x)
            if self.twice:
                x = block(x)
        return self.head(x)


def test_side_effects_and_repeated_blocks_are_not_replayed():
    model = Counting()
    model.blocks[0].register_forward_hook(lambda *_: model.seen.append(1))

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.total = nn.ModuleList([Adds(self), Adds(self)]), 0.0

        def forward(self, x):
            self.__dict__["total"] = 0.0
            for block in self.blocks:
                x = block(x)
            return x + self.total

    class Adds(nn.Linear):
        def __init__(self, owner):
            super().__init__(4, 4)
            self.__dict__["owner"] = owner

        def forward(self, x):
            self.owner.__dict__["total"] += 1.0
            return super().forward(x)

    subject = Subject(Sums(), [torch.randn(2, 4)])
    for block in subject.model.blocks:
        block.__dict__["owner"] = subject.model
    assert Replay(subject)._kept == {}
    assert Replay(Subject(Counting(twice=True), [torch.randn(2, 4)]))._kept == {}
