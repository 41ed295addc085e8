"""Making the data: from a spec to deliberation rows and midtraining documents.

    delib-fast deliberate SPEC PROMPTS -o OUT      rows of prompt, CoT and response, without the spec
    delib-fast document SPEC -o OUT --tokens 1M    documents for model spec midtraining
    delib-fast data-report OUT                     what the data is like

`rows.py` and `documents.py` read from top to bottom as the two pipelines; `client.py` sends, `ledger.py` keeps.
"""
