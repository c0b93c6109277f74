"""A sequence of strings in one buffer. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class Names(Sequence[str]):
    """A sequence of strings, stored in one buffer.

    A list of Python strings would be copied into every forked loader process, because reading a string changes its
    reference count.
    """

    def __init__(self, buffer: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
        self.buffer, self.starts, self.lengths = buffer, starts, lengths

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        """Makes it from strings. File names need not be valid UTF-8."""
        encoded = [os.fsencode(text) for text in texts]
        lengths = np.array([len(text) for text in encoded], dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends - lengths, lengths)

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """Concatenates several."""
        before = np.cumsum([0, *(len(part.buffer) for part in parts)])
        starts = [part.starts + shift for part, shift in zip(parts, before[:-1].tolist(), strict=True)]
        return cls(
            *(
                np.concatenate(arrays)
                for arrays in ([part.buffer for part in parts], starts, [part.lengths for part in parts])
            )
        )

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names(self.buffer, self.starts[index], self.lengths[index])
        return os.fsdecode(self.raw(index))

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def raw(self, index: int) -> bytes:
        """The bytes of a string."""
        start = int(self.starts[index])
        return self.buffer[start : start + int(self.lengths[index])].tobytes()

    def chosen(self, positions: NDArray[np.int64]) -> Names:
        """The strings at these positions. The result shares the buffer."""
        return Names(self.buffer, self.starts[positions], self.lengths[positions])

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays to store in a file, for `Names.from_arrays`."""
        return {f"{name}_buffer": self.buffer, f"{name}_lengths": self.lengths}

    @classmethod
    def from_arrays(cls, arrays: Any, name: str) -> Names:
        """Makes it from stored arrays. Raises ValueError if they are inconsistent.

        The strings must lie in the buffer one after another, without gaps.
        """
        buffer, lengths = arrays[f"{name}_buffer"], arrays[f"{name}_lengths"]
        ends = np.cumsum(lengths, dtype=np.int64)
        if buffer.dtype != np.uint8 or lengths.dtype != np.int32 or (ends[-1] if len(ends) else 0) != len(buffer):
            raise ValueError(f"{name} is damaged")
        return cls(buffer, ends - lengths, lengths)
