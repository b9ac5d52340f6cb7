"""Run by test_scaling.py on eight forced devices: what compiled steps compute, keep and send, beside theory."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks import collectives, scaling
from benchmarks.scaling import Setting
from dreamprm_jax import hypergradient, sharding
from dreamprm_jax.sharding import Layout

SETTINGS = {
    "data": Setting("training", Layout(8, 1, 1), 8),
    "data by 2": Setting("training", Layout(2, 1, 1), 8),
    "fsdp": Setting("training", Layout(1, 8, 1), 8),
    "data and fsdp": Setting("training", Layout(2, 4, 1), 8),
    "tensor": Setting("training", Layout(1, 1, 8), 8),
    "dot": Setting("dot", Layout(1, 8, 1), 8),
}


def check_close(found: float, theory: float, what: str) -> None:
    """Within 2% of theory."""
    if abs(found - theory) > 0.02 * theory:
        raise SystemExit(f"{what}: {found:.6g} where theory says {theory:.6g}")


def check(is_true: bool, what: object) -> None:
    """An assertion that `python -O` keeps, too."""
    if not is_true:
        raise SystemExit(str(what))


def check_sent(row: dict) -> None:
    """Every kind of traffic is that of theory, and what theory has no word for is little."""
    where = f"{row['program']} {row['layout']}"
    for name in ("gradients", "weights", "activations", "exchange"):
        check_close(row[f"{name} KiB (counted)"], row[f"{name} KiB (theory)"], f"{where}: {name} KiB")
    every = sum(kind["wire KiB"] for kind in row["collectives"].values())
    check(row["rest KiB"] < 0.005 * every, f"{where}: {row['rest KiB']} KiB of {every} are unaccounted for")


def check_kinds(found: dict[str, dict]) -> None:
    """The collectives that a layout calls for, and no others."""
    kinds = {name: set(row["collectives"]) for name, row in found.items()}
    gathering = {"all-gather", "all-reduce", "all-to-all"}
    wanted = {"data": {"all-reduce"}, "data by 2": {"all-reduce"}, "tensor": {"all-reduce"}}
    wanted |= {"fsdp": gathering, "data and fsdp": gathering, "dot": gathering}
    check(kinds == wanted, kinds)


def check_shares(found: dict[str, dict]) -> None:
    """Each device's part of the products, and of what is kept."""
    check_close(found["data by 2"]["MFLOP"] / 4, found["data"]["MFLOP"], "products by 8 beside by 2")
    check_close(found["data"]["MFLOP"], found["fsdp"]["MFLOP"], "products by fsdp beside by data")
    check_close(2 * found["fsdp"]["MFLOP"], found["dot"]["MFLOP"], "two gradients beside one")
    whole, part = found["data"]["arguments KiB"], found["fsdp"]["arguments KiB"]
    check(whole / 8 < part < whole / 8 * 1.4, f"arguments {part} KiB of {whole}")  # norms and biases are whole


def check_rows_apart() -> None:
    """Inside a vmap over rows nothing is divided by rows again, however many tiles a row has; tensor stays."""
    mesh = sharding.make_mesh(Layout(4, 2, 1))
    seen = []

    def look(x: jax.Array) -> jax.Array:
        seen.append((sharding.by_rows(mesh, 8), sharding.by_width(mesh, (8, 3, 2))))
        return x

    jax.vmap(look, axis_name=sharding.APART, spmd_axis_name=sharding.ROWS)(jax.numpy.zeros(8))
    check(seen == [(sharding.whole(mesh), sharding.whole(mesh))], seen)
    check(sharding.by_rows(mesh, 8).spec == jax.P(sharding.ROWS), sharding.by_rows(mesh, 8))


def check_inner_products() -> None:
    """<u, gradient> of what tensor divides, on an axis that is not the first, sends numbers and no array."""
    mesh = sharding.make_mesh(Layout(1, 1, 8))
    leaf = jax.ShapeDtypeStruct((3, 16, 5), "float32", sharding=jax.NamedSharding(mesh, jax.P(None, "tensor")))
    program = jax.jit(hypergradient._slope_and_scale).lower({"kernel": leaf}, {"kernel": leaf}).compile()
    arrays = [array.shape for one in collectives.read(program.as_text()).collectives for array in one.arrays]
    check(set(arrays) == {()}, arrays)


def main() -> None:
    """Compiles side by side, then checks."""
    check_rows_apart()
    check_inner_products()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = pool.map(lambda setting: scaling.count(scaling.SMALL, setting), SETTINGS.values())
    found = dict(zip(SETTINGS, rows, strict=True))
    for row in found.values():
        check_sent(row)
    check_kinds(found)
    check_shares(found)


if __name__ == "__main__":
    main()
