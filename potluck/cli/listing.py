"""Listings for people: a line an entry, and below it what does not fit into the line. What is copied from one is never broken.

A terminal wraps a line that is longer than itself, and gives it back whole when it is copied; so a name that is longer than the line
is left to the terminal, and everything else is laid out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from potluck.wording import printable

GAP = 2
"""Spaces between two columns, and before what stands below an entry."""
PIPE_COLUMNS = 10_000
"""More than any line has: a pipe has no width, and nothing is broken to fit into one."""
NOTHING = ("", "-", "?")
"""Cells that are not worth a word below an entry."""


@dataclass
class Listing:
    """Rows below a heading. The columns come in the order of their worth: those at the end that do not fit stand below, by name.

    `below[i]` are lines of text for people that stand below row i, and their words wrap; in a pipe they end its line.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    right: Sequence[str] = ()
    """Columns that hold numbers."""
    below: Sequence[Sequence[str | Text]] = field(default=())

    @property
    def width(self) -> int:
        """Of a line that has all columns."""
        return sum(self._widths()) + GAP * (len(self.columns) - 1)

    def lines(self, width: int) -> Iterator[Text]:
        """As it is printed on so many columns."""
        rows = [[_text(cell) for cell in row] for row in self.rows]
        widths = self._widths()
        piped = width >= PIPE_COLUMNS
        shown = len(widths) if piped else _fitting(widths, width)
        yield self._line([Text(printable(column), style="bold") for column in self.columns[:shown]], widths)
        for place, row in enumerate(rows):
            told = self.below[place] if self.below else ()
            line = self._line(row[:shown], widths)
            if piped:  # programs there take a line for an entry
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
    """What is known of one thing: a line for each, its name before it. What is not known is left out."""

    rows: Sequence[tuple[str, str | Text]]

    def lines(self, width: int) -> Iterator[Text]:
        """As they are printed on so many columns."""
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
    """A line of text that is broken as those below an entry are."""

    text: str | Text
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before = " " * self.indent
        return (_whole(Text.assemble(before, line)) for line in wrapped(self.text, options.max_width - self.indent))


def wrapped(text: str | Text, width: int) -> Iterator[Text]:
    """Its lines, broken at gaps (`loss 0.5  accuracy 0.9`), or else between words: one that is longer than the line stays whole."""
    return _joined(_text(text).split(" " * GAP), width)


def _joined(pieces: Iterable[Text], width: int, between: str = " " * GAP) -> Iterator[Text]:
    """The pieces in lines; one that is longer than a line is broken at its gaps, or between its words."""
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
    """How many of the first columns fit into a line, one at least."""
    taken = -GAP
    for place, column in enumerate(widths):
        taken += GAP + column
        if taken > width:
            return max(1, place)
    return len(widths)


def _text(cell: str | Text, kept: str = "") -> Text:
    """What is shown of a cell: names in it come from files and from other people, and may hold anything."""
    if isinstance(cell, str):
        return Text(printable(cell, kept))
    shown = printable(cell.plain, kept)
    return cell if shown == cell.plain else Text(shown, style=cell.style)


def _whole(line: Text) -> Text:
    """As a line that rich neither wraps nor cuts."""
    line.no_wrap, line.overflow = True, "ignore"
    return line
