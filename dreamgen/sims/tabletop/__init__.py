"""A simulated Sawyer arm on a table with a drawer, a button, a plate and three blocks: 14 instructions, 20 Hz."""

from dreamgen.sims.tabletop.appearance import Appearance
from dreamgen.sims.tabletop.sim import Tabletop

__all__ = ["Appearance", "Tabletop"]
