"""Text files, split at their headings without loss; and the hold-out."""

import json

import pytest

from delib_fast.config import SourceConfig
from delib_fast.data import read_source, split_holdout
from delib_fast.data.read.text_files import cut_at_headings

# --- text files ---------------------------------------------------------------------------------------------

MARKDOWN = """\
preface

# One {#one}
## Bare
### Deep
deep text
```sh
# no heading
```
~~~~xml
~~~
# nor this
~~~~
## Next
#hashtag, no heading
# Two
"""


def test_headings_in_code_and_bare_headings_do_not_start_a_section():
    sections = list(cut_at_headings(MARKDOWN))
    assert [(s.line, s.context) for s in sections] == [(1, ()), (3, ()), (14, ("# One {#one}",)), (16, ())]
    assert sections[1].body.startswith("# One {#one}\n## Bare\n### Deep\ndeep text\n```sh\n# no heading")
    assert sections[2].text == "# One {#one}\n\n## Next\n#hashtag, no heading\n"
    assert "".join(s.body for s in sections) == MARKDOWN


@pytest.mark.parametrize(
    "text", ["", "\n", "# a", "# a\n# b\n# c", "## a\n# b\n### c\n## d\ntext", "a\r\n# b\r\nc\x0b# d"]
)
def test_splitting_at_headings_loses_nothing(text):
    assert "".join(s.body for s in cut_at_headings(text)) == text


def test_whole_text_file_is_one_document(tmp_path):
    (tmp_path / "spec.md").write_text(MARKDOWN)
    (row,) = read_source("spec", SourceConfig(path=str(tmp_path / "spec.md")))
    assert row.text == MARKDOWN


@pytest.mark.data
def test_the_model_spec_is_split_at_its_headings(shared_data):
    rows = read_source("spec", SourceConfig(path=str(shared_data / "model_spec.md"), cut="headings"))
    assert 60 < len(rows) < 120
    text = (shared_data / "model_spec.md").read_text()
    assert "".join(s.body for s in cut_at_headings(text)) == text
    assert all(row.text.startswith("#") for row in rows)


# --- holdout ------------------------------------------------------------------------------------------------


def documents(folder, count):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(count)))
    return read_source("rows", SourceConfig(path=str(path)))


def test_the_holdout_of_a_row_depends_on_that_row_only(tmp_path):
    rows = documents(tmp_path, 2000)
    train, held_out = split_holdout(rows, 0.1)
    assert 150 < len(held_out) < 250
    assert sorted([*train, *held_out], key=lambda r: rows.index(r)) == list(rows)
    fewer = rows[::3]
    held = {row.digest for row in held_out}
    assert {row.digest for row in split_holdout(fewer, 0.1)[1]} == held & {row.digest for row in fewer}
    assert held < {row.digest for row in split_holdout(rows, 0.2)[1]}
    assert split_holdout(rows, 0.0) == (list(rows), [])


def test_a_holdout_that_leaves_no_row_is_refused(tmp_path):
    rows = documents(tmp_path, 1)
    with pytest.raises(ValueError, match="leaves no row for evaluation"):
        split_holdout(rows, 0.0001)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        split_holdout(rows, 1.0)
