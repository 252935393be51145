"""Progress bars with rate and remaining time that also leave a log behind."""

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


def file_logger(name: str, path: Path) -> logging.Logger:
    """A logger that appends to `path`; asking twice gives the same one."""
    logger = logging.getLogger(f"dreamgen.{name}")
    logger.setLevel(logging.INFO)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = str(path.resolve())
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler) and handler.baseFilename != wanted:
            logger.removeHandler(handler)
            handler.close()
    if not logger.handlers:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    return logger


def bar(total: int, desc: str, *, initial: int = 0, unit: str = "it", hidden: bool = False) -> tqdm:
    """A tqdm bar on stderr; it redraws rarely where nobody watches."""
    return tqdm(total=total, disable=hidden, initial=initial, desc=desc, unit=unit, file=sys.stderr, dynamic_ncols=True,
                smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip


def progress(items: Iterable[T], total: int, desc: str, out: Path | None = None, *, unit: str = "it") -> Iterator[T]:
    """Yield `items` under a bar; with `out`, each tenth is logged to `out/<desc>.log`."""
    logger = file_logger(desc, Path(out) / f"{desc.replace(' ', '_')}.log") if out is not None else None
    with bar(total, desc, unit=unit) as drawn:
        for index, item in enumerate(items):
            yield item
            drawn.update()
            if logger and (index + 1 == total or (index + 1) % max(1, total // 10) == 0):
                rate = (index + 1) / max(drawn.format_dict["elapsed"], 1e-9)  # the bar's own waits for it to be drawn
                logger.info("%d/%d %s, %.2f %s/s", index + 1, total, desc, rate, unit)
