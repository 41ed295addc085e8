"""Data generation: from a spec to deliberation rows and midtraining documents.

    delib-fast deliberate SPEC PROMPTS -o OUT      rows of prompt, CoT and response, without the spec
    delib-fast document SPEC -o OUT --tokens 1M    documents for model spec midtraining
    delib-fast data-report OUT                     a report on the data

`rows.py` and `documents.py` are the two pipelines. Both use a `session.py`; `client.py` sends the requests, and
`request_log.py` stores the answers.
"""
