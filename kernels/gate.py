"""Device functions shared by the kernels: gates, index maps, tile order, activations."""

import triton
import triton.language as tl

# Gates a program samples or scans at a time before its main loop: 2 to 4 a thread.
CHUNK: tl.constexpr = tl.constexpr(512)


@triton.jit
def normal(seed, counter):
    """Return fp32 standard normals by Box-Muller from the words that ``tl.randn`` uses.

    ``tl.randn`` calls cosf, whose range reduction for huge arguments takes 32 bytes of stack on
    every CUDA target. Here the angle is 2π u with u in [0, 1): cos 2πu = -sin 2πd for
    d = ¼ - |u - ½| in [-¼, ¼], where six Taylor terms are within 6e-8.
    """
    u1, u2, _, _ = tl.rand4x(seed, counter)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    a = 6.283185307179586 * (0.25 - tl.abs(u2 - 0.5))
    s = a * a
    p = 2.7557319223985893e-06 - s * 2.505210838544172e-08
    p = 0.008333333333333333 + s * (p * s - 1.984126984126984e-04)
    return -radius * a * (1.0 + s * (p * s - 0.16666666666666666))


@triton.jit
def gate_tile(
    value_ptr, logits_ptr, seed_ptr, index, mask, span, width, shift, scale, beta,
    DISTRIBUTION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Return the fp32 gates of the features ``index``, 0 where ``mask`` is false.

    ``"none"`` gives 1, ``"value"`` reads ``value_ptr``. Otherwise feature i has the logit and the
    Philox counter of its unit (i // span) width + i mod width, which is i itself for an untied side
    (span = width = size). The key is ``seed_ptr[SIDE]`` (0 rows, 1 columns); None means no noise.

    - ranking: 1[θ > 0]
    - gaussian: clamp(tanh θ + shift + scale ε, 0, 1)
    - hard_concrete: clamp(shift + scale sigmoid((logit u + θ) / beta), 0, 1); beta is 1 without u
    """
    if DISTRIBUTION == "none":
        z = mask.to(tl.float32)
    elif DISTRIBUTION == "value":
        z = tl.load(value_ptr + index, mask=mask, other=0.0).to(tl.float32)
    else:
        unit = (index // span) * width + index % width
        theta = tl.load(logits_ptr + unit, mask=mask, other=0.0)
        # Triton passes Python floats as fp32, Inductor as fp64: pinned, so that both agree.
        shift = tl.to_tensor(shift).to(tl.float32)
        scale = tl.to_tensor(scale).to(tl.float32)
        if DISTRIBUTION == "ranking":
            z = (theta > 0.0).to(tl.float32)
        elif DISTRIBUTION == "gaussian":
            z = 2.0 * tl.sigmoid(2.0 * theta) - 1.0 + shift
            if seed_ptr is not None:
                z += scale * normal(tl.load(seed_ptr + SIDE), unit)
        else:
            if seed_ptr is not None:
                u = tl.rand(tl.load(seed_ptr + SIDE), unit)
                u = tl.minimum(tl.maximum(u, 1e-6), 1.0 - 1e-6)
                theta = (tl.log(u) - tl.log(1.0 - u) + theta) / tl.to_tensor(beta).to(tl.float32)
            z = shift + scale * tl.sigmoid(theta)
        z = tl.minimum(tl.maximum(z, 0.0), 1.0)
        # A NaN logit gives a NaN gate: maximum would make it a closed one. Masked loads give 0.
        z = tl.where(mask, tl.where(theta == theta, z, theta), 0.0)
    return z


@triton.jit
def gate_derivative(
    z, theta, shift, scale, beta,
    DISTRIBUTION: tl.constexpr, NOISE: tl.constexpr, CLOSED_GRAD: tl.constexpr,
):  # fmt: skip
    """Return dz/dθ from the value z alone, without the noise; 0 where the clamp holds z.

    - ranking: 1 (straight-through), for open gates only unless ``CLOSED_GRAD``
    - gaussian: 1 - tanh² θ
    - hard_concrete: scale s (1 - s) / beta with s = (z - shift) / scale; beta is 1 without noise
    """
    if DISTRIBUTION == "ranking":
        d = tl.full(z.shape, 1.0, tl.float32) if CLOSED_GRAD else z
    else:
        if DISTRIBUTION == "gaussian":
            s = tl.sigmoid(2.0 * theta)
            d = 4.0 * s * (1.0 - s)
        else:
            scale = tl.to_tensor(scale).to(tl.float32)
            s = (z - tl.to_tensor(shift).to(tl.float32)) / scale
            d = scale * s * (1.0 - s)
            if NOISE:
                d = d / tl.to_tensor(beta).to(tl.float32)
        d = tl.where((z > 0.0) & (z < 1.0), d, 0.0)
    return d


@triton.jit
def feature_of(map_ptr, position, mask):
    """Return the features at ``position``: read from the index map, the position itself without."""
    return position if map_ptr is None else tl.load(map_ptr + position, mask=mask, other=0)


@triton.jit
def fill_gate(
    value_ptr, logits_ptr, seed_ptr, map_ptr, count, span, width, shift, scale, beta,
    DISTRIBUTION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Write the gates of all ``count`` positions; return 1 + the last position with an open one.

    Every program of a GEMM calls this before its main loop, so that one launch both samples and
    multiplies: ``count`` Philox calls spread over its threads against ``count`` rank-1 updates of
    its tile. All programs store the same bits, so their order doesn't matter; the barrier makes a
    program's own stores visible to its loads. Tiles behind the last open gate are never loaded.
    """
    end = 0
    for start in range(0, count, CHUNK):
        position = start + tl.arange(0, CHUNK)
        mask = position < count
        index = feature_of(map_ptr, position, mask)
        z = gate_tile(
            value_ptr, logits_ptr, seed_ptr, index, mask, span, width, shift, scale, beta,
            DISTRIBUTION, SIDE,
        )  # fmt: skip
        if DISTRIBUTION != "value":
            tl.store(value_ptr + index, z, mask=mask)
        end = tl.maximum(end, tl.max(tl.where(z != 0.0, position + 1, 0)))
    if DISTRIBUTION != "value":
        tl.debug_barrier()
    return end


@triton.jit
def fill_gaps(
    out_ptr, residual_ptr, map_ptr, m, M, tile, count, size, stride_out, stride_residual,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write zeros, or the residual, from this tile's first kept feature up to the next tile's.

    The tiles' intervals are disjoint and cover 0 … size, so the removed features need no second
    launch; the barrier orders these stores before the tile's own, which follow. A map that keeps
    everything, in whatever order, leaves no gap.
    """
    if count != size:
        first = tile * BLOCK
        low = tl.load(map_ptr + first, mask=(first > 0) & (first < count), other=0)
        high = tl.load(map_ptr + first + BLOCK, mask=first + BLOCK < count, other=size)
        WIDTH: tl.constexpr = 32 if BLOCK > 32 else BLOCK
        for start in range(low, high, WIDTH):
            j = start + tl.arange(0, WIDTH).to(tl.int64)
            mask = (m < M)[:, None] & (j < high)[None, :]
            if residual_ptr is None:
                fill = tl.zeros((m.shape[0], WIDTH), out_ptr.dtype.element_ty)
            else:
                residual_ptrs = residual_ptr + m[:, None] * stride_residual + j[None, :]
                fill = tl.load(residual_ptrs, mask=mask, other=0.0)
            tl.store(out_ptr + m[:, None] * stride_out + j[None, :], fill, mask=mask)
        tl.debug_barrier()


@triton.jit
def tile_count(size, BLOCK: tl.constexpr):
    """Return ⌈size / BLOCK⌉, at least 1: as many tiles as the launch has, for nothing too."""
    return tl.maximum(tl.cdiv(size, BLOCK), 1)


@triton.jit
def tile_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the (m, n) tile of program ``pid``, in bands of ``GROUP_M`` row tiles.

    Programs that run together then share operand tiles in L2.
    """
    band = pid // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Return act(v) in fp32; every activation maps 0 to 0."""
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # ½ (1 + tanh a) = sigmoid(2 a), with a = √(2/π) (v + 0.044715 v³)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    return v
