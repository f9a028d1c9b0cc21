"""Cost: closed formulas, the golden table, the paper's two figures, every strategy, and a run."""

from __future__ import annotations

import csv
import json
import math
import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from monai.networks.nets import SwinUNETR
from networks import dynamic_head_plain
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import ClbenchError, CostError, SettingError, StoreError
from clbench.evaluation.cost import meter, multiply_adds
from clbench.evaluation.cost.course import Costs, blank_kit, course_costs
from clbench.evaluation.cost.meter import Meter
from clbench.evaluation.cost.model import (
    PARTS,
    forward_macs,
    grown,
    lessons_of,
    needs_old_model,
    step_cost,
)
from clbench.evaluation.cost.multiply_adds import OTHER, Scope, count
from clbench.evaluation.cost.paper_figures import (
    Printed,
    printed_figures,
)
from clbench.nets import output
from clbench.nets.heads import SIZES, WIDTH, dynamic_head
from clbench.report.scores import Run
from clbench.report.study import Study
from clbench.report.tables.costs import COLUMNS, cost_table, growth_table, read_costs, step_table
from clbench.report.tables.render import EMPTY
from clbench.run import cost_table as cost_file
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.spec import registry
from clbench.store import run_folder
from clbench.strategies.decoder_growth import pruning

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "flops.json").read_text())
PATCH = (96, 96, 96)
STRATEGIES = sorted(registry.entries("strategy"))
SMALL = ("backbone.size=8", "data.patch_vox=16,16,16")
PER_STEP = ("decoder_growth", "independent", "lora")
"""A step adds work, and not only its structures."""


def resolved(strategy: str, profile: str = "smoke", overrides: tuple[str, ...] = ()) -> Plan:
    return resolve(
        RunSettings(
            bench="tumor_ext", strategy=strategy, profile=profile, overrides=overrides, device="cpu"
        )
    )


def costs_of(
    strategy: str, profile: str = "smoke", overrides: tuple[str, ...] = (), target: int = 143
) -> Costs:
    plan = resolved(strategy, profile, overrides)
    return course_costs(plan.benchmark, plan.strategy, plan.profile, name=strategy, target=target)


def method_of(strategy: str, overrides: tuple[str, ...] = ()) -> SimpleNamespace:
    plan = resolved(strategy, overrides=overrides)
    return SimpleNamespace(
        strategy=plan.strategy,
        kit=blank_kit(plan.profile),
        lessons=lessons_of(plan.benchmark),
        patch_vox=plan.profile.preprocessing(plan.benchmark.preprocessing).patch_vox,
    )


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def macs(function: Any, *shapes: tuple[int, ...]) -> int:
    module = function if isinstance(function, nn.Module) else Calls(function)
    return sum(count(module, shapes).values())


# ------------------------------------------------------------------------------- closed formulas


@pytest.mark.parametrize(
    ("inside", "outside", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (3, 5, (3, 3, 3), 1, 1, 1, 1),
        (4, 6, (3, 1, 2), 2, 1, 1, 2),
        (4, 8, (3, 3, 3), (1, 2, 3), 0, 2, 4),
        (7, 1, (1, 1, 1), 1, 0, 1, 1),
    ],
)
def test_convolutions_equal_the_closed_formula(
    inside: int, outside: int, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> None:
    layer = nn.Conv3d(inside, outside, kernel, stride, padding, dilation, groups)
    out = layer(torch.zeros(2, inside, 9, 10, 11)).shape
    each = math.prod(kernel) * inside // groups
    assert macs(layer, (2, inside, 9, 10, 11)) == 2 * outside * math.prod(out[2:]) * each


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(2, 2, 1), (3, 2, 1), (2, 2, 2)])
def test_transposed_convolutions_count_at_their_input(
    kernel: int, stride: int, groups: int
) -> None:
    layer = nn.ConvTranspose3d(4, 6, kernel, stride, groups=groups)
    assert macs(layer, (1, 4, 5, 6, 7)) == 5 * 6 * 7 * kernel**3 * 4 * 6 // groups


def test_functional_convolutions_count() -> None:
    weight = (6, 4, 3, 3, 3)
    assert macs(functional.conv3d, (1, 4, 8, 8, 8), weight) == 6**3 * 6 * 4 * 27
    assert macs(functional.conv2d, (1, 4, 8, 8), weight[:4]) == 6**2 * 6 * 4 * 9


def test_matrix_products_and_attention_count() -> None:
    a, b = (2, 3, 4), (2, 4, 5)
    products = {
        "bmm": (torch.bmm, a, b),
        "matmul": (torch.matmul, a, b),
        "einsum": (lambda x, y: torch.einsum("bij,bjk->bik", x, y), a, b),
        "baddbmm": (torch.baddbmm, (2, 3, 5), a, b),
        "addbmm": (torch.addbmm, (3, 5), a, b),
    }
    for name, (function, *shapes) in products.items():
        assert macs(function, *shapes) == 2 * 3 * 4 * 5, name
    assert macs(torch.mm, (3, 4), (4, 5)) == 60
    assert macs(torch.addmm, (3, 5), (3, 4), (4, 5)) == 60
    assert macs(nn.Linear(4, 5), (2, 3, 4)) == 120
    assert macs(torch.mv, (3, 4), (4,)) == 12
    assert macs(torch.addmv, (3,), (3, 4), (4,)) == 12
    assert macs(torch.dot, (4,), (4,)) == 4
    q = (2, 3, 7, 8)  # batch, heads, tokens, channels: q·k and weights·v
    assert macs(functional.scaled_dot_product_attention, q, q, q) == 2 * (2 * 3 * 7 * 7 * 8)


def test_attention_counts_alike_where_values_are_needed() -> None:
    def looks(q: Tensor) -> Tensor:
        assert float(q.sum()) == 0.0  # no value on the meta device: so once on the CPU
        return functional.scaled_dot_product_attention(q, q, q)

    assert macs(looks, (2, 3, 7, 8)) == 2 * (2 * 3 * 7 * 7 * 8)


def test_counts_are_linear_in_the_batch() -> None:
    layer = nn.Conv3d(2, 3, 3)
    assert macs(layer, (4, 2, 5, 5, 5)) == 4 * macs(layer, (1, 2, 5, 5, 5))


@pytest.mark.parametrize("classes", [1, 14, 143])
def test_a_generated_head_costs_136_per_voxel_and_structure(classes: int) -> None:
    shapes = (2, WIDTH, 8, 9, 10), (2, classes, sum(SIZES))
    expected = 2 * classes * 136 * 720
    assert macs(dynamic_head, *shapes) == expected  # an autograd function, in blocks
    assert macs(dynamic_head_plain, *shapes) == expected  # grouped functional convolutions


def test_operations_are_counted_where_a_head_could_use_several_threads() -> None:
    before = torch.get_num_threads()
    features, params = torch.zeros(1, WIDTH, 8, 16, 16), torch.zeros(1, 64, sum(SIZES))
    try:
        torch.set_num_threads(2)
        with torch.no_grad(), multiply_adds.MacCounter() as counter:  # sees its own thread alone
            dynamic_head(features, params)
    finally:
        torch.set_num_threads(before)
    assert counter.by_scope.total() == 64 * 136 * 8 * 16 * 16


# ------------------------------------------------------------------------ what cannot be counted


@pytest.fixture(scope="module")
def outsider() -> Iterator[Any]:
    library = torch.library.Library("clbench_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield torch.ops.clbench_test.mystery
    library._destroy()


def test_an_unknown_operator_is_an_error_and_names_its_place(outsider: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Calls(outsider)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    def scopes(model: nn.Module) -> dict[str, list[Scope]]:
        return {"decoder": [model.get_submodule("inner")]}

    with pytest.raises(CostError, match="mystery") as err:
        count(Net(), [(1, 2)], scopes)
    assert "decoder" in str(err.value)
    assert "NO_PRODUCT" in str(err.value)


@pytest.mark.parametrize(
    "function", [lambda x: torch.cdist(x, x), lambda x: torch.linalg.inv(x), torch.fft.fft]
)
def test_arithmetic_without_a_formula_is_an_error(function: Any) -> None:
    with pytest.raises(CostError, match="cannot be counted"):
        macs(function, (4, 4))


def test_a_network_that_cannot_run_is_an_error() -> None:
    with pytest.raises(CostError, match="could not be run") as err:
        macs(nn.Linear(3, 4), (2, 5))
    assert "patch_vox" in str(err.value)


def test_counted_operators_are_not_listed_as_zero() -> None:
    names = multiply_adds._ZERO.split()
    assert len(names) == len(set(names))
    assert not [n for n in names if not hasattr(torch.ops.aten, n)]
    assert not multiply_adds.NO_PRODUCT & set(multiply_adds.MACS)


def test_counting_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Dropout())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count(model, [(1, 1, 4, 4, 4)], lambda m: {"x": [m]})
    assert model.training
    assert not model[0]._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------------- golden numbers


@pytest.fixture(scope="module")
def swin() -> dict[str, int]:
    """Module → MACs of MONAI's whole network, 14 output channels."""
    net = SwinUNETR(in_channels=1, out_channels=14, feature_size=48)
    assert sum(p.numel() for p in net.parameters()) == GOLDEN["params_total"]
    for name, row in GOLDEN["modules"].items():
        assert sum(p.numel() for p in net.get_submodule(name).parameters()) == row["params"], name
    return count(net, [(1, 1, *PATCH)], lambda m: {n: [c] for n, c in m.named_children()})


def test_swin_unetr_equals_the_golden_table(swin: dict[str, int]) -> None:
    assert swin == {name: row["macs"] for name, row in GOLDEN["modules"].items()}
    assert 2 * sum(swin.values()) == GOLDEN["torch_flop_counter_total"]
    assert sum(swin[f"decoder{i}"] for i in range(1, 6)) == GOLDEN["decoder_true_macs"]


@pytest.fixture(scope="module")
def printed() -> Printed:
    return printed_figures()


def test_the_printed_decoder_is_a_counters_convention(printed: Printed) -> None:
    assert printed.ptflops_compat == GOLDEN["ptflops_0_6_9_decoder_macs"]
    assert printed.decoder_macs == GOLDEN["decoder_true_macs"]
    assert f"{printed.printed_decoder_gflops:.2f}" == "466.08"
    assert f"{printed.decoder_gflops:.2f}" == "423.68"


def test_the_printed_head_is_the_generator_alone(printed: Printed) -> None:
    assert printed.generator_macs == GOLDEN["head_mlp_macs"]
    assert printed.generator_macs + printed.generator_biases == GOLDEN["head_mlp_params"]
    assert f"{printed.printed_head_gflops:.2e}" == "9.44e-04"
    assert printed.apply_macs == GOLDEN["apply_head_macs_96"] == 136 * 96**3
    assert f"{printed.apply_gflops:.4f}" == "0.2406"


def test_the_papers_network_costs_what_was_counted_elsewhere() -> None:
    found = costs_of("universal", profile="paper")
    last = found.steps[-1]
    assert last.parameters == last.trainable_parameters == 68_996_536
    modules = {name: row["macs"] for name, row in GOLDEN["modules"].items()}
    encoder = sum(n for name, n in modules.items() if name == "swinViT" or "encoder" in name)
    assert last.macs == {
        "encoder": encoder,
        "decoder": GOLDEN["decoder_true_macs"],
        "heads": GOLDEN["precls_conv_macs_96"] + 14 * GOLDEN["apply_head_macs_96"],
        "generator": 768 * 256 + 14 * GOLDEN["head_mlp_macs"],
        "other": 0,
    }
    growth = found.growth
    assert growth is not None
    assert growth.per_class.parameters == GOLDEN["head_mlp_params"]
    both = GOLDEN["head_mlp_macs"] + GOLDEN["apply_head_macs_96"]
    assert growth.per_class.forward_macs == both
    assert growth.per_step.forward_macs == growth.per_step.parameters == 0
    assert growth.one_step == growth.step_each
    assert growth.one_step.parameters == last.parameters + 129 * GOLDEN["head_mlp_params"]


# ------------------------------------------------------------------------------- every strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_counted(name: str) -> None:
    method = method_of(name, SMALL)
    models = grown(method.strategy, method.kit, method.lessons)
    first, last = (
        step_cost(method.strategy, lesson, model, stored, method.patch_vox)
        for lesson, model, stored in models
    )
    assert tuple(last.macs) == PARTS
    assert min(last.macs["encoder"], last.macs["decoder"], last.macs["heads"]) > 0
    assert last.macs["other"] == 0  # nothing runs outside the parts
    assert (last.macs["generator"] > 0) == (last.macs["heads"] > 5e6)  # 136 or 16 per voxel
    assert first.teacher_bytes == 0
    assert first.trainable_parameters == first.parameters
    assert (last.teacher_bytes > 0) == needs_old_model(method.strategy, method.lessons[1])


@pytest.mark.parametrize("name", [*PER_STEP, "finetune", "universal_v1", "mib", "frozen", "mbs"])
def test_steps_and_structures_add_work_of_their_own(name: str) -> None:
    growth = costs_of(name, overrides=SMALL).growth
    assert growth is not None
    assert (growth.per_step.forward_macs > 0) == (name in PER_STEP)
    assert growth.per_class.forward_macs > 0


@pytest.mark.parametrize("name", ["universal", "decoder_growth", "mib"])
def test_growth_to_many_structures_is_what_such_a_model_costs(name: str) -> None:
    """The line against a model that really has 20 structures, each new one in its own step."""
    found = costs_of(name, profile="smoke", target=20)
    method = method_of(name)
    model = method.strategy.build(method.kit, method.lessons[0])
    method.strategy.grow(model, method.kit, method.lessons[1])
    last = method.lessons[1]
    spare = [s for s in registry.benchmark("body_ext").structures(3) if s not in last.structures]
    for extra in [*spare, "bladder", "prostate", "rectum", "left_lung", "right_lung"][:6]:
        last = type(last)(
            number=last.number + 1,
            learns=(extra,),
            structures=(*last.structures, extra),
            source="x",
        )
        method.strategy.grow(model, method.kit, last)
    assert len(last.structures) == 20
    assert found.growth is not None
    expected = found.growth.step_each
    assert sum(p.numel() for p in model.parameters()) == expected.parameters
    assert sum(forward_macs(model, method.patch_vox).values()) == expected.forward_macs


def test_what_pruning_may_leave_is_what_it_leaves_when_it_goes_all_the_way() -> None:
    """Every level accepted, on real masks, against the count made without pruning anything."""
    pruned = ("strategy.prune=true", *SMALL)
    found = costs_of("decoder_growth", overrides=pruned)
    method = method_of("decoder_growth", pruned)
    (_, _, _), (_, model, _) = grown(method.strategy, method.kit, method.lessons)
    for decoder in model.get_submodule("decoders").children():
        masks: dict[str, Tensor] = {}
        for fraction in pruning.steps_of(pruning.SPARSITIES):
            masks = pruning.magnitude_masks(decoder, masks, fraction)
        pruning.apply_masks(decoder, masks)
    last = found.steps[-1]
    assert output.count_parameters(model)[1] == last.fewest_nonzero_parameters
    assert last.fewest_nonzero_parameters < last.nonzero_parameters
    assert found.growth is not None
    assert found.growth.per_step.fewest_parameters < 0.01 * found.growth.per_step.parameters
    assert found.growth.step_each.fewest_parameters < found.growth.one_step.parameters
    plain = costs_of("decoder_growth", overrides=SMALL)
    assert plain.steps[-1].fewest_nonzero_parameters == plain.steps[-1].nonzero_parameters
    assert plain.growth is not None
    assert plain.growth.step_each.fewest_parameters == plain.growth.step_each.parameters
    table = growth_table(found)
    assert "left by pruning, at the least" in table.columns
    assert f"{found.growth.step_each.fewest_parameters:,}" in table.rows[-1]
    assert "left by pruning, at the least" not in growth_table(plain).columns
    shown = dict(zip(step_table(found).columns, step_table(found).rows[-1], strict=True))
    assert " to " in shown["not zero, 10⁶"]


@pytest.mark.usefixtures("published_controllers")
def test_settings_reach_the_count() -> None:
    small = costs_of("universal_onehot", profile="smoke")
    built = costs_of("universal_onehot", profile="smoke",
        overrides=("strategy.as_built=true", *SMALL),
    )  # fmt: skip
    assert small.growth is not None
    assert built.growth is not None
    assert (small.growth.per_class.parameters, built.growth.per_class.parameters) == (
        472_217,
        52_633,
    )
    assert built.growth.per_class.forward_macs == 52_352 + 136 * 16**3
    assert built.patch_vox == (16, 16, 16)


def test_a_course_has_to_fit_the_target() -> None:
    with pytest.raises(SettingError, match="fewer structures") as err:
        costs_of("mib", profile="smoke", target=13)
    assert "14" in str(err.value)
    exact = costs_of("decoder_growth", profile="smoke", target=14)
    assert exact.growth is not None
    assert exact.growth.one_step.parameters == exact.steps[-1].parameters


# -------------------------------------------------------------------------- command and run folder


def told(*words: str) -> str:
    done = CliRunner().invoke(app, ["cost", *words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("published_controllers")
def test_the_command_prints_steps_growth_and_the_papers_figures() -> None:
    text = told("--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke")
    assert "143 structures" in text
    assert "472,217" in text
    for number in ("466.08", "423.68", "9.44e-4", "0.2406"):
        assert number in text


def test_the_command_gives_whole_numbers_as_csv() -> None:
    words = ("--bench", "tumor_ext", "--strategy", "mib", "--profile", "smoke", "--format", "csv")
    steps, growth = told(*words).strip().split("\n\n")
    rows = list(csv.DictReader(steps.splitlines()))
    assert [r["step"] for r in rows] == ["1", "2"]
    parts = [int(rows[1][f"{p}_macs"]) for p in PARTS]
    assert int(rows[1]["forward_macs"]) == sum(parts)
    assert "one more structure,17,17,221184" in growth


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bench", "tumor_ext"], "a benchmark and a strategy"),
        (["RUN", "--bench", "tumor_ext"], "takes runs, or"),
        (["--bench", "tumor_ext", "--strategy", "nobody"], "no strategy called"),
        (["--bench", "nowhere", "--strategy", "mib"], "no benchmark called"),
        (["--bench", "tumor_ext", "--strategy", "mib", "--format", "word"], "unknown value"),
    ],
)
def test_bad_words_are_refused(words: list[str], expected: str) -> None:
    done = CliRunner().invoke(app, ["cost", *words])
    assert isinstance(done.exception, ClbenchError)
    assert expected in str(done.exception)


def test_a_run_leaves_its_costs(smoke_run: Path) -> None:
    record = run_folder.read_record(smoke_run)
    rows = list(csv.DictReader((smoke_run / "cost.csv").open()))
    assert [r["step"] for r in rows] == ["1", "2"]
    counted = costs_of("universal", profile="smoke").steps
    for row, step in zip(rows, counted, strict=True):
        train = record["cost"][row["step"]]["train"]
        assert int(row["forward_macs"]) == step.forward_macs
        assert int(row["parameters"]) == step.parameters == train["parameters"]
        assert int(row["trainable_parameters"]) == step.trainable_parameters
        assert int(row["teacher_bytes"]) == step.teacher_bytes
        assert float(row["train_s"]) == train["train_s"]
        assert float(row["examine_s"]) > 0
        assert int(row["peak_rss_bytes"]) > 0
        assert int(row["examine_peak_rss_bytes"]) > 0
        assert 0 < float(row["predict_case_s"]) <= float(row["predict_s"])
        assert float(row["predict_s"]) < float(row["examine_s"])
        assert row["peak_cuda_bytes"] == ""  # no GPU did the work
        assert int(row["checkpoint_bytes"]) > 4 * step.parameters
    assert int(rows[1]["pseudo_bytes"]) > 0
    assert "uncounted" not in record
    read = read_costs(Run.read(smoke_run))
    assert {name for name, *_ in COLUMNS if "cuda" not in name} <= set(read[2])
    table = cost_table(Study(results=smoke_run.parents[2], bench="tumor_ext"))
    (line,) = [r for r in table.rows if r[:2] == ("universal", "2")]
    shown = dict(zip(table.columns, line, strict=True))
    assert float(shown["old model, MB"]) == round(read[2]["teacher_bytes"] / 1e6, 1) > 0
    assert float(shown["checkpoint, MB"]) == round(read[2]["checkpoint_bytes"] / 1e6, 1) > 0
    assert EMPTY not in line
    assert not [c for c in table.columns if "GPU" in c]


def test_a_phase_does_not_inherit_the_peak_of_the_one_before() -> None:
    size = 96 << 20
    first = Meter()
    held = mmap.mmap(-1, size)  # not from the heap, which may have that much to spare
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    high = first.peaks()["peak_rss_bytes"]
    assert high >= size
    held.close()
    second = Meter("cpu").peaks("examine_")["examine_peak_rss_bytes"]
    if not meter.forget_peak():
        pytest.skip("this system cannot start the peak of resident memory anew")
    assert second < high - size // 2
    assert "peak_cuda_bytes" not in first.peaks()


def test_on_a_gpu_the_peak_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda d: asked.append(("reset", d))
    )  # fmt: skip
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda d: asked.append(("peak", d)) or 123
    )  # fmt: skip
    here = Meter("cuda:1")
    assert here.peaks()["peak_cuda_bytes"] == here.inference()["examine_peak_cuda_bytes"] == 123
    assert [word for word, _ in asked] == ["reset", "peak", "peak"]
    assert {d.index for _, d in asked} == {1}


def test_the_first_case_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Meter()
    ticks = iter([0, 10, 20, 21, 30, 33])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(ticks))
    assert [here.timed(lambda x: 2 * x, i) for i in range(3)] == [0, 2, 4]
    found = here.inference()
    assert (found["predict_s"], found["predict_case_s"]) == (14, 2)  # 10, 1 and 3 seconds
    assert "predict_case_s" not in Meter().inference()


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.parent.parent.name / run.parent.name / run.name))


def test_costs_of_a_finished_run_can_be_counted_anew(smoke_run: Path, tmp_path: Path) -> None:
    run = copied(smoke_run, tmp_path)
    before = list(csv.DictReader((run / "cost.csv").open()))
    (run / "cost.csv").unlink()
    assert str(run / "cost.csv") in told(str(run)).replace("\n", "")
    after = list(csv.DictReader((run / "cost.csv").open()))
    assert before[0]["checkpoint_bytes"]  # each run has what was taught in a step it shares
    assert after == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(status="unfinished"), "not finished"),
        (lambda r: r["identity"].update(bench_version=0), "another version of the benchmark"),
        (lambda r: (r.update(external=True), r.pop("settings")), "made elsewhere"),
    ],
)
def test_runs_that_cannot_be_counted_anew(
    smoke_run: Path, tmp_path: Path, change: Any, expected: str
) -> None:
    run = copied(smoke_run, tmp_path)
    record = run_folder.read_record(run)
    change(record)
    run_folder.write_record(run, record)
    with pytest.raises(StoreError, match=expected):
        cost_file.recount(run)


def test_a_network_that_cannot_be_counted_costs_a_run_its_macs_only(
    cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.run.course import run_course

    def refuse(*_: Any) -> Any:
        raise CostError("the operator aten.mystery cannot be counted")

    monkeypatch.setattr(cost_file, "forward_macs", refuse)
    folder = run_course(
        RunSettings(
            bench="tumor_ext", strategy="finetune", profile="smoke", out=tmp_path, cache=cache_root,
            overrides=("train.epochs=1", "train.iterations=1"), keep_predictions=False,
        )
    )  # fmt: skip
    record = run_folder.read_record(folder)
    assert record["status"] == "finished"
    assert "mystery" in record["uncounted"]
    rows = list(csv.DictReader((folder / "cost.csv").open()))
    assert [r["forward_macs"] for r in rows] == ["", ""]
    assert all(int(r["parameters"]) > 0 for r in rows)
    assert "forward_macs" not in read_costs(Run.read(folder))[2]


def test_what_runs_in_no_part_is_other() -> None:
    assert count(nn.Linear(2, 3), [(1, 2)]) == {OTHER: 6}


def test_the_cost_command_refuses_what_a_run_refuses() -> None:
    words = ["cost", "--bench", "tumor_ext", "--profile", "smoke", "--strategy"]
    for more, message in (
        (["universel"], "did you mean 'universal'"),
        (["universal", "--set", "train.epoch=2"], "did you mean train.epochs"),
        (["universal", "--set", "data.patch_vox=15,16,16"], "patch"),
    ):
        result = CliRunner().invoke(app, words + more)
        assert isinstance(result.exception, ClbenchError)
        assert message in str(result.exception)
