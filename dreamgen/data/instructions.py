"""What an episode was told to do, wherever a LeRobot dataset says it."""

from collections.abc import Callable, Mapping

import pyarrow as pa

from dreamgen.data.columns import check_instruction
from dreamgen.data.layout import Entry


def find_instruction(entry: Entry, table: pa.Table, tasks: Mapping[int, object], note: Callable[[str], None]) -> str:
    """The task that an annotation of the description names and that is not empty, else that of task_index, else the
    episode's first task.

    table: the rows of the episode; tasks: texts by index; note: is told what was passed over.

    Raises ValueError if that is no text, or empty.
    """
    keys = [key for key in table.column_names if key.startswith("annotation.") and key.endswith("task_description")]
    text = None
    for key in [*keys, "task_index"]:
        if key in table.column_names and pa.types.is_integer(table[key].type):
            found = table[key].unique().to_pylist()
            named = tasks.get(found[0])
            if len(found) > 1:
                note(f"'{key}' names several instructions in one episode; took the first")
            if named is not None and (key == "task_index" or str(named).strip()):  # an empty annotation says nothing
                text = named
                break
    if text is None and entry.tasks:
        text = entry.tasks[0]
    text = check_instruction(text)
    others = sorted({str(task).strip() for task in entry.tasks} - {text})
    if others:
        note(f"the episode list also names {', '.join(map(repr, others))} as a task; it is no instruction")
    return text
