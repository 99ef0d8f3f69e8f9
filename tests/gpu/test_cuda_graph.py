"""On the GPU a model says what the exact graph on the CPU says, within fp16's rounding, however its tokens are read."""

from concurrent.futures import ThreadPoolExecutor

import gpu_checkpoints
import numpy as np
import pytest
from poisoned_experts import poison

from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.scheduling.batch import Batch
from lsp_agent.engine.session import Decoder

pytestmark = pytest.mark.gpu

PROMPTS = [np.random.RandomState(seed).randint(0, 256, 48) for seed in (3, 4, 5)]
PROMPT = PROMPTS[0]
TOLERANCE = 0.03
"""Of the largest logit, at nine of ten positions: fp16 activations may route a token between two near experts."""
PLACEMENTS = [Placement("resident"), Placement("host"), Placement("hybrid", slots=12)]


def read(decoder, ids, state):
    """Logits of `ids` read in one run."""
    logits = decoder.run(np.array([ids], np.int64), state, range(len(ids)))
    state.extend([int(token) for token in ids])
    return logits


def step(decoder, tokens, state):
    """Logits of `tokens` read in steps."""
    rows = []
    for token in tokens:
        (logits,) = decoder.step([int(token)], state)
        rows.append(logits.all())
        state.extend([int(token)])
    return np.array(rows)


def difference(found, wanted):
    """The largest error at nine of ten positions, and what the correlation lacks."""
    assert np.isfinite(found).all()
    errors = np.abs(found - wanted).reshape(-1, wanted.shape[-1]).max(axis=-1) / np.abs(wanted).max()
    correlation = np.corrcoef(found.reshape(-1), wanted.reshape(-1))[0, 1]
    return float(np.quantile(errors, 0.9)), 1 - float(correlation)


def assert_close(found, wanted):
    error, uncorrelated = difference(found, wanted)
    print(f"error {error:.4f}, correlation {1 - uncorrelated:.6f}")
    assert error < TOLERANCE and uncorrelated < 0.001


@pytest.mark.parametrize("scheme", ["keep", "int8", "int4", "int4-64", "int4-asymmetric", "mxfp4"])
@pytest.mark.parametrize("name", gpu_checkpoints.CONFIGS)
def test_the_gpu_gives_the_cpus_logits(decoders, name, scheme):
    """For most prompts: where a router is near a tie early on, whatever rounds differently changes all that follows.

    The first prompt with qwen3-next in int4-asymmetric is such a one: on the CPU, in exact arithmetic, embeddings that
    are changed by one part in 2,000 (what fp16 keeps) change its logits by more than is tolerated here in 4 of 12 runs.
    """
    gpu, cpu = decoders(name, scheme)
    differences = []
    for prompt in PROMPTS:
        wanted = read(cpu, prompt, cpu.new_state(128))
        state = gpu.new_state(128)
        parts = [read(gpu, prompt[:30], state), step(gpu, prompt[30:40], state), read(gpu, prompt[40:], state)]
        ways = [read(gpu, prompt, gpu.new_state(128)), np.concatenate(parts), step(gpu, prompt, gpu.new_state(128))]
        differences.append([difference(found, wanted) for found in ways])
    print(np.round(differences, 5).tolist())
    error, uncorrelated = np.median(differences, axis=0).T  # for each way to read
    assert (error < TOLERANCE).all() and (uncorrelated < 0.001).all()


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
@pytest.mark.parametrize(
    ("name", "scheme"), [("qwen3-next", "int4"), ("qwen3-next-top10", "int4-64"), ("qwen3-moe", "int8")]
)
def test_every_placement_says_the_same(decoders, name, scheme, placement):
    gpu, cpu = decoders(name, scheme, placement)
    wanted = read(cpu, PROMPT, cpu.new_state(128))
    state = gpu.new_state(128)
    assert_close(np.concatenate([read(gpu, PROMPT[:30], state), step(gpu, PROMPT[30:], state)]), wanted)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
def test_thousands_of_steps_later_a_step_is_still_right(decoders, placement):
    """Replays of one captured graph, over all places of the rings, against one run over the same tokens."""
    gpu, _ = decoders("qwen3-next", "int4", placement, context=4096)
    ids = np.random.RandomState(5).randint(0, 256, 3000)
    stepped, whole = gpu.new_state(4096), gpu.new_state(4096)
    found = step(gpu, ids, stepped)
    wanted = np.concatenate([read(gpu, ids[start : start + 500], whole) for start in range(0, 3000, 500)])
    assert_close(found[-500:], wanted[-500:])
    assert_close(found[:500], wanted[:500])


@pytest.mark.parametrize("back", [1, 3, 8])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next"])
def test_rolled_back_steps_continue_bit_for_bit_without_a_replay(decoders, name, back, monkeypatch):
    gpu, _ = decoders(name, "int4")
    state = gpu.new_state(128)
    read(gpu, PROMPT[:20], state)
    step(gpu, PROMPT[20:], state)
    snapshot = state.snapshot()
    expected = step(gpu, [7, 8], state)
    gpu.rollback(state, 2)
    step(gpu, range(back), state)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("tokens were read again"))
    gpu.rollback(state, back)
    np.testing.assert_array_equal(step(gpu, [7, 8], state), expected)
    other = gpu.new_state(128)
    other.restore(snapshot)
    np.testing.assert_array_equal(step(gpu, [7, 8], other), expected)


def test_a_checkpoint_is_come_back_to_without_a_replay(decoders, monkeypatch):
    gpu, _ = decoders("qwen3-next", "int4")
    state = gpu.new_state(128)
    read(gpu, PROMPT[:20], state)
    state.checkpoint()
    expected = step(gpu, PROMPT[20:], state)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("tokens were read again"))
    gpu.rollback(state, len(PROMPT) - 20)
    np.testing.assert_array_equal(step(gpu, PROMPT[20:], state), expected)


def test_rolling_back_further_reads_again(decoders):
    gpu, _ = decoders("qwen3-next", "int4")
    wanted = step(gpu, [*PROMPT[:20], 7, 8], gpu.new_state(128))[-2:]
    state = gpu.new_state(128)
    read(gpu, PROMPT[:20], state)
    step(gpu, range(12), state)
    gpu.rollback(state, 12)
    assert_close(step(gpu, [7, 8], state), wanted)


@pytest.mark.parametrize("batch", [2, 3, 4, 8, 9])
def test_a_batch_decodes_as_single_sequences_do(decoders, batch):
    gpu, _ = decoders("qwen3-next", "int4")
    prompt = gpu.new_state(128)
    read(gpu, PROMPT, prompt)
    together = Batch(gpu.states, 64, batch, gpu.device)
    for owner in range(batch):
        together.join(owner, prompt)
    rows = together.prepare(together.rows)
    gpu.step(range(batch), together)
    for row in rows:
        row.length += 1
    kept = [0, batch - 1]
    for owner in range(1, batch - 1):
        together.leave(together.find(owner))
    assert [row.owner for row in together.prepare(together.rows)] == kept
    found = [row.all() for row in gpu.step([4, 5], together)]
    for row, first, second in zip(found, kept, (4, 5), strict=True):
        single = gpu.new_state(64)
        single.copy_prefix(prompt, len(PROMPT))
        assert_close(row, step(gpu, [first, second], single)[-1])


def test_the_best_tokens_come_without_the_others(decoders):
    gpu, _ = decoders("qwen3-next", "int4")
    state = gpu.new_state(64)
    read(gpu, PROMPT[:10], state)
    (logits,) = gpu.step([int(PROMPT[10])], state)
    whole = logits.all()
    tokens, values = logits.top(40)
    np.testing.assert_array_equal(values, np.sort(whole)[::-1][:40])
    np.testing.assert_array_equal(whole[tokens], values)
    log_sum = np.log(np.exp(whole.astype(np.float64)).sum())
    assert logits.log_probability(int(tokens[3])) == pytest.approx(values[3] - log_sum, abs=1e-4)
    worst = int(whole.argmin())
    assert logits.log_probability(worst) == pytest.approx(whole[worst] - log_sum, abs=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric", "mxfp4"])
def test_experts_that_are_not_routed_are_not_read(cuda, gpu_package, scheme, placement):
    package, tokens = gpu_package("qwen3-next-top10", scheme), PROMPT[:3]

    def load(where):
        decoder = Decoder(package, 1, 64, "fast", cuda, placement=where)
        return decoder, decoder._gpu._weights

    counted, weights = load(PLACEMENTS[2])
    expected = step(counted, tokens, counted.new_state(64))
    uses = weights.experts.counts().uses
    assert all(0 < (count == 0).sum() < len(count) for count in uses.values())
    poisoned, weights = load(placement)
    np.testing.assert_array_equal(step(poisoned, tokens, poisoned.new_state(64)), expected)  # wherever experts lie
    poison(weights, {name: count == 0 for name, count in uses.items()})
    np.testing.assert_array_equal(step(poisoned, tokens, poisoned.new_state(64)), expected)
    poison(weights, {name: count > 0 for name, count in uses.items()})
    assert np.isnan(step(poisoned, tokens, poisoned.new_state(64))).all()


def test_another_thread_than_the_one_that_loaded_runs_the_same(decoders):
    """Also long prompts, whose embeddings take a while: CuPy's current stream is each thread's own."""
    gpu, _ = decoders("qwen3-next", "int4", context=4096)
    ids = np.random.RandomState(6).randint(0, 256, 2000)
    wanted = [read(gpu, ids, gpu.new_state(4096))[-20:], step(gpu, ids[:20], gpu.new_state(4096))]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            found = [
                pool.submit(read, gpu, ids, gpu.new_state(4096)).result()[-20:],
                pool.submit(step, gpu, ids[:20], gpu.new_state(4096)).result(),
            ]
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])
