"""Policies: what guests may reach.

`Policy` and `Rule` say it, from Python, files and command lines. The data plane decides by a table that is
compiled of them, and `Policy.check` asks the same table.
"""
