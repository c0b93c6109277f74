"""The interface of a method: all that the trainer, the evaluator and the launcher may use of it.

The code is in common/method.py, because the trainer in common/ needs its types. Methods import it from here.
"""

from pixlat.common.method import (
    Batch,
    Component,
    DataInfo,
    Description,
    Method,
    OpenReleased,
    ParamGroup,
    Pretrained,
    Released,
    guidance_facts,
)

__all__ = [
    "Batch",
    "Component",
    "DataInfo",
    "Description",
    "Method",
    "OpenReleased",
    "ParamGroup",
    "Pretrained",
    "Released",
    "guidance_facts",
]
