"""Tests run in several processes (pytest-xdist), so that each, and what it starts, gets one thread of the processor."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
