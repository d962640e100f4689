"""Codebooks: what each estimator passes back, how codes are learned, revived and kept."""

import copy

import pytest
import torch

from llm.errors import ConfigError
from llm.model.attention.codebook import DEAD_SHARE, Codebook
from llm.model.attention.diveq import moved_to_codes

ESTIMATORS = ["ema", "straight_through", "rotation", "simvq", "diveq"]
SETTINGS = {"commitment_weight": 0.02, "ema_decay": 0.9, "revive_every": None, "seed": 0}


def build(estimator, *, heads=2, dim=8, size=12, **settings):
    if estimator == "diveq":
        settings = {"commitment_weight": 0.0} | settings
    return Codebook(num_heads=heads, head_dim=dim, codebook_size=size, estimator=estimator, **SETTINGS | settings)


def started(estimator, keys, **settings):
    codebook = build(estimator, **settings)
    codebook.train()(keys)
    return codebook


def exact_distance(a, b):
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def statistics(out):
    return {name.removeprefix("stat/"): value for name, value in out.metrics.items() if name.startswith("stat/")}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_keys_are_replaced_by_their_nearest_codes(estimator):
    keys = torch.randn(3, 50, 2, 8)
    codebook = started(estimator, keys).eval()
    out = codebook(keys)
    for head in range(2):
        distance = torch.cdist(keys[:, :, head].flatten(0, 1), codebook.all_codes()[head].detach())
        assert torch.equal(out.code_ids[:, :, head].flatten(), distance.argmin(-1))
        expected = codebook.all_codes()[head][out.code_ids[:, :, head]]
        torch.testing.assert_close(out.keys[:, :, head], expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_codes_start_from_keys_of_the_first_training_batch(estimator):
    keys = torch.randn(1, 40, 2, 8)
    codebook = build(estimator)
    torch.nn.init.normal_(codebook.codes if codebook.codes is not None else torch.empty(1))
    if codebook.mixing is not None:
        torch.nn.init.normal_(codebook.mixing)
    codebook.train()(keys)
    for head in range(2):
        distance = exact_distance(codebook.all_codes()[head].detach(), keys[0, :, head])
        # fp32: the buffer is the key less the parameter, then the sum of both
        assert (distance.min(-1).values < 1e-4).all()
        assert len(distance.argmin(-1).unique()) == 12  # without repetition
    before = codebook.all_codes().clone()
    codebook(torch.randn(1, 40, 2, 8))
    assert torch.equal(codebook.all_codes(), before)


def test_codes_start_from_distinct_keys_where_tokens_repeat():
    distinct = torch.randn(12, 2, 8)
    keys = distinct[torch.cat([torch.arange(12), torch.zeros(200, dtype=torch.long)])[torch.randperm(212)]][None]
    codes = started("ema", keys).all_codes()
    for head in range(2):
        assert exact_distance(codes[head], distinct[:, head]).argmin(-1).unique().tolist() == list(range(12))


def test_an_evaluation_before_training_starts_nothing():
    codebook = build("ema").eval()
    before = codebook.all_codes().clone()
    out = codebook(torch.randn(1, 40, 2, 8))
    assert torch.equal(codebook.all_codes(), before)
    assert codebook.pending.all()
    assert not out.losses
    assert not statistics(out)


@pytest.mark.parametrize("estimator", ["ema", "straight_through", "simvq"])
def test_straight_through_passes_the_gradient_as_it_is(estimator):
    keys = torch.randn(1, 30, 2, 8)
    codebook = started(estimator, keys)
    keys.requires_grad_()
    grad = torch.randn_like(keys)
    (passed,) = torch.autograd.grad((codebook(keys).keys * grad).sum(), keys)
    assert torch.equal(passed, grad)


def test_rotation_turns_the_gradient_as_it_turns_the_key_onto_its_code():
    keys = torch.randn(1, 30, 2, 8, dtype=torch.float64)
    codebook = started("rotation", keys)
    keys.requires_grad_()
    out = codebook(keys)
    codes = out.keys.detach()
    grad = torch.randn_like(keys)
    (passed,) = torch.autograd.grad((out.keys * grad).sum(), keys)
    ratio = codes.norm(dim=-1) / keys.norm(dim=-1)
    # λR keeps angles and scales lengths: <λRᵀg, k> λ = <g, C> λ... exactly <g_k, k> = <g, C>
    torch.testing.assert_close((passed * keys).sum(-1), (grad * codes).sum(-1))
    torch.testing.assert_close(passed.norm(dim=-1), ratio * grad.norm(dim=-1))
    assert not torch.allclose(passed, grad)


def test_rotation_onto_itself_is_straight_through_and_a_zero_key_still_gives_its_code():
    codebook = started("rotation", torch.randn(1, 30, 2, 8))
    keys = codebook.all_codes().detach().transpose(0, 1)[None].clone().requires_grad_()
    grad = torch.randn_like(keys)
    (passed,) = torch.autograd.grad((codebook(keys).keys * grad).sum(), keys)
    torch.testing.assert_close(passed, grad, atol=1e-5, rtol=1e-5)  # unit vectors in fp32
    zero = codebook(torch.zeros(1, 1, 2, 8)).keys
    assert zero.isfinite().all()
    assert (zero != 0).any()


@pytest.mark.parametrize("estimator", ESTIMATORS[:-1])  # diveq has none
def test_losses_draw_keys_to_codes_and_codes_to_keys_and_nothing_else(estimator):
    keys = torch.randn(1, 60, 2, 8)
    codebook = started(estimator, keys)
    keys.requires_grad_()
    out = codebook(keys)
    chosen = out.keys.detach()
    (grad,) = torch.autograd.grad(out.losses["commitment_loss"], keys)
    torch.testing.assert_close(grad, 0.02 * 2 * (keys - chosen).detach() / keys.numel())
    assert ("codebook_loss" in out.losses) == (estimator != "ema")
    if estimator == "ema":
        assert not list(codebook.parameters())
        return
    (parameter,) = codebook.parameters()
    keys_grad, codes_grad = torch.autograd.grad(
        codebook(keys).losses["codebook_loss"], (keys, parameter), allow_unused=True
    )
    assert keys_grad is None
    assert codes_grad.abs().sum() > 0
    unused = torch.ones(2, 12, dtype=torch.bool)
    for head in range(2):
        unused[head, out.code_ids[0, :, head]] = False
    if estimator != "simvq":
        assert not codes_grad[unused].any()


def test_simvq_moves_every_code_though_only_one_is_used():
    codebook = started("simvq", torch.randn(1, 40, 2, 8))
    before = codebook.all_codes().detach().clone()
    optimizer = torch.optim.SGD(codebook.parameters(), lr=0.1)
    keys = before[:, :1].transpose(0, 1)[None] + 0.1 * torch.randn(1, 1, 2, 8)
    codebook(keys).losses["codebook_loss"].backward()
    optimizer.step()
    assert ((codebook.all_codes() - before).abs().sum(-1) > 0).all()


def test_ema_codes_are_the_moving_average_of_their_keys():
    keys = torch.randn(2, 100, 2, 8)
    codebook = started("ema", keys)
    counts, sums = torch.zeros(2, 12), torch.zeros(2, 12, 8)
    for _ in range(3):
        out = codebook(keys)
        for head in range(2):
            for code in range(12):
                mine = keys[:, :, head][out.code_ids[:, :, head] == code]
                counts[head, code] = 0.9 * counts[head, code] + 0.1 * len(mine)
                sums[head, code] = 0.9 * sums[head, code] + 0.1 * mine.sum(0)
        codebook.after_optimizer_step(statistics(out))
        used = counts > 0
        torch.testing.assert_close(codebook.all_codes()[used], (sums / counts[..., None])[used])


def test_two_micro_batches_summed_equal_one_batch():
    keys = torch.randn(4, 50, 2, 8)
    whole = started("ema", keys)
    split = copy.deepcopy(whole)
    whole.after_optimizer_step(statistics(whole(keys)))
    halves = [statistics(split(part)) for part in keys.chunk(2)]
    split.after_optimizer_step({name: halves[0][name] + halves[1][name] for name in halves[0]})
    torch.testing.assert_close(split.all_codes(), whole.all_codes())


def test_quantising_alone_changes_no_state_so_a_recomputed_forward_counts_once():
    keys = torch.randn(1, 50, 2, 8)
    codebook = started("ema", keys)
    before = copy.deepcopy(codebook.state_dict())
    first, second = codebook(keys), codebook(keys)
    for name, value in codebook.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(first.keys, second.keys)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dead_codes_are_put_on_keys_of_the_next_batch(estimator):
    keys = torch.randn(1, 300, 2, 8)
    codebook = started(estimator, keys, revive_every=2)
    codebook.base[:, :5] += 1000.0  # no key is near
    for _ in range(2):
        codebook.after_optimizer_step(statistics(codebook(keys)))
    assert (codebook.pending[:, :5]).all()
    fresh = torch.randn(1, 300, 2, 8)
    alive = codebook.all_codes().detach().clone()
    pending = codebook.pending.clone()
    codebook(fresh)
    assert not codebook.pending.any()
    codes = codebook.all_codes().detach()
    torch.testing.assert_close(codes[~pending], alive[~pending])
    for head in range(2):
        assert (exact_distance(codes[head][pending[head]], fresh[0, :, head]).min(-1).values < 1e-3).all()
    counts = codebook.counts
    assert (counts >= DEAD_SHARE * counts.mean(-1, keepdim=True)).all()


def test_without_revival_dead_codes_stay_dead():
    keys = torch.randn(1, 300, 2, 8)
    codebook = started("ema", keys, revive_every=None)
    codebook.base[:, :5] += 1000.0
    for _ in range(30):
        codebook.after_optimizer_step(statistics(codebook(keys)))
    assert not codebook.pending.any()
    assert (codebook.all_codes()[:, :5] > 500).any(-1).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_restored_codebook_continues_as_the_uninterrupted_one(estimator):
    batches = [torch.randn(1, 60, 2, 8) for _ in range(6)]

    def advance(codebook, some):
        for keys in some:
            codebook.after_optimizer_step(statistics(codebook(keys)))

    whole = build(estimator, revive_every=2).train()
    advance(whole, batches[:3])
    restored = build(estimator, revive_every=2, seed=0).train()
    restored.load_state_dict(copy.deepcopy(whole.state_dict()))
    advance(whole, batches[3:])
    advance(restored, batches[3:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_usage_and_perplexity_count_the_codes_in_use():
    keys = torch.randn(1, 200, 1, 8)
    codebook = started("ema", keys, heads=1, size=4)
    at_two = codebook.all_codes()[0, [0, 1] * 10][None, :, None]
    metrics = codebook(at_two).metrics
    assert metrics["codebook_usage"] == 0.5
    torch.testing.assert_close(metrics["codebook_perplexity"], torch.tensor(2.0))
    assert metrics["quantization_error"] == 0


def test_revival_keeps_nearly_all_codes_in_use_where_training_without_it_loses_them():
    def usage(revive_every):
        torch.manual_seed(0)
        codebook = build("ema", heads=1, size=64, revive_every=revive_every).train()
        shift = torch.zeros(8)
        for step in range(120):  # keys that drift, as they do early in training, and then settle
            shift += 0.05 if step < 60 else 0.0
            keys = torch.randn(4, 128, 1, 8) + shift
            out = codebook(keys)
            codebook.after_optimizer_step(statistics(out))
        return out.metrics["codebook_usage"].item()

    assert usage(10) > 0.9
    assert usage(None) < 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_to_another_precision_keeps_exact_averages(estimator, dtype):
    codebook = build(estimator, revive_every=2).to(dtype).train()
    keys = torch.randn(1, 60, 2, 8, dtype=dtype)
    for _ in range(4):
        out = codebook(keys)
        assert out.keys.dtype == dtype
        codebook.after_optimizer_step(statistics(out))
    kept = torch.promote_types(dtype, torch.float32)
    assert codebook.counts.dtype == codebook.base.dtype == kept
    codebook.soft_assignment(keys, 0.1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": 1}, "codebook_size=1"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"revive_every": 0}, "revive_every=0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build("ema", **settings)


def test_diveq_splits_the_gradient_into_the_part_along_the_error_and_the_part_across_it():
    keys = torch.randn(2, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(2, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 5, 1, 4, dtype=torch.float64)
    out = moved_to_codes(keys, codes)
    torch.testing.assert_close(out, codes, rtol=0, atol=1e-14)
    out.backward(gradient)
    unit = (codes - keys).detach()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    along = (gradient * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(codes.grad, along, rtol=0, atol=1e-14)
    torch.testing.assert_close(keys.grad, gradient - along, rtol=0, atol=1e-14)


def test_diveq_passes_the_whole_gradient_to_a_key_that_equals_its_code():
    keys = torch.ones(1, 1, 1, 4, requires_grad=True)
    moved_to_codes(keys, torch.ones(1, 1, 1, 4)).sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_diveq_has_no_loss_of_its_own_and_refuses_a_commitment_weight():
    assert not started("diveq", torch.randn(1, 40, 2, 8)).train()(torch.randn(1, 40, 2, 8)).losses
    with pytest.raises(ConfigError, match=r"commitment_weight=0\.02: estimator=diveq learns .*; set it to 0"):
        build("diveq", commitment_weight=0.02)
