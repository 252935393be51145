"""dreamgen: turn compute into robot demonstrations, stage by stage."""

__version__ = "0.19.0"
