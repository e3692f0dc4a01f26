"""The engine's cache: an image is encoded once, and embeddings keep within their budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from busy import CLICK, hold
from gate import Gate
from models import TINY, random_image, random_model
from waiting import SECONDS

from sam import Sam
from sam.engine import AutomaticOptions, Engine


def test_an_image_is_encoded_once(engine_of: Callable[..., Engine], gate: Gate) -> None:
    """Also when several ask for it before it is there."""
    engine = engine_of()
    hold(engine, gate)
    image = random_image(30, 40)
    futures = [engine.segment(image, [CLICK]) for _ in range(3)]
    gate.open.set()
    for future in futures:
        future.result(SECONDS)
    engine.embed(image.copy()).result(SECONDS)
    key = engine.prepare(image).key
    assert engine.embedding(key) is not None
    assert engine.embedding("0" * 32) is None
    assert gate.encoded == [1, 1]
    assert engine.counters()["cache_entries"] == 2


def test_keys_tell_models_and_images_apart(model: Sam, engine_of: Callable[..., Engine]) -> None:
    other = Engine(random_model(TINY, seed=1))
    engine, image = engine_of(), random_image(30, 40)
    keys = {engine.prepare(image).key, other.prepare(image).key, engine.prepare(image[::-1]).key}
    assert len(keys) == 3
    other.close(SECONDS)


def test_keys_are_no_hashes_of_images(model: Sam) -> None:
    """Only who shares the secret can tell the key of an image that others sent."""
    image, secrets = random_image(30, 40), [b"1" * 16, b"1" * 16, b"2" * 16, None, None]
    engines = [Engine(model, handle_secret=secret) for secret in secrets]
    first, same, *others = (engine.prepare(image).key for engine in engines)
    assert first == same
    assert len({first, *others}) == 4
    assert engines[-1].prepare(image).key == others[-1]
    for engine in engines:
        engine.close(SECONDS)
    for wrong in (b"", b"1" * 15, b"1" * 65):
        with pytest.raises(ValueError, match=f"handle_secret must be of 16 to 64 bytes, got {len(wrong)}"):
            Engine(model, handle_secret=wrong)


def test_cache_keeps_its_budget(engine_of: Callable[..., Engine], model: Sam) -> None:
    """Counted with what prompts attach to an embedding; the least recently used goes."""
    probe = model.encode(random_image(8, 8))
    model.predict(probe, [CLICK])
    engine = engine_of(embedding_cache_bytes=int(2.5 * probe.nbytes))
    images = [random_image(8, 8, seed) for seed in range(3)]
    first, second, third = (engine.prepare(image).key for image in images)
    for image in (images[0], images[1], images[0], images[2]):
        engine.segment(image, [CLICK]).result(SECONDS)
    assert engine.embedding(second) is None
    assert engine.embedding(first) is not None
    assert engine.embedding(third) is not None
    counters = engine.counters()
    assert counters["cache_evictions"] == 1
    assert counters["cache_bytes"] == 2 * probe.nbytes


def test_cache_keeps_its_budget_however_embeddings_are_used(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(embedding_cache_bytes=2**18)
    for seed in range(6):
        handle = engine.embed(random_image(8, 8, seed)).result(SECONDS)
        engine.segment(handle, [CLICK]).result(SECONDS)
        engine.automatic(random_image(8, 8, 9 + seed), AutomaticOptions(points_per_side=1)).result(SECONDS)
    held = sum(embedding.nbytes for embedding, _ in engine._cache._entries.values())
    assert 0 < engine.counters()["cache_bytes"] == held <= 2**18


def test_an_embedding_over_the_budget_is_used_but_not_kept(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(embedding_cache_bytes=10)
    assert len(engine.segment(random_image(8, 8), [CLICK]).result(SECONDS)) == 1
    assert engine.counters()["cache_bytes"] == 0
