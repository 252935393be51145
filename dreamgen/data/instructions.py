"""What an episode was told to do, wherever a LeRobot dataset says it."""

from collections.abc import Callable, Mapping

import pyarrow as pa

from dreamgen.data.columns import check_instruction
from dreamgen.data.layout import Entry


def find_instruction(entry: Entry, table: pa.Table, tasks: Mapping[int, object], note: Callable[[str], None]) -> str:
    """The task that an annotation of the description names, else task_index, else the episode's first task.

    table: the rows of the episode; tasks: texts by index; note: is told what was passed over.

    Raises ValueError if nothing of these is text that is not empty.
    """
    keys = [key for key in table.column_names if key.startswith("annotation.") and key.endswith("task_description")]
    text = None
    for key in [*keys, "task_index"]:
        if key in table.column_names and pa.types.is_integer(table[key].type):
            found = table[key].unique().to_pylist()
            text = tasks.get(found[0])
            if len(found) > 1:
                note(f"'{key}' names several instructions in one episode; took the first")
            if _told(text):
                break
    if not _told(text) and entry.tasks:
        text = next((task for task in entry.tasks if _told(task)), text)
    text = check_instruction(text)
    others = sorted({str(task).strip() for task in entry.tasks} - {text})
    if others:
        note(f"the episode list also names {', '.join(map(repr, others))} as a task; it is no instruction")
    return text


def _told(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())
