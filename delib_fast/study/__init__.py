"""A study: arms of the method compared side by side, configured in one file.

    delib-fast study STUDY.yaml

Arms × sizes of the AFT set × seeds. Each stage is trained once, however many arms share it.
"""

from __future__ import annotations

from delib_fast.study.run import StudyResult, run_study
from delib_fast.study.settings import StudyConfig, load_study

__all__ = ["StudyConfig", "StudyResult", "load_study", "run_study"]
