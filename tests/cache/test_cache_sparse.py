"""A cache whose steps of one token attend to the packed tokens that matter."""

import pytest
import torch

from cache_support import (
    Driver,
    assert_same_state,
    decoded,
    decoded_store,
    make_model,
    make_tokens,
    plain_attention,
    snapshot,
)
from svdq import SVDqCache, cache_argument
from svdq.config.sparsity import Sparsity
from svdq.layout import NO_SLOT
from svdq.store.attend import select_tokens
from svdq.store.landmarks import CHUNK_TOKENS

ROPES = ["pre", "post", "hybrid", "rotated-mean"]
SCORERS = ["latent", "landmarks"]
COARSE_TOLERANCE = 1e-2  # see test_cache.py
PAPER = [4, 4, 2, 0, 0, 0, 0, 0]


def driver_of(batch=1, **settings):
    settings = {"schedule": PAPER, "residual_length": 0, "v_bits": "exact", **settings}
    return Driver(batch, **settings)


def selected_slots(driver, query, b=0):
    """Slots of each head that a step with this query selects of the last store."""
    layer, tokens = driver.layer, driver.layer.tokens
    store = tokens.packed
    packed = max(store.slots) - layer.settings.sink_tokens
    slots, _ = select_tokens(
        tokens.fit.matching_query(query),
        store,
        tokens.sparsity,
        tokens.sparsity.tokens(packed),
        query.shape[-1] ** -0.5,
        layer.settings.sink_tokens,
    )
    return [[s for s in head if s < NO_SLOT] for head in slots[b].tolist()]


def attention_to(driver, query, slots, b=0):
    """Attention over these packed slots of each head and the window, [1, Hq, D]."""
    keys, values = decoded(driver.layer, b)
    packed = driver.layer.tokens.packed_slots(b)
    exact = [*range(driver.layer.settings.sink_tokens), *range(packed, keys.shape[1])]
    heads = []
    for h, own in enumerate(slots):
        # Sinks stand first, as in the sequence.
        seen = sorted({*exact, *own})
        group = query[b, 2 * h : 2 * h + 2]
        heads.append(plain_attention(group, keys[h : h + 1, seen], values[h : h + 1, seen]))
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("rope", ROPES)
def test_a_step_attends_to_what_it_selects(rope, scorer):
    driver = driver_of(2, rope=rope, sparse_budget=0.1, sparse_scorer=scorer)
    driver.feed(700)
    query, keys, values = driver.draw(1)
    slots = [selected_slots(driver, query, b) for b in range(2)]
    out = driver.attend(query, keys, values)
    for b in range(2):
        for head in slots[b]:
            assert len(head) <= 63 and min(head) >= 8 and max(head) < 640
            assert len(head) >= (63 if scorer == "latent" else 63 - 2 * CHUNK_TOKENS)
        expected = attention_to(driver, query, slots[b], b)
        assert (out[b].double() - expected).abs().max() <= COARSE_TOLERANCE * expected.abs().max()
    dense = attention_to(driver, query, [range(640)] * 2)
    assert (out[0].double() - dense).abs().max() > COARSE_TOLERANCE * dense.abs().max()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("rope", ROPES)
def test_the_token_that_a_query_looks_at_is_found(rope, scorer):
    driver = driver_of(rope=rope, sparse_budget=16, sparse_scorer=scorer, query_weighted=False)
    query, keys, values = driver.draw(700)
    # Along the direction in which all keys vary most.
    direction = torch.zeros(64)
    direction[0] = 40.0 if rope == "post" else 0.0
    direction[31] = 40.0  # of a pair that hardly turns
    keys = keys.clone()
    keys[:, :, 304:312] += direction
    driver.attend(query, keys, values)
    query = direction.expand(1, 4, 1, 64).contiguous()
    for head in selected_slots(driver, query):
        assert set(range(304, 312)) <= set(head)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_budget_of_all_is_dense(scorer):
    outs = []
    for budget in (None, 640, 5000):
        driver = driver_of(sparse_budget=budget, sparse_scorer=scorer)
        driver.feed(700)
        outs.append(driver.feed(1))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_prompts_and_chunks_attend_to_all():
    outs = []
    for budget in (None, 16):
        driver = driver_of(sparse_budget=budget)
        outs.append([driver.feed(n) for n in (700, 3, 80)])
    for dense, sparse in zip(*outs, strict=True):
        assert torch.equal(dense, sparse)


@pytest.mark.parametrize("scorer", SCORERS)
def test_outliers_are_always_attended(scorer):
    driver = driver_of(sparse_budget=16, sparse_scorer=scorer, outlier_fraction=0.01)
    query, keys, values = driver.draw(700)
    keys = keys.clone()
    loud = [70, 200, 311]
    keys[:, :, loud] += 2 * torch.randn(1, 2, 3, 64)
    driver.attend(query, keys, values)
    query, new_keys, new_values = driver.draw(1)
    slots = selected_slots(driver, query)
    for head in slots:
        assert set(loud) <= set(head) and len(head) > 16 - CHUNK_TOKENS
    out = driver.attend(query, new_keys, new_values)
    # The keys of outliers are the exact ones.
    held = driver.layer.tokens.packed.outliers
    all_keys, all_values = decoded(driver.layer)
    heads = []
    for h, own in enumerate(slots):
        k = all_keys[h].clone()
        listed = [s for s in held.slots[0, h].tolist() if s < NO_SLOT]
        gain = driver.layer.tokens.fit.gain
        gain = 1 if gain is None else gain[0, h].float()
        k[listed] = held.keys[0, h, : len(listed)].float() / gain
        seen = sorted({*range(8), *own, *range(640, k.shape[0])})
        heads.append(
            plain_attention(query[0, 2 * h : 2 * h + 2], k[None, seen], all_values[h : h + 1, seen])
        )
    expected = torch.cat(heads, dim=1)
    assert (out[0].double() - expected).abs().max() <= COARSE_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("budget", [0.25, 100])
@pytest.mark.parametrize("scorer", SCORERS)
def test_stores_of_different_bases_are_merged(scorer, budget):
    driver = driver_of(
        sparse_budget=budget, sparse_scorer=scorer, refit_drift=1.5, rope="post", min_fit_tokens=256
    )
    driver.feed(400)
    for _ in range(12):  # other keys, so that another basis is fitted
        query, keys, values = driver.draw(64)
        driver.attend(query, keys.flip(-1) * 4, values)
    stores = driver.layer.tokens.stores
    assert len(stores) > 1
    out = driver.feed(1)
    assert out.isfinite().all()
    assert len(driver.layer.tokens.attended) == len(stores)
    packed = [store.slots[0] - (8 if n == 0 else 0) for n, store in enumerate(stores)]
    share = budget if budget < 1 else budget / sum(packed)
    assert driver.layer.tokens.attended == [int(share * n) for n in packed]
    assert driver.cache.memory_report().total_bytes == driver.cache.allocated_bytes()


def test_landmarks_are_means_of_chunks():
    driver = driver_of(schedule=[8], sparse_budget=16, sparse_scorer="landmarks", rope="post")
    driver.feed(700)
    store = driver.layer.tokens.packed
    keys = decoded_store(store, 0)[0]
    pages = torch.tensor(store.pool.pages[0])
    got = store.landmarks.decode(pages)
    expected = keys.unflatten(1, (-1, CHUNK_TOKENS)).mean(2)
    assert got.shape == expected.shape
    # Four bits, of ranges a few deviations wide.
    assert (got - expected).square().mean() < 0.02 * expected.var()


def test_landmarks_of_a_page_filled_in_two_steps():
    driver = driver_of(2, schedule=[8], sparse_budget=16, sparse_scorer="landmarks", rope="post")
    driver.feed(700)
    driver.cache.crop(-85)  # into the middle of a chunk
    driver.cache.reorder_cache(torch.tensor([1, 1]))
    for _ in range(3):
        driver.feed(60)
    store = driver.layer.tokens.packed
    assert store.slots[0] == store.slots[1] > 640
    for b in range(2):
        got = store.landmarks.decode(torch.tensor(store.pool.pages[b]))
        expected = decoded_store(store, b)[0].unflatten(1, (-1, CHUNK_TOKENS)).mean(2)
        assert (got - expected).square().mean() < 0.05 * expected.var()
    assert driver.cache.memory_report().landmarks > 0
    assert driver.cache.memory_report().total_bytes == driver.cache.allocated_bytes()


@pytest.mark.parametrize("scorer", SCORERS)
def test_changes_and_files_keep_the_choice(scorer, tmp_path):
    driver = driver_of(2, sparse_budget=32, sparse_scorer=scorer)
    driver.feed(700)
    cache = driver.cache
    query = driver.draw(1)[0]
    before = [selected_slots(driver, query.flip(0), b) for b in (1, 0)]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [selected_slots(driver, query, b) for b in (0, 1)] == before
    cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", driver.config)
    assert loaded.settings == cache.settings
    assert_same_state(snapshot(loaded), snapshot(cache))
    driver.cache = loaded
    assert [selected_slots(driver, query, b) for b in (0, 1)] == before
    assert loaded.memory_report().landmarks == cache.memory_report().landmarks


@pytest.mark.parametrize("scorer", SCORERS)
def test_generation(scorer):
    model = make_model("llama")
    tokens = make_tokens(2, 500)
    cache = SVDqCache(model.config, schedule=[4], sparse_budget=[None, 0.2], sparse_scorer=scorer)
    with torch.inference_mode():
        out = model.generate(tokens, **cache_argument(cache), max_new_tokens=8, do_sample=False)
    assert out.shape == (2, 508)
    assert [layer.tokens.sparsity for layer in cache.svdq_layers] == [
        None,
        Sparsity(0.2, scorer, 16),
    ]
    packed = 384 - 8
    assert [layer.tokens.attended for layer in cache.svdq_layers] == [[packed], [packed // 5]]


def test_what_a_step_reads():
    driver = driver_of(
        sparse_budget=1 / 32, rope="pre", residual_length=64, query_weighted=False, sink_tokens=8
    )
    with pytest.raises(RuntimeError, match="no step of one token"):
        driver.cache.read_report()
    driver.feed(8000)
    driver.feed(1)
    report = driver.cache.read_report()
    slots = (8000 - 64) // 64 * 64
    tokens, numbers, packed = 8001, 2 * 64, slots - 8
    assert report.full == 2 * tokens * numbers
    assert report.attended == packed // 32 and report.packed == packed
    assert report.codes == packed // 32 * numbers * 1.25 / 8
    assert report.code_ratio >= 410
    assert report.scan == slots * 2 * 16 * 4 // 8  # 16 channels of 4 bits a head
    assert report.exact == (8 + tokens - slots) * numbers * 4
    store = driver.layer.tokens.packed
    assert report.coding == sum(x.nbytes for x in store.codec.tensors().values())
    assert report.total == sum(
        (report.codes, report.scan, report.exact, report.coding, report.lists)
    )
    assert f"{report.code_ratio:.1f}x codes alone" in str(report)


def test_reports_outlive_a_new_store_but_not_a_crop():
    driver = driver_of(sparse_budget=0.1)
    driver.feed(700)
    driver.feed(1)
    before = driver.cache.read_report()
    tokens = driver.layer.tokens
    # A step whose keys have drifted too far does this.
    tokens.past, tokens.packed = [tokens.packed], tokens.packed.successor([0])
    assert driver.cache.read_report() == before
    tokens.packed, tokens.past = tokens.past[0], []
    driver.cache.crop(-100)
    with pytest.raises(RuntimeError, match="no step of one token"):
        driver.cache.read_report()


def test_what_a_dense_step_reads():
    driver = driver_of(2)
    driver.feed(700)
    driver.feed(1)
    report = driver.cache.read_report()
    assert report.scan == 0 and report.attended == report.packed == 632
    assert report.codes == 2 * 632 * 128 * 1.25 / 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_budget": 0}, "sparse_budget must be a number of tokens or a share"),
        ({"sparse_budget": 1.5}, "sparse_budget must be a number of tokens or a share"),
        ({"sparse_budget": -0.1}, "sparse_budget must be a number of tokens or a share"),
        ({"sparse_budget": [0.1, 0.1]}, "one number or 1, one a layer, got 2"),
        ({"sparse_budget": 0.1, "sparse_scorer": "best"}, "sparse_scorer must be one of"),
        ({"sparse_budget": 0.1, "sparse_channels": 6}, "sparse_channels must be a multiple of 4"),
        ({"sparse_budget": 0.1, "sparse_channels": 64}, "sparse_channels must be a multiple of 4"),
        ({"sparse_budget": 0.1, "schedule": None, "preset": "exact"}, "keys that are packed"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        driver_of(**settings)
