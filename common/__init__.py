"""The code that all methods share. It imports no method.

The rooms (folders) import each other in one direction only; tests/test_layout.py checks it.
"""
