"""Checks bfloat16 attention under ONEDNN_MAX_CPU_ISA, which selects the loops when the process first uses them.

The heads are those of SmolLM2-135M (9 query heads, 3 kv heads of 64), and an odd shape with a window, a cap and sinks.
Prints a digest of the results.
"""

import hashlib

import torch
from attention_cases import assert_as_accurate_as_torch, inputs, run, run_eager, sinks_of

digest = hashlib.sha256()
for lengths, heads, dims, options in (
    ([130, 1, 64, 97], (9, 3), (64, 64), {}),
    ([200, 65, 32], (2, 1), (48, 80), {"window": 70, "softcap": 1.5}),
    ([129, 40], (4, 2), (16, 16), {"window": 3}),
):
    data = inputs(lengths, heads, dims[0], torch.bfloat16, value_dim=dims[1])
    if "softcap" in options:
        data.append(sinks_of(heads[0], torch.bfloat16))
    exact = run("reference", lengths, *(x.double() for x in data), **options)
    ours = run("cpu", lengths, *data, **options)
    assert_as_accurate_as_torch(ours, exact, run_eager(lengths, *data, **options), torch.bfloat16)
    for result in ours:
        digest.update(result.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
