"""Curation signals, one a file, and the judge of success. A score lies in [0, 1], higher is better, nan abstains."""
