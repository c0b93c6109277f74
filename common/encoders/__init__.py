"""Frozen networks that measure or teach and are never trained here, one module each."""
