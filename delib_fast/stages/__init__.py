"""The two stages of the method as Python, and recipes that chain them.

    from delib_fast.stages import AFT, MSM, Recipe, run

    recipe = Recipe(
        run_dir="runs/mine",
        model="path/to/a/model",
        stages=[
            MSM("documents.jsonl", pack_capacity=8192, tokens_per_step=262_144),
            AFT("rows.jsonl", cot="train", cot_weight=0.5, response_weight=1.0),
        ],
    )
    result = run(recipe)

A recipe is the same thing as a YAML file: `recipe.yaml()` writes it, and `recipe.config()` is what both become.
"""

from __future__ import annotations

from delib_fast.stages.recipe import AFT, MSM, Recipe, Stage, run

__all__ = ["AFT", "MSM", "Recipe", "Stage", "run"]
