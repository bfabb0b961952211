"""The figure of bits/dim: where the bits go, what they buy, and how good the network is at each noise level."""

from pathlib import Path

from functions.evaluation.bits_per_dim import BitsPerDim
from functions.support.pictures import plt, save_figure


def plot_bits_per_dim(result: BitsPerDim, path: Path, title: str) -> None:
    """Three panels: the terms by t, the rate-distortion curve (Figure 5 of the paper), and the squared errors by t."""
    curves = result.curves()
    t = [value + 1 for value in curves["t"]]  # the paper's, from 1, for the logarithmic axis
    figure, (terms, rate, errors) = plt.subplots(1, 3, figsize=(13, 4))
    terms.loglog(t, curves["bits_per_dim_a_step"], marker=".", color="tab:blue")
    terms.set(xlabel="t (the paper's)", ylabel="bits/dim in one step", title="terms of the bound")
    total = curves["rate"] + [result.rate]
    rate.plot(curves["rate"], curves["rmse"], marker=".", color="tab:blue")
    rate.set(xlabel="rate so far, bits/dim", ylabel="RMSE of $x_0$, of 255", title="rate and distortion")
    rate.set(xlim=(0, 1.03 * max(total)), ylim=(0, None))
    errors.loglog(t, curves["mse_eps"], marker=".", color="tab:orange", label=r"of $\epsilon$ (the loss)")
    errors.loglog(t, curves["mse_x_0"], marker=".", color="tab:blue", label=r"of $x_0$ in [-1, 1]")
    errors.set(xlabel="t (the paper's)", ylabel="mean squared error", title="the network by noise level")
    errors.legend(frameon=False)
    for axis in (terms, rate, errors):
        axis.grid(color="0.92")
    sums = f"{result.total:.3f} bits/dim = rate {result.rate:.3f} + distortion {result.distortion:.3f}"
    figure.suptitle(f"{title}: {sums}", fontsize=11)
    figure.tight_layout()
    save_figure(figure, path)
