"""Bytes that the keys of a cache take under another method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyMemory:
    """Memory of the keys of a cache; add two to count several layers.

    Parameters
    ----------
    code_bits, coded_numbers : bits of codes alone, and key numbers that they code.
    key_bytes : everything stored for keys.
    key_numbers : key numbers of all tokens.
    """

    code_bits: int = 0
    coded_numbers: int = 0
    key_bytes: int = 0
    key_numbers: int = 0

    def __add__(self, other: KeyMemory) -> KeyMemory:
        return KeyMemory(
            self.code_bits + other.code_bits,
            self.coded_numbers + other.coded_numbers,
            self.key_bytes + other.key_bytes,
            self.key_numbers + other.key_numbers,
        )

    @property
    def k_bits(self) -> float:
        """Bits of the codes alone per key number that is coded."""
        return self.code_bits / self.coded_numbers

    @property
    def all_in_bits(self) -> float:
        """Bits stored for keys per key number."""
        return 8 * self.key_bytes / self.key_numbers


def total_memory(memories: Iterable[KeyMemory]) -> KeyMemory:
    return sum(memories, KeyMemory())
