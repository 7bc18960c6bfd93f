"""Listings for people: one line per entry, and below it what does not fit into the line. A text that people copy is never broken.

A terminal wraps a line that is too long, and gives it back whole when it is copied. So the terminal wraps a name that is longer
than the line; everything else is laid out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from potluck.wording import printable

GAP = 2
"""Spaces between two columns, and before the lines below an entry."""
PIPE_COLUMNS = 10_000
"""Wider than any line: a pipe has no width, and nothing is broken there."""
NOTHING = ("", "-", "?")
"""Cells that say nothing: they are not repeated below an entry."""


@dataclass
class Listing:
    """Rows below a heading, the most important columns first. Columns at the end that do not fit stand below the row, with their names.

    `below[i]` are lines of text for people below row i, and their words wrap; in a pipe they end its line.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    right: Sequence[str] = ()
    """Columns that hold numbers."""
    below: Sequence[Sequence[str | Text]] = field(default=())

    @property
    def width(self) -> int:
        """Width of a line with all columns."""
        return sum(self._widths()) + GAP * (len(self.columns) - 1)

    def lines(self, width: int) -> Iterator[Text]:
        """The printed lines for a terminal of `width` columns."""
        rows = [[_text(cell) for cell in row] for row in self.rows]
        widths = self._widths()
        piped = width >= PIPE_COLUMNS
        shown = len(widths) if piped else _fitting(widths, width)
        yield self._line([Text(printable(column), style="bold") for column in self.columns[:shown]], widths)
        for place, row in enumerate(rows):
            told = self.below[place] if self.below else ()
            line = self._line(row[:shown], widths)
            if piped:  # programs read one entry per line
                yield Text(" " * GAP).join([line, *map(_text, told)])
                continue
            yield line
            facts = [
                Text.assemble((f"{column} " if column else "", "dim"), cell)
                for column, cell in zip(self.columns[shown:], row[shown:], strict=True)
                if cell.plain not in NOTHING
            ]
            for text in (*_joined(facts, width - GAP), *(line for said in told for line in wrapped(said, width - GAP))):
                yield Text.assemble(" " * GAP, text)

    def _widths(self) -> list[int]:
        return [
            max([_text(column).cell_len, *(_text(row[place]).cell_len for row in self.rows)])
            for place, column in enumerate(self.columns)
        ]

    def _line(self, cells: Sequence[Text], widths: Sequence[int]) -> Text:
        line = Text()
        for place, (cell, column) in enumerate(zip(cells, self.columns, strict=False)):
            room = " " * (widths[place] - cell.cell_len)
            line.append_text(
                Text.assemble(" " * GAP if place else "", *((room, cell) if column in self.right else (cell, room)))
            )
        line.rstrip()
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return map(_whole, self.lines(options.max_width))


@dataclass
class Facts:
    """Facts about one thing: one line for each, after its name. Unknown facts are left out."""

    rows: Sequence[tuple[str, str | Text]]

    def lines(self, width: int) -> Iterator[Text]:
        """The printed lines for a terminal of `width` columns."""
        rows = [(printable(name), _text(said, "\n")) for name, said in self.rows if _text(said).plain]
        indent = max([len(name) for name, _ in rows], default=0) + GAP
        for name, said in rows:
            head = Text.assemble((name, "bold"), " " * (indent - len(name)))
            for part in said.split("\n"):
                for line in wrapped(part, width - indent):
                    yield Text.assemble(head, line)
                    head = Text(" " * indent)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return map(_whole, self.lines(options.max_width))


@dataclass
class Line:
    """A line of text that wraps like those below an entry."""

    text: str | Text
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before = " " * self.indent
        return (_whole(Text.assemble(before, line)) for line in wrapped(self.text, options.max_width - self.indent))


def wrapped(text: str | Text, width: int) -> Iterator[Text]:
    """The lines of a text, broken at gaps (`loss 0.5  accuracy 0.9`) or else between words; a longer word stays whole."""
    return _joined(_text(text).split(" " * GAP), width)


def _joined(pieces: Iterable[Text], width: int, between: str = " " * GAP) -> Iterator[Text]:
    """The pieces in lines; a piece longer than a line is broken at its gaps, or between its words."""
    line: Text | None = None
    for piece in pieces:
        if line is not None and line.cell_len + len(between) + piece.cell_len <= width:
            line = Text.assemble(line, between, piece)
            continue
        if line is not None:
            yield line
        line = piece
        if piece.cell_len > width and " " in piece.plain:
            gap = " " * GAP if " " * GAP in piece.plain else " "
            *full, line = _joined(piece.split(gap), width, gap)
            yield from full
    if line is not None:
        yield line


def _fitting(widths: Sequence[int], width: int) -> int:
    """How many of the first columns fit into a line; at least one."""
    taken = -GAP
    for place, column in enumerate(widths):
        taken += GAP + column
        if taken > width:
            return max(1, place)
    return len(widths)


def _text(cell: str | Text, kept: str = "") -> Text:
    """A cell as it is shown: names come from files and other people, and may contain any character."""
    if isinstance(cell, str):
        return Text(printable(cell, kept))
    shown = printable(cell.plain, kept)
    return cell if shown == cell.plain else Text(shown, style=cell.style)


def _whole(line: Text) -> Text:
    """A line that rich neither wraps nor cuts."""
    line.no_wrap, line.overflow = True, "ignore"
    return line
