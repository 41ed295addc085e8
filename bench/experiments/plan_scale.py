"""Plan the first stage of a run, and print what it took as JSON: seconds, peak memory and tokens.

    python bench/experiments/plan_scale.py run.yaml

`bench_data.py` runs it in a process of its own, whose peak memory is that of the plan.
"""

import json
import resource
import sys
import time
from pathlib import Path

from delib_fast.config.load import load_config
from delib_fast.preview.plan import plan_run

config = load_config(Path(sys.argv[1]), [])
imported_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
_, plans = plan_run(config, ranks=1, precision="bf16", card_gib=80.0)
print(
    json.dumps(
        {
            "seconds": time.perf_counter() - began,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "imported_mib": imported_kib / 1024,
            "rows": plans[0].rows,
            "tokens": plans[0].tokens_per_epoch,
            "packs": plans[0].packs,
        }
    )
)
