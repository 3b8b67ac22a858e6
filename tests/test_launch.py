"""The table of compiled kernels: what shares an entry, what does not, and what a launch passes on."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import types

import pytest
import torch

launching = pytest.importorskip("fastlora.kernels.launch", reason="needs Triton")
direct = pytest.importorskip("fastlora.kernels.direct")
DEVICE = torch.device("cuda", 0)  # named only: nothing is launched


class FakeKernel:
    """A jitted function of ``(x_ptr, size, factor, FLAG, BLOCK)`` that notes how it is run."""

    arg_names = ("x_ptr", "size", "factor", "FLAG", "BLOCK")

    def __init__(self):
        self.analysed, self.direct = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.analysed.append((grid, args, options))
            return types.SimpleNamespace(
                run=lambda *a: self.direct.append(a), function="function", packed_metadata="packed"
            )

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "current_stream", lambda index: 77)
    return FakeKernel()


def plan(kernel, size=8, flag=True, block=64, grid=(3,)):
    # Options in another order than the kernel's, with a launch option between them.
    return launching.Launch(kernel, grid, DEVICE, size, BLOCK=block, num_warps=4, FLAG=flag)


X = torch.empty(64)


def test_second_launch_is_direct_and_in_the_kernels_order(kernel):
    y, launch = torch.empty(64), plan(kernel, grid=(5, 2))
    launch(X, 2.0)
    launch(y, 3.0)
    ((grid, args, options),) = kernel.analysed
    assert grid == (5, 2, 1)
    assert args[0] is X
    assert args[1:] == (2.0, 8)
    assert options == {"BLOCK": 64, "num_warps": 4, "FLAG": True}
    (passed,) = kernel.direct
    assert passed[:9] == (5, 2, 1, 77, "function", "packed", None, None, None)
    assert passed[9] is y
    assert passed[10:] == (3.0, 8, True, 64)


def test_another_shape_of_the_same_kind_is_direct_at_once(kernel):
    plan(kernel, size=32)(X, 2.0)
    plan(kernel, size=48, grid=(7,))(X, 2.0)
    assert len(kernel.analysed) == 1
    (passed,) = kernel.direct
    assert passed[0] == 7
    assert passed[10:] == (2.0, 48, True, 64)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"size": 1}, id="one"),
        pytest.param({"size": 7}, id="not-a-multiple"),
        pytest.param({"size": 2**40}, id="wide"),
        pytest.param({"size": 2**63}, id="unsigned"),
        pytest.param({"flag": False}, id="constexpr"),
        pytest.param({"block": 128}, id="block"),
        pytest.param({"factor": torch.empty(())}, id="tensor-for-float"),
        pytest.param({"x": torch.empty(64, dtype=torch.float16)}, id="dtype"),
        pytest.param({"x": torch.empty(65)[1:]}, id="alignment"),
        pytest.param({"x": None}, id="none"),
    ],
)
def test_what_triton_specialises_on_is_analysed_again(kernel, change):
    arguments = {"x": X, "factor": 2.0}
    plan(kernel, size=16)(*arguments.values())
    arguments |= {name: change[name] for name in arguments if name in change}
    sizes = {name: value for name, value in change.items() if name not in arguments}
    plan(kernel, **{"size": 16, **sizes})(*arguments.values())
    assert len(kernel.analysed) == 2
    assert not kernel.direct


def test_a_plan_tells_its_arguments_apart(kernel):
    launch = plan(kernel)
    for x in (X, X.half(), X, X.half()):
        launch(x, 2.0)
    assert len(kernel.analysed) == len(kernel.direct) == 2


def test_two_kernels_do_not_share_an_entry(kernel):
    other = FakeKernel()
    plan(kernel)(X, 2.0)
    plan(other)(X, 2.0)
    assert len(kernel.analysed) == len(other.analysed) == 1


def test_a_profilers_hook_sees_every_launch(kernel, monkeypatch):
    hook = types.SimpleNamespace(calls=[print])
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", hook)
    launch = plan(kernel)
    for _ in range(3):
        launch(X, 2.0)
    assert len(kernel.analysed) == 3


def test_another_device_is_made_current(kernel, monkeypatch):
    current = [1]

    class Switch:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(launching, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    plan(kernel)(X, 2.0)
    assert len(kernel.analysed) == 1
    assert current == [1]


def test_the_table_stays_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launching, "_MAX_COMPILED", 2)
    for block in (16, 32, 64, 128, 256):
        plan(kernel, block=block)(X, 2.0)
        assert len(launching._compiled) <= 2
    plan(kernel, block=256)(X, 2.0)
    assert len(kernel.analysed) == 5, "the last one is still there"


def test_plans_are_kept_until_cleared():
    made = []

    @launching.cached_plan
    def make(size):
        made.append(size)
        return size

    assert [make(3), make(3), make(4)] == [3, 3, 4]
    assert made == [3, 4]
    launching.clear_plans()
    assert make(3) == 3
    assert made == [3, 4, 3]


def test_descriptor_equals_tritons_own():
    x = torch.empty(64, 32)
    ours = launching.descriptor(x, [16, 32])
    theirs = launching.TensorDescriptor.from_tensor(x, [16, 32])
    assert ours.base is theirs.base
    # Read as the launcher reads them: a field that a newer Triton adds has its default on the class.
    names = [field.name for field in dataclasses.fields(theirs) if field.name != "base"]
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}


class FakeDriver:
    """The driver as `DirectLaunch` sees it: it notes what a launch would read."""

    def __init__(self, layout):
        self.layout, self.launches, self.maps, self.codes = layout, [], 0, []

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index >= len(self.layout):
            return 1
        offset._obj.value, size._obj.value = self.layout[index]
        return 0

    def cuTensorMapEncodeTiled(self, out, *_):
        self.maps += 1
        ctypes.memset(out, self.maps, 128)
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        code = self.codes.pop(0) if self.codes else 0
        if code:
            return code
        config = direct._Config.from_address(config)
        addresses = (ctypes.c_void_p * len(self.layout)).from_address(parameters)
        values = [
            ctypes.string_at(a, size) for a, (_, size) in zip(addresses, self.layout, strict=True)
        ]
        self.launches.append(
            (
                tuple(config.grid),
                tuple(config.block),
                config.shared,
                config.stream,
                config.count,
                values,
            )
        )
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"planted"


# A descriptor, two pointers, a float, an int, two sizes of the plan, and Triton's two.
SIGNATURE = {
    "x_desc": "tensordesc<bf16[128, 64]>", "y_ptr": "*bf16", "none_ptr": "constexpr", "s_ptr": "*fp32",
    "factor": "fp32", "threshold": "i32", "M": "i32", "K": "i64", "one": "constexpr", "BLOCK": "constexpr",
}  # fmt: skip
LAYOUT = [
    (0, 128), (128, 4), (132, 4), (136, 8), (144, 8),
    (152, 8), (160, 8), (168, 4), (172, 4), (176, 4), (184, 8), (192, 8), (200, 8),
]  # fmt: skip


def compiled(**metadata):
    defaults = {
        "num_warps": 8, "num_ctas": 1, "shared": 1000, "launch_pdl": True,
        "tensordesc_meta": [{"swizzle": 3, "block_size": [128, 64]}],
    }  # fmt: skip
    return types.SimpleNamespace(
        function=5,
        src=types.SimpleNamespace(signature=SIGNATURE),
        metadata=types.SimpleNamespace(**{**defaults, **metadata}),
    )


def direct_of(monkeypatch, made=None, layout=LAYOUT):
    driver = FakeDriver(layout)
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    made = compiled() if made is None else made
    return driver, direct.direct_launch(made, (7, 2, 1), (300, 2**33, 1), 6)


def arguments(x, y, s, factor=0.5, threshold=9):
    return x, y, None, s, factor, threshold


def test_a_direct_launch_packs_what_the_kernel_expects(monkeypatch):
    driver, launch = direct_of(monkeypatch)
    x, y, s = torch.empty(40, 64, dtype=torch.bfloat16), torch.empty(3), torch.empty(4)
    launch(99, arguments(x, y, s))
    launch(98, arguments(x, s, y, 0.25, 8))
    first, second = driver.launches
    assert first[:5] == ((7, 2, 1), (256, 1, 1), 1000, 99, 1)
    assert second[3] == 98
    values = first[5]
    assert values[0] == b"\x01" * 128
    assert [int.from_bytes(v, "little") for v in values[1:5]] == [40, 64, 64, 1]
    pointers = [int.from_bytes(v, "little") for v in values[5:7]]
    assert pointers == [y.data_ptr(), s.data_ptr()]
    assert struct.unpack("<f", values[7]) == (0.5,)
    assert [int.from_bytes(v, "little") for v in values[8:]] == [9, 300, 2**33, 0, 0]
    assert [int.from_bytes(v, "little") for v in second[5][5:7]] == pointers[::-1]
    assert driver.maps == 1, "the map of the same tensor is made once"


def test_what_launches_share_is_not_what_the_last_one_wrote(monkeypatch):
    """Two recordings of a call are compared while other threads launch."""
    _, launch = direct_of(monkeypatch)
    fresh = launch.packed()
    launch(1, arguments(torch.empty(40, 64, dtype=torch.bfloat16), torch.empty(3), torch.empty(3)))
    assert launch.packed() == fresh
    assert struct.unpack_from("<i4xq", fresh.parameters, 176) == (300, 2**33)
    assert not any(fresh.parameters[:176])


def test_a_tensor_map_is_made_for_each_address(monkeypatch):
    driver, launch = direct_of(monkeypatch)
    monkeypatch.setattr(direct, "_MAX_MAPS", 2)
    base, y = torch.empty(120, 64, dtype=torch.bfloat16), torch.empty(3)
    parts = base[:40], base[40:80], base[80:]
    for x in (parts[0], parts[1], parts[0]):
        launch(1, arguments(x, y, y))
    assert driver.maps == 2
    assert [v[5][0][0] for v in driver.launches] == [1, 2, 1]
    launch(1, arguments(parts[2], y, y))
    assert driver.maps == 3
    assert len(launch._blobs) <= 2


def test_a_tensor_of_three_dimensions_is_described(monkeypatch):
    made = compiled(tensordesc_meta=[{"swizzle": 3, "block_size": [1, 64, 64]}])
    made.src.signature = {**SIGNATURE, "x_desc": "tensordesc<bf16[1, 64, 256]>"}
    layout = [
        (0, 128), (128, 4), (132, 4), (136, 4), (144, 8), (152, 8), (160, 8),
        *((offset + 16, size) for offset, size in LAYOUT[5:]),
    ]  # fmt: skip
    driver, launch = direct_of(monkeypatch, made, layout)
    x, y = torch.empty(3, 40, 64, dtype=torch.bfloat16)[:, :24], torch.empty(3)
    launch(1, arguments(x, y, y))
    values = driver.launches[0][5]
    assert [int.from_bytes(v, "little") for v in values[1:7]] == [3, 24, 64, 40 * 64, 64, 1]
    assert int.from_bytes(values[7], "little") == y.data_ptr()
    gap = [*layout[:4], *((offset - 4, size) for offset, size in layout[4:7]), *layout[7:]]
    assert direct_of(monkeypatch, made, gap)[1] is None


def test_a_thread_without_a_context_gets_one(monkeypatch):
    driver, launch = direct_of(monkeypatch)
    made_current = []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    driver.codes = [direct._INVALID_CONTEXT]
    x, y = torch.empty(40, 64, dtype=torch.bfloat16), torch.empty(3)
    launch(1, arguments(x, y, y))
    assert made_current == [3]
    assert len(driver.launches) == 1
    driver.codes = [719]
    with pytest.raises(RuntimeError, match="launching a kernel failed: CUDA error 719: planted"):
        launch(1, arguments(x, y, y))


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        pytest.param({"num_ctas": 2}, LAYOUT, id="cluster"),
        pytest.param({"launch_cooperative_grid": True}, LAYOUT, id="cooperative"),
        pytest.param({"global_scratch_size": 64}, LAYOUT, id="scratch"),
        pytest.param({"tensordesc_meta": None}, LAYOUT, id="no-descriptor"),
        pytest.param({}, LAYOUT[:-3], id="parameter-missing"),
        pytest.param({}, [*LAYOUT, (208, 8)], id="parameter-unknown"),
        pytest.param({}, [*LAYOUT[:-1], (200, 4)], id="size-unknown"),
        pytest.param({}, [*LAYOUT[:9], (176, 8), *LAYOUT[10:]], id="size-differs"),
        pytest.param({}, [(0, 128), (128, 8), *LAYOUT[2:]], id="descriptor-differs"),
        pytest.param(
            {}, [LAYOUT[0], (136, 4), (140, 4), (144, 8), (152, 8), *LAYOUT[5:]], id="gap"
        ),
    ],
)
def test_what_is_not_as_expected_goes_through_triton(monkeypatch, metadata, layout):
    assert direct_of(monkeypatch, compiled(**metadata), layout)[1] is None


def test_a_number_before_a_pointer_goes_through_triton(monkeypatch):
    made = compiled()
    made.src.signature = {**SIGNATURE, "s_ptr": "fp32", "factor": "*fp32"}
    layout = [*LAYOUT[:6], (160, 4), (168, 8), (176, 4), (180, 4), *LAYOUT[10:]]
    assert direct_of(monkeypatch, made, layout)[1] is None


def test_a_fixed_plan_looks_at_alignment_alone(monkeypatch):
    launches = []

    class Direct:
        def launch_aligned(self, stream, args):
            launches.append((stream, args))
            return args[0].data_ptr() % 16 == 0

        def __call__(self, stream, args):
            launches.append((stream, args, "by its signature"))

    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "current_stream", lambda index: 77)
    monkeypatch.setattr(launching, "direct_launch", lambda *_: Direct())
    kernel = FakeKernel()
    launch = launching.Launch(kernel, (3,), DEVICE, 8, fixed=True, BLOCK=64, FLAG=True)
    shifted = torch.empty(65)[1:]
    launch(X, 2.0)
    assert len(kernel.analysed) == 1
    launch(X, 3.0)
    launch(shifted, 4.0)
    assert len(kernel.analysed) == 2, "Triton compiles another kernel for it"
    launch(shifted, 5.0)
    assert len(kernel.analysed) == 2
    assert [entry[1][1] for entry in launches if len(entry) == 2] == [3.0, 4.0, 5.0]
    assert [entry[1][1] for entry in launches if len(entry) == 3] == [5.0]


def test_without_a_driver_nothing_is_direct(monkeypatch):
    monkeypatch.setattr(direct, "_driver", lambda: None)
    assert direct.direct_launch(compiled(), (1, 1, 1), (300, 2**33, 1), 6) is None


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_on_a_gpu_every_launch_is_direct_and_equals_tritons(monkeypatch, p):
    import fastlora

    torch.manual_seed(0)
    new = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(300, 256, **new), torch.randn(512, 256, **new)
    lora_A, lora_B = torch.randn(3, 16, 256, **new), torch.randn(3, 512, 16, **new)
    ids, seed = torch.arange(300, device="cuda") % 3, torch.tensor(7, device="cuda")

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
        one = fastlora.lora_linear(
            leaves[0], weight, leaves[1][0], leaves[2][0], scaling=0.5, dropout_p=p, seed=seed
        )
        torch.manual_seed(1)
        many = fastlora.lora_linear_multi(
            leaves[0], weight, (leaves[1], leaves[2]), ids, scaling=0.5, dropout_p=p
        )
        return one, many, *torch.autograd.grad((one.float() * many).sum(), leaves)

    made, original = [], launching.direct_launch

    def note(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(launching, "direct_launch", note)
    run()
    direct_results = run()
    assert made
    assert None not in made
    monkeypatch.setattr(launching, "direct_launch", lambda *_: None)
    launching.clear_plans()
    run()
    for got, expected in zip(direct_results, run(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_threads_that_never_used_the_gpu_launch_at_once():
    import concurrent.futures

    import fastlora

    x, weight, lora_A, lora_B = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((256, 128), (192, 128), (8, 128), (192, 8))
    )
    expected = fastlora.lora_linear(x, weight, lora_A, lora_B)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fastlora.lora_linear, x, weight, lora_A, lora_B) for _ in range(400)]
        assert all(torch.equal(job.result(), expected) for job in jobs)
