"""The time of every network of the benchmark against its original, in one run, under several runtimes."""


def measure() -> None: ...
