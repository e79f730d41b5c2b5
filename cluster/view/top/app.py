"""The screen of `megatoken top`: draws what view.py says, and turns keys into sorting, filtering and requests.

A change of the cluster (drain, scale) is asked for only after "y" on a dialog that says what will happen. Works at
80x24 and over SSH: no mouse, no colour and no glyph beyond the block characters is needed to read it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Final, Protocol

import grpc
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.coordinate import Coordinate
from textual.events import Key
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from megatoken.cluster.view.top import view as top_view
from megatoken.cluster.view.top.view import Column, Inputs, TopRow
from megatoken.v1.control_pb2 import Event

REDRAW_S: Final = 1.0
EVENT_LINES: Final = 4
MAX_FILTER: Final = 60
STATE_STYLES: Final = {"READY": "green", "DRAINING": "yellow", "FAILED": "bold red", "STOPPED": "dim"}
STARTING_STYLE: Final = "cyan"


class TopFeed(Protocol):
    """What the screen needs of its source; top_feed.Feed is the real one."""

    @property
    def events(self) -> Sequence[Event]: ...

    def inputs(self) -> Inputs: ...
    async def drain(self, replica: str) -> None: ...
    async def scale(self, model: str, replicas: int) -> None: ...


class Ask(ModalScreen[bool]):
    """A yes-or-no question; anything but "y" is no."""

    BINDINGS: ClassVar[list[Any]] = [("y", "dismiss(True)", "yes"), ("n,escape,q", "dismiss(False)", "no")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(f"{self._question}\n\ny  yes      n  no", id="dialog", markup=False)


class AskNumber(ModalScreen[int | None]):
    """Asks how many replicas; None when it was left."""

    BINDINGS: ClassVar[list[Any]] = [("escape", "dismiss(None)", "leave")]

    def __init__(self, model: str, wanted: int) -> None:
        super().__init__()
        self._model, self._wanted = model, wanted

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog"):
            yield Static(f"Replicas of {self._model} (now {self._wanted}); Enter, or Esc to leave", markup=False)
            yield Input(str(self._wanted), type="integer", max_length=5, id="number")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        number = int(event.value) if event.value.strip().isdigit() else None
        self.dismiss(number)


class Find(ModalScreen[None]):
    """Takes the filter, key by key; `changed` hears of each. A screen of its own, so that no letter is a command."""

    def __init__(self, text: str, changed: Callable[[str], None]) -> None:
        super().__init__()
        self._text, self._changed = text, changed

    def compose(self) -> ComposeResult:
        yield Static(id="find", markup=False)

    def on_mount(self) -> None:
        self._take(self._text)

    def on_key(self, event: Key) -> None:
        event.stop()
        if event.key in ("enter", "escape"):
            if event.key == "escape":
                self._take("")
            self.dismiss(None)
        elif event.key == "backspace":
            self._take(self._text[:-1])
        elif event.is_printable and event.character is not None and len(self._text) < MAX_FILTER:
            self._take(self._text + event.character)

    def _take(self, text: str) -> None:
        self._text = text
        self.query_one("#find", Static).update(f"filter: {text}▏   Enter keeps it, Esc clears it")
        self._changed(text)


class Top(App[None]):
    """The live view."""

    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "top.tcss"
    BINDINGS: ClassVar[list[Any]] = [
        Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "find", "filter", key_display="/", priority=True),
        Binding("d", "drain", "drain"),
        Binding("plus,equals_sign", "scale_by(1)", "more", key_display="+"),
        Binding("minus", "scale_by(-1)", "fewer", key_display="-"),
        Binding("n", "scale_to", "scale"),
        Binding("e", "events", "events"),
        Binding("p", "pause", "pause"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, feed: TopFeed, clock: Callable[[float], str] | None = None) -> None:
        super().__init__()
        self._feed = feed
        self._clock = clock or _wall_clock
        self._sort, self._reverse, self._find = "replica", False, ""
        self._paused = False
        self._shown = Inputs()
        self._columns: dict[str, tuple[Column, ...]] = {}
        self._titles: dict[str, list[str]] = {}

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield Static(id="headline", markup=False)
        yield Static(id="facts", markup=False)
        yield Static(id="warning", markup=False)
        yield DataTable(id="models", cursor_type="row", zebra_stripes=False)
        yield DataTable(id="replicas", cursor_type="row", zebra_stripes=False)
        yield Static(id="events", markup=False)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#replicas", DataTable).focus()
        self.set_interval(REDRAW_S, self.redraw)
        self.redraw()

    def on_resize(self) -> None:
        self.redraw()

    def redraw(self) -> None:
        """Draws the newest answers, or the held ones while paused."""
        if not self.is_running:
            return
        if not self._paused:
            self._shown = self._feed.inputs()
        width = self.size.width
        head = top_view.header(self._shown, width)
        find = f"   filter {self._find!r}" if self._find else ""
        self._say("title", (head.title + find + ("   PAUSED" if self._paused else "")).ljust(width))
        self.query_one("#headline", Static).update(
            Text.assemble((head.rate, "bold"), "  ", (head.spark, "green"), no_wrap=True, overflow="ellipsis")
        )
        self._say("facts", "\n".join(head.lines))
        self._say("warning", head.warning)
        self.query_one("#warning").display = bool(head.warning)
        models = top_view.model_rows(self._shown)
        self._fill("models", top_view.columns_for(top_view.MODEL_COLUMNS, width), models)
        rows = top_view.replica_rows(self._shown, self._sort, self._reverse, self._find)
        self._fill("replicas", top_view.columns_for(top_view.REPLICA_COLUMNS, width), rows)
        self._draw_events()

    def _say(self, widget: str, text: str) -> None:
        self.query_one(f"#{widget}", Static).update(Text(text, no_wrap=True, overflow="ellipsis"))

    def _draw_events(self) -> None:
        panel = self.query_one("#events", Static)
        lines = max(panel.size.height - 1, EVENT_LINES - 1)
        events = [top_view.event_line(event, self._clock) for event in list(self._feed.events)[-lines:]]
        text = Text("events", "dim", no_wrap=True, overflow="ellipsis")
        for line in events:
            text.append("\n" + line)
        panel.update(text)

    def _fill(self, name: str, columns: tuple[Column, ...], rows: Sequence[TopRow]) -> None:
        """Writes rows into a table in place, so that the cursor stays on the row it is on."""
        table: DataTable[Text] = self.query_one(f"#{name}", DataTable)
        chosen = self._chosen(name)
        titles = [self._column_title(name, column) for column in columns]
        if (self._columns.get(name), self._titles.get(name)) != (columns, titles):
            table.clear(columns=True)
            for column, title in zip(columns, titles, strict=True):
                table.add_column(_cell(column, title, "bold"), width=column.width, key=column.key)
            self._columns[name], self._titles[name] = columns, titles
        if [row.key for row in rows] != [str(key.value) for key in table.rows]:
            table.clear()
            for row in rows:
                table.add_row(*(_cell(column, row.cells[column.key], _style(row)) for column in columns), key=row.key)
            for number, row in enumerate(rows):
                if row.key == chosen:
                    table.move_cursor(row=number)
            return
        for number, row in enumerate(rows):
            for place, column in enumerate(columns):
                cell = _cell(column, row.cells[column.key], _style(row))
                if table.get_cell_at(Coordinate(number, place)) != cell:
                    table.update_cell_at(Coordinate(number, place), cell)

    def _column_title(self, table: str, column: Column) -> str:
        if table != "replicas" or column.key != self._sort:
            return column.title
        return ("↑" if column.number == self._reverse else "↓") + column.title

    def _chosen(self, name: str) -> str | None:
        """The key of the row under a table's cursor."""
        table: DataTable[Text] = self.query_one(f"#{name}", DataTable)
        if not table.is_valid_row_index(table.cursor_row):
            return None
        return table.coordinate_to_cell_key(Coordinate(table.cursor_row, 0)).row_key.value

    def _chosen_model(self) -> str | None:
        """The model under the cursor: that of the focused table, or the only one there is."""
        if self.query_one("#models", DataTable).has_focus:
            return self._chosen("models")
        replica = self._chosen("replicas")
        for status in self._shown.status.replicas:
            if status.replica == replica:
                return status.model
        return self._chosen("models")

    # -- keys --
    # "/" has priority: it takes effect before the next key is looked at, so that "/code" in one piece types "code" into
    # the filter. The others wait behind the table's own keys, so that "down, d" drains the next one.

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While a dialog is open, keys are the dialog's."""
        return not isinstance(self.screen, ModalScreen)

    def action_sort(self) -> None:
        orders = top_view.REPLICA_SORTS
        self._sort = orders[(orders.index(self._sort) + 1) % len(orders)]
        self.redraw()

    def action_reverse(self) -> None:
        self._reverse = not self._reverse
        self.redraw()

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.redraw()

    def action_events(self) -> None:
        """Shows the events in place of the tables, and back."""
        self.query_one("#events").toggle_class("whole")
        for name in ("models", "replicas"):
            table = self.query_one(f"#{name}")
            table.display = not table.display
        self.call_after_refresh(self.redraw)

    def action_find(self) -> None:
        def changed(text: str) -> None:
            self._find = text
            self.redraw()

        self.push_screen(Find(self._find, changed))

    def key_escape(self) -> None:
        """Esc shows every replica again."""
        self._find = ""
        self.redraw()

    def action_drain(self) -> None:
        replica = self._chosen("replicas")
        if replica is None:
            self.notify("no replica is chosen", severity="warning")
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self._request(lambda: self._feed.drain(replica), f"{replica} drains")

        self.push_screen(Ask(f"Drain {replica}? It takes no new requests and ends after its last."), answered)

    def action_scale_by(self, step: int) -> None:
        model = self._chosen_model()
        wanted = self._wanted(model)
        if model is not None and wanted is not None and wanted + step >= 0:
            self._ask_scale(model, wanted, wanted + step)

    def action_scale_to(self) -> None:
        model = self._chosen_model()
        wanted = self._wanted(model)
        if model is None or wanted is None:
            self.notify("no model is chosen", severity="warning")
            return

        def answered(number: int | None) -> None:
            if number is not None and number != wanted:
                self._ask_scale(model, wanted, number)

        self.push_screen(AskNumber(model, wanted), answered)

    def _wanted(self, model: str | None) -> int | None:
        return next((entry.wanted for entry in self._shown.status.models if entry.model == model), None)

    def _ask_scale(self, model: str, now: int, then: int) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self._request(lambda: self._feed.scale(model, then), f"{model} scales from {now} to {then}")

        self.push_screen(Ask(f"Scale {model} from {now} to {then} replicas?"), answered)

    def _request(self, call: Callable[[], Awaitable[None]], done: str) -> None:
        async def send() -> None:
            try:
                await call()
            except grpc.aio.AioRpcError as error:
                self.notify(error.details() or error.code().name, severity="error", timeout=10)
            else:
                self.notify(done)

        self.run_worker(send(), exit_on_error=False)


def _cell(column: Column, text: str, style: str) -> Text:
    shown = text if len(text) <= column.width else text[: column.width - 1] + "…"
    return Text(shown.rjust(column.width) if column.number else shown, style=style, no_wrap=True)


def _style(row: TopRow) -> str:
    return STATE_STYLES.get(row.state, STARTING_STYLE)


def _wall_clock(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))
