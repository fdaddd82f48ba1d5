"""Tables and plots from what is stored."""


def show() -> None: ...
