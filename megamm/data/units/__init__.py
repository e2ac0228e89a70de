"""Named units of work on data, run by this machine's processes or by Ray, and kept over a kill."""
