"""Programs compiled ahead of the loop, and the loop that fetches late: by fakes that note what happens when."""

import threading
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamprm_jax import programs, train
from dreamprm_jax.checkpoint import Snapshot
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.errors import InputError
from dreamprm_jax.programs import Programs
from dreamprm_jax.types import Batch

SMALL, MIDDLE, LARGE = Shape(8, 1), Shape(16, 1), Shape(16, 3)


def batch_of(shape: Shape, place=jax.device_put, rows: tuple[int, ...] = (2,)) -> Batch:
    zeros = lambda *axes, dtype=np.int32: np.zeros((*rows, *axes), dtype)  # noqa: E731
    flags = partial(zeros, dtype=bool)
    return place(Batch(
        zeros(shape.tokens), flags(shape.tokens), zeros(shape.tiles, 4, 4, 3, dtype=np.uint8), zeros(5), zeros(5),
        flags(5), zeros(), flags(),
    ))  # fmt: skip


class Fake:
    """Stands for a jitted step: notes the compilations as they begin, and holds each until it is let go."""

    def __init__(self, *held: Shape, broken: Shape | None = None):
        self.begun, self.broken = [], broken
        self.let_go = {shape: threading.Event() for shape in held}

    def lower(self, state, *batches):
        shape = Shape(batches[0].tokens.shape[-1], batches[0].tiles.shape[-4])
        self.begun.append(shape)
        return SimpleNamespace(compile=partial(self._compile, shape))

    def _compile(self, shape):
        if shape in self.let_go:
            assert self.let_go[shape].wait(60)
        if shape == self.broken:
            raise RuntimeError("out of memory")
        return lambda state, *batches: (state, shape)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(programs, "NUM_THREADS", 1)


def called(made: Programs, shape: Shape) -> Shape:
    return made(jnp.zeros(()), batch_of(shape))[1]


def test_a_step_waits_for_its_own_program_alone():
    step = Fake(MIDDLE)
    made = Programs("bilevel", step, iter([(SMALL,), (MIDDLE,), (LARGE,)]))
    assert not step.begun  # nothing before the first call
    assert called(made, SMALL) == SMALL
    assert called(made, SMALL) == SMALL  # while the next one is being compiled
    assert LARGE not in step.begun
    while MIDDLE not in step.begun:
        threading.Event().wait(0.001)
    step.let_go[MIDDLE].set()
    assert [called(made, shape) for shape in (LARGE, MIDDLE)] == [LARGE, MIDDLE]
    assert step.begun == [SMALL, MIDDLE, LARGE]  # each once, in the order in which they will be needed
    made.close()


def test_what_nobody_will_need_is_not_compiled():
    step = Fake(MIDDLE)
    made = Programs("bilevel", step, iter([(SMALL,), (MIDDLE,), (LARGE,)]))
    called(made, SMALL)
    while MIDDLE not in step.begun or len(made._programs) < 3:
        threading.Event().wait(0.001)
    made.close()
    assert not made._programs[(MIDDLE,)].done()  # it was not waited for
    step.let_go[MIDDLE].set()
    made._pool.shutdown(wait=True)
    assert step.begun == [SMALL, MIDDLE]


def test_a_compilation_that_fails_ends_the_loop_and_names_the_shapes():
    step = Fake(MIDDLE, broken=MIDDLE)
    made = Programs("bilevel", step, iter([(SMALL,), (MIDDLE,)]))
    called(made, SMALL)
    step.let_go[MIDDLE].set()
    made._submit((MIDDLE,)).exception()
    with pytest.raises(RuntimeError, match="out of memory") as found:
        called(made, SMALL)  # a later step's program, and yet told now
    assert found.value.__notes__ == ["while bilevel was compiled for batches of rows of 16 tokens and 1 tiles"]
    made.close()


def test_progress_is_told_where_there_is_more_than_one_program(capsys):
    for upcoming, told in (([(SMALL,)], ""), ([(SMALL,), (LARGE,)], "compiled 2 of 2 programs of bilevel, ")):
        step = Fake(SMALL)
        made = Programs("bilevel", step, iter(upcoming))
        made._like = (jnp.zeros(()), batch_of(SMALL))
        made._submit_upcoming()
        step.let_go[SMALL].set()
        for shapes in upcoming:
            made._programs[shapes].result()
        made._pool.shutdown(wait=True)
        error = capsys.readouterr().err
        assert told in error and bool(told) == bool(error)
        made.close()


def counted_step():
    traced = []

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch, meta_batch):
        traced.append((batch.tokens.shape, meta_batch.tiles.shape))
        seen = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves((batch, meta_batch)))
        state = {"sum": state["sum"] + seen, "weak": state["weak"] + 1, "placed": state["placed"] * 2}
        return state, {"seen": seen, "narrow": state["weak"] * jnp.ones((), jnp.bfloat16)}

    return step, traced


@pytest.mark.parametrize("placed_on_purpose", [False, True])
def test_programs_are_those_of_the_jitted_step(placed_on_purpose):
    """Weak types, donation, several inner steps, arrays with and without a place of their own."""
    place = jax.device_put
    if placed_on_purpose:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        place = partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step, traced = counted_step()
    pairs = [(SMALL, LARGE), (LARGE, SMALL), (SMALL, LARGE)]
    made = Programs("bilevel", step, iter(pairs[:2]))
    state = place({"sum": jnp.zeros(()), "weak": jnp.asarray(1.0), "placed": jnp.ones((4, 4))})
    for shape, meta_shape in pairs:
        before = state
        batches = batch_of(shape, place, rows=(3, 2)), batch_of(meta_shape, place)
        assert state["weak"].weak_type
        state, metrics = made(state, *batches)
        assert before["placed"].is_deleted()
        assert metrics["narrow"].dtype == jnp.bfloat16 and metrics["seen"] == 0
    made.close()
    assert state["weak"] == 4 and state["placed"][0, 0] == 8
    assert state["placed"].sharding == place(jnp.ones(())).sharding
    expected = [((3, 2, one.tokens), (2, other.tiles, 4, 4, 3)) for one, other in pairs[:2]]
    assert traced == expected


def test_metrics_are_fetched_late_and_before_a_save():
    """The loop's order: n + AHEAD is dispatched before n is waited for; a save waits for every line."""
    happened = []

    class Metric:
        def __init__(self, step, name):
            self.told = (step, name)

        def copy_to_host_async(self):
            happened.append(("copy", *self.told))

        def __array__(self, dtype=None, copy=None):
            happened.append(("fetch", *self.told))
            return np.float32(np.inf if self.told == (5, "inner_loss") else 1.0)

    class Rows(SimpleNamespace):
        copy_to_host_async = staticmethod(lambda: None)
        __array__ = lambda self, dtype=None, copy=None: self.value  # noqa: E731

    rows = {"example_id": Rows(value=np.array([3, 0])), "example_mask": Rows(value=np.array([True, False]))}

    def program(state, batch):
        happened.append(("dispatch", state))
        return state + 1, rows | {name: Metric(state, name) for name in ("inner_loss", "grad_norm", "extra")}

    step = SimpleNamespace(lower=lambda *arguments: SimpleNamespace(compile=lambda: program))

    class State(int):  # as the loop has it: placed nowhere in particular
        dtype, shape, committed, weak_type, sharding = np.int32, (), False, False, None

        def __add__(self, other):
            return State(int(self) + other)

    def batches(start):
        yield from [batch_of(SMALL, place=lambda batch: batch)] * 7

    writer = SimpleNamespace(
        advance=lambda *_: None, write=lambda line: happened.append(("line", line["step"], set(line))),
        sync=lambda: happened.append(("sync",)), write_skipped=lambda row: None, skipped_path="skipped.jsonl",
    )  # fmt: skip
    checkpoints = SimpleNamespace(save=lambda step, snapshot: happened.append(("save", step)), latest=lambda: None)
    phase = train.Phase("bilevel", 100, 7, step, (batches,), lambda start: iter([(SMALL,)]))
    snapshot = Snapshot(State(0), {"next_step": 0, "seconds": 0.0})
    with pytest.raises(InputError, match=r"up to 105 \(bilevel\).* 1 in a row.*'example_ids': \[3\]"):
        train.run_phase(phase, snapshot, writer, checkpoints, train.Cadence(2, 4, max_skipped=1))
    of = lambda *wanted: [event for event in happened if event[0] in wanted]  # noqa: E731
    assert [event[:2] for event in of("dispatch", "fetch", "save") if event[-1] not in ("grad_norm", "extra")] == [
        ("dispatch", 0), ("dispatch", 1), ("dispatch", 2), ("fetch", 0), ("dispatch", 3), ("fetch", 1),
        ("fetch", 2), ("fetch", 3), ("save", 104),
        ("dispatch", 4), ("dispatch", 5), ("dispatch", 6), ("fetch", 4), ("fetch", 5),
    ]  # fmt: skip
    for step_number in range(3):  # the copy begins before another step is dispatched, of what will be read alone
        after = happened.index(("dispatch", step_number + 1))
        copied = {event[2] for event in happened[:after] if event[:2] == ("copy", step_number)}
        assert copied == {"inner_loss", "grad_norm"} | ({"extra"} if step_number % 2 == 0 else set())
    assert happened[happened.index(("save", 104)) - 1] == ("sync",)  # the disk has the lines first
    assert [event[1] for event in of("line")] == [100, 102, 104]
    assert {"inner_loss", "grad_norm", "examples_per_second"} <= of("line")[0][2]


@pytest.fixture
def jax_cache():
    """JAX's own settings, put back afterwards."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    names = [f"jax_{name}" for name in names]
    before = [getattr(jax.config, name) for name in names]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def test_programs_are_kept_between_runs(jax_cache, tmp_path):
    for name in ("old-cache", "whole-cache", "whole-atime", "other"):
        (tmp_path / name).touch()
    programs.keep_between_runs(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_compilation_cache_max_size == programs.CACHE_BYTES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "whole-atime", "whole-cache"]


def test_a_cache_of_the_users_own_is_left_alone(jax_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "mine")
    before = jax.config.jax_compilation_cache_max_size
    programs.keep_between_runs(tmp_path / "ours")
    assert jax.config.jax_compilation_cache_dir == "mine"
    assert jax.config.jax_compilation_cache_max_size == before
    assert not (tmp_path / "ours").exists()


def test_a_cache_that_cannot_be_written_is_told_and_left_out(jax_cache, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="file/cache: cannot be written .*JAX_COMPILATION_CACHE_DIR"):
        programs.keep_between_runs(tmp_path / "file" / "cache")
    assert jax.config.jax_compilation_cache_dir is None
