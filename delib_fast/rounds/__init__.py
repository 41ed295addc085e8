"""Rounds of on-policy self-improvement: sample from the current model, judge with the spec, keep, train, and repeat.

    delib-fast rounds CONFIG

`settings.py` is the configuration; `run.py` is the loop; `sampling.py`, `judging.py`, `cot_scan.py` and `selection.py`
are its steps.
"""
