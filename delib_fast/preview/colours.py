"""The colour of each segment in a terminal. `reports/templates/style.css` has those of the pages."""

from delib_fast.data import Segment

COLOURS = {
    Segment.PROMPT: "grey62",
    Segment.COT: "dark_orange3",
    Segment.RESPONSE: "green4",
    Segment.DOCUMENT: "dodger_blue2",
}
