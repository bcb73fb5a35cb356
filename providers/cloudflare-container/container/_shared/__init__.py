"""The shared core: vendored byte for byte into every provider folder as `_shared/` (`make sync`).

Imports allowed here: the standard library, `anthropic`, and relative siblings; that is what makes the copies identical.
"""
