"""Experiments that train several models to answer one question. Only this part of evaluation names methods."""
