"""The definition of lora_linear, in plain torch: the chain of products that peft's layers run."""

from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    adapter_input: Tensor | None = None,
) -> Tensor:
    """Run the op; the arguments and the result are those of `ops.lora_linear`."""
    update = linear(linear(x if adapter_input is None else adapter_input, lora_a), lora_b)
    return linear(x, weight, bias) + update * scaling
