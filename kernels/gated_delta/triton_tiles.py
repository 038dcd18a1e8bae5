"""How the kernels of the gated delta rule are cut: by kernel, architecture, width and precision."""

from spikelm.kernels.gla.triton_tiles import Tiles, power_of_2


def tiles(kernel: str, target: str, key_dim: int, value_dim: int, wide: bool) -> Tiles:
    """Configuration of a kernel; columns are at most 64 at a time, as in gated linear attention.

    Args:
        kernel: inverse, forward, reverse or gradients.
        target: sm_80, sm_90, sm_100 or gfx942.
        key_dim: K.
        value_dim: V.
        wide: whether products are of float32.
    """
    small = target not in ("sm_90", "sm_100")  # others hold operands of products in registers
    key_block, value_block = power_of_2(key_dim), min(power_of_2(value_dim), 64)
    # The sweeps hold whole rows of K, so that longer chunks of wide keys do not fit in registers.
    chunk = 16 if wide or key_block > 128 else 32 if small or key_block > 64 else 64
    if kernel == "inverse":
        return Tiles(chunk=chunk, values=16, keys=min(key_block, 64), warps=4, stages=1)
    if kernel == "gradients":
        side = 16 if small else 32
        keys = min(key_block, 16 if chunk == 64 else side)  # more would spill with several query heads
        warps = 4 if chunk == 16 and not small and not wide else 8
        return Tiles(chunk=chunk, values=min(value_block, side), keys=keys, warps=warps, stages=1)
    if key_block <= 64 and not wide:
        return Tiles(chunk=chunk, values=min(value_block, 32), keys=key_block, warps=4, stages=1)
    # Columns enough for the products to take their operands from shared memory, not from copies per warp.
    values = min(value_block, 16 if wide or small else 64)
    if key_block > 128:
        values = min(values, 32)
    return Tiles(chunk=chunk, values=values, keys=key_block, warps=8, stages=1)
