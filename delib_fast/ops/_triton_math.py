"""Device functions that the Triton kernels of the fused heads share."""

# Triton kernels have no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh to about one ulp: from exponentials, but near 0, where they cancel, from the polynomial of Cephes."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    near = (p * s - 3.33332819422e-1) * s * x + x
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logit after the softcap: the input of the softmax."""
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def slope(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """dx/dz, as a function of x."""
    if HAS_SOFTCAP:
        ratio = x / softcap
        slope_of_x = 1.0 - ratio * ratio
    else:
        slope_of_x = 1.0
    return slope_of_x
