"""Carries many small items of many callers in few large requests, each item with its own outcome.

`core` decides and does nothing; `shell` does what it decides; `thread` runs all shells; `port` is the callers' way
there and back. Nothing here knows Milvus.
"""
