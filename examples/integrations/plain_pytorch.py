"""Use delib_fast in a plain PyTorch loop: python examples/integrations/plain_pytorch.py [MODEL]."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import delib_fast
from delib_fast.integrations.hf import WeightedFlattening

torch.manual_seed(0)
small = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
model = (
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    if sys.argv[1:]
    else AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **small))
)
delib_fast.apply(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = [{"input_ids": torch.randint(512, (n,)), "loss_weights": torch.rand(n)} for n in (30, 7, 52)]  # your data
batch = WeightedFlattening()(rows)  # one packed row; each document attends only to itself
for step in range(5):
    loss = model(**batch).loss  # Σ weight·nll / Σ weight, without logits
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
delib_fast.unapply(model)
