"""What all methods share.

Nothing here knows a method; the rooms import each other in one direction (tests/test_layout.py).
"""
