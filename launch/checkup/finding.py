"""What one check found: a level, sentences, and the command that mends it. Imports no torch."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
TOOL_SECONDS = 20  # for a program of the system, such as nvidia-smi or sinfo


@dataclass(frozen=True)
class Finding:
    """One answer of the doctor."""

    level: str  # ok; note: pixlat works, but could work better; problem: something that pixlat needs does not work
    text: str  # sentences
    mend: str = ""  # a command or a setting that mends it
    facts: Mapping[str, Any] = field(default_factory=dict)  # the numbers behind the text, for as=json

    def as_json(self, topic: str) -> dict[str, Any]:
        """One object of the JSON output."""
        return {"topic": topic, "level": self.level, "text": self.text, "mend": self.mend, "facts": dict(self.facts)}


def ok(text: str, **facts: Any) -> Finding:
    """Something that works."""
    return Finding(OK, text, facts=facts)


def note(text: str, mend: str = "", **facts: Any) -> Finding:
    """Something that a user may want to know or to improve; pixlat works without it."""
    return Finding(NOTE, text, mend, facts)


def problem(text: str, mend: str, **facts: Any) -> Finding:
    """Something that must be mended before pixlat works as it should."""
    return Finding(PROBLEM, text, mend, facts)


def tool_output(command: Sequence[str], seconds: float = TOOL_SECONDS) -> str | None:
    """What a program of the system prints on stdout. None if it is missing, fails, or takes too long."""
    return run_tool(command, seconds)[0]


def run_tool(command: Sequence[str], seconds: float = TOOL_SECONDS) -> tuple[str | None, str]:
    """(what a program prints on stdout, ""), or (None, why it gave no answer)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout, ""
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} did not answer within {seconds:g} s"
    except subprocess.CalledProcessError as error:
        return None, next(
            iter(reversed(error.stderr.strip().splitlines())), f"{command[0]} ended with exit code {error.returncode}"
        )
    except OSError as error:
        return None, first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
