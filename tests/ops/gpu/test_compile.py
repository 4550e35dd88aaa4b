"""Every kernel compiles for the GPUs that it is written for, none of which need be here."""

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install shardwise[gpu]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are defined for the interpreter", allow_module_level=True)

from shardwise.ops.interaction import gpu as interaction
from shardwise.ops.lookup import RULES, Pooling, Rule, gpu
from tests.ops.gpu.compiling import TARGETS, Launch, recorded
from tests.ops.test_lookup import DTYPES, NO_WEIGHTS, Case, make_case, make_update


def any_case(width: int = 64, dtype: torch.dtype = torch.float32, is_weighted=True) -> Case:
    """A call that takes every way: a mean, ids of several sources, more ids than a piece has."""
    return make_case(
        [(300, width), (50, 16)],
        [(0, 0, Pooling.SUM), (1, 1, Pooling.MEAN)],
        bags=40,
        longest=5,
        sources=2,
        columns=False,
        is_weighted=is_weighted,
        dtype=dtype,
    )


def update(case: Case, rule: Rule, seed: int = -1, **numbers) -> None:
    own = make_update(case, rule, **numbers)
    arguments = (own.states, own.steps, own.slots, rule.code, own.settings.as_floats())
    gpu.update_(case.grad, *case.call, case.tables, *arguments, seed, own.lr, NO_WEIGHTS)


def by_kernel(launches: list[Launch]) -> dict[str, Launch]:
    return {launch.kernel.__name__: launch for launch in launches}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    case = any_case()
    with recorded() as launches:
        gpu.lookup(*case.call, case.tables, *case.shape)
        gpu.count_bad_ids(*case.call, case.tables, *case.shape)
        gpu.weight_grads(case.grad, *case.call, case.tables)
        update(case, RULES[2])
        runs = gpu.gpu_rows.group_rows(case.grad, case.call, case.tables)
        gpu.gpu_rules.write_grads(runs, [0, 0], case.grad)
    kernels = by_kernel(launches)
    assert sorted(kernels) == [
        *("_count", "_count_pieces", "_dot", "_lay_out", "_list_items", "_list_runs"),
        *("_pool", "_run", "_sum", "_write_grads"),
    ]
    for launch in kernels.values():
        assert len(launch.compile(target)) > 1000


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_sparse", "width"), [(26, 128), (3, 4)])
def test_interaction_compiles(target, num_sparse, width):
    dense, sparse = torch.randn(2, width), torch.randn(2, num_sparse, width)
    with recorded() as launches:
        out = interaction.interaction(dense, sparse)
        interaction.interaction_grad(out, dense, sparse)
    assert [launch.kernel.__name__ for launch in launches] == ["_forward", "_backward"]
    for launch in launches:
        assert launch.compile(target)


def test_every_rule_compiles():
    case = any_case(dtype=torch.bfloat16)
    for rule, target in zip(RULES, [*TARGETS, *TARGETS], strict=True):
        with recorded() as launches:
            update(case, rule, seed=3, weight_decay=0.1)
        assert by_kernel(launches)["_run"].compile(target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64])
def test_every_rule_compiles_for_all(target, dtype, width):
    for is_weighted, decoupled in ((False, True), (True, False)):
        case = any_case(width, dtype, is_weighted)
        with recorded() as launches:
            gpu.lookup(*case.call, case.tables, *case.shape)
            gpu.weight_grads(case.grad, *case.call, case.tables)
            for rule in RULES:
                update(case, rule, seed=3 if decoupled else -1, decoupled=decoupled)
        for launch in {str(launch): launch for launch in launches}.values():
            assert launch.compile(target)


def test_row_sums_compile_for_whole_and_given_ones():
    case = any_case()
    for rule in RULES:
        own = make_update(case, rule)
        if not rule.num_sums:
            continue
        rules = gpu.Rules(
            *(case.tables, own.states, own.steps, own.slots, rule.code, own.settings.as_floats())
        )
        with recorded() as launches:
            runs = gpu.gpu_rows.group_rows(case.grad, case.call, case.tables)
            for given in (NO_WEIGHTS, case.grad):
                gpu.gpu_rules.run_rule(runs, rules, lr=own.lr, given=given, sums=case.grad)
        for launch in launches:
            if launch.kernel.__name__ == "_run":
                assert launch.compile("sm_90")


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_are_read_4_elements_at_a_time(dtype):
    case = any_case(dtype=dtype)
    with recorded() as launches:
        gpu.lookup(*case.call, case.tables, *case.shape)
        update(case, RULES[3])
    kernels = by_kernel(launches)
    rows = "ld.global.v4.b32" if dtype == torch.float32 else "ld.global.v2.b32"  # 4 elements
    assert rows in kernels["_pool"].compile("sm_90")
    assert "st.global.v4.b32" in kernels["_pool"].compile("sm_90")
    assert kernels["_run"].compile("sm_90").count("ld.global.v4.b32") > 4
    case = any_case(width=5)
    with recorded() as launches:
        gpu.lookup(*case.call, case.tables, *case.shape)
    assert "ld.global.v4.b32" not in by_kernel(launches)["_pool"].compile("sm_90")


def test_no_multiply_and_add_are_fused():
    """A fused one would round once where the CPU operators round twice."""
    case = any_case()
    with recorded() as launches:
        gpu.lookup(*case.call, case.tables, *case.shape)
        update(case, RULES[3])
    for name in ("_pool", "_sum"):
        assert not re.search(r"\bfma\.rn\.f32", by_kernel(launches)[name].compile("sm_90"))


def test_more_than_2_to_31_ids_compile():
    case = any_case()
    with recorded() as launches:
        gpu.lookup(*case.call, case.tables, *case.shape)
        update(case, RULES[2])
    for name, launch in by_kernel(launches).items():
        for argument in ("num_ids", "out_size", "num_items", "num_bags"):
            if argument in launch.signature:
                launch.signature[argument] = "i64"
        assert launch.compile("sm_90"), name
