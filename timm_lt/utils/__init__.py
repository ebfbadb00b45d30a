"""Shared by all packages: errors and checks, files, console, processes, long-tail arithmetic."""
