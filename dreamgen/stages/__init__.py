"""One pure function per stage: reads directories, writes one directory."""
