"""Image embeddings by key, the least recently used out first, under a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict

from ..embedding import ImageEmbedding


class EmbeddingCache:
    """Not locked: the engine's lock guards it.

    Attributes:
        nbytes: of what it holds.
        hits, misses, evictions: counts since it was made.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[str, tuple[ImageEmbedding, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> ImageEmbedding | None:
        """The embedding, now the most recently used; None if it is not there."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, embedding: ImageEmbedding) -> None:
        """Keep it, or count it anew after it grew; one larger than the budget is not kept."""
        self._remove(key)
        size = embedding.nbytes
        if size > self.budget:
            return
        self._entries[key] = (embedding, size)
        self.nbytes += size
        while self.nbytes > self.budget:
            self._remove(next(iter(self._entries)))
            self.evictions += 1

    def recount(self, embedding: ImageEmbedding) -> None:
        """An embedding grows when the decoder attaches what its prompts share; keep the budget all the same."""
        for key, (kept, size) in reversed(self._entries.items()):  # it was used a moment ago
            if kept is embedding:
                if embedding.nbytes != size:
                    self.put(key, embedding)
                return

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.nbytes -= entry[1]
