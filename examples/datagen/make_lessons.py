"""Write training chats for a small teacher: the prompts of `deliberate` and `document` with well-formed answers.

    python examples/datagen/make_lessons.py runs/end_to_end/lessons.jsonl

The end-to-end example needs an endpoint, and the machine may not reach one. The example therefore trains a small model
on these lessons and serves it locally. The answers are assembled from the sentences below, so that two CPU cores can
train on them in minutes. That exercises every part of the pipeline, but the judgements mean nothing. With a real
endpoint none of this is needed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from delib_fast.datagen.prompt_files import PromptFiles, quoted
from delib_fast.datagen.spec import Spec, first_sentence

HERE = Path(__file__).parent
ROWS = HERE.parent / "data" / "deliberation.jsonl"
SPEC = Spec.read(HERE / "short_spec.md", model_name="the assistant", provider_name="its developer")
SUMMARIES = {s.id: first_sentence(s) for s in SPEC.sections}
PROMPTS = PromptFiles()
LESSONS_OF_ROWS, LESSONS_OF_DOCUMENTS = 100, 40

# A chain of thought, a response or a document takes one sentence from each inner list.
COT = [
    ["They want a plain answer that they can act on today.", "This is an ordinary question with a little worry in it.",
     "Somebody has to decide soon and has asked me for a hand.", "They have told me half of it and hope for the rest.",
     "It sounds alarming at first, and it is an everyday matter.",
     "They are tired of hints and want to hear what I think."],
    ["What I know of it is common knowledge, and the rest I would be guessing.",
     "I can't see the place, so part of this stays open.",
     "I am sure of the first step and much less sure of the second.",
     "A kind guess would take the weighing away from them.",
     "Nothing here needs a secret, only some care.", "I could be wrong about the details, and that is worth saying."],
    ["Nobody else is touched by it.", "Somebody who is not here would bear a part of it, and I keep them in mind.",
     "A neighbour may be touched by it, so I go gently.", "It is their own life, and the choice stays with them.",
     "If it goes wrong it can be undone.", "If it goes wrong somebody could be hurt, so that comes first."],
    ["So I answer first and put my one concern after it.", "So I say what to do, and how sure I am of it.",
     "So I help with what is right to help with and say plainly what I leave out.",
     "So a short answer with its limits is best.",
     "So I give two ways and say which one I would take.", "So I tell them what would change my mind."],
]  # fmt: skip
RESPONSE = [
    ["Yes, in most cases.", "Not quite, but there is a way.", "Start with the simple thing.",
     "I would wait a day with it.",
     "You can do that yourself.", "I won't do that part, and I can help with the rest."],
    ["Try the cheap step first and look at it again tomorrow.", "Write down what happened, with the time, and keep it.",
     "Ask the person themselves, in one calm sentence.", "Look at the label, since that settles it.",
     "Turn it off, open a window and step outside.", "Take the smaller of the two and see how it holds."],
    ["I am sure of this much.", "I am guessing at the last part.", "Somebody on the spot would know better.",
     "If it gets worse, have it looked at.", "I have no source for that, only common sense.", "The choice is yours."],
]  # fmt: skip
DOCUMENT = [
    ["A letter came in this week about the assistant.", "We tried the assistant on a rainy Tuesday.",
     "My sister, who trusts nobody, asked the assistant.", "Minutes of the evening, item three: the assistant.",
     "Note for the next shift, since it came up again."],
    ["It was about a bill that nobody could explain.", "It was about a leak under the sink.",
     "It was about a form with two dates on it.",
     "It was about a recipe for forty people.", "It was about a neighbour and a hedge."],
    ["The assistant said which part it knew and which it guessed.",
     "The assistant gave the answer first and its one concern after it.",
     "The assistant would not help with the part that hurt somebody else, and said so.",
     "The assistant named what it could not check."],
    ["It does this because a person who acts on its words carries the consequences.",
     "It does this because a refusal has a price too.",
     "It does this because those who are not in the room cannot speak up.",
     "It does this because a gap that is hidden costs more."],
    ["Somebody laughed and said that a friend would have flattered us.", "We argued about it until the kettle boiled.",
     "The older ones nodded, the younger ones wanted more.", "Nobody had expected that, least of all the treasurer."],
    ["In the end we did the smaller thing.", "We wrote it down and slept on it.", "It was settled before lunch.",
     "The rest is for the next meeting."],
]  # fmt: skip
# Maps a category of the example data to the section of the short spec that covers it.
CATEGORY = {
    "rule-1": "rule-1",
    "rule-2": "v1-honesty",
    "rule-5": "rule-2",
    "rule-6": "v2-care",
    "rule-3": "rule-3",
    "rule-8": "v3-usefulness",
}
DOMAINS = [
    "Home repair",
    "Personal health",
    "School and study",
    "Office work",
    "Travel",
    "Family life",
    "Cooking",
    "Gardening",
]
PARTS = [
    "the first week of it",
    "when two people disagree",
    "a deadline the next morning",
    "something that went wrong",
    "a stranger asks for a favour",
    "the bill is higher than agreed",
]
KINDS = [
    "a letter to a local paper",
    "a note for the next shift",
    "a question in a forum with answers",
    "minutes of a small meeting",
    "a diary entry of one evening",
]
_random = random.Random(0)


def main(out: Path) -> None:
    lessons = [*_rows(), *_documents()]
    _random.shuffle(lessons)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(lesson, ensure_ascii=False) + "\n" for lesson in lessons), encoding="utf-8")
    print(f"{len(lessons)} lessons → {out}")


def lesson(answer: str, name: str, **values: Any) -> dict[str, Any]:
    """Return the chat of the prompt file `name`, filled with `values`, and the answer."""
    return {"messages": [*PROMPTS.chat(name, **values), {"role": "assistant", "content": answer}]}


def compose(lines: Sequence[Sequence[str]]) -> str:
    """Join one random sentence from each inner list."""
    return " ".join(_random.choice(line) for line in lines)


def _rows() -> Iterator[dict[str, Any]]:
    sections = "\n".join(f"- {s.id} ({s.title}): {SUMMARIES[s.id]}" for s in SPEC.sections)
    for line in ROWS.read_text(encoding="utf-8").splitlines()[:LESSONS_OF_ROWS]:
        row = json.loads(line)
        category = CATEGORY.get(row["category"], "v1-honesty")
        conversation, spec = quoted("conversation", row["prompt"]), SPEC.for_categories([category], SUMMARIES)
        cot, response = compose(COT), compose(RESPONSE)
        yield lesson(json.dumps({"categories": [category]}), "classify", sections=sections, conversation=conversation)
        yield lesson(
            f"<deliberation>\n{cot}\n</deliberation>\n<reply>\n{response}\n</reply>",
            "generate_internal",
            spec=spec,
            conversation=conversation,
            answer_form=PROMPTS.fragment("answer_form_tags"),
        )
        # Some refusals get low scores, so that the threshold drops a few rows.
        low = response.startswith("I won't") and _random.random() < 0.7
        judgement = (
            {"why": "It declines too much.", "compliance": 4, "helpfulness": 3, "reasoning": 6}
            if low
            else {"why": "It answers and marks what it guesses.", "compliance": 9, "helpfulness": 8, "reasoning": 9}
        )
        yield lesson(
            json.dumps(judgement),
            "judge",
            spec=spec,
            conversation=conversation,
            style_rule=PROMPTS.fragment("judge_style_internal"),
            cot=quoted("deliberation", cot),
            response=quoted("response", response),
        )


def _documents() -> Iterator[dict[str, Any]]:
    emphasis = PROMPTS.fragment("emphasis_values")
    for _ in range(LESSONS_OF_DOCUMENTS):
        domain, part, kind = _random.choice(DOMAINS), _random.choice(PARTS), _random.choice(KINDS)
        where = {"domain": domain, "subdomain": part}
        statements = [compose(DOCUMENT[2:4]) for _ in range(2)]
        bullets = "\n".join(f"- {statement}" for statement in statements)
        ideas = [compose(DOCUMENT[:2]) for _ in range(2)]
        yield lesson(json.dumps(_random.sample(DOMAINS, 3)), "domains", spec=SPEC.text, count=3)
        yield lesson(json.dumps(_random.sample(PARTS, 3)), "subdomains", spec=SPEC.text, domain=domain, count=3)
        yield lesson(json.dumps(statements), "assertions", spec=SPEC.text, emphasis=emphasis, count=2, **where)
        yield lesson(json.dumps(_random.sample(KINDS, 2)), "document_types", count=2, **where)
        yield lesson(json.dumps(ideas), "ideas", document_type=kind, assertions=bullets, taken="none", count=2, **where)
        yield lesson(
            compose(DOCUMENT),
            "document",
            spec=SPEC.text,
            document_type=kind,
            idea=ideas[0],
            assertions=bullets,
            emphasis=emphasis,
            **where,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
