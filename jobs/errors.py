"""What the user is told when a job cannot go on: one line on stderr and status 2, a traceback only for our faults."""

import errno
import os
import re
import sys
import traceback

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# how numpy and torch say that a disk is full: without its number
FULL = (os.strerror(errno.ENOSPC), "requested and", "Not enough free space to write", "PytorchStreamWriter failed")
PLACE = (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)  # of files that are named
MENDABLE = (ValueError, OSError, TypeError, ImportError)  # what building a part from a configuration raises


class speaking:
    """A context in which an error that the user can mend ends the process with one line and status 2."""

    def __init__(self, *, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> "speaking":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        message = explain(error) if error is not None else None
        if message is None:
            return
        if self.debug:
            traceback.print_exception(error)
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2)


def explain(error: BaseException) -> str | None:
    """The sentence for the user; None for a fault of ours, whose traceback is wanted."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    cause = chain[-1]
    for link in chain:
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(text in str(link) for text in FULL):
            where = getattr(link, "filename", None) or "below `out`"
            return f"the disk is full ({where}). Free some space and give the same command again: it continues"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues where it stopped"
    if missing := re.search(r"Missing mandatory value: (\S+)(?:\s+full_key: (\S+))?", str(cause)):
        key = missing[1] if "." in missing[1] or not missing[2] else missing[2]
        return f"{key} is not given; add {key}=..."
    if isinstance(cause, YAMLError):
        return f"a configuration cannot be read: {' '.join(str(cause).split())}"
    place = isinstance(cause, PLACE) or isinstance(cause, OSError) and cause.errno == errno.EROFS
    if place and cause.filename:
        return f"{cause.filename}: {cause.strerror}. Choose another path, or mend it"
    if isinstance(error, InstantiationException):  # its text repeats the cause and adds the key
        where = str(error).partition("full_key: ")[2].strip()
        if cause is error:
            return str(error)
        told = next((link for link in chain if isinstance(link, MENDABLE)), None)  # what was raised, with its remedy
        return None if told is None else f"{told}" + (f" (at {where})" if where else "")
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        why = "" if "LexerNoViable" in str(error) else f" ({str(error).splitlines()[0]})"
        hint = f"; quote its value, and all of it for the shell: '{key}=\"{value}\"'"
        return f"'{error.override}' cannot be read{why}" + (hint if value and value[0] not in "[{'\"" else "")
    if type(error).__module__.startswith("submitit."):  # a process that the launcher started
        told = re.findall(r"^error: (.*)$", str(error), re.MULTILINE)
        why = told[-1] if told else next(iter(str(error).splitlines()), "it was killed")
        return f"a shard failed: {why}. The same command continues"
    if "hydra/launcher/submitit" in str(error):
        return "this launcher needs hydra-submitit-launcher: pip install hydra-submitit-launcher"
    if isinstance(error, HydraException | OmegaConfBaseException):
        # Hydra proposes `+key=value` for an unknown key, which we refuse
        text = re.sub(r"\.?\nTo append to your config use .*", ": no such setting; `--cfg job` lists all", str(error))
        why = f": {str(cause).splitlines()[0]}" if cause is not error and str(cause) else ""
        return text.partition("\nConfig search path:")[0].strip() + why
    return str(error).strip() if isinstance(error, ValueError) else None
