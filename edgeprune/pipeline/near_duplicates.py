"""Near duplicates among texts: MinHash signatures of their character shingles, compared where a hash table says so.

Broder 1997, "On the resemblance and containment of documents". It knows no files and no model.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

SHINGLE = 8  # characters: languages without spaces are compared as all others
ALIKE = 0.8  # shingles that both texts have, as a share of those that one of them has (Jaccard)
PERMUTATIONS = 128  # the similarity is known within 0.04 (one standard deviation)


def near_duplicates(texts: Sequence[str], on_text: Callable[[], None] = lambda: None) -> list[int]:
    """Returns for each text the number of the first one that it is nearly equal to: its own where there is none.

    Case and white space make no difference.
    """
    from datasketch import MinHash, MinHashLSH

    table = MinHashLSH(threshold=ALIKE, num_perm=PERMUTATIONS)
    signatures, firsts = {}, []
    for number, text in enumerate(texts):
        signature = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        signature.update_batch(list(_shingles(text)))
        alike = [one for one in table.query(signature) if signatures[one].jaccard(signature) >= ALIKE]
        if not alike:
            signatures[number] = signature
            table.insert(number, signature)
        firsts.append(min(alike, default=number))
        on_text()
    return firsts


def _shingles(text: str) -> set[bytes]:
    """Returns all runs of SHINGLE characters of a text, of a shorter one itself."""
    plain = re.sub(r"\s+", " ", text).strip().casefold()
    starts = range(max(1, len(plain) - SHINGLE + 1))
    return {plain[start : start + SHINGLE].encode("utf-8", "replace") for start in starts}
