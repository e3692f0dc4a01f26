"""A cache of image embeddings by key, within a budget of bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from ..embedding import ImageEmbedding


class EmbeddingCache:
    """Caches embeddings; the engine's lock guards it.

    Attributes:
        nbytes: bytes of all cached embeddings.
        hits, misses, evictions: counts since the start.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[str, tuple[ImageEmbedding, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> ImageEmbedding | None:
        """Return the embedding, now the most recently used; None if it is not cached."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, embedding: ImageEmbedding) -> None:
        """Cache an embedding, or count it anew after it grew; one larger than the budget is not cached."""
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
        """Evict embeddings after one grew: the decoder attaches projections that all prompts on an image share."""
        for key, (cached, size) in reversed(self._entries.items()):  # it was used a moment ago
            if cached is embedding:
                if embedding.nbytes != size:
                    self.put(key, embedding)
                return

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.nbytes -= entry[1]
