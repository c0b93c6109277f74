"""Experiments that train several models to answer one question. Only here does evaluation name methods."""
