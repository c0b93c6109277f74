"""The training loop and what it consists of. Start with loop.py."""
