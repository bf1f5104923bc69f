"""Rows of bench/quality.py: rules with their numbers as plain values, the lists that a study runs, and what each of them is
in the simulation. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from hga_kvd_client.options import Rope
from hga_kvd_client.sketch import SketchSpec
from hga_kvd_client.sketches import BASIS_TOKENS_MIN
from simulate import CHUNK, Row, hga_rule, oracle_rule, sketch_rule

BASIS_TOKENS = 2048
# Groups that each query head opens, in so many chunks; the last two are DESIGN's.
HGA = ((20, 4), (20, 8), (20, 16), (16, 32))
# (dims at 4 bits, dims at 2 bits) of 64, around DESIGN's 5.3 %.
SWEEP_DIMS = (
    (8, 8), (8, 16), (12, 8), (12, 12), (16, 0), (16, 8), (12, 24), (16, 16), (20, 8), (24, 0), (8, 32), (16, 24),
    (24, 16), (32, 32),
)  # fmt: skip
SWEEP_BASIS = (512, 1024, 4096)
# What the targets name; `--budgets` is for the table.
OTHER_BUDGETS = (16, 8)


@dataclass(frozen=True)
class Spec:
    """A row as values, so that it can be sent to another process: kind, then its numbers.

    window; dense; hga CHUNKS GROUPS; own CHUNKS GROUPS (hga, each query head sees only its own groups); pooled CHUNKS
    GROUPS; oracle BUDGET; plain BUDGET (2-bit keys, mean and step per group); plain-chunk BUDGET; sketch DIMS4 DIMS2
    BUDGET BASIS_TOKENS BASIS_FIRST COVER.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    block_visibility: bool = False  # routed prefill of the whole text, the paper's way
    kv_float8: bool = False

    def label(self) -> str:
        n = self.numbers
        text = {
            "window": lambda: "window only",
            "dense": lambda: "dense",
            "hga": lambda: f"hga, {n[0]:.0f} chunks, {n[1]:.0f} groups per query head",
            "own": lambda: f"hga, {n[0]:.0f} chunks, {n[1]:.0f} groups, each query head its own",
            "pooled": lambda: f"hga pooled per KV head, {n[0]:.0f} chunks, {n[1]:.0f} groups",
            "oracle": lambda: f"oracle, layer budget {n[0]:.0f}",
            "plain": lambda: f"2-bit keys per group, layer budget {n[0]:.0f}",
            "plain-chunk": lambda: f"2-bit keys per chunk, layer budget {n[0]:.0f}",
            "sketch": lambda: f"sketch {n[0]:.0f} x 4 + {n[1]:.0f} x 2 bits, layer budget {n[2]:.0f}",
        }[self.kind]()
        if self.kind == "sketch":
            text += f", basis of {n[3]:.0f}" if n[3] != BASIS_TOKENS else ""
            text += f" from {n[4]:.0f} on" if n[4] else ""
            text += f", cover {n[5]:g}" if n[5] < 1 else ""
        return text + (", prefill too" if self.block_visibility else "") + (", K/V in fp8" if self.kv_float8 else "")


def sketch(dims4: int, dims2: int, budget: int, basis: int = BASIS_TOKENS, first: int = 0, cover: float = 1.0) -> Spec:
    return Spec("sketch", (dims4, dims2, budget, basis, first, cover))


def table_rows(budgets: tuple[int, ...], head_dim: int) -> list[Spec]:
    spec = SketchSpec.of_basis(head_dim)
    return [
        Spec("window"),
        *(sketch(spec.dims4, spec.dims2, budget) for budget in budgets),
        *(Spec("hga", numbers) for numbers in HGA),
        *(Spec("own", numbers) for numbers in HGA),
        Spec("pooled", (1, 1)),
        *(Spec("pooled", numbers) for numbers in HGA),
        *(Spec("oracle", (budget,)) for budget in budgets),
        *(Spec("plain", (budget,)) for budget in budgets),
        Spec("plain-chunk", (16,)),
    ]


def sweep_rows(head_dim: int) -> list[Spec]:
    quarter = head_dim // 4
    return [
        *(sketch(four * head_dim // 64, two * head_dim // 64, n) for n in OTHER_BUDGETS for four, two in SWEEP_DIMS),
        *(sketch(quarter, quarter, n, basis) for n in OTHER_BUDGETS for basis in SWEEP_BASIS),
    ]


def drift_rows(head_dim: int, start: int) -> list[Spec]:
    """A basis of the first tokens; one of the last before `start`; none."""
    quarter = head_dim // 4
    basis = min(BASIS_TOKENS, start // 2)
    return [
        spec
        for n in OTHER_BUDGETS
        for spec in (
            sketch(quarter, quarter, n, basis),
            sketch(quarter, quarter, n, basis, start - basis),
            Spec("plain", (n,)),
            Spec("oracle", (n,)),
        )
    ]


def extra_rows(head_dim: int) -> list[Spec]:
    quarter = head_dim // 4
    default = sketch(quarter, quarter, 16).numbers
    return [
        Spec("dense", kv_float8=True),
        Spec("sketch", default, kv_float8=True),
        *(sketch(quarter, quarter, 32, cover=cover) for cover in (0.9, 0.95, 0.97, 0.98, 0.99)),
        Spec("hga", (20, 16), block_visibility=True),
        Spec("sketch", default, block_visibility=True),
    ]


def row_of(spec: Spec, head_dim: int, rope: Rope, prompt: int) -> Row | None:
    """What the simulation runs behind a prompt of so many tokens; None: dense. A basis is made of prompt tokens only, and of
    too few there is none, as in a session: keys are plain."""
    scale, n = head_dim**-0.5, spec.numbers
    kv_bytes = CHUNK * 2 * head_dim * 2
    rule, state = None, 0.0
    if spec.kind == "dense" and not spec.kv_float8:
        return None
    if spec.kind in ("hga", "own", "pooled"):
        rule = hga_rule(rope, int(n[0]), int(n[1]), scale, pooled=spec.kind == "pooled", own=spec.kind == "own")
        state = 5 * head_dim * 2 / kv_bytes  # one vector a chunk, one a group, bf16
    elif spec.kind == "oracle":
        rule = oracle_rule(int(n[0]))
    elif spec.kind not in ("window", "dense"):
        if spec.kind == "sketch":
            sketched = SketchSpec(head_dim, int(n[0]), int(n[1]))
            budget, basis_tokens, basis_first, cover = int(n[2]), min(int(n[3]), prompt), int(n[4]), n[5]
            if basis_tokens < min(BASIS_TOKENS_MIN, n[3]):
                sketched, basis_tokens = SketchSpec.plain(head_dim), 0
        else:
            sketched = SketchSpec.plain(head_dim) if spec.kind == "plain" else SketchSpec(head_dim, 0, head_dim)
            budget, basis_tokens, basis_first, cover = int(n[0]), 0, 0, 1.0
        rule = sketch_rule(sketched, budget, basis_tokens, basis_first, cover)
        state = sketched.chunk_bytes / kv_bytes
    return Row(spec.label(), rule, state, spec.block_visibility, spec.kv_float8, spec.kind == "dense")
