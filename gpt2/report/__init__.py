"""The report stage and its parts: what came out of a run, for people."""
