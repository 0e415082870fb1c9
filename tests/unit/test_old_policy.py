"""The policy that is kept beside the trained one."""

import pytest
import torch
from torch import nn

from vipo.training.old_policy import OldPolicy


def test_the_old_policy_follows_and_takes_its_place() -> None:
    network = nn.Linear(2, 2, bias=False)
    trainable = dict(network.named_parameters())
    with torch.no_grad():
        network.weight.fill_(1.0)
    old, x = OldPolicy(network, trainable), torch.ones(1, 2)
    with torch.no_grad():
        network.weight.fill_(3.0)
    kept = network.weight.data_ptr()
    with old.instead():
        assert network(x).tolist() == [[2, 2]]
        assert float(old.tensors["weight"][0, 0]) == 3
    assert network(x).tolist() == [[6, 6]]
    with pytest.raises(RuntimeError, match="stopped"), old.instead():
        raise RuntimeError("stopped")
    assert network(x).tolist() == [[6, 6]]
    assert network.weight.data_ptr() == kept
    old.follow(0.75)
    assert old.tensors["weight"].unique().tolist() == [1.5]
    old.follow(0.0)
    assert torch.equal(old.tensors["weight"], network.weight)
    assert not old.tensors["weight"].requires_grad
