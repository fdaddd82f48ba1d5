"""Where a network goes: torch.compile, torch.export, runtimes, files."""
