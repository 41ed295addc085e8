"""FusedLossHead, the loss as a module that replaces lm_head: tied weights, replaced modules, autocast."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICE, gradients, make_case

from delib_fast.ops import FusedLossHead, linear_cross_entropy


def test_tied_weights(backend):
    embedding = torch.nn.Embedding(103, 24, device=DEVICE)
    head = FusedLossHead(embedding.weight, backend=backend)
    assert head.weight is embedding.weight
    case = make_case()
    tokens = torch.randint(103, (37,), device=DEVICE)
    head(embedding(tokens), *case[2:]).loss_sum.backward()
    tied = embedding.weight.grad
    table, weight = (embedding.weight.detach().clone().requires_grad_() for _ in range(2))
    output = linear_cross_entropy(F.embedding(tokens, table), weight, *case[2:], backend="reference")
    torch.testing.assert_close(tied, sum(gradients(output, table, weight)))


def test_head_replaces_a_linear():
    linear = torch.nn.Linear(24, 103, bias=False, device=DEVICE)
    head = FusedLossHead.from_linear(linear)
    assert head.weight is linear.weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert list(head.state_dict()) == ["weight"]
    with_bias = torch.nn.Linear(4, 8)
    head = FusedLossHead.from_linear(with_bias, logit_scale=0.5)
    assert head.bias is with_bias.bias
    assert head.logit_scale == 0.5

    class LoraLinear(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"LoraLinear is not a plain nn\.Linear"):
        FusedLossHead.from_linear(LoraLinear(4, 8, bias=False))


@pytest.mark.skipif(DEVICE != "cpu", reason="autocast on the CPU")
def test_autocast_sets_the_dtype(backend):
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*case, backend=backend)
    theirs = linear_cross_entropy(*case.to(torch.bfloat16), backend=backend)
    assert ours.nll.equal(theirs.nll)
    assert gradients(ours, case.weight)[0].dtype == torch.float32
